// A small pool: one caller at a time, workers that sleep when nothing comes.
#pragma once

#include <cstddef>

namespace forge {

using Task = void (*)(void* context, std::size_t part, std::size_t parts);

// Calls task(context, i, parts) for i in 0..parts, part 0 on the calling thread, and returns when
// all are done. Without workers (parts is 1, another thread is using the pool, or none can be
// started) the caller does every part itself. Safe in a child after fork: it gets workers of its
// own.
void run_parts(Task task, void* context, std::size_t parts);

// As run_parts, for a callable.
template <class Body>
void parallel(std::size_t parts, Body body) {
  run_parts([](void* context, std::size_t part,
               std::size_t count) { (*static_cast<Body*>(context))(part, count); },
            &body, parts);
}

}  // namespace forge
