#include "kv_pages.h"

#include <algorithm>
#include <cmath>

#include "floats.h"

namespace omniserve {
namespace {

constexpr std::size_t kGroup = shm::kGroupLanes;

// Index of one value in half a block: `lane` of `lanes` is what groups are made of (tokens of K,
// dimensions of V), `step` of `steps` is what is summed over.
template <std::size_t P>
std::size_t index(std::size_t lane, std::size_t lanes, std::size_t step, std::size_t steps) {
  const std::size_t first = lane / kGroup * kGroup;
  const std::size_t width = std::min(kGroup, lanes - first);
  return first * steps + ((step / P) * width + lane - first) * P + step % P;
}

// One token's place in a block.
template <std::size_t P>
struct Place {
  std::size_t dim;
  std::size_t tokens;
  std::size_t offset;

  std::size_t k(std::size_t d) const { return index<P>(offset, tokens, d, dim); }
  std::size_t v(std::size_t d) const { return dim * tokens + index<P>(d, dim, offset, tokens); }
};

template <typename T, std::size_t P>
void put(std::byte* block, const Place<P>& place, const T* k, const T* v) {
  T* values = reinterpret_cast<T*>(block);
  for (std::size_t d = 0; d < place.dim; ++d) {
    values[place.k(d)] = k[d];
    values[place.v(d)] = v[d];
  }
}

template <typename T, std::size_t P>
void get(const std::byte* block, const Place<P>& place, T* k, T* v) {
  const T* values = reinterpret_cast<const T*>(block);
  for (std::size_t d = 0; d < place.dim; ++d) {
    k[d] = values[place.k(d)];
    v[d] = values[place.v(d)];
  }
}

// [K scales][V scales] behind the values of an int8 block.
float* scales_of(std::byte* block, const Place<4>& place) {
  return reinterpret_cast<float*>(block + 2 * place.dim * place.tokens) + place.offset;
}

// The step between two int8 values: 127 of them reach the row's largest magnitude.
template <typename T>
float step_of(const T* row, std::size_t dim) {
  float largest = 0;
  for (std::size_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(to_float(row[d])));
  return largest / 127.0f;
}

template <typename T>
int quantised(T value, float step) {
  if (step == 0) return 0;
  return static_cast<int>(std::lrint(std::clamp(to_float(value) / step, -127.0f, 127.0f)));
}

template <typename T>
void put_int8(std::byte* block, const Place<4>& place, const T* k, const T* v) {
  auto* values = reinterpret_cast<std::uint8_t*>(block);
  float* scales = scales_of(block, place);
  const float k_step = scales[0] = step_of(k, place.dim);
  const float v_step = scales[place.tokens] = step_of(v, place.dim);
  for (std::size_t d = 0; d < place.dim; ++d) {
    values[place.k(d)] = static_cast<std::uint8_t>(quantised(k[d], k_step) + 128);
    values[place.v(d)] = static_cast<std::uint8_t>(quantised(v[d], v_step));
  }
}

template <typename T>
void get_int8(std::byte* block, const Place<4>& place, T* k, T* v) {
  const auto* values = reinterpret_cast<const std::uint8_t*>(block);
  const float* scales = scales_of(block, place);
  for (std::size_t d = 0; d < place.dim; ++d) {
    from_float(scales[0] * static_cast<float>(values[place.k(d)] - 128), k[d]);
    from_float(scales[place.tokens] *
                   static_cast<float>(static_cast<std::int8_t>(values[place.v(d)])),
               v[d]);
  }
}

// Calls `use` with each kv head's block and a value of the type of the rows.
template <typename Use>
void for_each_head(const KvPages& pages, std::uint32_t layer, std::uint32_t page, const Use& use) {
  const shm::Geometry& g = pages.geometry();
  for (std::uint32_t h = 0; h < g.kv_heads; ++h) {
    std::byte* block = pages.block(layer, page, h);
    const std::size_t at = std::size_t{h} * g.head_dim;
    switch (g.dtype) {
      case shm::kBfloat16: use(block, at, Bf16{}); break;
      case shm::kFloat16: use(block, at, F16{}); break;
      default: use(block, at, float{}); break;
    }
  }
}

}  // namespace

void KvPages::write(std::uint32_t layer, std::uint32_t page, std::uint32_t offset, const void* k,
                    const void* v) const {
  for_each_head(*this, layer, page, [&](std::byte* block, std::size_t at, auto type) {
    using T = decltype(type);
    const T* k_head = static_cast<const T*>(k) + at;
    const T* v_head = static_cast<const T*>(v) + at;
    if (g_.kv_dtype == shm::kInt8)
      put_int8(block, Place<4>{g_.head_dim, g_.page_tokens, offset}, k_head, v_head);
    else
      put(block, Place<std::is_same_v<T, Bf16> ? 2 : 1>{g_.head_dim, g_.page_tokens, offset},
          k_head, v_head);
  });
}

void KvPages::read(std::uint32_t layer, std::uint32_t page, std::uint32_t offset, void* k,
                   void* v) const {
  for_each_head(*this, layer, page, [&](std::byte* block, std::size_t at, auto type) {
    using T = decltype(type);
    T* k_head = static_cast<T*>(k) + at;
    T* v_head = static_cast<T*>(v) + at;
    if (g_.kv_dtype == shm::kInt8)
      get_int8(block, Place<4>{g_.head_dim, g_.page_tokens, offset}, k_head, v_head);
    else
      get(block, Place<std::is_same_v<T, Bf16> ? 2 : 1>{g_.head_dim, g_.page_tokens, offset},
          k_head, v_head);
  });
}

}  // namespace omniserve
