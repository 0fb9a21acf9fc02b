// A model's weights in the form in which the dense kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "dense_kernel.h"
#include "thread_pool.h"

namespace omniserve {

// Zeroed memory in huge pages where the system gives them, handed out from front to back.
class HugeMemory {
 public:
  // Touched by the threads of `pool`. Throws std::bad_alloc.
  HugeMemory(std::size_t bytes, ThreadPool& pool);
  ~HugeMemory();
  HugeMemory(const HugeMemory&) = delete;
  HugeMemory& operator=(const HugeMemory&) = delete;

  // Aligned to a cache line. Throws std::logic_error if there is no more.
  std::byte* take(std::size_t bytes);
  // What take(bytes) uses up.
  static constexpr std::size_t rounded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  std::byte* memory_;
  std::size_t bytes_;
  std::size_t taken_ = 0;
};

// See dense_kernel.h. What it points at belongs to a HugeMemory.
struct PackedMatrix {
  std::byte* data = nullptr;
  std::uint32_t outputs = 0;
  std::uint32_t inputs = 0;  // padded
  std::uint32_t elem_bytes = 0;

  std::uint32_t panels() const { return (outputs + kPanelOutputs - 1) / kPanelOutputs; }
  std::size_t panel_bytes() const {
    return std::size_t{kPanelOutputs} * inputs * elem_bytes;
  }
  const std::byte* panel(std::uint32_t index) const { return data + index * panel_bytes(); }
  std::size_t bytes() const { return panels() * panel_bytes(); }
};

// An unpacked matrix, [outputs][stride], of which `inputs` columns count.
struct MatrixView {
  const std::byte* data;
  std::size_t stride;  // elements
};

// Room for a matrix of this shape; its values are zero.
PackedMatrix take_matrix(HugeMemory& memory, std::size_t outputs, std::size_t inputs,
                         std::uint32_t elem_bytes);
// Bytes that take_matrix uses up.
std::size_t packed_bytes(std::size_t outputs, std::size_t inputs, std::uint32_t elem_bytes);

// Fills output i with `inputs` values at row_of(i); null leaves it zero. row_of is called by all
// threads of the pool.
void pack(const PackedMatrix& to, std::size_t inputs, ThreadPool& pool,
          const std::function<const std::byte*(std::uint32_t output)>& row_of);

}  // namespace omniserve
