// Runs the expert op's arithmetic and the reader of model files on inputs that a number decides, under sanitizers:
//   fuzz_kernels FIRST COUNT FILE
// Every array is a heap block of its exact size, so that AddressSanitizer ends a read or a write past its end. The
// weights, scales and activations are any bytes: NaN, infinities, numbers beyond the range of an integer.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct Refused {};
namespace std {
[[noreturn]] inline void throw_refused(int) { throw Refused{}; }
}  // namespace std
#include "thread_pool.h"
#define exit throw_refused  // model_file.h ends its program by std::exit where it refuses a file
#include "model_file.h"
#undef exit
#include "moe_layer.h"
#include "tile_kernels.h"

using namespace mobilemoe;
using Random = std::mt19937_64;

namespace {

int64_t choose(Random& random, int64_t from, int64_t to) { return from + static_cast<int64_t>(random() % (to - from + 1)); }

// A block of exactly n values with any bytes.
template <class T>
std::unique_ptr<T[]> any_bytes(Random& random, int64_t n) {
  std::unique_ptr<T[]> values(new T[n]);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(values.get());
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); ++i) bytes[i] = static_cast<uint8_t>(random() >> 24);
  return values;
}

std::unique_ptr<float[]> any_floats(Random& random, int64_t n) {
  static const float strange[] = {NAN, INFINITY, -INFINITY, 1e38f, -1e38f, 1e-45f, 0.0f, -0.0f};
  if (choose(random, 0, 3) == 0) return any_bytes<float>(random, n);
  std::unique_ptr<float[]> values(new float[n]);
  const bool has_strange = choose(random, 0, 1) == 0;
  for (int64_t i = 0; i < n; ++i) {
    values[i] = static_cast<float>(static_cast<int64_t>(random() % 2001) - 1000) / 300.0f;
    if (has_strange && choose(random, 0, 15) == 0) values[i] = strange[choose(random, 0, 7)];
  }
  return values;
}

constexpr auto in_pieces = [](int64_t begin, int64_t end, int64_t, const auto& f) {
  for (int64_t last = end; last > begin; last -= 3) f(std::max(begin, last - 3), last);
};

void run_layer(Random& random) {
  Layer layer{};
  layer.group_size = 32 * choose(random, 1, 2);
  layer.D = layer.group_size * choose(random, 1, 2), layer.F = layer.group_size * choose(random, 1, 2);
  layer.T = choose(random, 0, 5), layer.E = choose(random, 1, 4), layer.K = choose(random, 1, layer.E);
  const auto x = any_floats(random, layer.T * layer.D), gate = any_floats(random, layer.E * layer.D);
  const auto bias = any_floats(random, layer.E), out = any_floats(random, layer.T * layer.D);
  const auto w13 = any_bytes<uint8_t>(random, layer.E * layer.w13_bytes());
  const auto w2 = any_bytes<uint8_t>(random, layer.E * layer.w2_bytes());
  layer.x = x.get(), layer.gate = gate.get(), layer.bias = choose(random, 0, 1) ? bias.get() : nullptr;
  layer.w13 = w13.get(), layer.w2 = w2.get(), layer.out = out.get(), layer.route_scale = 2.5f;
  const NamedKernel& kernel = kKernels[choose(random, 0, static_cast<int64_t>(std::size(kKernels)) - 1)];
  if (kernel.is_available()) moe_ffn(layer, kernel.compute, in_pieces);
}

const char* const kRightShape =
    "mobilemoe-phone-bench 1\nd_model 64\nn_layers 1\nn_heads 2\nn_kv_heads 1\nhead_dim 32\nexpert_hidden 32\n"
    "shared_hidden 64\nn_experts 2\ntop_k 1\nvocab_size 32\ngroup_size 32\nembedding_group_size 32\n"
    "expert_group_size 32\nnorm_eps 1e-05\nroute_scale 2.5\nrope_frequencies 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n";

// A right shape in which up to three places are changed.
std::string any_shape(Random& random) {
  static const char* const pieces[] = {"0", "-1", "1e300", "nan", "inf", "99999999999999999999", "\n", " ", "1048576",
                                       "4611686018427387904", "33", "0.5", "group_size 32\n", "x", "\0", "32 32"};
  std::string text = kRightShape;
  for (int64_t i = choose(random, 0, 3); i > 0; --i) {
    const size_t start = static_cast<size_t>(choose(random, 0, static_cast<int64_t>(text.size()) - 1));
    text.replace(start, static_cast<size_t>(choose(random, 0, 4)), pieces[choose(random, 0, 15)]);
  }
  text.resize(kShapeBytes, '\0');
  return text;
}

// Opens a model file of any shape; where it is taken, every weight is read once and one matrix is multiplied.
void open_file(Random& random, const char* path, ThreadPool& pool) {
  std::string content = any_shape(random);
  try {
    const std::vector<Part> parts = list_parts(read_shape(content));
    const int64_t n_bytes = parts.back().offset + parts.back().bytes();
    if (n_bytes > 1 << 20) return;
    content.resize(static_cast<size_t>(kShapeBytes + n_bytes - (choose(random, 0, 7) == 0)), '\x7f');
  } catch (const Refused&) {
    return;
  }
  FILE* file = std::fopen(path, "wb");
  if (!file || std::fwrite(content.data(), 1, content.size(), file) != content.size() || std::fclose(file)) std::abort();
  try {
    const Model model = open_model(path, pool);
    int64_t sum = 0;
    const uint8_t* bytes = model.weights.embedding;
    for (int64_t i = 0; i < model.weight_bytes; ++i) sum += bytes[i];
    if (sum < 0) std::abort();
    munmap(const_cast<uint8_t*>(bytes) - kShapeBytes, static_cast<size_t>(kShapeBytes + model.weight_bytes));
  } catch (const Refused&) {
  }
}

}  // namespace

int main(int n_arguments, char** arguments) {
  if (n_arguments != 4) return 2;
  const int64_t first = std::atoll(arguments[1]), count = std::atoll(arguments[2]);
  ThreadPool pool(1);
  for (int64_t number = first; number < first + count; ++number) {
    if (number % 100000 == 0) std::printf("input %lld\n", static_cast<long long>(number)), std::fflush(stdout);
    Random random(static_cast<uint64_t>(number) * 0x9E3779B97F4A7C15u);
    number % 2 ? run_layer(random) : open_file(random, arguments[3], pool);
  }
  std::printf("tried %lld\n", static_cast<long long>(count));
}
