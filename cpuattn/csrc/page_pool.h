// The free pages of an arena. The page tables in the segment are the truth; this list is rebuilt
// from them after a crash.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "segment.h"

namespace omniserve {

class PagePool {
 public:
  // Throws std::runtime_error if a table names a page that does not exist, or one twice.
  explicit PagePool(const SegmentView& segment);

  std::uint32_t free_pages() const { return static_cast<std::uint32_t>(free_.size()); }

  // The page that holds `position`, allocated if `sequence` has none there yet; -1 if none is left.
  std::int32_t page_for(std::uint32_t sequence, std::uint32_t position);
  // Zeroes the sequence's lengths and takes its pages back. Safe to repeat after a crash.
  void free_sequence(std::uint32_t sequence);

  // Empty when every page is free or in exactly one table, and lengths are covered by pages.
  std::string check_integrity() const;

 private:
  // Marks the pages in tables; returns what is wrong, or "".
  std::string mark_used(std::vector<bool>& used) const;
  std::string check_lengths() const;

  SegmentView segment_;
  std::vector<std::int32_t> free_;
};

}  // namespace omniserve
