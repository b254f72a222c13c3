// Instructions of the decoder to two-bit digits.  The file that includes this has Entry, SHARED_BASE, LANES and DIGITS.
#pragma once

__device__ __forceinline__ Entry load_entry(u32 offset) {
  Entry e;
#if NZ > 3
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2+%3];" : "=r"(e.x), "=r"(e.y) : "r"(offset), "n"(SHARED_BASE));
#else
  asm volatile("ld.shared.u32 %0,[%1+%2];" : "=r"(e) : "r"(offset), "n"(SHARED_BASE));
#endif
  return e;
}

// One step of an inclusive scan over the lanes of a row.
__device__ __forceinline__ u32 scan_step(u32 v, int distance) {
  asm volatile("{.reg .pred p; .reg .u32 t; shfl.sync.up.b32 t|p, %0, %1, %2, 0xffffffff; @p add.u32 %0, %0, t;}"
               : "+r"(v) : "r"(distance), "n"((32 - LANES) << 8));
  return v;
}

// Or `value`, 0 or 1, to bit `at` of the digits.
__device__ __forceinline__ void put_bit(u32 at, u32 value) {
  asm volatile("red.shared.or.b32 [%0+%2],%1;" :: "r"(at >> 3 & ~3u), "r"(value << (at & 31)), "n"(DIGITS) : "memory");
}

// A nonzero at bit `at` of the digits, if there is one.
__device__ __forceinline__ void put_digit(u32 at, bool there) {
  asm volatile("{.reg .pred p; setp.ne.u32 p,%2,0; @p red.shared.or.b32 [%0+%3],%1;}"
               :: "r"(at >> 3 & ~3u), "r"(1u << (at & 31)), "r"((u32)there), "n"(DIGITS) : "memory");
}
