// The float types of rows and KV that C++ has no names for, one value at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace omniserve {

struct Bf16 {
  std::uint16_t bits;
};

struct F16 {
  std::uint16_t bits;
};

inline float bits_to_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline std::uint32_t float_to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return bits_to_float(std::uint32_t{x.bits} << 16); }

inline float to_float(F16 x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = std::uint32_t{x.bits & 0x7FFFu} << 13;
  if (magnitude >= 0x0F800000u) return bits_to_float(sign | magnitude | 0x7F800000u);  // inf, NaN
  // Multiplied rather than biased, which also makes subnormals right.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
}

inline void from_float(float x, Bf16& to) {
  const std::uint32_t bits = float_to_bits(x);
  to.bits = static_cast<std::uint16_t>(
      std::isnan(x) ? (bits >> 16) | 0x40 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

}  // namespace omniserve
