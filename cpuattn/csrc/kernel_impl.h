// The kernel's one source, compiled once per instruction set (kernel_*.cpp).
//
// No function of the standard library is used here: an inline function compiled with wide
// instructions could be the copy that the linker keeps for the whole program.
//
// Every query's arithmetic is the same whatever else is in the unit: tiles in order, softmax per
// tile, chunks joined in order, masked tokens add an exact zero.
#include "kernel.h"
#include "omniserve/shm/layout.h"
#include "simd.h"
#include "fetch.h"
#include "kv_formats.h"
#include "kernel_tiles.h"

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
#if defined(__AVX512F__)
constexpr int kBlockQueries = 8;  // of one pass over a tile: their sums stay in registers
#else
constexpr int kBlockQueries = 4;
#endif

// What a unit keeps between tiles. Rows of `out` and `total` have head_dim floats. Begins on a page,
// for where it lay on the stack changed the speed of large groups by up to 4 %.
template <typename F>
struct State {
  alignas(4096) std::uint32_t q[kUnitQueries * F::kTerms * kMaxHeadDim / F::kPacking];
  alignas(64) float out[kUnitQueries * kMaxHeadDim];    // of this chunk
  alignas(64) float total[kUnitQueries * kMaxHeadDim];  // of the chunks before it
  alignas(64) float sum[kUnitQueries][kLanes];
  float max[kUnitQueries];
  float total_sum[kUnitQueries];
  float total_max[kUnitQueries];
  float factor[kUnitQueries];  // from scores to base-2 logits, or to arguments of the soft cap
  std::int32_t bias[kUnitQueries * F::kTerms];
  std::uint32_t first[kUnitQueries];  // token that the query sees
  std::uint32_t end[kUnitQueries];    // behind the last token that it sees
};

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA

#include "kernel_rows.h"
#include "kernel_multiply.h"
#include "kernel_scaled.h"
#include "kernel_soften.h"

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

alignas(64) constexpr float kZeros[2 * kLanes] = {};

// Raw scores of N queries with the group of C * 16 tokens at `k`.
template <typename F, int N, int C, bool kFetch>
INLINE void score(const State<F>& s, int query, const AttendUnit& u, const std::byte* k,
                  const std::byte* fetch, float* scores) {
  if constexpr (F::kScaled)
    score_scaled<F, N, C, kFetch>(s, query, u, k, fetch, scores);
  else
    multiply<F, N, C, kFetch>(k, u.head_dim / F::kPacking, fetch,
                              s.q + std::size_t(query) * kOperands<F>, kZeros, 0, scores,
                              kTileTokens);
}

// out[i] += sums[i] + the one valid value in each lane of `line`, weighted; the other value lies behind
// the last token and may be anything, also NaN.
template <typename F, int N, int C>
INLINE void add_last(const std::byte* line, const std::uint32_t* weights, const float* sums,
                     float* out, std::size_t stride) {
  for (int c = 0; c < C; ++c) {
    const auto value = F::unpack(load_line(line + c * 64) & 0xFFFFu);
    for (int i = 0; i < N; ++i) {
      const Vec sum = load(sums + (i * C + c) * kLanes);
      float* to = out + i * stride + c * kLanes;
      store(to, load(to) + F::dot(sum, value, F::spread(weights[i * kOperands<F>])));
    }
  }
}

// out[N queries][C * 16 dims at d] += sum over the tile's tokens of weight * V[token][dims].
template <typename F, int N, int C, bool kFetch>
INLINE void gather(State<F>& s, int query, const AttendUnit& u, const Blocks& blocks,
                   const Blocks& ahead, std::uint32_t tokens, std::uint32_t d,
                   const std::uint32_t* weights, const float* steps) {
  if constexpr (F::kScaled) {
    gather_scaled<F, N, C, kFetch>(s, query, u, blocks, ahead, tokens, d, weights, steps);
  } else {
    const std::size_t at = v_offset<F>(u) + std::size_t{d} * u.page_tokens * F::kBytes;
    float* out = s.out + std::size_t(query) * u.head_dim + d;
    for (std::uint32_t page = 0, done = 0; done < tokens; ++page) {
      const std::uint32_t here = tokens - done < u.page_tokens ? tokens - done : u.page_tokens;
      const std::byte* v = blocks.at[page] + at;
      const std::uint32_t* w = weights + done / F::kPacking;
      const std::size_t lines = here / F::kPacking;
      const std::byte* fetch = ahead_of<F, N>(blocks, ahead, page, at, u.head_stride);
      if (F::kPacking == 1 || here % 2 == 0) {
        multiply<F, N, C, kFetch>(v, lines, fetch, w, out, u.head_dim, out, u.head_dim);
      } else if constexpr (F::kPacking == 2) {
        // Sums are the same as where the line's other token counts, with no weight.
        alignas(64) float sums[N * C * kLanes];
        multiply<F, N, C, kFetch>(v, lines, fetch, w, kZeros, 0, sums, C * kLanes);
        add_last<F, N, C>(v + lines * C * 64, w + lines, sums, out, u.head_dim);
      }
      done += here;
    }
  }
}

// N queries of one kv head against one tile. `blocks` and `ahead` are those of the head, and of the
// head and tile that come next.
template <typename F, int N, bool kFetch>
__attribute__((noinline)) void visit(State<F>& s, int query, const AttendUnit& u, const Tile& tile,
                                     const Blocks& blocks, const Blocks& ahead) {
  const std::uint32_t end = s.end[query + N - 1];  // ends and firsts grow with the query
  const std::uint32_t tile_tokens = tile.pages * u.page_tokens;
  if (tile.start >= end || tile.start + tile_tokens <= s.first[query]) return;
  const std::uint32_t tokens = end - tile.start < tile_tokens ? end - tile.start : tile_tokens;
  const std::size_t size = u.head_stride;  // of a block

  alignas(64) float scores[N * kTileTokens];
  Scales scales;
  for (std::uint32_t page = 0; page < tile.pages; ++page) {
    const std::byte* block = blocks.at[page];
    for (std::uint32_t t = 0; t < u.page_tokens; t += 2 * kLanes) {
      const std::size_t at = std::size_t{t} * u.head_dim * F::kBytes;
      const std::byte* fetch = ahead_of<F, N>(blocks, ahead, page, at, size);
      float* to = scores + page * u.page_tokens + t;
      if (t + 2 * kLanes <= u.page_tokens)
        score<F, N, 2, kFetch>(s, query, u, block + at, fetch, to);
      else
        score<F, N, 1, kFetch>(s, query, u, block + at, fetch, to);
    }
    if constexpr (F::kScaled) {
      const std::size_t at = std::size_t{u.page_tokens} * u.head_dim;
      const std::size_t row = u.page_tokens * sizeof(float);
      std::memcpy(scales.k + page * u.page_tokens, block + at, row);
      std::memcpy(scales.v + page * u.page_tokens, block + at + row, row);
      if (kFetch)
        for (std::size_t i = 0; i < 2 * row; i += 64)
          Fetch<F, N>::line(ahead_of<F, N>(blocks, ahead, page, at, size) + i, 0);
    }
  }
  if constexpr (F::kScaled)
    for (std::uint32_t t = tokens; t < tile_tokens; ++t) scales.v[t] = 0;

  constexpr std::size_t kRow = F::kScaled ? kTileTokens / F::kPacking : kOperands<F>;
  alignas(64) std::uint32_t weights[N * F::kTerms * kRow];
  float steps[N];
  using Pass = Fetch<F, N>;
  const std::byte* fetch = Pass::kPauseAtOnce
                               ? blocks.at[0] + v_offset<F>(u)
                               : ahead_of<F, N>(blocks, ahead, 0, v_offset<F>(u), size);
  const bool plain = tokens == kTileTokens && s.first[query + N - 1] <= tile.start &&
                     s.end[query] >= tile.start + kTileTokens && u.softcap == 0;
  for (int i = 0; i < N; ++i) {
    if (kFetch)
      for (int line = 0; line < Pass::kPauseLines; ++line)
        __builtin_prefetch(fetch + (i * Pass::kPauseLines + line) * 64, 0, 3);
    const float* mine = scores + i * kTileTokens;
    std::uint32_t* operands = weights + i * F::kTerms * kRow;
    steps[i] = plain ? soften<F, true>(s, query + i, u, tile, mine, scales, operands)
                     : soften<F, false>(s, query + i, u, tile, mine, scales, operands);
  }

  std::uint32_t d = 0;
  for (; d + 2 * kLanes <= u.head_dim; d += 2 * kLanes)
    gather<F, N, 2, kFetch>(s, query, u, blocks, ahead, tokens, d, weights, steps);
  if (d < u.head_dim)
    gather<F, N, 1, kFetch>(s, query, u, blocks, ahead, tokens, d, weights, steps);
}

// As many of the `left` queries as fit into the registers; returns how many.
template <typename F, bool kFetch, int N = kBlockQueries / F::kTerms>
INLINE int visit_some(State<F>& s, int query, int left, const AttendUnit& u, const Tile& tile,
                      const Blocks& blocks, const Blocks& ahead) {
  if constexpr (N > 1)
    if (left < N) return visit_some<F, kFetch, N - 1>(s, query, left, u, tile, blocks, ahead);
  visit<F, N, kFetch>(s, query, u, tile, blocks, ahead);
  return N;
}

// Joins one more chunk of a query (out, max, sum) with those before it.
INLINE void join(float* total, float* total_max, float* total_sum, const float* out, float max,
                 float sum, std::uint32_t head_dim) {
  const float top = max > *total_max ? max : *total_max;
  const float shift = top == kNegInf ? 0 : top;
  const Vec keep = exp2_negative(broadcast(*total_max - shift));
  const Vec take = exp2_negative(broadcast(max - shift));
  for (std::uint32_t d = 0; d < head_dim; d += kLanes)
    store(total + d, load(total + d) * keep + load(out + d) * take);
  *total_sum = *total_sum * keep[0] + sum * take[0];
  *total_max = top;
}

struct Place {
  std::uint32_t row;
  std::uint32_t head;  // of the unit's
};

// Where query i of a unit's kv_heads * queries comes from.
INLINE Place place_of(const AttendUnit& u, std::uint32_t i) {
  const std::uint32_t query = u.first_query + i % u.queries;
  return {query / u.group, i / u.queries * u.group + query % u.group};
}

// Divides by the softmax's sum, to which a sink adds, and writes the row.
INLINE void write_query(const AttendUnit& u, std::uint32_t i, const float* total, float max,
                        float sum) {
  const auto [row, head] = place_of(u, i);
  float share = 1;
  if (u.sinks != nullptr && u.sinks[head] != kNegInf) {
    const float sink = u.sinks[head] * kLog2E;
    const float top = sink > max ? sink : max;
    share = exp2_negative(broadcast(max - top))[0];
    sum = sum * share + exp2_negative(broadcast(sink - top))[0];
  }
  const float inverse = share / sum;
  const std::size_t at = row * u.out_stride + std::size_t{head} * u.head_dim;
  for (std::uint32_t d = 0; d < u.head_dim; d += kLanes)
    store_row(u.out, at + d, u.row_dtype, load(total + d) * inverse);
}

template <typename F>
INLINE void prepare_queries(State<F>& s, const AttendUnit& u) {
  const float factor = u.softcap != 0 ? u.scale / u.softcap : u.scale * kLog2E;
  alignas(64) float values[kMaxHeadDim];
  const std::size_t operands = F::kScaled ? F::kTerms * u.head_dim / F::kPacking : kOperands<F>;
  for (std::uint32_t i = 0; i < u.kv_heads * u.queries; ++i) {
    const auto [row, head] = place_of(u, i);
    const std::size_t at = row * u.q_stride + std::size_t{head} * u.head_dim;
    for (std::uint32_t d = 0; d < u.head_dim; d += kLanes)
      store(values + d, load_row(u.q, at + d, u.row_dtype));
    float step = 1;
    F::put_query(values, u.head_dim, s.q + i * operands, s.bias + i * F::kTerms, &step);
    s.factor[i] = factor * step;
    s.end[i] = u.first_position + row + 1;
    s.first[i] = u.window != 0 && s.end[i] > u.window ? s.end[i] - u.window : 0;
  }
}

// Queries [begin, end) of a unit: nothing seen in this chunk yet.
template <typename F>
INLINE void start_chunk(State<F>& s, const AttendUnit& u, std::uint32_t begin, std::uint32_t end) {
  for (std::uint32_t i = begin; i < end; ++i) {
    store(s.sum[i], Vec{});
    s.max[i] = kNegInf;
  }
  for (std::uint32_t d = begin * u.head_dim; d < end * u.head_dim; d += kLanes)
    store(s.out + d, Vec{});
}

INLINE void put_partial(float* to, const float* out, float max, float sum, std::uint32_t head_dim) {
  std::memcpy(to, out, head_dim * sizeof(float));
  to[head_dim] = max;
  to[head_dim + 1] = sum;
}

// The chunk is over for queries [begin, end). `partials` is null, or where those of this chunk go.
template <typename F>
INLINE void end_chunk(State<F>& s, const AttendUnit& u, std::uint32_t begin, std::uint32_t end,
                      float* partials) {
  for (std::uint32_t i = begin; i < end; ++i) {
    const float* out = s.out + std::size_t{i} * u.head_dim;
    const float sum = horizontal_sum(load(s.sum[i]));
    if (partials != nullptr)
      put_partial(partials + i * partial_stride(u.head_dim), out, s.max[i], sum, u.head_dim);
    else
      join(s.total + std::size_t{i} * u.head_dim, &s.total_max[i], &s.total_sum[i], out, s.max[i],
           sum, u.head_dim);
  }
}

// All queries of a unit against one tile, head by head. The first few of a head fetch ahead. A
// chunk that ends with the tile ends head by head, too: what that needs is still in the cache, and
// the pause of the reading is short.
template <typename F>
INLINE void visit_all(State<F>& s, const AttendUnit& u, const Tile& tile, const Tile& next,
                      bool chunk_ends, float* partials) {
  const int queries = static_cast<int>(u.queries);
  Blocks blocks = tile.first_head;
  for (std::uint32_t h = 0; h < u.kv_heads; ++h) {
    const Blocks ahead = h + 1 < u.kv_heads ? blocks.next_head(u.head_stride) : next.first_head;
    const int first = static_cast<int>(h) * queries;
    int done = visit_some<F, true>(s, first, queries, u, tile, blocks, ahead);
    while (done < queries)
      done += visit_some<F, false>(s, first + done, queries - done, u, tile, blocks, ahead);
    if (chunk_ends) {
      end_chunk(s, u, h * u.queries, (h + 1) * u.queries, partials);
      start_chunk(s, u, h * u.queries, (h + 1) * u.queries);
    }
    blocks = ahead;
  }
}

template <typename F>
void attend(const AttendUnit& u, const AttendUnit* next) {
  Cursor cursor(u);
  Tile tile = cursor.tile();
  // What nobody has fetched yet if this is a thread's first unit.
  for (std::size_t at = 0; at < kFetchApart; at += 64)
    __builtin_prefetch(tile.first_head.at[0] + at, 0, 3);
  State<F> s;
  const std::uint32_t queries = u.kv_heads * u.queries;
  prepare_queries(s, u);
  for (std::uint32_t i = 0; i < queries; ++i) {
    s.total_max[i] = kNegInf;
    s.total_sum[i] = 0;
  }
  for (std::uint32_t d = 0; d < queries * u.head_dim; d += kLanes) store(s.total + d, Vec{});
  start_chunk(s, u, 0, queries);

  float* partials = u.leads ? nullptr : u.partial;
  std::uint32_t next_chunk = u.first_chunk + 1;
  for (bool last = false; !last;) {
    cursor.advance();
    last = cursor.done();
    const Tile ahead = !last ? cursor.tile() : next != nullptr ? Cursor(*next).tile() : tile;
    const bool chunk_ends = last || cursor.page == chunk_first_page(next_chunk, u.page_tokens);
    visit_all(s, u, tile, ahead, chunk_ends, partials);
    if (chunk_ends) {
      if (partials != nullptr) partials += queries * partial_stride(u.head_dim);
      ++next_chunk;
    }
    tile = ahead;
  }
  if (partials != nullptr) return;
  for (std::uint32_t i = 0; i < queries; ++i) {
    const float* total = s.total + std::size_t{i} * u.head_dim;
    if (u.partial != nullptr)
      put_partial(u.partial + i * partial_stride(u.head_dim), total, s.total_max[i],
                  s.total_sum[i], u.head_dim);
    else
      write_query(u, i, total, s.total_max[i], s.total_sum[i]);
  }
}

void merge(const AttendUnit& u, const float* partials, std::uint32_t count) {
  alignas(64) float total[kMaxHeadDim];
  const std::size_t stride = partial_stride(u.head_dim);
  for (std::uint32_t i = 0; i < u.kv_heads * u.queries; ++i) {
    for (std::uint32_t d = 0; d < u.head_dim; d += kLanes) store(total + d, Vec{});
    float max = kNegInf;
    float sum = 0;
    for (std::uint32_t c = 0; c < count; ++c) {
      const float* partial = partials + (std::size_t{c} * u.kv_heads * u.queries + i) * stride;
      join(total, &max, &sum, partial, partial[u.head_dim], partial[u.head_dim + 1], u.head_dim);
    }
    write_query(u, i, total, max, sum);
  }
}

#undef INLINE

}  // namespace

const Kernels kKernels = {
    OMNISERVE_KERNEL_NAME, kFetchLocality == 2,  attend<Float32Format>, attend<Bfloat16Format>,
    attend<Float16Format>, attend<Int8Format>,   merge,                  quantise,
    dequantise};

}  // namespace omniserve::OMNISERVE_KERNEL_ISA
