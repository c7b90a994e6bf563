// Packing into and out of "i2-64x16" (layout.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace forge {

// Packs groups first..last of `codes` (rows x columns, rows `stride` apart, values -1, 0, +1).
// Rows and columns of padding hold code 0. Returns the flat index row * columns + column of the
// first other value, or -1 when every group was packed.
std::ptrdiff_t pack_blocks(const std::int8_t* codes, std::size_t rows, std::size_t columns,
                           std::size_t stride, std::size_t first, std::size_t last,
                           std::uint8_t* packed);

// The same from the storage layout (pack_i2.h): ceil(rows / 4) x columns bytes.
std::ptrdiff_t pack_blocks_from_i2(const std::uint8_t* stored, std::size_t rows,
                                   std::size_t columns, std::size_t first, std::size_t last,
                                   std::uint8_t* packed);

// Inverse of pack_blocks for groups first..last. Returns the flat index of the first field that
// holds 3, or -1. Padding is not looked at.
std::ptrdiff_t unpack_blocks(const std::uint8_t* packed, std::size_t rows, std::size_t columns,
                             std::size_t first, std::size_t last, std::int8_t* codes);

}  // namespace forge
