// mobilemoe::quantized_moe_ffn: an MoE layer's router and routed experts as one ExecuTorch operator.
//
// It takes the arguments and packed weights of ExecuTorch's own llama::quantized_moe_ffn, whose x86 build dequantizes
// every active expert at every call. Before both products, activations are rounded to asymmetric INT8 with a range for
// each token, as in torchao's ARM kernels and quantization-aware training. Router and weighting are float32.
//
// Shapes: T tokens, D model width, F expert width, E experts, K experts a token; R = T * K rows sorted by expert.

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <limits>
#include <vector>

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "tile_kernels.h"

#if defined(__x86_64__)
#define MOBILEMOE_FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOBILEMOE_FOR_EACH_CPU
#endif

namespace mobilemoe {

using executorch::extension::parallel_for;

struct Layer {
  int64_t T, D, F, E, K, group_size;
  const float* x;            // [T, D]
  const float* gate;         // [E, D]
  const float* bias;         // [E], or nullptr
  const uint8_t* w13;        // [E, w13_bytes]: gate rows, then up rows, of D values
  const uint8_t* w2;         // [E, w2_bytes]: D rows of F values
  int64_t w13_bytes, w2_bytes;
  float route_scale;
  float* out;                // [T, D]
};

// Rows of quantized activations; owns the memory to which each QuantizedRow points.
struct QuantizedRows {
  QuantizedRows(int64_t n, int64_t k, int64_t group_size)
      : k(k), group_size(group_size), q(n * k), group_sums(n * (k / group_size)), rows(n) {}
  int64_t k, group_size;
  std::vector<int8_t> q;
  std::vector<int32_t> group_sums;
  std::vector<QuantizedRow> rows;
};

// Quantizes row i on the grid of titan_ext/quantization/formulas.py (quantize_int8), which is that of torchao's
// choose_qparams_affine(ASYMMETRIC, int8): the grid contains 0, and the scale is at least the smallest normal float,
// whose reciprocal is finite.
MOBILEMOE_FOR_EACH_CPU
void quantize_row(const float* x, int64_t i, QuantizedRows& out) {
  float low = 0.0f, high = 0.0f;
  for (int64_t j = 0; j < out.k; ++j) {
    low = std::min(low, x[j]);
    high = std::max(high, x[j]);
  }
  const float scale = std::max((high - low) / 255.0f, std::numeric_limits<float>::min()), inverse = 1.0f / scale;
  const float zero = std::min(127.0f, std::max(-128.0f, -128.0f - std::rint(low / scale)));
  int8_t* q = out.q.data() + i * out.k;
  for (int64_t j = 0; j < out.k; ++j) {
    q[j] = static_cast<int8_t>(std::min(127.0f, std::max(-128.0f, std::rint(x[j] * inverse) + zero)));
  }
  const int64_t n_groups = out.k / out.group_size;
  int32_t* sums = out.group_sums.data() + i * n_groups;
  for (int64_t g = 0; g < n_groups; ++g) {
    int32_t sum = 0;
    for (int64_t j = 0; j < out.group_size; ++j) sum += q[g * out.group_size + j];
    sums[g] = sum;
  }
  out.rows[i] = {q, sums, scale, static_cast<int32_t>(zero)};
}

// Writes scores[e] = sigmoid(dot(gate[e], x)).
MOBILEMOE_FOR_EACH_CPU
void score_token(const float* x, const float* gate, int64_t E, int64_t D, float* scores) {
  for (int64_t e = 0; e < E; ++e) {
    float sum = 0.0f;
    for (int64_t d = 0; d < D; ++d) sum += gate[e * D + d] * x[d];
    scores[e] = 1.0f / (1.0f + std::exp(-sum));
  }
}

// Writes the K experts with the highest score + bias (in a tie, the lower index) and their weights: the unbiased
// scores, normalized to a sum of route_scale.
void choose_experts(const Layer& layer, const float* scores, int32_t* experts, float* weights) {
  std::vector<char> taken(layer.E, 0);
  float sum = 0.0f;
  for (int64_t k = 0; k < layer.K; ++k) {
    int64_t best = -1;
    float best_score = 0.0f;
    for (int64_t e = 0; e < layer.E; ++e) {
      const float score = scores[e] + (layer.bias ? layer.bias[e] : 0.0f);
      if (!taken[e] && (best < 0 || score > best_score)) {
        best = e;
        best_score = score;
      }
    }
    taken[best] = 1;
    experts[k] = static_cast<int32_t>(best);
    weights[k] = scores[best];
    sum += scores[best];
  }
  for (int64_t k = 0; k < layer.K; ++k) weights[k] *= layer.route_scale / std::max(sum, 1.17549435e-38f);
}

// The (token, expert) pairs, sorted by expert.
struct Routing {
  std::vector<int64_t> active;   // experts that have tokens, ascending
  std::vector<int64_t> offsets;  // [E + 1], the first row of each expert
  std::vector<int64_t> token;    // [R], index of each row's token
  std::vector<float> weight;     // [R], routing weight of each row
  int64_t most_rows = 0;         // largest number of rows of one expert
};

Routing route(const Layer& layer) {
  const int64_t T = layer.T, E = layer.E, K = layer.K;
  std::vector<int32_t> experts_TK(T * K);
  std::vector<float> weights_TK(T * K);
  parallel_for(0, T, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> scores_E(E);
    for (int64_t t = begin; t < end; ++t) {
      score_token(layer.x + t * layer.D, layer.gate, E, layer.D, scores_E.data());
      choose_experts(layer, scores_E.data(), &experts_TK[t * K], &weights_TK[t * K]);
    }
  });
  Routing routing;
  routing.offsets.assign(E + 1, 0);
  for (int32_t e : experts_TK) ++routing.offsets[e + 1];
  for (int64_t e = 0; e < E; ++e) {
    if (routing.offsets[e + 1]) routing.active.push_back(e);
    routing.most_rows = std::max(routing.most_rows, routing.offsets[e + 1]);
    routing.offsets[e + 1] += routing.offsets[e];
  }
  routing.token.resize(T * K);
  routing.weight.resize(T * K);
  std::vector<int64_t> next(routing.offsets.begin(), routing.offsets.end() - 1);
  for (int64_t i = 0; i < T * K; ++i) {
    const int64_t row = next[experts_TK[i]]++;
    routing.token[row] = i / K;
    routing.weight[row] = weights_TK[i];
  }
  return routing;
}

MOBILEMOE_FOR_EACH_CPU
void swiglu(const float* gate, const float* up, int64_t n_rows, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int r = 0; r < kTileRows; ++r) {
      const float g = gate[i * kTileRows + r];
      out[i * out_stride + r] = g / (1.0f + std::exp(-g)) * up[i * kTileRows + r];
    }
  }
}

std::atomic<int64_t> experts_read{0};

void moe_ffn(const Layer& layer, TileKernel kernel) {
  const int64_t T = layer.T, D = layer.D, F = layer.F, R = T * layer.K;
  const Routing routing = route(layer);
  const int64_t n_active = static_cast<int64_t>(routing.active.size());
  experts_read += n_active;

  QuantizedRows x(T, D, layer.group_size);
  parallel_for(0, T, 32, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) quantize_row(layer.x + t * D, t, x);
  });
  std::vector<QuantizedRow> x_rows(R);
  for (int64_t r = 0; r < R; ++r) x_rows[r] = x.rows[routing.token[r]];

  // Gate and up products of the same 8 columns of F, and SwiGLU.
  std::vector<float> hidden_RF(R * F);
  const int64_t x_tile = tile_bytes(D, layer.group_size), f_tiles = F / kTileRows;
  parallel_for(0, n_active * f_tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> gate(routing.most_rows * kTileRows), up(routing.most_rows * kTileRows);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = routing.active[i / f_tiles], tile = i % f_tiles, first = routing.offsets[e];
      const int64_t n_rows = routing.offsets[e + 1] - first;
      const uint8_t* weights = layer.w13 + e * layer.w13_bytes + kHeaderBytes;
      kernel(weights + tile * x_tile, D, layer.group_size, &x_rows[first], n_rows, gate.data());
      kernel(weights + (f_tiles + tile) * x_tile, D, layer.group_size, &x_rows[first], n_rows, up.data());
      swiglu(gate.data(), up.data(), n_rows, &hidden_RF[first * F + tile * kTileRows], F);
    }
  });

  QuantizedRows hidden(R, F, layer.group_size);
  parallel_for(0, R, 32, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) quantize_row(&hidden_RF[r * F], r, hidden);
  });

  // Down products. A thread owns complete columns of the output, so no two threads add to the same element.
  const int64_t hidden_tile = tile_bytes(F, layer.group_size);
  parallel_for(0, D / kTileRows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> product(routing.most_rows * kTileRows);
    for (int64_t t = 0; t < T; ++t) {
      std::fill(layer.out + t * D + begin * kTileRows, layer.out + t * D + end * kTileRows, 0.0f);
    }
    for (int64_t e : routing.active) {
      const int64_t first = routing.offsets[e], n_rows = routing.offsets[e + 1] - first;
      const uint8_t* weights = layer.w2 + e * layer.w2_bytes + kHeaderBytes;
      for (int64_t tile = begin; tile < end; ++tile) {
        kernel(weights + tile * hidden_tile, F, layer.group_size, &hidden.rows[first], n_rows, product.data());
        for (int64_t i = 0; i < n_rows; ++i) {
          float* out = layer.out + routing.token[first + i] * D + tile * kTileRows;
          for (int r = 0; r < kTileRows; ++r) out[r] += routing.weight[first + i] * product[i * kTileRows + r];
        }
      }
    }
  });
}

const char* best_kernel() {
  for (const char* name : {"avx512_vnni", "avx2"}) {
    if (find_kernel(name)) return name;
  }
  return "portable";
}

const TileKernel chosen_kernel = find_kernel(best_kernel());

using executorch::aten::ScalarType;
using executorch::aten::string_view;
using executorch::aten::Tensor;
using executorch::runtime::Error;

constexpr int64_t kMostSize = int64_t{1} << 20;

Tensor& quantized_moe_ffn_out(executorch::runtime::KernelRuntimeContext& ctx, const Tensor& x, const Tensor& gate_weight,
                              const Tensor& expert_bias, const Tensor& packed_w13, const Tensor& packed_w2,
                              int64_t num_activated_experts, int64_t num_experts, int64_t hidden_dim, int64_t dim,
                              int64_t group_size, int64_t weight_nbit, string_view score_func, double route_scale,
                              Tensor& out) {
  const int64_t D = dim, F = hidden_dim, E = num_experts;
  // Bounds first: the products below must not overflow.
  ET_KERNEL_CHECK_MSG(ctx, D > 0 && F > 0 && E > 0 && D < kMostSize && F < kMostSize && E < kMostSize, InvalidArgument,
                      out, "dim, hidden_dim and num_experts must be positive and below 2^20");
  ET_KERNEL_CHECK_MSG(ctx, weight_nbit == 4 && score_func == "sigmoid", InvalidArgument, out,
                      "mobilemoe::quantized_moe_ffn takes 4-bit weights and sigmoid routing only");
  ET_KERNEL_CHECK_MSG(ctx, group_size > 0 && group_size % 32 == 0 && D % group_size == 0 && F % group_size == 0,
                      InvalidArgument, out, "dim and hidden_dim must be multiples of group_size, and that of 32");
  const int64_t w13_bytes = kHeaderBytes + 2 * F / kTileRows * tile_bytes(D, group_size);
  const int64_t w2_bytes = kHeaderBytes + D / kTileRows * tile_bytes(F, group_size);
  // The runtime hands over pointers of any type, so a wrong one would be read as what is expected here.
  ET_KERNEL_CHECK_MSG(ctx,
                      x.scalar_type() == ScalarType::Float && gate_weight.scalar_type() == ScalarType::Float &&
                          expert_bias.scalar_type() == ScalarType::Float && out.scalar_type() == ScalarType::Float &&
                          packed_w13.scalar_type() == ScalarType::Byte && packed_w2.scalar_type() == ScalarType::Byte,
                      InvalidArgument, out, "x, gate_weight, expert_bias and out are float, the packed weights uint8");
  ET_KERNEL_CHECK_MSG(
      ctx,
      x.dim() == 2 && x.size(1) == D && gate_weight.numel() == E * D &&
          (expert_bias.numel() == 0 || expert_bias.numel() == E) && num_activated_experts > 0 &&
          num_activated_experts <= E && packed_w13.numel() == E * w13_bytes && packed_w2.numel() == E * w2_bytes,
      InvalidArgument, out, "tensor shapes do not fit the layer's dimensions");
  const int64_t T = x.size(0);
  const Tensor::SizesType sizes[2] = {static_cast<Tensor::SizesType>(T), static_cast<Tensor::SizesType>(D)};
  ET_KERNEL_CHECK(ctx, executorch::runtime::resize_tensor(out, {sizes, 2}) == Error::Ok, InvalidArgument, out);
  const float* bias = expert_bias.numel() ? expert_bias.const_data_ptr<float>() : nullptr;
  moe_ffn({T, D, F, E, num_activated_experts, group_size, x.const_data_ptr<float>(),
           gate_weight.const_data_ptr<float>(), bias, packed_w13.const_data_ptr<uint8_t>(),
           packed_w2.const_data_ptr<uint8_t>(), w13_bytes, w2_bytes, static_cast<float>(route_scale),
           out.mutable_data_ptr<float>()},
          chosen_kernel);
  return out;
}

}  // namespace mobilemoe

EXECUTORCH_LIBRARY(mobilemoe, "quantized_moe_ffn.out", mobilemoe::quantized_moe_ffn_out);

// The functions that Python calls through ctypes (eval/device/expert_op/__init__.py).
extern "C" {

const char* mobilemoe_kernel() { return mobilemoe::best_kernel(); }

// Returns the number of experts read since the library was loaded; an expert counts once for each layer and call.
int64_t mobilemoe_experts_read() { return mobilemoe::experts_read; }

// Computes the layer with the kernel of this name. Returns 1 if this processor does not have it, else 0.
int mobilemoe_run(const char* kernel_name, int64_t T, int64_t D, int64_t F, int64_t E, int64_t K, int64_t group_size,
                  const float* x, const float* gate, const float* bias, const uint8_t* w13, const uint8_t* w2,
                  double route_scale, float* out) {
  using namespace mobilemoe;
  const TileKernel kernel = find_kernel(kernel_name);
  if (!kernel) return 1;
  const int64_t w13_bytes = kHeaderBytes + 2 * F / kTileRows * tile_bytes(D, group_size);
  const int64_t w2_bytes = kHeaderBytes + D / kTileRows * tile_bytes(F, group_size);
  moe_ffn({T, D, F, E, K, group_size, x, gate, bias, w13, w2, w13_bytes, w2_bytes, static_cast<float>(route_scale), out},
          kernel);
  return 0;
}
}
