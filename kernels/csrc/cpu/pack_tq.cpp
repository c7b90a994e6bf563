#include "pack_tq.h"

#include <array>
#include <cstring>

namespace forge {
namespace {

using Table = std::array<std::uint8_t, 256>;
constexpr std::uint64_t kOnes = 0x5555555555555555u;  // every field is code 0
constexpr std::uint8_t kIllegal = 0xFF;               // four fields of 3

constexpr unsigned ceiling(unsigned value) { return (value * 256 + 242) / 243 & 255; }

// The four fields of a byte as a number of base 3, times 3: room for a fifth digit.
constexpr Table make_base3() {
  Table table{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    table[byte] = static_cast<std::uint8_t>(81 * (byte & 3) + 27 * (byte >> 2 & 3) +
                                            9 * (byte >> 4 & 3) + 3 * (byte >> 6));
  }
  return table;
}

constexpr Table make_ceiling() {
  Table table{};
  for (unsigned value = 0; value < 256; ++value) {
    table[value] = static_cast<std::uint8_t>(ceiling(value));
  }
  return table;
}

// Block byte -> its first four digits as fields; for `step` 3 the fifth digit must be 0.
constexpr Table make_fields(unsigned step) {
  Table table{};
  for (unsigned byte = 0; byte < 256; ++byte) table[byte] = kIllegal;
  for (unsigned value = 0; value < 243; value += step) {
    table[ceiling(value)] = static_cast<std::uint8_t>(value / 81 | value / 27 % 3 << 2 |
                                                      value / 9 % 3 << 4 | value / 3 % 3 << 6);
  }
  return table;
}

constexpr Table make_fifth() {
  Table table{};
  for (unsigned value = 0; value < 243; ++value) {
    table[ceiling(value)] = static_cast<std::uint8_t>(value % 3);
  }
  return table;
}

constexpr Table kBase3 = make_base3(), kCeiling = make_ceiling(), kFifth = make_fifth();
constexpr Table kFields5 = make_fields(1), kFields4 = make_fields(3);

// A run of block bytes that share a layout: `digits` runs of `width` values.
struct Section {
  std::size_t first_byte, first_value, width, digits;
};
constexpr Section kTwoBit[] = {{0, 0, 32, 4}, {32, 128, 32, 4}};
constexpr Section kBase[] = {{0, 0, 32, 5}, {32, 160, 16, 5}, {48, 240, 4, 4}};

template <class Word>
Word load(const std::uint8_t* from) {
  Word word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

template <class Word>
void store(std::uint8_t* to, Word word) {
  std::memcpy(to, &word, sizeof word);
}

template <class Word>
void exchange(Word& first, Word& second, int shift, Word mask) {
  const Word moved = static_cast<Word>(((first >> shift) ^ second) & mask);
  second = static_cast<Word>(second ^ moved);
  first = static_cast<Word>(first ^ static_cast<Word>(moved << shift));
}

// Swaps field i of byte j with field j of byte i, in every byte of the words.
template <class Word>
void transpose(Word (&w)[4]) {
  const Word low4 = static_cast<Word>(0x0F0F0F0F0F0F0F0Fu);
  const Word low2 = static_cast<Word>(0x3333333333333333u);
  exchange(w[0], w[2], 4, low4);
  exchange(w[1], w[3], 4, low4);
  exchange(w[0], w[1], 2, low2);
  exchange(w[2], w[3], 2, low2);
}

template <class Word>
bool encode_word(const Section& section, bool base3, const std::uint8_t* values, std::size_t byte,
                 std::uint8_t* const (&out)[4], Word (&nonzero)[4]) {
  const std::uint8_t* from = values + section.first_value + byte;
  Word words[4], bad = 0;
  for (std::size_t n = 0; n < 4; ++n) {
    words[n] = load<Word>(from + n * section.width);
    bad = static_cast<Word>(bad | (words[n] & words[n] >> 1));
  }
  transpose(words);
  std::uint8_t fifth[sizeof(Word)] = {};
  Word last = static_cast<Word>(kOnes);
  if (section.digits == 5) {
    last = load<Word>(from + 4 * section.width);
    bad = static_cast<Word>(bad | (last & last >> 1));
    std::memcpy(fifth, &last, sizeof last);
  }
  for (std::size_t row = 0; row < 4; ++row) {
    std::uint8_t* to = out[row] + section.first_byte + byte;
    const Word fields = static_cast<Word>(words[row] ^ kOnes);
    const Word tail = static_cast<Word>((last ^ kOnes) >> 2 * row & 0x0303030303030303u);
    nonzero[row] = static_cast<Word>(nonzero[row] | fields | tail);
    if (!base3) {
      store(to, words[row]);
      continue;
    }
    std::uint8_t bytes[sizeof(Word)];
    std::memcpy(bytes, &words[row], sizeof(Word));
    for (std::size_t i = 0; i < sizeof(Word); ++i) {
      const unsigned digit = section.digits == 5 ? fifth[i] >> 2 * row & 3u : 0u;
      to[i] = kCeiling[static_cast<std::uint8_t>(kBase3[bytes[i]] + digit)];
    }
  }
  return (bad & static_cast<Word>(kOnes)) == 0;
}

bool encode_block(bool base3, const std::uint8_t* values, std::uint16_t scale,
                  std::uint8_t* const (&out)[4]) {
  std::uint64_t nonzero[4] = {};
  bool sound = true;
  const auto whole = [&](const Section& section) {
    for (std::size_t byte = 0; byte < section.width; byte += 8) {
      sound &= encode_word<std::uint64_t>(section, base3, values, byte, out, nonzero);
    }
  };
  if (base3) {
    whole(kBase[0]);
    whole(kBase[1]);
    std::uint32_t rest[4] = {};
    sound &= encode_word<std::uint32_t>(kBase[2], base3, values, 0, out, rest);
    for (std::size_t row = 0; row < 4; ++row) nonzero[row] |= rest[row];
  } else {
    whole(kTwoBit[0]);
    whole(kTwoBit[1]);
  }
  for (std::size_t row = 0; row < 4; ++row) {
    const std::uint16_t d = nonzero[row] != 0 ? scale : std::uint16_t{0};
    std::uint8_t* to = out[row] + tq_block_bytes(base3) - 2;
    to[0] = static_cast<std::uint8_t>(d & 255u);
    to[1] = static_cast<std::uint8_t>(d >> 8);
  }
  return sound;
}

template <class Word>
bool decode_word(const Section& section, bool base3, const std::uint8_t* const (&in)[4],
                 std::size_t byte, std::uint8_t* values) {
  Word words[4], bad = 0, last = 0;
  const Table& fields = section.digits == 5 ? kFields5 : kFields4;
  for (std::size_t row = 0; row < 4; ++row) {
    const std::uint8_t* from = in[row] + section.first_byte + byte;
    if (!base3) {
      words[row] = load<Word>(from);
    } else {
      std::uint8_t bytes[sizeof(Word)], fifth[sizeof(Word)];
      for (std::size_t i = 0; i < sizeof(Word); ++i) {
        bytes[i] = fields[from[i]];
        fifth[i] = kFifth[from[i]];
      }
      words[row] = load<Word>(bytes);
      last = static_cast<Word>(last | load<Word>(fifth) << 2 * row);
    }
    bad = static_cast<Word>(bad | (words[row] & words[row] >> 1));
  }
  transpose(words);
  std::uint8_t* to = values + section.first_value + byte;
  for (std::size_t n = 0; n < 4; ++n) store(to + n * section.width, words[n]);
  if (section.digits == 5) store(to + 4 * section.width, last);
  return (bad & static_cast<Word>(kOnes)) == 0;
}

}  // namespace

bool encode_tq(bool base3, const std::uint8_t* packed, std::size_t n, std::size_t cols,
               std::uint16_t scale, std::size_t first, std::size_t last, std::uint8_t* blocks) {
  const std::size_t width = tq_block_bytes(base3);
  const std::size_t count = (cols + kTqBlock - 1) / kTqBlock;
  std::uint8_t padded[kTqBlock];
  bool sound = true;
  for (std::size_t r = first; r < last; ++r) {
    for (std::size_t b = 0; b < count; ++b) {
      const std::uint8_t* values = packed + r * cols + b * kTqBlock;
      if ((b + 1) * kTqBlock > cols) {
        std::memset(padded, 0x55, sizeof padded);
        std::memcpy(padded, values, cols - b * kTqBlock);
        values = padded;
      }
      std::uint8_t* out[4];
      for (std::size_t row = 0; row < 4; ++row) {
        out[row] = blocks + ((row * n + r) * count + b) * width;
      }
      sound &= encode_block(base3, values, scale, out);
    }
  }
  return sound;
}

bool decode_tq(bool base3, const std::uint8_t* blocks, std::size_t n, std::size_t cols,
               std::size_t first, std::size_t last, std::uint8_t* packed) {
  const std::size_t width = tq_block_bytes(base3), count = cols / kTqBlock;
  bool sound = true;
  for (std::size_t r = first; r < last; ++r) {
    for (std::size_t b = 0; b < count; ++b) {
      const std::uint8_t* in[4];
      for (std::size_t row = 0; row < 4; ++row) {
        in[row] = blocks + ((row * n + r) * count + b) * width;
      }
      std::uint8_t* values = packed + r * cols + b * kTqBlock;
      const auto whole = [&](const Section& section) {
        for (std::size_t byte = 0; byte < section.width; byte += 8) {
          sound &= decode_word<std::uint64_t>(section, base3, in, byte, values);
        }
      };
      if (base3) {
        whole(kBase[0]);
        whole(kBase[1]);
        sound &= decode_word<std::uint32_t>(kBase[2], base3, in, 0, values);
      } else {
        whole(kTwoBit[0]);
        whole(kTwoBit[1]);
      }
    }
  }
  return sound;
}

}  // namespace forge
