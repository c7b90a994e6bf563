#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace forge {

std::size_t probe_avxvnni(std::size_t repeats) {
  // Two products begin each cycle and take five: eight sums would wait for each other.
  constexpr int kSums = 12;
  __m256i acc[kSums];
#pragma GCC unroll 12
  for (auto& lane : acc) lane = _mm256_setzero_si256();
  const __m256i a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  for (std::size_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 64
    for (int i = 0; i < 64; ++i) {
      __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc[i % kSums]) : "x"(a), "x"(b));
    }
  }
  return repeats * 64 * 32;
}

}  // namespace forge
