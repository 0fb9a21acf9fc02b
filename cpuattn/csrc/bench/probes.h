// What benchmarks time: the limits of this machine, and loops that Python would slow down.
// All times are in seconds.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>

namespace omniserve {

// Helpers of one probe must be asleep before another is timed: callers wait longer than this.
constexpr std::int64_t kSpinUs = 1000;

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(Clock::now() - start_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

void bind_attention(nanobind::module_& m);
void bind_bandwidth(nanobind::module_& m);
void bind_dense_bench(nanobind::module_& m);
void bind_transfer(nanobind::module_& m);
void bind_transport(nanobind::module_& m);

}  // namespace omniserve
