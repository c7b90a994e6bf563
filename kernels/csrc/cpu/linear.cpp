#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "layout.h"
#include "pack_blocks.h"
#include "threads.h"

#if defined(FORGE_AMX) || defined(FORGE_AVXVNNI)
#include <cpuid.h>
#endif
#if defined(FORGE_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace forge {

#if defined(FORGE_AMX)
bool amx_permitted();
#endif

namespace {

// Below this many multiply-adds a second thread costs more than it takes over (about 2 us).
constexpr std::size_t kWorthAThread = 1u << 19;
constexpr std::size_t kAlign = 64;

#if defined(FORGE_AMX)
// g++ 10 has no name for these.
bool has_tiles() {
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kGfni = 1u << 8, kTile = 1u << 24, kInt8 = 1u << 25;
  return (ecx & kGfni) != 0 && (edx & kTile) != 0 && (edx & kInt8) != 0;
}
#endif

#if defined(FORGE_AVXVNNI)
// Nor has it one for this.
bool has_avxvnni() {
  unsigned most, eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &most, &ebx, &ecx, &edx) == 0 || most < 1) return false;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kAvxVnni = 1u << 4;
  return (eax & kAvxVnni) != 0;
}
#endif

bool runs_here(const Path& path) {
#if defined(FORGE_AMX)
  if (&path == &kAmxPath) return runs_here(kVnniPath) && has_tiles() && amx_permitted();
#endif
#if defined(FORGE_X86)
  if (&path == &kVnniPath) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  }
  if (&path == &kAvx2Path) return __builtin_cpu_supports("avx2");
#endif
#if defined(FORGE_AVXVNNI)
  if (&path == &kAvxVnniPath) return runs_here(kAvx2Path) && has_avxvnni();
#endif
#if defined(FORGE_NEON) && defined(__linux__)
  if (&path == &kNeonPath) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
  (void)path;
  return true;
}

struct Paths {
  const Path* found[5] = {};
  std::size_t count = 0;
  Paths() {
#if defined(FORGE_AMX)
    add(kAmxPath);
#endif
#if defined(FORGE_X86)
    add(kVnniPath);
#if defined(FORGE_AVXVNNI)
    add(kAvxVnniPath);
#endif
    add(kAvx2Path);
#endif
#if defined(FORGE_NEON)
    add(kNeonPath);
#endif
    add(kScalarPath);
  }
  void add(const Path& path) {
    if (runs_here(path)) found[count++] = &path;
  }
};

const Paths& paths() {
  static const Paths all;
  return all;
}

// Grows and stays, as a thread that multiplies once usually does so again; what is larger than
// kMostKept is given back after the call.
class Scratch {
 public:
  std::uint8_t* take(std::size_t bytes) {
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{kAlign})));
      size_ = bytes;
    }
    return data_.get();
  }
  void give_back() {
    constexpr std::size_t kMostKept = 64u << 20;
    if (size_ <= kMostKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  struct Free {
    void operator()(std::uint8_t* data) const {
      ::operator delete(data, std::align_val_t{kAlign});
    }
  };
  std::unique_ptr<std::uint8_t[], Free> data_;
  std::size_t size_ = 0;
};

// Memory of a scratch for the length of a call.
struct Lease {
  Scratch& scratch;
  std::uint8_t* data;

  Lease(Scratch& of, std::size_t bytes) : scratch(of), data(of.take(bytes)) {}
  ~Lease() { scratch.give_back(); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
};

struct Quantized {
  std::size_t stride;
  Lease lease;
  std::int8_t* codes;
  std::int32_t* sums;
  float* scales;

  Quantized(std::size_t tokens, std::size_t columns)
      : stride(stride_of(columns)),
        lease(scratch(), tokens * (stride + sizeof *sums + sizeof *scales)),
        codes(reinterpret_cast<std::int8_t*>(lease.data)),
        sums(reinterpret_cast<std::int32_t*>(lease.data + tokens * stride)),
        scales(reinterpret_cast<float*>(sums + tokens)) {}

  static Scratch& scratch() {
    thread_local Scratch own;
    return own;
  }
  // Not a multiple of 4096: rows that far apart would compete for the same cache sets.
  static std::size_t stride_of(std::size_t columns) {
    const std::size_t padded = (columns + kAlign - 1) / kAlign * kAlign;
    return padded % 1024 == 0 ? padded + kAlign : padded;
  }

  Activations activations(std::size_t tokens, bool scaled) const {
    return {codes, stride, sums, scaled ? scales : nullptr, tokens};
  }
};

std::size_t threads_for(std::size_t work, std::size_t threads) {
  return std::max<std::size_t>(1, std::min(threads, work / kWorthAThread + 1));
}

// Pieces of work, split so that a thread that comes late still finds something to do, and each
// chunk is one forward stream.
std::size_t chunks_for(std::size_t pieces, std::size_t threads) {
  constexpr std::size_t kChunksAThread = 8;
  return threads == 1 ? 1 : std::min(pieces, threads * kChunksAThread);
}

void multiply(const Path& path, const Activations& x, const Weight& weight, const Output& out,
              std::size_t columns, std::size_t threads) {
  const std::size_t groups = groups_of(out.rows);
  threads = threads_for(x.tokens * out.rows * columns, threads);
  parallel(threads, chunks_for(groups, threads), [&](std::size_t chunk, std::size_t count) {
    path.multiply(x, weight, out, groups * chunk / count, groups * (chunk + 1) / count);
  });
}

// Calls each(token) for every token, on as many threads as are worth it.
template <class Each>
void for_tokens(std::size_t tokens, std::size_t columns, std::size_t threads, Each each) {
  threads = threads_for(16 * tokens * columns, threads);
  parallel(threads, chunks_for(tokens, threads), [&](std::size_t chunk, std::size_t count) {
    const std::size_t last = tokens * (chunk + 1) / count;
    for (std::size_t m = tokens * chunk / count; m < last; ++m) each(m);
  });
}

}  // namespace

std::size_t path_count() { return paths().count; }

const Path& path_at(std::size_t index) { return *paths().found[index]; }

const Path* find_path(const char* name) {
  for (std::size_t i = 0; i < path_count(); ++i) {
    if (std::strcmp(path_at(i).name, name) == 0) return &path_at(i);
  }
  return nullptr;
}

void multiply_codes(const Path& path, const std::int8_t* q, std::size_t tokens,
                    std::size_t columns, std::size_t stride, const std::uint8_t* blocks,
                    std::size_t rows, std::int32_t* acc, std::size_t threads) {
  const Quantized copy(tokens, columns);
  for_tokens(tokens, columns, threads, [&](std::size_t m) {
    path.take(q + m * stride, columns, copy.stride, copy.codes + m * copy.stride, copy.sums + m);
  });
  const Output out{acc, rows, true, Dtype::kFloat32, nullptr, false, nullptr};
  multiply(path, copy.activations(tokens, false), {blocks, blocks_of(columns)}, out, columns,
           threads);
}

void apply_linear(const Path& path, const Linear& linear, std::size_t threads) {
  const Quantized quantized(linear.tokens, linear.columns);
  const std::size_t width = linear.x_dtype == Dtype::kFloat32 ? 4 : 2;
  const auto* x = static_cast<const std::uint8_t*>(linear.x);
  for_tokens(linear.tokens, linear.columns, threads, [&](std::size_t m) {
    path.quantize(x + m * linear.columns * width, linear.x_dtype, linear.columns, quantized.stride,
                  quantized.codes + m * quantized.stride, quantized.sums + m,
                  quantized.scales + m);
  });
  const Output out{linear.y,      linear.rows,          false,      linear.y_dtype,
                   linear.scales, linear.scale_per_row, linear.bias};
  multiply(path, quantized.activations(linear.tokens, true),
           {linear.blocks, blocks_of(linear.columns)}, out, linear.columns, threads);
}

void quantize_tokens(const Path& path, const void* x, Dtype dtype, std::size_t tokens,
                     std::size_t columns, std::int8_t* codes, float* scales, std::size_t threads) {
  const Quantized quantized(tokens, columns);
  const std::size_t width = dtype == Dtype::kFloat32 ? 4 : 2;
  const auto* values = static_cast<const std::uint8_t*>(x);
  for_tokens(tokens, columns, threads, [&](std::size_t m) {
    std::int8_t* row = quantized.codes + m * quantized.stride;
    path.quantize(values + m * columns * width, dtype, columns, quantized.stride, row,
                  quantized.sums + m, scales + m);
    std::memcpy(codes + m * columns, row, columns);
  });
}

bool apply_codes(const Path& path, const CodesLinear& linear, std::size_t threads) {
  const std::size_t groups = groups_of(linear.rows), blocks = blocks_of(linear.columns);
  thread_local Scratch scratch;
  const Lease lease(scratch, groups * blocks * kBlockBytes);
  std::uint8_t* packed = lease.data;
  std::atomic<bool> sound{true};
  const std::size_t packers = threads_for(4 * linear.rows * linear.columns, threads);
  parallel(packers, chunks_for(groups, packers), [&](std::size_t chunk, std::size_t count) {
    if (pack_blocks(linear.codes, linear.rows, linear.columns, linear.columns,
                    groups * chunk / count, groups * (chunk + 1) / count, packed) >= 0) {
      sound = false;
    }
  });
  if (!sound) return false;
  const Quantized copy(linear.tokens, linear.columns);
  for_tokens(linear.tokens, linear.columns, threads, [&](std::size_t m) {
    path.take(linear.q + m * linear.columns, linear.columns, copy.stride,
              copy.codes + m * copy.stride, copy.sums + m);
  });
  const Activations x{copy.codes, copy.stride, copy.sums, linear.q_scales, linear.tokens};
  const Output out{linear.y,      linear.rows,          false,      linear.y_dtype,
                   linear.scales, linear.scale_per_row, linear.bias};
  multiply(path, x, {packed, blocks}, out, linear.columns, threads);
  return true;
}

void code_weights(const Path& path, const float* values, std::size_t count, const float* scale,
                  std::int8_t* codes, std::size_t threads) {
  const float inverse = 1.0f / *scale;
  threads = threads_for(4 * count, threads);
  parallel(threads, chunks_for(count, threads), [&](std::size_t chunk, std::size_t chunks) {
    const std::size_t first = count * chunk / chunks, last = count * (chunk + 1) / chunks;
    path.code(values + first, last - first, inverse, codes + first);
  });
}

void narrow_rows(const Path& path, const Narrowing& n, std::size_t threads) {
  const std::size_t strips = (n.rows + kTurnedRows - 1) / kTurnedRows;
  for_tokens(strips, n.columns * kTurnedRows, threads, [&](std::size_t strip) {
    const std::size_t first = strip * kTurnedRows, last = std::min(n.rows, first + kTurnedRows);
    // In this order: rows are read one after the other first, several at once from the cache.
    for (std::size_t m = first; n.columnwise != nullptr && m < last; ++m) {
      path.narrow(n.values + m * n.columns, n.columns, n.by_column[0],
                  n.per_column ? n.by_column : nullptr, n.columnwise + m * n.columns);
    }
    if (n.turned != nullptr) {
      path.narrow_turned(n.values + first * n.columns, last - first, n.columns, n.by_row + first,
                         n.rows, n.turned + first);
    }
  });
}

}  // namespace forge
