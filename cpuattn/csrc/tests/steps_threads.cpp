// Steps whose units read what any unit of the step before them wrote, on more threads than cores.
// Run under ThreadSanitizer: the numbers are plain memory, so only the steps order who touches them.
#include <cstdint>
#include <vector>

#include "check.h"
#include "steps.h"

using namespace omniserve;

namespace {

constexpr std::uint32_t kUnits = 37;
constexpr std::uint32_t kSteps = 6;

// Unit u adds up the step before, whole, and u.
struct Sum {
  const std::vector<std::uint64_t>* from;
  std::vector<std::uint64_t>* to;

  void run(const Turn& turn) const {
    CHECK(turn.thread < turn.threads, "a share of no thread");
    std::uint64_t sum = turn.unit;
    for (const std::uint64_t value : *from) sum += value % 1000;
    (*to)[turn.unit] += sum;
  }
};

void run(unsigned threads, std::int64_t spin_us, int rounds) {
  ThreadPool pool(threads, {}, spin_us);
  Steps steps(pool, kSteps);
  for (int round = 0; round < rounds; ++round) {
    // Of changing size, also smaller than the number of threads, and empty.
    const std::uint32_t units = round % (kUnits + 1);
    std::vector<std::vector<std::uint64_t>> found(kSteps + 1, std::vector<std::uint64_t>(units, 0));
    std::vector<Sum> tasks(kSteps);
    for (std::uint32_t s = 0; s < kSteps; ++s) {
      tasks[s] = {&found[s], &found[s + 1]};
      steps.add(tasks[s], units);
    }
    steps.run();
    std::vector<std::uint64_t> wanted(units, 0);
    for (std::uint32_t s = 0; s < kSteps; ++s) {
      std::uint64_t sum = 0;
      for (const std::uint64_t value : wanted) sum += value % 1000;
      for (std::uint32_t u = 0; u < units; ++u) wanted[u] = sum + u;
      CHECK(found[s + 1] == wanted, "round %d: step %u", round, s);
    }
  }
}

}  // namespace

int main() {
  for (const unsigned threads : {1u, 2u, 5u}) {
    run(threads, 0, 3'000);
    run(threads, 100, 10'000);
  }
  return 0;
}
