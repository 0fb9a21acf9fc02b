// Pages, page tables and lengths of an arena. The tables and lengths in the segment are copies for
// the worker to read and for a restarted server to start from; the worker can overwrite them, so
// nothing but these private ones is ever used to index memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "segment.h"

namespace omniserve {

class PagePool {
 public:
  // Takes over what the segment says. Throws std::runtime_error where that contradicts itself: a
  // page that does not exist or is in two places, tokens without a page.
  explicit PagePool(const SegmentView& segment);

  // [max_pages_per_sequence], -1 = none. Every page below a length is there.
  const std::int32_t* table(std::uint32_t sequence) const {
    return &tables_[std::size_t{sequence} * segment_.max_pages_per_sequence()];
  }
  std::uint32_t length(std::uint32_t sequence, std::uint32_t layer) const {
    return lengths_[std::size_t{sequence} * segment_.geometry().layers + layer];
  }
  void set_length(std::uint32_t sequence, std::uint32_t layer, std::uint32_t tokens) {
    lengths_[std::size_t{sequence} * segment_.geometry().layers + layer] = tokens;
    segment_.written_len(sequence)[layer].store(tokens, std::memory_order_release);
  }

  std::uint32_t free_pages() const { return free_count_; }

  // The page that holds `position`, allocated if `sequence` has none there yet; -1 if none is left.
  // A sequence's pages follow one another in memory while that is possible: attention reads them
  // nearly twice as fast as pages that lie anywhere.
  std::int32_t page_for(std::uint32_t sequence, std::uint32_t position);
  // Zeroes the sequence's lengths and takes its pages back. Safe to repeat after a crash.
  void free_sequence(std::uint32_t sequence);

  // Empty when every page is free or in exactly one table, lengths are covered by pages, and the
  // segment's copies are what was written there.
  std::string check_integrity() const;

 private:
  // Marks the pages in tables; returns what is wrong, or "".
  std::string mark_used(std::vector<bool>& used) const;
  std::string check_lengths() const;
  std::string check_copies() const;
  std::uint32_t choose_page(std::uint32_t sequence, std::uint32_t index) const;

  SegmentView segment_;
  std::vector<std::int32_t> tables_;   // [max_sequences][max_pages_per_sequence]
  std::vector<std::uint32_t> lengths_;  // [max_sequences][layers]
  std::vector<bool> free_;              // [pages]
  std::uint32_t free_count_ = 0;
};

}  // namespace omniserve
