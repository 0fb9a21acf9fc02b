// Which token has the largest logit of each row, kept while a head's panels are multiplied: so
// logits that nobody asked for are never written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "dense_kernel.h"

namespace omniserve {

// Every thread keeps its own sums, of whatever panels it runs.
class BestTokens {
 public:
  BestTokens() = default;
  // sums: [threads][kUnitRows]
  BestTokens(BestSums* sums, std::uint32_t threads) : sums_(sums), threads_(threads) {}

  // [kUnitRows] of a thread.
  BestSums* of(std::uint32_t thread) const { return sums_ + std::size_t{thread} * kUnitRows; }

  void clear(std::uint32_t row) const {
    for (std::uint32_t thread = 0; thread < threads_; ++thread) {
      BestSums& best = of(thread)[row];
      std::fill_n(best.sum, kPanelOutputs, -std::numeric_limits<float>::infinity());
      std::fill_n(best.panel, kPanelOutputs, kNoPanel);
    }
  }

  // Of equals the first; 0 if no logit is a number.
  std::int64_t token(std::uint32_t row) const {
    std::int64_t token = -1;
    float largest = 0;
    for (std::uint32_t thread = 0; thread < threads_; ++thread) {
      const BestSums& best = of(thread)[row];
      for (std::uint32_t i = 0; i < kPanelOutputs; ++i) {
        if (best.panel[i] == kNoPanel) continue;
        const std::int64_t here = std::int64_t{best.panel[i]} * kPanelOutputs + i;
        const bool better = best.sum[i] > largest || (best.sum[i] == largest && here < token);
        if (token < 0 || better) token = here, largest = best.sum[i];
      }
    }
    return token < 0 ? 0 : token;
  }

 private:
  static constexpr std::uint32_t kNoPanel = ~std::uint32_t{0};

  BestSums* sums_ = nullptr;
  std::uint32_t threads_ = 0;
};

}  // namespace omniserve
