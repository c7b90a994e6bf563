// Every path against int64 sums, in C++ alone: what sanitizers and emulators run.
//
// Buffers have exactly the size that is promised, on the heap, so that a read or write beside them
// is an error under AddressSanitizer. Prints one line a path and the number of wrong sums.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/layout.h"
#include "cpu/linear.h"
#include "cpu/pack_blocks.h"
#include "cpu/pack_i2.h"
#include "cpu/pack_tq.h"
#include "cpu/threads.h"

namespace {

thread_local std::uint32_t state = 1;

int draw(int low, int high) {
  state = state * 1664525u + 1013904223u;
  return low + static_cast<int>((state >> 8) % static_cast<std::uint32_t>(high - low + 1));
}

struct Shape {
  std::size_t tokens, rows, columns;
};

std::size_t check(const forge::Path& path, const Shape& s, int value, int code,
                  std::size_t threads) {
  std::unique_ptr<std::int8_t[]> codes(new std::int8_t[s.rows * s.columns]);
  std::unique_ptr<std::int8_t[]> q(new std::int8_t[s.tokens * s.columns]);
  for (std::size_t i = 0; i < s.rows * s.columns; ++i) {
    codes[i] = static_cast<std::int8_t>(value != 0 ? code : draw(-1, 1));
  }
  for (std::size_t i = 0; i < s.tokens * s.columns; ++i) {
    q[i] = static_cast<std::int8_t>(value != 0 ? value : draw(-128, 127));
  }
  const std::size_t groups = forge::groups_of(s.rows), blocks = forge::blocks_of(s.columns);
  std::unique_ptr<std::uint8_t[]> packed(new std::uint8_t[groups * blocks * forge::kBlockBytes]);
  if (forge::pack_blocks(codes.get(), s.rows, s.columns, s.columns, 0, groups, packed.get()) >= 0) {
    return 1;
  }
  std::unique_ptr<std::int8_t[]> back(new std::int8_t[s.rows * s.columns]);
  forge::unpack_blocks(packed.get(), s.rows, s.columns, 0, groups, back.get());
  std::size_t wrong = std::memcmp(back.get(), codes.get(), s.rows * s.columns) != 0;

  const std::size_t quarter = (s.rows + 3) / 4;
  std::unique_ptr<std::uint8_t[]> stored(new std::uint8_t[quarter * s.columns]);
  std::unique_ptr<std::uint8_t[]> again(new std::uint8_t[groups * blocks * forge::kBlockBytes]);
  forge::pack_i2(codes.get(), s.rows, s.columns, stored.get());
  forge::pack_blocks_from_i2(stored.get(), s.rows, s.columns, 0, groups, again.get());
  wrong += std::memcmp(again.get(), packed.get(), groups * blocks * forge::kBlockBytes) != 0;

  std::unique_ptr<std::int32_t[]> acc(new std::int32_t[s.tokens * s.rows]);
  std::memset(acc.get(), 0x5A, s.tokens * s.rows * sizeof(std::int32_t));
  forge::multiply_codes(path, q.get(), s.tokens, s.columns, s.columns, packed.get(), s.rows,
                        acc.get(), threads);
  for (std::size_t m = 0; m < s.tokens; ++m) {
    for (std::size_t n = 0; n < s.rows; ++n) {
      std::int64_t sum = 0;
      for (std::size_t k = 0; k < s.columns; ++k) {
        sum += std::int64_t{q[m * s.columns + k]} * codes[n * s.columns + k];
      }
      wrong += acc[m * s.rows + n] != sum;
    }
  }

  return wrong;
}

// The linear and its quantizer, against the scalar path: the same bits. Values have two bytes where
// they are bf16, so that what reads or writes them as fp32 goes beside the buffers.
template <class Value>
std::size_t check_linear(const forge::Path& path, const Shape& s, forge::Dtype dtype,
                         std::size_t threads) {
  const std::size_t groups = forge::groups_of(s.rows), blocks = forge::blocks_of(s.columns);
  const std::size_t inputs = s.tokens * s.columns, outputs = s.tokens * s.rows;
  std::unique_ptr<std::int8_t[]> codes(new std::int8_t[s.rows * s.columns]);
  for (std::size_t i = 0; i < s.rows * s.columns; ++i) {
    codes[i] = static_cast<std::int8_t>(draw(-1, 1));
  }
  std::unique_ptr<std::uint8_t[]> packed(new std::uint8_t[groups * blocks * forge::kBlockBytes]);
  forge::pack_blocks(codes.get(), s.rows, s.columns, s.columns, 0, groups, packed.get());
  std::unique_ptr<Value[]> x(new Value[inputs]);
  for (std::size_t i = 0; i < inputs; ++i) {
    const float value = static_cast<float>(draw(-9999, 9999)) / 777.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (sizeof(Value) == 2) bits >>= 16;
    std::memcpy(&x[i], &bits, sizeof(Value));
  }
  std::unique_ptr<float[]> scales(new float[s.rows]), bias(new float[s.rows]);
  for (std::size_t n = 0; n < s.rows; ++n) {
    scales[n] = static_cast<float>(n + 1) / 333.0f;
    bias[n] = static_cast<float>(n) - 7.5f;
  }
  const forge::Path* both[2] = {&path, &forge::kScalarPath};
  std::vector<Value> results[2], plain[2];
  std::vector<std::int8_t> coded[2];
  std::vector<float> token_scales[2];
  for (int i = 0; i < 2; ++i) {
    results[i].assign(outputs, Value{7});
    plain[i].assign(outputs, Value{7});
    coded[i].assign(inputs, 9);
    token_scales[i].assign(s.tokens, -1.0f);
    const forge::Linear rowwise{x.get(), dtype, s.tokens, s.columns, packed.get(), s.rows,
                                scales.get(), true, bias.get(), results[i].data(), dtype};
    forge::apply_linear(*both[i], rowwise, threads);
    const forge::Linear one{x.get(), dtype, s.tokens, s.columns, packed.get(), s.rows,
                            scales.get(), false, nullptr, plain[i].data(), dtype};
    forge::apply_linear(*both[i], one, threads);
    forge::quantize_tokens(*both[i], x.get(), dtype, s.tokens, s.columns, coded[i].data(),
                           token_scales[i].data(), threads);
  }
  return (results[0] != results[1]) + (plain[0] != plain[1]) + (coded[0] != coded[1]) +
         (token_scales[0] != token_scales[1]);
}

// What training asks for, against the scalar path and one thread: the same bits.
std::size_t check_training(const forge::Path& path, const Shape& s, std::size_t threads) {
  std::unique_ptr<std::int8_t[]> codes(new std::int8_t[s.rows * s.columns]);
  std::unique_ptr<std::int8_t[]> q(new std::int8_t[s.tokens * s.columns]);
  std::unique_ptr<float[]> q_scales(new float[s.tokens]), scales(new float[s.rows]);
  for (std::size_t i = 0; i < s.rows * s.columns; ++i) {
    codes[i] = static_cast<std::int8_t>(draw(-1, 1));
  }
  for (std::size_t i = 0; i < s.tokens * s.columns; ++i) {
    q[i] = static_cast<std::int8_t>(draw(-128, 127));
  }
  for (std::size_t m = 0; m < s.tokens; ++m) q_scales[m] = static_cast<float>(m + 1) / 99.0f;
  for (std::size_t n = 0; n < s.rows; ++n) scales[n] = static_cast<float>(n + 1) / 333.0f;
  const std::size_t values = s.tokens * s.rows, weights = s.rows * s.columns;
  std::unique_ptr<float[]> w(new float[weights]);
  for (std::size_t i = 0; i < weights; ++i) w[i] = static_cast<float>(draw(-999, 999)) / 400.0f;
  const forge::Path* both[2] = {&path, &forge::kScalarPath};
  std::vector<float> y[2];
  std::vector<std::int8_t> coded[2];
  std::vector<std::uint16_t> turned[2], columnwise[2];
  std::size_t wrong = 0;
  for (int i = 0; i < 2; ++i) {
    const std::size_t workers = i == 0 ? threads : 1;
    y[i].assign(values, -1.0f);
    coded[i].assign(weights, 9);
    turned[i].assign(values, 7);
    columnwise[i].assign(values, 7);
    const forge::CodesLinear call{q.get(), q_scales.get(), s.tokens, s.columns, codes.get(), s.rows,
                                  scales.get(), true, nullptr, y[i].data(),
                                  forge::Dtype::kFloat32};
    wrong += !forge::apply_codes(*both[i], call, workers);
    const float scale = 1.25f;
    forge::code_weights(*both[i], w.get(), weights, &scale, coded[i].data(), workers);
    forge::narrow_rows(*both[i],
                       {y[i].data(), s.tokens, s.rows, q_scales.get(), turned[i].data(),
                        scales.get(), true, columnwise[i].data()},
                       workers);
  }
  wrong += y[0] != y[1];
  wrong += coded[0] != coded[1];
  wrong += turned[0] != turned[1];
  wrong += columnwise[0] != columnwise[1];
  codes[weights - 1] = 2;
  const forge::CodesLinear four{q.get(), q_scales.get(), s.tokens, s.columns, codes.get(), s.rows,
                                scales.get(), true, nullptr, y[0].data(), forge::Dtype::kFloat32};
  wrong += forge::apply_codes(path, four, threads);
  return wrong;
}

// TQ blocks of rows of four, there and back; columns may end within a block on the way there.
std::size_t check_tq(bool base3, std::size_t rows, std::size_t columns) {
  const std::size_t count = (columns + forge::kTqBlock - 1) / forge::kTqBlock;
  const std::size_t size = 4 * rows * count * forge::tq_block_bytes(base3);
  const std::size_t whole = count * forge::kTqBlock;
  std::unique_ptr<std::uint8_t[]> packed(new std::uint8_t[rows * columns]);
  std::unique_ptr<std::uint8_t[]> blocks(new std::uint8_t[size]);
  std::unique_ptr<std::uint8_t[]> back(new std::uint8_t[rows * whole]);
  for (std::size_t i = 0; i < rows * columns; ++i) {
    packed[i] = static_cast<std::uint8_t>(draw(0, 2) | draw(0, 2) << 2 | draw(0, 2) << 4 |
                                          draw(0, 2) << 6);
  }
  std::size_t wrong = 0;
  wrong += !forge::encode_tq(base3, packed.get(), rows, columns, 1, 0, rows, blocks.get());
  wrong += !forge::decode_tq(base3, blocks.get(), rows, whole, 0, rows, back.get());
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < whole; ++c) {
      const std::uint8_t expected = c < columns ? packed[r * columns + c] : std::uint8_t{0x55};
      wrong += back[r * whole + c] != expected;
    }
  }
  return wrong;
}

}  // namespace

int main() {
  std::vector<Shape> shapes = {{1, 1, 1},     {1, 64, 16},  {1, 65, 17},  {2, 63, 15},  {3, 130, 129},
                               {4, 127, 33},  {5, 1, 130},  {6, 66, 64},  {7, 70, 100}, {13, 5, 48},
                               {1, 300, 2000}, {8, 200, 900}, {16, 70, 130}, {17, 65, 64},
                               {33, 95, 200},  {48, 33, 96},  {90, 129, 330}};
  for (int i = 0; i < 40; ++i) {
    shapes.push_back({static_cast<std::size_t>(draw(1, 20)), static_cast<std::size_t>(draw(1, 130)),
                      static_cast<std::size_t>(draw(1, 130))});
  }
  std::size_t total = 0;
  for (const std::size_t columns : {1u, 255u, 256u, 257u, 700u, 1024u}) {
    for (const bool base3 : {false, true}) total += check_tq(base3, 3, columns);
  }
  std::printf("blocks: %zu wrong\n", total);
  for (std::size_t p = 0; p < forge::path_count(); ++p) {
    const forge::Path& path = forge::path_at(p);
    std::size_t wrong = 0;
    for (const Shape& shape : shapes) {
      for (std::size_t threads = 1; threads <= 3; threads += 2) {
        wrong += check(path, shape, 0, 0, threads);
        wrong += check_linear<float>(path, shape, forge::Dtype::kFloat32, threads);
        wrong += check_linear<std::uint16_t>(path, shape, forge::Dtype::kBFloat16, threads);
        wrong += check_training(path, shape, threads);
      }
    }
    for (const int value : {127, -128}) {
      for (const int code : {1, -1}) {
        for (const std::size_t tokens : {1u, 2u, 3u, 4u, 5u, 6u, 7u, 20u, 33u}) {
          wrong += check(path, {tokens, 65, 4096}, value, code, 2);
        }
      }
    }
    std::printf("%s: %zu wrong\n", path.name, wrong);
    total += wrong;
  }
  // Two callers at once: one has the pool, the other works alone.
  std::size_t by_thread[2] = {};
  std::thread other([&] {
    for (int i = 0; i < 20; ++i) by_thread[0] += check(forge::path_at(0), {3, 500, 700}, 1, 1, 2);
  });
  for (int i = 0; i < 20; ++i) by_thread[1] += check(forge::path_at(0), {3, 500, 700}, 1, 1, 2);
  other.join();
  total += by_thread[0] + by_thread[1];
  std::printf("wrong: %zu\n", total);
  return total == 0 ? 0 : 1;
}
