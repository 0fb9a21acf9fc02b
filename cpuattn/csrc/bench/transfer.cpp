// CHECKPOINT and RESTORE as a server carries them out, beside memcpy of the same rows.
#include <nanobind/stl/string.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "probes.h"
#include "server_loop.h"
#include "worker_link.h"

namespace omniserve {
namespace {

namespace nb = nanobind;

// What a thread copies at a time: about what a share of the server's is.
constexpr std::size_t kShareSlots = 16;

// A worker's end and a server's executor in one process. A round moves `tokens` of every layer of
// the next sequence through slots that no round used lately, so that no cache holds them.
class TransferProbe {
 public:
  TransferProbe(const std::string& folder, const shm::Geometry& geometry, unsigned threads)
      : path_(folder + "/transfer.arena"),
        bell_path_(folder + "/transfer.bell"),
        tokens_(geometry.max_sequence_tokens),
        token_bytes_(2ULL * geometry.kv_heads * geometry.head_dim *
                     shm::dtype_bytes(geometry.dtype)),
        low_batch_(ServerLoop::low_batch(geometry)),
        pool_(threads, {}, kSpinUs) {
    const std::uint32_t per_slot = shm::transfer_tokens(geometry);
    for (std::uint32_t l = 0; l < geometry.layers; ++l)
      for (std::uint32_t t = 0; t < tokens_; t += per_slot) {
        layers_.push_back(static_cast<std::int32_t>(l));
        positions_.push_back(static_cast<std::int32_t>(t));
        counts_.push_back(static_cast<std::int32_t>(std::min(per_slot, tokens_ - t)));
      }
    slots_.resize(layers_.size());
    sequences_.resize(layers_.size());
    if (geometry.slots < slots_.size())
      throw std::invalid_argument("slots: fewer than a round needs");
    create_file(bell_path_, sizeof(shm::Doorbell));
    create_file(path_, shm::regions_of(geometry).end);
    {
      ServerLoop format(path_, LoopOptions{});
      format.format("bench", 1, 1, geometry, bell_path_, {});
    }
    link_ = std::make_unique<WorkerLink>(path_);
    mapping_ = Mapping(path_);  // the server's: a link has no KV
    segment_ = SegmentView(mapping_.data(), geometry);
    const SegmentView& segment = segment_;
    executor_ = std::make_unique<Executor>(segment, pool_);
    const std::uint32_t capacity = shm::ring_capacity(geometry.slots);
    requests_ = RingConsumer(segment.at_offset(segment.regions().request_ring), capacity);
    low_ = RingConsumer(segment.at_offset(segment.regions().low_ring), capacity);
    responses_ = RingProducer(segment.at_offset(segment.regions().response_ring), capacity);
    for (std::uint32_t s = 0; s < geometry.slots; ++s)
      for (std::uint32_t i = 0; i < per_slot; ++i)
        std::memset(segment.transfer_k(s, i), static_cast<int>(s), token_bytes_);
  }

  ~TransferProbe() {
    unlink(path_.c_str());
    unlink(bell_path_.c_str());
  }

  std::uint64_t bytes() const {
    return std::uint64_t{tokens_} * link_->segment().geometry().layers * token_bytes_;
  }

  // Seconds to take in a round's tokens; the next sequence gets them.
  double checkpoint() {
    const shm::Geometry& g = link_->segment().geometry();
    sequence_ = (sequence_ + 1) % static_cast<std::int32_t>(g.max_sequences);
    next_slots();
    const std::int32_t zero = 0;
    link_->submit(shm::kFree, &zero, &sequence_, &zero, nullptr, slots_.data(), 1);
    drain(requests_);
    take_answers();
    return transfer(shm::kCheckpoint);
  }

  // Seconds to put the last checkpoint's tokens into slots.
  double restore() {
    next_slots();
    return transfer(shm::kRestore);
  }

  // Seconds to copy as many rows from slots (`in`) to the arena, or back.
  double copy(bool in) {
    next_slots();
    const SegmentView& segment = segment_;
    const shm::Geometry& g = segment.geometry();
    sequence_ = (sequence_ + 1) % static_cast<std::int32_t>(g.max_sequences);
    std::byte* arena = segment.kv() + static_cast<std::size_t>(sequence_) * bytes();
    const std::size_t slot_bytes = shm::transfer_tokens(g) * token_bytes_;
    std::atomic<std::size_t> next{0};
    const Stopwatch watch;
    pool_.run([&] {
      for (std::size_t at; (at = next.fetch_add(kShareSlots)) < slots_.size();)
        for (std::size_t i = at; i < std::min(at + kShareSlots, slots_.size()); ++i) {
          std::byte* row = segment.slab_row(static_cast<std::uint32_t>(slots_[i]));
          std::byte* there = arena + i * slot_bytes;
          const std::size_t size = static_cast<std::size_t>(counts_[i]) * token_bytes_;
          std::memcpy(in ? there : row, in ? row : there, size);
        }
    });
    return watch.seconds();
  }

 private:
  void next_slots() {
    if (first_slot_ + slots_.size() > link_->segment().geometry().slots) first_slot_ = 0;
    std::iota(slots_.begin(), slots_.end(), static_cast<std::int32_t>(first_slot_));
    first_slot_ += slots_.size();
  }

  double transfer(std::uint32_t kind) {
    std::fill(sequences_.begin(), sequences_.end(), sequence_);
    link_->submit(kind, layers_.data(), sequences_.data(), positions_.data(), counts_.data(),
                  slots_.data(), slots_.size());
    const Stopwatch watch;
    drain(low_);
    const double seconds = watch.seconds();
    take_answers();
    return seconds;
  }

  void take_answers() {
    std::vector<std::int32_t> answered;
    std::vector<std::uint8_t> statuses;
    link_->poll(answered, statuses);
    for (const std::uint8_t status : statuses)
      if (status != shm::kOk) throw std::runtime_error("a transfer was refused");
  }

  // What the server's loop does with a ring, until it is empty.
  void drain(RingConsumer& ring) {
    const std::function<void()> publish = [this] {
      for (const std::uint64_t entry : answers_) responses_.stage(entry);
      answers_.clear();
      responses_.publish();
    };
    for (;;) {
      batch_.clear();
      entries_.clear();
      for (std::uint64_t entry = 0; entries_.size() < low_batch_ && ring.pop(entry);) {
        executor_->prefetch(entry);
        entries_.push_back(entry);
      }
      if (entries_.empty()) return;
      ring.release();
      for (const std::uint64_t entry : entries_)
        if (auto message = executor_->resolve(entry)) batch_.push_back(*message);
      executor_->run(batch_, answers_, publish);
      publish();
    }
  }

  std::string path_, bell_path_;
  std::uint32_t tokens_;
  std::size_t token_bytes_, low_batch_;
  ThreadPool pool_;
  std::unique_ptr<WorkerLink> link_;
  Mapping mapping_;
  SegmentView segment_;
  std::unique_ptr<Executor> executor_;
  RingConsumer requests_, low_;
  RingProducer responses_;
  std::vector<std::int32_t> layers_, positions_, counts_, sequences_, slots_;
  std::vector<std::uint64_t> entries_, answers_;
  std::vector<Message> batch_;
  std::int32_t sequence_ = 0;
  std::size_t first_slot_ = 0;
};

}  // namespace

void bind_transfer(nb::module_& m) {
  using namespace nb::literals;
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<TransferProbe>(m, "TransferProbe")
      .def(nb::init<const std::string&, const shm::Geometry&, unsigned>(), "folder"_a,
           "geometry"_a, "threads"_a)
      .def_prop_ro("bytes", &TransferProbe::bytes)
      .def("checkpoint", &TransferProbe::checkpoint, Release())
      .def("restore", &TransferProbe::restore, Release())
      .def("copy", &TransferProbe::copy, "to_arena"_a, Release());
}

}  // namespace omniserve
