// What one instruction set implements; linear.cpp drives whichever was chosen.
#pragma once

#include <cstddef>
#include <cstdint>

namespace forge {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1 };

// Activations as the products read them: int8 rows `stride` apart, zero beyond the columns.
struct Activations {
  const std::int8_t* codes;
  std::size_t stride;
  const std::int32_t* sums;   // sum of each row's codes
  const float* scales;        // multiplies each row's codes; null for plain accumulators
  std::size_t tokens;
};

// Where a product goes: int32 accumulators, or y = acc * (activation scale * weight scale) + bias.
struct Output {
  void* data;              // (tokens, rows) int32, fp32 or bf16
  std::size_t rows;        // N
  bool accumulators;       // int32
  Dtype dtype;
  const float* scales;     // one, or one a row
  bool scale_per_row;
  const float* bias;       // one a row, or null
};

struct Weight {
  const std::uint8_t* blocks;  // layout.h
  std::size_t kblocks;         // blocks of 16 columns
};

// As many bf16 values are a cache line, which is then written whole, once.
inline constexpr std::size_t kTurnedRows = 32;

struct Path {
  const char* name;
  // Multiplies row groups first..last with every token.
  void (*multiply)(const Activations&, const Weight&, const Output&, std::size_t first,
                   std::size_t last);
  // Quantizes one token of `columns` values to int8: codes zero up to `stride`, its sum and scale.
  void (*quantize)(const void* values, Dtype dtype, std::size_t columns, std::size_t stride,
                   std::int8_t* codes, std::int32_t* sum, float* scale);
  // Copies one token's `columns` codes: zero up to `stride`, and their sum.
  void (*take)(const std::int8_t* row, std::size_t columns, std::size_t stride, std::int8_t* codes,
               std::int32_t* sum);
  // Codes of weights: round(value * inverse scale), at most one; 0 for what is not a number.
  void (*code)(const float* values, std::size_t count, float inverse, std::int8_t* codes);
  // bf16 of one row's values times a number a column, or where that is null times one number.
  void (*narrow)(const float* values, std::size_t count, float by, const float* by_column,
                 std::uint16_t* narrow);
  // bf16 of at most kTurnedRows rows' values times a number a row, turned: column c of the values
  // is row c of the result, and those are `stride` apart.
  void (*narrow_turned)(const float* values, std::size_t rows, std::size_t columns,
                        const float* by_row, std::size_t stride, std::uint16_t* narrow);
};

// The portable quantizer, for paths without one of their own.
void quantize_scalar(const void* values, Dtype dtype, std::size_t columns, std::size_t stride,
                     std::int8_t* codes, std::int32_t* sum, float* scale);

extern const Path kScalarPath;
#if defined(FORGE_X86)
extern const Path kAvx2Path;
extern const Path kVnniPath;
#endif
#if defined(FORGE_AVXVNNI)
extern const Path kAvxVnniPath;
#endif
#if defined(FORGE_AMX)
extern const Path kAmxPath;
#endif
#if defined(FORGE_NEON)
extern const Path kNeonPath;
#endif

}  // namespace forge
