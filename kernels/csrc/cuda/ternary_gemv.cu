// Decoding on NVIDIA GPUs: y = x W^T for a few tokens, W packed as "i2-64x16" (forge_kernels/layout.py).
//
// Built by NVRTC at first use, so it includes nothing. Macros: FORGE_TOKENS (1, 2, 4 or 8),
// FORGE_INPUT (0 fp32, 1 bf16, 2 fp16, 3 int8 codes ready made).
//
// One block of threads takes one group of 64 rows and a slice of K. A half-warp reads one 256-byte
// block of weights, 16 bytes a thread: the words of four rows, so a warp reads 512 bytes in a row. The
// weights of the first rounds are asked for before the activations are quantized, which hides one
// behind the other: the whole call takes a few microseconds. Slices are added with integer atomics,
// so the sum does not depend on their order; the last block to arrive rescales and writes.
//
// Fields are masked in place and never shifted where registers allow: field f then counts 4^f too
// much, and is shifted once at the end (exact: every term has the factor).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef signed char s8;

constexpr int kThreads = 256;
constexpr int kHalfWarps = kThreads / 16;
constexpr int kAhead = 4;
constexpr int kTokens = FORGE_TOKENS;

struct Arguments {
  const void* x;            // (tokens, columns), or int8 codes
  const uint4* weights;     // (groups, blocks, 16) of 16 bytes
  const float* scales;      // one, or one a row
  const float* bias;        // one a row, or null
  void* y;                  // (tokens, rows) of x's type, or int32
  int* sums;                // (groups, tokens, 64), zero; left zero
  u32* arrived;             // (groups), zero; left zero
  int tokens, columns, rows, blocks, slices, scale_per_row;
};

__device__ __forceinline__ float input_at(const void* x, long index) {
#if FORGE_INPUT == 0
  return static_cast<const float*>(x)[index];
#elif FORGE_INPUT == 1
  return __uint_as_float(static_cast<u32>(static_cast<const u16*>(x)[index]) << 16);
#elif FORGE_INPUT == 2
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<const u16*>(x)[index]));
  return value;
#else
  return static_cast<const s8*>(x)[index];
#endif
}

__device__ __forceinline__ void store(void* y, long index, float value) {
#if FORGE_INPUT == 0
  static_cast<float*>(y)[index] = value;
#elif FORGE_INPUT == 1
  u32 bits = __float_as_uint(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    bits = 0x7FC00000u;
  } else {
    bits += 0x7FFFu + (bits >> 16 & 1u);
  }
  static_cast<u16*>(y)[index] = static_cast<u16>(bits >> 16);
#elif FORGE_INPUT == 2
  u16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  static_cast<u16*>(y)[index] = half;
#endif
}

__device__ __forceinline__ int dot(u32 fields, int x, int acc) {
  int result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(fields), "r"(x), "r"(acc));
  return result;
}

template <bool kInPlace>
struct Sums {
  int of[kTokens][4][kInPlace ? 4 : 1];

  __device__ __forceinline__ void add(const u32 (&words)[4], const s8* q, int stride) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int4 x = *reinterpret_cast<const int4*>(q + t * stride);
      const int fields_of_x[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int f = 0; f < 4; ++f) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const u32 fields = kInPlace ? words[r] & (0x03030303u << (2 * f))
                                      : words[r] >> (2 * f) & 0x03030303u;
          int& acc = of[t][r][kInPlace ? f : 0];
          acc = dot(fields, fields_of_x[f], acc);
        }
      }
    }
  }

  __device__ __forceinline__ int total(int token, int row) const {
    if (!kInPlace) return of[token][row][0];
    const auto& acc = of[token][row];
    return acc[0] + (acc[kInPlace ? 1 : 0] >> 2) + (acc[kInPlace ? 2 : 0] >> 4) +
           (acc[kInPlace ? 3 : 0] >> 6);
  }
};

// max |x| of every token as float bits (NaN above infinity), for all threads.
__device__ __forceinline__ void find_absmax(const Arguments& a, u32* shared) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= a.tokens) break;
    u32 most = 0;
    const long row = static_cast<long>(t) * a.columns;
    for (int c = threadIdx.x; c < a.columns; c += kThreads) {
      most = max(most, __float_as_uint(input_at(a.x, row + c)) & 0x7FFFFFFFu);
    }
    most = __reduce_max_sync(0xFFFFFFFFu, most);
    if (threadIdx.x % 32 == 0) shared[t * 8 + threadIdx.x / 32] = most;
  }
  __syncthreads();
  if (threadIdx.x < kTokens) {
    u32 most = 0;
    for (int w = 0; w < 8; ++w) most = max(most, shared[threadIdx.x * 8 + w]);
    shared[kTokens * 8 + threadIdx.x] = most;
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(kThreads)
ternary_gemv(const Arguments a) {
  extern __shared__ __align__(16) s8 codes[];  // (tokens, slice of K)
  __shared__ u32 maxima[kTokens * 9];
  __shared__ int partial[kHalfWarps][64];
  __shared__ int code_sums[kTokens];
  __shared__ u32 last;

  const int group = blockIdx.x;
  const int first = static_cast<int>(static_cast<long>(a.blocks) * blockIdx.y / a.slices);
  const int end = static_cast<int>(static_cast<long>(a.blocks) * (blockIdx.y + 1) / a.slices);
  const int half = threadIdx.x / 16, lane = threadIdx.x % 16;
  const int stride = (end - first) * 16;
  const uint4* weights = a.weights + static_cast<long>(group) * a.blocks * 16 + lane;

  uint4 ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int b = first + half + i * kHalfWarps;
    if (b < end) ahead[i] = __ldcs(weights + static_cast<long>(b) * 16);
  }

  if (threadIdx.x < kTokens) code_sums[threadIdx.x] = 0;
#if FORGE_INPUT != 3
  find_absmax(a, maxima);
#else
  __syncthreads();
#endif
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    int sum = 0;
#if FORGE_INPUT != 3
    const u32 bits = t < a.tokens ? maxima[kTokens * 8 + t] : 0u;
    const bool finite = bits < 0x7F800000u;
    const float absmax = __uint_as_float(bits);
    const float floor = absmax < 1e-5f ? 1e-5f : absmax;
    const float inverse = __fmul_rn(__frcp_rn(floor), 127.0f);
#endif
    for (int i = threadIdx.x; i < stride; i += kThreads) {
      const int c = first * 16 + i;
      int code = 0;
      if (c < a.columns && t < a.tokens) {
        const float value = input_at(a.x, static_cast<long>(t) * a.columns + c);
#if FORGE_INPUT != 3
        code = finite ? min(127, max(-128, __float2int_rn(__fmul_rn(value, inverse)))) : 0;
#else
        code = static_cast<int>(value);
#endif
      }
      codes[t * stride + i] = static_cast<s8>(code);
      sum += code;
    }
    sum = __reduce_add_sync(0xFFFFFFFFu, sum);
    if (threadIdx.x % 32 == 0) atomicAdd(&code_sums[t], sum);
  }
  __syncthreads();

  Sums<(kTokens <= 2)> sums = {};
  for (int base = first + half; base < end; base += kAhead * kHalfWarps) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int b = base + i * kHalfWarps;
      if (b < end) {
        const u32 words[4] = {ahead[i].x, ahead[i].y, ahead[i].z, ahead[i].w};
        const int next = b + kAhead * kHalfWarps;
        if (next < end) ahead[i] = __ldcs(weights + static_cast<long>(next) * 16);
        sums.add(words, codes + (b - first) * 16, stride);
      }
    }
  }

  // Sums over the half-warps, token by token; then over the slices.
  int mine[(kTokens * 64 + kThreads - 1) / kThreads] = {};
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r) partial[half][lane * 4 + r] = sums.total(t, r);
    __syncthreads();
    // Token t is finished by 64 of the threads, others in turn.
    const int who = static_cast<int>(threadIdx.x) - t % 4 * 64;
    if (who >= 0 && who < 64) {
      int sum = -code_sums[t];
#pragma unroll
      for (int h = 0; h < kHalfWarps; ++h) sum += partial[h][who];
      mine[t / 4] = sum;
    }
  }

  const int row_in_group = threadIdx.x % 64, row = group * 64 + row_in_group;
  int* shared_sums = a.sums + static_cast<long>(group) * kTokens * 64;
  if (a.slices > 1) {
#pragma unroll
    for (int i = 0; i < (kTokens + 3) / 4; ++i) {
      const int t = i * 4 + threadIdx.x / 64;
      if (t < a.tokens) atomicAdd(shared_sums + t * 64 + row_in_group, mine[i]);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(a.arrived + group, 1u) == static_cast<u32>(a.slices) - 1u;
      if (last) a.arrived[group] = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
  }
#pragma unroll
  for (int i = 0; i < (kTokens + 3) / 4; ++i) {
    const int t = i * 4 + threadIdx.x / 64;
    if (t >= a.tokens) continue;
    int sum = mine[i];
    if (a.slices > 1) sum = atomicExch(shared_sums + t * 64 + row_in_group, 0);
    if (row >= a.rows) continue;
    const long at = static_cast<long>(t) * a.rows + row;
#if FORGE_INPUT == 3
    static_cast<int*>(a.y)[at] = sum;
#else
    const float absmax = __uint_as_float(maxima[kTokens * 8 + t]);
    const float floor = absmax < 1e-5f ? 1e-5f : absmax;
    const float scale = __fdiv_rn(floor, 127.0f);
    const float factor = __fmul_rn(scale, a.scales[a.scale_per_row ? row : 0]);
    float value = __fmul_rn(__int2float_rn(sum), factor);
    if (a.bias != nullptr) value = __fadd_rn(value, a.bias[row]);
    store(a.y, at, value);
#endif
  }
}
