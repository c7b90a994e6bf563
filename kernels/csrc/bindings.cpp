#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/layout.h"
#include "cpu/linear.h"
#include "cpu/pack_blocks.h"
#include "cpu/pack_i2.h"
#include "cpu/pack_tq.h"
#include "cpu/probe.h"
#include "cpu/threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using CodesNK = nb::ndarray<const std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MutableCodesNK = nb::ndarray<std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PackedNK = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MutablePackedNK = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Blocks = nb::ndarray<const std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using MutableBlocks = nb::ndarray<std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// The same words as forge_kernels/reference.py.
[[noreturn]] void refuse(const char* what, int value, std::ptrdiff_t index, std::size_t cols,
                         const char* why) {
  const auto flat = static_cast<std::size_t>(index);
  throw std::invalid_argument(std::string(what) + " " + std::to_string(value) + " at row " +
                              std::to_string(flat / cols) + ", column " +
                              std::to_string(flat % cols) + " " + why);
}

void check_shapes(std::size_t rows, std::size_t cols, std::size_t packed_rows,
                  std::size_t packed_cols) {
  if (packed_rows != (rows + 3) / 4 || packed_cols != cols) {
    throw std::invalid_argument("packed buffer is " + std::to_string(packed_rows) + " x " +
                                std::to_string(packed_cols) + "; codes of " +
                                std::to_string(rows) + " x " + std::to_string(cols) + " need " +
                                std::to_string((rows + 3) / 4) + " x " + std::to_string(cols));
  }
}

template <class Array>
void check_blocks(const Array& packed, std::size_t rows, std::size_t cols) {
  if (packed.shape(0) != forge::groups_of(rows) || packed.shape(1) != forge::blocks_of(cols) ||
      packed.shape(2) != forge::kBlockBytes) {
    throw std::invalid_argument("packed blocks do not fit codes of " + std::to_string(rows) +
                                " x " + std::to_string(cols));
  }
}

void pack_i2(CodesNK codes, MutablePackedNK packed) {
  check_shapes(codes.shape(0), codes.shape(1), packed.shape(0), packed.shape(1));
  std::ptrdiff_t bad;
  {
    nb::gil_scoped_release release;
    bad = forge::pack_i2(codes.data(), codes.shape(0), codes.shape(1), packed.data());
  }
  if (bad >= 0) {
    refuse("code", codes.data()[bad], bad, codes.shape(1), "is not -1, 0 or +1");
  }
}

void unpack_i2(PackedNK packed, MutableCodesNK codes) {
  check_shapes(codes.shape(0), codes.shape(1), packed.shape(0), packed.shape(1));
  std::ptrdiff_t bad;
  {
    nb::gil_scoped_release release;
    bad = forge::unpack_i2(packed.data(), codes.shape(0), codes.shape(1), codes.data());
  }
  if (bad >= 0) refuse("field", 3, bad, codes.shape(1), "stands for no code");
}

using TqBlocks = nb::ndarray<const std::uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using MutableTqBlocks = nb::ndarray<std::uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

template <class Array>
void check_tq(const Array& blocks, bool base3, std::size_t rows, std::size_t cols) {
  if (blocks.shape(0) != 4 || blocks.shape(1) != rows ||
      blocks.shape(2) != (cols + forge::kTqBlock - 1) / forge::kTqBlock ||
      blocks.shape(3) != forge::tq_block_bytes(base3)) {
    throw std::invalid_argument("TQ blocks do not fit packed codes of " + std::to_string(rows) +
                                " x " + std::to_string(cols));
  }
}

// Runs body(first, last) over rows, split over threads; returns whether all returned true.
template <class Body>
bool over_rows(std::size_t rows, std::size_t threads, Body body) {
  nb::gil_scoped_release release;
  std::atomic<bool> sound{true};
  forge::parallel(threads, std::min(rows, 4 * threads), [&](std::size_t part, std::size_t count) {
    if (!body(rows * part / count, rows * (part + 1) / count)) sound = false;
  });
  return sound;
}

bool encode_tq(bool base3, PackedNK packed, std::uint16_t scale, MutableTqBlocks blocks,
               std::size_t threads) {
  const std::size_t rows = packed.shape(0), cols = packed.shape(1);
  check_tq(blocks, base3, rows, cols);
  return over_rows(rows, threads, [&](std::size_t first, std::size_t last) {
    return forge::encode_tq(base3, packed.data(), rows, cols, scale, first, last, blocks.data());
  });
}

bool decode_tq(bool base3, TqBlocks blocks, MutablePackedNK packed, std::size_t threads) {
  const std::size_t rows = packed.shape(0), cols = packed.shape(1);
  check_tq(blocks, base3, rows, cols);
  if (cols % forge::kTqBlock != 0) {
    throw std::invalid_argument(std::to_string(cols) + " columns are no whole TQ blocks");
  }
  return over_rows(rows, threads, [&](std::size_t first, std::size_t last) {
    return forge::decode_tq(base3, blocks.data(), rows, cols, first, last, packed.data());
  });
}

// Runs body(first, last) over groups, split over threads; returns the smallest index it found.
template <class Body>
std::ptrdiff_t over_groups(std::size_t groups, std::size_t threads, Body body) {
  nb::gil_scoped_release release;
  std::ptrdiff_t bad = -1;
  std::mutex mutex;
  forge::parallel(threads, std::min(groups, 8 * threads),
                  [&](std::size_t part, std::size_t count) {
                    const std::ptrdiff_t found =
                        body(groups * part / count, groups * (part + 1) / count);
                    if (found < 0) return;
                    const std::lock_guard<std::mutex> lock(mutex);
                    bad = bad < 0 ? found : std::min(bad, found);
                  });
  return bad;
}

nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<3>> allocate_blocks(std::size_t rows,
                                                                   std::size_t cols) {
  const std::size_t groups = forge::groups_of(rows), blocks = forge::blocks_of(cols);
  std::uint8_t* data = forge::allocate_weights(groups * blocks * forge::kBlockBytes);
  if (data == nullptr) throw std::bad_alloc();
  nb::capsule owner(data, [](void* memory) noexcept {
    forge::free_weights(static_cast<std::uint8_t*>(memory));
  });
  return {data, {groups, blocks, forge::kBlockBytes}, owner};
}

void pack_blocks(CodesNK codes, MutableBlocks packed, std::size_t threads) {
  const std::size_t rows = codes.shape(0), cols = codes.shape(1);
  check_blocks(packed, rows, cols);
  const std::ptrdiff_t bad =
      over_groups(forge::groups_of(rows), threads, [&](std::size_t first, std::size_t last) {
        return forge::pack_blocks(codes.data(), rows, cols, cols, first, last, packed.data());
      });
  if (bad >= 0) refuse("code", codes.data()[bad], bad, cols, "is not -1, 0 or +1");
}

void pack_blocks_from_i2(PackedNK stored, std::size_t rows, MutableBlocks packed,
                         std::size_t threads) {
  const std::size_t cols = stored.shape(1);
  check_shapes(rows, cols, stored.shape(0), cols);
  check_blocks(packed, rows, cols);
  const std::ptrdiff_t bad =
      over_groups(forge::groups_of(rows), threads, [&](std::size_t first, std::size_t last) {
        return forge::pack_blocks_from_i2(stored.data(), rows, cols, first, last, packed.data());
      });
  if (bad >= 0) refuse("field", 3, bad, cols, "stands for no code");
}

void unpack_blocks(Blocks packed, MutableCodesNK codes, std::size_t threads) {
  const std::size_t rows = codes.shape(0), cols = codes.shape(1);
  check_blocks(packed, rows, cols);
  const std::ptrdiff_t bad =
      over_groups(forge::groups_of(rows), threads, [&](std::size_t first, std::size_t last) {
        return forge::unpack_blocks(packed.data(), rows, cols, first, last, codes.data());
      });
  if (bad >= 0) refuse("field", 3, bad, cols, "stands for no code");
}

const forge::Path& path_named(const char* name) {
  const forge::Path* path = forge::find_path(name);
  if (path == nullptr) throw std::invalid_argument(std::string("no such path here: ") + name);
  return *path;
}

std::vector<std::string> paths() {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < forge::path_count(); ++i) names.push_back(forge::path_at(i).name);
  return names;
}

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Fake tensors and wrappers around others have no memory, and say so by a null address.
void check_memory(std::uintptr_t address, std::size_t count, const char* what) {
  if (address == 0 && count != 0) {
    throw std::invalid_argument(std::string(what) +
                                " has no memory of its own; expected a plain tensor on the CPU, "
                                "not a fake one or one that wraps others");
  }
}

// `y` is written while the others are still read.
void check_apart(std::uintptr_t y, std::size_t y_bytes, std::uintptr_t other, std::size_t bytes,
                 const char* what) {
  if (bytes != 0 && y < other + bytes && other < y + y_bytes) {
    throw std::invalid_argument(std::string("out shares memory with ") + what +
                                "; expected memory of its own");
  }
}

// Addresses and not arrays: a call with torch tensors through DLPack costs 5 us, a product of one
// token 15. The caller has checked every shape, dtype and stride.
void linear(const char* path, std::uintptr_t x, int x_dtype, std::size_t tokens,
            std::size_t columns, std::uintptr_t blocks, std::size_t rows, std::uintptr_t scales,
            bool scale_per_row, std::uintptr_t bias, std::uintptr_t y, int y_dtype,
            std::size_t threads) {
  const forge::Path& chosen = path_named(path);
  const forge::Linear call{at<const void>(x),
                           static_cast<forge::Dtype>(x_dtype),
                           tokens,
                           columns,
                           at<const std::uint8_t>(blocks),
                           rows,
                           at<const float>(scales),
                           scale_per_row,
                           at<const float>(bias),
                           at<void>(y),
                           static_cast<forge::Dtype>(y_dtype)};
  check_memory(x, tokens * columns, "x");
  check_memory(blocks, rows * columns, "the packed weight");
  check_memory(scales, 1, "the scale");
  check_memory(y, tokens * rows, "out");
  const std::size_t y_bytes = tokens * rows * (call.y_dtype == forge::Dtype::kFloat32 ? 4 : 2);
  const std::size_t block_bytes =
      forge::groups_of(rows) * forge::blocks_of(columns) * forge::kBlockBytes;
  check_apart(y, y_bytes, blocks, block_bytes, "the packed weight");
  check_apart(y, y_bytes, scales, scale_per_row ? 4 * rows : 4, "the scale");
  check_apart(y, y_bytes, bias, bias == 0 ? 0 : 4 * rows, "the bias");
  nb::gil_scoped_release release;
  forge::apply_linear(chosen, call, threads);
}

void multiply(const char* path, std::uintptr_t q, std::size_t tokens, std::size_t columns,
              std::uintptr_t blocks, std::size_t rows, std::uintptr_t acc, std::size_t threads) {
  const forge::Path& chosen = path_named(path);
  check_memory(q, tokens * columns, "q");
  check_memory(blocks, rows * columns, "the packed weight");
  check_memory(acc, tokens * rows, "the result");
  nb::gil_scoped_release release;
  forge::multiply_codes(chosen, at<const std::int8_t>(q), tokens, columns, columns,
                        at<const std::uint8_t>(blocks), rows, at<std::int32_t>(acc), threads);
}

void quantize(const char* path, std::uintptr_t x, int dtype, std::size_t tokens,
              std::size_t columns, std::uintptr_t codes, std::uintptr_t scales,
              std::size_t threads) {
  const forge::Path& chosen = path_named(path);
  check_memory(x, tokens * columns, "x");
  check_memory(codes, tokens * columns, "the result");
  nb::gil_scoped_release release;
  forge::quantize_tokens(chosen, at<const void>(x), static_cast<forge::Dtype>(dtype), tokens,
                         columns, at<std::int8_t>(codes), at<float>(scales), threads);
}

bool linear_of_codes(const char* path, std::uintptr_t q, std::uintptr_t q_scales,
                     std::size_t tokens, std::size_t columns, std::uintptr_t codes,
                     std::size_t rows, std::uintptr_t scales, bool scale_per_row,
                     std::uintptr_t bias, std::uintptr_t y, int y_dtype, std::size_t threads) {
  const forge::Path& chosen = path_named(path);
  check_memory(q, tokens * columns, "q");
  check_memory(q_scales, tokens, "the scales of q");
  check_memory(codes, rows * columns, "the codes");
  check_memory(scales, 1, "the scale");
  check_memory(y, tokens * rows, "the result");
  const forge::CodesLinear call{at<const std::int8_t>(q), at<const float>(q_scales), tokens,
                                columns, at<const std::int8_t>(codes), rows,
                                at<const float>(scales), scale_per_row, at<const float>(bias),
                                at<void>(y), static_cast<forge::Dtype>(y_dtype)};
  nb::gil_scoped_release release;
  return forge::apply_codes(chosen, call, threads);
}

void code_weights(const char* path, std::uintptr_t values, std::size_t count,
                  std::uintptr_t scale, std::uintptr_t codes, std::size_t threads) {
  const forge::Path& chosen = path_named(path);
  check_memory(values, count, "the weight");
  check_memory(scale, 1, "the scale");
  check_memory(codes, count, "the result");
  nb::gil_scoped_release release;
  forge::code_weights(chosen, at<const float>(values), count, at<const float>(scale),
                      at<std::int8_t>(codes), threads);
}

void narrow_rows(const char* path, std::uintptr_t values, std::size_t rows, std::size_t columns,
                 std::uintptr_t by_row, std::uintptr_t turned, std::uintptr_t by_column,
                 bool per_column, std::uintptr_t columnwise, std::size_t threads) {
  const forge::Path& chosen = path_named(path);
  check_memory(values, rows * columns, "the values");
  if (turned != 0) check_memory(by_row, rows, "the rows' factors");
  if (columnwise != 0) check_memory(by_column, 1, "the columns' factors");
  const forge::Narrowing call{at<const float>(values),  rows,       columns,
                              at<const float>(by_row),  at<std::uint16_t>(turned),
                              at<const float>(by_column), per_column,
                              at<std::uint16_t>(columnwise)};
  nb::gil_scoped_release release;
  forge::narrow_rows(chosen, call, threads);
}

std::size_t probe_multiply(const char* path, std::size_t repeats, std::size_t threads) {
  nb::gil_scoped_release release;
  return forge::probe_multiply(path, repeats, threads);
}

std::uint64_t probe_read(std::uintptr_t data, std::size_t bytes, std::size_t threads) {
  nb::gil_scoped_release release;
  return forge::probe_read(at<const std::uint8_t>(data), bytes, threads);
}

// For benchmarks: a foreign kernel of ggml's vec_dot form, called for every row of a weight of
// 2-bit codes. A call from Python would take longer than the row.
using VecDot = void (*)(int n, float* s, std::size_t bs, const void* vx, std::size_t bx,
                        const void* vy, std::size_t by, int nrc);

void call_vec_dot_rows(std::uintptr_t function, std::uintptr_t weights, std::uintptr_t q,
                       std::uintptr_t sums, std::size_t rows, std::size_t columns,
                       std::size_t tokens) {
  const auto vec_dot = reinterpret_cast<VecDot>(function);
  nb::gil_scoped_release release;
  for (std::size_t r = 0; r < rows; ++r) {
    vec_dot(static_cast<int>(columns), at<float>(sums) + r * tokens, 1,
            at<const std::uint8_t>(weights) + r * columns / 4, columns, at<const void>(q), columns,
            static_cast<int>(tokens));
  }
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of the harness.";
  m.attr("__version__") = FORGE_VERSION;
  m.def("pack_i2", &pack_i2, "codes"_a.noconvert(), "packed"_a.noconvert(),
        "Packs int8 codes (N, K) into uint8 (ceil(N/4), K), in place in `packed`.");
  m.def("unpack_i2", &unpack_i2, "packed"_a.noconvert(), "codes"_a.noconvert(),
        "Unpacks uint8 (ceil(N/4), K) into int8 codes (N, K), in place in `codes`.");
  m.def("encode_tq", &encode_tq, "base3"_a, "packed"_a.noconvert(), "scale"_a,
        "blocks"_a.noconvert(), "threads"_a,
        "Turns row blocks into TQ1_0 (base3) or TQ2_0; returns whether no field held 3.");
  m.def("decode_tq", &decode_tq, "base3"_a, "blocks"_a.noconvert(), "packed"_a.noconvert(),
        "threads"_a, "The way back; returns whether every byte stood for codes.");
  m.def("allocate_blocks", &allocate_blocks, "rows"_a, "columns"_a,
        "Returns uint8 (ceil(N/64), ceil(K/16), 256), not initialized, on huge pages if large.");
  m.def("pack_blocks", &pack_blocks, "codes"_a.noconvert(), "packed"_a.noconvert(), "threads"_a,
        "Packs int8 codes (N, K) into blocks, in place in `packed`.");
  m.def("pack_blocks_from_i2", &pack_blocks_from_i2, "stored"_a.noconvert(), "rows"_a,
        "packed"_a.noconvert(), "threads"_a, "Turns uint8 (ceil(N/4), K) into blocks.");
  m.def("unpack_blocks", &unpack_blocks, "packed"_a.noconvert(), "codes"_a.noconvert(),
        "threads"_a, "Unpacks blocks into int8 codes (N, K), in place in `codes`.");
  m.def("paths", &paths, "Returns the instruction sets this processor runs, fastest first.");
  m.def("linear", &linear, "path"_a, "x"_a, "x_dtype"_a, "tokens"_a, "columns"_a, "blocks"_a,
        "rows"_a, "scales"_a, "scale_per_row"_a, "bias"_a, "y"_a, "y_dtype"_a, "threads"_a,
        "Quantizes, multiplies, rescales. Takes addresses; dtypes are 0 (fp32) or 1 (bf16).");
  m.def("multiply", &multiply, "path"_a, "q"_a, "tokens"_a, "columns"_a, "blocks"_a, "rows"_a,
        "acc"_a, "threads"_a, "int32 accumulators of int8 tokens. Takes addresses.");
  m.def("quantize", &quantize, "path"_a, "x"_a, "dtype"_a, "tokens"_a, "columns"_a, "codes"_a,
        "scales"_a, "threads"_a, "absmax int8 of tokens. Takes addresses.");
  m.def("linear_of_codes", &linear_of_codes, "path"_a, "q"_a, "q_scales"_a, "tokens"_a,
        "columns"_a, "codes"_a, "rows"_a, "scales"_a, "scale_per_row"_a, "bias"_a, "y"_a,
        "y_dtype"_a, "threads"_a,
        "Packs and multiplies int8 codes, rescales; False if not ternary. Takes addresses.");
  m.def("code_weights", &code_weights, "path"_a, "values"_a, "count"_a, "scale"_a, "codes"_a,
        "threads"_a, "int8 codes of fp32 weights over one scale. Takes addresses.");
  m.def("narrow_rows", &narrow_rows, "path"_a, "values"_a, "rows"_a, "columns"_a, "by_row"_a,
        "turned"_a, "by_column"_a, "per_column"_a, "columnwise"_a, "threads"_a,
        "bf16 of fp32 values times factors, the rows' turned. Takes addresses; 0: left out.");
  m.def("probe_multiply", &probe_multiply, "path"_a, "repeats"_a, "threads"_a,
        "Runs the path's multiply-add on registers; returns how many a thread did, 0 for none.");
  m.def("call_vec_dot_rows", &call_vec_dot_rows, "function"_a, "weights"_a, "q"_a, "sums"_a,
        "rows"_a, "columns"_a, "tokens"_a,
        "Calls a foreign vec_dot for every row of a weight. Takes addresses.");
  m.def("probe_read", &probe_read, "data"_a, "nbytes"_a, "threads"_a,
        "Reads memory once; returns a value that depends on all of it.");
}
