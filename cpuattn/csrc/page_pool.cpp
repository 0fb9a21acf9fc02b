#include "page_pool.h"

#include <algorithm>
#include <stdexcept>

namespace omniserve {

PagePool::PagePool(const SegmentView& segment) : segment_(segment) {
  const std::uint32_t pages = segment_.geometry().pages;
  std::vector<bool> used(pages);
  const std::string wrong = mark_used(used);
  if (!wrong.empty()) throw std::runtime_error(wrong);
  free_.reserve(pages);
  for (std::uint32_t page = pages; page-- > 0;)
    if (!used[page]) free_.push_back(static_cast<std::int32_t>(page));
}

std::int32_t PagePool::page_for(std::uint32_t sequence, std::uint32_t position) {
  std::int32_t& entry =
      segment_.page_table(sequence)[position / segment_.geometry().page_tokens];
  if (entry >= 0 || free_.empty()) return entry;
  segment_.sequence_state(sequence).store(shm::kActive, std::memory_order_release);
  entry = free_.back();
  free_.pop_back();
  return entry;
}

void PagePool::free_sequence(std::uint32_t sequence) {
  auto* written = segment_.written_len(sequence);
  for (std::uint32_t l = 0; l < segment_.geometry().layers; ++l)
    written[l].store(0, std::memory_order_release);
  std::int32_t* table = segment_.page_table(sequence);
  for (std::uint32_t i = 0; i < segment_.header().max_pages_per_sequence; ++i) {
    if (table[i] < 0) continue;
    free_.push_back(table[i]);
    table[i] = -1;
  }
  segment_.sequence_state(sequence).store(shm::kEmpty, std::memory_order_release);
}

std::string PagePool::mark_used(std::vector<bool>& used) const {
  const std::uint32_t pages = segment_.geometry().pages;
  for (std::uint32_t s = 0; s < segment_.geometry().max_sequences; ++s) {
    const std::int32_t* table = segment_.page_table(s);
    for (std::uint32_t i = 0; i < segment_.header().max_pages_per_sequence; ++i) {
      const std::int32_t page = table[i];
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
    for (std::uint32_t l = 0; l < g.layers; ++l)
      longest = std::max(longest, segment_.written_len(s)[l].load(std::memory_order_acquire));
    const std::string name = "sequence " + std::to_string(s);
    if (longest > g.max_sequence_tokens) return name + " is longer than max_sequence_tokens";
    const std::int32_t* table = segment_.page_table(s);
    for (std::uint32_t i = 0; i * g.page_tokens < longest; ++i)
      if (table[i] < 0) return name + " has tokens without a page";
    if (longest > 0 && segment_.sequence_state(s).load(std::memory_order_acquire) != shm::kActive)
      return name + " has tokens but is not active";
  }
  return "";
}

std::string PagePool::check_integrity() const {
  std::vector<bool> used(segment_.geometry().pages);
  std::string wrong = mark_used(used);
  if (!wrong.empty()) return wrong;
  for (const std::int32_t page : free_) {
    if (used[page]) return "page " + std::to_string(page) + " is free and in use, or free twice";
    used[page] = true;
  }
  if (std::find(used.begin(), used.end(), false) != used.end()) return "a page leaked";
  return check_lengths();
}

}  // namespace omniserve
