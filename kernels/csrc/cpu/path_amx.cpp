// AMX: sums of 16 x 16 products of 64 bytes an instruction, on tiles of 16 rows of 64 bytes.
//
// A tile of weights has, in row r, columns 4r to 4r + 3 of sixteen rows of the weight: one field of
// sixteen words of a block. Fields are taken out of the packed words into tiles in the first-level
// cache, two steps of 64 columns ahead of the products that read them, and again for each unit of
// tokens: expanded weights would be four times as much to read, from a farther cache, and products
// wait for tiles, not for this (32 tokens at K = 2560: 33 against 39 ns a step).
//
// Up to sixteen tokens: one tile of tokens by the four of a group's rows. More: two by two.
// A product takes as long for one token as for sixteen: for a few, AVX512-VNNI is faster.
//
// Instructions are written as assembly: g++ 12's intrinsics for tiles do not say that they read
// memory, so that stores may move behind them.
#include <immintrin.h>

#include <algorithm>
#include <initializer_list>

#include "tile.inl"
#include "tiles.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace forge {

// Whether the system lets this process use tiles: Linux does when asked, and says no where a thread
// has a stack for signals that is too small for their state.
bool amx_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

namespace {

constexpr std::size_t kTileWords = 64;  // bytes of a block's words that one tile takes
constexpr std::size_t kStepColumns = 64;
constexpr std::size_t kStepBlocks = kStepColumns / kBlockColumns;
constexpr std::size_t kStepBytes = kStepBlocks * kBlockBytes;
// Steps that weights are expanded ahead, and places for them. One ahead is 10 % slower, three no
// faster.
constexpr std::size_t kAhead = 2;
constexpr std::size_t kPlaces = 4;
// Below this AVX512-VNNI is faster; for four tokens at 2560 x 2560 it takes 104 us, tiles 81.
constexpr std::size_t kFewestTokens = 4;
// Packed weights that stay in the second-level cache while all tokens pass.
constexpr std::size_t kWeightBytes = 512 << 10;

// Tiles 0 to 3 are sums, 4 and 5 tokens, 6 and 7 weights.
//
// One tile of tokens by the four of a group's rows: for up to sixteen tokens.
struct Wide {
  static constexpr std::size_t kTokens = kTileRows;
  static constexpr std::size_t kRowTiles = 4;

  static void shape(std::size_t tokens, TileShapes& shapes) {
    for (const int tile : {0, 1, 2, 3, 4, 5}) shapes.rows[tile] = static_cast<std::uint8_t>(tokens);
  }
  template <class Between>
  static inline void add(const std::int8_t* q, std::size_t, std::size_t stride,
                         const std::uint8_t* weights, Between between) {
    FORGE_TILE_LOAD(4, q, stride);
    between(0);
    FORGE_TILE_LOAD(6, weights, 64l);
    FORGE_TILE_DOT(0, 4, 6);
    between(1);
    FORGE_TILE_LOAD(7, weights + kTileBytes, 64l);
    FORGE_TILE_DOT(1, 4, 7);
    between(2);
    FORGE_TILE_LOAD(6, weights + 2 * kTileBytes, 64l);
    FORGE_TILE_DOT(2, 4, 6);
    between(3);
    FORGE_TILE_LOAD(7, weights + 3 * kTileBytes, 64l);
    FORGE_TILE_DOT(3, 4, 7);
  }
  static void store(std::int32_t* sums, std::size_t) {
    constexpr long kBytes = kRowTiles * kTileRows * sizeof(std::int32_t);
    FORGE_TILE_STORE(0, sums, kBytes);
    FORGE_TILE_STORE(1, sums + 16, kBytes);
    FORGE_TILE_STORE(2, sums + 32, kBytes);
    FORGE_TILE_STORE(3, sums + 48, kBytes);
  }
};

// Two tiles of tokens by two of rows: half the weights to expand for as many products.
struct Square {
  static constexpr std::size_t kTokens = 2 * kTileRows;
  static constexpr std::size_t kRowTiles = 2;

  static std::size_t first_tile(std::size_t tokens) { return (tokens + 1) / 2; }
  static void shape(std::size_t tokens, TileShapes& shapes) {
    const std::size_t first = first_tile(tokens);
    for (const int tile : {0, 1, 4}) shapes.rows[tile] = static_cast<std::uint8_t>(first);
    for (const int tile : {2, 3, 5}) shapes.rows[tile] = static_cast<std::uint8_t>(tokens - first);
  }
  template <class Between>
  static inline void add(const std::int8_t* q, std::size_t second, std::size_t stride,
                         const std::uint8_t* weights, Between between) {
    FORGE_TILE_LOAD(4, q, stride);
    between(0);
    FORGE_TILE_LOAD(6, weights, 64l);
    FORGE_TILE_DOT(0, 4, 6);
    between(1);
    FORGE_TILE_LOAD(7, weights + kTileBytes, 64l);
    FORGE_TILE_DOT(1, 4, 7);
    between(2);
    FORGE_TILE_LOAD(5, q + second, stride);
    FORGE_TILE_DOT(2, 5, 6);
    between(3);
    FORGE_TILE_DOT(3, 5, 7);
  }
  static void store(std::int32_t* sums, std::size_t tokens) {
    constexpr std::size_t kRows = kRowTiles * kTileRows;
    constexpr long kBytes = kRows * sizeof(std::int32_t);
    std::int32_t* second = sums + first_tile(tokens) * kRows;
    FORGE_TILE_STORE(0, sums, kBytes);
    FORGE_TILE_STORE(1, sums + 16, kBytes);
    FORGE_TILE_STORE(2, second, kBytes);
    FORGE_TILE_STORE(3, second + 16, kBytes);
  }
};

// A block's quarter of the tiles of a step; zeros for a block beyond the last.
template <std::size_t kTiles, bool kThere>
inline void expand_block(const std::uint8_t* words, std::uint8_t* tiles) {
  // A matrix of bits takes a field out of each byte: a shift and a mask take 1.6 times as long.
  const __m512i fields[4] = {
      _mm512_set1_epi64(0x0102000000000000), _mm512_set1_epi64(0x0408000000000000),
      _mm512_set1_epi64(0x1020000000000000), _mm512_set1_epi64(0x4080000000000000)};
#pragma GCC unroll 4
  for (std::size_t i = 0; i < kTiles; ++i) {
    const __m512i w = kThere ? _mm512_loadu_si512(words + kTileWords * i) : _mm512_setzero_si512();
#pragma GCC unroll 4
    for (std::size_t f = 0; f < 4; ++f) {
      _mm512_store_si512(tiles + kTileBytes * i + 64 * f,
                         _mm512_gf2p8affine_epi64_epi8(w, fields[f], 0));
    }
  }
}

// Tokens begin to end times row groups first to last.
template <class Shape>
class Product {
 public:
  Product(const Activations& x, const Weight& w, const Output& out, std::size_t begin,
          std::size_t end)
      : x_(x), w_(w), out_(out), begin_(begin), end_(end) {}

  void run(std::size_t first, std::size_t last) {
    const std::size_t strips = kGroupRows / kRows;
    first_ = first * strips;
    last_ = std::min(last * strips, (out_.rows + kRows - 1) / kRows);
    next_ = {0, first_, 0};
    for (std::size_t i = 0; i < kAhead && next_.unit < units_; ++i) expand_next();
    for (std::size_t unit = 0; unit < units_; ++unit) {
      for (std::size_t strip = first_; strip < last_; ++strip) add_unit(unit, strip);
    }
    write_all();
  }

 private:
  static constexpr std::size_t kRows = Shape::kRowTiles * kTileRows;

  std::size_t token_of(std::size_t unit) const { return begin_ + (end_ - begin_) * unit / units_; }

  const std::uint8_t* words_of(std::size_t strip, std::size_t step) const {
    const std::size_t row = strip * kRows;
    return w_.blocks + row / kGroupRows * w_.kblocks * kBlockBytes + step * kStepBytes +
           row % kGroupRows * 4;
  }

  void advance() {
    if (++next_.step < steps_) return;
    next_.step = 0;
    if (++next_.strip < last_) return;
    next_.strip = first_;
    ++next_.unit;
  }

  std::uint8_t* next_place() { return tiles_[expanded_++ % kPlaces]; }

  void expand_next() {
    const std::uint8_t* words = words_of(next_.strip, next_.step);
    std::uint8_t* place = next_place();
    for (std::size_t b = 0; b < kStepBlocks; ++b, words += kBlockBytes, place += 256) {
      if (next_.step * kStepBlocks + b < w_.kblocks) {
        expand_block<Shape::kRowTiles, true>(words, place);
      } else {
        expand_block<Shape::kRowTiles, false>(words, place);
      }
    }
    advance();
  }

  void add_unit(std::size_t unit, std::size_t strip) {
    const std::size_t token = token_of(unit), count = token_of(unit + 1) - token;
    shape(count);
    FORGE_TILE_ZERO(0);
    FORGE_TILE_ZERO(1);
    FORGE_TILE_ZERO(2);
    FORGE_TILE_ZERO(3);
    const std::int8_t* q = x_.codes + token * x_.stride;
    const std::size_t stride = x_.stride, second = (count + 1) / 2 * stride;
    for (std::size_t s = 0; s < steps_; ++s, q += kStepColumns) {
      const std::uint8_t* weights = tiles_[multiplied_++ % kPlaces];
      if (next_.step < whole_ && next_.unit < units_) {
        const std::uint8_t* words = words_of(next_.strip, next_.step);
        std::uint8_t* place = next_place();
        Shape::add(q, second, stride, weights, [&](std::size_t b) __attribute__((always_inline)) {
          expand_block<Shape::kRowTiles, true>(words + b * kBlockBytes, place + b * 256);
        });
        advance();
      } else {
        if (next_.unit < units_) expand_next();
        Shape::add(q, second, stride, weights, [](std::size_t) {});
      }
      // Of the unit before, while products are under way.
      if (written_ < count_) write_one();
    }
    write_all();
    Shape::store(&sums_[0][0], count);
    row_ = strip * kRows;
    token_ = token;
    written_ = 0;
    count_ = count;
  }

  void shape(std::size_t tokens) {
    if (tokens == shaped_) return;
    shaped_ = tokens;
    TileShapes shapes;
    Shape::shape(tokens, shapes);
    shapes.load();
  }

  void write_all() {
    while (written_ < count_) write_one();
  }

  // Out of line, as the loop of products is long.
  __attribute__((noinline)) void write_one() {
    const std::size_t left = out_.rows - row_;
    const std::int32_t* sums = sums_[written_];
    if (left >= kRows) {
      store_rows(out_, row_, kRows, token_ + written_, x_, sums);
    } else {
      store_rows(out_, row_, left, token_ + written_, x_, sums);
    }
    ++written_;
  }

  alignas(64) std::uint8_t tiles_[kPlaces][Shape::kRowTiles * kTileBytes];
  alignas(64) std::int32_t sums_[Shape::kTokens][kRows];
  const Activations& x_;
  const Weight& w_;
  const Output& out_;
  const std::size_t begin_, end_;
  const std::size_t units_ = (end_ - begin_ + Shape::kTokens - 1) / Shape::kTokens;
  const std::size_t whole_ = w_.kblocks / kStepBlocks;
  const std::size_t steps_ = (w_.kblocks + kStepBlocks - 1) / kStepBlocks;
  std::size_t first_ = 0, last_ = 0;  // strips
  // What is expanded next: for which tokens, of which rows and columns.
  struct {
    std::size_t unit, strip, step;
  } next_ = {0, 0, 0};
  std::size_t expanded_ = 0, multiplied_ = 0;  // steps
  std::size_t shaped_ = 0;
  // The unit whose sums are stored, and how many of its tokens have been written to the output.
  std::size_t row_ = 0, token_ = 0, written_ = 0, count_ = 0;
};

void multiply(const Activations& x, const Weight& w, const Output& out, std::size_t first,
              std::size_t last) {
  if (x.tokens < kFewestTokens) {
    kVnniPath.multiply(x, w, out, first, last);
    return;
  }
  // The last sixteen or fewer alone: two tiles of eight would take twice the products.
  const std::size_t rest = x.tokens % Square::kTokens;
  const std::size_t wide = rest <= Wide::kTokens ? rest : 0;
  const std::size_t square = x.tokens - wide;
  const std::size_t most = std::max<std::size_t>(1, kWeightBytes / (w.kblocks * kBlockBytes));
  for (std::size_t g = first; g < last; g += most) {
    const std::size_t end = std::min(last, g + most);
    if (square != 0) Product<Square>(x, w, out, 0, square).run(g, end);
    if (wide != 0) Product<Wide>(x, w, out, square, x.tokens).run(g, end);
  }
  release_tiles();
}

void quantize(const void* values, Dtype dtype, std::size_t columns, std::size_t stride,
              std::int8_t* codes, std::int32_t* sum, float* scale) {
  kVnniPath.quantize(values, dtype, columns, stride, codes, sum, scale);
}

void code(const float* values, std::size_t count, float inverse, std::int8_t* codes) {
  kVnniPath.code(values, count, inverse, codes);
}

void narrow_turned(const float* values, std::size_t rows, std::size_t columns, const float* by_row,
                   std::size_t stride, std::uint16_t* narrow) {
  kVnniPath.narrow_turned(values, rows, columns, by_row, stride, narrow);
}

}  // namespace

const Path kAmxPath = {"amx-int8", &multiply, &quantize, &take_row, &code,
                       &narrow_values, &narrow_turned};

}  // namespace forge
