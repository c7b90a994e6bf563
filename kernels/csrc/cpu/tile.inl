// Shared by the path files. Everything has internal linkage: each file is compiled for another
// instruction set, and the linker must never keep one file's copy for another's callers.

#include <cmath>
#include <cstring>

#include "layout.h"
#include "path.h"

namespace forge {
namespace {

inline std::uint16_t bf16_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;  // as torch rounds a NaN
  bits += 0x7FFFu + (bits >> 16 & 1u);
  return static_cast<std::uint16_t>(bits >> 16);
}

inline float float_of(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Compiled with -ffp-contract=off: each rounding is one of the reference's.
__attribute__((always_inline)) inline void store_rows(const Output& out, std::size_t first,
                                                      std::size_t count, std::size_t token,
                                                      const Activations& x,
                                                      const std::int32_t* tile) {
  const std::int32_t sum = x.sums[token];
  const std::size_t at = token * out.rows + first;
  if (out.accumulators) {
    auto* y = static_cast<std::int32_t*>(out.data) + at;
    for (std::size_t r = 0; r < count; ++r) y[r] = tile[r] - sum;
    return;
  }
  float values[kGroupRows];
  const float scale = x.scales[token];
  if (out.scale_per_row) {
    const float* scales = out.scales + first;
    for (std::size_t r = 0; r < count; ++r) {
      values[r] = static_cast<float>(tile[r] - sum) * (scale * scales[r]);
    }
  } else {
    const float factor = scale * out.scales[0];
    for (std::size_t r = 0; r < count; ++r) values[r] = static_cast<float>(tile[r] - sum) * factor;
  }
  if (out.bias != nullptr) {
    const float* bias = out.bias + first;
    for (std::size_t r = 0; r < count; ++r) values[r] += bias[r];
  }
  if (out.dtype == Dtype::kFloat32) {
    std::memcpy(static_cast<float*>(out.data) + at, values, count * sizeof(float));
    return;
  }
  auto* y = static_cast<std::uint16_t*>(out.data) + at;
  for (std::size_t r = 0; r < count; ++r) y[r] = bf16_of(values[r]);
}

// Writes one token's 64 sums of fields, which are sums of codes plus the token's sum.
inline void store_row(const Output& out, std::size_t group, std::size_t token,
                      const Activations& x, const std::int32_t* tile) {
  const std::size_t first = group * kGroupRows;
  const std::size_t left = out.rows - first;
  if (left >= kGroupRows) {
    store_rows(out, first, kGroupRows, token, x, tile);  // a constant: loops without remainders
  } else {
    store_rows(out, first, left, token, x, tile);
  }
}

// absmax int8: g = max(max |x|, 1e-5), code = round_half_even(x * ((1 / g) * 127)), scale = g / 127
// (torch computes 127 / g as a reciprocal times 127). A token that is not finite gets codes 0 and
// a scale that is not finite.
inline void finish_scale(float absmax, float* inverse, float* scale) {
  const float floor = absmax < 1e-5f ? 1e-5f : absmax;  // a NaN stays
  *inverse = (1.0f / floor) * 127.0f;
  *scale = floor / 127.0f;
}

// Path::take; the loop is the compiler's to vectorize.
inline void take_row(const std::int8_t* row, std::size_t columns, std::size_t stride,
                     std::int8_t* codes, std::int32_t* sum) {
  std::memcpy(codes, row, columns);
  std::memset(codes + columns, 0, stride - columns);
  std::int32_t total = 0;
  for (std::size_t c = 0; c < columns; ++c) total += row[c];
  *sum = total;
}

// Path::code. Clamped before it is rounded, which is the same for -1 and 1, so that the sum below
// rounds half to even as nearbyint does, in vectors of every instruction set.
inline void code_values(const float* values, std::size_t count, float inverse,
                        std::int8_t* codes) {
  constexpr float kToEven = 12582912.0f;  // 1.5 * 2^23: no fraction is left beside it
  for (std::size_t i = 0; i < count; ++i) {
    const float value = values[i] * inverse;
    float most = value > 1.0f ? 1.0f : value;
    most = most < -1.0f ? -1.0f : most;
    most = value == value ? most : 0.0f;
    codes[i] = static_cast<std::int8_t>(static_cast<std::int32_t>((most + kToEven) - kToEven));
  }
}

// Path::narrow.
inline void narrow_values(const float* values, std::size_t count, float by,
                          const float* by_column, std::uint16_t* narrow) {
  if (by_column == nullptr) {
    for (std::size_t i = 0; i < count; ++i) narrow[i] = bf16_of(values[i] * by);
  } else {
    for (std::size_t i = 0; i < count; ++i) narrow[i] = bf16_of(values[i] * by_column[i]);
  }
}

// Path::narrow_turned: by way of a few columns in the order of the values, so that the rounding
// runs in vectors.
inline void narrow_turned_values(const float* values, std::size_t rows, std::size_t columns,
                                 const float* by_row, std::size_t stride, std::uint16_t* narrow) {
  constexpr std::size_t kStrip = 16;
  std::uint16_t strip[kTurnedRows][kStrip];
  for (std::size_t first = 0; first < columns; first += kStrip) {
    const std::size_t left = columns - first, count = left < kStrip ? left : kStrip;
    for (std::size_t r = 0; r < rows; ++r) {
      narrow_values(values + r * columns + first, count, by_row[r], nullptr, strip[r]);
    }
    for (std::size_t c = 0; c < count; ++c) {
      std::uint16_t* to = narrow + (first + c) * stride;
      for (std::size_t r = 0; r < rows; ++r) to[r] = strip[r][c];
    }
  }
}

}  // namespace
}  // namespace forge
