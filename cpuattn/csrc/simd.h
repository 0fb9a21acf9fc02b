// Sixteen lanes of float or int in one vector, whatever the instruction set makes of them.
// Included by kernel_*.cpp only, once for each instruction set, into a namespace of its own.
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

typedef float Vec __attribute__((vector_size(64)));
typedef std::int32_t IntVec __attribute__((vector_size(64)));
typedef std::uint32_t UintVec __attribute__((vector_size(64)));
typedef std::int16_t ShortVec __attribute__((vector_size(64)));
typedef std::uint16_t HalfVec __attribute__((vector_size(32)));
typedef std::uint8_t ByteVec __attribute__((vector_size(16)));

#define INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;
constexpr float kNegInf = -__builtin_inff();

INLINE Vec broadcast(float x) { return Vec{} + x; }

template <typename To, typename From>
INLINE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename To>
INLINE To load_as(const void* p) {
  To to;
  std::memcpy(&to, p, sizeof to);
  return to;
}

INLINE Vec load(const float* p) { return load_as<Vec>(p); }
INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

INLINE Vec widen_bf16(HalfVec h) { return as<Vec>(__builtin_convertvector(h, UintVec) << 16); }

INLINE HalfVec narrow_bf16(Vec v) {
  const UintVec bits = as<UintVec>(v);
  const UintVec rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const UintVec quiet = (bits >> 16) | 0x40;  // rounding must not turn a NaN into infinity
  return __builtin_convertvector(v == v ? rounded : quiet, HalfVec);
}

INLINE Vec widen_f16(HalfVec h) {
#if defined(__AVX512F__)
  return as<Vec>(_mm512_cvtph_ps(as<__m256i>(h)));
#elif defined(__F16C__)
  __m128i half[2];
  std::memcpy(half, &h, sizeof half);
  const __m256 wide[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  return load_as<Vec>(wide);
#else
  const UintVec bits = __builtin_convertvector(h, UintVec);
  const UintVec sign = (bits & 0x8000) << 16;
  const UintVec magnitude = (bits & 0x7FFF) << 13;
  const UintVec value = as<UintVec>(as<Vec>(magnitude) * 0x1p112f);  // right for subnormals too
  return as<Vec>(sign | (magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : value));
#endif
}

INLINE HalfVec narrow_f16(Vec v) {
#if defined(__AVX512F__)
  return as<HalfVec>(_mm512_cvtps_ph(as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  __m256 wide[2];
  std::memcpy(wide, &v, sizeof wide);
  const __m128i half[2] = {_mm256_cvtps_ph(wide[0], _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(wide[1], _MM_FROUND_TO_NEAREST_INT)};
  return load_as<HalfVec>(half);
#else
  const UintVec sign = (as<UintVec>(v) >> 16) & 0x8000;
  const UintVec magnitude = as<UintVec>(v) & 0x7FFFFFFF;
  const UintVec biased = magnitude - (112u << 23);
  const UintVec normal = (biased + 0xFFF + ((biased >> 13) & 1)) >> 13;
  // The addition rounds to multiples of the smallest subnormal.
  const UintVec subnormal = as<UintVec>(as<Vec>(magnitude) + 0.5f) - 0x3F000000u;
  UintVec bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x477FF000u ? UintVec{} + 0x7C00u : bits;
  bits = magnitude > 0x7F800000u ? UintVec{} + 0x7E00u : bits;
  return __builtin_convertvector(sign | bits, HalfVec);
#endif
}

// Loops, where there is no instruction: of a conversion of vectors compilers make sixteen single ones.
INLINE ByteVec low_bytes(UintVec v) {
#if defined(__AVX512F__)
  return as<ByteVec>(_mm512_cvtepi32_epi8(as<__m512i>(v)));
#else
  std::uint32_t lanes[kLanes];
  std::uint8_t bytes[kLanes];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int i = 0; i < kLanes; ++i) bytes[i] = static_cast<std::uint8_t>(lanes[i]);
  return load_as<ByteVec>(bytes);
#endif
}

INLINE IntVec widen_signed(ByteVec v) {
#if defined(__AVX512F__)
  return as<IntVec>(_mm512_cvtepi8_epi32(as<__m128i>(v)));
#else
  std::int8_t bytes[kLanes];
  std::int32_t lanes[kLanes];
  std::memcpy(bytes, &v, sizeof bytes);
  for (int i = 0; i < kLanes; ++i) lanes[i] = bytes[i];
  return load_as<IntVec>(lanes);
#endif
}

INLINE Vec vmax(Vec a, Vec b) {
#if defined(__AVX512F__)
  return as<Vec>(_mm512_max_ps(as<__m512>(a), as<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}

INLINE IntVec vmax(IntVec a, IntVec b) { return a > b ? a : b; }
INLINE HalfVec vmax(HalfVec a, HalfVec b) { return a > b ? a : b; }

INLINE bool any_greater(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(as<__m512>(a), as<__m512>(b), _CMP_GT_OQ) != 0;
#else
  const IntVec greater = a > b;
  std::int64_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= greater[i];
  return any != 0;
#endif
}

// Lanes i and i ^ kBy in each other's place.
template <int kBy, typename V>
INLINE V swapped(V v) {
  return __builtin_shufflevector(v, v, 0 ^ kBy, 1 ^ kBy, 2 ^ kBy, 3 ^ kBy, 4 ^ kBy, 5 ^ kBy, 6 ^ kBy,
                                 7 ^ kBy, 8 ^ kBy, 9 ^ kBy, 10 ^ kBy, 11 ^ kBy, 12 ^ kBy, 13 ^ kBy,
                                 14 ^ kBy, 15 ^ kBy);
}

template <typename V>
INLINE auto horizontal_max(V v) {
  v = vmax(v, swapped<8>(v));
  v = vmax(v, swapped<4>(v));
  v = vmax(v, swapped<2>(v));
  v = vmax(v, swapped<1>(v));
  return v[0];
}

INLINE float horizontal_sum(Vec v) {
  v += swapped<8>(v);
  v += swapped<4>(v);
  v += swapped<2>(v);
  v += swapped<1>(v);
  return v[0];
}

// 2^r for -0.5 <= r <= 0.5.
INLINE Vec exp2_near_zero(Vec r) {
  Vec p = r * 1.326469821e-03f + 9.671512991e-03f;
  p = p * r + 5.550733954e-02f;
  p = p * r + 2.402224243e-01f;
  p = p * r + 6.931470037e-01f;
  return p * r + 1.0f;
}

// 2^x, within 4 ulp, for x <= 0, or above by what the rounding of a logit leaves; exactly 1 at 0 and
// exactly 0 below -126 (so also at -inf).
INLINE Vec exp2_negative(Vec x) {
  constexpr float kLeast = -126.0f;
#if defined(__AVX512F__)
  const __mmask16 seen = _mm512_cmp_ps_mask(as<__m512>(x), _mm512_set1_ps(kLeast), _CMP_NLT_UQ);
  const __m512 whole = _mm512_roundscale_ps(as<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  return as<Vec>(_mm512_maskz_scalef_ps(seen, as<__m512>(exp2_near_zero(x - as<Vec>(whole))), whole));
#else
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: what is added to it becomes an integer
  const Vec clamped = vmax(x, broadcast(kLeast));
  const Vec shifted = clamped + kRounder;
  const Vec p = exp2_near_zero(clamped - (shifted - kRounder));
  const Vec power = as<Vec>(as<IntVec>(p) + (as<IntVec>(shifted) << 23));
  return x < broadcast(kLeast) ? Vec{} : power;
#endif
}

// Sums of products of neighbouring int16 lanes.
INLINE IntVec madd(ShortVec a, ShortVec b) {
#if defined(__AVX512BW__)
  return as<IntVec>(_mm512_madd_epi16(as<__m512i>(a), as<__m512i>(b)));
#elif defined(__AVX2__)
  __m256i x[2], y[2];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  const __m256i sums[2] = {_mm256_madd_epi16(x[0], y[0]), _mm256_madd_epi16(x[1], y[1])};
  return load_as<IntVec>(sums);
#else
  const IntVec x = as<IntVec>(a), y = as<IntVec>(b);
  return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA
