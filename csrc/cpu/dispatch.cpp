// Chooses among the builds of kernels.cpp, once per process.
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "cpu/kernels.h"

namespace gradcampp {

namespace baseline {
extern const CpuKernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kKernels;
}
namespace avx512 {
extern const CpuKernels kKernels;
}
#endif

namespace {

struct Choice {
  const CpuKernels* kernels = nullptr;
  std::string available;
  std::string error;
};

Choice choose() {
  Choice choice;
  const char* wanted = std::getenv("GRADCAMPP_EXT_CPU");
  const bool any = wanted == nullptr || *wanted == '\0';
  auto offer = [&](const CpuKernels& kernels) {
    if (!choice.available.empty()) choice.available += ", ";
    choice.available += kernels.name;
    if (choice.kernels == nullptr && (any || std::strcmp(wanted, kernels.name) == 0)) {
      choice.kernels = &kernels;
    }
  };
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    offer(avx512::kKernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    offer(avx2::kKernels);
  }
#endif
  offer(baseline::kKernels);
  if (choice.kernels == nullptr) {
    choice.error = "GRADCAMPP_EXT_CPU must name an instruction set that this machine has (" +
                   choice.available + "), got '" + wanted + "'";
  }
  return choice;
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const CpuKernels* cpu_kernels() { return chosen().kernels; }
const char* cpu_kernels_error() { return chosen().error.c_str(); }
const char* cpu_kernels_available() { return chosen().available.c_str(); }

void* allocate_workspace(size_t bytes) {
  return ::operator new(bytes, std::align_val_t(64), std::nothrow);
}
void free_workspace(void* workspace) { ::operator delete(workspace, std::align_val_t(64)); }

}  // namespace gradcampp
