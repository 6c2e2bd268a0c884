// Loads the library of our op, as a runtime does, and calls it on cases that a test wrote (tests/eval/test_kernels.py):
//   call_op LIBRARY list                    prints the kernels that the processor has
//   call_op LIBRARY layers KERNEL CASES OUT
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tile_layout.h"

using ListKernels = const char* (*)();
using Run = int (*)(const char*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, const float*,
                    const float*, const uint8_t*, const uint8_t*, double, float*);

template <class T>
std::vector<T> read(FILE* file, int64_t n) {
  std::vector<T> values(n);
  if (std::fread(values.data(), sizeof(T), n, file) != static_cast<size_t>(n)) std::exit(3);
  return values;
}

int main(int n_arguments, char** arguments) {
  void* library = n_arguments > 2 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
  if (!library) {
    std::fprintf(stderr, "%s\n", n_arguments > 2 ? dlerror() : "call_op LIBRARY list|layers ...");
    return 2;
  }
  if (!std::strcmp(arguments[2], "list")) {
    std::puts(reinterpret_cast<ListKernels>(dlsym(library, "mobilemoe_kernels"))());
    return 0;
  }
  const auto run = reinterpret_cast<Run>(dlsym(library, "mobilemoe_run"));
  FILE *cases = std::fopen(arguments[4], "rb"), *out = std::fopen(arguments[5], "wb");
  if (!run || !cases || !out) return 2;
  for (int64_t sizes[6]; std::fread(sizes, sizeof(sizes), 1, cases) == 1;) {
    const int64_t T = sizes[0], D = sizes[1], F = sizes[2], E = sizes[3], K = sizes[4], group_size = sizes[5];
    const auto x = read<float>(cases, T * D), gate = read<float>(cases, E * D), bias = read<float>(cases, E);
    const auto w13 = read<uint8_t>(cases, E * mobilemoe::blob_bytes(2 * F, D, group_size));
    const auto w2 = read<uint8_t>(cases, E * mobilemoe::blob_bytes(D, F, group_size));
    std::vector<float> y(T * D);
    if (run(arguments[3], T, D, F, E, K, group_size, x.data(), gate.data(), bias.data(), w13.data(), w2.data(), 2.5,
            y.data())) {
      return 4;
    }
    std::fwrite(y.data(), sizeof(float), y.size(), out);
  }
  return std::fclose(out) ? 2 : 0;
}
