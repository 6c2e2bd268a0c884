// A packed matrix outside the experts: rows of it as numbers, and products with it. The embedding is such a matrix, and
// the output projection is the same one.
//
// ParallelFor is that of moe_layer.h. Shapes: T tokens, N rows of the matrix, K columns.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "moe_layer.h"
#include "tile_layout.h"

namespace mobilemoe {

struct PackedMatrix {
  const uint8_t* blob;  // blob_bytes(rows, k, group_size)
  int64_t rows, k, group_size;

  const uint8_t* tile(int64_t i) const { return blob + kHeaderBytes + i * tile_bytes(k, group_size); }
};

// Writes a row of the matrix.
inline void look_up(const PackedMatrix& matrix, int64_t row, float* out) {
  const uint8_t* tile = matrix.tile(row / kTileRows);
  const int in_tile = static_cast<int>(row % kTileRows);
  for (int64_t g = 0; g < matrix.k / matrix.group_size; ++g) {
    const float scale = read_scale(tile + value_bytes(matrix.k), in_tile, g);
    for (int64_t j = g * matrix.group_size; j < (g + 1) * matrix.group_size; ++j) {
      out[j] = scale * static_cast<float>(read_value(tile, in_tile, j));
    }
  }
}

template <class ParallelFor>
QuantizedRows quantize_rows(const float* x, int64_t T, int64_t k, int64_t group_size, const ParallelFor& parallel_for) {
  QuantizedRows rows(T, k, group_size);
  parallel_for(0, T, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) quantize_row(x + t * k, t, rows);
  });
  return rows;
}

// Writes the products of every row of x with every row of the matrix: out[t * N + n].
template <class ParallelFor>
void multiply(const PackedMatrix& matrix, const QuantizedRows& x, TileKernel kernel, const ParallelFor& parallel_for,
              float* out) {
  const int64_t T = static_cast<int64_t>(x.rows.size()), N = matrix.rows;
  parallel_for(0, (N + kTileRows - 1) / kTileRows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> product(T * kTileRows);
    for (int64_t tile = begin; tile < end; ++tile) {
      kernel(matrix.tile(tile), x.k, x.group_size, x.rows.data(), T, product.data());
      const int64_t first = tile * kTileRows, n = std::min<int64_t>(kTileRows, N - first);
      for (int64_t t = 0; t < T; ++t) std::memcpy(out + t * N + first, &product[t * kTileRows], sizeof(float) * n);
    }
  });
}

}  // namespace mobilemoe
