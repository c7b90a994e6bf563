// W1.58A8 products: quantize activations, multiply exactly, rescale.
#pragma once

#include <cstddef>
#include <cstdint>

#include "path.h"

namespace forge {

// Paths this machine can run, fastest first; ends with the scalar one.
std::size_t path_count();
const Path& path_at(std::size_t index);
// The one of that name, or null when it is unknown or cannot run here.
const Path* find_path(const char* name);

// acc (tokens, rows) int32 = q (tokens, columns) int8 times the codes, exactly.
// q rows are `stride` apart and may end anywhere.
void multiply_codes(const Path& path, const std::int8_t* q, std::size_t tokens,
                    std::size_t columns, std::size_t stride, const std::uint8_t* blocks,
                    std::size_t rows, std::int32_t* acc, std::size_t threads);

// y (tokens, rows) = quantized x (tokens, columns) times codes, rescaled, plus bias.
struct Linear {
  const void* x;
  Dtype x_dtype;
  std::size_t tokens;
  std::size_t columns;
  const std::uint8_t* blocks;
  std::size_t rows;
  const float* scales;
  bool scale_per_row;
  const float* bias;
  void* y;
  Dtype y_dtype;
};
void apply_linear(const Path& path, const Linear& linear, std::size_t threads);

// Codes int8 (tokens, columns) and scales fp32 (tokens) of activations.
void quantize_tokens(const Path& path, const void* x, Dtype dtype, std::size_t tokens,
                     std::size_t columns, std::int8_t* codes, float* scales, std::size_t threads);

// y (tokens, rows) = q times codes, rescaled, plus bias: a training forward, whose weight is another
// one at every step. Returns whether all codes were -1, 0 or +1; if not, y holds nothing.
struct CodesLinear {
  const std::int8_t* q;        // (tokens, columns)
  const float* q_scales;       // one a token
  std::size_t tokens;
  std::size_t columns;
  const std::int8_t* codes;    // (rows, columns)
  std::size_t rows;
  const float* scales;
  bool scale_per_row;
  const float* bias;
  void* y;
  Dtype y_dtype;
};
bool apply_codes(const Path& path, const CodesLinear& linear, std::size_t threads);

// int8 codes of fp32 weights (count) over one scale, see Path::code.
void code_weights(const Path& path, const float* values, std::size_t count, const float* scale,
                  std::int8_t* codes, std::size_t threads);

// bf16 of fp32 values (rows, columns): times the row's factor, turned, and times the column's.
struct Narrowing {
  const float* values;
  std::size_t rows;
  std::size_t columns;
  const float* by_row;       // one a row
  std::uint16_t* turned;     // (columns, rows): values times those, or null
  const float* by_column;    // one a column, or one
  bool per_column;
  std::uint16_t* columnwise; // (rows, columns): values times those, or null
};
void narrow_rows(const Path& path, const Narrowing& narrowing, std::size_t threads);

}  // namespace forge
