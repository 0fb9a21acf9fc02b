#include "kernel.h"
#include "omniserve/shm/layout.h"

namespace omniserve {
namespace {

struct Choice {
  AttendFn f32;
  AttendFn bf16;
  const char* name;
};

Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return {kernel_v4::attend_f32, kernel_v4::attend_bf16, "x86-64-v4"};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
    return {kernel_v3::attend_f32, kernel_v3::attend_bf16, "x86-64-v3"};
#endif
  return {kernel_base::attend_f32, kernel_base::attend_bf16, "base"};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

AttendFn attend_kernel(std::uint32_t dtype) {
  return dtype == shm::kBfloat16 ? chosen().bf16 : chosen().f32;
}

const char* kernel_name() { return chosen().name; }

}  // namespace omniserve
