// The tile kernel in plain C++: the reference of the others, and the one that every processor has.
#pragma once

#include <cstring>

#include "tile_layout.h"

namespace mobilemoe {

inline void tile_portable(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows, int64_t n_rows,
                          float* out) {
  const int64_t n_groups = k / group_size;
  const uint8_t* scales = tile + value_bytes(k);
  float row_sums[kTileRows];
  std::memcpy(row_sums, scales + n_groups * kScaleBytes, sizeof(row_sums));
  std::memset(out, 0, sizeof(float) * n_rows * kTileRows);
  for (int64_t g = 0; g < n_groups; ++g, tile += value_bytes(group_size)) {
    for (int64_t i = 0; i < n_rows; ++i) {
      int32_t dots[kTileRows] = {};
      for (int64_t half = 0; half < group_size / 8; ++half) {  // 8 values along K: two runs
        const int8_t* q = rows[i].q + g * group_size + half * 8;
        const uint8_t* run = tile + half * 32;
        for (int r = 0; r < kTileRows; ++r) {
          const uint8_t* bytes = run + (r / 4) * 16 + (r % 2) * 8;
          const int shift = (r % 4) / 2 * 4;
          for (int j = 0; j < 8; ++j) dots[r] += ((bytes[j] >> shift) & 0xF) * q[j];
        }
      }
      const int32_t offset = 8 * rows[i].group_sums[g];
      for (int r = 0; r < kTileRows; ++r) {
        out[i * kTileRows + r] += read_scale(scales, r, g) * static_cast<float>(dots[r] - offset);
      }
    }
  }
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int r = 0; r < kTileRows; ++r) {
      float& product = out[i * kTileRows + r];
      product = rows[i].scale * (product - static_cast<float>(rows[i].zero) * row_sums[r]);
    }
  }
}

inline bool has_portable() { return true; }

}  // namespace mobilemoe
