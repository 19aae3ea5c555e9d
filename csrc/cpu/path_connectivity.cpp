#include "chain/pairs.h"

namespace lmn::LMN_LEVEL {

std::size_t workspace(const PathConnectivity<float>& op, int threads) { return lmn::workspace(op, {}, threads); }
std::size_t workspace(const PathConnectivity<double>& op, int threads) { return lmn::workspace(op, {}, threads); }
void run(const PathConnectivity<float>& op, int threads) { connectivity_on<false>(op, {}, threads); }
void run(const PathConnectivity<double>& op, int threads) { connectivity_on<false>(op, {}, threads); }

}  // namespace lmn::LMN_LEVEL
