#include "huge_memory.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace omniserve {
namespace {

constexpr std::size_t kHugePage = 2u << 20;

}  // namespace

HugeMemory::HugeMemory(std::size_t bytes, ThreadPool& pool)
    : bytes_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
  memory_ = static_cast<std::byte*>(std::aligned_alloc(kHugePage, bytes_));
  if (memory_ == nullptr) throw std::bad_alloc();
  ::madvise(memory_, bytes_, MADV_HUGEPAGE);  // a refusal costs speed only
  std::atomic<std::size_t> next{0};
  pool.run([&] {
    for (std::size_t at; (at = next.fetch_add(kHugePage)) < bytes_;)
      std::memset(memory_ + at, 0, kHugePage);
  });
}

HugeMemory::~HugeMemory() { std::free(memory_); }

std::byte* HugeMemory::take(std::size_t bytes) {
  if (rounded(bytes) > bytes_ - taken_) throw std::logic_error("more taken than was allocated");
  std::byte* at = memory_ + taken_;
  taken_ += rounded(bytes);
  return at;
}

}  // namespace omniserve
