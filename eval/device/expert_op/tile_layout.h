// The layout of INT4 weight tiles, INT8 activation rows, and what a kernel that multiplies them is given.
//
// A tile is 8 rows of a weight matrix, which eval/device/expert_blobs.py writes: all values, in chunks of 16 along K, then
// 8 float16 scales for every group along K, then one float for every row. A chunk is 64 bytes, four runs of 16:
//   run 0: rows 0-3, k 0-7   run 1: rows 4-7, k 0-7   run 2: rows 0-3, k 8-15   run 3: rows 4-7, k 8-15
// In a run, the low nibbles are the first two rows (8 values each), and the high nibbles are the other two. A nibble is
// the value plus 8, so it is unsigned. The byte dot product instructions need one unsigned operand.
//
// With weights w = s_g * (n - 8) and activations x = scale * (q - zero), a row's product with x is
//   scale * (sum over groups g of s_g * (sum n * q  -  8 * sum q)  -  zero * sum w).
// The sums of q are stored with the activations, and the sum of the row's weights is its float in the tile.
#pragma once

#include <cstdint>
#include <cstring>

namespace mobilemoe {

constexpr int kTileRows = 8;
constexpr int kChunk = 16;
constexpr int kChunkBytes = kTileRows * kChunk / 2;
constexpr int kScaleBytes = 2 * kTileRows;  // a group's scales
constexpr int kSumBytes = 4 * kTileRows;    // the sums of the rows' weights
constexpr int64_t kHeaderBytes = 64;

inline int64_t value_bytes(int64_t k) { return kTileRows * k / 2; }

inline int64_t tile_bytes(int64_t k, int64_t group_size) {
  return value_bytes(k) + k / group_size * kScaleBytes + kSumBytes;
}

// The size of a packed matrix of `rows` rows; the last tile is full.
inline int64_t blob_bytes(int64_t rows, int64_t k, int64_t group_size) {
  return kHeaderBytes + (rows + kTileRows - 1) / kTileRows * tile_bytes(k, group_size);
}

// Value j along K of a row of a tile, -8 to 7.
inline int read_value(const uint8_t* tile, int row, int64_t j) {
  const uint8_t byte = tile[j / 8 * (kChunkBytes / 2) + row / 4 * 16 + row % 2 * 8 + j % 8];
  return (byte >> (row % 4 / 2 * 4) & 0xF) - 8;
}

// The number whose IEEE float16 bits are `half`, without the processor's own conversion. It is finite.
inline float to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half >> 15) << 31, magnitude = half & 0x7FFF;
  // As the bits of a float, the exponent is too small by 127 - 15; the product also makes subnormal numbers normal.
  const uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  return sign ? -value : value;
}

// The scale of a row in group g of a tile; `scales` points to the tile's scales.
inline float read_scale(const uint8_t* scales, int row, int64_t g) {
  uint16_t half;
  std::memcpy(&half, scales + g * kScaleBytes + 2 * row, 2);
  return to_float(half);
}

// A row of activations, x = scale * (q - zero).
struct QuantizedRow {
  const int8_t* q;            // [k]
  const int32_t* group_sums;  // [k / group_size], sums of q
  float scale;
  int32_t zero;
};

// A kernel writes out[i * 8 + r] = dot(row r of the tile, rows[i]) for i < n_rows; group_size is a multiple of 32.
using TileKernel = void (*)(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows, int64_t n_rows,
                            float* out);

// Rows are processed in blocks of four: the weights are unpacked once for four rows, and the sums of four rows still
// fit into the registers.
#define MOBILEMOE_IN_BLOCKS(block)                                                              \
  int64_t i = 0;                                                                                \
  for (; i + 4 <= n_rows; i += 4) block<4>(tile, k, group_size, rows + i, out + i * kTileRows); \
  switch (n_rows - i) {                                                                         \
    case 3: block<3>(tile, k, group_size, rows + i, out + i * kTileRows); break;                \
    case 2: block<2>(tile, k, group_size, rows + i, out + i * kTileRows); break;                \
    case 1: block<1>(tile, k, group_size, rows + i, out + i * kTileRows); break;                \
  }

}  // namespace mobilemoe
