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

  // k, v: [kv_heads * head_dim] of the geometry's row dtype. int8 KV is quantised on the way in,
  // each head by its largest magnitude, so that reading gives back a rounded row.
  void write(std::uint32_t layer, std::uint32_t page, std::uint32_t offset, const void* k,
             const void* v) const;
  void read(std::uint32_t layer, std::uint32_t page, std::uint32_t offset, void* k, void* v) const;

 private:
  std::byte* base_ = nullptr;
  shm::Geometry g_{};
  std::size_t block_bytes_ = 0;
};

}  // namespace omniserve
