// The device KV of the cpu back end: a pool of pages in the worker's own memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attend.h"
#include "huge_memory.h"
#include "kv_pages.h"
#include "segment.h"
#include "thread_pool.h"

namespace omniserve {

// Inner stride 1; `stride` elements between rows.
struct Rows {
  void* data;
  std::size_t rows;
  std::size_t columns;
  std::size_t stride;
};

// Checks all indices before it touches memory: std::out_of_range names the culprit.
class PagedKv {
 public:
  PagedKv(const PagedKv&) = delete;
  PagedKv& operator=(const PagedKv&) = delete;
  PagedKv(std::uint32_t layers, std::uint32_t kv_heads, std::uint32_t head_dim,
          std::uint32_t page_tokens, std::uint32_t pages, std::uint32_t dtype,
          std::uint32_t kv_dtype, std::shared_ptr<ThreadPool> threads);

  const shm::Geometry& geometry() const { return pages_.geometry(); }
  const KvPages& pages() const { return pages_; }
  ThreadPool& threads() { return *pool_; }

  void append(std::uint32_t layer, const Rows& k, const Rows& v, const std::int32_t* pages,
              const std::int32_t* offsets);

  // tables: [segments][max_pages]. Row first_row[s] + r of q sees 0 .. first_position[s] + r.
  void attend(std::uint32_t layer, const Rows& q, const Rows& out, const std::int32_t* tables,
              std::size_t max_pages, const std::int32_t* first_row, const std::int32_t* n_rows,
              const std::int32_t* first_position, std::size_t segments,
              const AttendOptions& options);

  // Copies k, v between places of the pool and the slab: `indices` of the tokens in `slots`.
  void export_tokens(const SegmentView& segment, const std::int32_t* layers,
                     const std::int32_t* pages, const std::int32_t* offsets,
                     const std::int32_t* slots, const std::int32_t* indices, std::size_t n);
  void import_tokens(const SegmentView& segment, const std::int32_t* layers,
                     const std::int32_t* pages, const std::int32_t* offsets,
                     const std::int32_t* slots, const std::int32_t* indices, std::size_t n);

  void check_place(std::int32_t layer, std::int32_t page, std::int32_t offset) const;

 private:
  PagedKv(const shm::Geometry& geometry, std::shared_ptr<ThreadPool> threads);
  // Puts the tokens of a transfer into tokens_.
  void name_tokens(const SegmentView& segment, const std::int32_t* layers,
                   const std::int32_t* pages, const std::int32_t* offsets,
                   const std::int32_t* slots, const std::int32_t* indices, std::size_t n);

  std::shared_ptr<ThreadPool> pool_;
  HugeMemory memory_;
  KvPages pages_;
  std::vector<Segment> segments_;  // of a call; kept for their memory
  std::vector<KvToken> tokens_;
  Attention attention_;
};

}  // namespace omniserve
