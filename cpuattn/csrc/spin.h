#pragma once

namespace omniserve {

// Tells the core that this is a spinning loop.
inline void relax_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace omniserve
