#include "probe.h"

#include <atomic>
#include <cstring>

#include "linear.h"
#include "threads.h"

namespace forge {

#if defined(FORGE_X86)
std::size_t probe_vnni(std::size_t repeats);
std::size_t probe_avx2(std::size_t repeats);
std::uint64_t probe_read_512(const std::uint8_t* data, std::size_t bytes);
#endif
#if defined(FORGE_AVXVNNI)
std::size_t probe_avxvnni(std::size_t repeats);
#endif
#if defined(FORGE_AMX)
std::size_t probe_amx(std::size_t repeats);
#endif

std::size_t probe_multiply(const char* path, std::size_t repeats, std::size_t threads) {
  if (find_path(path) == nullptr) return 0;
  std::atomic<std::size_t> done{0};
  // As many chunks a thread as a product has; `done` counts those of one thread.
  constexpr std::size_t kChunks = 8;
  parallel(threads, threads * kChunks, [&](std::size_t chunk, std::size_t) {
    const std::size_t own = repeats * (chunk % kChunks + 1) / kChunks -
                            repeats * (chunk % kChunks) / kChunks;
    std::size_t count = 0;
#if defined(FORGE_X86)
    if (std::strcmp(path, "avx512-vnni") == 0) count = probe_vnni(own);
    if (std::strcmp(path, "avx2") == 0) count = probe_avx2(own);
#endif
#if defined(FORGE_AVXVNNI)
    if (std::strcmp(path, "avx-vnni") == 0) count = probe_avxvnni(own);
#endif
#if defined(FORGE_AMX)
    if (std::strcmp(path, "amx-int8") == 0) count = probe_amx(own);
#endif
    if (chunk < kChunks) done += count;
  });
  return done;
}

std::uint64_t probe_read(const std::uint8_t* data, std::size_t bytes, std::size_t threads) {
  std::atomic<std::uint64_t> total{0};
  parallel(threads, threads == 1 ? 1 : threads * 8, [&](std::size_t part, std::size_t count) {
    const std::size_t first = bytes / 64 * part / count * 64;
    const std::size_t last = part + 1 == count ? bytes : bytes / 64 * (part + 1) / count * 64;
#if defined(FORGE_X86)
    if (find_path("avx512-vnni") != nullptr) {
      total += probe_read_512(data + first, last - first);
      return;
    }
#endif
    std::uint64_t sums[8] = {};
    std::size_t i = first;
    for (; i + 64 <= last; i += 64) {
      std::uint64_t words[8];
      std::memcpy(words, data + i, 64);
      for (int u = 0; u < 8; ++u) sums[u] ^= words[u];
    }
    std::uint64_t sum = 0;
    for (const std::uint64_t word : sums) sum ^= word;
    for (; i < last; ++i) sum += data[i];
    total += sum;
  });
  return total;
}

}  // namespace forge
