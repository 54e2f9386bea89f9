// Runs CUDA kernels on the host, for tests. Every thread of a block is a fiber; which one runs next
// is drawn from a seeded generator each time one waits, so that code that leaves out a barrier
// meets unfinished data. Several blocks are in flight at once. Everything that hardware leaves
// undefined and that can be seen is an error here: diverged barriers and shuffles, deadlocks,
// misaligned asynchronous copies, copies never waited for, too much shared memory.
//
// Shared memory is allocated to the byte, so that AddressSanitizer watches its ends, and begins as
// 0xff (NaN). It is freed when its block ends, so that a block of the same cluster that reads it
// later is noticed. An asynchronous copy arrives only when its thread waits for it; until then its
// destination holds 0xff.
//
// Stores and loads with the .cg qualifier (__stcg, __ldcg) are as late as CUDA's memory model
// allows: a store reaches memory at a fence of its thread, or of one that met it at a barrier in
// between; a load finds what memory held at the last fence of its thread, or of one that met it at
// a barrier since. Other stores and loads of device memory are immediate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace emulation {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

struct Device {
  int processors = 4;
  int shared_per_block = 64 * 1024;
  int shared_per_processor = 128 * 1024;
  bool clusters = false;
};

extern Device device;
extern int device_index;  // another one for another device
extern uint64_t seed;     // of the order in which threads and blocks run
extern int64_t launches;  // of kernels so far

// Of the running thread.
const Index& thread_index();
const Index& block_index();
unsigned char* shared_memory();

void barrier(std::source_location where);
void cluster_arrive();
void cluster_wait();
const void* in_cluster(const void* shared, unsigned rank);
void store(void* to, const void* from, size_t bytes);  // at most 8
void load(void* to, const void* from, size_t bytes);
void fence();
uint64_t exchange(unsigned mask, uint64_t bits, unsigned source_lane, std::source_location where);
void maybe_yield();
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(size_t groups_left);
unsigned lane();

// Runs body once for every thread of the grid, whose blocks come in clusters of cluster_blocks.
void run(const Index& grid, const Index& block, unsigned cluster_blocks, size_t shared_bytes,
         const std::function<void()>& body);

}  // namespace emulation
