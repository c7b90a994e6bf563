// 2-bit ternary codes in the byte order of the Hugging Face packed BitNet checkpoints.
#pragma once

#include <cstddef>
#include <cstdint>

namespace forge {

// Packs `codes` (rows x cols, row-major, values -1, 0, +1) into ceil(rows / 4) x cols bytes.
// With R = ceil(rows / 4), bits 2i..2i+1 of byte (r, c) hold codes(i * R + r, c) + 1; rows past
// the end are stored as 1 (code 0). Returns the flat index of the first value outside -1..1,
// or -1 when every value was packed.
std::ptrdiff_t pack_i2(const std::int8_t* codes, std::size_t rows, std::size_t cols,
                       std::uint8_t* packed);

// Inverse of pack_i2: writes rows x cols codes. Returns the flat index (in the unpacked matrix)
// of the first field that holds 3, which no ternary code uses, or -1. Fields of rows past the end
// are not looked at: other packers leave other values there.
std::ptrdiff_t unpack_i2(const std::uint8_t* packed, std::size_t rows, std::size_t cols,
                         std::int8_t* codes);

}  // namespace forge
