// How KV is packed into pages: the same in the device pool and in an arena.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "omniserve/shm/layout.h"
#include "thread_pool.h"

namespace omniserve {

// K and V of one token in one layer: its place in pages, and its rows outside of them,
// [kv_heads * head_dim] each of the geometry's row dtype.
struct KvToken {
  std::uint32_t layer;
  std::uint32_t page;
  std::uint32_t offset;
  std::byte* k;
  std::byte* v;
};

// A view of [layers][pages][kv_heads] blocks; see shm::block_bytes for a block.
class KvPages {
 public:
  KvPages() = default;
  KvPages(std::byte* base, const shm::Geometry& g)
      : base_(base), g_(g), block_bytes_(shm::block_bytes(g)) {}

  const shm::Geometry& geometry() const { return g_; }
  std::size_t page_stride() const { return block_bytes_ * g_.kv_heads; }
  // Of K, or V, of a token outside of pages.
  std::size_t row_bytes() const {
    return std::size_t{g_.kv_heads} * g_.head_dim * shm::dtype_bytes(g_.dtype);
  }

  std::byte* block(std::uint32_t layer, std::uint32_t page, std::uint32_t kv_head) const {
    const std::size_t index = (std::size_t{layer} * g_.pages + page) * g_.kv_heads + kv_head;
    return base_ + index * block_bytes_;
  }

  // Copies rows into pages, or back. Tokens that follow one another in a page go together, with all
  // threads where that pays; no place may be named twice. int8 KV is quantised on the way in, each
  // head by its largest magnitude, so that reading gives back a rounded row.
  void write(const std::vector<KvToken>& tokens, ThreadPool& threads) const;
  void read(const std::vector<KvToken>& tokens, ThreadPool& threads) const;
  void write(const KvToken& token) const { write_run(&token, 1, nullptr, 0); }
  void read(const KvToken& token) const { read_run(&token, 1, nullptr, 0); }

 private:
  using Run = void (KvPages::*)(const KvToken*, std::size_t, const KvToken*, std::size_t) const;
  void for_runs(const std::vector<KvToken>& tokens, ThreadPool& threads, Run run) const;
  // A run: tokens of one layer and page whose offsets follow one another. The `next` one is only
  // fetched; none if nullptr.
  void write_run(const KvToken* run, std::size_t n, const KvToken* next, std::size_t next_n) const;
  void read_run(const KvToken* run, std::size_t n, const KvToken* next, std::size_t next_n) const;

  std::byte* base_ = nullptr;
  shm::Geometry g_{};
  std::size_t block_bytes_ = 0;
};

}  // namespace omniserve
