// Dot products of INT4 weight tiles with INT8 activation rows: AVX512-VNNI, AVX2 and portable C++.
//
// A tile is 8 rows of a weight matrix in the "universal" layout of torchao's 8-bit-activation kernels, which
// eval/device/expert_blobs.py writes. For every group along K it has the values, in chunks of 16 along K, then 8 float
// scales, then 8 int32 sums of the group's values. A chunk is 64 bytes, four runs of 16:
//   run 0: rows 0-3, k 0-7   run 1: rows 4-7, k 0-7   run 2: rows 0-3, k 8-15   run 3: rows 4-7, k 8-15
// In a run, the low nibbles are the first two rows (8 values each), and the high nibbles are the other two. A nibble is
// the value plus 8, so it is unsigned. The byte dot product instructions need one unsigned operand.
//
// With weights w = s_g * (n - 8) and activations x = scale * (q - zero), a row's product with x is
//   scale * sum over groups g of s_g * (sum n * q  -  8 * sum q  -  zero * sum (n - 8)).
// The second sum is stored with the activations, and the third with the weights.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mobilemoe {

constexpr int kTileRows = 8;
constexpr int kChunk = 16;
constexpr int kChunkBytes = kTileRows * kChunk / 2;
constexpr int64_t kHeaderBytes = 64;

inline int64_t tile_bytes(int64_t k, int64_t group_size) {
  return k / group_size * (kTileRows * group_size / 2 + 2 * kTileRows * 4);
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
    tile += value_bytes + 2 * kTileRows * 4;
  }
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int r = 0; r < kTileRows; ++r) out[i * kTileRows + r] *= rows[i].scale;
  }
}

#if defined(__x86_64__)
#define MOBILEMOE_AVX2 __attribute__((target("avx2,fma")))
#define MOBILEMOE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))

// Both vector kernels keep partial sums in the lane order of the layout. After the sums over four k of one 256-bit half
// of a chunk, the low nibbles are rows 0 0 1 1 | 4 4 5 5 and the high nibbles are rows 2 2 3 3 | 6 6 7 7.
// _mm256_hadd_ps of the two then yields rows 0 1 2 3 | 4 5 6 7.

template <int M>
MOBILEMOE_AVX2 void block_avx2(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows,
                               float* out) {
  const __m256i nibble = _mm256_set1_epi8(0xF), ones = _mm256_set1_epi16(1);
  const __m256i low_rows = _mm256_setr_epi32(0, 0, 1, 1, 4, 4, 5, 5);
  const __m256i high_rows = _mm256_setr_epi32(2, 2, 3, 3, 6, 6, 7, 7);
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
    const __m256 scales = _mm256_loadu_ps(reinterpret_cast<const float*>(tile));
    const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 32));
    tile += 64;
    const __m256 low_scales = _mm256_permutevar8x32_ps(scales, low_rows);
    const __m256 high_scales = _mm256_permutevar8x32_ps(scales, high_rows);
    for (int i = 0; i < M; ++i) {
      low_total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low[i]), low_scales, low_total[i]);
      high_total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high[i]), high_scales, high_total[i]);
      const __m256i correction = _mm256_add_epi32(_mm256_set1_epi32(8 * rows[i].group_sums[g]),
                                                  _mm256_mullo_epi32(_mm256_set1_epi32(rows[i].zero), sums));
      corrections[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(correction), scales, corrections[i]);
    }
  }
  for (int i = 0; i < M; ++i) {
    const __m256 total = _mm256_sub_ps(_mm256_hadd_ps(low_total[i], high_total[i]), corrections[i]);
    _mm256_storeu_ps(out + i * kTileRows, _mm256_mul_ps(total, _mm256_set1_ps(rows[i].scale)));
  }
}

template <int M>
MOBILEMOE_AVX512 void block_avx512(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows,
                                   float* out) {
  const __m512i nibble = _mm512_set1_epi8(0xF);
  const __m512i halves = _mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1);  // k 0-7 for the first two runs, then k 8-15
  const __m512i low_rows = _mm512_setr_epi32(0, 0, 1, 1, 4, 4, 5, 5, 0, 0, 1, 1, 4, 4, 5, 5);
  const __m512i high_rows = _mm512_setr_epi32(2, 2, 3, 3, 6, 6, 7, 7, 2, 2, 3, 3, 6, 6, 7, 7);
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
    const __m256 scales = _mm256_loadu_ps(reinterpret_cast<const float*>(tile));
    const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 32));
    tile += 64;
    const __m512 low_scales = _mm512_permutexvar_ps(low_rows, _mm512_castps256_ps512(scales));
    const __m512 high_scales = _mm512_permutexvar_ps(high_rows, _mm512_castps256_ps512(scales));
    for (int i = 0; i < M; ++i) {
      low_total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[i]), low_scales, low_total[i]);
      high_total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[i]), high_scales, high_total[i]);
      const __m256i correction = _mm256_add_epi32(_mm256_set1_epi32(8 * rows[i].group_sums[g]),
                                                  _mm256_mullo_epi32(_mm256_set1_epi32(rows[i].zero), sums));
      corrections[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(correction), scales, corrections[i]);
    }
  }
  for (int i = 0; i < M; ++i) {
    const __m256 low = _mm256_add_ps(_mm512_castps512_ps256(low_total[i]), _mm512_extractf32x8_ps(low_total[i], 1));
    const __m256 high = _mm256_add_ps(_mm512_castps512_ps256(high_total[i]), _mm512_extractf32x8_ps(high_total[i], 1));
    const __m256 total = _mm256_sub_ps(_mm256_hadd_ps(low, high), corrections[i]);
    _mm256_storeu_ps(out + i * kTileRows, _mm256_mul_ps(total, _mm256_set1_ps(rows[i].scale)));
  }
}

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

inline void tile_avx2(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows, int64_t n_rows,
                      float* out) {
  MOBILEMOE_IN_BLOCKS(block_avx2)
}

inline void tile_avx512(const uint8_t* tile, int64_t k, int64_t group_size, const QuantizedRow* rows, int64_t n_rows,
                        float* out) {
  MOBILEMOE_IN_BLOCKS(block_avx512)
}
#undef MOBILEMOE_IN_BLOCKS
#endif  // __x86_64__

// Returns the kernel of this name, or nullptr if this processor lacks its instructions.
inline TileKernel find_kernel(const char* name) {
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx512_vnni")) {
    const bool has = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    return has ? tile_avx512 : nullptr;
  }
  if (!std::strcmp(name, "avx2")) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? tile_avx2 : nullptr;
  }
#endif
  return std::strcmp(name, "portable") ? nullptr : tile_portable;
}

}  // namespace mobilemoe
