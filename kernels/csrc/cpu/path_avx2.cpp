// AVX2: bytes multiplied and added in pairs to int16, widened before they could overflow.
//
// One token: fields are masked in place and only shifted by four bits. Odd fields then count four
// times too much, so they have sums of their own, shifted at the end of a few blocks (exact: every
// term has the factor).
// Several tokens: a field is shifted and masked once for all of them. The first six take it out of
// the packed word and leave it in a buffer of 4 KB, from which the others read it.
//
// Products are written as assembly: g++ 12 copies and spills sums around the intrinsics (M = 16 at
// 0.83 of the probe on Zen 4, 0.90 so).
#include <immintrin.h>

#include "tile.inl"

namespace forge {
namespace {

// Blocks between widenings. A field is at most 2, so a lane of int16 adds 2 products of at most
// 2 * 128 for each of 4 fields: after 16 blocks from -32,768 to 32,512.
constexpr std::size_t kWidenAfter = 16;
// The same for sums that count four times too much, of half the fields.
constexpr std::size_t kDescaleAfter = 8;

inline __m256i broadcast(const std::int8_t* q) {
  std::int32_t word;
  std::memcpy(&word, q, 4);
  return _mm256_set1_epi32(word);
}

inline const __m256i* vectors(const void* data) { return static_cast<const __m256i*>(data); }

inline void add_wide(std::int32_t* sums, __m256i narrow) {
  auto* wide = reinterpret_cast<__m256i*>(sums);
  const __m256i pairs = _mm256_madd_epi16(narrow, _mm256_set1_epi16(1));
  _mm256_storeu_si256(wide, _mm256_add_epi32(_mm256_loadu_si256(wide), pairs));
}

// Up to kWidenAfter blocks of half the rows of a group, for one token.
inline void add_half(const std::int8_t* q, const std::uint8_t* words, std::size_t blocks,
                     std::int32_t* sums) {
  const __m256i mask0 = _mm256_set1_epi8(0x03), mask1 = _mm256_set1_epi8(0x0C);
  __m256i narrow[4];
  for (auto& lane : narrow) lane = _mm256_setzero_si256();
  for (std::size_t b = 0; b < blocks;) {
    __m256i scaled[4];
    for (auto& lane : scaled) lane = _mm256_setzero_si256();
    const std::size_t end = b + kDescaleAfter < blocks ? b + kDescaleAfter : blocks;
    for (; b < end; ++b, words += kBlockBytes, q += kBlockColumns) {
      const __m256i x0 = broadcast(q), x1 = broadcast(q + 4);
      const __m256i x2 = broadcast(q + 8), x3 = broadcast(q + 12);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __m256i w, field;
        __asm__(
            "vmovdqu %[words], %[w]\n\t"
            "vpand %[m0], %[w], %[f]\n\t"
            "vpmaddubsw %[x0], %[f], %[f]\n\t"
            "vpaddw %[f], %[n], %[n]\n\t"
            "vpand %[m1], %[w], %[f]\n\t"
            "vpmaddubsw %[x1], %[f], %[f]\n\t"
            "vpaddw %[f], %[s], %[s]\n\t"
            "vpsrld $4, %[w], %[w]\n\t"
            "vpand %[m0], %[w], %[f]\n\t"
            "vpmaddubsw %[x2], %[f], %[f]\n\t"
            "vpaddw %[f], %[n], %[n]\n\t"
            "vpand %[m1], %[w], %[w]\n\t"
            "vpmaddubsw %[x3], %[w], %[w]\n\t"
            "vpaddw %[w], %[s], %[s]"
            : [w] "=&x"(w), [f] "=&x"(field), [n] "+x"(narrow[i]), [s] "+x"(scaled[i])
            : [words] "m"(vectors(words)[i]), [m0] "x"(mask0), [m1] "x"(mask1), [x0] "x"(x0),
              [x1] "x"(x1), [x2] "x"(x2), [x3] "x"(x3));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      narrow[i] = _mm256_add_epi16(narrow[i], _mm256_srai_epi16(scaled[i], 2));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) add_wide(sums + 8 * i, narrow[i]);
}

// The products of four columns of sixteen rows with one token.
inline void add_products(const std::int8_t* q, __m256i low, __m256i high, __m256i (&narrow)[2]) {
  const __m256i x = broadcast(q);
  __m256i product0, product1;
  __asm__(
      "vpmaddubsw %[x], %[low], %[p0]\n\t"
      "vpmaddubsw %[x], %[high], %[p1]\n\t"
      "vpaddw %[p0], %[n0], %[n0]\n\t"
      "vpaddw %[p1], %[n1], %[n1]"
      : [p0] "=&x"(product0), [p1] "=x"(product1), [n0] "+x"(narrow[0]), [n1] "+x"(narrow[1])
      : [x] "x"(x), [low] "x"(low), [high] "x"(high));
}

constexpr std::size_t kStripRows = 16;
constexpr std::size_t kStripBytes = 4 * kStripRows;  // of a block's words, or of one field
constexpr std::size_t kBufferBytes = kWidenAfter * 4 * kStripBytes;
// Tokens whose sums, with two fields, x and a product, fill the sixteen registers.
constexpr int kMost = 6;

// What adds up to kWidenAfter blocks of a strip, sixteen rows, for a few tokens.
struct Strip {
  const std::int8_t* q;  // of the first token
  std::size_t stride;
  std::size_t blocks;
  std::int32_t (*sums)[kGroupRows];
};

template <int kTokens>
struct Sums {
  __m256i narrow[kTokens][2];

  inline void clear() {
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) narrow[t][0] = narrow[t][1] = _mm256_setzero_si256();
  }
  inline void add(const std::int8_t* q, std::size_t stride, __m256i low, __m256i high) {
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      add_products(q + static_cast<std::size_t>(t) * stride, low, high, narrow[t]);
    }
  }
  inline void widen(std::int32_t (*sums)[kGroupRows]) const {
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      add_wide(sums[t], narrow[t][0]);
      add_wide(sums[t] + 8, narrow[t][1]);
    }
  }
};

// In memory: sums of six tokens, two fields, x and a product leave no register for it.
alignas(32) constexpr std::uint64_t kMask[4] = {0x0303030303030303, 0x0303030303030303,
                                                0x0303030303030303, 0x0303030303030303};

template <int kField>
inline __m256i field_of(const std::uint8_t* words) {
  const __m256i w = _mm256_loadu_si256(vectors(words));
  __m256i field = kField == 0 ? w : _mm256_srli_epi32(w, 2 * kField);
  __asm__("vpand %[mask], %[field], %[field]" : [field] "+x"(field) : [mask] "m"(*vectors(kMask)));
  return field;
}

template <int kField, int kTokens, bool kKeep>
inline void add_field(const Strip& strip, const std::int8_t* q, const std::uint8_t* words,
                      std::uint8_t* fields, Sums<kTokens>& sums) {
  // Not before the field before has been added: it would take a register that is not there.
  if constexpr (kTokens == kMost) __asm__("" : "+r"(words) : "x"(sums.narrow[kTokens - 1][1]));
  const __m256i low = field_of<kField>(words);
  const __m256i high = field_of<kField>(words + 32);
  if constexpr (kKeep) {
    auto* to = reinterpret_cast<__m256i*>(fields + kField * kStripBytes);
    _mm256_store_si256(to, low);
    _mm256_store_si256(to + 1, high);
  }
  sums.add(q + 4 * kField, strip.stride, low, high);
}

// From packed words; kKeep leaves their fields in the buffer.
template <int kTokens, bool kKeep>
void add_packed(const Strip& strip, const std::uint8_t* words, std::uint8_t* fields) {
  Sums<kTokens> sums;
  sums.clear();
  const std::int8_t* q = strip.q;
  for (std::size_t b = 0; b < strip.blocks; ++b, q += kBlockColumns, words += kBlockBytes) {
    add_field<0, kTokens, kKeep>(strip, q, words, fields, sums);
    add_field<1, kTokens, kKeep>(strip, q, words, fields, sums);
    add_field<2, kTokens, kKeep>(strip, q, words, fields, sums);
    add_field<3, kTokens, kKeep>(strip, q, words, fields, sums);
    fields += 4 * kStripBytes;
  }
  sums.widen(strip.sums);
}

template <int kTokens>
void add_unpacked(const Strip& strip, const std::uint8_t* fields) {
  Sums<kTokens> sums;
  sums.clear();
  const std::int8_t* q = strip.q;
  for (std::size_t b = 0; b < strip.blocks; ++b, q += kBlockColumns, fields += 4 * kStripBytes) {
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
      const __m256i* pair = vectors(fields + f * kStripBytes);
      sums.add(q + 4 * f, strip.stride, _mm256_load_si256(pair), _mm256_load_si256(pair + 1));
    }
  }
  sums.widen(strip.sums);
}

// Bytes of the next blocks that are asked for with each strip.
constexpr std::size_t kAhead = kWidenAfter * kBlockBytes / (kGroupRows / kStripRows);

struct Tile {
  void (*packed)(const Strip&, const std::uint8_t*, std::uint8_t*);
  void (*keeping)(const Strip&, const std::uint8_t*, std::uint8_t*);
  void (*unpacked)(const Strip&, const std::uint8_t*);
};
template <int kTokens>
constexpr Tile kTile = {add_packed<kTokens, false>, add_packed<kTokens, true>,
                        add_unpacked<kTokens>};
constexpr Tile kTiles[kMost] = {{}, kTile<2>, kTile<3>, kTile<4>, kTile<5>, kTile<6>};

// Tokens whose codes and sums stay in the first cache beside the fields.
constexpr std::size_t kManyTokens = 36;

// Halves take turns every 4 KB, the page within which the processor reads ahead: a whole panel for
// each half read cold words at 0.39 of the read probe on Zen 4, so 0.80. (Prefetching a page ahead
// as VNNI does took 0.62.)
void one_token(const std::int8_t* q, const std::uint8_t* panel, std::size_t kblocks,
               std::int32_t* sums) {
  for (std::size_t b = 0; b < kblocks; b += kWidenAfter) {
    const std::size_t blocks = b + kWidenAfter < kblocks ? kWidenAfter : kblocks - b;
    for (std::size_t half = 0; half < 2; ++half) {
      add_half(q + b * kBlockColumns, panel + b * kBlockBytes + half * kBlockBytes / 2, blocks,
               sums + half * kGroupRows / 2);
    }
  }
}

void several_tokens(const std::int8_t* q, std::size_t stride, std::size_t tokens,
                    const std::uint8_t* panel, std::size_t kblocks,
                    std::int32_t (*tile)[kGroupRows]) {
  alignas(32) std::uint8_t fields[kBufferBytes];
  const std::size_t tiles = (tokens + kMost - 1) / kMost;
  for (std::size_t b = 0; b < kblocks; b += kWidenAfter) {
    const std::size_t blocks = b + kWidenAfter < kblocks ? kWidenAfter : kblocks - b;
    const std::uint8_t* words = panel + b * kBlockBytes;
    for (std::size_t s = 0; s < kGroupRows / kStripRows; ++s, words += kStripBytes) {
      // A quarter of the next words for each strip: the processor does not read ahead of rows that
      // are 256 bytes apart. M = 16 at 6912x2560: 0.69 -> 0.88 of the probe with weights in the
      // third cache, and a third faster with weights in none.
      const std::uint8_t* next = panel + (b + kWidenAfter) * kBlockBytes + s * kAhead;
      for (std::size_t i = 0; i < kAhead; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
      for (std::size_t i = 0; i < tiles; ++i) {
        // The larger tiles first: the first takes the fields out.
        const std::size_t token = (tokens * i + tiles - 1) / tiles;
        const Tile& many = kTiles[(tokens * (i + 1) + tiles - 1) / tiles - token - 1];
        const Strip strip = {
            q + token * stride + b * kBlockColumns, stride, blocks,
            reinterpret_cast<std::int32_t(*)[kGroupRows]>(tile[token] + s * kStripRows)};
        if (tiles == 1) {
          many.packed(strip, words, fields);
        } else if (i == 0) {
          many.keeping(strip, words, fields);
        } else {
          many.unpacked(strip, fields);
        }
      }
    }
  }
}

void multiply(const Activations& x, const Weight& w, const Output& out, std::size_t first,
              std::size_t last) {
  alignas(32) std::int32_t tile[kManyTokens][kGroupRows];
  const std::size_t tiles = (x.tokens + kManyTokens - 1) / kManyTokens;
  for (std::size_t g = first; g < last; ++g) {
    const std::uint8_t* panel = w.blocks + g * w.kblocks * kBlockBytes;
    for (std::size_t i = 0; i < tiles; ++i) {
      const std::size_t token = x.tokens * i / tiles;
      const std::size_t count = x.tokens * (i + 1) / tiles - token;
      const std::int8_t* q = x.codes + token * x.stride;
      std::memset(tile, 0, count * sizeof *tile);
      if (count == 1) {
        one_token(q, panel, w.kblocks, tile[0]);
      } else {
        several_tokens(q, x.stride, count, panel, w.kblocks, tile);
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

const Path kAvx2Path = {"avx2", &multiply, &quantize,
                        &take_row, &code_values, &narrow_values, &narrow_turned_values};

}  // namespace forge
