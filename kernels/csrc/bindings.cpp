#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "pack_i2.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using CodesNK = nb::ndarray<const std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MutableCodesNK = nb::ndarray<std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PackedNK = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MutablePackedNK = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

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

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of the harness.";
  m.attr("__version__") = FORGE_VERSION;
  m.def("pack_i2", &pack_i2, "codes"_a.noconvert(), "packed"_a.noconvert(),
        "Packs int8 codes (N, K) into uint8 (ceil(N/4), K), in place in `packed`.");
  m.def("unpack_i2", &unpack_i2, "packed"_a.noconvert(), "codes"_a.noconvert(),
        "Unpacks uint8 (ceil(N/4), K) into int8 codes (N, K), in place in `codes`.");
}
