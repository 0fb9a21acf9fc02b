// The loops that read scaled KV (int8), one for K and one for V. Part of kernel_impl.h, compiled
// with it. Made from the source of kernel_multiply.h they read up to a fifth less from memory.
#pragma once

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

// Raw scores of N queries with the group of C * 16 tokens at `k`: sum over d of q[d] * K[d][tokens],
// without the scales of K.
template <typename F, int N, int C, bool kFetch>
INLINE void score_scaled(const State<F>& s, int query, const AttendUnit& u, const std::byte* k,
                         const std::byte* fetch, float* scores) {
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
      if (kFetch) Fetch<F, N>::line(fetch + (d * C + c) * kLine, c);
    }
    for (int i = 0; i < N; ++i)
      for (int t = 0; t < F::kTerms; ++t) {
        const auto operand = F::spread_q(q[(i * F::kTerms + t) * steps + d]);
        for (int c = 0; c < C; ++c) acc[i][c][t] = F::dot_k(acc[i][c][t], line[c], operand);
      }
  }
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < C; ++c)
      store(scores + i * kTileTokens + c * kLanes, F::score(acc[i][c]));
}

// Adds one line of each of V * 16 dimensions, times the weights at `w`.
template <typename F, int N, int V>
INLINE void add_weighted(typename F::Acc (&acc)[N][V][F::kTerms], const typename F::Line (&line)[V],
                         const std::uint32_t* w) {
  constexpr std::uint32_t kRow = kTileTokens / F::kPacking;  // operands of one term of a query
  for (int i = 0; i < N; ++i)
    for (int t = 0; t < F::kTerms; ++t) {
      const auto operand = F::spread_weight(w[(i * F::kTerms + t) * kRow]);
      for (int j = 0; j < V; ++j) acc[i][j][t] = F::dot_v(acc[i][j][t], line[j], operand);
    }
}

// out[N queries][V * 16 dims at d] += sum over the tile's tokens of weight * V[token][dims].
template <typename F, int N, int V, bool kFetch>
INLINE void gather_scaled(State<F>& s, int query, const AttendUnit& u, const Blocks& blocks,
                          const Blocks& ahead, std::uint32_t tokens, std::uint32_t d,
                          const std::uint32_t* weights, const float* steps) {
  constexpr int kLine = kLanes * F::kPacking * F::kBytes;
  const std::size_t at = v_offset<F>(u) + std::size_t{d} * u.page_tokens * F::kBytes;
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
    const std::byte* fetch = ahead_of<F, N>(blocks, ahead, page, at, u.head_stride);
    const std::uint32_t* w = weights + done / F::kPacking;
    const std::uint32_t lines = here / F::kPacking;
    typename F::Line line[V];
    for (std::uint32_t g = 0; g < lines; ++g) {
      for (int j = 0; j < V; ++j) {
        line[j] = F::line_v(v + (g * V + j) * kLine);
        if (kFetch) Fetch<F, N>::line(fetch + (g * V + j) * kLine, j);
      }
      add_weighted<F, N, V>(acc, line, w + g);
    }
    if (here % F::kPacking != 0) {
      for (int j = 0; j < V; ++j)
        line[j] = F::line_v(v + (lines * V + j) * kLine, here % F::kPacking);
      add_weighted<F, N, V>(acc, line, w + lines);
    }
    done += here;
  }
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < V; ++j)
      F::finish_out(out + std::size_t(i) * u.head_dim + j * kLanes, acc[i][j], steps[i]);
}

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA
