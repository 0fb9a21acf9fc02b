// A model's weights in the form in which the dense kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "dense_kernel.h"
#include "huge_memory.h"
#include "thread_pool.h"

namespace omniserve {

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
