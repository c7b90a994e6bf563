#include "buffer.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace forge {

std::uint8_t* allocate_weights(std::size_t bytes) {
  constexpr std::size_t kHuge = 2u << 20;
  const std::size_t align = bytes >= kHuge / 2 ? kHuge : 64;
  const std::size_t rounded = (bytes + align - 1) / align * align;
  void* data = std::aligned_alloc(align, rounded == 0 ? align : rounded);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (data != nullptr && align == kHuge) madvise(data, rounded, MADV_HUGEPAGE);
#endif
  return static_cast<std::uint8_t*>(data);
}

void free_weights(std::uint8_t* data) { std::free(data); }

}  // namespace forge
