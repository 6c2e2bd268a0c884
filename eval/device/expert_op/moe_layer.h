// The arithmetic of an MoE layer's router and routed experts, without any of ExecuTorch: the operator and programs
// without a runtime share it.
//
// Before both products, activations are rounded to asymmetric INT8 with a range for each token, as in torchao's ARM
// kernels and quantization-aware training. Router and weighting are float32.
//
// ParallelFor is called as parallel_for(begin, end, grain, f) and calls f(b, e) for ranges that cover [begin, end), on
// any threads, before it returns.
//
// Shapes: T tokens, D model width, F expert width, E experts, K experts a token; R = T * K rows sorted by expert.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "tile_layout.h"

#if defined(__x86_64__)
#define MOBILEMOE_FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOBILEMOE_FOR_EACH_CPU
#endif

namespace mobilemoe {

struct Layer {
  int64_t T, D, F, E, K, group_size;
  const float* x;      // [T, D]
  const float* gate;   // [E, D]
  const float* bias;   // [E], or nullptr
  const uint8_t* w13;  // [E, w13_bytes()]: gate rows, then up rows, of D values
  const uint8_t* w2;   // [E, w2_bytes()]: D rows of F values
  float route_scale;
  float* out;          // [T, D]

  int64_t w13_bytes() const { return blob_bytes(2 * F, D, group_size); }
  int64_t w2_bytes() const { return blob_bytes(D, F, group_size); }
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
inline void quantize_row(const float* x, int64_t i, QuantizedRows& out) {
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
inline void score_token(const float* x, const float* gate, int64_t E, int64_t D, float* scores) {
  for (int64_t e = 0; e < E; ++e) {
    float sum = 0.0f;
    for (int64_t d = 0; d < D; ++d) sum += gate[e * D + d] * x[d];
    scores[e] = 1.0f / (1.0f + std::exp(-sum));
  }
}

// Writes the K experts with the highest score + bias (in a tie, the lower index) and their weights: the unbiased
// scores, normalized to a sum of route_scale.
inline void choose_experts(const Layer& layer, const float* scores, int32_t* experts, float* weights) {
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

template <class ParallelFor>
Routing route(const Layer& layer, const ParallelFor& parallel_for) {
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
inline void swiglu(const float* gate, const float* up, int64_t n_rows, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int r = 0; r < kTileRows; ++r) {
      const float g = gate[i * kTileRows + r];
      out[i * out_stride + r] = g / (1.0f + std::exp(-g)) * up[i * kTileRows + r];
    }
  }
}

// Computes the layer and returns the number of experts that it read.
template <class ParallelFor>
int64_t moe_ffn(const Layer& layer, TileKernel kernel, const ParallelFor& parallel_for) {
  const int64_t T = layer.T, D = layer.D, F = layer.F, R = T * layer.K;
  const Routing routing = route(layer, parallel_for);
  const int64_t n_active = static_cast<int64_t>(routing.active.size());

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
      const uint8_t* weights = layer.w13 + e * layer.w13_bytes() + kHeaderBytes;
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
      const uint8_t* weights = layer.w2 + e * layer.w2_bytes() + kHeaderBytes;
      for (int64_t tile = begin; tile < end; ++tile) {
        kernel(weights + tile * hidden_tile, F, layer.group_size, &hidden.rows[first], n_rows, product.data());
        for (int64_t i = 0; i < n_rows; ++i) {
          float* out = layer.out + routing.token[first + i] * D + tile * kTileRows;
          for (int r = 0; r < kTileRows; ++r) out[r] += routing.weight[first + i] * product[i * kTileRows + r];
        }
      }
    }
  });
  return n_active;
}

}  // namespace mobilemoe
