// Memory for packed weights: on huge pages where the system has them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace forge {

// At least `bytes`, aligned to 64 (to 2 MiB from 1 MiB on); null when there is none.
// Decoding reads every weight once a token: 4 KiB pages cost up to 1.7 times as long.
std::uint8_t* allocate_weights(std::size_t bytes);
void free_weights(std::uint8_t* data);

}  // namespace forge
