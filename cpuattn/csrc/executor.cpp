#include "executor.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "ring.h"

namespace omniserve {
namespace {

// More than an honest worker's messages need, of which few wait at a time. Each round looks at all
// that wait, and messages that each wait for another need a round each.
constexpr int kRoundsOfRun = 16;

std::uint64_t mark(const Message& m) { return std::uint64_t{1} << 32 | m.generation; }

}  // namespace

Executor::Executor(const SegmentView& segment, ThreadPool& threads)
    : segment_(segment),
      threads_(threads),
      pool_(segment),
      pages_(segment.kv(), segment.geometry()),
      parts_(segment.geometry()),
      elem_bytes_(shm::dtype_bytes(segment.geometry().dtype)),
      token_bytes_(shm::block_bytes(segment.geometry()) * segment.geometry().kv_heads /
                   segment.geometry().page_tokens),
      layer_options_(segment.layer_options(),
                     segment.layer_options() + segment.geometry().layers),
      sinks_(segment.sinks(),
             segment.sinks() + std::size_t{segment.geometry().layers} * segment.geometry().heads),
      taken_(segment.geometry().slots, 0),
      refused_(segment.geometry().max_sequences, false),
      attended_in_(segment.geometry().max_sequences, 0),
      moved_in_(segment.geometry().max_sequences, 0) {}

void Executor::prefetch(std::uint64_t entry) const {
  const std::uint32_t slot = shm::entry_slot(entry);
  if (slot < segment_.geometry().slots) __builtin_prefetch(&segment_.slot(slot), 1);
}

std::optional<Message> Executor::resolve(std::uint64_t entry) {
  const std::uint32_t slot = shm::entry_slot(entry);
  if (slot >= segment_.geometry().slots) {
    ++stats_.errors;
    return std::nullopt;
  }
  const auto message = take(slot);
  if (!message || message->generation != shm::entry_generation(entry)) return std::nullopt;
  if (taken_[slot] != 0) {
    // After a restart a message can be found in its slot and then in a ring: that is no error.
    if (taken_[slot] != mark(*message)) ++stats_.errors;
    return std::nullopt;
  }
  taken_[slot] = mark(*message);
  return message;
}

// Nothing if the slot's last message was answered.
std::optional<Message> Executor::take(std::uint32_t slot) {
  const shm::SlotHeader& h = segment_.slot(slot);
  const std::uint32_t generation = h.request_generation.load(std::memory_order_acquire);
  if (generation == h.done_generation.load(std::memory_order_relaxed)) return std::nullopt;
  // Read once: a hostile worker may write them meanwhile, and what was checked must be what is used.
  const auto once = [](const std::uint32_t& field) {
    return __atomic_load_n(&field, __ATOMIC_RELAXED);
  };
  return Message{slot, generation, once(h.kind), once(h.layer), once(h.sequence), once(h.position),
                 once(h.count)};
}

std::vector<Message> Executor::unanswered() {
  std::vector<Message> found;
  for (std::uint32_t slot = 0; slot < segment_.geometry().slots; ++slot) {
    const auto message = take(slot);
    if (!message || taken_[slot] != 0) continue;
    taken_[slot] = mark(*message);
    found.push_back(*message);
  }
  std::sort(found.begin(), found.end(), [](const Message& a, const Message& b) {
    return std::tie(a.sequence, a.position) < std::tie(b.sequence, b.position);
  });
  return found;
}

void Executor::run(std::vector<Message>& batch, std::vector<std::uint64_t>& answers,
                   const std::function<void()>& publish) {
  answers_ = &answers;
  publish_ = &publish;
  execute(batch);
  // Each round appends at least one token somewhere, or nothing that waits can go on.
  std::vector<Message>& waiting = waiting_;
  unfinished_ = false;
  for (int round = 0; !deferred_.empty(); ++round) {
    if (round == kRoundsOfRun) {
      unfinished_ = true;
      break;
    }
    const std::size_t before = deferred_.size();
    waiting.clear();
    std::swap(waiting, deferred_);
    execute(waiting);
    if (deferred_.size() == before) break;
  }
}

void Executor::execute(std::vector<Message>& batch) {
  const auto before = [](const Message& a, const Message& b) {
    return std::tie(a.kind, a.layer) < std::tie(b.kind, b.layer);
  };
  // A stage's rows come sorted, and sorting takes memory.
  if (!std::is_sorted(batch.begin(), batch.end(), before))
    std::stable_sort(batch.begin(), batch.end(), before);
  for (auto begin = batch.begin(); begin != batch.end();) {
    const bool attend = begin->kind == shm::kAttend;
    const auto end = std::find_if(begin, batch.end(), [&](const Message& m) {
      return m.kind != begin->kind || (attend && m.layer != begin->layer);
    });
    const Message* first = &*begin;
    const Message* last = first + (end - begin);
    switch (begin->kind) {
      case shm::kAttend: attend_group(first, last); break;
      case shm::kCheckpoint: checkpoint_group(first, last); break;
      case shm::kRestore: restore_group(first, last); break;
      default:
        for (const Message* m = first; m != last; ++m) free_sequence(*m);
    }
    (*publish_)();
    begin = end;
  }
}

std::uint32_t Executor::validate(const Message& m) const {
  const shm::Geometry& g = segment_.geometry();
  if (m.kind < shm::kAttend || m.kind > shm::kFree) return shm::kBadKind;
  if (m.sequence >= g.max_sequences) return shm::kBadSequence;
  if (m.kind == shm::kFree) return shm::kOk;
  if (m.layer >= g.layers) return shm::kBadLayer;
  if (m.position >= g.max_sequence_tokens) return shm::kBadPosition;
  if (m.kind == shm::kAttend) return shm::kOk;
  if (m.count == 0 || m.count > shm::transfer_tokens(g)) return shm::kBadCount;
  if (m.count > g.max_sequence_tokens - m.position) return shm::kBadPosition;
  return shm::kOk;
}

Executor::Turn Executor::turn(const Message& m) const {
  const std::uint32_t written = pool_.length(m.sequence, m.layer);
  if (written < m.position) return Turn::kLater;
  const std::uint32_t count = m.kind == shm::kAttend ? 1 : m.count;
  return written <= m.position + count ? Turn::kNow : Turn::kNever;
}

bool Executor::append(const Message& m) {
  const std::int32_t page = pool_.page_for(m.sequence, m.position);
  if (page < 0) return false;
  std::byte* row = segment_.slab_row(m.slot);
  pages_.write({m.layer, static_cast<std::uint32_t>(page),
                m.position % segment_.geometry().page_tokens, row + parts_.k * elem_bytes_,
                row + parts_.v * elem_bytes_});
  pool_.set_length(m.sequence, m.layer, m.position + 1);
  return true;
}

bool Executor::add_tokens(const Message& m) {
  const std::uint32_t page_tokens = segment_.geometry().page_tokens;
  const std::size_t before = tokens_.size();
  std::uint32_t offset = m.position % page_tokens;
  std::int32_t page = pool_.page_for(m.sequence, m.position);
  for (std::uint32_t i = 0; i < m.count; ++i, ++offset) {
    if (offset == page_tokens) {
      offset = 0;
      page = pool_.page_for(m.sequence, m.position + i);
    }
    if (page < 0) {
      tokens_.resize(before);
      return false;
    }
    tokens_.push_back({m.layer, static_cast<std::uint32_t>(page), offset,
                       segment_.transfer_k(m.slot, i), segment_.transfer_v(m.slot, i)});
  }
  return true;
}

AttendOptions Executor::options_of(std::uint32_t layer) const {
  const shm::LayerOptions& options = layer_options_[layer];
  const float* sinks = sinks_.data() + std::size_t{layer} * segment_.geometry().heads;
  return {options.window, options.softcap, sinks};
}

void Executor::attend_group(const Message* begin, const Message* end) {
  attending_.clear();
  segments_.clear();
  ++group_;
  for (const Message* m = begin; m != end; ++m) {
    if (const std::uint32_t status = validate(*m); status != shm::kOk) {
      answer(*m, status);
      continue;
    }
    const Turn when = turn(*m);
    // A second row of a sequence waits until the first is answered: were both appended and the
    // server killed, the first could not be replayed.
    if (when == Turn::kLater) {
      defer(*m);
      continue;
    }
    if (when == Turn::kNow && attended_in_[m->sequence] == group_) {
      deferred_.push_back(*m);
      continue;
    }
    if (when == Turn::kNever) {
      answer(*m, shm::kBadPosition);
      continue;
    }
    if (!append(*m)) {
      refuse_for_pages(*m);
      continue;
    }
    attended_in_[m->sequence] = group_;
    std::byte* row = segment_.slab_row(m->slot);
    attending_.push_back(*m);
    segments_.push_back({pool_.table(m->sequence), row + parts_.q * elem_bytes_,
                         row + parts_.out * elem_bytes_, 0, 0, 1, m->position});
    stats_.kv_bytes_read += (m->position + 1) * token_bytes_;
  }
  if (attending_.empty()) return;
  const shm::Geometry& g = segment_.geometry();
  attention_.run(pages_, begin->layer, g.heads, segments_, options_of(begin->layer), threads_);
  stats_.rows += attending_.size();
  for (const Message& m : attending_) answer(m, shm::kOk);
}

// Tokens of a prompt are outstanding together. Their KV is written together, then each message is
// given its length and answered before the next: after a crash at most one of them has been
// appended without an answer.
void Executor::checkpoint_group(const Message* begin, const Message* end) {
  for (const Message* m = begin; m != end; ++m) {
    if (const std::uint32_t status = validate(*m); status != shm::kOk) {
      answer(*m, status);
      continue;
    }
    if (!follows_last(*m)) {
      // Messages come sorted by layer: what moves already may be of this sequence and layer.
      if (moved_in_[m->sequence] == m->layer + 1) finish_checkpoints();
      const Turn when = turn(*m);
      if (when != Turn::kNow) {
        if (when == Turn::kLater) defer(*m);
        else answer(*m, shm::kBadPosition);
        continue;
      }
    }
    if (!add_tokens(*m)) {
      refuse_for_pages(*m);
      continue;
    }
    moved_in_[m->sequence] = m->layer + 1;
    moving_.push_back(*m);
  }
  finish_checkpoints();
}

bool Executor::follows_last(const Message& m) const {
  if (moving_.empty()) return false;
  const Message& last = moving_.back();
  return last.sequence == m.sequence && last.layer == m.layer &&
         last.position + last.count == m.position;
}

void Executor::finish_checkpoints() {
  pages_.write(tokens_, threads_);
  for (const Message& m : moving_) {
    moved_in_[m.sequence] = 0;
    pool_.set_length(m.sequence, m.layer, m.position + m.count);
    answer(m, shm::kOk);
  }
  moving_.clear();
  tokens_.clear();
}

void Executor::restore_group(const Message* begin, const Message* end) {
  for (const Message* m = begin; m != end; ++m) {
    if (const std::uint32_t status = validate(*m); status != shm::kOk) {
      answer(*m, status);
    } else if (pool_.length(m->sequence, m->layer) < m->position + m->count) {
      defer(*m);
    } else {
      add_tokens(*m);  // a length is covered by pages
      moving_.push_back(*m);
    }
  }
  pages_.read(tokens_, threads_);
  for (const Message& m : moving_) answer(m, shm::kOk);
  moving_.clear();
  tokens_.clear();
}

void Executor::free_sequence(const Message& m) {
  if (const std::uint32_t status = validate(m); status != shm::kOk) return answer(m, status);
  pool_.free_sequence(m.sequence);
  refused_[m.sequence] = false;
  // What waited for this sequence to grow would wait for ever.
  const auto mine = std::stable_partition(deferred_.begin(), deferred_.end(),
                                          [&](const Message& d) { return d.sequence != m.sequence; });
  for (auto d = mine; d != deferred_.end(); ++d) answer(*d, shm::kFreed);
  deferred_.erase(mine, deferred_.end());
  answer(m, shm::kOk);
}

void Executor::defer(const Message& m) {
  if (refused_[m.sequence]) answer(m, shm::kNoPage);
  else deferred_.push_back(m);
}

// What comes behind this token would wait for ever, and the worker sends FREE only when it has all
// answers. Messages that wait already get theirs in the next round.
void Executor::refuse_for_pages(const Message& m) {
  refused_[m.sequence] = true;
  answer(m, shm::kNoPage);
}

void Executor::answer(const Message& m, std::uint32_t status) {
  shm::SlotHeader& h = segment_.slot(m.slot);
  taken_[m.slot] = 0;
  if (status != shm::kOk) ++stats_.errors;
  h.status = status;
  h.done_generation.store(m.generation, std::memory_order_release);
  answers_->push_back(answer_entry(m.slot, m.generation, status));
}

}  // namespace omniserve
