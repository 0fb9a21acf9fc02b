// The loops that read scaled KV (int8), one for K and one for V. Part of kernel_impl.h, compiled
// with it. Made from the source of kernel_multiply.h they read up to a fifth less from memory.
#pragma once

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

// Raw scores of N queries with the group of C * 16 tokens at `k`: sum over d of q[d] * K[d][tokens].
// For each line of K that it reads it fetches one from `fetch` on, in the order of addresses, which
// the hardware's own prefetchers follow.
template <typename F, int N, int C, bool kFetch>
INLINE void score_scaled(const State<F>& s, int query, const AttendUnit& u, const std::byte* k,
                         const float* k_steps, const std::byte* fetch, float* scores) {
  constexpr int kLine = kLanes * F::kPacking * F::kBytes;
  const std::uint32_t steps = u.head_dim / F::kPacking;
  const std::uint32_t* q = s.q + std::size_t(query) * F::kTerms * steps;
  typename F::Acc acc[N][C][F::kTerms];
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < C; ++c)
      for (int t = 0; t < F::kTerms; ++t)
        acc[i][c][t] = F::start_score(s.bias[(query + i) * F::kTerms + t]);
  for (std::uint32_t d = 0; d < steps; ++d) {
    decltype(F::line_k(k)) line[C];
    for (int c = 0; c < C; ++c) {
      line[c] = F::line_k(k + (d * C + c) * kLine);
      if (kFetch) __builtin_prefetch(fetch + (d * C + c) * kLine, 0, 3);
    }
    for (int i = 0; i < N; ++i)
      for (int t = 0; t < F::kTerms; ++t) {
        const auto operand = F::spread_q(q[(i * F::kTerms + t) * steps + d]);
        for (int c = 0; c < C; ++c) acc[i][c][t] = F::dot_k(acc[i][c][t], line[c], operand);
      }
  }
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < C; ++c)
      store(scores + i * kTileTokens + c * kLanes, F::score(acc[i][c], k_steps + c * kLanes));
}

// out[N queries][V * 16 dims at d] += sum over the tile's tokens of weight * V[token][dims].
template <typename F, int N, int V, bool kFetch>
INLINE void gather_scaled(State<F>& s, int query, const AttendUnit& u, const Blocks& blocks,
                          const Blocks& ahead, std::uint32_t tokens, std::uint32_t d,
                          const std::uint32_t* weights, const float* steps){
  constexpr int kLine = kLanes * F::kPacking * F::kBytes;
  constexpr std::uint32_t kRow = kTileTokens / F::kPacking;  // operands of one term of a query
  const std::size_t half = std::size_t{u.page_tokens} * u.head_dim * F::kBytes;
  const std::size_t at = half + std::size_t{d} * u.page_tokens * F::kBytes;
  float* out = s.out + std::size_t(query) * u.head_dim + d;
  typename F::Acc acc[N][V][F::kTerms];
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < V; ++j)
      for (int t = 0; t < F::kTerms; ++t)
        acc[i][j][t] = typename F::Acc{};
  for (std::uint32_t page = 0, done = 0; done < tokens; ++page) {
    const std::uint32_t here =
        tokens - done < u.page_tokens ? tokens - done : u.page_tokens;
    const std::byte* v = blocks.at[page] + at;
    const std::byte* fetch = ahead_of(blocks, ahead, page, at, 2 * half);
    const std::uint32_t* w = weights + done / F::kPacking;
    for (std::uint32_t g = 0; g * F::kPacking < here; ++g) {
      decltype(F::line_v(v, 0)) line[V];
      for (int j = 0; j < V; ++j) {
        line[j] = F::line_v(v + (g * V + j) * kLine, here - g * F::kPacking);
        if (kFetch) __builtin_prefetch(fetch + (g * V + j) * kLine, 0, 3);
      }
      for (int i = 0; i < N; ++i)
        for (int t = 0; t < F::kTerms; ++t) {
          const auto operand = F::spread_weight(w[(i * F::kTerms + t) * kRow + g]);
          for (int j = 0; j < V; ++j) acc[i][j][t] = F::dot_v(acc[i][j][t], line[j], operand);
        }
    }
    done += here;
  }
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < V; ++j)
      F::finish_out(out + std::size_t(i) * u.head_dim + j * kLanes, acc[i][j], steps[i]);
}

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA
