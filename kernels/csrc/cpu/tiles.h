// Tiles of AMX, for the files that are compiled where the assembler knows them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace forge {
namespace {

constexpr std::size_t kTileRows = 16;
constexpr std::size_t kTileBytes = 1024;

#define FORGE_TILE_LOAD(tile, data, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(data), "r"(stride) : "memory")
#define FORGE_TILE_STORE(tile, data, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(data), "r"(stride) : "memory")
#define FORGE_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::: "memory")
// Sums += signed bytes of tokens times unsigned bytes of weights.
#define FORGE_TILE_DOT(sums, tokens, weights) \
  __asm__ volatile("tdpbsud %%tmm" #weights ", %%tmm" #tokens ", %%tmm" #sums ::: "memory")

// What ldtilecfg reads: full tiles, but for the rows that are set.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1;
  std::uint8_t start = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  void load() const { __asm__ volatile("ldtilecfg %0" ::"m"(*this) : "memory"); }
};

inline void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }

}  // namespace
}  // namespace forge
