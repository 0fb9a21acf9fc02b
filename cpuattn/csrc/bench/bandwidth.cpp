// How fast this machine reads memory and multiplies, whatever the loop looks like.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "probes.h"
#include "thread_pool.h"

namespace omniserve {
namespace {

namespace nb = nanobind;

constexpr std::size_t kHugePage = 2u << 20;

typedef float Wide __attribute__((vector_size(64), aligned(64)));
typedef float Narrow __attribute__((vector_size(32), aligned(32)));

// Sums `bytes` at `p` with loads of V, in kStreams streams, fetching kAhead bytes ahead.
template <typename V, int kStreams, int kAhead, int kLocality>
float sum_of(const std::byte* p, std::size_t bytes) {
  constexpr std::size_t kStep = 256;
  constexpr int kLoads = kStep / sizeof(V);
  const std::size_t part = bytes / kStreams / kStep * kStep;
  V sums[kLoads] = {};
  for (std::size_t at = 0; at < part; at += kStep)
    for (int s = 0; s < kStreams; ++s) {
      const std::byte* q = p + s * part + at;
      if (kAhead > 0)
        for (std::size_t line = 0; line < kStep; line += 64)
          __builtin_prefetch(q + kAhead + line, 0, kLocality);
      for (int i = 0; i < kLoads; ++i) sums[i] += reinterpret_cast<const V*>(q)[i];
    }
  V total = {};
  for (int i = 0; i < kLoads; ++i) total += sums[i];
  return total[0];
}

#define TARGETS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#if !defined(__x86_64__)
#undef TARGETS
#define TARGETS
#endif

using Sum = float (*)(const std::byte*, std::size_t);

struct Loop {
  const char* name;
  Sum sum;
};

#define LOOP(name, V, streams, ahead, locality) \
  TARGETS float name(const std::byte* p, std::size_t n) { \
    return sum_of<V, streams, ahead, locality>(p, n); \
  }
LOOP(narrow, Narrow, 1, 0, 0)
LOOP(wide, Wide, 1, 0, 0)
LOOP(wide_2_streams, Wide, 2, 0, 0)
LOOP(wide_4_streams, Wide, 4, 0, 0)
LOOP(wide_ahead_2k, Wide, 1, 2048, 3)
LOOP(wide_ahead_8k, Wide, 1, 8192, 3)
LOOP(wide_ahead_16k, Wide, 1, 16384, 3)
LOOP(wide_2_streams_ahead_8k, Wide, 2, 8192, 3)
LOOP(wide_ahead_8k_l2, Wide, 1, 8192, 2)
LOOP(wide_ahead_8k_nta, Wide, 1, 8192, 0)
LOOP(wide_2_streams_ahead_4k, Wide, 2, 4096, 3)
#undef LOOP

#define ENTRY(name) {#name, name}
constexpr Loop kLoops[] = {
    ENTRY(narrow),        ENTRY(wide),          ENTRY(wide_2_streams),
    ENTRY(wide_4_streams), ENTRY(wide_ahead_2k), ENTRY(wide_ahead_8k),
    ENTRY(wide_ahead_16k), ENTRY(wide_2_streams_ahead_8k), ENTRY(wide_ahead_8k_l2), ENTRY(wide_ahead_8k_nta),
    ENTRY(wide_2_streams_ahead_4k)};
#undef ENTRY

// Memory that read loops run over, in huge pages where the system gives them.
class ReadProbe {
 public:
  ReadProbe(std::size_t bytes, unsigned threads)
      : bytes_((bytes + kHugePage - 1) / kHugePage * kHugePage), pool_(threads, {}, kSpinUs) {
    memory_ = static_cast<std::byte*>(std::aligned_alloc(kHugePage, bytes_));
    if (memory_ == nullptr) throw std::bad_alloc();
    ::madvise(memory_, bytes_, MADV_HUGEPAGE);
    share([this](std::size_t at, std::size_t n) { std::memset(memory_ + at, 0, n); });
  }
  ~ReadProbe() { std::free(memory_); }
  ReadProbe(const ReadProbe&) = delete;

  std::size_t bytes() const { return bytes_; }

  // Bytes per second of one sweep with a loop.
  double read(std::size_t loop) {
    if (loop >= std::size(kLoops)) throw std::invalid_argument("no such loop");
    std::atomic<float> sink{0};
    const Stopwatch watch;
    share([&](std::size_t at, std::size_t n) {
      sink.store(kLoops[loop].sum(memory_ + at, n), std::memory_order_relaxed);
    });
    return static_cast<double>(bytes_) / watch.seconds();
  }

  // The same with each loop.
  std::vector<double> sweep() {
    std::vector<double> rates;
    for (std::size_t loop = 0; loop < std::size(kLoops); ++loop) rates.push_back(read(loop));
    return rates;
  }

 private:
  void share(const std::function<void(std::size_t, std::size_t)>& use) {
    constexpr std::size_t kPart = kHugePage;
    std::atomic<std::size_t> next{0};
    pool_.run([&] {
      for (std::size_t at; (at = next.fetch_add(kPart)) < bytes_;) use(at, kPart);
    });
  }

  std::size_t bytes_;
  ThreadPool pool_;
  std::byte* memory_ = nullptr;
};

std::vector<std::string> loop_names() {
  std::vector<std::string> names;
  for (const Loop& loop : kLoops) names.emplace_back(loop.name);
  return names;
}

#if defined(__x86_64__)
// Sixty-four operations in each of sixteen chains, which hide one another's latency.
__attribute__((target("avx512f,avx512bf16"))) double dot_products(std::uint64_t rounds) {
  constexpr int kChains = 16;
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  __m512i a = _mm512_setzero_si512(), b = a;
  for (std::uint64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i)
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)a, (__m512bh)b);
    asm volatile("" : "+v"(a), "+v"(b));
  }
  __m512 total = sums[0];
  for (int i = 1; i < kChains; ++i) total = _mm512_add_ps(total, sums[i]);
  return total[0] + 64.0 * kChains * static_cast<double>(rounds);
}
#endif

// bfloat16 multiply-adds per second, times two, of dot products that never leave the registers;
// 0 where this machine has no such instruction.
double bf16_flops(unsigned threads) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bf16")) return 0;
  constexpr std::uint64_t kRounds = 400'000;
  ThreadPool pool(threads, {}, kSpinUs);
  std::atomic<std::uint64_t> left{8 * threads};
  std::atomic<double> flops{0};
  const Stopwatch watch;
  pool.run([&] {
    double mine = 0;
    for (std::uint64_t n; (n = left.load()) > 0;)
      if (left.compare_exchange_strong(n, n - 1)) mine += dot_products(kRounds);
    for (double seen = flops.load(); !flops.compare_exchange_weak(seen, seen + mine);) {
    }
  });
  return flops.load() / watch.seconds();
#else
  (void)threads;
  return 0;
#endif
}

}  // namespace

void bind_bandwidth(nb::module_& m) {
  using namespace nb::literals;
  m.def("read_loops", &loop_names);
  m.def("bf16_flops", &bf16_flops, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<ReadProbe>(m, "ReadProbe")
      .def(nb::init<std::size_t, unsigned>(), "bytes"_a, "threads"_a)
      .def_prop_ro("bytes", &ReadProbe::bytes)
      .def("read", &ReadProbe::read, "loop"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("sweep", &ReadProbe::sweep, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace omniserve
