// Shared by the binding files: how Python's arrays become raw rows.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "omniserve/shm/layout.h"
#include "paged_kv.h"

namespace omniserve {

namespace nb = nanobind;

using Int32s = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int32Table = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<nb::ndim<2>, nb::device::cpu>;
using ConstMatrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;

constexpr const char* kDtypeNames[] = {"", "float32", "bfloat16", "float16", "int8"};

inline std::uint32_t dtype_code(const std::string& name) {
  for (std::uint32_t code = shm::kFloat32; code <= shm::kInt8; ++code)
    if (name == kDtypeNames[code]) return code;
  throw std::invalid_argument("dtype: float32, bfloat16, float16 or int8, not " + name);
}

inline std::string dtype_name(std::uint32_t code) { return kDtypeNames[code]; }

inline void require_same_length(std::initializer_list<std::size_t> lengths) {
  for (const std::size_t length : lengths)
    if (length != *lengths.begin()) throw std::invalid_argument("arrays differ in length");
}

inline bool is_of(nb::dlpack::dtype t, std::uint32_t dtype) {
  using Code = nb::dlpack::dtype_code;
  const auto is = [&](Code code, unsigned bits) {
    return t.code == static_cast<std::uint8_t>(code) && t.bits == bits;
  };
  switch (dtype) {
    case shm::kBfloat16: return is(Code::Bfloat, 16) || is(Code::UInt, 16);  // unknown to numpy
    case shm::kFloat16: return is(Code::Float, 16);
    default: return is(Code::Float, 32);
  }
}

template <typename Array>
Rows rows_of(const Array& array, std::uint32_t dtype, const std::string& name) {
  if (!is_of(array.dtype(), dtype))
    throw std::invalid_argument(name + ": dtype must be " + dtype_name(dtype));
  if (array.shape(0) > 0 && array.shape(1) > 1 && array.stride(1) != 1)
    throw std::invalid_argument(name + ": inner stride must be 1");
  return {const_cast<void*>(static_cast<const void*>(array.data())), array.shape(0),
          array.shape(1), static_cast<std::size_t>(array.stride(0))};
}

// Hands a vector's memory to numpy.
template <typename T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> to_numpy(std::vector<T>&& values) {
  auto* owned = new std::vector<T>(std::move(values));
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return {owned->data(), {owned->size()}, owner};
}

void bind_layout(nb::module_& m);
void bind_dense(nb::module_& m);
void bind_kv(nb::module_& m);
void bind_link(nb::module_& m);
void bind_server(nb::module_& m);

}  // namespace omniserve
