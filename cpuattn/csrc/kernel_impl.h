// The kernel's one source, compiled once per instruction set (kernel_*.cpp).
//
// No function of the standard library is used here: an inline function compiled with wide
// instructions could be the copy that the linker keeps for the whole program.
//
// Every query's arithmetic is the same whatever else is in the unit: pages in order, online
// softmax per page, masked tokens add an exact zero. So a row's result does not depend on its
// batch.
#include <cstring>

#include "kernel.h"

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

typedef float Vec __attribute__((vector_size(64)));
typedef std::int32_t IntVec __attribute__((vector_size(64)));
typedef std::uint32_t UintVec __attribute__((vector_size(64)));
typedef std::uint16_t HalfVec __attribute__((vector_size(32)));

#define INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;
constexpr int kRegisterQueries = 4;
constexpr float kNegInf = -__builtin_inff();

struct bf16 {
  std::uint16_t bits;
};

INLINE Vec broadcast(float x) { return Vec{} + x; }

INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE Vec load(const bf16* p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  const UintVec wide = __builtin_convertvector(h, UintVec) << 16;
  Vec v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

INLINE void store(bf16* p, Vec v) {
  UintVec bits;
  std::memcpy(&bits, &v, sizeof v);
  const UintVec rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const UintVec quiet = (bits >> 16) | 0x40;  // rounding must not turn a NaN into infinity
  const HalfVec h = __builtin_convertvector(v == v ? rounded : quiet, HalfVec);
  std::memcpy(p, &h, sizeof h);
}

INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

INLINE float horizontal_max(Vec v) {
  v = vmax(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = vmax(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = vmax(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = vmax(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}

INLINE float horizontal_sum(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// exp for x <= 0, within 2 ulp; exactly 1 at 0 and exactly 0 below -87 (so also at -inf).
INLINE Vec exp_negative(Vec x) {
  const Vec clamped = vmax(x, broadcast(-87.0f));
  const Vec shifted = clamped * 1.44269504088896341f + 12582912.0f;  // rounds to an integer
  const Vec n = shifted - 12582912.0f;
  const Vec r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVec bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits += __builtin_convertvector(n, IntVec) << 23;
  std::memcpy(&p, &bits, sizeof bits);
  return x < broadcast(-87.0f) ? Vec{} : p;
}

// What a unit keeps between pages.
struct State {
  alignas(64) float q[kUnitQueries][kMaxHeadDim];  // scaled
  alignas(64) float out[kUnitQueries][kMaxHeadDim];
  alignas(64) float sum[kUnitQueries][kLanes];
  float max[kUnitQueries];
  std::uint32_t limit[kUnitQueries];  // tokens that the query sees
};

// Scores of N queries with C * 16 tokens: sum over d of q[d] * K[d][tokens].
template <int N, int C, typename T>
INLINE void score(const State& s, std::uint32_t first, const T* k, std::uint32_t page_tokens,
                  std::uint32_t head_dim, float (*scores)[kMaxPageTokens]) {
  Vec acc[N][C] = {};
  for (std::uint32_t d = 0; d < head_dim; ++d) {
    Vec kv[C];
    for (int c = 0; c < C; ++c) kv[c] = load(k + d * page_tokens + c * kLanes);
    for (int i = 0; i < N; ++i)
      for (int c = 0; c < C; ++c) acc[i][c] += kv[c] * s.q[first + i][d];
  }
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < C; ++c) store(scores[i] + c * kLanes, acc[i][c]);
}

// Turns scores of one query with one page into weights; rescales what the query has so far.
INLINE void soften(State& s, std::uint32_t query, std::uint32_t page_start,
                   std::uint32_t page_tokens, std::uint32_t head_dim, float* scores) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const std::int32_t visible =
      static_cast<std::int32_t>(s.limit[query]) - static_cast<std::int32_t>(page_start);
  Vec top = broadcast(kNegInf);
  for (std::uint32_t t = 0; t < page_tokens; t += kLanes) {
    const IntVec token = lane + static_cast<std::int32_t>(t);
    const Vec masked = token < visible ? load(scores + t) : broadcast(kNegInf);
    store(scores + t, masked);
    top = vmax(top, masked);
  }
  const float page_max = horizontal_max(top);
  const float old_max = s.max[query];
  const float new_max = page_max > old_max ? page_max : old_max;
  Vec sum = load(s.sum[query]);
  if (new_max != old_max) {
    const Vec keep = exp_negative(broadcast(old_max - new_max));
    sum *= keep;
    for (std::uint32_t d = 0; d < head_dim; d += kLanes)
      store(s.out[query] + d, load(s.out[query] + d) * keep);
    s.max[query] = new_max;
  }
  for (std::uint32_t t = 0; t < page_tokens; t += kLanes) {
    const Vec weight = exp_negative(load(scores + t) - new_max);
    store(scores + t, weight);
    sum += weight;
  }
  store(s.sum[query], sum);
}

// out[N queries][V * 16 dims] += sum over tokens of weight * V[token][dims].
template <int N, int V, typename T>
INLINE void gather(State& s, std::uint32_t first, const T* v, std::uint32_t tokens,
                   std::uint32_t head_dim, std::uint32_t d,
                   const float (*weights)[kMaxPageTokens]) {
  Vec acc[N][V];
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < V; ++j) acc[i][j] = load(s.out[first + i] + d + j * kLanes);
  for (std::uint32_t t = 0; t < tokens; ++t) {
    Vec row[V];
    for (int j = 0; j < V; ++j) row[j] = load(v + t * head_dim + d + j * kLanes);
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < V; ++j) acc[i][j] += row[j] * weights[i][t];
  }
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < V; ++j) store(s.out[first + i] + d + j * kLanes, acc[i][j]);
}

template <int N, typename T>
INLINE void visit(State& s, std::uint32_t first, const AttendUnit& u, const T* block,
                  std::uint32_t page_start) {
  const std::uint32_t limit = s.limit[first + N - 1];  // the largest: limits grow with the query
  if (page_start >= limit) return;
  const std::uint32_t tokens =
      limit - page_start < u.page_tokens ? limit - page_start : u.page_tokens;
  alignas(64) float scores[N][kMaxPageTokens];
  std::uint32_t t = 0;
  for (; t + 2 * kLanes <= u.page_tokens; t += 2 * kLanes)
    score<N, 2>(s, first, block + t, u.page_tokens, u.head_dim,
                reinterpret_cast<float(*)[kMaxPageTokens]>(&scores[0][t]));
  if (t < u.page_tokens)
    score<N, 1>(s, first, block + t, u.page_tokens, u.head_dim,
                reinterpret_cast<float(*)[kMaxPageTokens]>(&scores[0][t]));
  for (int i = 0; i < N; ++i)
    soften(s, first + i, page_start, u.page_tokens, u.head_dim, scores[i]);
  // Tokens past `tokens` may hold anything, so they are left out rather than multiplied by zero.
  const T* v = block + static_cast<std::size_t>(u.page_tokens) * u.head_dim;
  std::uint32_t d = 0;
  for (; d + 4 * kLanes <= u.head_dim; d += 4 * kLanes)
    gather<N, 4>(s, first, v, tokens, u.head_dim, d, scores);
  for (; d < u.head_dim; d += kLanes) gather<N, 1>(s, first, v, tokens, u.head_dim, d, scores);
}

template <typename T>
INLINE void attend(const AttendUnit& u) {
  State s;
  for (std::uint32_t i = 0; i < u.queries; ++i) {
    const std::uint32_t row = (u.first_query + i) / u.group;
    const std::uint32_t head = (u.first_query + i) % u.group;
    const T* q = static_cast<const T*>(u.q) + row * u.q_stride + head * u.head_dim;
    for (std::uint32_t d = 0; d < u.head_dim; d += kLanes) {
      store(s.q[i] + d, load(q + d) * u.scale);
      store(s.out[i] + d, Vec{});
    }
    store(s.sum[i], Vec{});
    s.max[i] = kNegInf;
    s.limit[i] = u.first_position + row + 1;
  }
  const std::uint32_t limit = s.limit[u.queries - 1];
  for (std::uint32_t start = 0, page = 0; start < limit; start += u.page_tokens, ++page) {
    const T* block = reinterpret_cast<const T*>(u.kv + u.table[page] * u.page_stride);
    std::uint32_t i = 0;
    for (; i + kRegisterQueries <= u.queries; i += kRegisterQueries) visit<4>(s, i, u, block, start);
    switch (u.queries - i) {
      case 3: visit<3>(s, i, u, block, start); break;
      case 2: visit<2>(s, i, u, block, start); break;
      case 1: visit<1>(s, i, u, block, start); break;
      default: break;
    }
  }
  for (std::uint32_t i = 0; i < u.queries; ++i) {
    const std::uint32_t row = (u.first_query + i) / u.group;
    const std::uint32_t head = (u.first_query + i) % u.group;
    T* out = static_cast<T*>(u.out) + row * u.out_stride + head * u.head_dim;
    const float inverse = 1.0f / horizontal_sum(load(s.sum[i]));
    for (std::uint32_t d = 0; d < u.head_dim; d += kLanes)
      store(out + d, load(s.out[i] + d) * inverse);
  }
}

#undef INLINE

}  // namespace

void attend_f32(const AttendUnit& unit) { attend<float>(unit); }
void attend_bf16(const AttendUnit& unit) { attend<bf16>(unit); }

}  // namespace omniserve::OMNISERVE_KERNEL_ISA
