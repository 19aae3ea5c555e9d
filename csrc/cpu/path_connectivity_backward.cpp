#include "chain/backward.h"

namespace lmn::LMN_LEVEL {

std::size_t workspace(const PathConnectivityBackward<float>& op, int threads) { return workspace_of(op, threads); }
std::size_t workspace(const PathConnectivityBackward<double>& op, int threads) { return workspace_of(op, threads); }
void run(const PathConnectivityBackward<float>& op, int threads) { gradients_on(op, threads); }
void run(const PathConnectivityBackward<double>& op, int threads) { gradients_on(op, threads); }

}  // namespace lmn::LMN_LEVEL
