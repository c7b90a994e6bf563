#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace forge {

std::size_t probe_avx2(std::size_t repeats) {
  __m256i acc[8];
#pragma GCC unroll 8
  for (auto& lane : acc) lane = _mm256_setzero_si256();
  const __m256i a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  for (std::size_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        __m256i product;
        __asm__ volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(a), "x"(b));
        __asm__ volatile("vpaddw %1, %0, %0" : "+x"(acc[i]) : "x"(product));
      }
    }
  }
  return repeats * 64 * 32;
}

}  // namespace forge
