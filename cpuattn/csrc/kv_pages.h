// How KV is packed into pages: the same in the device pool and in an arena.
#pragma once

#include <cstddef>
#include <cstdint>

#include "omniserve/shm/layout.h"

namespace omniserve {

// A view of [layers][pages][kv_heads] blocks; see shm::block_bytes for a block.
class KvPages {
 public:
  KvPages() = default;
  KvPages(std::byte* base, const shm::Geometry& g)
      : base_(base), g_(g), block_bytes_(shm::block_bytes(g)) {}

  const shm::Geometry& geometry() const { return g_; }
  std::size_t page_stride() const { return block_bytes_ * g_.kv_heads; }

  std::byte* block(std::uint32_t layer, std::uint32_t page, std::uint32_t kv_head) const {
    const std::size_t index = (std::size_t{layer} * g_.pages + page) * g_.kv_heads + kv_head;
    return base_ + index * block_bytes_;
  }

  // k, v: [kv_heads * head_dim] of the geometry's dtype.
  void write(std::uint32_t layer, std::uint32_t page, std::uint32_t offset, const void* k,
             const void* v) const {
    if (g_.dtype == shm::kBfloat16)
      copy<std::uint16_t, true>(layer, page, offset, const_cast<void*>(k), const_cast<void*>(v));
    else
      copy<float, true>(layer, page, offset, const_cast<void*>(k), const_cast<void*>(v));
  }

  void read(std::uint32_t layer, std::uint32_t page, std::uint32_t offset, void* k,
            void* v) const {
    if (g_.dtype == shm::kBfloat16)
      copy<std::uint16_t, false>(layer, page, offset, k, v);
    else
      copy<float, false>(layer, page, offset, k, v);
  }

 private:
  template <typename T, bool kIntoPage>
  void copy(std::uint32_t layer, std::uint32_t page, std::uint32_t offset, void* k_row,
            void* v_row) const {
    const std::size_t dim = g_.head_dim;
    const std::size_t tokens = g_.page_tokens;
    for (std::uint32_t h = 0; h < g_.kv_heads; ++h) {
      T* k_page = reinterpret_cast<T*>(block(layer, page, h)) + offset;
      T* v_page = reinterpret_cast<T*>(block(layer, page, h)) + (tokens + offset) * dim;
      T* k = static_cast<T*>(k_row) + h * dim;
      T* v = static_cast<T*>(v_row) + h * dim;
      for (std::size_t d = 0; d < dim; ++d) {
        if constexpr (kIntoPage) {
          k_page[d * tokens] = k[d];
          v_page[d] = v[d];
        } else {
          k[d] = k_page[d * tokens];
          v[d] = v_page[d];
        }
      }
    }
  }

  std::byte* base_ = nullptr;
  shm::Geometry g_{};
  std::size_t block_bytes_ = 0;
};

}  // namespace omniserve
