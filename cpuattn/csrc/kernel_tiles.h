// The order in which the kernel reads a unit's pages. Part of kernel_impl.h, compiled with it.
#pragma once

#include "kernel.h"

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

constexpr std::uint32_t kMaxTilePages = 4;

// One kv head's blocks of a tile's pages.
struct Blocks {
  const std::byte* at[kMaxTilePages];

  INLINE Blocks next_head(std::size_t head_stride) const {
    Blocks next = *this;
    for (const std::byte*& block : next.at) block += head_stride;
    return next;
  }
};

// The pages of up to kTileTokens tokens. Behind the last one its block is repeated.
struct Tile {
  std::uint32_t start;  // its first token
  std::uint32_t pages;
  Blocks first_head;
};

// What a pass of N queries fetches ahead.
template <typename F, int N>
struct Fetch : FetchAhead<(N <= (F::kScaled ? 3 : 4)), 6144> {
  // Lines of V for each query, while scores become weights and nothing is read: from the next line
  // on that is read, or from what kBytes ahead of it.
#if defined(OMNISERVE_KERNEL_ZEN4)
  static constexpr bool kPauseAtOnce = true;
  static constexpr int kPauseLines = !F::kScaled && N >= 3 ? 32 / N : 0;
#else
  // Formats of floats, which have one loop, do without: all that was tried made it slower.
  static constexpr bool kPauseAtOnce = false;
  static constexpr int kPauseLines = !F::kScaled ? 0 : N >= 4 ? 14 : 4;
#endif
};

// The distance where the next block lies elsewhere: with it no run of lines steps across a block's
// end, but for int8 heads of 64.
constexpr std::size_t kFetchApart = 8192;

// What comes kBytes later than `at` in the order of reading blocks of `size` bytes.
template <typename F, int N>
INLINE const std::byte* ahead_of(const Blocks& blocks, const Blocks& ahead, std::uint32_t page,
                                 std::size_t at, std::size_t size) {
  const bool follows = ahead.at[page] == blocks.at[page] + size;
  const std::size_t to = at + (follows ? Fetch<F, N>::kBytes : kFetchApart);
  if (to < size) return blocks.at[page] + to;
  return ahead.at[page] + (to - size < size ? to - size : at);
}

// Where a block's V begins.
template <typename F>
INLINE std::size_t v_offset(const AttendUnit& u) {
  return std::size_t{u.page_tokens} * (u.head_dim * F::kBytes + (F::kScaled ? 2 * sizeof(float) : 0));
}

// A unit's position in its tiles. All of its chunks begin at tile boundaries.
struct Cursor {
  const AttendUnit* unit;
  std::uint32_t tile_pages;
  std::uint32_t page;
  std::uint32_t end_page;

  explicit INLINE Cursor(const AttendUnit& u) : unit(&u) {
    tile_pages = kTileTokens / u.page_tokens;
    const std::uint32_t tokens =
        u.first_position + (u.first_query + u.queries - 1) / u.group + 1;
    const std::uint32_t pages = (tokens + u.page_tokens - 1) / u.page_tokens;
    page = chunk_first_page(u.first_chunk, u.page_tokens);
    end_page = chunk_first_page(u.last_chunk + 1, u.page_tokens);
    if (end_page > pages) end_page = pages;
  }
  INLINE bool done() const { return page >= end_page; }
  INLINE Tile tile() const {
    Tile t{page * unit->page_tokens, end_page - page, {}};
    if (t.pages > tile_pages) t.pages = tile_pages;
    for (std::uint32_t i = 0; i < kMaxTilePages; ++i)
      t.first_head.at[i] =
          i < t.pages ? unit->kv + unit->table[page + i] * unit->page_stride
                      : t.first_head.at[t.pages - 1];
    return t;
  }
  INLINE void advance() { page += tile_pages; }
};

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA
