// A MobileMoE's forward pass over packed weights: what eval/hf_mobilemoe/modeling_mobilemoe.py computes, with
// activations rounded to INT8 in front of every product but the router's, as on the device.
//
// Shapes: T tokens, D model width, C width of a head.
#pragma once

#include <cstring>

#include "model_file.h"
#include "moe_layer.h"
#include "packed_matrix.h"

namespace mobilemoe {

inline void normalize(const float* x, const float* weight, int64_t n, float eps, float* out) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * (weight ? weight[i] : 1.0f);
}

// Softmax attention of one query over `n` positions, whose keys and values are `stride` apart. `scores` has n places.
MOBILEMOE_FOR_EACH_CPU
inline void attend(const float* q, const float* keys, const float* values, int64_t n, int64_t stride, int64_t C,
                   float* scores, float* out) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(C));
  float most = -std::numeric_limits<float>::max(), sum = 0.0f;
  for (int64_t j = 0; j < n; ++j) {
    float dot = 0.0f;
    for (int64_t c = 0; c < C; ++c) dot += q[c] * keys[j * stride + c];
    scores[j] = dot * scale;
    most = std::max(most, scores[j]);
  }
  std::fill(out, out + C, 0.0f);
  for (int64_t j = 0; j < n; ++j) {
    const float weight = std::exp(scores[j] - most);
    sum += weight;
    for (int64_t c = 0; c < C; ++c) out[c] += weight * values[j * stride + c];
  }
  for (int64_t c = 0; c < C; ++c) out[c] /= sum;
}

class Decoder {
 public:
  // The KV cache has `context` positions in float32.
  Decoder(const Model& model, TileKernel kernel, ThreadPool& pool, int64_t context)
      : model_(model), s_(model.shape), kernel_(kernel), pool_(pool), context_(context), kv_(s_.n_kv_heads * s_.C),
        keys_(s_.n_layers * context * kv_), values_(s_.n_layers * context * kv_), no_gate_(s_.D) {}

  // Computes T tokens from `position` on and returns the logits of the last one; positions before it are in the cache.
  const std::vector<float>& forward(const int64_t* tokens, int64_t T, int64_t position) {
    std::vector<float> x(T * s_.D);
    const PackedMatrix embedding{model_.weights.embedding, s_.vocabulary, s_.D, s_.embedding_group_size};
    for (int64_t t = 0; t < T; ++t) look_up(embedding, tokens[t], &x[t * s_.D]);
    for (int64_t i = 0; i < s_.n_layers; ++i) {
      add_attention(i, position, T, x);
      add_experts(model_.weights.layers[i], T, x);
    }
    std::vector<float> last(s_.D);
    normalize(&x[(T - 1) * s_.D], model_.weights.norm, s_.D, s_.norm_eps, last.data());
    logits_ = multiply(embedding.blob, s_.vocabulary, last, s_.D, s_.embedding_group_size);
    return logits_;
  }

  int64_t cache_bytes_a_position() const { return s_.n_layers * 2 * kv_ * 4; }

 private:
  // Returns x [T, k] times the packed matrix [n_rows, k], with x rounded to INT8: [T, n_rows].
  std::vector<float> multiply(const uint8_t* blob, int64_t n_rows, const std::vector<float>& x, int64_t k,
                              int64_t group_size) {
    const auto in_parallel = [&](int64_t begin, int64_t end, int64_t grain, const auto& f) {
      pool_.parallel_for(begin, end, grain, f);
    };
    const int64_t T = static_cast<int64_t>(x.size()) / k;
    const QuantizedRows rows = quantize_rows(x.data(), T, k, group_size, in_parallel);
    std::vector<float> out(T * n_rows);
    mobilemoe::multiply({blob, n_rows, k, group_size}, rows, kernel_, in_parallel, out.data());
    return out;
  }

  // Rotates neighbouring channels, then normalizes a head without weights.
  void rotate_and_normalize(const float* x, int64_t position, float* out) const {
    std::vector<float> rotated(s_.C);
    for (int64_t c = 0; c < s_.C; c += 2) {
      const float angle = static_cast<float>(position) * s_.rope_frequencies[c / 2];
      const float cosine = std::cos(angle), sine = std::sin(angle);
      rotated[c] = x[c] * cosine - x[c + 1] * sine;
      rotated[c + 1] = x[c] * sine + x[c + 1] * cosine;
    }
    normalize(rotated.data(), nullptr, s_.C, s_.norm_eps, out);
  }

  std::vector<float> normalize_all(const std::vector<float>& x, const float* weight) const {
    std::vector<float> out(x.size());
    for (size_t i = 0; i < x.size(); i += s_.D) normalize(&x[i], weight, s_.D, s_.norm_eps, &out[i]);
    return out;
  }

  void add_attention(int64_t i_layer, int64_t position, int64_t T, std::vector<float>& x) {
    const LayerWeights& layer = model_.weights.layers[i_layer];
    const int64_t H = s_.n_heads, N = s_.n_kv_heads, C = s_.C;
    const int64_t stride = s_.qkv_rows();
    const auto qkv = multiply(layer.qkv, stride, normalize_all(x, layer.attention_norm), s_.D, s_.group_size);
    float *keys = &keys_[i_layer * context_ * kv_], *values = &values_[i_layer * context_ * kv_];
    for (int64_t t = 0; t < T; ++t) {
      const float* k = &qkv[t * stride + H * C];
      for (int64_t n = 0; n < N; ++n) {
        rotate_and_normalize(k + n * C, position + t, keys + (position + t) * kv_ + n * C);
      }
      std::memcpy(values + (position + t) * kv_, k + kv_, sizeof(float) * kv_);
    }
    std::vector<float> heads(T * H * C);
    pool_.parallel_for(0, T * H, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> q(C), scores(position + T);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / H, h = i % H, first = h / (H / N) * C;
        rotate_and_normalize(&qkv[t * stride + h * C], position + t, q.data());
        attend(q.data(), keys + first, values + first, position + t + 1, kv_, C, scores.data(), &heads[i * C]);
      }
    });
    add(multiply(layer.out, s_.D, heads, H * C, s_.group_size), x);
  }

  void add_experts(const LayerWeights& layer, int64_t T, std::vector<float>& x) {
    const std::vector<float> normed = normalize_all(x, layer.ffn_norm);
    std::vector<float> routed(x.size()), shared(x.size());
    const auto in_parallel = [&](int64_t begin, int64_t end, int64_t grain, const auto& f) {
      pool_.parallel_for(begin, end, grain, f);
    };
    moe_ffn({T, s_.D, s_.F, s_.E, s_.K, s_.expert_group_size, normed.data(), layer.router, layer.bias, layer.w13,
             layer.w2, s_.route_scale, routed.data()},
            kernel_, in_parallel);
    // The shared expert is a layer of one expert, whose weight is 1 whatever its score.
    moe_ffn({T, s_.D, s_.shared_F, 1, 1, s_.group_size, normed.data(), no_gate_.data(), nullptr, layer.shared_w13,
             layer.shared_w2, 1.0f, shared.data()},
            kernel_, in_parallel);
    add(routed, x);
    add(shared, x);
  }

  // Adds y to x, both [T, D].
  static void add(const std::vector<float>& y, std::vector<float>& x) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }

  const Model& model_;
  const Shape& s_;
  const TileKernel kernel_;
  ThreadPool& pool_;
  const int64_t context_, kv_;
  std::vector<float> keys_, values_;  // [layer, position, key/value head, C]
  const std::vector<float> no_gate_;
  std::vector<float> logits_;
};

}  // namespace mobilemoe
