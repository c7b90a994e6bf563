// AVX2: bytes multiplied and added in pairs to int16, widened before they could overflow.
//
// A field is at most 2 (3 in padding of a damaged buffer), so a pair of products is at most
// 3 * 128 * 2 = 768 in magnitude; four fields of 10 blocks are at most 30,720 < 32,768.
#include <immintrin.h>

#include "tile.inl"

namespace forge {
namespace {

constexpr std::size_t kWidenAfter = 10;

inline __m256i broadcast(const std::int8_t* q) {
  std::int32_t word;
  std::memcpy(&word, q, 4);
  return _mm256_set1_epi32(word);
}

template <int kField>
inline __m256i field_of(const std::uint8_t* words) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const __m256i shifted = kField == 0 ? w : _mm256_srli_epi32(w, 2 * kField);
  return _mm256_and_si256(shifted, _mm256_set1_epi8(0x03));
}

// Adds now. g++ 12 would rather keep all products of a block and add them at its end, and has no
// registers for that: 24 of them went through the stack, and M = 16 took 1.6 times as long.
inline void add_products(__m256i& sum, __m256i field, __m256i x) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(field, x));
  __asm__("" : "+x"(sum));
}

template <int kField>
inline void add_field(const std::int8_t* q, const std::uint8_t* block, __m256i (&narrow)[8]) {
  const __m256i x = broadcast(q + 4 * kField);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    add_products(narrow[i], field_of<kField>(block + 32 * i), x);
  }
}

void one_token(const std::int8_t* q, const std::uint8_t* panel, std::size_t kblocks,
               std::int32_t* tile) {
  const __m256i ones = _mm256_set1_epi16(1);
  std::memset(tile, 0, kGroupRows * sizeof *tile);
  for (std::size_t b = 0; b < kblocks;) {
    const std::size_t end = b + kWidenAfter < kblocks ? b + kWidenAfter : kblocks;
    __m256i narrow[8];
    for (auto& lane : narrow) lane = _mm256_setzero_si256();
    for (; b < end; ++b, panel += kBlockBytes, q += kBlockColumns) {
      add_field<0>(q, panel, narrow);
      add_field<1>(q, panel, narrow);
      add_field<2>(q, panel, narrow);
      add_field<3>(q, panel, narrow);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      auto* sums = reinterpret_cast<__m256i*>(tile + 8 * i);
      _mm256_storeu_si256(sums, _mm256_add_epi32(_mm256_loadu_si256(sums),
                                                 _mm256_madd_epi16(narrow[i], ones)));
    }
  }
}

template <int kField, int kTokens>
inline void add_field(const std::int8_t* q, std::size_t stride, const std::uint8_t* words,
                      __m256i (&narrow)[kTokens][2]) {
  const __m256i low = field_of<kField>(words), high = field_of<kField>(words + 32);
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const __m256i x = broadcast(q + static_cast<std::size_t>(t) * stride + 4 * kField);
    add_products(narrow[t][0], low, x);
    add_products(narrow[t][1], high, x);
  }
}

// Sixteen rows, the `strip`th of the group, for a few tokens.
template <int kTokens>
void several_tokens(const std::int8_t* q, std::size_t stride, const std::uint8_t* panel,
                    std::size_t kblocks, std::size_t strip, std::int32_t (*tile)[kGroupRows]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int t = 0; t < kTokens; ++t) std::memset(tile[t] + 16 * strip, 0, 64);
  const std::uint8_t* words = panel + 64 * strip;
  for (std::size_t b = 0; b < kblocks;) {
    const std::size_t end = b + kWidenAfter < kblocks ? b + kWidenAfter : kblocks;
    __m256i narrow[kTokens][2];
    for (auto& token : narrow) token[0] = token[1] = _mm256_setzero_si256();
    for (; b < end; ++b, words += kBlockBytes, q += kBlockColumns) {
      add_field<0, kTokens>(q, stride, words, narrow);
      add_field<1, kTokens>(q, stride, words, narrow);
      add_field<2, kTokens>(q, stride, words, narrow);
      add_field<3, kTokens>(q, stride, words, narrow);
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        auto* sums = reinterpret_cast<__m256i*>(tile[t] + 16 * strip + 8 * i);
        _mm256_storeu_si256(sums, _mm256_add_epi32(_mm256_loadu_si256(sums),
                                                   _mm256_madd_epi16(narrow[t][i], ones)));
      }
    }
  }
}

using Tile = void (*)(const std::int8_t*, std::size_t, const std::uint8_t*, std::size_t,
                      std::size_t, std::int32_t (*)[kGroupRows]);
constexpr std::size_t kMost = 4;
constexpr Tile kTiles[kMost] = {nullptr, several_tokens<2>, several_tokens<3>, several_tokens<4>};

void multiply(const Activations& x, const Weight& w, const Output& out, std::size_t first,
              std::size_t last) {
  alignas(32) std::int32_t tile[kMost][kGroupRows];
  const std::size_t tiles = (x.tokens + kMost - 1) / kMost;
  for (std::size_t g = first; g < last; ++g) {
    const std::uint8_t* panel = w.blocks + g * w.kblocks * kBlockBytes;
    for (std::size_t i = 0; i < tiles; ++i) {
      const std::size_t token = x.tokens * i / tiles;
      const std::size_t count = x.tokens * (i + 1) / tiles - token;
      const std::int8_t* q = x.codes + token * x.stride;
      if (count == 1) {
        one_token(q, panel, w.kblocks, tile[0]);
      } else {
        for (std::size_t strip = 0; strip < 4; ++strip) {
          kTiles[count - 1](q, x.stride, panel, w.kblocks, strip, tile);
        }
      }
      for (std::size_t t = 0; t < count; ++t) store_row(out, g, token + t, x, tile[t]);
    }
  }
}

template <bool kNarrow>
inline __m256 load8(const void* values, std::size_t at) {
  if constexpr (kNarrow) {
    const auto* narrow = static_cast<const std::uint16_t*>(values) + at;
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(narrow));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  } else {
    return _mm256_loadu_ps(static_cast<const float*>(values) + at);
  }
}

template <bool kNarrow>
inline float load1(const void* values, std::size_t at) {
  return kNarrow ? float_of(static_cast<const std::uint16_t*>(values)[at])
                 : static_cast<const float*>(values)[at];
}

template <bool kNarrow>
void quantize_as(const void* values, std::size_t columns, std::size_t stride, std::int8_t* codes,
                 std::int32_t* sum, float* scale) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  // Magnitudes order as integers, NaN above infinity: one maximum finds both.
  __m256i most = _mm256_setzero_si256();
  std::size_t c = 0;
  for (; c + 8 <= columns; c += 8) {
    const __m256i bits = _mm256_castps_si256(load8<kNarrow>(values, c));
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
  }
  std::int32_t lanes[8], bits = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
  for (const std::int32_t lane : lanes) bits = lane > bits ? lane : bits;
  for (; c < columns; ++c) {
    const float value = std::fabs(load1<kNarrow>(values, c));
    std::int32_t own;
    std::memcpy(&own, &value, 4);
    bits = own > bits ? own : bits;
  }
  float absmax, inverse;
  std::memcpy(&absmax, &bits, 4);
  finish_scale(absmax, &inverse, scale);
  std::memset(codes, 0, stride);
  *sum = 0;
  if (bits >= 0x7F800000) return;
  const __m256 factor = _mm256_set1_ps(inverse);
  __m256i total = _mm256_setzero_si256();
  for (c = 0; c + 8 <= columns; c += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(load8<kNarrow>(values, c), factor));
    total = _mm256_add_epi32(total, rounded);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + c), _mm_packs_epi16(words, words));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), total);
  for (const std::int32_t lane : lanes) *sum += lane;
  for (; c < columns; ++c) {
    const float rounded = std::nearbyint(load1<kNarrow>(values, c) * inverse);
    codes[c] = static_cast<std::int8_t>(rounded);
    *sum += codes[c];
  }
}

void quantize(const void* values, Dtype dtype, std::size_t columns, std::size_t stride,
              std::int8_t* codes, std::int32_t* sum, float* scale) {
  if (dtype == Dtype::kFloat32) {
    quantize_as<false>(values, columns, stride, codes, sum, scale);
  } else {
    quantize_as<true>(values, columns, stride, codes, sum, scale);
  }
}

}  // namespace

const Path kAvx2Path = {"avx2", &multiply, &quantize};

}  // namespace forge
