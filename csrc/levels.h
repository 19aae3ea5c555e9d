// CPU instruction-set levels: which were built, which the machine has, which is in use.
#pragma once
#include "ops.h"

namespace lmn {

/// The CPU kernels of one level, as overloads. `workspace` returns the number of bytes that an op needs (0: none). `run`
/// returns null or an error message. If the level has no kernel for an op, `workspace` returns 0, and `run` returns an error
/// message.
class Level {
 public:
  constexpr Level(const char* name_, bool supported_, bool emulates_cuda_ = false)
      : name(name_), supported(supported_), emulates_cuda(emulates_cuda_) {}
  const char* const name;
  const bool supported;      // by this machine
  const bool emulates_cuda;  // it runs the CUDA kernels; only use_level() selects it
#define LMN_DECLARE(Op)                                             \
  virtual std::size_t workspace(const Op&, int) const { return 0; } \
  virtual const char* run(const Op&, int) const { return "no kernel on the CPU"; }
  LMN_OPS(LMN_DECLARE)
#undef LMN_DECLARE
};

const Level* const* levels();  // lowest first
int level_count();
const Level& level_in_use();       // the highest supported one until use_level()
bool use_level(const char* name);  // false: not built, or not supported here

}  // namespace lmn
