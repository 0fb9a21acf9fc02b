// Mapped files, regions and doorbells: what both sides of a segment do alike. Rings: ring.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "omniserve/shm/layout.h"
#include "spin.h"

namespace omniserve {

// A file mapped shared and writable. Throws std::runtime_error that names the path and cause.
class Mapping {
 public:
  Mapping() = default;
  explicit Mapping(const std::string& path);
  // Without its memory: for one who reads its beginning, and then keeps what is wanted.
  static Mapping bare(const std::string& path);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  // Unmaps all behind the first `size` bytes, a multiple of kPageAlign, and populates those.
  void keep(std::size_t size);

 private:
  void populate();

  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// What a segment's header states, checked against the mapping's size. Throws std::runtime_error that
// names `path`, and as check_geometry().
shm::Geometry geometry_of(const Mapping& mapping, const std::string& path);

// A new file of zeros at `path`, in place of any old one, with its memory allocated.
void create_file(const std::string& path, std::size_t size);

// Typed access to a segment's regions. The geometry is this side's own copy, and offsets follow
// from it: what the other side writes into the header moves nothing here.
class SegmentView {
 public:
  SegmentView() = default;
  SegmentView(std::byte* base, const shm::Geometry& g)
      : base_(base),
        geometry_(g),
        regions_(shm::regions_of(g)),
        max_pages_per_sequence_(shm::max_pages_per_sequence(g)),
        slab_row_bytes_(shm::slot_elems(g) * shm::dtype_bytes(g.dtype)),
        kv_row_bytes_(std::size_t{g.kv_heads} * g.head_dim * shm::dtype_bytes(g.dtype)) {}

  explicit operator bool() const { return base_ != nullptr; }
  shm::Header& header() const { return *reinterpret_cast<shm::Header*>(base_); }
  const shm::Geometry& geometry() const { return geometry_; }
  const shm::Regions& regions() const { return regions_; }
  std::uint32_t max_pages_per_sequence() const { return max_pages_per_sequence_; }

  std::atomic<std::uint32_t>& sequence_state(std::uint32_t sequence) const {
    return at<std::atomic<std::uint32_t>>(regions_.sequence_state)[sequence];
  }
  // [layers] of one sequence.
  std::atomic<std::uint32_t>* written_len(std::uint32_t sequence) const {
    return at<std::atomic<std::uint32_t>>(regions_.written_len) +
           std::size_t{sequence} * geometry_.layers;
  }
  // [max_pages_per_sequence] of one sequence.
  std::int32_t* page_table(std::uint32_t sequence) const {
    return at<std::int32_t>(regions_.page_table) +
           std::size_t{sequence} * max_pages_per_sequence_;
  }
  shm::LayerOptions* layer_options() const {
    return at<shm::LayerOptions>(regions_.layer_options);
  }
  // [layers][heads]
  float* sinks() const { return at<float>(regions_.sinks); }
  shm::SlotHeader& slot(std::uint32_t slot) const {
    return at<shm::SlotHeader>(regions_.slot_headers)[slot];
  }
  std::byte* slab_row(std::uint32_t slot) const {
    return base_ + regions_.slab + slot * slab_row_bytes_;
  }
  // Rows of token `index` of a CHECKPOINT or RESTORE message.
  std::byte* transfer_k(std::uint32_t slot, std::uint32_t index) const {
    return slab_row(slot) + 2 * std::size_t{index} * kv_row_bytes_;
  }
  std::byte* transfer_v(std::uint32_t slot, std::uint32_t index) const {
    return transfer_k(slot, index) + kv_row_bytes_;
  }
  std::byte* kv() const { return base_ + regions_.kv; }
  std::byte* at_offset(std::uint64_t offset) const { return base_ + offset; }

 private:
  template <typename T>
  T* at(std::uint64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  std::byte* base_ = nullptr;
  shm::Geometry geometry_{};
  shm::Regions regions_{};
  std::uint32_t max_pages_per_sequence_ = 0;
  std::size_t slab_row_bytes_ = 0;
  std::size_t kv_row_bytes_ = 0;
};

// Where q, k, v and out begin in a slab row, in elements.
struct RowParts {
  explicit RowParts(const shm::Geometry& g)
      : q(0),
        k(std::size_t{g.heads} * g.head_dim),
        v(k + std::size_t{g.kv_heads} * g.head_dim),
        out(v + std::size_t{g.kv_heads} * g.head_dim) {}
  std::size_t q, k, v, out;
};

// Throws std::invalid_argument naming the field that the kernels cannot serve.
void check_geometry(const shm::Geometry& g);

// Wakes the sleeper of `bell`, if there is one.
void ring_bell(shm::Doorbell& bell);
// Sleeps until `bell` was rung after its value was `seen`; false on timeout.
bool wait_bell(shm::Doorbell& bell, std::uint32_t seen, std::int64_t timeout_us);

}  // namespace omniserve
