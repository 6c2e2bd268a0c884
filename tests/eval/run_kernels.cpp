// Runs tile kernels and whole layers on cases that a test wrote (tests/eval/test_kernels.py), without ExecuTorch:
//   run_kernels list                          prints the kernels that the processor has, the fastest first
//   run_kernels tiles|layers KERNEL CASES OUT
// All numbers are in the byte order of the machine. Every array ends where a page without access begins, so a kernel
// that reads or writes past the end of one is ended by the system.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "moe_layer.h"
#include "tile_kernels.h"

using namespace mobilemoe;

namespace {

[[noreturn]] void fail(const char* reason) {
  std::fprintf(stderr, "%s\n", reason);
  std::exit(2);
}

// n values of T; every byte is 0xFF at first, which is a NaN in a float.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t n) : n_bytes_(n * sizeof(T)), page_(sysconf(_SC_PAGESIZE)) {
    inside_ = (n_bytes_ + page_ - 1) / page_ * page_;
    start_ = static_cast<char*>(
        mmap(nullptr, inside_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (start_ == MAP_FAILED || mprotect(start_ + inside_, page_, PROT_NONE)) fail("no memory");
    std::memset(data(), 0xFF, n_bytes_);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(start_, inside_ + page_); }
  T* data() { return reinterpret_cast<T*>(start_ + inside_ - n_bytes_); }
  T* read(FILE* file) {
    if (std::fread(data(), 1, n_bytes_, file) != static_cast<size_t>(n_bytes_)) fail("the cases end too early");
    return data();
  }
  void write(FILE* file) {
    if (std::fwrite(data(), 1, n_bytes_, file) != static_cast<size_t>(n_bytes_)) fail("the output cannot be written");
  }

 private:
  int64_t n_bytes_, page_, inside_;
  char* start_;
};

// Runs one case; returns false where there is no more.
bool run_tile(TileKernel kernel, FILE* cases, FILE* out) {
  int64_t sizes[3];
  if (std::fread(sizes, sizeof(sizes), 1, cases) != 1) return false;
  const int64_t k = sizes[0], group_size = sizes[1], n_rows = sizes[2], n_groups = k / group_size;
  Guarded<uint8_t> tile(tile_bytes(k, group_size));
  Guarded<int8_t> q(n_rows * k);
  Guarded<int32_t> sums(n_rows * n_groups), zeros(n_rows);
  Guarded<float> scales(n_rows), products(n_rows * kTileRows);
  tile.read(cases), q.read(cases), sums.read(cases), scales.read(cases), zeros.read(cases);
  std::vector<QuantizedRow> rows(n_rows);
  for (int64_t i = 0; i < n_rows; ++i) {
    rows[i] = {q.data() + i * k, sums.data() + i * n_groups, scales.data()[i], zeros.data()[i]};
  }
  kernel(tile.data(), k, group_size, rows.data(), n_rows, products.data());
  products.write(out);
  return true;
}

// Ranges of three, the last one first: a layer must not depend on their order.
constexpr auto in_pieces = [](int64_t begin, int64_t end, int64_t, const auto& f) {
  for (int64_t last = end; last > begin; last -= 3) f(std::max(begin, last - 3), last);
};

bool run_layer(TileKernel kernel, FILE* cases, FILE* out) {
  int64_t sizes[6];
  if (std::fread(sizes, sizeof(sizes), 1, cases) != 1) return false;
  Layer layer{};
  layer.T = sizes[0], layer.D = sizes[1], layer.F = sizes[2], layer.E = sizes[3], layer.K = sizes[4];
  layer.group_size = sizes[5], layer.route_scale = 2.5f;
  Guarded<float> x(layer.T * layer.D), gate(layer.E * layer.D), bias(layer.E), result(layer.T * layer.D);
  Guarded<uint8_t> w13(layer.E * layer.w13_bytes()), w2(layer.E * layer.w2_bytes());
  layer.x = x.read(cases), layer.gate = gate.read(cases), layer.bias = bias.read(cases);
  layer.w13 = w13.read(cases), layer.w2 = w2.read(cases), layer.out = result.data();
  moe_ffn(layer, kernel, in_pieces);
  result.write(out);
  return true;
}

}  // namespace

int main(int n_arguments, char** arguments) {
  if (n_arguments == 2 && !std::strcmp(arguments[1], "list")) {
    for (const NamedKernel& kernel : kKernels) {
      if (kernel.is_available()) std::puts(kernel.name);
    }
    return 0;
  }
  if (n_arguments != 5) fail("run_kernels list | run_kernels tiles|layers KERNEL CASES OUT");
  const TileKernel kernel = find_kernel(arguments[2]);
  FILE *cases = std::fopen(arguments[3], "rb"), *out = std::fopen(arguments[4], "wb");
  if (!kernel || !cases || !out) fail("this processor lacks the kernel, or a file cannot be opened");
  const auto run = std::strcmp(arguments[1], "tiles") ? run_layer : run_tile;
  while (run(kernel, cases, out)) continue;
  if (std::fclose(out)) fail("the output cannot be written");
}
