#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace forge {

std::size_t probe_vnni(std::size_t repeats) {
  __m512i acc[16];
#pragma GCC unroll 16
  for (auto& lane : acc) lane = _mm512_setzero_si512();
  const __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (std::size_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(acc[i]) : "v"(a), "v"(b));
      }
    }
  }
  return repeats * 64 * 64;
}

std::uint64_t probe_read_512(const std::uint8_t* data, std::size_t bytes) {
  __m512i sum[8];
  for (auto& lane : sum) lane = _mm512_setzero_si512();
  std::size_t i = 0;
  for (; i + 512 <= bytes; i += 512) {
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
      sum[u] = _mm512_xor_si512(sum[u], _mm512_loadu_si512(data + i + 64 * u));
    }
  }
  __m512i all = sum[0];
  for (int u = 1; u < 8; ++u) all = _mm512_xor_si512(all, sum[u]);
  std::uint64_t result = static_cast<std::uint64_t>(_mm512_reduce_add_epi64(all));
  for (; i < bytes; ++i) result += data[i];
  return result;
}

}  // namespace forge
