#include "segment.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <utility>

#include "kernel.h"

namespace omniserve {
namespace {

std::int64_t now_us() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return std::int64_t{t.tv_sec} * 1000000 + t.tv_nsec / 1000;
}

// Not private: the other side is another process.
long futex(std::atomic<std::uint32_t>* word, int op, std::uint32_t value, timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(word), op, value, timeout, nullptr, 0);
}

[[noreturn]] void fail(const std::string& what, const std::string& path, int cause) {
  throw std::runtime_error(what + " " + path + ": " + std::strerror(cause));
}

}  // namespace

Mapping::Mapping(const std::string& path) : Mapping(bare(path)) { populate(); }

Mapping Mapping::bare(const std::string& path) {
  Mapping mapping;
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) fail("cannot open", path, errno);
  struct stat st {};
  if (::fstat(fd, &st) != 0 || st.st_size == 0) {
    const int cause = errno;
    ::close(fd);
    fail("cannot size", path, st.st_size == 0 ? EINVAL : cause);
  }
  mapping.size_ = static_cast<std::size_t>(st.st_size);
  void* data = ::mmap(nullptr, mapping.size_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  const int cause = errno;
  ::close(fd);
  if (data == MAP_FAILED) fail("cannot map", path, cause);
  mapping.data_ = static_cast<std::byte*>(data);
  return mapping;
}

void Mapping::keep(std::size_t size) {
  if (size < size_) ::munmap(data_ + size, size_ - size);
  size_ = std::min(size, size_);
  populate();
}

// So that no page fault falls into a hot path. Huge pages can only be asked for before.
void Mapping::populate() {
  ::madvise(data_, size_, MADV_HUGEPAGE);
#ifdef MADV_POPULATE_WRITE
  if (::madvise(data_, size_, MADV_POPULATE_WRITE) == 0) return;
#endif
  // An older kernel. A fault of a read maps a page of tmpfs writable too.
  for (std::size_t at = 0; at < size_; at += shm::kPageAlign)
    *const_cast<volatile std::byte*>(data_ + at);
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

shm::Geometry geometry_of(const Mapping& mapping, const std::string& path) {
  const auto refuse = [&](const char* why) { throw std::runtime_error(path + ": " + why); };
  if (mapping.size() < sizeof(shm::Header)) refuse("shorter than a segment's header");
  const shm::Header& header = *reinterpret_cast<const shm::Header*>(mapping.data());
  if (header.ready.load(std::memory_order_acquire) != 1) refuse("the segment is not ready");
  if (header.magic != shm::kMagic) refuse("not a segment");
  if (header.layout_version != shm::kLayoutVersion) refuse("another layout version");
  const shm::Geometry geometry = header.geometry;
  check_geometry(geometry);
  if (!shm::fits(geometry, mapping.size())) refuse("the segment is truncated");
  return geometry;
}

void create_file(const std::string& path, std::size_t size) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) fail("cannot replace", path, errno);
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) fail("cannot create", path, errno);
  const int cause = ::posix_fallocate(fd, 0, static_cast<off_t>(size));
  ::close(fd);
  if (cause != 0) fail("cannot allocate", path, cause);
}

void check_geometry(const shm::Geometry& g) {
  const auto require = [](bool ok, const char* message) {
    if (!ok) throw std::invalid_argument(message);
  };
  require(g.dtype >= shm::kFloat32 && g.dtype <= shm::kFloat16,
          "dtype: float32, bfloat16 or float16");
  require(g.kv_dtype == g.dtype || g.kv_dtype == shm::kInt8, "kv_dtype: that of the rows, or int8");
  require(g.layers >= 1 && g.layers <= 1024, "layers: 1 to 1024");
  require(g.kv_heads >= 1 && g.kv_heads <= 1024, "kv_heads: 1 to 1024");
  require(g.heads >= 1 && g.heads % g.kv_heads == 0 && g.heads / g.kv_heads <= kMaxGroup,
          "heads: 1 to 16 times kv_heads");
  require(g.head_dim >= 16 && g.head_dim <= kMaxHeadDim && g.head_dim % 16 == 0,
          "head_dim: 16 to 256, a multiple of 16");
  require(g.page_tokens >= 16 && g.page_tokens <= kMaxPageTokens && g.page_tokens % 16 == 0,
          "page_tokens: 16 to 64, a multiple of 16");
  require(g.max_sequences >= 1 && g.max_sequences <= 1u << 20, "max_sequences: 1 to 2**20");
  require(g.max_sequence_tokens >= 1 && g.max_sequence_tokens <= 1u << 24,
          "max_sequence_tokens: 1 to 2**24");
  require(g.slots >= 1 && g.slots <= 1u << 20, "slots: 1 to 2**20");
  require(g.pages >= 1 && g.pages <= 1u << 30, "pages: 1 to 2**30");
}

// Ring: publish, then look for a sleeper. Wait: announce sleep, then look at what was published.
// Both sides order the two steps with a full fence (seq_cst), so one of them sees the other.
void ring_bell(shm::Doorbell& bell) {
  bell.value.fetch_add(1, std::memory_order_seq_cst);
  if (bell.sleeping.load(std::memory_order_seq_cst) != 0) futex(&bell.value, FUTEX_WAKE, 1, nullptr);
}

bool wait_bell(shm::Doorbell& bell, std::uint32_t seen, std::int64_t timeout_us) {
  if (bell.value.load(std::memory_order_acquire) != seen) return true;
  const std::int64_t deadline = now_us() + timeout_us;
  bell.sleeping.store(1, std::memory_order_seq_cst);
  bool rung = false;
  while (!(rung = bell.value.load(std::memory_order_seq_cst) != seen)) {
    const std::int64_t left = deadline - now_us();
    if (left <= 0) break;
    timespec t{left / 1000000, (left % 1000000) * 1000};
    // Any result leads to another look: woken, timed out, interrupted, or the value moved.
    futex(&bell.value, FUTEX_WAIT, seen, &t);
  }
  bell.sleeping.store(0, std::memory_order_relaxed);
  return rung;
}

}  // namespace omniserve
