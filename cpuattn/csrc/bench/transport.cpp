// Two pinned processes on one segment: a worker's end that times round trips, and an echo in the
// place of a server. benchmarks/transport.py says what is compared with what.
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "../bindings.h"
#include "../ring.h"
#include "../segment.h"
#include "../server_loop.h"
#include "../worker_link.h"

namespace omniserve {
namespace {

enum Mode : std::uint32_t { kSpin, kSleep, kFutex, kRingRows, kMemcpyRows, kEnd };

// What the two processes tell each other besides the segment.
struct Control {
  shm::Doorbell command;
  std::atomic<std::uint32_t> mode;
  std::atomic<std::uint32_t> rows;
  std::atomic<std::uint64_t> rounds;
  alignas(shm::kLine) std::atomic<std::uint32_t> ready;
  alignas(shm::kLine) std::atomic<std::uint32_t> ping;
  alignas(shm::kLine) std::atomic<std::uint32_t> pong;
};

constexpr std::int64_t kPatienceUs = 10'000'000;
// Before a round trip of sleepers: long enough for the other process to be asleep.
constexpr std::int64_t kSettleNs = 100'000;

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void futex_wake(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT, value, nullptr, nullptr,
          0);
}
void spin_until(const std::atomic<std::uint32_t>& word, std::uint32_t value) {
  while (word.load(std::memory_order_acquire) != value) relax_core();
}

// Reads memory in place, as attention reads q, k, v: as wide as the machine can.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
std::uint64_t read_all(const std::byte* at, std::size_t bytes) {
  const auto* words = reinterpret_cast<const std::uint64_t*>(at);
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < bytes / 8; ++i) sum += words[i];
  return sum;
}

// Bytes of a row that go each way, and private memory of a process to copy from. What comes is read
// in place: so each byte is copied once and read once, by rings and by memcpy alike.
struct Rows {
  explicit Rows(const shm::Geometry& g)
      : row_bytes(shm::slot_elems(g) * shm::dtype_bytes(g.dtype)),
        there_bytes(RowParts(g).out * shm::dtype_bytes(g.dtype)),
        back_bytes(row_bytes - there_bytes),
        there(g.slots * there_bytes, std::byte{1}),
        back(g.slots * back_bytes, std::byte{2}) {}
  std::size_t row_bytes, there_bytes, back_bytes;
  std::vector<std::byte> there;  // q, k, v of every row
  std::vector<std::byte> back;   // out of every row
};

// The other process: answers as the server's executor does, without attention.
class Echo {
 public:
  Echo(const SegmentView& segment, shm::Doorbell& bell, Control& control)
      : segment_(segment),
        bell_(bell),
        control_(control),
        rows_(segment.geometry()),
        requests_(segment.at_offset(segment.regions().request_ring), capacity()),
        responses_(segment.at_offset(segment.regions().response_ring), capacity()) {
    entries_.reserve(capacity());
  }

  [[noreturn]] void run() {
    for (std::uint32_t seen = 0;; ++seen) {
      while (!wait_bell(control_.command, seen, kPatienceUs)) {
      }
      const std::uint32_t mode = control_.mode.load();
      if (mode == kEnd) _exit(0);
      control_.ready.store(1);
      const std::uint64_t rounds = control_.rounds.load();
      if (mode == kFutex) echo_futex(rounds);
      else if (mode == kMemcpyRows) echo_memcpy(rounds, control_.rows.load());
      else echo_ring(rounds * control_.rows.load(), mode == kSleep, mode == kRingRows);
    }
  }

 private:
  std::uint32_t capacity() const { return shm::ring_capacity(segment_.geometry().slots); }

  void echo_ring(std::uint64_t messages, bool sleeps, bool copies) {
    shm::Doorbell& doorbell = segment_.header().doorbell;
    for (std::uint64_t done = 0; done < messages;) {
      const std::uint32_t seen = sleeps ? doorbell.value.load(std::memory_order_acquire) : 0;
      entries_.clear();
      for (std::uint64_t entry = 0; requests_.pop(entry);) {
        __builtin_prefetch(&segment_.slot(shm::entry_slot(entry)), 1);
        entries_.push_back(entry);
      }
      if (entries_.empty()) {
        if (sleeps) wait_bell(doorbell, seen, kPatienceUs);
        else relax_core();
        continue;
      }
      requests_.release();
      resolve();
      if (copies)
        for (const auto& [slot, generation, row] : messages_) copy(slot, row);
      for (const auto& [slot, generation, row] : messages_) answer(slot, generation);
      done += entries_.size();
      responses_.publish();
      ring_bell(bell_);
    }
  }

  // As the executor: every header is read before the work begins, for the work evicts them.
  void resolve() {
    messages_.clear();
    for (const std::uint64_t entry : entries_) {
      const shm::SlotHeader& h = segment_.slot(shm::entry_slot(entry));
      const std::uint32_t generation = h.request_generation.load(std::memory_order_acquire);
      if (generation != shm::entry_generation(entry)) _exit(1);
      messages_.push_back({shm::entry_slot(entry), generation, h.position});
    }
  }
  // Reads q, k, v in place and writes out in place.
  void copy(std::uint32_t slot, std::size_t row) {
    std::byte* at = segment_.slab_row(slot);
    read_ = read_ + read_all(at, rows_.there_bytes);
    std::memcpy(at + rows_.there_bytes, rows_.back.data() + row * rows_.back_bytes,
                rows_.back_bytes);
  }
  void answer(std::uint32_t slot, std::uint32_t generation) {
    shm::SlotHeader& h = segment_.slot(slot);
    h.status = shm::kOk;
    h.done_generation.store(generation, std::memory_order_release);
    responses_.stage(answer_entry(slot, generation, shm::kOk));
  }

  void echo_memcpy(std::uint64_t rounds, std::size_t rows) {
    std::byte* slab = segment_.slab_row(0);
    for (std::uint32_t round = 1; round <= rounds; ++round) {
      spin_until(control_.ping, round);
      read_ = read_ + read_all(slab, rows * rows_.there_bytes);
      std::memcpy(slab + rows * rows_.there_bytes, rows_.back.data(), rows * rows_.back_bytes);
      control_.pong.store(round, std::memory_order_release);
    }
  }

  void echo_futex(std::uint64_t rounds) {
    for (std::uint32_t round = 1; round <= rounds; ++round) {
      while (control_.ping.load(std::memory_order_acquire) != round)
        futex_wait(control_.ping, round - 1);
      control_.pong.store(round, std::memory_order_release);
      futex_wake(control_.pong);
    }
  }

  SegmentView segment_;
  shm::Doorbell& bell_;
  Control& control_;
  Rows rows_;
  RingConsumer requests_;
  RingProducer responses_;
  struct Message {
    std::uint32_t slot, generation, row;
  };
  std::vector<std::uint64_t> entries_;
  std::vector<Message> messages_;
  volatile std::uint64_t read_ = 0;  // so that reading is not optimised away
};

// This process's end. Each call returns the time of every round trip, in ns.
class TransportPair {
 public:
  TransportPair(const std::string& folder, const shm::Geometry& geometry, int server_cpu)
      : path_(folder + "/transport.arena"), bell_path_(folder + "/transport.bell") {
    create_file(bell_path_, sizeof(shm::Doorbell));
    create_file(path_, shm::regions_of(geometry).end);
    {
      ServerLoop format(path_, LoopOptions{});
      format.format("bench", 1, 1, geometry, bell_path_, {});
    }
    bell_ = Mapping(bell_path_);
    link_ = std::make_unique<WorkerLink>(path_);
    rows_ = std::make_unique<Rows>(geometry);
    slots_.resize(geometry.slots);
    std::iota(slots_.begin(), slots_.end(), 0);
    zeros_.resize(geometry.slots, 0);
    void* control = mmap(nullptr, sizeof(Control), PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (control == MAP_FAILED) throw std::bad_alloc();
    control_ = new (control) Control{};
    child_ = fork();
    if (child_ < 0) throw std::runtime_error("cannot fork");
    if (child_ > 0) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pin_this_thread(server_cpu);
    Echo(link_->segment(), bell(), *control_).run();
  }

  ~TransportPair() {
    control_->mode.store(kEnd);
    ring_bell(control_->command);
    waitpid(child_, nullptr, 0);
    munmap(control_, sizeof(Control));
    unlink(path_.c_str());
    unlink(bell_path_.c_str());
  }

  std::vector<std::int64_t> empty_messages(std::uint64_t rounds, bool sleeps) {
    start(sleeps ? kSleep : kSpin, rounds, 1);
    return timed(rounds, [&](std::uint32_t) { exchange(1, sleeps); }, sleeps);
  }

  std::vector<std::int64_t> bare_futex(std::uint64_t rounds) {
    start(kFutex, rounds, 1);
    return timed(rounds, [&](std::uint32_t round) {
      control_->ping.store(round, std::memory_order_release);
      futex_wake(control_->ping);
      while (control_->pong.load(std::memory_order_acquire) != round)
        futex_wait(control_->pong, round - 1);
    }, true);
  }

  std::vector<std::int64_t> ring_rows(std::uint64_t rounds, std::uint32_t rows) {
    start(kRingRows, rounds, rows);
    return timed(rounds, [&](std::uint32_t) {
      const SegmentView& segment = link_->segment();
      for (std::uint32_t r = 0; r < rows; ++r)
        std::memcpy(segment.slab_row(r), rows_->there.data() + r * rows_->there_bytes,
                    rows_->there_bytes);
      exchange(rows, false);
      for (std::uint32_t r = 0; r < rows; ++r)
        read_ = read_ + read_all(segment.slab_row(r) + rows_->there_bytes, rows_->back_bytes);
    });
  }

  // The same bytes in the same memory, in one piece each way, and a flag instead of rings.
  std::vector<std::int64_t> memcpy_rows(std::uint64_t rounds, std::uint32_t rows) {
    start(kMemcpyRows, rounds, rows);
    std::byte* slab = link_->segment().slab_row(0);
    return timed(rounds, [&](std::uint32_t round) {
      std::memcpy(slab, rows_->there.data(), rows * rows_->there_bytes);
      control_->ping.store(round, std::memory_order_release);
      spin_until(control_->pong, round);
      read_ = read_ + read_all(slab + rows * rows_->there_bytes, rows * rows_->back_bytes);
    });
  }

 private:
  shm::Doorbell& bell() const { return *reinterpret_cast<shm::Doorbell*>(bell_.data()); }

  // Returns when the other process is in its loop.
  void start(Mode mode, std::uint64_t rounds, std::uint32_t rows) {
    if (rows < 1 || rows > slots_.size()) throw std::invalid_argument("rows: 1 to slots");
    control_->ping.store(0);
    control_->pong.store(0);
    control_->ready.store(0);
    control_->mode.store(mode);
    control_->rounds.store(rounds);
    control_->rows.store(rows);
    ring_bell(control_->command);
    spin_until(control_->ready, 1);
  }

  template <typename Round>
  std::vector<std::int64_t> timed(std::uint64_t rounds, Round round, bool settles = false) {
    std::vector<std::int64_t> times(rounds);
    for (std::uint32_t i = 0; i < rounds; ++i) {
      if (settles)
        for (const std::int64_t until = now_ns() + kSettleNs; now_ns() < until;) relax_core();
      const std::int64_t begin = now_ns();
      round(i + 1);
      times[i] = now_ns() - begin;
    }
    return times;
  }

  // Sends messages of the first `rows` slots and takes all answers.
  void exchange(std::uint32_t rows, bool sleeps) {
    link_->submit(shm::kAttend, zeros_.data(), zeros_.data(), slots_.data(), nullptr,
                  slots_.data(), rows);
    answered_.clear();
    statuses_.clear();
    for (;;) {
      const std::uint32_t seen = sleeps ? bell().value.load(std::memory_order_acquire) : 0;
      link_->poll(answered_, statuses_);
      if (answered_.size() == rows) return;
      if (sleeps) wait_bell(bell(), seen, kPatienceUs);
      else relax_core();
    }
  }

  std::string path_, bell_path_;
  Mapping bell_;
  std::unique_ptr<WorkerLink> link_;
  std::unique_ptr<Rows> rows_;
  Control* control_ = nullptr;
  pid_t child_ = -1;
  std::vector<std::int32_t> slots_, zeros_, answered_;
  std::vector<std::uint8_t> statuses_;
  volatile std::uint64_t read_ = 0;
};

}  // namespace

void bind_transport(nb::module_& m) {
  using namespace nb::literals;
  nb::module_::import_("omniserve.attnkernel._core");  // has Geometry
  nb::class_<TransportPair>(m, "TransportPair")
      .def(nb::init<const std::string&, const shm::Geometry&, int>(), "folder"_a, "geometry"_a,
           "server_cpu"_a)
      .def("empty_messages", [](TransportPair& p, std::uint64_t rounds, bool sleeps) {
        return to_numpy(p.empty_messages(rounds, sleeps)); }, "rounds"_a, "sleeps"_a)
      .def("bare_futex", [](TransportPair& p, std::uint64_t rounds) {
        return to_numpy(p.bare_futex(rounds)); }, "rounds"_a)
      .def("ring_rows", [](TransportPair& p, std::uint64_t rounds, std::uint32_t rows) {
        return to_numpy(p.ring_rows(rounds, rows)); }, "rounds"_a, "rows"_a)
      .def("memcpy_rows", [](TransportPair& p, std::uint64_t rounds, std::uint32_t rows) {
        return to_numpy(p.memcpy_rows(rounds, rows)); }, "rounds"_a, "rows"_a);
}

}  // namespace omniserve
