// The tile kernel in plain C++: the reference of the others, and the one that every processor has.
#pragma once

#include <cstring>

#include "tile_layout.h"

namespace mobilemoe {

inline void tile_portable(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows, int64_t n_rows,
                          float* out) {
  const int64_t n_groups = k / group_size, value_bytes = kTileRows * group_size / 2;
  std::memset(out, 0, sizeof(float) * n_rows * kTileRows);
  for (int64_t g = 0; g < n_groups; ++g) {
    float scales[kTileRows];
    int32_t sums[kTileRows];
    std::memcpy(scales, tile + value_bytes, sizeof(scales));
    std::memcpy(sums, tile + value_bytes + sizeof(scales), sizeof(sums));
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
      const int32_t row_sum = 8 * rows[i].group_sums[g];
      for (int r = 0; r < kTileRows; ++r) {
        out[i * kTileRows + r] += scales[r] * static_cast<float>(dots[r] - row_sum - rows[i].zero * sums[r]);
      }
    }
    tile += value_bytes + kTailBytes;
  }
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int r = 0; r < kTileRows; ++r) out[i * kTileRows + r] *= rows[i].scale;
  }
}

inline bool has_portable() { return true; }

}  // namespace mobilemoe
