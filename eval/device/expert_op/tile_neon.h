// The tile kernels for 64-bit ARM: with the dot product instructions (SDOT, ARMv8.2), and with the matrix instructions
// (SMMLA, the extension I8MM). Both compute exact integers and then round as the portable kernel does.
//
// A run of 16 bytes holds 8 values along K of four rows of the tile: the low nibbles are two rows, and the high nibbles
// the other two. A nibble is at most 15, so it is a signed byte too.
#pragma once

#include <arm_neon.h>
#include <sys/auxv.h>

#include "tile_layout.h"

namespace mobilemoe {

#if defined(__clang__)
#define MOBILEMOE_DOT __attribute__((target("dotprod")))
#define MOBILEMOE_I8MM __attribute__((target("dotprod,i8mm")))
#else
#define MOBILEMOE_DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#define MOBILEMOE_I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#endif

// 8 values along K of the 8 rows of a tile, two rows in each vector: rows 0 1, 2 3, 4 5, 6 7.
inline void unpack_rows(const uint8_t* bytes, int8x16_t* pairs) {
  const uint8x16_t nibble = vdupq_n_u8(0xF), first = vld1q_u8(bytes), second = vld1q_u8(bytes + 16);
  pairs[0] = vreinterpretq_s8_u8(vandq_u8(first, nibble));
  pairs[1] = vreinterpretq_s8_u8(vshrq_n_u8(first, 4));
  pairs[2] = vreinterpretq_s8_u8(vandq_u8(second, nibble));
  pairs[3] = vreinterpretq_s8_u8(vshrq_n_u8(second, 4));
}

// Adds group g's part of a row of activations to its products with the tile's rows 0-3 and 4-7. `scales` points to the
// group's scales.
inline void add_group(int32x4_t low, int32x4_t high, const uint8_t* scales, const QuantizedRow& row, int64_t g,
                      float32x4_t* total) {
  const int32x4_t offset = vdupq_n_s32(8 * row.group_sums[g]);
  const uint16x8_t halves = vreinterpretq_u16_u8(vld1q_u8(scales));
  const float32x4_t low_scales = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves)));
  const float32x4_t high_scales = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves)));
  total[0] = vfmaq_f32(total[0], vcvtq_f32_s32(vsubq_s32(low, offset)), low_scales);
  total[1] = vfmaq_f32(total[1], vcvtq_f32_s32(vsubq_s32(high, offset)), high_scales);
}

// Writes a row of products. `row_sums` points to the sums of the tile's rows.
inline void store_row(const float32x4_t* total, const uint8_t* row_sums, const QuantizedRow& row, float* out) {
  const float zero = static_cast<float>(row.zero);
  for (int half = 0; half < 2; ++half) {
    const float32x4_t sums = vreinterpretq_f32_u8(vld1q_u8(row_sums + 16 * half));
    vst1q_f32(out + 4 * half, vmulq_n_f32(vfmsq_n_f32(total[half], sums, zero), row.scale));
  }
}

// SDOT adds up four neighbouring products in each lane. With 8 values of q twice in a vector, the lanes of a pair of
// rows a and b are a a b b, and the pairwise sums of two pairs are the four rows in order.
template <int M>
MOBILEMOE_DOT void block_neon_dot(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows,
                                  float* out) {
  const uint8_t* scales_at = tile + value_bytes(k);
  float32x4_t total[M][2];
  for (int i = 0; i < M; ++i) total[i][0] = total[i][1] = vdupq_n_f32(0.0f);
  constexpr int kUnrolled = M < 3 ? 4 : 1;  // runs of 8 values; with more rows the sums alone fill the registers
  const int64_t n_groups = k / group_size, n_steps = group_size / (8 * kUnrolled);
  int64_t start = 0;  // along K
  for (int64_t g = 0; g < n_groups; ++g) {
    int32x4_t dots[M][4];
    for (int i = 0; i < M; ++i) dots[i][0] = dots[i][1] = dots[i][2] = dots[i][3] = vdupq_n_s32(0);
    for (int64_t n = n_steps; n > 0; --n) {
      for (int j = 0; j < kUnrolled; ++j, start += 8, tile += kChunkBytes / 2) {
        int8x16_t pairs[4];
        unpack_rows(tile, pairs);
        for (int i = 0; i < M; ++i) {
          const int8x8_t eight = vld1_s8(rows[i].q + start);
          const int8x16_t q = vcombine_s8(eight, eight);
          for (int r = 0; r < 4; ++r) dots[i][r] = vdotq_s32(dots[i][r], pairs[r], q);
        }
      }
    }
    for (int i = 0; i < M; ++i) {
      add_group(vpaddq_s32(dots[i][0], dots[i][1]), vpaddq_s32(dots[i][2], dots[i][3]), scales_at, rows[i], g,
                total[i]);
    }
    scales_at += kScaleBytes;
  }
  for (int i = 0; i < M; ++i) store_row(total[i], scales_at, rows[i], out + i * kTileRows);
}

// SMMLA multiplies 2 x 8 values by 8 x 2. Of rows x and y of activations and rows a and b of the tile it gives the four
// sums xa xb ya yb, each over 8 values along K: twice the products of an SDOT.
template <int M>
MOBILEMOE_I8MM void block_neon_i8mm(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows,
                                    float* out) {
  static_assert(M % 2 == 0, "activations are taken in pairs of rows");
  const uint8_t* scales_at = tile + value_bytes(k);
  float32x4_t total[M][2];
  for (int i = 0; i < M; ++i) total[i][0] = total[i][1] = vdupq_n_f32(0.0f);
  const int64_t n_groups = k / group_size, n_steps = group_size / 32;
  int64_t start = 0;  // along K
  for (int64_t g = 0; g < n_groups; ++g) {
    int32x4_t dots[M / 2][4];
    for (int p = 0; p < M / 2; ++p) dots[p][0] = dots[p][1] = dots[p][2] = dots[p][3] = vdupq_n_s32(0);
    for (int64_t n = n_steps; n > 0; --n) {
      for (int j = 0; j < 4; ++j, start += 8, tile += kChunkBytes / 2) {  // unrolled by the compiler
        int8x16_t pairs[4];
        unpack_rows(tile, pairs);
        for (int p = 0; p < M / 2; ++p) {
          const int8_t *q = rows[2 * p].q + start, *next_q = rows[2 * p + 1].q + start;
          const int8x16_t both = vcombine_s8(vld1_s8(q), vld1_s8(next_q));
          for (int r = 0; r < 4; ++r) dots[p][r] = vmmlaq_s32(dots[p][r], both, pairs[r]);
        }
      }
    }
    for (int p = 0; p < M / 2; ++p) {
      int64x2_t sums[4];  // a lane is two sums: of row x with a pair of the tile's rows, and of row y
      for (int j = 0; j < 4; ++j) sums[j] = vreinterpretq_s64_s32(dots[p][j]);
      add_group(vreinterpretq_s32_s64(vzip1q_s64(sums[0], sums[1])), vreinterpretq_s32_s64(vzip1q_s64(sums[2], sums[3])),
                scales_at, rows[2 * p], g, total[2 * p]);
      add_group(vreinterpretq_s32_s64(vzip2q_s64(sums[0], sums[1])), vreinterpretq_s32_s64(vzip2q_s64(sums[2], sums[3])),
                scales_at, rows[2 * p + 1], g, total[2 * p + 1]);
    }
    scales_at += kScaleBytes;
  }
  for (int i = 0; i < M; ++i) store_row(total[i], scales_at, rows[i], out + i * kTileRows);
}

inline void tile_neon_dot(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows, int64_t n_rows,
                          float* out) {
  MOBILEMOE_IN_BLOCKS(block_neon_dot)
}

// An odd last row has no partner, so it takes the dot product.
inline void tile_neon_i8mm(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows,
                           int64_t n_rows, float* out) {
  int64_t i = 0;
  for (; i + 4 <= n_rows; i += 4) block_neon_i8mm<4>(tile, k, group_size, rows + i, out + i * kTileRows);
  if (n_rows - i >= 2) {
    block_neon_i8mm<2>(tile, k, group_size, rows + i, out + i * kTileRows);
    i += 2;
  }
  if (i < n_rows) block_neon_dot<1>(tile, k, group_size, rows + i, out + i * kTileRows);
}

// Linux tells in these bits what the processor has. They are numbers: old C libraries do not name the second one.
inline bool has_neon_dot() { return getauxval(AT_HWCAP) >> 20 & 1; }                     // HWCAP_ASIMDDP
inline bool has_neon_i8mm() { return has_neon_dot() && getauxval(AT_HWCAP2) >> 13 & 1; }  // HWCAP2_I8MM

#undef MOBILEMOE_DOT
#undef MOBILEMOE_I8MM

}  // namespace mobilemoe
