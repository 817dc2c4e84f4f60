// The scheduler: fibres for a block's threads, resumed warp by warp until all of a warp wait or have left.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "include/cuda_runtime.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

namespace {

enum class State { ready, meets, meets_block, left };

struct Fibre {
  State state;
  Meeting meeting;
  jmp_buf at;
  ucontext_t context;
  char *stack;
};

constexpr size_t kStack = 128 * 1024;
constexpr char kUntouched = 0x5a;

std::vector<Fibre> fibres;
uint64_t brought[kLanes];  // by the lanes of the warp that is being resumed
const std::function<void()> *body;
int running;
jmp_buf scheduler;
sigjmp_buf outside;
ucontext_t unused;
std::string failure;
double *shared_memory;
unsigned schedule_seed;
int64_t launches;
volatile sig_atomic_t launched;
char *guard_begin, *guard_end;

// Memory that ends at an inaccessible page.
char *guarded(size_t bytes, char **guard) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), pages = (bytes + page - 1) / page + 2;
  char *base = static_cast<char *>(mmap(nullptr, pages * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) return nullptr;
  mprotect(base + page, (pages - 2) * page, PROT_READ | PROT_WRITE);  // and begins behind one
  *guard = base + (pages - 1) * page;
  return *guard - bytes;
}

void enter() {
  (*body)();
  fibres[running].state = State::left;
  _longjmp(scheduler, 1);
}

void resume(int thread) {
  running = thread;
  threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
  fibres[thread].state = State::ready;
  if (!_setjmp(scheduler)) _longjmp(fibres[thread].at, 1);
}

void wait(State state) {
  Fibre &own = fibres[running];
  own.state = state;
  if (!_setjmp(own.at)) _longjmp(scheduler, 1);
}

// A fibre that waits where it begins.
void prepare(int thread) {
  Fibre &fibre = fibres[thread];
  if (!fibre.stack) {
    char *guard;
    fibre.stack = guarded(kStack, &guard);
  }
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack;
  fibre.context.uc_stack.ss_size = kStack;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, enter, 0);
  fibre.state = State::ready;
}

void start(int thread) {
  running = thread;
  threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
  if (!_setjmp(scheduler)) swapcontext(&unused, &fibres[thread].context);
}

std::string place(const Fibre &fibre, int thread) {
  std::string text = "thread " + std::to_string(thread);
  if (fibre.state == State::left) return text + " has left";
  return text + " is at " + fibre.meeting.kind + ", " + fibre.meeting.file + ":" + std::to_string(fibre.meeting.line);
}

// Lets the lanes of a warp that have all arrived go on; false if some wait for lanes that will not come.
bool release(int first, std::vector<int> *ready) {
  bool block = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Fibre &one = fibres[first + lane];
    if (one.state == State::meets_block) block = true;
    if (one.state != State::meets) continue;
    const unsigned mask = one.meeting.mask;
    if (!(mask >> lane & 1)) {
      failure = place(one, first + lane) + ", whose mask leaves it out";
      return false;
    }
    for (int other = 0; other < kLanes; ++other) {
      if (!(mask >> other & 1)) continue;
      const Fibre &two = fibres[first + other];
      const bool same = two.state == State::meets && two.meeting.mask == mask && two.meeting.line == one.meeting.line &&
                        !std::strcmp(two.meeting.kind, one.meeting.kind) &&
                        !std::strcmp(two.meeting.file, one.meeting.file);
      if (same) continue;
      failure = "divergence in block " + std::to_string(blockIdx.x) + ": " + place(one, first + lane) + " while " +
                place(two, first + other);
      return false;
    }
    brought[lane] = one.meeting.value;
    ready->push_back(first + lane);
  }
  if (block && !ready->empty()) {
    failure = "divergence: some of a warp wait for their block, others for their warp";
    return false;
  }
  return true;
}

bool run_block(int threads) {
  std::minstd_rand random(schedule_seed);
  const auto in_order = [&](std::vector<int> &some) {
    if (schedule_seed == 1) std::reverse(some.begin(), some.end());
    if (schedule_seed > 1) std::shuffle(some.begin(), some.end(), random);
  };
  for (int thread = 0; thread < threads; ++thread) prepare(thread);
  std::vector<int> all(threads), ready;
  for (int thread = 0; thread < threads; ++thread) all[thread] = thread;
  in_order(all);
  for (int thread : all) start(thread);
  std::vector<int> warps(threads / kLanes);
  for (int warp = 0; warp < threads / kLanes; ++warp) warps[warp] = warp * kLanes;
  in_order(warps);
  for (;;) {
    for (int first : warps)
      for (;;) {
        ready.clear();
        if (!release(first, &ready)) return false;
        if (ready.empty()) break;
        in_order(ready);
        for (int thread : ready) resume(thread);
      }
    ready.clear();
    for (int thread = 0; thread < threads; ++thread)
      if (fibres[thread].state == State::meets_block) ready.push_back(thread);
    if (ready.empty()) return true;
    for (int thread : ready)
      for (int other = 0; other < threads; ++other)
        if (fibres[other].state == State::left || fibres[other].meeting.line != fibres[thread].meeting.line) {
          failure = "divergence: " + place(fibres[thread], thread) + " while " + place(fibres[other], other);
          return false;
        }
    in_order(ready);
    for (int thread : ready) resume(thread);
  }
}

void on_fault(int number, siginfo_t *info, void *) {
  if (!launched) {
    signal(number, SIG_DFL);
    return;
  }
  const char *address = static_cast<const char *>(info->si_addr);
  failure = address >= guard_begin && address < guard_end ? "access outside the block's shared memory"
                                                          : "access outside any memory that the kernel was given";
  failure += ", thread " + std::to_string(running) + " of block " + std::to_string(blockIdx.x);
  siglongjmp(outside, 1);
}

}  // namespace

double *dynamic_shared_memory() { return shared_memory; }

const uint64_t *meet(const Meeting &meeting) {
  fibres[running].meeting = meeting;
  wait(State::meets);
  return brought;
}

void meet_block(const char *file, int line) {
  fibres[running].meeting = {"__syncthreads", file, line, 0, 0};
  wait(State::meets_block);
}

int run(dim3 grid, dim3 block, size_t shared, const std::function<void()> &thread) {
  const int threads = static_cast<int>(block.x);
  if (threads % kLanes || block.y * block.z * grid.y * grid.z != 1) return cudaErrorInvalidValue;
  if (fibres.size() < static_cast<size_t>(threads)) fibres.resize(threads);
  ++launches;
  body = &thread;
  blockDim = block;
  gridDim = grid;
  char *const memory = guarded(shared, &guard_end);  // ends at the guard
  guard_begin = memory - sysconf(_SC_PAGESIZE);
  guard_end += sysconf(_SC_PAGESIZE);
  shared_memory = reinterpret_cast<double *>(memory);
  static char alternate[64 * 1024];
  stack_t faults = {}, before_stack;
  faults.ss_sp = alternate;
  faults.ss_size = sizeof alternate;
  sigaltstack(&faults, &before_stack);
  struct sigaction action = {}, before, before_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before);
  sigaction(SIGBUS, &action, &before_bus);
  volatile bool good = true;
  launched = 1;
  if (sigsetjmp(outside, 1)) {
    good = false;
  } else {
    for (unsigned b = 0; b < grid.x && good; ++b) {
      blockIdx = dim3(b, 0, 0);
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), before = (page - shared % page) % page;
      std::memset(memory - before, kUntouched, before);  // what precedes it in its page is accessible, but watched
      if (shared) std::memset(memory, 0xff, shared);
      good = run_block(threads);
      if (good && std::any_of(memory - before, memory, [](char byte) { return byte != kUntouched; })) {
        failure = "write before the block's shared memory, block " + std::to_string(b);
        good = false;
      }
    }
  }
  launched = 0;
  sigaction(SIGSEGV, &before, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  sigaltstack(&before_stack, nullptr);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), pages = (shared + page - 1) / page + 2;
  munmap(guard_end - pages * page, pages * page);
  return good ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulation

const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "invalid value";
  return error == cudaSuccess ? "no error" : emulation::failure.c_str();
}

// The order that threads run in between meetings: 0 first to last, 1 last to first, else shuffled by the seed. A result
// that depends on it has read or written what another thread had not finished.
EXPORT void emulation_schedule(unsigned seed) { emulation::schedule_seed = seed; }

// How many kernels have been launched.
EXPORT int64_t emulation_launches() { return emulation::launches; }

// Memory for a kernel's array that ends at an inaccessible page; never freed.
EXPORT void *emulation_allocate(size_t bytes) {
  char *guard;
  return emulation::guarded(bytes, &guard);
}

// In place of torch's, which a CPU build does not have.
EXPORT int aoti_torch_get_current_cuda_stream(int, void **stream) {
  *stream = nullptr;
  return 0;
}
