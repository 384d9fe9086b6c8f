// Runs CUDA kernels on the CPU, thread by thread, and checks every access of theirs.
//
// A block's threads are fibers on one CPU thread. Each runs until it meets a barrier or a warp
// operation; when none can go on, the engine resolves what they wait for. Blocks run one after the
// other. The order of threads and blocks is a setting: right kernels give the same result in any.
//
// Reported are: accesses outside the arrays and allocations, reads of shared memory that nobody
// wrote, misaligned vectors, data races, barriers and warp operations that not all threads reach. A
// race is two accesses of one word, at least one of them a write, by two threads with no barrier
// between. It is found whatever the order, since it is the absence of a barrier that is looked for.
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"

namespace {

constexpr size_t kStack = 256 << 10, kArena = 512 << 10, kStatic = 256 << 10, kGuard = 256, kMaxReports = 32;
constexpr uint32_t kNobody = 0, kSeveral = ~0u;

constexpr size_t kWord = 2;  // bytes: two halves side by side are often two threads'

// A word's history. A stamp counts barrier intervals of all launches; a thread is its number plus 1.
struct Word {
  uint32_t write_stamp = 0, write_thread = kNobody;
  uint32_t read_stamp = 0, read_thread = kNobody;  // the last interval that read it
  uint32_t first_read = 0;                         // the first that did since the last write
  uint32_t filling = 0;                            // the block whose asynchronous copy is under way
};

struct Range {
  char* begin;
  size_t bytes;
  std::vector<Word> words;
};

enum State { kReady, kAtBarrier, kAtWarp, kDone };
struct Fiber {
  void* stack_pointer;
  State state;
  EmuIndex thread;
  int line, operation, lane, width;
  uint32_t mask, value;
  void* data;
};

struct Copy {
  char* to;
  bool there;
  char bytes[16];
};
struct Copies {  // of a thread, that are under way
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Kernel {
  std::string name;
  void (*entry)(void**);
  const char* image;
  size_t dynamic_limit;
  unsigned (*sizes)(unsigned*);
};

// A launch that a graph keeps, arguments and all.
struct Launch {
  void* kernel;
  EmuIndex grid, block;
  size_t dynamic;
  std::vector<std::vector<char>> arguments;
};
std::vector<Launch>* captured;  // where launches go while a stream is captured

std::vector<std::string> reports;
uint64_t report_count, launch_count, graph_launch_count, clock_ns;
unsigned order;

std::map<char*, Range> allocations;
std::vector<Range> arrays;  // shared memory of the running block
char *arena, *stacks;
size_t stack_count;
std::vector<Fiber> fibers;
std::vector<Copies> copies;
int running = -1;
void* scheduler_stack;
bool aborted;

const Kernel* kernel;
void** arguments;
EmuIndex block, grid, threads;
uint32_t stamp, launch_stamp, block_stamp;
size_t dynamic_bytes;

void report(void* pc, const char* format, ...) {
  if (++report_count > kMaxReports) return;
  char text[512], where[256] = "";
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  Dl_info info;
  if (pc && dladdr(pc, &info))
    snprintf(where, sizeof where, " @%s+0x%lx", kernel->image, (long)((char*)pc - (char*)info.dli_fbase) - 1);
  char head[256];
  int n = snprintf(head, sizeof head, "%s, block (%u, %u, %u)", kernel->name.c_str(), block.x, block.y, block.z);
  if (running >= 0) {
    EmuIndex t = fibers[running].thread;
    snprintf(head + n, sizeof head - n, ", thread (%u, %u, %u)", t.x, t.y, t.z);
  }
  reports.push_back(std::string(head) + ": " + text + where);
}

// ---- fibers -----------------------------------------------------------------------------------

extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

void wait_turn() {
  int me = running;
  emu_switch(&fibers[me].stack_pointer, scheduler_stack);
}

[[noreturn]] void finish() {
  fibers[running].state = kDone;
  wait_turn();
  abort();
}

void start() {
  kernel->entry(arguments);
  finish();
}

[[noreturn]] void stop_block() {
  aborted = true;
  finish();
}

// ---- memory -----------------------------------------------------------------------------------

Range* find(char* at, size_t bytes) {
  for (Range& array : arrays)
    if (at >= array.begin && at + bytes <= array.begin + array.bytes) return &array;
  auto next = allocations.upper_bound(at);
  if (next == allocations.begin()) return nullptr;
  Range& range = std::prev(next)->second;
  return at + bytes <= range.begin + range.bytes ? &range : nullptr;
}

// Whether an access of that interval and thread is not ordered before the running thread's.
bool races(uint32_t when, uint32_t who, bool shared) {
  if (when < launch_stamp || who == kNobody) return false;
  if (when < block_stamp) return !shared;  // another block's, which nothing orders
  return when == stamp && who != uint32_t(running) + 1;
}

void check(Word& word, bool write, bool shared, void* pc) {
  const char* space = shared ? "shared" : "global";
  if (shared && word.filling == block_stamp)
    report(pc, "%s of shared memory that an asynchronous copy is still filling", write ? "write" : "read");
  if (races(word.write_stamp, word.write_thread, shared))
    report(pc, "data race: %s of %s memory after a write by thread %u", write ? "write" : "read", space, word.write_thread - 1);
  uint32_t me = running + 1;
  if (write) {
    bool other_block = !shared && word.first_read >= launch_stamp && word.first_read < block_stamp;
    if (other_block || races(word.read_stamp, word.read_thread, shared))
      report(pc, "data race: write of %s memory after another thread's read", space);
    word.write_stamp = stamp, word.write_thread = me;
    word.read_stamp = word.first_read = 0, word.read_thread = kNobody;
    return;
  }
  if (shared && word.write_stamp < block_stamp) report(pc, "read of shared memory that was never written");
  if (word.first_read < launch_stamp) word.first_read = stamp;
  word.read_thread = word.read_stamp == stamp && word.read_thread != me ? kSeveral : me;
  word.read_stamp = stamp;
}

void touch(void* address, size_t bytes, bool write, void* pc) {
  char* at = (char*)address;
  if (running < 0 || (at >= stacks && at < stacks + stack_count * kStack)) return;
  Range* range = find(at, bytes);
  if (!range) {
    Dl_info info;  // constants of the kernel's own image
    if (dladdr(at, &info) && info.dli_fname && !strcmp(info.dli_fname, kernel->image)) return;
    report(pc, "%s of %zu bytes out of bounds", write ? "write" : "read", bytes);
    stop_block();
  }
  if (bytes <= 16 && (uintptr_t)at % bytes) {
    report(pc, "misaligned access of %zu bytes", bytes);
    stop_block();
  }
  if (range->words.empty()) range->words.resize((range->bytes + kWord - 1) / kWord);
  bool shared = at >= arena && at < arena + kArena;
  size_t first = (at - range->begin) / kWord, last = (at - range->begin + bytes - 1) / kWord;
  for (size_t i = first; i <= last; i++) check(range->words[i], write, shared, pc);
}

void set_filling(char* at, uint32_t value) {
  Range* range = find(at, 16);
  size_t first = (at - range->begin) / kWord;
  for (size_t i = first; i < first + 16 / kWord; i++) range->words[i].filling = value;
}

// ---- warp operations --------------------------------------------------------------------------

int source_lane(const Fiber& fiber, int lane) {
  int base = lane / fiber.width * fiber.width, from = lane;
  if (fiber.operation == EMU_INDEX) from = base + fiber.lane % fiber.width;
  if (fiber.operation == EMU_UP) from = lane - fiber.lane;
  if (fiber.operation == EMU_DOWN) from = lane + fiber.lane;
  if (fiber.operation == EMU_XOR) from = lane ^ fiber.lane;
  return from < base || from >= base + fiber.width ? lane : from;
}

// Fragments of halves in registers are spread over the lanes as the PTX ISA says.
void multiply(size_t first) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const EmuMma& own = *(EmuMma*)fibers[first + lane].data;
    int group = lane / 4, t = lane % 4;
    auto half_of = [&](uint32_t pair, int which) { return own.widen(pair >> 16 * which); };
    for (int i = 0; i < 2; i++) {
      for (int r = 0; r < 4; r++) a[group + r % 2 * 8][2 * t + r / 2 * 8 + i] = half_of(own.a[r], i);
      for (int r = 0; r < 2; r++) b[2 * t + r * 8 + i][group] = half_of(own.b[r], i);
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    const EmuMma& own = *(EmuMma*)fibers[first + lane].data;
    for (int r = 0; r < 4; r++) {
      int row = lane / 4 + r / 2 * 8, col = lane % 4 * 2 + r % 2;
      float sum = own.c[r];
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][col];
      own.c[r] = sum;
    }
  }
}

void load_matrices(size_t first) {
  for (int lane = 0; lane < 32; lane++) {
    const EmuMatrices& own = *(EmuMatrices*)fibers[first + lane].data;
    for (int m = 0; m < 4; m++) {
      uint16_t pair[2];
      for (int i = 0; i < 2; i++) {
        int row = own.transposed ? lane % 4 * 2 + i : lane / 4, col = own.transposed ? lane / 4 : lane % 4 * 2 + i;
        pair[i] = ((EmuMatrices*)fibers[first + m * 8 + row].data)->row[col];
      }
      memcpy(own.result + m, pair, 4);
    }
  }
}

// Lets the lanes go on that wait at the same operation; returns whether there were any.
bool resolve_warp(size_t first, size_t end) {
  size_t head = first;
  while (head < end && fibers[head].state != kAtWarp) head++;
  if (head == end) return false;
  uint32_t arrived = 0, values[32] = {};
  for (size_t i = head; i < end; i++)
    if (fibers[i].state == kAtWarp && fibers[i].line == fibers[head].line) {
      arrived |= 1u << (i - first);
      values[i - first] = fibers[i].value;
    }
  if (arrived == ~0u && fibers[head].operation == EMU_MMA) multiply(first);
  if (arrived == ~0u && fibers[head].operation == EMU_MATRICES) load_matrices(first);
  for (size_t i = head; i < end; i++) {
    int lane = i - first;
    if (!(arrived >> lane & 1)) continue;
    Fiber& fiber = fibers[i];
    if (fiber.operation != EMU_ACTIVE && (fiber.mask & ~arrived & (end - first == 32 ? ~0u : (1u << (end - first)) - 1))) {
      running = i;
      report(nullptr, "warp operation at line %d waits for lanes that do not come (mask %08x, came %08x)", fiber.line, fiber.mask, arrived);
      running = -1;
      aborted = true;
    }
    int from = source_lane(fiber, lane);
    if (fiber.operation == EMU_ACTIVE) fiber.value = arrived;
    else if (fiber.operation < EMU_MMA && fiber.operation != EMU_SYNC) fiber.value = arrived >> from & 1 ? values[from] : ~0u;  // NaN
    fiber.state = kReady;
  }
  return true;
}

// ---- blocks -----------------------------------------------------------------------------------

void shuffle(std::vector<uint32_t>& items, uint32_t seed) {
  if (order == 1) std::reverse(items.begin(), items.end());
  if (order < 2) return;
  std::mt19937 random(order * 65537 + seed);
  for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[random() % i]);
}

// Lets waiting threads pass a barrier; returns whether any thread is left to run.
bool resolve_barrier() {
  size_t waiting = 0, done = 0;
  int line = 0;
  bool same = true;
  for (Fiber& fiber : fibers) {
    if (fiber.state == kDone) done++;
    if (fiber.state != kAtBarrier) continue;
    if (waiting++ == 0) line = fiber.line;
    same &= fiber.line == line;
  }
  if (waiting == 0) return false;
  if (done > 0 && !aborted) report(nullptr, "%zu threads wait at __syncthreads() in line %d, which %zu left", waiting, line, done);
  else if (!same) report(nullptr, "threads wait at different __syncthreads()");
  if (done > 0 || !same) return false;
  for (Fiber& fiber : fibers) fiber.state = kReady;
  stamp++;
  return true;
}

void run_block(uint32_t count, uint32_t number) {
  block_stamp = ++stamp;
  arrays.clear();
  memset(arena, 0xff, kArena);
  if (dynamic_bytes) arrays.push_back({arena, dynamic_bytes, {}});
  fibers.assign(count, Fiber{});
  copies.assign(count, Copies{});
  std::vector<uint32_t> turns(count);
  for (uint32_t i = 0; i < count; i++) {
    turns[i] = i;
    Fiber& fiber = fibers[i];
    fiber.thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    void** top = (void**)(stacks + (i + 1) * kStack - 64);
    *--top = nullptr;
    *--top = (void*)start;
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
  }
  shuffle(turns, number);
  aborted = false;
  for (bool more = true; more && !aborted;) {
    for (uint32_t i : turns)
      if (fibers[i].state == kReady && !aborted) {
        running = i;
        emu_switch(&scheduler_stack, fibers[i].stack_pointer);
      }
    running = -1;
    bool woken = false;
    for (uint32_t warp = 0; warp < count; warp += 32) woken |= resolve_warp(warp, std::min(warp + 32, count));
    more = woken || resolve_barrier();
  }
  size_t left = 0;
  for (Copies& own : copies) {
    left += own.open.size();
    for (auto& group : own.groups) left += group.size();
  }
  if (left && !aborted) report(nullptr, "%zu asynchronous copies that nobody waits for", left);
}

}  // namespace

// ---- what kernels call -------------------------------------------------------------------------

EXPORT EmuIndex emu_thread_index() { return fibers[running].thread; }
EXPORT EmuIndex emu_block_index() { return block; }
EXPORT void* emu_dynamic_shared() { return arena; }
EXPORT void* emu_shared(uint64_t offset, uint64_t bytes) {
  char* begin = arena + kStatic + offset;
  if (begin + bytes > arena + kArena) abort();
  bool known = false;
  for (Range& array : arrays) known |= array.begin == begin;
  if (!known) arrays.push_back({begin, (size_t)bytes, {}});
  return begin;
}
EXPORT void emu_barrier(int line) {
  fibers[running].state = kAtBarrier;
  fibers[running].line = line;
  wait_turn();
}
EXPORT uint32_t emu_warp(int operation, uint32_t mask, uint32_t value, int lane, int width, int line) {
  Fiber& fiber = fibers[running];
  fiber = {fiber.stack_pointer, kAtWarp, fiber.thread, line, operation, lane, width, mask, value};
  wait_turn();
  return fibers[running].value;
}

EXPORT void emu_collective(int operation, void* data, int line) {
  Fiber& fiber = fibers[running];
  fiber = {fiber.stack_pointer, kAtWarp, fiber.thread, line, operation, 0, 32, ~0u, 0, data};
  wait_turn();
}
// The copy's bytes arrive when its thread waits for it, and not before.
EXPORT void emu_copy_async(void* to, const void* from, bool there) {
  void* pc = __builtin_return_address(0);
  Copy copy{(char*)to, there, {}};
  if (there) {
    touch((void*)from, sizeof copy.bytes, false, pc);
    memcpy(copy.bytes, from, sizeof copy.bytes);
  }
  touch(to, sizeof copy.bytes, true, pc);
  set_filling(copy.to, block_stamp);
  copies[running].open.push_back(copy);
}
EXPORT void emu_commit_copies() {
  Copies& own = copies[running];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}
EXPORT void emu_wait_copies(int left) {
  std::vector<std::vector<Copy>>& groups = copies[running].groups;
  while ((int)groups.size() > left) {
    for (Copy& copy : groups.front()) {
      set_filling(copy.to, 0);
      memcpy(copy.to, copy.bytes, sizeof copy.bytes);
      touch(copy.to, sizeof copy.bytes, true, nullptr);
    }
    groups.erase(groups.begin());
  }
}

#define CALLER __builtin_return_address(0)
#define HOOKS(n)                                                                      \
  EXPORT void __tsan_read##n(void* p) { touch(p, n, false, CALLER); }                 \
  EXPORT void __tsan_write##n(void* p) { touch(p, n, true, CALLER); }                 \
  EXPORT void __tsan_unaligned_read##n(void* p) { touch(p, n, false, CALLER); }       \
  EXPORT void __tsan_unaligned_write##n(void* p) { touch(p, n, true, CALLER); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
EXPORT void __tsan_init() {}
EXPORT void __tsan_read_range(void* p, size_t n) { touch(p, n, false, CALLER); }
EXPORT void __tsan_write_range(void* p, size_t n) { touch(p, n, true, CALLER); }

// ---- what tests call ---------------------------------------------------------------------------

EXPORT void emu_set_order(unsigned value) { order = value; }
EXPORT uint64_t emu_report_count() { return report_count; }
EXPORT uint64_t emu_launch_count() { return launch_count; }
EXPORT uint64_t emu_graph_launch_count() { return graph_launch_count; }
uint64_t emu_clock() { return clock_ns; }
EXPORT const char* emu_report(uint64_t i) { return i < reports.size() ? reports[i].c_str() : nullptr; }
EXPORT void emu_clear() { reports.clear(), report_count = launch_count = graph_launch_count = 0; }

// ---- memory and launches, for the driver's and the CUDA runtime's functions -----------------------

void* emu_malloc(size_t bytes) {
  char* raw = (char*)aligned_alloc(256, (bytes + 255) / 256 * 256 + 2 * kGuard);
  if (!raw) return nullptr;
  memset(raw, 0xff, bytes + 2 * kGuard);
  char* begin = raw + kGuard;
  allocations[begin] = {begin, bytes, {}};
  return begin;
}

bool emu_free(void* begin) {
  if (!begin) return true;
  if (!allocations.erase((char*)begin)) return false;
  free((char*)begin - kGuard);
  return true;
}

void* emu_kernel(void* library, const char* image, const char* name) {
  void* entry = dlsym(library, (std::string("emu_kernel_") + name).c_str());
  void* sizes = dlsym(library, (std::string("emu_sizes_") + name).c_str());
  return entry ? new Kernel{name, (void (*)(void**))entry, image, 48 << 10, (unsigned (*)(unsigned*))sizes} : nullptr;
}

bool emu_capturing() { return captured; }
void emu_begin_capture() { captured = new std::vector<Launch>; }
void* emu_end_capture() { return std::exchange(captured, nullptr); }
void emu_free_graph(void* graph) { delete (std::vector<Launch>*)graph; }
void* emu_copy_graph(void* graph) { return new std::vector<Launch>(*(std::vector<Launch>*)graph); }
bool emu_launch_graph(void* graph) {
  for (Launch& launch : *(std::vector<Launch>*)graph) {
    std::vector<void*> values;
    for (auto& argument : launch.arguments) values.push_back(argument.data());
    if (!emu_launch(launch.kernel, launch.grid, launch.block, launch.dynamic, values.data())) return false;
    graph_launch_count++;
  }
  return true;
}

void emu_allow_dynamic(void* handle, size_t bytes) { ((Kernel*)handle)->dynamic_limit = bytes; }

bool emu_launch(void* handle, EmuIndex grid_size, EmuIndex block_size, size_t dynamic, void** values) {
  if (captured) {
    unsigned sizes[256], number = ((Kernel*)handle)->sizes(sizes);
    Launch launch{handle, grid_size, block_size, dynamic, {}};
    for (unsigned i = 0; i < number; i++) launch.arguments.emplace_back((char*)values[i], (char*)values[i] + sizes[i]);
    captured->push_back(launch);
    return true;
  }
  kernel = (Kernel*)handle;
  uint64_t count = (uint64_t)block_size.x * block_size.y * block_size.z;
  uint64_t blocks = (uint64_t)grid_size.x * grid_size.y * grid_size.z;
  if (!count || count > 1024 || block_size.z > 64 || !blocks || grid_size.y > 65535 || grid_size.z > 65535) return false;
  if (dynamic > kernel->dynamic_limit) return false;
  if (!arena) arena = (char*)mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (!stacks) {
    stack_count = 1024;
    stacks = (char*)mmap(nullptr, stack_count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  launch_count++;
  // No claim about any GPU: a time that depends on blocks and threads, as one on a GPU does.
  clock_ns += 2000 + (blocks + 107) / 108 * (100 + count);
  arguments = values, grid = grid_size, threads = block_size, dynamic_bytes = dynamic;
  launch_stamp = ++stamp;
  std::vector<uint32_t> turns(blocks);
  for (uint32_t i = 0; i < blocks; i++) turns[i] = i;
  shuffle(turns, 0);
  for (uint32_t i : turns) {
    block = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block(count, i);
  }
  arrays.clear();
  return true;
}
