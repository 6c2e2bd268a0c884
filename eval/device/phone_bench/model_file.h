// The file of a model: its shape as lines of text in the first 4,096 bytes, then its weights (or none, for random ones).
// eval/device/phone_bench/__init__.py writes it; read_shape below has the names of the lines.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "thread_pool.h"
#include "tile_layout.h"

namespace mobilemoe {

constexpr int64_t kShapeBytes = 4096, kAlignment = 64;
// The largest whole number of a shape, number of layers, and file: products of three such numbers do not overflow.
constexpr int64_t kMostSize = int64_t{1} << 20, kMostLayers = 4096, kMostBytes = int64_t{1} << 46;

[[noreturn]] inline void refuse(const std::string& reason) {
  std::fprintf(stderr, "%s\n", reason.c_str());
  std::exit(2);
}

// D model width, C width of a head, F width of an expert.
struct Shape {
  int64_t D, n_layers, n_heads, n_kv_heads, C, F, shared_F, E, K, vocabulary;
  int64_t group_size, embedding_group_size, expert_group_size;
  float norm_eps, route_scale;
  std::vector<float> rope_frequencies;  // [C / 2], radians a position

  int64_t qkv_rows() const { return (n_heads + 2 * n_kv_heads) * C; }
};

inline Shape read_shape(const std::string& text) {
  std::istringstream lines(text.c_str());  // up to the first zero byte
  std::string line, name;
  if (!std::getline(lines, line) || line != "mobilemoe-phone-bench 1") refuse("the model file has no shape of ours");
  std::map<std::string, std::vector<double>> found;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    words >> name;
    for (double value; words >> value;) found[name].push_back(value);
  }
  const auto one = [&](const char* key) {
    // A NaN is not above 0.
    if (found[key].size() != 1 || !(found[key][0] > 0)) refuse(std::string("the model file lacks a number: ") + key);
    return found[key][0];
  };
  const auto whole = [&](const char* key) {
    const double value = one(key);
    if (value > kMostSize || value != std::floor(value)) refuse(std::string("the model file: no such size: ") + key);
    return static_cast<int64_t>(value);
  };
  Shape shape{whole("d_model"), whole("n_layers"), whole("n_heads"), whole("n_kv_heads"), whole("head_dim"),
              whole("expert_hidden"), whole("shared_hidden"), whole("n_experts"), whole("top_k"), whole("vocab_size"),
              whole("group_size"), whole("embedding_group_size"), whole("expert_group_size"),
              static_cast<float>(one("norm_eps")), static_cast<float>(one("route_scale")), {}};
  for (double f : found["rope_frequencies"]) shape.rope_frequencies.push_back(static_cast<float>(f));
  if (static_cast<int64_t>(shape.rope_frequencies.size()) != shape.C / 2) refuse("rope_frequencies: not head_dim / 2");
  if (shape.n_layers > kMostLayers || shape.E > kMostSize / 16 || shape.K > shape.E ||
      shape.n_heads % shape.n_kv_heads) {
    refuse("the model file: layers, experts or heads that no model has");
  }
  const auto check_groups = [](int64_t group, std::initializer_list<int64_t> widths) {
    for (int64_t width : widths) {
      if (group % 32 || width % group) refuse("the model file: widths must be multiples of groups, groups of 32");
    }
  };
  check_groups(shape.embedding_group_size, {shape.D});
  check_groups(shape.group_size, {shape.D, shape.n_heads * shape.C, shape.shared_F});
  check_groups(shape.expert_group_size, {shape.D, shape.F});
  return shape;
}

enum class Kind { kPacked, kNorm, kRouter, kBias };

// A tensor of the file: `copies` packed matrices [rows, k] in groups of `group`, or floats [rows, k].
struct Part {
  Kind kind;
  int64_t rows, k, group, copies;
  int64_t offset;  // from the first byte of the weights

  int64_t bytes() const { return copies * (kind == Kind::kPacked ? blob_bytes(rows, k, group) : rows * k * 4); }
};

// The file's tensors in their order: embedding, last norm, and ten tensors of each layer.
inline std::vector<Part> list_parts(const Shape& s) {
  std::vector<Part> parts;
  int64_t offset = 0;
  const auto add = [&](Kind kind, int64_t rows, int64_t k, int64_t group = 0, int64_t copies = 1) {
    parts.push_back({kind, rows, k, group, copies, offset});
    offset = (offset + parts.back().bytes() + kAlignment - 1) / kAlignment * kAlignment;
    if (offset > kMostBytes) refuse("the model file: weights of more than " + std::to_string(kMostBytes) + " bytes");
  };
  add(Kind::kPacked, s.vocabulary, s.D, s.embedding_group_size);
  add(Kind::kNorm, 1, s.D);
  for (int64_t i = 0; i < s.n_layers; ++i) {
    add(Kind::kNorm, 1, s.D);
    add(Kind::kNorm, 1, s.D);
    add(Kind::kPacked, s.qkv_rows(), s.D, s.group_size);
    add(Kind::kPacked, s.D, s.n_heads * s.C, s.group_size);
    add(Kind::kRouter, s.E, s.D);
    add(Kind::kBias, 1, s.E);
    add(Kind::kPacked, 2 * s.shared_F, s.D, s.group_size);
    add(Kind::kPacked, s.D, s.shared_F, s.group_size);
    add(Kind::kPacked, 2 * s.F, s.D, s.expert_group_size, s.E);
    add(Kind::kPacked, s.D, s.F, s.expert_group_size, s.E);
  }
  return parts;
}

struct LayerWeights {
  const float *attention_norm, *ffn_norm;
  const uint8_t *qkv, *out;
  const float *router, *bias;
  const uint8_t *shared_w13, *shared_w2, *w13, *w2;
};

struct Weights {
  const uint8_t* embedding;
  const float* norm;
  std::vector<LayerWeights> layers;
};

inline Weights point_into(const uint8_t* base, const std::vector<Part>& parts) {
  const auto at = [&](size_t i) { return base + parts[i].offset; };
  const auto floats = [&](size_t i) { return reinterpret_cast<const float*>(at(i)); };
  Weights weights{at(0), floats(1), {}};
  for (size_t i = 2; i < parts.size(); i += 10) {
    weights.layers.push_back({floats(i), floats(i + 1), at(i + 2), at(i + 3), floats(i + 4), floats(i + 5), at(i + 6),
                              at(i + 7), at(i + 8), at(i + 9)});
  }
  return weights;
}

// Fills a packed matrix with random values; products with it keep the size of their input.
inline void fill_blob(uint8_t* blob, const Part& part, uint64_t seed) {
  // The largest power of two below 0.2 / sqrt(k), as the bits of a float16: an exponent, and a mantissa of zeros.
  const int exponent = static_cast<int>(std::floor(std::log2(0.2f / std::sqrt(static_cast<float>(part.k)))));
  const uint16_t scale = static_cast<uint16_t>(std::max(1, exponent + 15) << 10);
  const int64_t n_scales = kTileRows * (part.k / part.group);
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  uint8_t* at = blob + kHeaderBytes;
  for (int64_t tile = 0; tile < (part.rows + kTileRows - 1) / kTileRows; ++tile) {
    for (int64_t i = 0; i < value_bytes(part.k); i += 8) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;  // xorshift64
      std::memcpy(at + i, &state, 8);
    }
    float sums[kTileRows] = {};
    for (int r = 0; r < kTileRows; ++r) {
      int64_t sum = 0;
      for (int64_t j = 0; j < part.k; ++j) sum += read_value(at, r, j);
      sums[r] = to_float(scale) * static_cast<float>(sum);
    }
    at += value_bytes(part.k);
    for (int64_t i = 0; i < n_scales; ++i, at += sizeof(scale)) std::memcpy(at, &scale, sizeof(scale));
    std::memcpy(at, sums, sizeof(sums));
    at += kSumBytes;
  }
}

inline void fill_randomly(uint8_t* base, const std::vector<Part>& parts, ThreadPool& pool) {
  for (const Part& part : parts) {
    if (part.kind == Kind::kPacked) {
      const int64_t size = part.bytes() / part.copies;
      pool.parallel_for(0, part.copies, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) fill_blob(base + part.offset + i * size, part, part.offset + i);
      });
      continue;
    }
    float* values = reinterpret_cast<float*>(base + part.offset);
    for (int64_t i = 0; i < part.rows * part.k; ++i) {
      const float irregular = 0.1f * std::sin(12.9898f * static_cast<float>(i % 65537));
      values[i] = part.kind == Kind::kNorm ? 1.0f : part.kind == Kind::kRouter ? irregular : 0.0f;
    }
  }
}

struct Model {
  Shape shape;
  std::vector<Part> parts;
  Weights weights;
  int64_t weight_bytes;
  bool is_random;
};

// Maps the file's weights, or fills memory with random ones if it has only a shape.
inline Model open_model(const char* path, ThreadPool& pool) {
  const int file = open(path, O_RDONLY);
  struct stat about {};
  if (file < 0 || fstat(file, &about)) refuse(std::string(path) + ": cannot be opened");
  std::string text(kShapeBytes, '\0');
  if (pread(file, &text[0], kShapeBytes, 0) != kShapeBytes) refuse(std::string(path) + ": is shorter than a shape");
  Model model{read_shape(text), {}, {}, 0, about.st_size == kShapeBytes};
  model.parts = list_parts(model.shape);
  model.weight_bytes = model.parts.back().offset + model.parts.back().bytes();
  const int64_t n_bytes = kShapeBytes + model.weight_bytes;
  if (!model.is_random && about.st_size != n_bytes) {
    refuse(std::string(path) + ": has " + std::to_string(about.st_size) + " bytes, its shape needs " +
           std::to_string(n_bytes) + "; write it again");
  }
  void* memory = model.is_random
                     ? mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                     : mmap(nullptr, n_bytes, PROT_READ, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) refuse(std::to_string(n_bytes) + " bytes of memory could not be had");
  close(file);
  uint8_t* base = static_cast<uint8_t*>(memory) + kShapeBytes;
  if (model.is_random) fill_randomly(base, model.parts, pool);
  model.weights = point_into(base, model.parts);
  return model;
}

}  // namespace mobilemoe
