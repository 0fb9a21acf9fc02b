// Private memory in huge pages where the system gives them.
#pragma once

#include <cstddef>

#include "thread_pool.h"

namespace omniserve {

// Zeros, handed out from front to back.
class HugeMemory {
 public:
  // Touched now, not in the middle of a pass, and by the threads of `pool`, which will read it.
  // Throws std::bad_alloc.
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

}  // namespace omniserve
