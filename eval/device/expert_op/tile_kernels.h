// The tile kernels of this processor's instruction set, and the choice among them.
#pragma once

#include <cstring>

#include "tile_layout.h"
#include "tile_portable.h"

#if defined(__x86_64__)
#include "tile_avx2.h"
#include "tile_avx512.h"
#elif defined(__aarch64__)
#include "tile_neon.h"
#endif

namespace mobilemoe {

struct NamedKernel {
  const char* name;
  TileKernel compute;
  bool (*is_available)();  // whether this processor has the instructions
};

// The fastest first. The last one is available everywhere.
constexpr NamedKernel kKernels[] = {
#if defined(__x86_64__)
    {"avx512_vnni", tile_avx512, has_avx512_vnni},
    {"avx2", tile_avx2, has_avx2},
#elif defined(__aarch64__)
    {"neon_i8mm", tile_neon_i8mm, has_neon_i8mm},
    {"neon_dot", tile_neon_dot, has_neon_dot},
#endif
    {"portable", tile_portable, has_portable},
};

// Returns the kernel of this name, or nullptr if this processor lacks its instructions.
inline TileKernel find_kernel(const char* name) {
  for (const NamedKernel& kernel : kKernels) {
    if (!std::strcmp(name, kernel.name)) return kernel.is_available() ? kernel.compute : nullptr;
  }
  return nullptr;
}

inline const NamedKernel& fastest_kernel() {
  const NamedKernel* kernel = kKernels;
  while (!kernel->is_available()) ++kernel;
  return *kernel;
}

}  // namespace mobilemoe
