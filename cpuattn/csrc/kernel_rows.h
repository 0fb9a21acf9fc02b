// Rows as they lie outside of pages, and what int8 KV makes of them. Part of kernel_impl.h, compiled
// with it.
#pragma once

#include "kernel.h"

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

INLINE Vec widen(HalfVec half, std::uint32_t dtype) {
  return dtype == shm::kBfloat16 ? widen_bf16(half) : widen_f16(half);
}

INLINE Vec load_row(const void* row, std::size_t at, std::uint32_t dtype) {
  if (dtype == shm::kFloat32) return load(static_cast<const float*>(row) + at);
  return widen(load_as<HalfVec>(static_cast<const std::uint16_t*>(row) + at), dtype);
}

INLINE void store_row(void* row, std::size_t at, std::uint32_t dtype, Vec v) {
  if (dtype == shm::kFloat32) return store(static_cast<float*>(row) + at, v);
  const HalfVec half = dtype == shm::kBfloat16 ? narrow_bf16(v) : narrow_f16(v);
  std::memcpy(static_cast<std::uint16_t*>(row) + at, &half, sizeof half);
}

// Of a row. Magnitudes are compared as integers, which order as floats do, with NaN above all.
INLINE float largest_magnitude(const void* row, std::uint32_t dtype, std::uint32_t dim) {
  if (dtype == shm::kFloat32) {
    IntVec top{};
    for (std::uint32_t d = 0; d < dim; d += kLanes)
      top = vmax(top, load_as<IntVec>(static_cast<const float*>(row) + d) & 0x7FFFFFFF);
    return as<float>(horizontal_max(top));
  }
  HalfVec top{};
  for (std::uint32_t d = 0; d < dim; d += kLanes)
    top = vmax(top, load_as<HalfVec>(static_cast<const std::uint16_t*>(row) + d) & 0x7FFF);
  return widen(HalfVec{} + horizontal_max(top), dtype)[0];
}

// See Kernels::quantise.
float quantise(const void* row, std::uint32_t dtype, std::uint32_t dim, std::uint8_t flip,
               std::uint8_t* values) {
  constexpr float kLargest = 127;
  const float largest = largest_magnitude(row, dtype, dim);
  const float step = largest / kLargest;
  const bool nothing = step < __FLT_MIN__;
  const float inverse = nothing ? 0 : kLargest / largest;
  for (std::uint32_t d = 0; d < dim; d += kLanes) {
    // The addition leaves the nearest integer in the low bits of the sum.
    const Vec rounded = load_row(row, d, dtype) * inverse + 0x1.8p23f;
    const ByteVec bytes = low_bytes(as<UintVec>(rounded)) ^ flip;
    std::memcpy(values + d, &bytes, sizeof bytes);
  }
  return nothing ? 0 : step;
}

void dequantise(const std::uint8_t* values, float step, std::uint8_t flip, std::uint32_t dtype,
                std::uint32_t dim, void* row) {
  for (std::uint32_t d = 0; d < dim; d += kLanes) {
    const IntVec steps = widen_signed(load_as<ByteVec>(values + d) ^ flip);
    store_row(row, d, dtype, __builtin_convertvector(steps, Vec) * step);
  }
}

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA
