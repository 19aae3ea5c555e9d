#include "chain/pairs.h"

namespace lmn {
namespace {

template <class T>
Stencil<T> stencil_of(const HermiteConnectivity<T>& op) {
  return make_stencil<T>(op.nodes, op.midpoint);
}

}  // namespace

namespace LMN_LEVEL {

std::size_t workspace(const HermiteConnectivity<float>& op, int threads) { return lmn::workspace(op, stencil_of(op), threads); }
std::size_t workspace(const HermiteConnectivity<double>& op, int threads) {
  return lmn::workspace(op, stencil_of(op), threads);
}
void run(const HermiteConnectivity<float>& op, int threads) { connectivity_on<true>(op, stencil_of(op), threads); }
void run(const HermiteConnectivity<double>& op, int threads) { connectivity_on<true>(op, stencil_of(op), threads); }

}  // namespace LMN_LEVEL
}  // namespace lmn
