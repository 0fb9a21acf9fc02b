// One sequence of an honest worker, whose answers are compared with a slow reference.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "segment.h"

namespace omniserve {

inline shm::Geometry small_geometry() {
  shm::Geometry g{};
  g.layers = 2;
  g.heads = 4;
  g.kv_heads = 2;
  g.head_dim = 16;
  g.dtype = g.kv_dtype = shm::kFloat32;
  g.page_tokens = 16;
  g.max_sequences = 6;
  g.max_sequence_tokens = 72;
  g.slots = 24;
  g.pages = 18;
  return g;
}

// Random rows of one layer of one sequence, and what attention over them is.
class HonestSequence {
 public:
  HonestSequence(const SegmentView& segment, std::uint64_t seed)
      : segment_(segment), parts_(segment.geometry()), random_(seed) {}

  std::uint32_t tokens() const { return static_cast<std::uint32_t>(kv_.size()); }

  // Writes q, k, v of the next token into `slot`.
  void fill(std::uint32_t slot) {
    float* row = reinterpret_cast<float*>(segment_.slab_row(slot));
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < parts_.out; ++i) row[i] = normal(random_);
    kv_.emplace_back(row + parts_.k, row + parts_.out);
  }
  // The same place again, with other rows.
  void refill(std::uint32_t slot) {
    kv_.pop_back();
    fill(slot);
  }

  // The output in `slot` is attention of its q over every row so far.
  void check_output(std::uint32_t slot) const {
    const shm::Geometry& g = segment_.geometry();
    const float* row = reinterpret_cast<const float*>(segment_.slab_row(slot));
    const std::size_t v_at = parts_.v - parts_.k;
    for (std::uint32_t h = 0; h < g.heads; ++h) {
      const std::size_t column = std::size_t{h} / (g.heads / g.kv_heads) * g.head_dim;
      std::vector<double> expected(g.head_dim);
      double sum = 0;
      for (const std::vector<float>& kv : kv_) {
        double score = 0;
        for (std::uint32_t d = 0; d < g.head_dim; ++d)
          score += double{row[h * g.head_dim + d]} * kv[column + d];
        const double weight = std::exp(score / std::sqrt(static_cast<double>(g.head_dim)));
        sum += weight;
        for (std::uint32_t d = 0; d < g.head_dim; ++d)
          expected[d] += weight * kv[v_at + column + d];
      }
      for (std::uint32_t d = 0; d < g.head_dim; ++d) {
        const double got = row[parts_.out + h * g.head_dim + d];
        CHECK(std::abs(got - expected[d] / sum) < 1e-4, "token %u, head %u: %g, not %g", tokens(),
              h, got, expected[d] / sum);
      }
    }
  }

 private:
  SegmentView segment_;
  RowParts parts_;
  std::mt19937_64 random_;
  std::vector<std::vector<float>> kv_;  // [tokens][k | v]
};

}  // namespace omniserve
