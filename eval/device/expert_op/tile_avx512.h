// The tile kernel for x86 processors with AVX512-VNNI. tile_avx2.h says in which order the lanes hold the rows.
#pragma once

#include <immintrin.h>

#include "tile_layout.h"

namespace mobilemoe {

#define MOBILEMOE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

template <int M>
MOBILEMOE_AVX512 void block_avx512(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows,
                                   float* out) {
  const __m512i nibble = _mm512_set1_epi8(0xF);
  const __m512i halves = _mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1);  // k 0-7 for the first two runs, then k 8-15
  const __m512i low_rows = _mm512_setr_epi32(0, 0, 1, 1, 4, 4, 5, 5, 0, 0, 1, 1, 4, 4, 5, 5);
  const __m512i high_rows = _mm512_setr_epi32(2, 2, 3, 3, 6, 6, 7, 7, 2, 2, 3, 3, 6, 6, 7, 7);
  const uint8_t* scales_at = tile + value_bytes(k);
  __m512 low_total[M], high_total[M];
  __m256 corrections[M];
  for (int i = 0; i < M; ++i) {
    low_total[i] = high_total[i] = _mm512_setzero_ps();
    corrections[i] = _mm256_setzero_ps();
  }
  for (int64_t g = 0; g < k / group_size; ++g) {
    __m512i low[M], high[M];
    for (int i = 0; i < M; ++i) low[i] = high[i] = _mm512_setzero_si512();
    for (int64_t start = g * group_size; start < (g + 1) * group_size; start += kChunk, tile += kChunkBytes) {
      const __m512i bytes = _mm512_loadu_si512(tile);
      const __m512i low_nibbles = _mm512_and_si512(bytes, nibble);
      const __m512i high_nibbles = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
      for (int i = 0; i < M; ++i) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i].q + start));
        const __m512i q = _mm512_permutexvar_epi64(halves, _mm512_castsi128_si512(sixteen));
        low[i] = _mm512_dpbusd_epi32(low[i], low_nibbles, q);
        high[i] = _mm512_dpbusd_epi32(high[i], high_nibbles, q);
      }
    }
    const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales_at)));
    scales_at += kScaleBytes;
    const __m512 low_scales = _mm512_permutexvar_ps(low_rows, _mm512_castps256_ps512(scales));
    const __m512 high_scales = _mm512_permutexvar_ps(high_rows, _mm512_castps256_ps512(scales));
    for (int i = 0; i < M; ++i) {
      low_total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[i]), low_scales, low_total[i]);
      high_total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[i]), high_scales, high_total[i]);
      const __m256 offset = _mm256_set1_ps(static_cast<float>(8 * rows[i].group_sums[g]));
      corrections[i] = _mm256_fmadd_ps(offset, scales, corrections[i]);
    }
  }
  const __m256 row_sums = _mm256_loadu_ps(reinterpret_cast<const float*>(scales_at));
  for (int i = 0; i < M; ++i) {
    corrections[i] = _mm256_fmadd_ps(_mm256_set1_ps(static_cast<float>(rows[i].zero)), row_sums, corrections[i]);
    const __m256 low = _mm256_add_ps(_mm512_castps512_ps256(low_total[i]), _mm512_extractf32x8_ps(low_total[i], 1));
    const __m256 high = _mm256_add_ps(_mm512_castps512_ps256(high_total[i]), _mm512_extractf32x8_ps(high_total[i], 1));
    const __m256 total = _mm256_sub_ps(_mm256_hadd_ps(low, high), corrections[i]);
    _mm256_storeu_ps(out + i * kTileRows, _mm256_mul_ps(total, _mm256_set1_ps(rows[i].scale)));
  }
}

inline void tile_avx512(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows, int64_t n_rows,
                        float* out) {
  MOBILEMOE_IN_BLOCKS(block_avx512)
}

inline bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

#undef MOBILEMOE_AVX512

}  // namespace mobilemoe
