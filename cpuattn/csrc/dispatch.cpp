#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "dense_kernel.h"
#include "kernel.h"
#include "omniserve/shm/layout.h"

namespace omniserve {
namespace {

struct Candidate {
  const Kernels* kernels;
  const DenseKernelSet* dense;
  bool (*runs_here)();
  bool (*made_for_this)() = [] { return true; };  // or for another CPU with the same instructions
};

#if defined(__x86_64__)
bool has_v3() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool has_v4_dot() {
  return has_v4() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

// Zen 3 is of the same family, but has no AVX-512.
bool is_zen4() { return __builtin_cpu_is("amdfam19h") && has_v4_dot(); }
#endif

// The fastest first, where it is made for this CPU.
constexpr Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kernel_zen4::kKernels, &kernel_zen4::kDense, has_v4_dot, is_zen4},
    {&kernel_v4_dot::kKernels, &kernel_v4_dot::kDense, has_v4_dot},
    {&kernel_v4::kKernels, &kernel_v4::kDense, has_v4},
    {&kernel_v3::kKernels, &kernel_v3::kDense, has_v3},
#endif
    {&kernel_base::kKernels, &kernel_base::kDense, [] { return true; }},
};

// Those that run on this CPU, the fastest first. Never empty: the last one runs anywhere.
std::vector<const Candidate*> runnable() {
  std::vector<const Candidate*> found;
  for (const bool made_for_this : {true, false})
    for (const Candidate& candidate : kCandidates)
      if (candidate.runs_here() && candidate.made_for_this() == made_for_this)
        found.push_back(&candidate);
  return found;
}

std::atomic<const Candidate*>& chosen() {
  static std::atomic<const Candidate*> candidate{runnable().front()};
  return candidate;
}

}  // namespace

Kernels::Attend Kernels::attend(std::uint32_t kv_dtype) const {
  switch (kv_dtype) {
    case shm::kBfloat16: return bfloat16;
    case shm::kFloat16: return float16;
    case shm::kInt8: return int8;
    default: return float32;
  }
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed)->kernels; }

const DenseKernelSet& dense_kernels() { return *chosen().load(std::memory_order_relaxed)->dense; }

const char* kernel_name() { return kernels().name; }

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Candidate* candidate : runnable()) names.emplace_back(candidate->kernels->name);
  return names;
}

void use_kernel(const std::string& name) {
  for (const Candidate* candidate : runnable()) {
    if (name != candidate->kernels->name) continue;
    chosen().store(candidate, std::memory_order_relaxed);
    return;
  }
  std::string message = "no kernel " + name + " on this CPU, which runs:";
  for (const std::string& known : kernel_names()) message += " " + known;
  throw std::invalid_argument(message);
}

}  // namespace omniserve
