#include "pack_i2.h"

#include <algorithm>

namespace forge {

std::ptrdiff_t pack_i2(const std::int8_t* codes, std::size_t rows, std::size_t cols,
                       std::uint8_t* packed) {
  const std::size_t packed_rows = (rows + 3) / 4;
  std::fill(packed, packed + packed_rows * cols, std::uint8_t{0});
  for (std::size_t field = 0; field < 4; ++field) {
    const unsigned shift = static_cast<unsigned>(2 * field);
    for (std::size_t r = 0; r < packed_rows; ++r) {
      const std::size_t row = field * packed_rows + r;
      std::uint8_t* out = packed + r * cols;
      if (row >= rows) {
        for (std::size_t c = 0; c < cols; ++c) out[c] |= static_cast<std::uint8_t>(1u << shift);
        continue;
      }
      const std::int8_t* in = codes + row * cols;
      for (std::size_t c = 0; c < cols; ++c) {
        const int value = in[c] + 1;
        if (value < 0 || value > 2) return static_cast<std::ptrdiff_t>(row * cols + c);
        out[c] |= static_cast<std::uint8_t>(static_cast<unsigned>(value) << shift);
      }
    }
  }
  return -1;
}

std::ptrdiff_t unpack_i2(const std::uint8_t* packed, std::size_t rows, std::size_t cols,
                         std::int8_t* codes) {
  const std::size_t packed_rows = (rows + 3) / 4;
  for (std::size_t row = 0; row < rows; ++row) {
    const unsigned shift = static_cast<unsigned>(2 * (row / packed_rows));
    const std::uint8_t* in = packed + (row % packed_rows) * cols;
    std::int8_t* out = codes + row * cols;
    for (std::size_t c = 0; c < cols; ++c) {
      const unsigned field = (in[c] >> shift) & 3u;
      if (field == 3u) return static_cast<std::ptrdiff_t>(row * cols + c);
      out[c] = static_cast<std::int8_t>(static_cast<int>(field) - 1);
    }
  }
  return -1;
}

}  // namespace forge
