// Mapped files, doorbells and rings: what both sides of a segment do alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "omniserve/shm/layout.h"

namespace omniserve {

// A file mapped shared and writable. Throws std::runtime_error that names the path and cause.
class Mapping {
 public:
  Mapping() = default;
  explicit Mapping(const std::string& path);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// A new file of zeros at `path`, in place of any old one, with its memory allocated.
void create_file(const std::string& path, std::size_t size);

// Typed access to a segment's regions.
class SegmentView {
 public:
  SegmentView() = default;
  explicit SegmentView(std::byte* base) : base_(base) {}

  explicit operator bool() const { return base_ != nullptr; }
  shm::Header& header() const { return *reinterpret_cast<shm::Header*>(base_); }
  const shm::Geometry& geometry() const { return header().geometry; }

  std::atomic<std::uint32_t>& sequence_state(std::uint32_t sequence) const {
    return at<std::atomic<std::uint32_t>>(header().regions.sequence_state)[sequence];
  }
  // [layers] of one sequence.
  std::atomic<std::uint32_t>* written_len(std::uint32_t sequence) const {
    return at<std::atomic<std::uint32_t>>(header().regions.written_len) +
           std::size_t{sequence} * geometry().layers;
  }
  // [max_pages_per_sequence] of one sequence.
  std::int32_t* page_table(std::uint32_t sequence) const {
    return at<std::int32_t>(header().regions.page_table) +
           std::size_t{sequence} * header().max_pages_per_sequence;
  }
  shm::LayerOptions* layer_options() const {
    return at<shm::LayerOptions>(header().regions.layer_options);
  }
  // [layers][heads]
  float* sinks() const { return at<float>(header().regions.sinks); }
  shm::SlotHeader& slot(std::uint32_t slot) const {
    return at<shm::SlotHeader>(header().regions.slot_headers)[slot];
  }
  std::byte* slab_row(std::uint32_t slot) const {
    const shm::Geometry& g = geometry();
    return base_ + header().regions.slab + slot * shm::slot_elems(g) * shm::dtype_bytes(g.dtype);
  }
  std::byte* kv() const { return base_ + header().regions.kv; }
  std::byte* at_offset(std::uint64_t offset) const { return base_ + offset; }

 private:
  template <typename T>
  T* at(std::uint64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  std::byte* base_ = nullptr;
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

// One side of a single-producer, single-consumer ring of slot entries.
class Ring {
 public:
  Ring() = default;
  Ring(std::byte* base, std::uint32_t capacity)
      : header_(reinterpret_cast<shm::RingHeader*>(base)),
        entries_(reinterpret_cast<std::uint64_t*>(base + sizeof(shm::RingHeader))),
        capacity_(capacity) {}

  // Producer: puts an entry behind the published ones; false when full.
  bool stage(std::uint64_t entry) {
    const std::uint64_t tail = header_->tail.load(std::memory_order_relaxed) + staged_;
    if (tail - header_->head.load(std::memory_order_acquire) >= capacity_) return false;
    entries_[tail & (capacity_ - 1)] = entry;
    ++staged_;
    return true;
  }
  // Producer: makes the staged entries visible; returns whether there were any.
  bool publish() {
    if (staged_ == 0) return false;
    header_->tail.store(header_->tail.load(std::memory_order_relaxed) + staged_,
                        std::memory_order_release);
    staged_ = 0;
    return true;
  }
  // Consumer: false when empty.
  bool pop(std::uint64_t& entry) {
    const std::uint64_t head = header_->head.load(std::memory_order_relaxed);
    if (head == header_->tail.load(std::memory_order_acquire)) return false;
    entry = entries_[head & (capacity_ - 1)];
    header_->head.store(head + 1, std::memory_order_release);
    return true;
  }
  // Consumer.
  bool empty() const {
    return header_->head.load(std::memory_order_relaxed) ==
           header_->tail.load(std::memory_order_acquire);
  }
  // Consumer: drops what was published.
  void discard() {
    header_->head.store(header_->tail.load(std::memory_order_acquire), std::memory_order_release);
  }
  // Producer: whether `entry` waits to be consumed. The consumer may take it meanwhile.
  bool holds(std::uint64_t entry) const {
    const std::uint64_t tail = header_->tail.load(std::memory_order_relaxed);
    for (std::uint64_t i = header_->head.load(std::memory_order_acquire); i != tail; ++i)
      if (entries_[i & (capacity_ - 1)] == entry) return true;
    return false;
  }
  bool consistent() const {
    const std::uint64_t head = header_->head.load(std::memory_order_acquire);
    const std::uint64_t tail = header_->tail.load(std::memory_order_acquire);
    return tail - head <= capacity_;
  }

 private:
  shm::RingHeader* header_ = nullptr;
  std::uint64_t* entries_ = nullptr;
  std::uint64_t capacity_ = 0;
  std::uint64_t staged_ = 0;
};

// Wakes the sleeper of `bell`, if there is one.
void ring_bell(shm::Doorbell& bell);
// Sleeps until `bell` was rung after its value was `seen`; false on timeout.
bool wait_bell(shm::Doorbell& bell, std::uint32_t seen, std::int64_t timeout_us);

}  // namespace omniserve
