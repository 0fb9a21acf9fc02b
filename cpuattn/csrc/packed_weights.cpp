#include "packed_weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace omniserve {

std::size_t packed_bytes(std::size_t outputs, std::size_t inputs, std::uint32_t elem_bytes) {
  const std::size_t all = (outputs + kPanelOutputs - 1) / kPanelOutputs * kPanelOutputs;
  return HugeMemory::rounded(all * padded(inputs) * elem_bytes);
}

PackedMatrix take_matrix(HugeMemory& memory, std::size_t outputs, std::size_t inputs,
                         std::uint32_t elem_bytes) {
  PackedMatrix m;
  m.outputs = static_cast<std::uint32_t>(outputs);
  m.inputs = static_cast<std::uint32_t>(padded(inputs));
  m.elem_bytes = elem_bytes;
  m.data = memory.take(packed_bytes(outputs, inputs, elem_bytes));
  return m;
}

void pack(const PackedMatrix& to, std::size_t inputs, ThreadPool& pool,
          const std::function<const std::byte*(std::uint32_t output)>& row_of) {
  // Values that lie side by side are four bytes in either dtype.
  const std::size_t packing = 4 / to.elem_bytes;
  std::atomic<std::uint32_t> next{0};
  pool.run([&] {
    for (std::uint32_t p; (p = next.fetch_add(1)) < to.panels();) {
      std::byte* panel = to.data + p * to.panel_bytes();
      for (std::uint32_t i = 0; i < kPanelOutputs; ++i) {
        const std::byte* row = row_of(p * kPanelOutputs + i);
        if (row == nullptr) continue;
        for (std::size_t k = 0; k < inputs; k += packing)
          std::memcpy(panel + (k / packing * kPanelOutputs + i) * 4, row + k * to.elem_bytes,
                      std::min(packing, inputs - k) * to.elem_bytes);
      }
    }
  });
}

}  // namespace omniserve
