// AVX-VNNI: 32 multiply-adds of bytes an instruction, int32 lanes that never saturate, on
// processors without AVX-512.
//
// A strip of sixteen rows at a time: sixteen registers hold no more sums.
// One token: fields are masked in place and never shifted. Field f then counts 4^f too much, so it
// has sums of its own, shifted once at the end (exact: every term has the factor).
// Several tokens: fields are shifted once and used for up to six tokens, twelve sums. The tokens
// after those shift them again: in a buffer, as AVX2 keeps them, they made sixteen tokens slower
// (605 against 570 us at 2560 x 2560; all times here are of one thread of a Xeon).
//
// The instruction is written as assembly: the name alone is encoded for AVX-512, and this file is
// compiled for AVX2, as compilers know AVX-VNNI from g++ 11 on.
#include <immintrin.h>

#include "tile.inl"

namespace forge {
namespace {

#define FORGE_DOT "%{vex%} vpdpbusd "

constexpr std::size_t kStripRows = 16;
constexpr std::size_t kStripBytes = 4 * kStripRows;  // of a block's words
constexpr std::size_t kTurnBlocks = 32;

inline __m256i broadcast(const std::int8_t* q) {
  std::int32_t word;
  std::memcpy(&word, q, 4);
  return _mm256_set1_epi32(word);
}

inline const __m256i* vectors(const void* data) { return static_cast<const __m256i*>(data); }

inline void add_to(std::int32_t* sums, __m256i more) {
  auto* lanes = reinterpret_cast<__m256i*>(sums);
  _mm256_storeu_si256(lanes, _mm256_add_epi32(_mm256_loadu_si256(lanes), more));
}

// What adds a turn of a strip, for one token or a few.
struct Strip {
  const std::int8_t* q;  // of the first token
  std::size_t stride;
  const std::uint8_t* words;
  const std::uint8_t* next;  // a quarter of the next turn, which is asked for meanwhile
  std::size_t blocks;
  std::int32_t (*sums)[kGroupRows];
};

void add_one(const Strip& strip) {
  const __m256i masks[4] = {_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0C), _mm256_set1_epi8(0x30),
                            _mm256_set1_epi8(static_cast<char>(0xC0))};
  __m256i acc[4][2];
#pragma GCC unroll 4
  for (int f = 0; f < 4; ++f) acc[f][0] = acc[f][1] = _mm256_setzero_si256();
  const std::int8_t* q = strip.q;
  const std::uint8_t *words = strip.words, *next = strip.next;
  for (std::size_t b = 0; b < strip.blocks; ++b, q += kBlockColumns, words += kBlockBytes) {
    _mm_prefetch(next + kStripBytes * b, _MM_HINT_T0);
    const __m256i w0 = _mm256_loadu_si256(vectors(words));
    const __m256i w1 = _mm256_loadu_si256(vectors(words) + 1);
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
      const __m256i x = broadcast(q + 4 * f);
      __m256i field;
      __asm__(
          "vpand %[w0], %[mask], %[field]\n\t"
          FORGE_DOT "%[x], %[field], %[a0]\n\t"
          "vpand %[w1], %[mask], %[field]\n\t"
          FORGE_DOT "%[x], %[field], %[a1]"
          : [field] "=&x"(field), [a0] "+&x"(acc[f][0]), [a1] "+x"(acc[f][1])
          : [w0] "x"(w0), [w1] "x"(w1), [mask] "x"(masks[f]), [x] "x"(x));
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i low = _mm256_add_epi32(acc[0][i], _mm256_srai_epi32(acc[1][i], 2));
    const __m256i high =
        _mm256_add_epi32(_mm256_srai_epi32(acc[2][i], 4), _mm256_srai_epi32(acc[3][i], 6));
    add_to(strip.sums[0] + 8 * i, _mm256_add_epi32(low, high));
  }
}

// In memory: with a mask in the sixteenth register g++ 12 spills sums.
alignas(32) constexpr std::uint64_t kMask[4] = {0x0303030303030303, 0x0303030303030303,
                                                0x0303030303030303, 0x0303030303030303};
alignas(32) constexpr std::uint64_t kOddMask[4] = {0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C,
                                                   0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C};

// Tokens whose sums, with two fields and x, leave one of the sixteen registers.
constexpr int kMost = 6;

template <int kTokens>
void add_some(const Strip& strip) {
  // Two products begin each cycle and take five: fewer than ten sums wait for each other. For two
  // and three tokens odd fields have sums of their own, shifted by two bits at the end as above
  // (two tokens at 2560 x 2560: 132 -> 87 us).
  constexpr int kSets = kTokens <= 3 ? 2 : 1;
  __m256i acc[kSets][kTokens][2];
#pragma GCC unroll 2
  for (int s = 0; s < kSets; ++s) {
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) acc[s][t][0] = acc[s][t][1] = _mm256_setzero_si256();
  }
  const std::int8_t* q = strip.q;
  const std::uint8_t *words = strip.words, *next = strip.next;
  for (std::size_t b = 0; b < strip.blocks; ++b, q += kBlockColumns, words += kBlockBytes) {
    _mm_prefetch(next + kStripBytes * b, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
      // Not before the field before has been added: it would take registers that are not there.
      if constexpr (kSets * kTokens == kMost) {
        __asm__("" : "+r"(words) : "x"(acc[(f + 1) % kSets][kTokens - 1][1]));
      }
      const int shift = kSets == 2 ? f / 2 * 4 : f * 2;
      const std::uint64_t* mask = kSets == 2 && f % 2 == 1 ? kOddMask : kMask;
      __m256i field[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m256i w = _mm256_loadu_si256(vectors(words) + i);
        field[i] = shift == 0 ? w : _mm256_srli_epi32(w, shift);
        __asm__("vpand %1, %0, %0" : "+x"(field[i]) : "m"(*vectors(mask)));
      }
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const __m256i x = broadcast(q + static_cast<std::size_t>(t) * strip.stride + 4 * f);
        __m256i* sums = acc[f % kSets][t];
        __asm__(FORGE_DOT "%[x], %[f0], %[a0]\n\t"
                FORGE_DOT "%[x], %[f1], %[a1]"
                : [a0] "+&x"(sums[0]), [a1] "+x"(sums[1])
                : [f0] "x"(field[0]), [f1] "x"(field[1]), [x] "x"(x));
      }
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m256i sum = acc[0][t][i];
      if constexpr (kSets == 2) sum = _mm256_add_epi32(sum, _mm256_srai_epi32(acc[1][t][i], 2));
      add_to(strip.sums[t] + 8 * i, sum);
    }
  }
}

using Add = void (*)(const Strip&);
constexpr Add kAdd[kMost] = {add_one,     add_some<2>, add_some<3>,
                             add_some<4>, add_some<5>, add_some<6>};

// Strips take turns every 8 KB, and in each ask for a quarter of the next: the processor does not
// read ahead of words that are 256 bytes apart. One token at 2560 x 2560: 58 -> 46 us, and 250 ->
// 155 us with weights in no cache, of which reading alone is 110; sixteen: 935 -> 600 us in none.
void add_group(const std::int8_t* q, std::size_t stride, std::size_t tokens,
               const std::uint8_t* panel, std::size_t kblocks, std::int32_t (*sums)[kGroupRows]) {
  for (std::size_t b = 0; b < kblocks; b += kTurnBlocks) {
    const std::size_t blocks = b + kTurnBlocks < kblocks ? kTurnBlocks : kblocks - b;
    const std::uint8_t* words = panel + b * kBlockBytes;
    const std::uint8_t* next = words + blocks * kBlockBytes;
    for (std::size_t s = 0; s < kGroupRows / kStripRows; ++s) {
      kAdd[tokens - 1]({q + b * kBlockColumns, stride, words + s * kStripBytes,
                        next + s * blocks * kStripBytes, blocks,
                        reinterpret_cast<std::int32_t(*)[kGroupRows]>(*sums + s * kStripRows)});
    }
  }
}

void multiply(const Activations& x, const Weight& w, const Output& out, std::size_t first,
              std::size_t last) {
  alignas(64) std::int32_t sums[kMost][kGroupRows];
  const std::size_t tiles = (x.tokens + kMost - 1) / kMost;
  for (std::size_t g = first; g < last; ++g) {
    const std::uint8_t* panel = w.blocks + g * w.kblocks * kBlockBytes;
    // Tiles of nearly equal size: 10 tokens are 5 + 5, as four would wait for their sums.
    for (std::size_t i = 0; i < tiles; ++i) {
      const std::size_t token = x.tokens * i / tiles;
      const std::size_t count = x.tokens * (i + 1) / tiles - token;
      std::memset(sums, 0, count * sizeof *sums);
      add_group(x.codes + token * x.stride, x.stride, count, panel, w.kblocks, sums);
      for (std::size_t t = 0; t < count; ++t) store_row(out, g, token + t, x, sums[t]);
    }
  }
}

void quantize(const void* values, Dtype dtype, std::size_t columns, std::size_t stride,
              std::int8_t* codes, std::int32_t* sum, float* scale) {
  kAvx2Path.quantize(values, dtype, columns, stride, codes, sum, scale);
}

}  // namespace

const Path kAvxVnniPath = {"avx-vnni", &multiply, &quantize,
                           &take_row, &code_values, &narrow_values, &narrow_turned_values};

}  // namespace forge
