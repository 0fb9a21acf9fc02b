// The dense kernels' one source, compiled once per instruction set (dense_*.cpp).
//
// As in kernel_impl.h, no function of the standard library is used here.
#include "dense_kernel.h"
#include "simd.h"
#include "fetch.h"

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr std::uint32_t kLineBytes = 64;
constexpr std::uint32_t kStepBytes = 2 * kLineBytes;  // of a panel: two vectors of outputs
// Steps of the inner loop's body: so that a row's address is worked out once for all of them.
constexpr std::uint32_t kUnroll = 4;
// What a product of some rows fetches ahead: few rows wait for memory.
constexpr std::uint32_t kFewRows = 5;
template <bool kFew>
using RowsFetch = FetchAhead<kFew, 8192>;
constexpr std::uint32_t steps_ahead(std::uint32_t rows) {
  return (rows <= kFewRows ? RowsFetch<true>::kBytes : RowsFetch<false>::kBytes) / kStepBytes;
}
// A part of a panel that stays in the first-level cache while several blocks of rows use it.
constexpr std::uint32_t kPartSteps = 320;  // 40 KiB

// --- formats -------------------------------------------------------------------------------------

struct Float32Dense {
  using Elem = float;
  using Line = Vec;
  using Spread = Vec;
  static constexpr std::uint32_t kPacking = 1;
#if defined(__AVX512F__)
  static constexpr int kRows = 14;
#else
  static constexpr int kRows = 3;
#endif
  static INLINE Line line(const std::byte* p) { return load_as<Vec>(p); }
  static INLINE Spread spread(const Elem* x) { return broadcast(*x); }
  static INLINE Vec dot(Vec acc, Line w, Spread x) { return acc + w * x; }
  static INLINE Vec widen(const Elem* p) { return load(p); }
  static INLINE void narrow(Elem* p, Vec v) { store(p, v); }
  static INLINE float widen_one(Elem x) { return x; }
  static INLINE Elem narrow_one(float x) { return x; }
};

struct Bfloat16Dense {
  using Elem = std::uint16_t;
  static constexpr std::uint32_t kPacking = 2;

#if defined(__AVX512BF16__)
  using Line = UintVec;
  using Spread = UintVec;
  static constexpr int kRows = 14;
  static INLINE Line line(const std::byte* p) { return load_as<UintVec>(p); }
  static INLINE Spread spread(const Elem* x) { return UintVec{} + load_as<std::uint32_t>(x); }
  static INLINE Vec dot(Vec acc, Line w, Spread x) {
    return as<Vec>(_mm512_dpbf16_ps(as<__m512>(acc), as<__m512bh>(w), as<__m512bh>(x)));
  }
#else
  struct Line {
    Vec even, odd;
  };
  using Spread = Line;
#if defined(__AVX512F__)
  static constexpr int kRows = 12;
#else
  static constexpr int kRows = 3;
#endif
  static INLINE Line unpack(UintVec bits) {
    return {as<Vec>(bits << 16), as<Vec>(bits & 0xFFFF0000u)};
  }
  static INLINE Line line(const std::byte* p) { return unpack(load_as<UintVec>(p)); }
  static INLINE Spread spread(const Elem* x) {
    return unpack(UintVec{} + load_as<std::uint32_t>(x));
  }
  static INLINE Vec dot(Vec acc, Line w, Spread x) {
    acc = acc + w.even * x.even;
    return acc + w.odd * x.odd;
  }
#endif
  static INLINE Vec widen(const Elem* p) { return widen_bf16(load_as<HalfVec>(p)); }
  static INLINE void narrow(Elem* p, Vec v) {
    const HalfVec half = narrow_bf16(v);
    std::memcpy(p, &half, sizeof half);
  }
  static INLINE float widen_one(Elem x) { return as<float>(std::uint32_t{x} << 16); }
  static INLINE Elem narrow_one(float x) { return narrow_bf16(broadcast(x))[0]; }
};

// --- matrix products -----------------------------------------------------------------------------

enum class Fetch { kNothing, kAhead, kNextPart };

// Some steps of a panel, and what is fetched meanwhile.
struct Part {
  const std::byte* lines;
  std::uint32_t steps;
  bool first;  // sums start at zero
  Fetch fetch;
  const std::byte* from;         // kAhead: what is fetched in step 0; kNextPart: its first line
  const std::byte* from_behind;  // kAhead: the same from step `turn` on
  std::uint32_t turn;
};

// tile[R][kPanelOutputs] (+)= x[R rows] * part.
template <typename F, int R>
__attribute__((noinline)) void multiply(const Part& part, const typename F::Elem* x,
                                        std::size_t stride, float* tile) {
  // Rows in groups of three, which address arithmetic reaches from one register.
  constexpr int kGroups = (R + 2) / 3;
  const typename F::Elem* group[kGroups];
  for (int g = 0; g < kGroups; ++g) group[g] = x + 3 * g * stride;
  Vec acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    acc[r][0] = part.first ? Vec{} : load(tile + r * kPanelOutputs);
    acc[r][1] = part.first ? Vec{} : load(tile + r * kPanelOutputs + kLanes);
  }
  for (std::uint32_t step = 0; step < part.steps; step += kUnroll) {
    const std::byte* lines = part.lines + std::size_t{step} * kStepBytes;
    if (part.fetch == Fetch::kAhead) {
      const std::byte* from = step < part.turn ? part.from : part.from_behind;
#pragma GCC unroll 8
      for (std::uint32_t i = 0; i < 2 * kUnroll; ++i)
        RowsFetch<(R <= kFewRows)>::line(from + std::size_t{step} * kStepBytes + i * kLineBytes, i);
    } else if (part.fetch == Fetch::kNextPart) {
#pragma GCC unroll 4
      for (std::uint32_t i = 0; i < kUnroll; ++i)
        __builtin_prefetch(part.from + (std::size_t{step} + i) * kLineBytes, 0, 2);
    }
#pragma GCC unroll 4
    for (std::uint32_t u = 0; u < kUnroll; ++u) {
      const typename F::Line low = F::line(lines + u * kStepBytes);
      const typename F::Line high = F::line(lines + u * kStepBytes + kLineBytes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename F::Elem* row = group[r / 3] + (r % 3) * stride;
        const typename F::Spread value = F::spread(row + u * F::kPacking);
        acc[r][0] = F::dot(acc[r][0], low, value);
        acc[r][1] = F::dot(acc[r][1], high, value);
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) group[g] += kUnroll * F::kPacking;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(tile + r * kPanelOutputs, acc[r][0]);
    store(tile + r * kPanelOutputs + kLanes, acc[r][1]);
  }
}

template <typename F, int R = F::kRows>
INLINE void multiply_rows(std::uint32_t rows, const Part& part, const typename F::Elem* x,
                          std::size_t stride, float* tile) {
  if constexpr (R > 1) {
    if (rows != R) return multiply_rows<F, R - 1>(rows, part, x, stride, tile);
  }
  multiply<F, R>(part, x, stride, tile);
}

// x * sigmoid(x)
INLINE Vec silu(Vec x) {
  const Vec e = exp2_negative((x < Vec{} ? x : -x) * kLog2E);
  const Vec s = 1.0f / (1.0f + e);
  return x * (x < Vec{} ? e * s : s);
}

INLINE void keep_best(Vec x, std::uint32_t panel, float* sums, std::uint32_t* panels) {
  const Vec best = load(sums);
  const UintVec from = load_as<UintVec>(panels), here = UintVec{} + panel;
  const IntVec better = (x > best) | ((x == best) & (here < from));
  store(sums, better ? x : best);
  const UintVec now = better ? here : from;
  std::memcpy(panels, &now, sizeof now);
}

// Sums of outputs behind the last one become no numbers: these are never the best, and -inf is
// where no other sum is a number.
INLINE Vec existing(Vec x, std::int32_t outputs) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < outputs ? x : broadcast(__builtin_nanf(""));
}

template <typename F>
INLINE void finish_row(const GemmUnit& u, std::uint32_t row, const float* tile) {
  Vec low = load(tile), high = load(tile + kLanes);
  const std::size_t at = row * u.out_stride;
  if (u.finish == Finish::kGate)
    return F::narrow(static_cast<typename F::Elem*>(u.out) + at, silu(low) * high);
  if (u.finish == Finish::kBest) {
    const auto columns = static_cast<std::int32_t>(u.columns);
    const bool whole = u.columns == kPanelOutputs;
    BestSums& best = u.best[row];
    keep_best(whole ? low : existing(low, columns), u.index, best.sum, best.panel);
    keep_best(whole ? high : existing(high, columns - kLanes), u.index, best.sum + kLanes,
              best.panel + kLanes);
    if (u.wanted == nullptr || !u.wanted[row]) return;
  }
  float* out = static_cast<float*>(u.out) + at;
  if (u.finish == Finish::kAdd) {
    store(out, load(out) + low);
    return store(out + kLanes, load(out + kLanes) + high);
  }
  if (u.bias != nullptr) {
    low += load(u.bias);
    high += load(u.bias + kLanes);
  }
  if (u.columns == kPanelOutputs) {
    store(out, low);
    return store(out + kLanes, high);
  }
  for (std::uint32_t i = 0; i < u.columns; ++i)
    out[i] = i < kLanes ? low[i] : high[i - kLanes];
}

template <typename F>
void gemm(const GemmUnit& u) {
  alignas(64) float tile[kUnitRows * kPanelOutputs];
  const auto* x = static_cast<const typename F::Elem*>(u.x);
  const std::uint32_t steps = u.inputs / F::kPacking;
  const std::uint32_t blocks = (u.rows + F::kRows - 1) / F::kRows;
  const std::byte* next = u.next != nullptr ? u.next : u.panel;
  if (blocks == 1) {
    // One pass over the panel: while a line is read, fetch the one this far ahead.
    const std::uint32_t ahead = steps < steps_ahead(u.rows) ? steps : steps_ahead(u.rows);
    const std::uint32_t turn = steps - ahead;
    const Part whole{u.panel, steps, true, Fetch::kAhead,
                     u.panel + std::size_t{ahead} * kStepBytes,
                     next - std::size_t{turn} * kStepBytes, turn};
    multiply_rows<F>(u.rows, whole, x, u.x_stride, tile);
  } else {
    const std::uint32_t parts = (steps + kPartSteps - 1) / kPartSteps;
    const auto edge = [&](std::uint32_t p) { return steps / kUnroll * p / parts * kUnroll; };
    for (std::uint32_t p = 0; p < parts; ++p) {
      const std::uint32_t begin = edge(p);
      Part part{u.panel + std::size_t{begin} * kStepBytes, edge(p + 1) - begin, p == 0,
                Fetch::kNextPart, nullptr, nullptr, 0};
      const std::byte* following = p + 1 < parts ? part.lines + part.steps * kStepBytes : next;
      for (std::uint32_t b = 0; b < blocks; ++b) {
        // The first two blocks fetch a half each of what comes behind this part.
        part.from = following + std::size_t{b} * part.steps * kLineBytes;
        if (b == 2) part.fetch = Fetch::kNothing;
        const std::uint32_t row = u.rows * b / blocks;
        multiply_rows<F>(u.rows * (b + 1) / blocks - row, part,
                         x + row * u.x_stride + begin * F::kPacking, u.x_stride,
                         tile + row * kPanelOutputs);
      }
    }
  }
  for (std::uint32_t row = 0; row < u.rows; ++row)
    finish_row<F>(u, row, tile + row * kPanelOutputs);
}

// --- rows ----------------------------------------------------------------------------------------

template <typename F>
void widen(const void* row, std::size_t n, float* out) {
  const auto* from = static_cast<const typename F::Elem*>(row);
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, F::widen(from + i));
  for (; i < n; ++i) out[i] = F::widen_one(from[i]);
  for (; i < padded(n); ++i) out[i] = 0;
}

template <typename F>
void narrow(const float* row, std::size_t n, void* out) {
  auto* to = static_cast<typename F::Elem*>(out);
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) F::narrow(to + i, load(row + i));
  for (; i < n; ++i) to[i] = F::narrow_one(row[i]);
}

// 1 / root of the mean square; `width` is n padded, a multiple of 16.
INLINE float inverse_rms(const float* x, std::size_t width, std::size_t n, float epsilon) {
  Vec sum{};
  for (std::size_t i = 0; i < width; i += kLanes) sum += load(x + i) * load(x + i);
  return 1.0f / __builtin_sqrtf(horizontal_sum(sum) / static_cast<float>(n) + epsilon);
}

template <typename F>
void norm(const float* x, const float* weight, std::size_t n, float epsilon, void* out) {
  auto* to = static_cast<typename F::Elem*>(out);
  const Vec scale = broadcast(inverse_rms(x, padded(n), n, epsilon));
  for (std::size_t i = 0; i < padded(n); i += kLanes)
    F::narrow(to + i, load(x + i) * scale * load(weight + i));
}

INLINE void norm_head(float* head, const float* weight, std::uint32_t n, float epsilon) {
  const Vec scale = broadcast(inverse_rms(head, n, n, epsilon));
  for (std::uint32_t i = 0; i < n; i += kLanes)
    store(head + i, load(head + i) * scale * load(weight + i));
}

INLINE void rotate_head(float* head, std::uint32_t half, const float* cos, const float* sin) {
  float* high = head + half;
  for (std::uint32_t i = 0; i < half; ++i) {
    const float a = head[i], b = high[i];
    head[i] = a * cos[i] - b * sin[i];
    high[i] = b * cos[i] + a * sin[i];
  }
}

template <typename F>
void heads(const HeadsTask& t, float* qkv, const float* cos, const float* sin, void* out) {
  for (std::uint32_t h = 0; h < t.heads + t.kv_heads; ++h) {
    float* head = qkv + std::size_t{h} * t.head_dim;
    const float* weight = h < t.heads ? t.q_norm : t.k_norm;
    if (weight != nullptr) norm_head(head, weight, t.head_dim, t.epsilon);
    rotate_head(head, t.head_dim / 2, cos, sin);
  }
  narrow<F>(qkv, std::size_t{t.heads + 2 * t.kv_heads} * t.head_dim, out);
}

template <typename F>
constexpr DenseKernels kernels_of() {
  return {gemm<F>, widen<F>, narrow<F>, norm<F>, heads<F>};
}

#undef INLINE

}  // namespace

const DenseKernelSet kDense = {kernels_of<Float32Dense>(), kernels_of<Bfloat16Dense>()};

}  // namespace omniserve::OMNISERVE_KERNEL_ISA
