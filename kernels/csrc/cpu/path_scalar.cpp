// The path that any compiler builds; also what the others are compared with in the driver.
#include "tile.inl"

namespace forge {
namespace {

void multiply(const Activations& x, const Weight& w, const Output& out, std::size_t first,
              std::size_t last) {
  for (std::size_t g = first; g < last; ++g) {
    const std::uint8_t* panel = w.blocks + g * w.kblocks * kBlockBytes;
    for (std::size_t m = 0; m < x.tokens; ++m) {
      std::int32_t tile[kGroupRows] = {};
      const std::int8_t* q = x.codes + m * x.stride;
      for (std::size_t b = 0; b < w.kblocks; ++b) {
        const std::uint8_t* block = panel + b * kBlockBytes;
        for (std::size_t r = 0; r < kGroupRows; ++r) {
          std::int32_t sum = 0;
          for (std::size_t j = 0; j < 4; ++j) {
            const unsigned byte = block[4 * r + j];
            for (std::size_t f = 0; f < 4; ++f) {
              sum += static_cast<std::int32_t>(byte >> (2 * f) & 3u) *
                     q[b * kBlockColumns + 4 * f + j];
            }
          }
          tile[r] += sum;
        }
      }
      store_row(out, g, m, x, tile);
    }
  }
}

}  // namespace

void quantize_scalar(const void* values, Dtype dtype, std::size_t columns, std::size_t stride,
                     std::int8_t* codes, std::int32_t* sum, float* scale) {
  const auto* wide = static_cast<const float*>(values);
  const auto* narrow = static_cast<const std::uint16_t*>(values);
  const auto at = [&](std::size_t c) {
    return dtype == Dtype::kFloat32 ? wide[c] : float_of(narrow[c]);
  };
  float absmax = 0.0f;
  bool nan = false;
  for (std::size_t c = 0; c < columns; ++c) {
    const float magnitude = std::fabs(at(c));
    nan |= magnitude != magnitude;
    absmax = magnitude > absmax ? magnitude : absmax;
  }
  if (nan) absmax = NAN;
  float inverse;
  finish_scale(absmax, &inverse, scale);
  std::memset(codes, 0, stride);
  *sum = 0;
  if (!std::isfinite(absmax)) return;
  for (std::size_t c = 0; c < columns; ++c) {
    const float rounded = std::nearbyint(at(c) * inverse);
    const float low = rounded < -128.0f ? -128.0f : rounded;
    codes[c] = static_cast<std::int8_t>(low > 127.0f ? 127.0f : low);
    *sum += codes[c];
  }
}

const Path kScalarPath = {"scalar", &multiply, &quantize_scalar,
                          &take_row, &code_values, &narrow_values, &narrow_turned_values};

}  // namespace forge
