// Which instruction sets this process may execute: the CPU has them AND the kernel saves their
// registers. cpuid alone is not enough: a virtual machine may report AVX-512 while the OS does
// not preserve zmm registers, and the first such instruction is then SIGILL.
//
// Names are those of /proc/cpuinfo, so a test can compare the two on Linux.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__) || defined(_M_IX86)
#define FASTDISTILL_X86 1
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastdistill {

using FeatureList = std::vector<std::pair<std::string, bool>>;

#ifdef FASTDISTILL_X86

struct CpuidLeaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zeros where the CPU has no such leaf, which reads as "feature absent".
inline CpuidLeaf cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidLeaf r;
#ifdef _MSC_VER
  int top[4], regs[4];
  __cpuid(top, 0);
  if (leaf > static_cast<uint32_t>(top[0])) return r;
  __cpuidex(regs, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = regs[0], r.ebx = regs[1], r.ecx = regs[2], r.edx = regs[3];
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// XCR0: the register files that the OS saves on a context switch. Legal only if OSXSAVE is set.
inline uint64_t saved_register_files() {
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  // Written out because the _xgetbv intrinsic would need the whole file built with -mxsave.
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
#endif
}

inline FeatureList cpu_features() {
  const CpuidLeaf base = cpuid(1, 0), ext = cpuid(7, 0), ext1 = cpuid(7, 1);
  const auto bit = [](uint32_t reg, int i) { return ((reg >> i) & 1u) != 0; };

  const bool osxsave = bit(base.ecx, 27);
  const uint64_t saved = osxsave ? saved_register_files() : 0;
  const bool ymm = (saved & 0x6) == 0x6;           // SSE, AVX
  const bool zmm = ymm && (saved & 0xE0) == 0xE0;  // opmask, upper zmm0-15, zmm16-31
  // Linux also wants `may_use_tiles` before the first tile is loaded.
  const bool tile = (saved & 0x60000) == 0x60000;

  return {
      {"avx", ymm && bit(base.ecx, 28)},
      {"f16c", ymm && bit(base.ecx, 29)},
      {"fma", ymm && bit(base.ecx, 12)},
      {"avx2", ymm && bit(ext.ebx, 5)},
      {"avx_vnni", ymm && bit(ext1.eax, 4)},
      {"avx512f", zmm && bit(ext.ebx, 16)},
      {"avx512dq", zmm && bit(ext.ebx, 17)},
      {"avx512bw", zmm && bit(ext.ebx, 30)},
      {"avx512vl", zmm && bit(ext.ebx, 31)},
      {"avx512vbmi", zmm && bit(ext.ecx, 1)},
      {"avx512_vnni", zmm && bit(ext.ecx, 11)},
      {"avx512_bf16", zmm && bit(ext1.eax, 5)},
      {"avx512_fp16", zmm && bit(ext.edx, 23)},
      {"amx_tile", tile && bit(ext.edx, 24)},
      {"amx_int8", tile && bit(ext.edx, 25)},
      {"amx_bf16", tile && bit(ext.edx, 22)},
  };
}

// Asks Linux once for the permission to use tiles, which all threads of the process then have.
// Windows grants it to all.
inline bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#elif defined(_WIN32)
  return true;
#else
  return false;
#endif
}

#elif defined(__aarch64__) || defined(_M_ARM64)

// Advanced SIMD is part of the base architecture; nothing finer is used yet, so nothing is probed.
inline FeatureList cpu_features() { return {{"neon", true}}; }
inline bool may_use_tiles() { return false; }

#else

inline FeatureList cpu_features() { return {}; }
inline bool may_use_tiles() { return false; }

#endif

}  // namespace fastdistill
