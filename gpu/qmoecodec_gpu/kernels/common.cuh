// Types, conversions and the row reader that every kernel of this directory uses.  No CUDA header is included, so that
// NVRTC needs no toolkit installation.
//
// A group on the device (experts.py):
//   codes          rows of codewords, in one of two layouts (below)
//   expert_start   u64[experts + 1]          where each expert begins in codes, in bytes or words
//   row_start      u32[experts][rows + 1]    where each row begins, relative to its expert, in bytes or words
//   levels         pair[experts][rows]       low and high level
//   dictionary     u8[experts]
//   entries        uint2[dictionaries][2][2^b]   x: length | nonzeros << 8 | last nonzero << 16 | digits seen << 24
//                                            y: where the phrase's nonzeros begin in `nonzeros`
//   nonzeros       u16[]                     offset in the phrase | (digit is +) << 8
//   threshold      u32[dictionaries]
//
// Layout "bytes" (LANES = 0): the file's own (spec 5.3).
// Layout "words" (8-bit codewords only): a row is padded with codeword 0 to words of four codewords; blocks of
// LANES * WORDS words; in a block of n words, lane l holds a run of consecutive words (n / LANES, one more for the first
// n % LANES lanes), and word i of lane l stands at i * LANES + l.  So a warp's loads coalesce, and a lane has its run of
// codewords without shifting.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 FULL_WARP = 0xffffffffu;

// 16-bit floats: X_F16 = 0 bfloat16, 1 float16.
#ifndef X_F16
#define X_F16 0
#endif

__device__ __forceinline__ float half_to_float(u16 h, int is_f16) {
  if (!is_f16) return __uint_as_float((u32)h << 16);
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

__device__ __forceinline__ u16 float_to_half(float f, int is_f16) {
  u16 h;
  if (is_f16)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

// Levels as stored on the device: 0 pairs of bfloat16, 1 pairs of float16, 2 pairs of float32.
#ifndef LEVEL_KIND
#define LEVEL_KIND 0
#endif

struct Levels { float low, high; };

#if LEVEL_KIND == 2
typedef float2 LevelPair;
#else
typedef u32 LevelPair;
#endif

__device__ __forceinline__ Levels to_levels(LevelPair v) {
#if LEVEL_KIND == 2
  return Levels{v.x, v.y};
#else
  return Levels{half_to_float((u16)v, LEVEL_KIND), half_to_float((u16)(v >> 16), LEVEL_KIND)};
#endif
}

__device__ __forceinline__ Levels read_levels(const void* levels, u64 row) {
  return to_levels(__ldg((const LevelPair*)levels + row));
}

// The two 16-bit levels of a row, as bytes that a permutation selects from: digit d takes bytes d and 3 d.  low: zero, first bytes of the
// low and the high level, second byte of the low one; in byte 2 of `high` that of the high one.
struct LevelBytes {
  u32 low, high;
  __device__ __forceinline__ explicit LevelBytes(u32 pair)  // the low level in the lower half
      : low((pair << 8 & 0xff00u) | (pair & 0xff0000u) | (pair << 16 & 0xff000000u)), high(pair >> 8 & 0xff0000u) {}
};

// What a matvec does with a finished sum.
struct Epilogue {
  const float* scale;  // per token, or null
  int relu;
  __device__ __forceinline__ u16 operator()(float sum, int token) const {
    if (relu && sum < 0.f) sum = 0.f;  // a NaN stays one
    if (scale) sum *= scale[token];
    return float_to_half(sum, X_F16);
  }
};

// A kernel launched early (modules.py) runs beside the one before it until it waits.  Only then it lets the next one start,
// which so finds whatever was written before the previous kernel.  In an ordinary launch this does nothing.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What the kernels take for an expert's number: -1 drops the token, -2 is an expert that does not exist.
__device__ __forceinline__ int checked_expert(i64 e, int experts) { return e < -1 || e >= experts ? -2 : (int)e; }

// y of a token of no expert: -1 dropped, so 0; -2 an expert that does not exist, so NaN (in both 16-bit formats).
__device__ __forceinline__ void fill_unrouted(u16* y, int expert, int first, int end) {
  for (int r = first + threadIdx.x; r < end; r += blockDim.x) y[r] = expert == -1 ? 0 : 0x7fff;
}

// Where word w of a row of n words stands in the layout "words".
__device__ __forceinline__ u32 word_position(u32 w, u32 n, u32 lanes, u32 words) {
  u32 block = lanes * words, first = w / block * block;
  u32 here = min(n - first, block), q = here / lanes, more = here - q * lanes;
  u32 s = w - first, lane, i;
  if (s < more * (q + 1)) {
    lane = s / (q + 1);
    i = s - lane * (q + 1);
  } else {
    s -= more * (q + 1);
    lane = s / q;      // q > 0 here, as s was below `here`
    i = s - lane * q;
    lane += more;
  }
  return first + i * lanes + lane;
}

// One row of codewords in either layout.
struct Row {
  const u8* at;  // first byte
  u32 n_bytes, n_codewords, bits, lanes, words;

  __device__ __forceinline__ Row(const u8* codes, const u64* expert_start, const u32* row_start, u32 rows, u32 expert,
                                 u32 row, u32 bits_, u32 lanes_, u32 words_)
      : bits(bits_), lanes(lanes_), words(words_) {
    const u32* start = row_start + (u64)expert * (rows + 1) + row;
    u32 unit = lanes ? 4 : 1;
    n_bytes = (start[1] - start[0]) * unit;
    at = codes + (expert_start[expert] + start[0]) * unit;
    n_codewords = (u32)((u64)n_bytes * 8 / bits);
  }

  __device__ __forceinline__ u32 operator[](u32 k) const {
    if (bits == 8) {
      u32 byte = lanes ? word_position(k >> 2, n_bytes >> 2, lanes, words) * 4 + (k & 3) : k;
      return __ldg(at + byte);
    }
    if (bits == 16) return __ldg(at + 2 * (u64)k) | (u32)__ldg(at + 2 * (u64)k + 1) << 8;
    u64 bit = 12 * (u64)k;
    const u8* p = at + (bit >> 3);
    return ((__ldg(p) | (u32)__ldg(p + 1) << 8) >> (bit & 7)) & 0xfff;
  }
};

__device__ __forceinline__ u32 inclusive_scan(u32 v, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    u32 t = __shfl_up_sync(FULL_WARP, v, d);
    if (lane >= d) v += t;
  }
  return v;
}

// One step of a warp along a row: lane l takes codeword k + l.
struct Step {
  uint2 entry;   // of this lane's codeword
  u32 start;     // column where its phrase begins
  bool valid;    // there is such a codeword
};

// `carry` is the codeword before k (any below the threshold at the start of a row), `position` the column of codeword k;
// both move on by 32 codewords.
__device__ __forceinline__ Step take_step(const Row& row, u32 k, int lane, const uint2* entries, u32 threshold,
                                          u32& carry, u32& position) {
  Step step;
  u64 mine = (u64)k + lane;
  step.valid = mine < row.n_codewords;
  u32 code = step.valid ? row[(u32)mine] : 0;
  u32 before = __shfl_up_sync(FULL_WARP, code, 1);
  if (lane == 0) before = carry;
  bool second = mine > 0 && before >= threshold;
  step.entry = step.valid ? __ldg(entries + ((second ? 1u << row.bits : 0u) | code)) : make_uint2(0, 0);
  u32 length = step.entry.x & 0xff;
  u32 end = inclusive_scan(length, lane);
  step.start = position + end - length;
  position += __shfl_sync(FULL_WARP, end, 31);
  carry = __shfl_sync(FULL_WARP, code, 31);
  return step;
}
