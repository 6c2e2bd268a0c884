// The tile kernel for x86 processors with AVX2.
//
// This kernel and the one for AVX512-VNNI keep partial sums in the lane order of the layout. After the sums over four k
// of one 256-bit half of a chunk, the low nibbles are rows 0 0 1 1 | 4 4 5 5 and the high nibbles are rows 2 2 3 3 |
// 6 6 7 7. _mm256_hadd_ps of the two then yields rows 0 1 2 3 | 4 5 6 7.
#pragma once

#include <cstring>
#include <immintrin.h>

#include "tile_layout.h"

namespace mobilemoe {

#define MOBILEMOE_AVX2 __attribute__((target("avx2,fma,f16c")))

template <int M>
MOBILEMOE_AVX2 void block_avx2(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows,
                               float* out) {
  const __m256i nibble = _mm256_set1_epi8(0xF), ones = _mm256_set1_epi16(1);
  const __m256i low_rows = _mm256_setr_epi32(0, 0, 1, 1, 4, 4, 5, 5);
  const __m256i high_rows = _mm256_setr_epi32(2, 2, 3, 3, 6, 6, 7, 7);
  const uint8_t* scales_at = tile + value_bytes(k);
  __m256 low_total[M], high_total[M], corrections[M];
  for (int i = 0; i < M; ++i) low_total[i] = high_total[i] = corrections[i] = _mm256_setzero_ps();
  for (int64_t g = 0; g < k / group_size; ++g) {
    __m256i low[M], high[M];
    for (int i = 0; i < M; ++i) low[i] = high[i] = _mm256_setzero_si256();
    for (int64_t start = g * group_size; start < (g + 1) * group_size; start += 32) {
      // A 16-bit sum has 8 products of at most 15 * 128, so it cannot overflow within 32 values along K.
      __m256i low16[M], high16[M];
      for (int i = 0; i < M; ++i) low16[i] = high16[i] = _mm256_setzero_si256();
      for (int half = 0; half < 4; ++half, tile += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile));
        const __m256i low_nibbles = _mm256_and_si256(bytes, nibble);
        const __m256i high_nibbles = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        for (int i = 0; i < M; ++i) {
          int64_t eight;
          std::memcpy(&eight, rows[i].q + start + half * 8, 8);
          const __m256i q = _mm256_set1_epi64x(eight);
          low16[i] = _mm256_add_epi16(low16[i], _mm256_maddubs_epi16(low_nibbles, q));
          high16[i] = _mm256_add_epi16(high16[i], _mm256_maddubs_epi16(high_nibbles, q));
        }
      }
      for (int i = 0; i < M; ++i) {
        low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(low16[i], ones));
        high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(high16[i], ones));
      }
    }
    const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales_at)));
    scales_at += kScaleBytes;
    const __m256 low_scales = _mm256_permutevar8x32_ps(scales, low_rows);
    const __m256 high_scales = _mm256_permutevar8x32_ps(scales, high_rows);
    for (int i = 0; i < M; ++i) {
      low_total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low[i]), low_scales, low_total[i]);
      high_total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high[i]), high_scales, high_total[i]);
      const __m256 offset = _mm256_set1_ps(static_cast<float>(8 * rows[i].group_sums[g]));
      corrections[i] = _mm256_fmadd_ps(offset, scales, corrections[i]);
    }
  }
  const __m256 row_sums = _mm256_loadu_ps(reinterpret_cast<const float*>(scales_at));
  for (int i = 0; i < M; ++i) {
    corrections[i] = _mm256_fmadd_ps(_mm256_set1_ps(static_cast<float>(rows[i].zero)), row_sums, corrections[i]);
    const __m256 total = _mm256_sub_ps(_mm256_hadd_ps(low_total[i], high_total[i]), corrections[i]);
    _mm256_storeu_ps(out + i * kTileRows, _mm256_mul_ps(total, _mm256_set1_ps(rows[i].scale)));
  }
}

inline void tile_avx2(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows, int64_t n_rows,
                      float* out) {
  MOBILEMOE_IN_BLOCKS(block_avx2)
}

inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

#undef MOBILEMOE_AVX2

}  // namespace mobilemoe
