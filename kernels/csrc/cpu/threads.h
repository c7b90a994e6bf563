// A small pool: one caller at a time, workers that come when they can and sleep when nothing does.
#pragma once

#include <cstddef>

namespace forge {

using Task = void (*)(void* context, std::size_t chunk, std::size_t chunks);

// Calls task(context, i, chunks) once for each i in 0..chunks, on up to `threads` threads, and
// returns when all are done. The caller takes chunks like everybody else and never waits for a
// worker that has not started one: one that sleeps, or has lost its core, costs nothing but its
// help. Alone (threads is 1, or another thread is using the pool) the caller does them all. Safe in
// a child after fork: it gets workers of its own.
void run_chunks(Task task, void* context, std::size_t threads, std::size_t chunks);

// As run_chunks, for a callable.
template <class Body>
void parallel(std::size_t threads, std::size_t chunks, Body body) {
  run_chunks([](void* context, std::size_t chunk,
                std::size_t count) { (*static_cast<Body*>(context))(chunk, count); },
             &body, threads, chunks);
}

}  // namespace forge
