#include "paged_kv.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace omniserve {
namespace {

void require(bool ok, const char* name, long long value) {
  if (!ok) throw std::out_of_range(std::string(name) + " " + std::to_string(value) + " out of range");
}

bool below(std::int64_t value, std::int64_t limit) { return value >= 0 && value < limit; }

shm::Geometry own_geometry(std::uint32_t layers, std::uint32_t kv_heads, std::uint32_t head_dim,
                           std::uint32_t page_tokens, std::uint32_t pages, std::uint32_t dtype,
                           std::uint32_t kv_dtype) {
  shm::Geometry g{layers,   kv_heads,    kv_heads, head_dim, dtype,
                  kv_dtype, page_tokens, 1,        1,        1,     pages};
  check_geometry(g);
  return g;
}

// Appended rows that a thread takes at a time, and how many make it worth to call the threads.
constexpr std::size_t kRowsOfUnit = 32;
constexpr std::size_t kRowsWorthSharing = 4 * kRowsOfUnit;

}  // namespace

PagedKv::PagedKv(std::uint32_t layers, std::uint32_t kv_heads, std::uint32_t head_dim,
                 std::uint32_t page_tokens, std::uint32_t pages, std::uint32_t dtype,
                 std::uint32_t kv_dtype, std::shared_ptr<ThreadPool> threads)
    : PagedKv(own_geometry(layers, kv_heads, head_dim, page_tokens, pages, dtype, kv_dtype),
              std::move(threads)) {}

PagedKv::PagedKv(const shm::Geometry& g, std::shared_ptr<ThreadPool> threads)
    : pool_(std::move(threads)),
      memory_(shm::page_bytes(g) * g.pages, *pool_),
      pages_(memory_.take(shm::page_bytes(g) * g.pages), g) {}

void PagedKv::check_place(std::int32_t layer, std::int32_t page, std::int32_t offset) const {
  const shm::Geometry& g = geometry();
  require(below(layer, g.layers), "layer", layer);
  require(below(page, g.pages), "page", page);
  require(below(offset, g.page_tokens), "offset", offset);
}

void PagedKv::append(std::uint32_t layer, const Rows& k, const Rows& v, const std::int32_t* pages,
                     const std::int32_t* offsets) {
  for (std::size_t i = 0; i < k.rows; ++i)
    check_place(static_cast<std::int32_t>(layer), pages[i], offsets[i]);
  const std::size_t elem = shm::dtype_bytes(geometry().dtype);
  const auto write = [&](std::size_t i) {
    pages_.write(layer, pages[i], offsets[i], static_cast<std::byte*>(k.data) + i * k.stride * elem,
                 static_cast<std::byte*>(v.data) + i * v.stride * elem);
  };
  if (k.rows < kRowsWorthSharing) {
    for (std::size_t i = 0; i < k.rows; ++i) write(i);
    return;
  }
  std::atomic<std::size_t> next{0};
  pool_->run([&] {
    for (std::size_t first; (first = next.fetch_add(kRowsOfUnit)) < k.rows;)
      for (std::size_t i = first; i < std::min(first + kRowsOfUnit, k.rows); ++i) write(i);
  });
}

void PagedKv::attend(std::uint32_t layer, const Rows& q, const Rows& out,
                     const std::int32_t* tables, std::size_t max_pages,
                     const std::int32_t* first_row, const std::int32_t* n_rows,
                     const std::int32_t* first_position, std::size_t segments,
                     const AttendOptions& options) {
  const shm::Geometry& g = geometry();
  require(below(layer, g.layers), "layer", layer);
  const std::size_t elem = shm::dtype_bytes(g.dtype);
  const std::uint32_t heads = static_cast<std::uint32_t>(q.columns / g.head_dim);
  segments_.clear();
  for (std::size_t s = 0; s < segments; ++s) {
    const std::int64_t rows = n_rows[s];
    if (rows == 0) continue;
    require(rows > 0, "n_rows", rows);
    require(first_row[s] >= 0 && first_row[s] + rows <= static_cast<std::int64_t>(q.rows),
            "first_row + n_rows", first_row[s] + rows);
    const std::int64_t tokens = first_position[s] + rows;
    require(first_position[s] >= 0 && tokens <= static_cast<std::int64_t>(max_pages) * g.page_tokens,
            "first_position + n_rows", tokens);
    const std::int32_t* table = tables + s * max_pages;
    for (std::int64_t page = 0; page * g.page_tokens < tokens; ++page)
      require(below(table[page], g.pages), "page", table[page]);
    Segment segment{};
    segment.table = table;
    segment.q = static_cast<std::byte*>(q.data) + first_row[s] * q.stride * elem;
    segment.out = static_cast<std::byte*>(out.data) + first_row[s] * out.stride * elem;
    segment.q_stride = q.stride;
    segment.out_stride = out.stride;
    segment.rows = static_cast<std::uint32_t>(rows);
    segment.first_position = static_cast<std::uint32_t>(first_position[s]);
    segments_.push_back(segment);
  }
  attention_.run(pages_, layer, heads, segments_, options, *pool_);
}

void PagedKv::check_transfer(const SegmentView& segment, const std::int32_t* layers,
                             const std::int32_t* pages, const std::int32_t* offsets,
                             const std::int32_t* slots, std::size_t n) const {
  const shm::Geometry& mine = geometry();
  const shm::Geometry& theirs = segment.geometry();
  if (mine.dtype != theirs.dtype || mine.kv_heads != theirs.kv_heads ||
      mine.head_dim != theirs.head_dim)
    throw std::invalid_argument("the pool and the segment differ in dtype, kv_heads or head_dim");
  for (std::size_t i = 0; i < n; ++i) {
    check_place(layers[i], pages[i], offsets[i]);
    require(below(slots[i], theirs.slots), "slot", slots[i]);
  }
}

void PagedKv::export_rows(const SegmentView& segment, const std::int32_t* layers,
                          const std::int32_t* pages, const std::int32_t* offsets,
                          const std::int32_t* slots, std::size_t n) const {
  check_transfer(segment, layers, pages, offsets, slots, n);
  const RowParts parts(segment.geometry());
  const std::size_t elem = shm::dtype_bytes(geometry().dtype);
  for (std::size_t i = 0; i < n; ++i) {
    std::byte* row = segment.slab_row(slots[i]);
    pages_.read(layers[i], pages[i], offsets[i], row + parts.k * elem, row + parts.v * elem);
  }
}

void PagedKv::import_rows(const SegmentView& segment, const std::int32_t* layers,
                          const std::int32_t* pages, const std::int32_t* offsets,
                          const std::int32_t* slots, std::size_t n) {
  check_transfer(segment, layers, pages, offsets, slots, n);
  const RowParts parts(segment.geometry());
  const std::size_t elem = shm::dtype_bytes(geometry().dtype);
  for (std::size_t i = 0; i < n; ++i) {
    const std::byte* row = segment.slab_row(slots[i]);
    pages_.write(layers[i], pages[i], offsets[i], row + parts.k * elem, row + parts.v * elem);
  }
}

}  // namespace omniserve
