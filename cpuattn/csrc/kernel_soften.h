// From raw scores to the weights of V. Part of kernel_impl.h, compiled with it.
#pragma once

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

// cap * tanh(x), as base-2 logits.
INLINE Vec capped(Vec x, float cap) {
  const Vec size = vmax(x, -x);
  const Vec e = exp2_negative(size * (-2 * kLog2E));
  const Vec t = (1.0f - e) / (1.0f + e);
  return (x < Vec{} ? -t : t) * (cap * kLog2E);
}

// A tile's scales of K and V, [kTileTokens] each.
struct Scales {
  alignas(64) float k[kTileTokens];
  alignas(64) float v[kTileTokens];
};

// Turns the raw scores of one query with a tile into weights, in place of operands; rescales what
// the query has so far. Returns the step of the weights. kPlain: the tile is full, the query sees
// all of it, and nothing caps its scores.
template <typename F, bool kPlain>
INLINE float soften(State<F>& s, int query, const AttendUnit& u, const Tile& tile,
                    const float* scores, const Scales& scales, std::uint32_t* operands) {
  const int vectors =
      (kPlain ? int{kTileTokens} : static_cast<int>(tile.pages * u.page_tokens)) / kLanes;
  const auto begin = static_cast<std::int32_t>(tile.start);
  const std::int32_t first = static_cast<std::int32_t>(s.first[query]) - begin;
  const std::int32_t end = static_cast<std::int32_t>(s.end[query]) - begin;
  const bool masked = !kPlain && (first > 0 || end < vectors * kLanes);
  const bool capping = !kPlain && u.softcap != 0;
  const float slope = capping ? 1 : s.factor[query];  // positive
  Vec values[kTileTokens / kLanes];  // base-2 logits are values * slope
  Vec top = broadcast(kNegInf);
  for (int i = 0; i < vectors; ++i) {
    values[i] = load(scores + i * kLanes);
    if (F::kScaled) values[i] *= load(scales.k + i * kLanes);
    if (capping) values[i] = capped(values[i] * s.factor[query], u.softcap);
    if (masked) {
      const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const IntVec token = lane + i * kLanes;
      values[i] = (token >= first) & (token < end) ? values[i] : broadcast(kNegInf);
    }
    top = vmax(top, values[i]);
  }
  top *= slope;
  float max = s.max[query];
  Vec sum = load(s.sum[query]);
  if (any_greater(top, broadcast(max))) {
    const float new_max = horizontal_max(top);
    const Vec keep = exp2_negative(broadcast(max - new_max));
    sum *= keep;
    float* out = s.out + std::size_t(query) * u.head_dim;
    for (std::uint32_t d = 0; d < u.head_dim; d += kLanes) store(out + d, load(out + d) * keep);
    s.max[query] = max = new_max;
  }
  const float shift = max == kNegInf ? 0 : max;  // nothing seen so far: every weight is zero
  for (int i = 0; i < vectors; ++i) {
    values[i] = exp2_negative(values[i] * slope - shift);
    sum += values[i];
  }
  store(s.sum[query], sum);
  return F::put_weights(values, vectors, scales.v, operands);
}

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA
