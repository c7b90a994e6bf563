// The packed layout "i2-64x16" that every path reads; docs: forge_kernels/layout.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace forge {

// Block (g, b) holds rows 64g.. and columns 16b..: word r is row 64g + r, bits 2f, 2f + 1 of its
// byte j hold code + 1 of column 16b + 4f + j. A 32-bit lane is a row, so no path ever sums across
// lanes; a thread reads its rows as one forward stream.
inline constexpr std::size_t kGroupRows = 64;
inline constexpr std::size_t kBlockColumns = 16;
inline constexpr std::size_t kBlockBytes = 256;

// Longest row whose accumulators fit int32 however the fields are scaled: a lane of one field sums
// K / 4 products of at most 128 * 128.
inline constexpr std::size_t kMaxColumns = 131072;

constexpr std::size_t groups_of(std::size_t rows) { return (rows + kGroupRows - 1) / kGroupRows; }
constexpr std::size_t blocks_of(std::size_t columns) {
  return (columns + kBlockColumns - 1) / kBlockColumns;
}

}  // namespace forge
