// NEON with the dot-product extension (Armv8.2): four bytes of a row a lane, int32 lanes.
#include <arm_neon.h>

#include "tile.inl"

namespace forge {
namespace {

template <int kField>
inline int8x16_t field_of(uint8x16_t words) {
  uint8x16_t field = words;
  if constexpr (kField == 3) {
    field = vshrq_n_u8(words, 6);
  } else if constexpr (kField > 0) {
    field = vandq_u8(vshrq_n_u8(words, 2 * kField), vdupq_n_u8(3));
  } else {
    field = vandq_u8(words, vdupq_n_u8(3));
  }
  return vreinterpretq_s8_u8(field);
}

// Sixteen rows, the `strip`th of the group, for a few tokens.
template <int kTokens>
void some_tokens(const std::int8_t* q, std::size_t stride, const std::uint8_t* panel,
                 std::size_t kblocks, std::size_t strip, std::int32_t (*tile)[kGroupRows]) {
  int32x4_t acc[kTokens][4];
  for (auto& token : acc) {
    for (auto& lane : token) lane = vdupq_n_s32(0);
  }
  const std::uint8_t* words = panel + 64 * strip;
  for (std::size_t b = 0; b < kblocks; ++b, words += kBlockBytes, q += kBlockColumns) {
    int8x16_t x[kTokens];
    for (int t = 0; t < kTokens; ++t) x[t] = vld1q_s8(q + static_cast<std::size_t>(t) * stride);
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t w = vld1q_u8(words + 16 * i);
      const int8x16_t f0 = field_of<0>(w), f1 = field_of<1>(w);
      const int8x16_t f2 = field_of<2>(w), f3 = field_of<3>(w);
      for (int t = 0; t < kTokens; ++t) {
        acc[t][i] = vdotq_laneq_s32(acc[t][i], f0, x[t], 0);
        acc[t][i] = vdotq_laneq_s32(acc[t][i], f1, x[t], 1);
        acc[t][i] = vdotq_laneq_s32(acc[t][i], f2, x[t], 2);
        acc[t][i] = vdotq_laneq_s32(acc[t][i], f3, x[t], 3);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int i = 0; i < 4; ++i) {
      vst1q_s32(tile[t] + 16 * strip + 4 * static_cast<std::size_t>(i), acc[t][i]);
    }
  }
}

using Tile = void (*)(const std::int8_t*, std::size_t, const std::uint8_t*, std::size_t,
                      std::size_t, std::int32_t (*)[kGroupRows]);
constexpr std::size_t kMost = 4;
constexpr Tile kTiles[kMost] = {some_tokens<1>, some_tokens<2>, some_tokens<3>, some_tokens<4>};

void multiply(const Activations& x, const Weight& w, const Output& out, std::size_t first,
              std::size_t last) {
  alignas(16) std::int32_t tile[kMost][kGroupRows];
  const std::size_t tiles = (x.tokens + kMost - 1) / kMost;
  for (std::size_t g = first; g < last; ++g) {
    const std::uint8_t* panel = w.blocks + g * w.kblocks * kBlockBytes;
    for (std::size_t i = 0; i < tiles; ++i) {
      const std::size_t token = x.tokens * i / tiles;
      const std::size_t count = x.tokens * (i + 1) / tiles - token;
      for (std::size_t strip = 0; strip < 4; ++strip) {
        kTiles[count - 1](x.codes + token * x.stride, x.stride, panel, w.kblocks, strip, tile);
      }
      for (std::size_t t = 0; t < count; ++t) store_row(out, g, token + t, x, tile[t]);
    }
  }
}

}  // namespace

// Quantization costs one token's K against N * K: the portable one serves.
const Path kNeonPath = {"neon-dotprod", &multiply, &quantize_scalar,
                        &take_row, &code_values, &narrow_values, &narrow_turned_values};

}  // namespace forge
