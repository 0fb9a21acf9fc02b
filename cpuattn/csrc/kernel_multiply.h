// The loop that reads KV. Part of kernel_impl.h, compiled with it.
#pragma once

#include "kernel.h"

// Kept as one copy of the code: neither inlined nor specialised for its callers.
#if defined(__clang__)
#define ONE_COPY __attribute__((noinline))
#else
#define ONE_COPY __attribute__((noinline, noclone))
#endif

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

// Operands of a query, or of its weights: room for the largest head.
template <typename F>
constexpr std::size_t kOperands = kMaxHeadDim / F::kPacking;

// sums[i] = start[i] + sum over `lines` steps of operand * line, for N queries and the C lines of KV
// that lie side by side at every step. Rows of operands are kOperands apart. `start` is read last:
// it seldom is in the first-level cache, and nothing may wait for it.
//
// K and V go through the same copy of this loop: two copies that take turns read less from memory,
// as if hardware prefetchers followed instructions and lost their track. Every loop over `acc` is
// unrolled, or the compiler keeps it in memory.
template <typename F, int N, int C, bool kFetch>
ONE_COPY void multiply(const std::byte* line, std::size_t lines, const std::byte* fetch,
                       const std::uint32_t* operand, const float* start, std::size_t start_stride,
                       float* sums, std::size_t stride) {
  constexpr std::size_t kLine = kLanes * F::kPacking * F::kBytes;
  Vec acc[N][C];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) acc[i][c] = Vec{};
  for (const std::uint32_t* end = operand + lines; operand != end; ++operand) {
    typename F::Line values[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      values[c] = F::line(line + c * kLine);
      if (kFetch) Fetch<F, N>::line(fetch + c * kLine, c);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const auto factor = F::spread(operand[i * kOperands<F>]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) acc[i][c] = F::dot(acc[i][c], values[c], factor);
    }
    line += C * kLine;
    fetch += C * kLine;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      store(sums + i * stride + c * kLanes, load(start + i * start_stride + c * kLanes) + acc[i][c]);
}

#undef ONE_COPY

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA
