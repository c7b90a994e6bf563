// Torch's own OpenMP threads, when they are in the process.
#pragma once

#include "threads.h"

namespace forge {

// As run_chunks, on the threads of the GNU OpenMP library that is already loaded; false, with
// nothing done, where that cannot be: none is loaded, its threads sleep between regions
// (OMP_WAIT_POLICY=PASSIVE), this is a child after fork, or another thread used it first.
//
// Its idle threads spin for milliseconds after each of torch's operations. A pool of our own then
// has a core less (products of a prefill took 35 ms instead of 19 on two cores).
bool run_on_openmp(Task task, void* context, std::size_t threads, std::size_t chunks);

}  // namespace forge
