#include "page_pool.h"

#include <algorithm>
#include <stdexcept>

namespace omniserve {

PagePool::PagePool(const SegmentView& segment) : segment_(segment) {
  const shm::Geometry& g = segment_.geometry();
  const std::int32_t* table = segment_.page_table(0);
  tables_.assign(table, table + std::size_t{g.max_sequences} * segment_.max_pages_per_sequence());
  const std::atomic<std::uint32_t>* written = segment_.written_len(0);
  lengths_.resize(std::size_t{g.max_sequences} * g.layers);
  for (std::size_t i = 0; i < lengths_.size(); ++i)
    lengths_[i] = written[i].load(std::memory_order_acquire);
  std::vector<bool> used(g.pages);
  std::string wrong = mark_used(used);
  if (wrong.empty()) wrong = check_lengths();
  if (!wrong.empty()) throw std::runtime_error(wrong);
  free_.resize(g.pages);
  for (std::uint32_t page = 0; page < g.pages; ++page) free_[page] = !used[page];
  free_count_ = static_cast<std::uint32_t>(std::count(free_.begin(), free_.end(), true));
}

// The page behind the sequence's last one; where that is taken, and for a first page, the middle of
// the longest free run: so both this sequence and the one before the run can grow on.
std::uint32_t PagePool::choose_page(std::uint32_t sequence, std::uint32_t index) const {
  const auto pages = static_cast<std::uint32_t>(free_.size());
  if (index > 0) {
    const std::int32_t before = table(sequence)[index - 1];
    if (before >= 0 && static_cast<std::uint32_t>(before) + 1 < pages && free_[before + 1])
      return static_cast<std::uint32_t>(before) + 1;
  }
  std::uint32_t best = 0, best_length = 0;
  for (std::uint32_t page = 0; page < pages;) {
    std::uint32_t end = page;
    while (end < pages && free_[end]) ++end;
    if (end - page > best_length) {
      best = page;
      best_length = end - page;
    }
    page = end + 1;
  }
  // Nobody grows into the first page of all from before it.
  return best == 0 ? 0 : best + best_length / 2;
}

std::int32_t PagePool::page_for(std::uint32_t sequence, std::uint32_t position) {
  const std::uint32_t index = position / segment_.geometry().page_tokens;
  std::int32_t& entry =
      tables_[std::size_t{sequence} * segment_.max_pages_per_sequence() + index];
  if (entry >= 0 || free_count_ == 0) return entry;
  segment_.sequence_state(sequence).store(shm::kActive, std::memory_order_release);
  entry = static_cast<std::int32_t>(choose_page(sequence, index));
  free_[entry] = false;
  --free_count_;
  segment_.page_table(sequence)[index] = entry;
  return entry;
}

void PagePool::free_sequence(std::uint32_t sequence) {
  for (std::uint32_t l = 0; l < segment_.geometry().layers; ++l) set_length(sequence, l, 0);
  const std::size_t first = std::size_t{sequence} * segment_.max_pages_per_sequence();
  for (std::uint32_t i = 0; i < segment_.max_pages_per_sequence(); ++i) {
    std::int32_t& entry = tables_[first + i];
    if (entry >= 0) {
      free_[entry] = true;
      ++free_count_;
    }
    entry = -1;
    segment_.page_table(sequence)[i] = -1;
  }
  segment_.sequence_state(sequence).store(shm::kEmpty, std::memory_order_release);
}

std::string PagePool::mark_used(std::vector<bool>& used) const {
  const std::uint32_t pages = segment_.geometry().pages;
  for (std::uint32_t s = 0; s < segment_.geometry().max_sequences; ++s) {
    for (std::uint32_t i = 0; i < segment_.max_pages_per_sequence(); ++i) {
      const std::int32_t page = table(s)[i];
      if (page == -1) continue;
      const std::string name =
          "page " + std::to_string(page) + " of sequence " + std::to_string(s);
      if (page < 0 || static_cast<std::uint32_t>(page) >= pages) return name + " does not exist";
      if (used[page]) return name + " is in two places";
      used[page] = true;
    }
  }
  return "";
}

std::string PagePool::check_lengths() const {
  const shm::Geometry& g = segment_.geometry();
  for (std::uint32_t s = 0; s < g.max_sequences; ++s) {
    std::uint32_t longest = 0;
    for (std::uint32_t l = 0; l < g.layers; ++l) longest = std::max(longest, length(s, l));
    const std::string name = "sequence " + std::to_string(s);
    if (longest > g.max_sequence_tokens) return name + " is longer than max_sequence_tokens";
    for (std::uint32_t i = 0; i * g.page_tokens < longest; ++i)
      if (table(s)[i] < 0) return name + " has tokens without a page";
  }
  return "";
}

std::string PagePool::check_copies() const {
  const shm::Geometry& g = segment_.geometry();
  for (std::uint32_t s = 0; s < g.max_sequences; ++s) {
    const std::string name = "of sequence " + std::to_string(s) + " was overwritten";
    for (std::uint32_t l = 0; l < g.layers; ++l)
      if (segment_.written_len(s)[l].load(std::memory_order_relaxed) != length(s, l))
        return "the published length " + name;
    const std::int32_t* published = segment_.page_table(s);
    if (!std::equal(published, published + segment_.max_pages_per_sequence(), table(s)))
      return "the published page table " + name;
  }
  return "";
}

std::string PagePool::check_integrity() const {
  std::vector<bool> used(segment_.geometry().pages);
  std::string wrong = mark_used(used);
  if (!wrong.empty()) return wrong;
  for (std::uint32_t page = 0; page < used.size(); ++page) {
    const std::string name = "page " + std::to_string(page);
    if (used[page] && free_[page]) return name + " is free and in use";
    if (!used[page] && !free_[page]) return name + " leaked";
  }
  if (free_count_ != std::count(free_.begin(), free_.end(), true))
    return "free pages were miscounted";
  wrong = check_lengths();
  return wrong.empty() ? check_copies() : wrong;
}

}  // namespace omniserve
