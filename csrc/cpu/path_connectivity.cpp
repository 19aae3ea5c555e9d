#include "chain/pairs.h"

namespace lmn::LMN_LEVEL {

std::size_t path_connectivity_workspace(const PathConnectivity<float>& op, int threads) {
  return workspace(op, {}, threads);
}
std::size_t path_connectivity_workspace(const PathConnectivity<double>& op, int threads) {
  return workspace(op, {}, threads);
}
void path_connectivity(const PathConnectivity<float>& op, int threads) { connectivity_on<false>(op, {}, threads); }
void path_connectivity(const PathConnectivity<double>& op, int threads) { connectivity_on<false>(op, {}, threads); }

}  // namespace lmn::LMN_LEVEL
