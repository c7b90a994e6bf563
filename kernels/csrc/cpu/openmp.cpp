#include "openmp.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__linux__) && defined(__GLIBC__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <strings.h>
#endif

namespace forge {

#if defined(__linux__) && defined(__GLIBC__)
namespace {

using Region = void (*)(void*);
using Parallel = void (*)(Region, void*, unsigned threads, unsigned flags);

struct Work {
  Task task;
  void* context;
  std::size_t chunks;
  std::atomic<std::size_t> next{0};
};

void take_chunks(void* data) {
  auto* work = static_cast<Work*>(data);
  for (;;) {
    const std::size_t chunk = work->next.fetch_add(1, std::memory_order_relaxed);
    if (chunk >= work->chunks) return;
    work->task(work->context, chunk, work->chunks);
  }
}

int find_library(dl_phdr_info* info, std::size_t, void* found) {
  const char* name = std::strrchr(info->dlpi_name, '/');
  if (name == nullptr || std::strncmp(name, "/libgomp", 8) != 0) return 0;
  *static_cast<const char**>(found) = info->dlpi_name;
  return 1;
}

Parallel find_parallel() {
  const char* policy = std::getenv("OMP_WAIT_POLICY");
  if (policy != nullptr && strcasecmp(policy, "passive") == 0) return nullptr;
  const char* path = nullptr;
  dl_iterate_phdr(&find_library, &path);
  if (path == nullptr) return nullptr;
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  Parallel found = nullptr;
  void* symbol = dlsym(library, "GOMP_parallel");
  std::memcpy(&found, &symbol, sizeof found);
  return found;
}

// Whether this process comes from a fork that no exec followed: torch may have used the library
// before it, whose threads the child does not have but waits for. Asked of the kernel, as such a
// fork may be older than this module.
bool is_forked() {
  std::FILE* file = std::fopen("/proc/self/stat", "r");
  if (file == nullptr) return false;
  char line[512];
  const std::size_t read = std::fread(line, 1, sizeof line - 1, file);
  std::fclose(file);
  line[read] = 0;
  const char* rest = std::strrchr(line, ')');  // the name before it may hold anything
  unsigned flags = 0;  // proc_pid_stat(5): the ninth field
  if (rest == nullptr || std::sscanf(rest, ") %*c %*d %*d %*d %*d %*d %u", &flags) != 1) {
    return false;
  }
  constexpr unsigned kForkedWithoutExec = 0x40;  // PF_FORKNOEXEC of linux/sched.h
  return (flags & kForkedWithoutExec) != 0;
}

// A thread that calls the library gets a team of its own, so only one does. The callers take turns
// (`busy` in threads.cpp), so that plain variables do; the guard of a static one would stay taken
// in the child of a fork in the midst of it.
pthread_t owner;
Parallel found = nullptr;
bool looked = false;

void give_up() { found = nullptr; }

Parallel parallel_of_this_thread() {
  if (!looked) {
    owner = pthread_self();
    pthread_atfork(nullptr, nullptr, &give_up);
    found = is_forked() ? nullptr : find_parallel();
    looked = true;
  }
  return pthread_equal(owner, pthread_self()) ? found : nullptr;
}

}  // namespace

bool run_on_openmp(Task task, void* context, std::size_t threads, std::size_t chunks) {
  const Parallel parallel = parallel_of_this_thread();
  if (parallel == nullptr) return false;
  Work work{task, context, chunks};
  parallel(&take_chunks, &work, static_cast<unsigned>(threads), 0);
  return true;
}

#else

bool run_on_openmp(Task, void*, std::size_t, std::size_t) { return false; }

#endif

}  // namespace forge
