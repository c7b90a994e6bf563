#include "tiles.h"

namespace forge {

std::size_t probe_amx(std::size_t repeats) {
  TileShapes{}.load();
  FORGE_TILE_ZERO(0);
  FORGE_TILE_ZERO(1);
  FORGE_TILE_ZERO(2);
  FORGE_TILE_ZERO(3);
  FORGE_TILE_ZERO(4);
  FORGE_TILE_ZERO(5);
  FORGE_TILE_ZERO(6);
  FORGE_TILE_ZERO(7);
  for (std::size_t r = 0; r < repeats; ++r) {
    FORGE_TILE_DOT(0, 4, 6);
    FORGE_TILE_DOT(1, 4, 7);
    FORGE_TILE_DOT(2, 5, 6);
    FORGE_TILE_DOT(3, 5, 7);
  }
  release_tiles();
  return repeats * 4 * 16 * 16 * 64;
}

}  // namespace forge
