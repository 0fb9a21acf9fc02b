// Carries out the messages of one segment: validates, appends, attends, answers.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "attend.h"
#include "page_pool.h"
#include "segment.h"
#include "thread_pool.h"

namespace omniserve {

struct Message {
  std::uint32_t slot;
  std::uint32_t generation;
  std::uint32_t kind;
  std::uint32_t layer;
  std::uint32_t sequence;
  std::uint32_t position;
  std::uint32_t count;
};

struct ExecutorStats {
  std::uint64_t rows = 0;  // answered ATTEND rows
  std::uint64_t kv_bytes_read = 0;
  std::uint64_t errors = 0;
};

// What the worker writes is read once, checked, and used from the copy. A slot has one message here
// at most, so that a worker which ignores its credits cannot make anything here grow.
//
// Not thread-safe. The order of writes for a row is KV, written_len, out, status,
// done_generation; the caller publishes the answer. So at any crash a message whose generations
// differ can be carried out again.
class Executor {
 public:
  Executor(const SegmentView& segment, ThreadPool& threads);

  // Brings the slot of a ring entry near, some time before resolve.
  void prefetch(std::uint64_t entry) const;
  // The message behind a ring entry; nothing if the entry is stale, done or out of range, or if
  // its slot has a message here already.
  std::optional<Message> resolve(std::uint64_t entry);
  // Messages that were asked for and never answered, in an order that can be carried out.
  std::vector<Message> unanswered();

  // Carries out `batch`, then what waited for it: all of that, unless unfinished(). Appends ring
  // entries of answers to `answers`, and calls `publish` after each group of rows that are computed
  // together: the worker can send their next stage while the rest is computed.
  void run(std::vector<Message>& batch, std::vector<std::uint64_t>& answers,
           const std::function<void()>& publish);

  // Whether the last run left messages whose turn may have come; another run goes on with them.
  bool unfinished() const { return unfinished_; }

  const ExecutorStats& stats() const { return stats_; }
  const PagePool& pages() const { return pool_; }

 private:
  enum class Turn { kNow, kLater, kNever };

  void execute(std::vector<Message>& batch);
  void attend_group(const Message* begin, const Message* end);
  void checkpoint_group(const Message* begin, const Message* end);
  bool follows_last(const Message& m) const;
  void finish_checkpoints();
  void restore_group(const Message* begin, const Message* end);
  void free_sequence(const Message& m);
  std::optional<Message> take(std::uint32_t slot);
  std::uint32_t validate(const Message& m) const;
  Turn turn(const Message& m) const;
  AttendOptions options_of(std::uint32_t layer) const;
  // Adds the tokens of a CHECKPOINT or RESTORE to tokens_, with pages; false if there are none left.
  bool add_tokens(const Message& m);
  // Writes k, v of the slot at the message's place; false if there is no page left.
  bool append(const Message& m);
  // Keeps a message until the tokens before it are there.
  void defer(const Message& m);
  void refuse_for_pages(const Message& m);
  void answer(const Message& m, std::uint32_t status);

  SegmentView segment_;
  ThreadPool& threads_;
  PagePool pool_;
  KvPages pages_;
  RowParts parts_;
  std::size_t elem_bytes_;
  std::uint64_t token_bytes_;  // K and V of one token in one layer
  ExecutorStats stats_;
  std::vector<shm::LayerOptions> layer_options_;  // private: the worker can write the segment's
  std::vector<float> sinks_;                      // [layers][heads]
  std::vector<std::uint64_t> taken_;  // per slot, a mark of its message that is here; 0 = none
  std::vector<Message> deferred_;
  bool unfinished_ = false;
  std::vector<bool> refused_;  // per sequence, until FREE: some token of it found no page
  std::vector<std::uint64_t>* answers_ = nullptr;
  const std::function<void()>* publish_ = nullptr;
  std::vector<std::uint64_t> attended_in_;  // per sequence, the group that last attended it
  std::uint64_t group_ = 0;
  // Per sequence, 1 + the layer for which it has messages in moving_; 0 = none.
  std::vector<std::uint32_t> moved_in_;
  // Kept between calls for their memory.
  std::vector<Message> waiting_;
  std::vector<Message> attending_;
  std::vector<Segment> segments_;
  std::vector<Message> moving_;  // CHECKPOINT or RESTORE messages, and
  std::vector<KvToken> tokens_;  // what each of them moves
  Attention attention_;
};

}  // namespace omniserve
