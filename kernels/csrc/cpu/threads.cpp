#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#include "openmp.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace forge {
namespace {

// Waking a sleeping thread takes tens of microseconds on a virtual machine, more than a product of
// one token. So a worker looks for work this long before it sleeps: through the operations between
// two products of a decoded token. It yields meanwhile, so that others who want the core get it.
constexpr auto kSpin = std::chrono::microseconds(200);
constexpr std::size_t kMostWorkers = 255;
constexpr std::size_t kMostChunks = (1u << 24) - 1;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// One word says which call is under way, how many workers may take part, and how many chunks
// nobody has taken: number of the call (32 bits), workers (8), chunks (24). A chunk is taken by
// lowering the word, which fails once another call has begun; and while a taken chunk is not done
// its call goes on, so what the call left in the pool can be read.
struct Word {
  std::uint64_t value;
  std::uint64_t call() const { return value >> 32; }
  std::size_t workers() const { return value >> 24 & 0xFF; }
  std::size_t chunks() const { return value & kMostChunks; }
  static std::uint64_t of(std::uint64_t call, std::size_t workers, std::size_t chunks) {
    return call << 32 | static_cast<std::uint64_t>(workers) << 24 | chunks;
  }
};

// Never destroyed: its workers are detached and may outlive static destructors.
class Pool {
 public:
  void run(Task task, void* context, std::size_t threads, std::size_t chunks) {
    const std::size_t workers = grown(std::min(threads, chunks) - 1);
    task_ = task;
    context_ = context;
    chunks_ = chunks;
    pending_.store(chunks, std::memory_order_relaxed);
    const std::uint64_t call = Word{word_.load(std::memory_order_relaxed)}.call() + 1;
    word_.store(Word::of(call & 0xFFFFFFFFu, workers, chunks));
    if (sleeping_.load() != 0) {
      // Taken, or a worker between its last look and its sleep would miss it.
      { const std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    while (take_one()) {
    }
    for (unsigned spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < 512) {
        relax();
      } else {
        std::this_thread::yield();  // a worker that lost its core must get one
      }
    }
  }

 private:
  bool take_one() {
    std::uint64_t seen = word_.load(std::memory_order_acquire);
    return take_one(Word{seen}.call());
  }

  bool take_one(std::uint64_t call) {
    std::uint64_t seen = word_.load(std::memory_order_acquire);
    do {
      if (Word{seen}.call() != call || Word{seen}.chunks() == 0) return false;
    } while (!word_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                          std::memory_order_acquire));
    task_(context_, chunks_ - Word{seen}.chunks(), chunks_);
    pending_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  std::size_t grown(std::size_t wanted) {
    wanted = std::min(wanted, kMostWorkers);
    while (workers_ < wanted) {
      try {
        std::thread(&Pool::work, this, workers_).detach();
      } catch (const std::system_error&) {
        break;  // no more threads are to be had: the caller does their chunks
      }
      ++workers_;
    }
    return std::min(wanted, workers_);
  }

  void work(std::size_t index) {
    for (std::uint64_t done = 0;;) {
      const Word word{next(index, done)};
      while (take_one(word.call())) {
      }
      done = word.call();
    }
  }

  bool wants(std::size_t index, std::uint64_t done, std::uint64_t word) const {
    const Word now{word};
    return now.call() != done && index < now.workers() && now.chunks() != 0;
  }

  std::uint64_t next(std::size_t index, std::uint64_t done) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) {
        const std::uint64_t now = word_.load(std::memory_order_acquire);
        if (wants(index, done, now)) return now;
        relax();
      }
      std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    std::uint64_t found = 0;
    wake_.wait(lock, [&] {
      found = word_.load();
      return wants(index, done, found);
    });
    --sleeping_;
    return found;
  }

  Task task_ = nullptr;
  void* context_ = nullptr;
  std::size_t chunks_ = 0;
  alignas(64) std::atomic<std::uint64_t> word_{0};
  alignas(64) std::atomic<std::size_t> pending_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::size_t> sleeping_{0};
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
    found = new Pool;
    pool.store(found);
  }
  return *found;
}

}  // namespace

void run_chunks(Task task, void* context, std::size_t threads, std::size_t chunks) {
#if defined(__unix__) || defined(__APPLE__)
  // Before `busy` is ever taken: a child would keep it taken for good.
  static const int registered = pthread_atfork(nullptr, nullptr, &forget_pool);
  (void)registered;
#endif
  if (threads > 1 && chunks > 1 && chunks <= kMostChunks &&
      !busy.test_and_set(std::memory_order_acquire)) {
    if (!run_on_openmp(task, context, std::min(threads, chunks), chunks)) {
      current_pool().run(task, context, threads, chunks);
    }
    busy.clear(std::memory_order_release);
    return;
  }
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) task(context, chunk, chunks);
}

}  // namespace forge
