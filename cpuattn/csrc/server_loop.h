// The hot loop of an attention server: one thread (and its helpers) on one segment.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "executor.h"
#include "ring.h"

namespace omniserve {

struct LoopOptions {
  unsigned threads = 1;
  std::int64_t spin_us = 0;       // before each sleep; 0 on shared cores
  bool background = false;        // the loop and its helpers run where nothing else wants to
  std::vector<int> cpus;          // pins thread i to cpus[i]; empty: not pinned
  std::int64_t fault_delay_us = 0;  // test switch: holds each answer up to this long
  std::uint64_t fault_seed = 0;
};

// One layer's options at Attach; sinks: one per head, or none.
struct LayerRules {
  shm::LayerOptions options;
  std::vector<float> sinks;
};

// Whose segment it is. The header says the same, but the worker can write there.
struct Owner {
  std::string worker_id;
  std::uint64_t epoch = 0;
  std::uint64_t segment_id = 0;
};

class ServerLoop {
 public:
  // Maps the arena at `path`, adopts the segment in it if it is whole, and starts.
  ServerLoop(const std::string& path, const LoopOptions& options);
  ~ServerLoop();

  // Why the file's segment was not adopted; "" if it was.
  const std::string& not_adopted() const { return not_adopted_; }
  // Why the file could not be kept from being swapped out; "" if it was.
  const std::string& not_locked() const { return not_locked_; }
  // Why the loop competes for cores although it should not; "" if it does as it was told.
  const std::string& not_in_background() const { return not_in_background_; }
  bool attached() const { return attached_.load(std::memory_order_acquire); }
  // Only valid while attached, and between calls of format.
  const Owner& owner() const { return owner_; }
  const shm::Geometry& geometry() const { return segment_.geometry(); }

  // Formats the segment for a new epoch; what it held is lost.
  void format(const std::string& worker_id, std::uint64_t epoch, std::uint64_t segment_id,
              const shm::Geometry& geometry, const std::string& bell_path,
              const std::vector<LayerRules>& layers);
  // The same epoch comes back, perhaps with a new bell.
  void rebell(const std::string& bell_path);

  // True when the rings are empty and no answer is held, within the time.
  bool drain(std::int64_t timeout_ms);
  void stop();

  // Messages of the low ring that are taken at once, with up to transfer_tokens() tokens each:
  // enough to keep all threads busy, and few, since ATTEND waits for them.
  static std::size_t low_batch(const shm::Geometry& geometry);

  // Grows at least ten times a second while the loop is alive and gets a core.
  std::uint64_t progress() const { return progress_.load(std::memory_order_relaxed); }
  ExecutorStats stats();
  std::uint32_t pages_free();

 private:
  struct Held {
    std::int64_t due_us;
    std::uint64_t entry;
    bool operator>(const Held& other) const { return due_us > other.due_us; }
  };

  // Holds mutex_ for a thread other than the loop, soon even when the loop is busy.
  class Visit {
   public:
    explicit Visit(ServerLoop& loop) : loop_(loop) {
      loop_.visitors_.fetch_add(1);
      lock_ = std::unique_lock(loop_.mutex_);
    }
    ~Visit() { loop_.visitors_.fetch_sub(1); }

   private:
    ServerLoop& loop_;
    std::unique_lock<std::mutex> lock_;
  };

  shm::Header& header() const { return *reinterpret_cast<shm::Header*>(mapping_.data()); }
  void run();
  bool spin();
  bool step();
  bool take(RingConsumer& ring, std::size_t limit, std::vector<Message>& batch);
  bool drained();
  void execute();
  void respond();
  void release_held();
  void open(const shm::Geometry& geometry);
  void recover();
  void check_idle();
  std::int64_t sleep_us();

  LoopOptions options_;
  Mapping mapping_;
  SegmentView segment_;
  Owner owner_;
  std::string not_adopted_;
  std::string not_locked_;
  std::string not_in_background_;
  std::unique_ptr<ThreadPool> threads_;
  Mapping bell_;

  // All below is guarded by mutex_, which the loop holds for one step at a time.
  std::mutex mutex_;
  std::unique_ptr<Executor> executor_;
  RingConsumer requests_;
  RingConsumer low_;
  RingProducer responses_;
  std::size_t low_batch_ = 0;
  std::vector<std::uint64_t> entries_;
  std::vector<Message> batch_;
  std::vector<Message> low_messages_;
  std::vector<std::uint64_t> answers_;
  const std::function<void()> respond_;
  std::priority_queue<Held, std::vector<Held>, std::greater<Held>> held_;
  std::mt19937_64 delays_;
  std::uint64_t integrity_errors_ = 0;
  bool checked_ = true;   // since the last message
  bool damaged_ = false;  // a failed check was reported

  std::atomic<bool> attached_{false};
  std::atomic<int> visitors_{0};  // ask the loop to let go of mutex_
  std::atomic<bool> stopping_{false};
  std::atomic<std::uint64_t> progress_{0};
  std::thread thread_;

};

}  // namespace omniserve
