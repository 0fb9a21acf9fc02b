// How memory is fetched ahead of its reading: far enough for its latency, and little enough to be
// still in the cache when its turn comes. All of it measured. Included by kernel_*.cpp and
// dense_*.cpp only, after simd.h.

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

#if defined(OMNISERVE_KERNEL_ZEN4)
constexpr int kFetchLocality = 2;  // the second-level cache
#else
constexpr int kFetchLocality = 3;  // the first-level cache
#endif

// kWaitsForMemory: the loop's arithmetic takes less time than its reading. kUsual: bytes ahead.
template <bool kWaitsForMemory, std::size_t kUsual>
struct FetchAhead {
#if defined(OMNISERVE_KERNEL_ZEN4)
  // A core of Zen 4 waits for at most 24 lines that instructions asked for, which is 21 GB/s. Its own
  // prefetchers get 32 GB/s as long as they see one stream without gaps. So a loop that waits for
  // memory fetches every other line, which keeps them going through pauses. Where arithmetic takes
  // longer they lose the stream: then every line is fetched.
  static constexpr int kEvery = kWaitsForMemory ? 2 : 1;
  static constexpr std::size_t kBytes = kWaitsForMemory ? 6144 : 8192;
#else
  static constexpr int kEvery = 1;
  static constexpr std::size_t kBytes = kUsual;
#endif

  // Fetches for the i-th of the lines that a loop reads in one step. Where that is one line, and with
  // float16, two of whose lines are one of the cache, every line is fetched.
  static INLINE void line(const std::byte* p, int i) {
    if (i % kEvery == 0) __builtin_prefetch(p, 0, kFetchLocality);
  }
};

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA
