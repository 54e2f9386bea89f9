#include "emulator.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

Device device;
int device_index = 0;
uint64_t seed = 1;
int64_t launches = 0;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kWarp = 32;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "emulation: %s\n", message.c_str());
  std::fflush(stderr);
  std::_Exit(70);
}

std::string text(const std::source_location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

bool same(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// ---- Fibers ----

#if defined(__x86_64__)
// Saves the registers that a call must keep on the stack, exchanges stacks, restores.
extern "C" void emulation_switch(void** save, void* next);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch,@function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch,.-emulation_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
    void** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // where entry would return to; keeps the stack aligned as after a call
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
    stack_pointer = slot;
  }
  void switch_to(Context& next) { emulation_switch(&stack_pointer, next.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& next) { swapcontext(&context, &next.context); }
};
#endif

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

constexpr size_t kStoreBytes = 8;

struct Store {
  char* to;
  std::array<char, kStoreBytes> value;
  size_t bytes;
};

// What a thread, or the threads that met at a barrier, know of the others' memory operations.
struct Knowledge {
  std::vector<Store> stores;  // that memory does not have yet
  uint64_t fenced = 0;        // when the last fence was

  void learn(Knowledge& other) {
    stores.insert(stores.end(), other.stores.begin(), other.stores.end());
    other.stores.clear();
    fenced = std::max(fenced, other.fenced);
  }
};

struct Block;

struct Thread {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  Block* block = nullptr;
  Index index;
  unsigned rank = 0;                        // in the block
  std::deque<std::vector<Copy>> copies{1};  // committed groups, then the open one
  Knowledge own;
  bool arrived = false;        // at the cluster's barrier
  unsigned arrived_round = 0;  // of the cluster's barrier
  const char* waits_for = nullptr;
  std::source_location waits_at;
  bool done = false;
};

struct Warp {
  unsigned expected = 0, arrived = 0;
  uint64_t offered[kWarp], published[kWarp];
  std::source_location where;
};

struct Cluster {
  std::vector<Block*> blocks;  // by rank
  unsigned arrived = 0, threads = 0, round = 0;
  std::vector<Thread*> waiting;
  Knowledge arriving, met;
};

struct Block {
  Index index;
  Cluster* cluster = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  unsigned at_barrier = 0, done = 0;
  std::source_location where;
  Knowledge met;
};

class Random {
 public:
  explicit Random(uint64_t start) : state_(start * 0x9e3779b97f4a7c15ull + 1) {}
  uint64_t operator()() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  size_t below(size_t n) { return (*this)() % n; }

 private:
  uint64_t state_;
};

class Scheduler {
 public:
  Scheduler(const Index& grid, const Index& block, unsigned cluster_blocks, size_t shared_bytes,
            const std::function<void()>& body)
      : grid_(grid),
        block_(block),
        cluster_blocks_(cluster_blocks),
        shared_bytes_(shared_bytes),
        body_(body),
        random_(seed) {}

  void run() {
    const uint64_t clusters = uint64_t{grid_.x} * grid_.y * grid_.z / cluster_blocks_;
    std::vector<uint64_t> waiting(clusters);
    for (uint64_t i = 0; i < clusters; ++i) waiting[i] = i;
    const size_t at_once = 1 + random_.below(cluster_blocks_ == 1 ? 6 : 2 * cluster_blocks_);
    order_ = static_cast<Order>(random_.below(3));
    std::vector<std::unique_ptr<Block>> running;
    while (!waiting.empty() || !running.empty()) {
      while (!waiting.empty() && running.size() < at_once) {
        const size_t i = random_.below(waiting.size());
        Cluster& cluster = clusters_.emplace_back();
        for (unsigned rank = 0; rank < cluster_blocks_; ++rank) {
          running.push_back(begin(waiting[i] * cluster_blocks_ + rank, cluster));
        }
        waiting[i] = waiting.back();
        waiting.pop_back();
      }
      if (ready_.empty()) report_deadlock(running);
      resume(take_ready());
      for (size_t i = 0; i < running.size(); ++i) {
        if (running[i]->done == running[i]->threads.size()) {
          end(*running[i]);
          running.erase(running.begin() + static_cast<std::ptrdiff_t>(i--));
        }
      }
    }
    publish(late_);
    for (char* stack : free_stacks_) std::free(stack);
  }

  // All that is known reaches memory.
  void publish(Knowledge& known) {
    for (const Store& store : known.stores) {
      std::array<char, kStoreBytes> before{};
      std::memcpy(before.data(), store.to, store.bytes);
      past_[store.to].emplace_back(++now_, before);
      std::memcpy(store.to, store.value.data(), store.bytes);
    }
    known.stores.clear();
  }
  uint64_t now() const { return now_; }

  // What memory held at that time.
  void remember(void* to, const char* from, size_t bytes, uint64_t time) const {
    std::memcpy(to, from, bytes);
    const auto changes = past_.find(from);
    if (changes == past_.end()) return;
    for (const auto& [when, before] : changes->second) {
      if (when > time) {
        std::memcpy(to, before.data(), bytes);
        return;
      }
    }
  }

  void wait(const char* what, const std::source_location& where) {
    Thread& thread = *current;
    thread.waits_for = what;
    thread.waits_at = where;
    leave(thread, false);
  }

  void make_ready(Thread& thread) { ready_.push_back(&thread); }
  size_t random(size_t below) { return random_.below(below); }

  static Scheduler* active;
  static Thread* current;

 private:
  enum class Order { kShuffled, kOldestFirst, kNewestFirst };

  Thread* take_ready() {
    // Now and then any thread, so that the two plain orders do not lock step.
    size_t i = random_.below(ready_.size());
    if (order_ != Order::kShuffled && random_.below(16) != 0) {
      i = order_ == Order::kOldestFirst ? 0 : ready_.size() - 1;
    }
    Thread* const thread = ready_[i];
    if (order_ == Order::kOldestFirst) {
      ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ready_[i] = ready_.back();
      ready_.pop_back();
    }
    return thread;
  }

  std::unique_ptr<Block> begin(uint64_t number, Cluster& cluster) {
    auto block = std::make_unique<Block>();
    block->cluster = &cluster;
    cluster.blocks.push_back(block.get());
    cluster.threads += block_.x * block_.y * block_.z;
    block->index = {static_cast<unsigned>(number % grid_.x),
                    static_cast<unsigned>(number / grid_.x % grid_.y),
                    static_cast<unsigned>(number / grid_.x / grid_.y)};
    const unsigned threads = block_.x * block_.y * block_.z;
    block->shared =
        static_cast<unsigned char*>(::operator new(shared_bytes_, std::align_val_t(16)));
    std::memset(block->shared, 0xff, shared_bytes_);
    block->warps.resize((threads + kWarp - 1) / kWarp);
    block->threads.resize(threads);
    for (unsigned rank = 0; rank < threads; ++rank) {
      Thread& thread = block->threads[rank];
      thread.block = block.get();
      thread.rank = rank;
      thread.index = {rank % block_.x, rank / block_.x % block_.y, rank / block_.x / block_.y};
      if (free_stacks_.empty()) {
        thread.stack = static_cast<char*>(std::malloc(kStackBytes));
      } else {
        thread.stack = free_stacks_.back();
        free_stacks_.pop_back();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(thread.stack, kStackBytes);  // its last frame never returned
#endif
      }
      thread.context.prepare(thread.stack, kStackBytes, &Scheduler::enter);
      make_ready(thread);
    }
    return block;
  }

  void end(Block& block) {
    for (Thread& thread : block.threads) {
      free_stacks_.push_back(thread.stack);
      late_.learn(thread.own);
    }
    late_.learn(block.met);
    bool all_ended = true;
    for (Block*& other : block.cluster->blocks) {
      if (other == &block) other = nullptr;
      all_ended = all_ended && other == nullptr;
    }
    if (all_ended) late_.learn(block.cluster->met);
    ::operator delete(block.shared, std::align_val_t(16));
  }

  static void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &main_bottom_, &main_bytes_);
#endif
    Thread& thread = *current;
    active->body_();
    if (thread.copies.size() > 1 || !thread.copies.front().empty()) {
      fail("a thread ended with asynchronous copies that it never waited for");
    }
    thread.done = true;
    ++thread.block->done;
    active->leave(thread, true);
  }

  void resume(Thread* thread) {
    current = thread;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, thread->stack, kStackBytes);
#endif
    main_.switch_to(thread->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    current = nullptr;
  }

  void leave(Thread& thread, bool forever) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(forever ? nullptr : &thread.fake_stack, main_bottom_,
                                   main_bytes_);
#endif
    thread.context.switch_to(main_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(thread.fake_stack, &main_bottom_, &main_bytes_);
#else
    (void)forever;
#endif
  }

  [[noreturn]] static void report_deadlock(const std::vector<std::unique_ptr<Block>>& running) {
    std::string message = "deadlock:";
    for (const auto& block : running) {
      for (const Thread& thread : block->threads) {
        message += "\n  block " + std::to_string(block->index.x) + ", thread " +
                   std::to_string(thread.rank) +
                   (thread.done ? " has ended"
                                : std::string(" waits at ") + thread.waits_for + " " +
                                      text(thread.waits_at));
        if (message.size() > 4000) fail(message);
      }
    }
    fail(message);
  }

  Index grid_, block_;
  unsigned cluster_blocks_;
  size_t shared_bytes_;
  const std::function<void()>& body_;
  Random random_;
  Order order_ = Order::kShuffled;
  Context main_;
  std::vector<Thread*> ready_;
  std::vector<char*> free_stacks_;
  std::deque<Cluster> clusters_;
  Knowledge late_;    // stores of blocks that have ended
  uint64_t now_ = 0;  // counts what has reached memory
  std::map<const void*, std::vector<std::pair<uint64_t, std::array<char, kStoreBytes>>>> past_;
  static inline const void* main_bottom_ = nullptr;
  static inline size_t main_bytes_ = 0;
};

Scheduler* Scheduler::active = nullptr;
Thread* Scheduler::current = nullptr;

}  // namespace

const Index& thread_index() { return Scheduler::current->index; }
const Index& block_index() { return Scheduler::current->block->index; }
unsigned char* shared_memory() { return Scheduler::current->block->shared; }
unsigned lane() { return Scheduler::current->rank % kWarp; }

void barrier(std::source_location where) {
  Block& block = *Scheduler::current->block;
  if (block.at_barrier++ == 0) {
    block.where = where;
  } else if (!same(block.where, where)) {
    fail("diverged barriers: " + text(block.where) + " and " + text(where));
  }
  if (block.at_barrier == block.threads.size()) {
    block.at_barrier = 0;
    for (Thread& thread : block.threads) {
      block.met.learn(thread.own);
      Scheduler::active->make_ready(thread);
    }
  }
  Scheduler::active->wait("the barrier", where);
}

void cluster_arrive() {
  Thread& thread = *Scheduler::current;
  Cluster& cluster = *thread.block->cluster;
  if (thread.arrived) fail("a thread arrives twice at the cluster's barrier");
  thread.arrived = true;
  thread.arrived_round = cluster.round;
  cluster.arriving.learn(thread.own);
  cluster.arriving.learn(thread.block->met);
  if (++cluster.arrived == cluster.threads) {
    cluster.met.learn(cluster.arriving);
    cluster.arrived = 0;
    ++cluster.round;
    for (Thread* waiting : cluster.waiting) Scheduler::active->make_ready(*waiting);
    cluster.waiting.clear();
  }
}

void cluster_wait() {
  Thread& thread = *Scheduler::current;
  Cluster& cluster = *thread.block->cluster;
  if (!thread.arrived) fail("a thread waits at the cluster's barrier before it has arrived");
  thread.arrived = false;
  if (thread.arrived_round == cluster.round) {
    cluster.waiting.push_back(&thread);
    Scheduler::active->wait("the cluster's barrier", std::source_location::current());
  } else {
    maybe_yield();
  }
}

const void* in_cluster(const void* shared, unsigned rank) {
  const Block& block = *Scheduler::current->block;
  if (rank >= block.cluster->blocks.size()) fail("a rank beyond the cluster");
  const Block* const other = block.cluster->blocks[rank];
  if (other == nullptr) fail("a block reads the shared memory of one that has ended");
  return other->shared + (static_cast<const unsigned char*>(shared) - block.shared);
}

void store(void* to, const void* from, size_t bytes) {
  Store store{static_cast<char*>(to), {}, bytes};
  std::memcpy(store.value.data(), from, bytes);
  Scheduler::current->own.stores.push_back(store);
  // Out of bounds is noticed now, as the sanitizer sees an access of its own.
  static_cast<volatile char*>(to)[bytes - 1];
}

void load(void* to, const void* from, size_t bytes) {
  const Thread& thread = *Scheduler::current;
  const uint64_t time =
      std::max({thread.own.fenced, thread.block->met.fenced, thread.block->cluster->met.fenced});
  Scheduler::active->remember(to, static_cast<const char*>(from), bytes, time);
}

void fence() {
  Thread& thread = *Scheduler::current;
  maybe_yield();
  Scheduler::active->publish(thread.block->cluster->met);
  Scheduler::active->publish(thread.block->met);
  Scheduler::active->publish(thread.own);
  thread.own.fenced = Scheduler::active->now();
  maybe_yield();
}

uint64_t exchange(unsigned mask, uint64_t bits, unsigned source_lane, std::source_location where) {
  Thread& thread = *Scheduler::current;
  Warp& warp = thread.block->warps[thread.rank / kWarp];
  const unsigned own = 1u << (thread.rank % kWarp);
  if ((mask & own) == 0) fail("a lane calls a shuffle whose mask leaves it out, " + text(where));
  if (source_lane >= kWarp || (mask >> source_lane & 1) == 0) {
    fail("a shuffle reads from a lane outside its mask, " + text(where));
  }
  if (warp.arrived == 0) {
    warp.expected = mask;
    warp.where = where;
  } else if (warp.expected != mask || !same(warp.where, where)) {
    fail("diverged shuffles: " + text(warp.where) + " and " + text(where));
  }
  warp.offered[thread.rank % kWarp] = bits;
  warp.arrived |= own;
  if (warp.arrived == mask) {
    std::memcpy(warp.published, warp.offered, sizeof warp.published);
    warp.arrived = 0;
    const unsigned first = thread.rank / kWarp * kWarp;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) Scheduler::active->make_ready(thread.block->threads[first + i]);
    }
  }
  Scheduler::active->wait("the shuffle", where);
  return warp.published[source_lane];
}

void maybe_yield() {
  if (Scheduler::active->random(4) == 0) return;
  Scheduler::active->make_ready(*Scheduler::current);
  Scheduler::active->wait("its turn", std::source_location::current());
}

void copy_async(void* to, const void* from, size_t bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("an asynchronous copy must have 4, 8 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    fail("a misaligned asynchronous copy");
  }
  std::memset(to, 0xff, bytes);
  Scheduler::current->copies.back().push_back({to, from, bytes});
}

void commit_copies() { Scheduler::current->copies.emplace_back(); }

void wait_for_copies(size_t groups_left) {
  auto& copies = Scheduler::current->copies;
  while (copies.size() > groups_left + 1) {
    for (const Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    copies.pop_front();
  }
}

void run(const Index& grid, const Index& block, unsigned cluster_blocks, size_t shared_bytes,
         const std::function<void()>& body) {
  ++launches;
  Scheduler scheduler(grid, block, cluster_blocks, shared_bytes, body);
  Scheduler::active = &scheduler;
  scheduler.run();
  Scheduler::active = nullptr;
  ++seed;
}

}  // namespace emulation
