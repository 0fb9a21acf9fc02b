#pragma once

#include <chrono>
#include <thread>

namespace omniserve {

// Tells the core that this is a spinning loop.
inline void relax_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Turn `turn`, from 0 on, of waiting for another thread that is about to be done. If it takes long
// it may have lost its core: ours is then given up for a moment, and not only offered, so that the
// system can run the other thread here.
inline void wait_a_turn(int turn) {
  constexpr int kPauses = 2000;
  constexpr std::chrono::microseconds kNap{20};
  if (turn < kPauses)
    relax_core();
  else
    std::this_thread::sleep_for(kNap);
}

}  // namespace omniserve
