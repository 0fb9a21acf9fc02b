#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "kernel.h"
#include "omniserve/shm/layout.h"

namespace omniserve {
namespace {

struct Kernel {
  AttendFn f32;
  AttendFn bf16;
  const char* name;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_v4() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool has_v3() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
#endif

// The fastest first.
constexpr Kernel kKernels[] = {
#if defined(__x86_64__)
    {kernel_v4::attend_f32, kernel_v4::attend_bf16, "x86-64-v4", has_v4},
    {kernel_v3::attend_f32, kernel_v3::attend_bf16, "x86-64-v3", has_v3},
#endif
    {kernel_base::attend_f32, kernel_base::attend_bf16, "base", [] { return true; }},
};

const Kernel* fastest() {
  for (const Kernel& kernel : kKernels)
    if (kernel.runs_here()) return &kernel;
  return nullptr;  // not reached: the last one runs anywhere
}

std::atomic<const Kernel*>& chosen() {
  static std::atomic<const Kernel*> kernel{fastest()};
  return kernel;
}

}  // namespace

AttendFn attend_kernel(std::uint32_t dtype) {
  const Kernel* kernel = chosen().load(std::memory_order_relaxed);
  return dtype == shm::kBfloat16 ? kernel->bf16 : kernel->f32;
}

const char* kernel_name() { return chosen().load(std::memory_order_relaxed)->name; }

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernel& kernel : kKernels)
    if (kernel.runs_here()) names.emplace_back(kernel.name);
  return names;
}

void use_kernel(const std::string& name) {
  for (const Kernel& kernel : kKernels) {
    if (name != kernel.name || !kernel.runs_here()) continue;
    chosen().store(&kernel, std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument("no kernel " + name + " on this CPU");
}

}  // namespace omniserve
