#include "paged_kv.h"

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
  tokens_.clear();
  for (std::size_t i = 0; i < k.rows; ++i)
    tokens_.push_back({layer, static_cast<std::uint32_t>(pages[i]),
                       static_cast<std::uint32_t>(offsets[i]),
                       static_cast<std::byte*>(k.data) + i * k.stride * elem,
                       static_cast<std::byte*>(v.data) + i * v.stride * elem});
  pages_.write(tokens_, *pool_);
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

void PagedKv::name_tokens(const SegmentView& segment, const std::int32_t* layers,
                          const std::int32_t* pages, const std::int32_t* offsets,
                          const std::int32_t* slots, const std::int32_t* indices, std::size_t n) {
  const shm::Geometry& mine = geometry();
  const shm::Geometry& theirs = segment.geometry();
  if (mine.dtype != theirs.dtype || mine.kv_heads != theirs.kv_heads ||
      mine.head_dim != theirs.head_dim)
    throw std::invalid_argument("the pool and the segment differ in dtype, kv_heads or head_dim");
  tokens_.clear();
  for (std::size_t i = 0; i < n; ++i) {
    check_place(layers[i], pages[i], offsets[i]);
    require(below(slots[i], theirs.slots), "slot", slots[i]);
    require(below(indices[i], shm::transfer_tokens(theirs)), "index", indices[i]);
    tokens_.push_back({static_cast<std::uint32_t>(layers[i]), static_cast<std::uint32_t>(pages[i]),
                       static_cast<std::uint32_t>(offsets[i]),
                       segment.transfer_k(slots[i], indices[i]),
                       segment.transfer_v(slots[i], indices[i])});
  }
}

void PagedKv::export_tokens(const SegmentView& segment, const std::int32_t* layers,
                            const std::int32_t* pages, const std::int32_t* offsets,
                            const std::int32_t* slots, const std::int32_t* indices, std::size_t n) {
  name_tokens(segment, layers, pages, offsets, slots, indices, n);
  pages_.read(tokens_, *pool_);
}

void PagedKv::import_tokens(const SegmentView& segment, const std::int32_t* layers,
                            const std::int32_t* pages, const std::int32_t* offsets,
                            const std::int32_t* slots, const std::int32_t* indices, std::size_t n) {
  name_tokens(segment, layers, pages, offsets, slots, indices, n);
  pages_.write(tokens_, *pool_);
}

}  // namespace omniserve
