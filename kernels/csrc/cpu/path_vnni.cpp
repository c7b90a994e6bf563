// AVX512-VNNI: 64 multiply-adds of bytes an instruction, int32 lanes that never saturate.
//
// One token: fields are masked in place and never shifted. Field f then counts 4^f too much, so it
// has an accumulator of its own, shifted once at the end (exact: every term has the factor).
// Several tokens: fields are shifted once and used for up to six tokens, 24 accumulators. Shifts and
// masks take pipes of the products on Intel: there the first six tokens of up to 48 keep the fields
// they shifted, a chunk of columns at a time, in the first-level cache for the others.
//
// The instruction is written as assembly: g++ 12 copies and spills accumulators around the
// intrinsic (240 against 417 GOP/s measured on Zen 4).
#include <immintrin.h>

#include "tile.inl"

namespace forge {
namespace {

#define FORGE_DOT(acc, fields, x) \
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(fields), "v"(x))

// Bytes ahead that weights are asked for, where the processor's own prefetcher does not go. Of the
// read probe cold weights reach, on Zen 5 0.96 with a page ahead, 0.84 without. On a Xeon with AMX
// (the product alone, one thread) 0.77 to 0.88 without, 0.56 to 0.81 with a page ahead, 0.96 to 1.02
// with a page ahead to the second-level cache and a little ahead to the first; hot ones within the
// second-level cache lose 8 %. Several tokens reach 0.91 to 0.97 of the multiply probe on Zen 5 with
// a page ahead, 0.69 to 0.93 without (6 to 128 tokens, hot, one thread); not measured on Intel.
constexpr std::size_t kPage = 4096;
constexpr std::size_t kNear = 1536;

inline __m512i broadcast(const std::int8_t* q) {
  std::int32_t word;
  std::memcpy(&word, q, 4);
  return _mm512_set1_epi32(word);
}

template <bool kIntel>
void one_token(const std::int8_t* q, const std::uint8_t* panel, std::size_t kblocks,
               std::int32_t* tile) {
  const __m512i mask0 = _mm512_set1_epi8(0x03);
  const __m512i mask1 = _mm512_set1_epi8(0x0C);
  const __m512i mask2 = _mm512_set1_epi8(0x30);
  const __m512i mask3 = _mm512_set1_epi8(static_cast<char>(0xC0));
  __m512i acc[4][4];
  // Unrolled as every loop over them: an array that is cleared by a loop stays in memory, and
  // g++ 12 then stores each sum of the product loop to the stack.
#pragma GCC unroll 4
  for (auto& field : acc) {
#pragma GCC unroll 4
    for (auto& lane : field) lane = _mm512_setzero_si512();
  }
  for (std::size_t b = 0; b < kblocks; ++b, panel += kBlockBytes, q += kBlockColumns) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if constexpr (kIntel) {
        _mm_prefetch(panel + kNear + 64 * i, _MM_HINT_T0);
        _mm_prefetch(panel + kPage + 64 * i, _MM_HINT_T1);
      } else {
        _mm_prefetch(panel + kPage + 64 * i, _MM_HINT_T0);
      }
    }
    const __m512i x0 = broadcast(q), x1 = broadcast(q + 4);
    const __m512i x2 = broadcast(q + 8), x3 = broadcast(q + 12);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i w = _mm512_loadu_si512(panel + 64 * i);
      __m512i f0, f1, f2, f3;
      // All masks, then all products, in this order whatever the compiler's flags: where a product
      // follows each mask, masks wait on Zen 4 for the two pipes of the products. That cost a fifth
      // of the rate when g++ 12 tuned for znver3, and at least 4 % of a call as this file is built.
      __asm__(
          "vpandd %[w], %[m0], %[f0]\n\t"
          "vpandd %[w], %[m1], %[f1]\n\t"
          "vpandd %[w], %[m2], %[f2]\n\t"
          "vpandd %[w], %[m3], %[f3]\n\t"
          "vpdpbusd %[x0], %[f0], %[a0]\n\t"
          "vpdpbusd %[x1], %[f1], %[a1]\n\t"
          "vpdpbusd %[x2], %[f2], %[a2]\n\t"
          "vpdpbusd %[x3], %[f3], %[a3]"
          : [a0] "+v"(acc[0][i]), [a1] "+v"(acc[1][i]), [a2] "+v"(acc[2][i]), [a3] "+v"(acc[3][i]),
            [f0] "=&v"(f0), [f1] "=&v"(f1), [f2] "=&v"(f2), [f3] "=&v"(f3)
          : [w] "v"(w), [m0] "v"(mask0), [m1] "v"(mask1), [m2] "v"(mask2), [m3] "v"(mask3),
            [x0] "v"(x0), [x1] "v"(x1), [x2] "v"(x2), [x3] "v"(x3));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_add_epi32(acc[0][i], _mm512_srai_epi32(acc[1][i], 2));
    const __m512i high =
        _mm512_add_epi32(_mm512_srai_epi32(acc[2][i], 4), _mm512_srai_epi32(acc[3][i], 6));
    _mm512_storeu_si512(tile + 16 * i, _mm512_add_epi32(low, high));
  }
}

enum class Fields { kShift, kShiftAhead, kShiftAndKeep, kKept };

// Blocks whose fields are kept: 24 KiB of the 48 that the first-level cache has from Ice Lake on.
constexpr std::size_t kKeptBlocks = 24;
constexpr std::size_t kFieldBytes = 4 * kBlockBytes;  // of a block

struct Chunk {
  const std::uint8_t* panel;
  std::uint8_t* kept;
  std::size_t blocks;
  bool first;  // sums start at zero, not at the tile's
};

template <int kTokens, Fields kFields>
void several_tokens(const std::int8_t* q, std::size_t stride, const Chunk& chunk,
                    std::int32_t (*tile)[kGroupRows]) {
  const std::uint8_t* panel = chunk.panel;
  std::uint8_t* kept = chunk.kept;
  const __m512i mask = _mm512_set1_epi8(0x03);
  __m512i acc[kTokens][4];  // its loops unrolled as above
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      acc[t][i] = chunk.first ? _mm512_setzero_si512() : _mm512_loadu_si512(tile[t] + 16 * i);
    }
  }
  for (std::size_t b = 0; b < chunk.blocks; ++b, panel += kBlockBytes, q += kBlockColumns) {
    if constexpr (kFields == Fields::kShiftAhead) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm_prefetch(panel + kPage + 64 * i, _MM_HINT_T0);
    }
    // Words are loaded again for each field: 24 sums, 4 fields, the mask and x leave no registers
    // for them.
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
      __m512i field[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if constexpr (kFields == Fields::kKept) {
          field[i] = _mm512_load_si512(kept + kBlockBytes * f + 64 * i);
        } else {
          const __m512i w = _mm512_loadu_si512(panel + 64 * i);
          field[i] = _mm512_and_si512(f == 0 ? w : _mm512_srli_epi32(w, 2 * f), mask);
        }
        if constexpr (kFields == Fields::kShiftAndKeep) {
          _mm512_store_si512(kept + kBlockBytes * f + 64 * i, field[i]);
        }
      }
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const __m512i x = broadcast(q + static_cast<std::size_t>(t) * stride + 4 * f);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) FORGE_DOT(acc[t][i], field[i], x);
      }
    }
    if constexpr (kFields == Fields::kShiftAndKeep || kFields == Fields::kKept) kept += kFieldBytes;
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(tile[t] + 16 * i, acc[t][i]);
  }
}

using Tile = void (*)(const std::int8_t*, std::size_t, const Chunk&, std::int32_t (*)[kGroupRows]);
constexpr std::size_t kMost = 6;
template <Fields kFields>
constexpr Tile kTiles[kMost] = {nullptr,
                                several_tokens<2, kFields>,
                                several_tokens<3, kFields>,
                                several_tokens<4, kFields>,
                                several_tokens<5, kFields>,
                                several_tokens<6, kFields>};

constexpr std::size_t tiles_of(std::size_t tokens) { return (tokens + kMost - 1) / kMost; }

void multiply_apart(const Activations& x, const Weight& w, const Output& out, std::size_t first,
                    std::size_t last, bool intel) {
  alignas(64) std::int32_t tile[kMost][kGroupRows];
  const std::size_t tiles = tiles_of(x.tokens);
  for (std::size_t g = first; g < last; ++g) {
    const std::uint8_t* panel = w.blocks + g * w.kblocks * kBlockBytes;
    // Tiles of nearly equal size: 7 tokens are 4 + 3, as 6 + 1 would be slower.
    for (std::size_t i = 0; i < tiles; ++i) {
      const std::size_t token = x.tokens * i / tiles;
      const std::size_t count = x.tokens * (i + 1) / tiles - token;
      const std::int8_t* q = x.codes + token * x.stride;
      if (count == 1) {
        (intel ? one_token<true> : one_token<false>)(q, panel, w.kblocks, tile[0]);
      } else {
        const auto& of = intel ? kTiles<Fields::kShift> : kTiles<Fields::kShiftAhead>;
        of[count - 1](q, x.stride, {panel, nullptr, w.kblocks, true}, tile);
      }
      for (std::size_t t = 0; t < count; ++t) store_row(out, g, token + t, x, tile[t]);
    }
  }
}

// Of the probe's rate on a Xeon with AMX, one thread: 0.75 to 0.78 for 12 and 16 tokens, 0.83 to 0.87
// for 32 to 128, against 0.67 to 0.74 and 0.70 to 0.78 apart. On Zen shifts and masks have pipes of
// their own.
void multiply_keeping(const Activations& x, const Weight& w, const Output& out, std::size_t first,
                      std::size_t last) {
  constexpr std::size_t kStrip = 48;
  alignas(64) std::int32_t tile[kStrip][kGroupRows];
  alignas(64) std::uint8_t kept[kKeptBlocks * kFieldBytes];
  const std::size_t strips = (x.tokens + kStrip - 1) / kStrip;
  for (std::size_t g = first; g < last; ++g) {
    const std::uint8_t* panel = w.blocks + g * w.kblocks * kBlockBytes;
    for (std::size_t s = 0; s < strips; ++s) {
      // Nearly equal too: 49 tokens are 25 + 24, and no strip has fewer than two tokens.
      const std::size_t token = x.tokens * s / strips;
      const std::size_t tokens = x.tokens * (s + 1) / strips - token, tiles = tiles_of(tokens);
      for (std::size_t b = 0; b < w.kblocks; b += kKeptBlocks) {
        const std::size_t left = w.kblocks - b;
        const Chunk chunk{panel + b * kBlockBytes, kept, left < kKeptBlocks ? left : kKeptBlocks,
                          b == 0};
        const std::int8_t* q = x.codes + token * x.stride + b * kBlockColumns;
        for (std::size_t i = 0; i < tiles; ++i) {
          const std::size_t t = tokens * i / tiles, count = tokens * (i + 1) / tiles - t;
          const auto& of = i == 0 ? kTiles<Fields::kShiftAndKeep> : kTiles<Fields::kKept>;
          of[count - 1](q + t * x.stride, x.stride, chunk, tile + t);
        }
      }
      for (std::size_t t = 0; t < tokens; ++t) store_row(out, g, token + t, x, tile[t]);
    }
  }
}

void multiply(const Activations& x, const Weight& w, const Output& out, std::size_t first,
              std::size_t last) {
  static const bool intel = __builtin_cpu_is("intel") != 0;
  if (intel && x.tokens > kMost) {
    multiply_keeping(x, w, out, first, last);
  } else {
    multiply_apart(x, w, out, first, last, intel);
  }
}

template <bool kNarrow>
inline __m512 load16(const void* values, std::size_t at, __mmask16 mask) {
  if constexpr (kNarrow) {
    const auto* narrow = static_cast<const std::uint16_t*>(values) + at;
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, narrow);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  } else {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(values) + at);
  }
}

inline __mmask16 mask_of(std::size_t left) {
  return left >= 16 ? static_cast<__mmask16>(0xFFFF)
                    : static_cast<__mmask16>((1u << left) - 1u);
}

template <bool kNarrow>
void quantize_as(const void* values, std::size_t columns, std::size_t stride, std::int8_t* codes,
                 std::int32_t* sum, float* scale) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  // Magnitudes order as integers, NaN above infinity: one maximum finds both.
  __m512i most = _mm512_setzero_si512(), more = most;
  std::size_t c = 0;
  for (; c + 32 <= columns; c += 32) {
    const __m512i one = _mm512_castps_si512(load16<kNarrow>(values, c, 0xFFFF));
    const __m512i two = _mm512_castps_si512(load16<kNarrow>(values, c + 16, 0xFFFF));
    most = _mm512_max_epi32(most, _mm512_and_si512(one, magnitude));
    more = _mm512_max_epi32(more, _mm512_and_si512(two, magnitude));
  }
  for (; c < columns; c += 16) {
    const __m512i one = _mm512_castps_si512(load16<kNarrow>(values, c, mask_of(columns - c)));
    most = _mm512_max_epi32(most, _mm512_and_si512(one, magnitude));
  }
  const std::int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(most, more));
  float absmax, inverse;
  std::memcpy(&absmax, &bits, 4);
  finish_scale(absmax, &inverse, scale);
  *sum = 0;
  if (bits >= 0x7F800000) {
    std::memset(codes, 0, stride);
    return;
  }
  const __m512 factor = _mm512_set1_ps(inverse);
  __m512i total = _mm512_setzero_si512();
  for (c = 0; c < stride; c += 16) {
    const __mmask16 mask = c < columns ? mask_of(columns - c) : static_cast<__mmask16>(0);
    const __m512i rounded =
        _mm512_cvtps_epi32(_mm512_mul_ps(load16<kNarrow>(values, c, mask), factor));
    total = _mm512_add_epi32(total, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + c), _mm512_cvtsepi32_epi8(rounded));
  }
  *sum = _mm512_reduce_add_epi32(total);
}

void quantize(const void* values, Dtype dtype, std::size_t columns, std::size_t stride,
              std::int8_t* codes, std::int32_t* sum, float* scale) {
  if (dtype == Dtype::kFloat32) {
    quantize_as<false>(values, columns, stride, codes, sum, scale);
  } else {
    quantize_as<true>(values, columns, stride, codes, sum, scale);
  }
}

void code(const float* values, std::size_t count, float inverse, std::int8_t* codes) {
  const __m512 factor = _mm512_set1_ps(inverse), one = _mm512_set1_ps(1.0f);
  const __m512 minus_one = _mm512_set1_ps(-1.0f);
  for (std::size_t i = 0; i < count; i += 16) {
    const __mmask16 mask = mask_of(count - i);
    const __m512 value = _mm512_mul_ps(load16<false>(values, i, mask), factor);
    const __mmask16 number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    const __m512 clamped = _mm512_max_ps(_mm512_min_ps(value, one), minus_one);
    _mm512_mask_cvtepi32_storeu_epi8(codes + i, mask, _mm512_maskz_cvtps_epi32(number, clamped));
  }
}

// bf16_of in the upper half of each lane; what is below it is no zero.
inline __m512i rounded(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_add_epi32(bits, up), nan, _mm512_set1_epi32(0x7FC00000));
}

// Turns sixteen rows of sixteen lanes.
inline void turn(__m512i (&rows)[16]) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // Lanes 4k + j of rows 4g to 4g + 3 are then in the quarter k of b[4g + j].
  __m512i b[16];
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {
    b[g] = _mm512_unpacklo_epi64(a[g], a[g + 2]);
    b[g + 1] = _mm512_unpackhi_epi64(a[g], a[g + 2]);
    b[g + 2] = _mm512_unpacklo_epi64(a[g + 1], a[g + 3]);
    b[g + 3] = _mm512_unpackhi_epi64(a[g + 1], a[g + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i low1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i high0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xDD);
    const __m512i high1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xDD);
    rows[j] = _mm512_shuffle_i32x4(low0, low1, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(high0, high1, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(low0, low1, 0xDD);
    rows[12 + j] = _mm512_shuffle_i32x4(high0, high1, 0xDD);
  }
}

void narrow_turned(const float* values, std::size_t rows, std::size_t columns, const float* by_row,
                   std::size_t stride, std::uint16_t* narrow) {
  static_assert(kTurnedRows == 32, "two rows a lane, sixteen lanes");
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __mmask32 kept = static_cast<__mmask32>(rows == 32 ? ~0u : (1u << rows) - 1u);
  for (std::size_t c = 0; c < columns; c += 16) {
    const std::size_t left = columns - c, count = left < 16 ? left : 16;
    const __mmask16 mask = mask_of(left);
    const auto row = [&](std::size_t r) {
      if (r >= rows) return _mm512_setzero_si512();
      const __m512 value = load16<false>(values + r * columns, c, mask);
      return rounded(_mm512_mul_ps(value, _mm512_set1_ps(by_row[r])));
    };
    __m512i pairs[16];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 16; ++i) {
      const __m512i second = _mm512_and_si512(row(2 * i + 1), upper);
      pairs[i] = _mm512_or_si512(_mm512_srli_epi32(row(2 * i), 16), second);
    }
    turn(pairs);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 16; ++i) {
      if (i < count) _mm512_mask_storeu_epi16(narrow + (c + i) * stride, kept, pairs[i]);
    }
  }
}

}  // namespace

const Path kVnniPath = {"avx512-vnni", &multiply, &quantize, &take_row, &code,
                        &narrow_values, &narrow_turned};

}  // namespace forge
