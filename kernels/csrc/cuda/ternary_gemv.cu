// Decoding on NVIDIA GPUs: y = x W^T for a few tokens, W packed as "i2-64x16" (forge_kernels/layout.py).
//
// Built by NVRTC at first use, so it includes nothing. Macros: FORGE_TOKENS (1, 2, 4 or 8),
// FORGE_INPUT (0 fp32, 1 bf16, 2 fp16, 3 int8 codes ready made), FORGE_ROWS (16, 32 or 64 rows a
// thread block, so that every multiprocessor gets the same share) and FORGE_THREADS.
//
// A thread reads 16 bytes, the words of four rows in one block of weights, and rounds of them ahead
// of their use. A thread block has all of K, so nothing is added across thread blocks. The call
// takes a few microseconds, and latency is most of it: the first weights are asked for before the
// activations are, and before the kernel that makes the activations has ended (programmatic
// dependent launch); quantization then runs while they arrive.
//
// Fields are masked in place and never shifted where registers allow: field f then counts 4^f too
// much, and is shifted once at the end (exact: every term has the factor).

typedef unsigned int u32;
typedef unsigned short u16;
typedef signed char s8;

constexpr int kThreads = FORGE_THREADS;
constexpr int kRows = FORGE_ROWS;
constexpr int kTokens = FORGE_TOKENS;
constexpr int kQuads = kRows / 4;           // threads that share a block of weights
constexpr int kLanes = kThreads / kQuads;   // blocks of weights read at a time
constexpr int kWarps = kThreads / 32;
constexpr int kAhead = 4;
constexpr bool kInPlace = kTokens <= 2;

struct Arguments {
  const void* x;         // (tokens, columns), or int8 codes
  const uint4* weights;  // (groups, blocks, 16) of 16 bytes
  const float* scales;   // one, or one a row
  const float* bias;     // one a row, or null
  void* y;               // (tokens, rows) of x's type, or int32
  int tokens, columns, rows, blocks, scale_per_row;
};

#if FORGE_INPUT == 0
typedef float Input;
#elif FORGE_INPUT == 3
typedef s8 Input;
#else
typedef u16 Input;
#endif
constexpr int kVector = 16 / sizeof(Input);

__device__ __forceinline__ float to_float(Input value) {
#if FORGE_INPUT == 1
  return __uint_as_float(static_cast<u32>(value) << 16);
#elif FORGE_INPUT == 2
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
#else
  return static_cast<float>(value);
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

struct Sums {
  int of[kTokens][4][kInPlace ? 4 : 1];

  __device__ __forceinline__ void add(const uint4& weights, const s8* q, int stride) {
    const u32 words[4] = {weights.x, weights.y, weights.z, weights.w};
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
    const auto& acc = of[token][row];
    if (!kInPlace) return acc[0];
    return acc[0] + (acc[kInPlace ? 1 : 0] >> 2) + (acc[kInPlace ? 2 : 0] >> 4) +
           (acc[kInPlace ? 3 : 0] >> 6);
  }
};

struct Vector {
  Input of[kVector];
};

// kVector values from a column on, zero beyond the last.
__device__ __forceinline__ Vector load_vector(const Arguments& a, int token, int column) {
  Vector values = {};
  const Input* row = static_cast<const Input*>(a.x) + static_cast<long>(token) * a.columns;
  if (column + kVector <= a.columns &&
      (reinterpret_cast<unsigned long long>(row + column) & 15) == 0) {
    *reinterpret_cast<uint4*>(&values) = *reinterpret_cast<const uint4*>(row + column);
    return values;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (column + i < a.columns) values.of[i] = row[column + i];
  }
  return values;
}

extern "C" __global__ void __launch_bounds__(kThreads) ternary_gemv(const Arguments a) {
  extern __shared__ __align__(16) s8 codes[];  // (tokens, 16 * blocks)
  __shared__ u32 maxima[kTokens][kWarps];
  __shared__ int code_sums[kTokens][kWarps];
  __shared__ int partial[kTokens][kWarps][kRows];

  const int first_row = blockIdx.x * kRows;
  const int quad = threadIdx.x % kQuads, lane = threadIdx.x / kQuads;
  const int warp = threadIdx.x / 32;
  const int stride = a.blocks * 16;
  const uint4* weights = a.weights + static_cast<long>(first_row / 64) * a.blocks * 16 +
                         first_row % 64 / 4 + quad;

  uint4 ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int b = lane + i * kLanes;
    if (b < a.blocks) ahead[i] = __ldcs(weights + static_cast<long>(b) * 16);
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

#if FORGE_INPUT != 3
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    u32 most = 0;
    if (t < a.tokens) {
      for (int c = threadIdx.x * kVector; c < a.columns; c += kThreads * kVector) {
        const Vector values = load_vector(a, t, c);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          // Magnitudes order as integers, NaN above infinity.
          most = max(most, __float_as_uint(to_float(values.of[i])) & 0x7FFFFFFFu);
        }
      }
    }
    most = __reduce_max_sync(0xFFFFFFFFu, most);
    if (threadIdx.x % 32 == 0) maxima[t][warp] = most;
  }
  __syncthreads();
#endif

  float scale_of[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    int sum = 0;
#if FORGE_INPUT != 3
    u32 bits = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) bits = max(bits, maxima[t][w]);
    const bool finite = bits < 0x7F800000u;
    const float absmax = __uint_as_float(bits);
    const float floor = absmax < 1e-5f ? 1e-5f : absmax;
    const float inverse = __fmul_rn(__frcp_rn(floor), 127.0f);
    scale_of[t] = __fdiv_rn(floor, 127.0f);
#endif
    for (int c = threadIdx.x * kVector; c < stride; c += kThreads * kVector) {
      Vector values = {};
      if (t < a.tokens && c < a.columns) values = load_vector(a, t, c);
      s8 own[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        int code;
#if FORGE_INPUT != 3
        const float value = to_float(values.of[i]);
        code = finite ? min(127, max(-128, __float2int_rn(__fmul_rn(value, inverse)))) : 0;
#else
        code = values.of[i];
#endif
        own[i] = static_cast<s8>(code);
        sum += code;
      }
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        *reinterpret_cast<u32*>(codes + t * stride + c + i) = *reinterpret_cast<u32*>(own + i);
      }
    }
    sum = __reduce_add_sync(0xFFFFFFFFu, sum);
    if (threadIdx.x % 32 == 0) code_sums[t][warp] = sum;
  }
  __syncthreads();

  Sums sums = {};
  for (int base = lane; base < a.blocks; base += kAhead * kLanes) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int b = base + i * kLanes;
      if (b < a.blocks) {
        const uint4 now = ahead[i];
        const int next = b + kAhead * kLanes;
        if (next < a.blocks) ahead[i] = __ldcs(weights + static_cast<long>(next) * 16);
        sums.add(now, codes + b * 16, stride);
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      int sum = sums.total(t, r);
#pragma unroll
      for (int step = kQuads; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      if (threadIdx.x % 32 < kQuads) partial[t][warp][quad * 4 + r] = sum;
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < a.tokens * kRows; i += kThreads) {
    const int t = i / kRows, row = first_row + i % kRows;
    if (row >= a.rows) continue;
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[t][w][i % kRows] - code_sums[t][w];
    const long at = static_cast<long>(t) * a.rows + row;
#if FORGE_INPUT == 3
    static_cast<int*>(a.y)[at] = sum;
#else
    float scale = scale_of[0];
#pragma unroll
    for (int token = 1; token < kTokens; ++token) {
      if (token == t) scale = scale_of[token];
    }
    const float factor = __fmul_rn(scale, a.scales[a.scale_per_row ? row : 0]);
    float value = __fmul_rn(__int2float_rn(sum), factor);
    if (a.bias != nullptr) value = __fadd_rn(value, a.bias[row]);
    store(a.y, at, value);
#endif
  }
}
