// What the kernel does differently for each dtype of KV. See layout.h for the packing of a block.
// Included by kernel_*.cpp only, after simd.h.
//
// A format multiplies lines of KV (16 lanes of kPacking neighbours) with operands, four bytes that
// hold kPacking values. An int8 operand has two terms, so that queries and weights keep 16 bits.
// Formats of floats are multiplied by kernel_multiply.h, scaled ones by kernel_scaled.h.

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

constexpr std::uint32_t kTileTokens = 64;

// Formats that compute with floats.
struct FloatFormat {
  static constexpr int kTerms = 1;
  static constexpr bool kScaled = false;
};

// One value per operand.
struct SingleFormat : FloatFormat {
  static constexpr std::uint32_t kPacking = 1;
  using Line = Vec;

  static INLINE Vec spread(std::uint32_t operand) { return broadcast(as<float>(operand)); }
  static INLINE Vec dot(Vec acc, Vec line, Vec operand) { return acc + line * operand; }
  static INLINE void put_query(const float* q, std::uint32_t dim, std::uint32_t* to, std::int32_t*,
                               float*) {
    std::memcpy(to, q, dim * sizeof(float));
  }
  static INLINE float put_weights(const Vec* weights, int vectors, const float*,
                                  std::uint32_t* to) {
    std::memcpy(to, weights, vectors * sizeof(Vec));
    return 1;
  }
};

struct Float32Format : SingleFormat {
  static constexpr std::uint32_t kBytes = 4;
  static INLINE Vec line(const std::byte* p) { return load_as<Vec>(p); }
};

struct Float16Format : SingleFormat {
  static constexpr std::uint32_t kBytes = 2;
  static INLINE Vec line(const std::byte* p) { return widen_f16(load_as<HalfVec>(p)); }
};

// Loads a line once: the compiler would rather read it again for every query.
INLINE UintVec load_line(const std::byte* p) {
  UintVec bits = load_as<UintVec>(p);
#if defined(__AVX512F__)
  asm("" : "+v"(bits));
#endif
  return bits;
}

struct Bfloat16Format : FloatFormat {
  static constexpr std::uint32_t kPacking = 2;
  static constexpr std::uint32_t kBytes = 2;

#if defined(__AVX512BF16__)
  using Line = UintVec;
  static INLINE Line unpack(UintVec bits) { return bits; }
  static INLINE Vec dot(Vec acc, Line a, Line b) {
    return as<Vec>(_mm512_dpbf16_ps(as<__m512>(acc), as<__m512bh>(a), as<__m512bh>(b)));
  }
#else
  struct Line {
    Vec even, odd;
  };
  static INLINE Line unpack(UintVec bits) {
    return {as<Vec>(bits << 16), as<Vec>(bits & 0xFFFF0000u)};
  }
  static INLINE Vec dot(Vec acc, const Line& a, const Line& b) {
    return acc + a.even * b.even + a.odd * b.odd;
  }
#endif
  static INLINE Line line(const std::byte* p) { return unpack(load_line(p)); }
  static INLINE Line spread(std::uint32_t operand) { return unpack(UintVec{} + operand); }
  // Operands are flushed like those of the dot product: what is subnormal counts as zero.
  static INLINE void put(Vec values, std::uint32_t* to) {
#if defined(__AVX512BF16__)
    const auto half = _mm512_cvtneps_pbh(as<__m512>(values));
#else
    const HalfVec half = narrow_bf16(values);
#endif
    std::memcpy(to, &half, sizeof half);
  }
  static INLINE void put_query(const float* q, std::uint32_t dim, std::uint32_t* to, std::int32_t*,
                               float*) {
    for (std::uint32_t d = 0; d < dim; d += kLanes) put(load(q + d), to + d / kPacking);
  }
  static INLINE float put_weights(const Vec* weights, int vectors, const float*,
                                  std::uint32_t* to) {
    for (int i = 0; i < vectors; ++i) put(weights[i], to + i * kLanes / 2);
    return 1;
  }
};

struct Int8Format {
  using Acc = IntVec;
  static constexpr int kTerms = 2;
  static constexpr bool kScaled = true;
  static constexpr std::uint32_t kPacking = 4;
  static constexpr std::uint32_t kBytes = 1;
  // A query is step * (128 * high + low), a weight is step * (256 * high + low).
  static constexpr int kQueryHigh = 128;
  static constexpr int kQueryLargest = 127 * kQueryHigh;
  static constexpr int kWeightHigh = 256;
  static constexpr int kWeightLargest = 255 * kWeightHigh;
  static constexpr int kKeyBias = 128;
  static constexpr float kTiny = 1e-30f;  // what is smaller counts as zero

#if defined(__AVX512VNNI__)
  using Line = UintVec;
  using Spread = UintVec;
  static INLINE Line unpack_unsigned(UintVec bits) { return bits; }
  static INLINE Line unpack_signed(UintVec bits) { return bits; }
  static INLINE IntVec dot(IntVec acc, Line non_negative, Line any) {
    return as<IntVec>(
        _mm512_dpbusd_epi32(as<__m512i>(acc), as<__m512i>(non_negative), as<__m512i>(any)));
  }
#else
  struct Line {
    ShortVec even, odd;
  };
  using Spread = Line;
  static INLINE Line unpack_unsigned(UintVec bits) {
    return {as<ShortVec>(bits & 0x00FF00FFu), as<ShortVec>((bits >> 8) & 0x00FF00FFu)};
  }
  static INLINE Line unpack_signed(UintVec bits) {
    const ShortVec pairs = as<ShortVec>(bits);
    return {(pairs << 8) >> 8, pairs >> 8};
  }
  static INLINE IntVec dot(IntVec acc, const Line& a, const Line& b) {
    return acc + madd(a.even, b.even) + madd(a.odd, b.odd);
  }
#endif
  static INLINE Line line_k(const std::byte* p) { return unpack_unsigned(load_line(p)); }
  static INLINE Line line_v(const std::byte* p) { return unpack_signed(load_line(p)); }
  // Neighbours `valid` and later of each lane become zero: they may hold anything.
  static INLINE Line line_v(const std::byte* p, std::uint32_t valid) {
    return unpack_signed(load_line(p) & ((1u << (32 / kPacking * valid)) - 1));
  }
  static INLINE Spread spread_q(std::uint32_t operand) {
    return unpack_signed(UintVec{} + operand);
  }
  static INLINE Spread spread_weight(std::uint32_t operand) {
    return unpack_unsigned(UintVec{} + operand);
  }
  static INLINE IntVec dot_k(IntVec acc, const Line& line, const Spread& q) {
    return dot(acc, line, q);
  }
  static INLINE IntVec dot_v(IntVec acc, const Line& line, const Spread& weight) {
    return dot(acc, weight, line);
  }

  static INLINE IntVec start_score(std::int32_t bias) { return IntVec{} + bias; }
  static INLINE Vec score(const Acc* acc) {
    return __builtin_convertvector(acc[0] * kQueryHigh + acc[1], Vec);
  }
  static INLINE void finish_out(float* out, const Acc* acc, float step) {
    const Vec sum = __builtin_convertvector(acc[0] * kWeightHigh + acc[1], Vec);
    store(out, load(out) + sum * step);
  }

  // Operands of the high term, then of the low one; `bias` undoes the bias of K in each.
  static INLINE void put_query(const float* q, std::uint32_t dim, std::uint32_t* to,
                               std::int32_t* bias, float* step) {
    Vec top = Vec{};
    for (std::uint32_t d = 0; d < dim; d += kLanes) top = vmax(top, vmax(load(q + d), -load(q + d)));
    const float largest = horizontal_max(top);
    *step = largest <= kTiny ? 1 : largest / kQueryLargest;  // of NaN: NaN
    const float inverse = largest > kTiny ? kQueryLargest / largest : 0;
    std::int32_t high_sum = 0, low_sum = 0;
    std::int8_t* high = reinterpret_cast<std::int8_t*>(to);
    std::int8_t* low = reinterpret_cast<std::int8_t*>(to + dim / kPacking);
    for (std::uint32_t d = 0; d < dim; ++d) {
      const int value = static_cast<int>(__builtin_rintf(q[d] * inverse));
      const int top_part = (value + kQueryHigh / 2 + kQueryLargest + kQueryHigh) / kQueryHigh - 128;
      high[d] = static_cast<std::int8_t>(top_part);
      low[d] = static_cast<std::int8_t>(value - top_part * kQueryHigh);
      high_sum += high[d];
      low_sum += low[d];
    }
    bias[0] = -kKeyBias * high_sum;
    bias[1] = -kKeyBias * low_sum;
  }

  // Weights times the steps of V; returns the step of the sums.
  static INLINE float put_weights(const Vec* weights, int vectors, const float* v_steps,
                                  std::uint32_t* to) {
    Vec scaled[kTileTokens / kLanes];
    Vec top = Vec{};
    for (int i = 0; i < vectors; ++i) {
      scaled[i] = weights[i] * load(v_steps + i * kLanes);
      top = vmax(top, scaled[i]);
    }
    const float largest = horizontal_max(top);
    const float inverse = largest > kTiny ? kWeightLargest / largest : 0;
    auto* high = reinterpret_cast<std::byte*>(to);
    auto* low = reinterpret_cast<std::byte*>(to + kTileTokens / kPacking);
    for (int i = 0; i < vectors; ++i) {
      const UintVec value =
          as<UintVec>(__builtin_convertvector(scaled[i] * inverse + 0.5f, IntVec));
      const ByteVec parts[2] = {low_bytes(value >> 8), low_bytes(value)};
      std::memcpy(high + i * kLanes, &parts[0], kLanes);
      std::memcpy(low + i * kLanes, &parts[1], kLanes);
    }
    return largest / kWeightLargest;
  }
};

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA
