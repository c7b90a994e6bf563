#include "pack_blocks.h"

#include <algorithm>
#include <cstring>

#include "layout.h"

namespace forge {
namespace {

constexpr std::uint64_t kOnes = 0x0101010101010101u;

// Sixteen codes of one row to one word, or false when one of them is none.
inline bool word_of(const std::uint8_t* fields, std::uint32_t* word) {
  std::uint64_t low, high;
  std::memcpy(&low, fields, 8);
  std::memcpy(&high, fields + 8, 8);
  // Legal bytes are 0, 1 and 2: anything else has a high bit, or both low ones.
  const std::uint64_t wrong = ((low | high) & (0xFC * kOnes)) | (low & (low >> 1) & kOnes) |
                              (high & (high >> 1) & kOnes);
  if (wrong) return false;
  const auto f0 = static_cast<std::uint32_t>(low);
  const auto f1 = static_cast<std::uint32_t>(low >> 32);
  const auto f2 = static_cast<std::uint32_t>(high);
  const auto f3 = static_cast<std::uint32_t>(high >> 32);
  *word = f0 | f1 << 2 | f2 << 4 | f3 << 6;
  return true;
}

std::ptrdiff_t first_wrong(const std::uint8_t* fields, std::size_t count) {
  for (std::size_t c = 0; c < count; ++c) {
    if (fields[c] > 2) return static_cast<std::ptrdiff_t>(c);
  }
  return -1;
}

// `read` fills 16 fields (code + 1) of one row from a column on.
template <class Read>
std::ptrdiff_t pack_groups(std::size_t rows, std::size_t columns, std::size_t first,
                           std::size_t last, std::uint8_t* packed, Read read) {
  const std::size_t blocks = blocks_of(columns);
  for (std::size_t g = first; g < last; ++g) {
    for (std::size_t r = 0; r < kGroupRows; ++r) {
      const std::size_t row = g * kGroupRows + r;
      std::uint8_t* out = packed + g * blocks * kBlockBytes + 4 * r;
      for (std::size_t b = 0; b < blocks; ++b, out += kBlockBytes) {
        std::uint8_t fields[kBlockColumns];
        std::uint32_t word = 0x55555555u;
        if (row < rows) {
          const std::size_t column = b * kBlockColumns;
          const std::size_t count = std::min(kBlockColumns, columns - column);
          std::memset(fields, 1, sizeof fields);
          read(row, column, count, fields);
          if (!word_of(fields, &word)) {
            return static_cast<std::ptrdiff_t>(row * columns + column) +
                   first_wrong(fields, count);
          }
        }
        std::memcpy(out, &word, 4);
      }
    }
  }
  return -1;
}

}  // namespace

std::ptrdiff_t pack_blocks(const std::int8_t* codes, std::size_t rows, std::size_t columns,
                           std::size_t stride, std::size_t first, std::size_t last,
                           std::uint8_t* packed) {
  return pack_groups(rows, columns, first, last, packed,
                     [=](std::size_t row, std::size_t column, std::size_t count,
                         std::uint8_t* fields) {
                       const std::int8_t* in = codes + row * stride + column;
                       for (std::size_t c = 0; c < count; ++c) {
                         fields[c] = static_cast<std::uint8_t>(in[c] + 1);
                       }
                     });
}

std::ptrdiff_t pack_blocks_from_i2(const std::uint8_t* stored, std::size_t rows,
                                   std::size_t columns, std::size_t first, std::size_t last,
                                   std::uint8_t* packed) {
  const std::size_t quarter = (rows + 3) / 4;
  return pack_groups(rows, columns, first, last, packed,
                     [=](std::size_t row, std::size_t column, std::size_t count,
                         std::uint8_t* fields) {
                       const std::uint8_t* in = stored + (row % quarter) * columns + column;
                       const unsigned shift = static_cast<unsigned>(2 * (row / quarter));
                       for (std::size_t c = 0; c < count; ++c) {
                         fields[c] = static_cast<std::uint8_t>(in[c] >> shift & 3u);
                       }
                     });
}

std::ptrdiff_t unpack_blocks(const std::uint8_t* packed, std::size_t rows, std::size_t columns,
                             std::size_t first, std::size_t last, std::int8_t* codes) {
  const std::size_t blocks = blocks_of(columns);
  for (std::size_t row = first * kGroupRows; row < std::min(rows, last * kGroupRows); ++row) {
    const std::uint8_t* in =
        packed + row / kGroupRows * blocks * kBlockBytes + 4 * (row % kGroupRows);
    std::int8_t* out = codes + row * columns;
    for (std::size_t column = 0; column < columns; ++column) {
      const std::size_t within = column % kBlockColumns;
      const std::uint8_t byte = in[column / kBlockColumns * kBlockBytes + within % 4];
      const unsigned field = byte >> (2 * (within / 4)) & 3u;
      if (field == 3u) return static_cast<std::ptrdiff_t>(row * columns + column);
      out[column] = static_cast<std::int8_t>(static_cast<int>(field) - 1);
    }
  }
  return -1;
}

}  // namespace forge
