#include "chain/pairs.h"

namespace lmn {
namespace {

template <class T>
Stencil<T> stencil_of(const HermiteConnectivity<T>& op) {
  return make_stencil<T>(op.path.nodes, op.midpoint);
}

}  // namespace

namespace LMN_LEVEL {

std::size_t hermite_connectivity_workspace(const HermiteConnectivity<float>& op, int threads) {
  return workspace(op.path, stencil_of(op), threads);
}
std::size_t hermite_connectivity_workspace(const HermiteConnectivity<double>& op, int threads) {
  return workspace(op.path, stencil_of(op), threads);
}
void hermite_connectivity(const HermiteConnectivity<float>& op, int threads) {
  connectivity_on<true>(op.path, stencil_of(op), threads);
}
void hermite_connectivity(const HermiteConnectivity<double>& op, int threads) {
  connectivity_on<true>(op.path, stencil_of(op), threads);
}

}  // namespace LMN_LEVEL
}  // namespace lmn
