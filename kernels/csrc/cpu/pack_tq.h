// ggml's ternary blocks of 256 values, TQ2_0 and TQ1_0, from and to the "i2-rowblock" layout.
//
// Layouts: ggml's `ggml-quants.c` (`quantize_row_tq1_0_ref`, `quantize_row_tq2_0_ref`), as in
// forge_harness/formats/tq.py. A byte of the row-block layout holds one column of four rows, a byte
// of a block up to five columns of one row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace forge {

constexpr std::size_t kTqBlock = 256;

// Bytes of a block, its fp16 scale included.
constexpr std::size_t tq_block_bytes(bool base3) { return base3 ? 54 : 66; }

// Turns rows first..last of `packed` (n x cols, row blocks) into four rows of blocks each: `blocks`
// is 4 x n x blocks a row x bytes a block. Columns beyond `cols` hold code 0. A block without a
// nonzero code gets scale 0, every other one `scale` (bits of an fp16). Returns whether no field
// held 3; with one, what was written means nothing.
bool encode_tq(bool base3, const std::uint8_t* packed, std::size_t n, std::size_t cols,
               std::uint16_t scale, std::size_t first, std::size_t last, std::uint8_t* blocks);

// The way back, rows first..last of `packed` (n x cols, cols a multiple of 256). Returns whether
// every byte stood for codes.
bool decode_tq(bool base3, const std::uint8_t* blocks, std::size_t n, std::size_t cols,
               std::size_t first, std::size_t last, std::uint8_t* packed);

}  // namespace forge
