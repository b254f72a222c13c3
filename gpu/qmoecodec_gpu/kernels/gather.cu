// Fused decode and matvec for 8-bit dictionaries: items of one expert and 1, 2, 4 or 8 tokens, layout "words" (common.cuh).
// This file holds what all token classes share and the kernel; gather_items.cuh is one class.
//
// Naively, for each item (expert, tokens) and each row:
//   position = 0; state = 0
//   for each codeword c:
//     for each (offset, sign) in nonzeros[state][c]: sum[sign] += x[position + offset]
//     position += length[state][c];  state = c >= T
//   y = low * sum[-] + high * sum[+]
//
// Optimisations:
//  1. LANES lanes share a row (a warp takes 32 / LANES rows); each holds a run of WORDS words of four codewords.  Loads
//     coalesce because the loader has laid the words out so.  The next row's words are on their way meanwhile.
//  2. The state follows from the codeword before alone: four predecessors are compared with T in one word (SIMD in a
//     register), and one shuffle brings the last codeword of the lane below.
//  3. A codeword's phrase is one entry: byte 0 its length, bytes 1.. its nonzeros' offsets and signs, all scaled so that
//     one dp4a makes an address.  The table stands in every bank once (64 KiB), so 32 look-ups never conflict.
//  4. One prefix scan per row and block gives every lane its column; after it a lane walks alone.
//  5. x in shared memory is SEGMENTED: lane l's part of a row stands mostly in bank l, so gathers seldom conflict.  A phrase
//     may run on beyond a lane's segment: `overlap` columns more are kept, and after each codeword the address wraps into the
//     next bank (add and unsigned min, one instruction on sm_90).  Rows too long for that keep the natural order.
//  6. One token: x in planes (x, 0), (0, x) and (0, 0), so a gather needs neither sign nor predicate: a missing nonzero
//     reads the zero plane.  Two gathered words times four lanes are a fragment of mma.m16n8k16, whose B holds ones: the
//     tensor core sums the eight lanes of four into the low and the high sum, in float32.
//  7. More tokens: one gather of 2 * TOK bytes, whatever the sign; mma gives the sums T = sum x and D = sum (+-) x, and
//     y = (high + low) / 2 * T + (high - low) / 2 * D.
//  8. A block takes a contiguous range of rows of all items, so it fills x and table once or twice.
//  9. One launch serves all token classes, one after the other: an empty launch costs a microsecond.
// 10. The kernel is launched before the one before it has ended (modules.py) and waits for it before it reads x, scale and items.
//     For one token and one dictionary, the table is in shared memory by then.
// 11. Addresses in shared memory are offsets plus a constant of the instruction (SHARED_BASE), and pointers of an item are
//     kept as they are used (`keep`): the compiler would add the base, or make the pointers anew, for every row.
//
// Trusts, checked by experts.py when the group is loaded: codewords valid (no phrase begins beyond the row, so no column
// beyond cols + 4 phrases is touched); every phrase <= overlap columns and <= NZ nonzeros; if ONE, every row <= one block;
// every row >= SURE * LANES words.  x must be finite: an infinity times a 0 of B is NaN.
#include "common.cuh"

#ifndef MAX_TOK
#define MAX_TOK 1    // the largest token class: 1, 2, 4 or 8
#endif
#ifndef NZ
#define NZ 2         // nonzeros per phrase at most
#endif
#ifndef LANES
#define LANES 32     // per row
#endif
#ifndef WORDS
#define WORDS 5      // per lane and block
#endif
#ifndef SURE
#define SURE 0       // words that every lane has in every block
#endif
#ifndef USUAL
#define USUAL 4      // words looked at without asking whether any lane has so many
#endif
#ifndef ONE
#define ONE 0        // every row fits one block
#endif
#ifndef SEGMENTED_CLASSES
#define SEGMENTED_CLASSES 15  // bit c: class c (1 << c tokens) has x in segmented order
#endif
#ifndef THREADS
#define THREADS 1024
#endif
#ifndef SHARED_BASE
#define SHARED_BASE 1024  // where dynamic shared memory begins (probe.cu)
#endif

constexpr int CODES = 4 * WORDS, ROWS_PER_WARP = 32 / LANES, WARPS = THREADS / 32, BLOCK = LANES * WORDS;

#include "entries.cuh"
constexpr u32 COPIES = 128 / ENTRY_BYTES;
constexpr u32 TABLE_BYTES = 512 * ENTRY_BYTES * COPIES;  // 256 codewords x 2 states

__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if X_F16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

constexpr u32 ONE_LOW = X_F16 ? 0x3c00u : 0x3f80u, ONE_HIGH = ONE_LOW << 16;

// Make the compiler keep a value in a register instead of computing it anew from what it came from.
template <class T> __device__ __forceinline__ void keep(T*& p) { asm volatile("" : "+l"(p)); }
__device__ __forceinline__ void keep(u32& v) { asm volatile("" : "+r"(v)); }

// Words at an offset from a constant place of shared memory.  They are volatile so that no load passes a barrier.
template <u32 BASE> __device__ __forceinline__ u32 load1(u32 offset) {
  u32 v;
  asm volatile("ld.shared.u32 %0,[%1+%2];" : "=r"(v) : "r"(offset), "n"(BASE));
  return v;
}
template <u32 BASE> __device__ __forceinline__ uint2 load2(u32 offset) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2+%3];" : "=r"(v.x), "=r"(v.y) : "r"(offset), "n"(BASE));
  return v;
}
template <u32 BASE> __device__ __forceinline__ uint4 load4(u32 offset) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4+%5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(offset), "n"(BASE));
  return v;
}
// 0 unless `flag` is 0; a predicated load, so nothing is read where nothing is there.
template <u32 BASE> __device__ __forceinline__ u32 load_unless(u32 offset, u32 flag) {
  u32 v;
  asm volatile("{.reg .pred p; setp.eq.u32 p,%2,0; mov.u32 %0,0; @p ld.shared.u32 %0,[%1+%3];}"
               : "=&r"(v) : "r"(offset), "r"(flag), "n"(BASE));
  return v;
}
__device__ __forceinline__ Entry load_entry(u32 offset) {
#if NZ > 3
  return load2<SHARED_BASE>(offset);
#else
  return load1<SHARED_BASE>(offset);
#endif
}

// One step of an inclusive scan over the lanes of a row.
__device__ __forceinline__ u32 scan_step(u32 v, int distance) {
  asm volatile("{.reg .pred p; .reg .u32 t; shfl.sync.up.b32 t|p, %0, %1, %2, 0xffffffff; @p add.u32 %0, %0, t;}"
               : "+r"(v) : "r"(distance), "n"((32 - LANES) << 8));
  return v;
}

// The table with the entries of one dictionary, each COPIES times.  All its loads are on their way before the first store,
// and x's before that: one latency instead of two.
struct TableFill {
  static constexpr int PER_ENTRY = ENTRY_BYTES * COPIES / 16, TOTAL = 512 * PER_ENTRY, EACH = (TOTAL + THREADS - 1) / THREADS;
  Entry entry[EACH];
  __device__ __forceinline__ void load(const Entry* table) {
#pragma unroll
    for (int k = 0; k < EACH; k++) entry[k] = __ldg(table + min(k * THREADS + (int)threadIdx.x, TOTAL - 1) / PER_ENTRY);
  }
  __device__ __forceinline__ void store(u8* shared) const {
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      int i = k * THREADS + threadIdx.x;
      const Entry e = entry[k];
#if NZ > 3
      if (i < TOTAL) ((uint4*)shared)[i] = make_uint4(e.x, e.y, e.x, e.y);
#else
      if (i < TOTAL) ((uint4*)shared)[i] = make_uint4(e, e, e, e);
#endif
    }
  }
};

// Where one token's y goes (null: no such token), kept in shared memory behind the zeros.
struct Output { u16* y; float factor; };

// What a class needs to know about x in shared memory (plan.py).
struct Geometry {
  int segment, overlap, natural_columns;
  u32 magic;
};

// A group and the vectors.
struct Work {
  const u32* codes;
  const u64* expert_start;
  const u32* row_start;
  const void* levels;
  const u8* dictionary;
  const u32* threshold;
  int n_dictionaries;
  const u16* x;
  i64 x_stride;
  u16* y;
  i64 y_stride;
  const float* scale;
  int relu, rows, cols;
};

// The items of one class.  expert null: one item, of expert `only_expert` and token 0.
struct Items {
  const int* n;
  const int* expert;
  const int* tokens;
  int only_expert;
};

#if MAX_TOK >= 1
#define TOK 1
#define SEGMENTED (SEGMENTED_CLASSES >> 0 & 1)
namespace tokens_1 {
#include "gather_items.cuh"
}
#undef SEGMENTED
#undef TOK
#endif

#if MAX_TOK >= 2
#define TOK 2
#define SEGMENTED (SEGMENTED_CLASSES >> 1 & 1)
namespace tokens_2 {
#include "gather_items.cuh"
}
#undef SEGMENTED
#undef TOK
#endif

#if MAX_TOK >= 4
#define TOK 4
#define SEGMENTED (SEGMENTED_CLASSES >> 2 & 1)
namespace tokens_4 {
#include "gather_items.cuh"
}
#undef SEGMENTED
#undef TOK
#endif

#if MAX_TOK >= 8
#define TOK 8
#define SEGMENTED (SEGMENTED_CLASSES >> 3 & 1)
namespace tokens_8 {
#include "gather_items.cuh"
}
#undef SEGMENTED
#undef TOK
#endif

// Lists as route.cu makes them, n_tokens apart; or null (Items), and then the expert's number stands at `number`, unless
// that is null too.  many_tables: for the classes of more than one token.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
matvec_gather(const u32* codes, const u64* expert_start, const u32* row_start, const void* levels, const u8* dictionary,
              const u32* threshold, int n_dictionaries, const u16* x, i64 x_stride, u16* y, i64 y_stride,
              const float* scale, int relu, int rows, int cols, const Entry* tables, const Entry* many_tables,
              const int* n_items, const int* item_expert, const int* item_tokens, int only_expert, const i64* number,
              int n_experts, i64 n_tokens, int segment_1, int overlap_1, int natural_1, u32 magic_1, int segment_2,
              int overlap_2, int natural_2, u32 magic_2, int segment_4, int overlap_4, int natural_4, u32 magic_4,
              int segment_8, int overlap_8, int natural_8, u32 magic_8) {
  extern __shared__ __align__(128) u8 shared[];
  if ((u32)__cvta_generic_to_shared(shared) != SHARED_BASE) __trap();
  const Work work{codes, expert_start, row_start, levels, dictionary, threshold, n_dictionaries,
                  x, x_stride, y, y_stride, scale, relu, rows, cols};
  int filled = -1;
#if MAX_TOK == 1 && __CUDA_ARCH__ >= 900
  if (n_dictionaries == 1) {  // while the kernel before ends; tables do not change
    TableFill table;
    table.load(tables);
    table.store(shared);
    filled = 0;
  }
#endif
  wait_for_previous();
  if (number) only_expert = checked_expert(*number, n_experts);
  tokens_1::gather_items(work, Items{n_items, item_expert, item_tokens, only_expert},
                         Geometry{segment_1, overlap_1, natural_1, magic_1}, tables, filled);
  filled = -1;
#if MAX_TOK >= 2
  tokens_2::gather_items(work, Items{n_items + 1, item_expert + n_tokens, item_tokens + 8 * n_tokens, 0},
                         Geometry{segment_2, overlap_2, natural_2, magic_2}, many_tables, filled);
#endif
#if MAX_TOK >= 4
  tokens_4::gather_items(work, Items{n_items + 2, item_expert + 2 * n_tokens, item_tokens + 16 * n_tokens, 0},
                         Geometry{segment_4, overlap_4, natural_4, magic_4}, many_tables, filled);
#endif
#if MAX_TOK >= 8
  tokens_8::gather_items(work, Items{n_items + 3, item_expert + 3 * n_tokens, item_tokens + 24 * n_tokens, 0},
                         Geometry{segment_8, overlap_8, natural_8, magic_8}, many_tables, filled);
#endif
}
