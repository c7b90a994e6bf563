#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace forge {
namespace {

// A sleeping worker takes 5 to 50 us to wake, more than a whole product of one token. So it looks
// for work this long before it sleeps: the products of a decoded token follow each other sooner.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr std::size_t kMostWorkers = 255;
// An epoch is the number of the call times this, plus the workers that take part in it.
constexpr std::uint64_t kCall = 256;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Never destroyed: its workers are detached and may outlive static destructors.
class Pool {
 public:
  void run(Task task, void* context, std::size_t parts) {
    const std::size_t helpers = grown(parts - 1);
    task_ = task;
    context_ = context;
    parts_ = parts;
    pending_.store(helpers, std::memory_order_relaxed);
    {
      // Under the lock, or a worker that is about to sleep would miss it.
      const std::lock_guard<std::mutex> lock(mutex_);
      const std::uint64_t call = epoch_.load(std::memory_order_relaxed) / kCall + 1;
      epoch_.store(call * kCall + helpers, std::memory_order_release);
      if (sleeping_ != 0) wake_.notify_all();
    }
    task(context, 0, parts);
    for (std::size_t part = helpers + 1; part < parts; ++part) task(context, part, parts);
    for (unsigned spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
      // A worker that lost its core must get one.
      if (spins < 4096) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  std::size_t grown(std::size_t wanted) {
    wanted = std::min(wanted, kMostWorkers);
    while (workers_ < wanted) {
      try {
        std::thread(&Pool::work, this, workers_, epoch_.load(std::memory_order_relaxed)).detach();
      } catch (const std::system_error&) {
        break;  // no more threads are to be had: the caller does their parts
      }
      ++workers_;
    }
    return std::min(wanted, workers_);
  }

  void work(std::size_t index, std::uint64_t seen) {
    for (;;) {
      seen = next(seen);
      // The epoch itself says who takes part. A worker that read it late must not ask anything
      // that the next call has changed since; the caller waits only for those it counted.
      if (index >= seen % kCall) continue;
      task_(context_, index + 1, parts_);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::uint64_t next(std::uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        const std::uint64_t now = epoch_.load(std::memory_order_acquire);
        if (now != seen) return now;
        relax();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
    --sleeping_;
    return epoch_.load(std::memory_order_acquire);
  }

  Task task_ = nullptr;
  void* context_ = nullptr;
  std::size_t parts_ = 0;
  alignas(64) std::atomic<std::uint64_t> epoch_{0};
  alignas(64) std::atomic<std::size_t> pending_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::size_t sleeping_ = 0;
  std::size_t workers_ = 0;
};

std::atomic<Pool*> pool{nullptr};
std::atomic_flag busy = ATOMIC_FLAG_INIT;

// The parent's workers do not exist in the child, and its pool may have been in use.
void forget_pool() {
  pool.store(nullptr);
  busy.clear();
}

Pool& current_pool() {
  Pool* found = pool.load();
  if (found == nullptr) {
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, &forget_pool);
    (void)registered;
#endif
    found = new Pool;
    pool.store(found);
  }
  return *found;
}

}  // namespace

void run_parts(Task task, void* context, std::size_t parts) {
  if (parts > 1 && !busy.test_and_set(std::memory_order_acquire)) {
    current_pool().run(task, context, parts);
    busy.clear(std::memory_order_release);
    return;
  }
  for (std::size_t part = 0; part < parts; ++part) task(context, part, parts);
}

}  // namespace forge
