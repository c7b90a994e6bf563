// Ceilings of this machine, for the roofline: what no product can be faster than.
#pragma once

#include <cstddef>
#include <cstdint>

namespace forge {

// Multiply-adds of bytes on registers alone, `repeats` times 64 chains; returns how many were done
// on each thread, or 0 where the path has no such instruction. "avx512-vnni": vpdpbusd on 512 bits;
// "avx-vnni": on 256 bits; "avx2": vpmaddubsw and vpaddw on 256 bits; "amx-int8": tdpbsud on full
// tiles.
std::size_t probe_multiply(const char* path, std::size_t repeats, std::size_t threads);

// Reads `bytes` once, split over threads; returns a value that depends on all of them.
std::uint64_t probe_read(const std::uint8_t* data, std::size_t bytes, std::size_t threads);

}  // namespace forge
