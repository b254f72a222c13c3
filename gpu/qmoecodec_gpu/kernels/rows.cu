// Kernels for any dictionary and any shape: validation, repacking, decoding, and the general matvec.  One warp per row.
#include "common.cuh"

// float to double whatever the compiler's options: CuPy asks for -ftz=true, and then a conversion in C makes subnormals 0.
__device__ __forceinline__ double widen(float f) {
  double d;
  asm("cvt.f64.f32 %0, %1;" : "=d"(d) : "f"(f));
  return d;
}

// ---- validation -----------------------------------------------------------------------------------------------------
// for each row: codewords used? each phrase begins inside the row? enough digits? overrun all 0? levels in order?
// The host has checked that every row lies inside `codes`.  bad: the least (expert * 3 + stage) * rows + row of what breaks a
// requirement, in the order of spec 9: an expert's levels (stage 0), its rows (1), its levels that are 0 (2); the host then
// runs the reference on that row for the reason.  words: least and greatest row length in words.
extern "C" __global__ void validate_rows(const u8* codes, const u64* expert_start, const u32* row_start,
                                         const u8* dictionary, const uint2* entries, const u32* threshold,
                                         const void* levels, int level_dtype, u64* bad, u32* words,
                                         int experts, int rows, int cols, int bits) {
  const int lane = threadIdx.x & 31;
  const u64 n_warps = (u64)gridDim.x * (blockDim.x >> 5), total = (u64)experts * rows;
  u32 least = ~0u, most = 0;
  for (u64 r = (u64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); r < total; r += n_warps) {
    u32 expert = (u32)(r / rows), in_expert = (u32)(r - (u64)expert * rows), d = dictionary[expert];
    Row row(codes, expert_start, row_start, rows, expert, in_expert, bits, 0, 0);
    const uint2* table = entries + ((u64)d << (bits + 1));
    u32 carry = 0, position = 0, seen = 0;
    bool wrong = false, wrong_level = false, wrong_zero = false;
    for (u32 k = 0; k < row.n_codewords && !wrong; k += 32) {
      Step step = take_step(row, k, lane, table, threshold[d], carry, position);
      u32 length = step.entry.x & 0xff, nonzeros = step.entry.x >> 8 & 0xff, last = step.entry.x >> 16 & 0xff;
      seen |= step.entry.x >> 24;
      bool mine = step.valid && (length == 0 || step.start >= (u32)cols ||
                                 (nonzeros && step.start + last >= (u32)cols));
      // Two steps of 2^13 digits each at most, so `position` cannot wrap before it is seen to be beyond the row.
      wrong = __any_sync(FULL_WARP, mine);
    }
    wrong |= position < (u32)cols;
    if (row.bits == 12 && (row.n_codewords & 1)) wrong |= (row.at[row.n_bytes - 1] >> 4) != 0;
    seen = __reduce_or_sync(FULL_WARP, seen);

    if (level_dtype >= 0) {  // 0 BF16, 1 F16, 2 F32, 3 F64
      double low, high;
      bool minus_zero;
      if (level_dtype == 3) {
        low = ((const double*)levels)[2 * r];
        high = ((const double*)levels)[2 * r + 1];
      } else if (level_dtype == 2) {
        low = widen(((const float*)levels)[2 * r]);
        high = widen(((const float*)levels)[2 * r + 1]);
      } else {
        low = widen(half_to_float(((const u16*)levels)[2 * r], level_dtype));
        high = widen(half_to_float(((const u16*)levels)[2 * r + 1], level_dtype));
      }
      minus_zero = (low == 0 && __double_as_longlong(low) < 0) || (high == 0 && __double_as_longlong(high) < 0);
      bool finite = isfinite(low) && isfinite(high);
      wrong_level = !finite || minus_zero || !(low < high || (low == 0 && high == 0));
      wrong_zero = (low == 0 && (seen & 1)) || (high == 0 && (seen & 2));
    }
    const int stage = wrong_level ? 0 : wrong ? 1 : wrong_zero ? 2 : 3;
    if (stage < 3 && lane == 0) atomicMin(bad, ((u64)expert * 3 + stage) * rows + in_expert);
    u32 n = (row.n_codewords + 3) / 4;
    least = min(least, n);
    most = max(most, n);
  }
  if (lane == 0 && least != ~0u) {
    atomicMin(words, least);
    atomicMax(words + 1, most);
  }
}

// ---- repacking ------------------------------------------------------------------------------------------------------
// for each row, for each word w: to[word_position(w)] = codewords 4w .. 4w+3 (0 beyond the row)
extern "C" __global__ void repack_rows(const u8* codes, const u64* expert_start, const u32* row_start, u32* to,
                                       const u64* to_expert, const u32* to_row, int experts, int rows, int lanes,
                                       int words) {
  const int lane = threadIdx.x & 31;
  const u64 n_warps = (u64)gridDim.x * (blockDim.x >> 5), total = (u64)experts * rows;
  for (u64 r = (u64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); r < total; r += n_warps) {
    u32 expert = (u32)(r / rows), in_expert = (u32)(r - (u64)expert * rows);
    Row row(codes, expert_start, row_start, rows, expert, in_expert, 8, 0, 0);
    const u32* start = to_row + (u64)expert * (rows + 1) + in_expert;
    u32* out = to + to_expert[expert] + start[0];
    u32 n = start[1] - start[0];
    for (u32 w = lane; w < n; w += 32) {
      u32 v = 0;
#pragma unroll
      for (u32 i = 0; i < 4; i++)
        if (4 * w + i < row.n_codewords) v |= row[4 * w + i] << (8 * i);
      out[word_position(w, n, lanes, words)] = v;
    }
  }
}

// ---- matvec, general ------------------------------------------------------------------------------------------------
// for each item (an expert and up to TOK tokens), for each row: position = 0; for each codeword: for each nonzero of its
// phrase: sum[level] += x[position + offset]; position += length.  y = low * sum[0] + high * sum[1]
// Lists null: one item of token 0, of expert `only_expert`, or of the expert whose number stands at `number`.
#ifndef TOK
#define TOK 1
#endif
extern "C" __global__ void matvec_general(const u8* codes, const u64* expert_start, const u32* row_start,
                                          const void* levels, const u8* dictionary, const uint2* entries,
                                          const u16* nonzeros, const u32* threshold, const int* n_items,
                                          const int* item_expert, const int* item_tokens, int only_expert,
                                          const i64* number, int n_experts, const u16* x, i64 x_stride, u16* y, i64 y_stride,
                                          const float* scale, int relu, int rows, int cols, int bits, int lanes, int words) {
  const int lane = threadIdx.x & 31;
  const Epilogue epilogue{scale, relu};
  const u64 n_warps = (u64)gridDim.x * (blockDim.x >> 5), total = (u64)(item_expert ? *n_items : 1) * rows;
  if (number) only_expert = checked_expert(*number, n_experts);
  for (u64 r = (u64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); r < total; r += n_warps) {
    u32 item = (u32)(r / rows), in_expert = (u32)(r - (u64)item * rows);
    int expert = item_expert ? item_expert[item] : only_expert;
    if (expert < 0) {  // a dropped token, or an expert that does not exist (route.cu)
      const int dropped = item_tokens ? item_tokens[(u64)item * TOK] : 0;
      if (lane == 0) y[dropped * y_stride + in_expert] = expert == -1 ? 0 : 0x7fff;
      continue;
    }
    u32 d = dictionary[expert], T = threshold[d];
    const uint2* table = entries + ((u64)d << (bits + 1));
    Row row(codes, expert_start, row_start, rows, expert, in_expert, bits, lanes, words);
    float sum[TOK][2];
    int token[TOK];
#pragma unroll
    for (int t = 0; t < TOK; t++) {
      sum[t][0] = sum[t][1] = 0.f;
      token[t] = item_tokens ? item_tokens[(u64)item * TOK + t] : 0;
    }
    u32 carry = 0, position = 0;
    for (u32 k = 0; k < row.n_codewords && position < (u32)cols; k += 32) {
      Step step = take_step(row, k, lane, table, T, carry, position);
      u32 n = step.entry.x >> 8 & 0xff;
      for (u32 z = 0; z < n; z++) {
        u32 v = __ldg(nonzeros + step.entry.y + z), column = step.start + (v & 0xff);
        if (column >= (u32)cols) break;  // padding codewords of the layout "words"
#pragma unroll
        for (int t = 0; t < TOK; t++) {
          float xv = token[t] >= 0 ? half_to_float(__ldg(x + token[t] * x_stride + column), X_F16) : 0.f;
          if (v >> 8) sum[t][1] += xv; else sum[t][0] += xv;
        }
      }
    }
    Levels level = read_levels(levels, (u64)expert * rows + in_expert);
#pragma unroll
    for (int t = 0; t < TOK; t++) {
      float v = level.low * sum[t][0] + level.high * sum[t][1];
#pragma unroll
      for (int s = 16; s; s >>= 1) v += __shfl_xor_sync(FULL_WARP, v, s);
      if (lane == 0 && token[t] >= 0) y[token[t] * y_stride + in_expert] = epilogue(v, token[t]);
    }
  }
}

// ---- decode ---------------------------------------------------------------------------------------------------------
// for each row: clear; for each codeword: for each nonzero of its phrase: out[position + offset] = level; position += length
//
// 1. A window of the row is cleared and filled in shared memory and leaves in 16-byte stores; scattered stores of two
//    bytes would cost a 32-byte sector each.
// 2. A step of 32 codewords may reach beyond the window: then the window leaves, moves on, and the same step goes on.
// OUT_BYTES 1: int8 digits -1, 0, +1.  2: the levels as 16-bit floats.
#ifndef OUT_BYTES
#define OUT_BYTES 1
#endif
#if OUT_BYTES == 1
typedef u8 Out;
#else
typedef u16 Out;
#endif
constexpr u32 WINDOW_BYTES = 4096, WINDOW = WINDOW_BYTES / OUT_BYTES;

extern "C" __global__ void decode_rows(const u8* codes, const u64* expert_start, const u32* row_start,
                                       const void* levels, const u8* dictionary, const uint2* entries,
                                       const u16* nonzeros, const u32* threshold, int first_expert, int n_experts,
                                       Out* out, int rows, int cols, int bits, int lanes, int words) {
  extern __shared__ __align__(16) u8 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Out* window = (Out*)(shared + warp * WINDOW_BYTES);
  const bool aligned = ((u64)cols * OUT_BYTES) % 16 == 0 && (u64)out % 16 == 0;
  const u64 n_warps = (u64)gridDim.x * (blockDim.x >> 5), total = (u64)n_experts * rows;
  for (u64 r = (u64)blockIdx.x * (blockDim.x >> 5) + warp; r < total; r += n_warps) {
    u32 item = (u32)(r / rows), in_expert = (u32)(r - (u64)item * rows);
    u32 expert = first_expert + item, d = dictionary[expert], T = threshold[d];
    const uint2* table = entries + ((u64)d << (bits + 1));
    Row row(codes, expert_start, row_start, rows, expert, in_expert, bits, lanes, words);
#if OUT_BYTES == 1
    const Out low = (Out)-1, high = 1;
#else
    Levels level = read_levels(levels, (u64)expert * rows + in_expert);
    const Out low = float_to_half(level.low, X_F16), high = float_to_half(level.high, X_F16);
#endif
    Out* to = out + r * cols;
    u32 first = 0, carry = 0, position = 0, k = 0;
    Step step;
    bool fresh = true;  // the step at k has not been taken
    while (first < (u32)cols) {
      for (u32 i = lane; i < WINDOW_BYTES / 16; i += 32) ((uint4*)window)[i] = make_uint4(0, 0, 0, 0);
      __syncwarp();
      while (true) {
        if (fresh) {
          if (k >= row.n_codewords) break;
          step = take_step(row, k, lane, table, T, carry, position);
          k += 32;
          fresh = false;
        }
        u32 n = step.entry.x >> 8 & 0xff;
        if (step.start < first + WINDOW)
          for (u32 z = 0; z < n; z++) {
            u32 v = __ldg(nonzeros + step.entry.y + z), column = step.start + (v & 0xff) - first;
            if (column < WINDOW) window[column] = v >> 8 ? high : low;  // a column of an earlier window wraps and is out too
          }
        if (position > first + WINDOW) break;  // the rest of this step belongs to the next window
        fresh = true;
        if (position == first + WINDOW) break;
      }
      __syncwarp();
      u32 n = min((u32)cols - first, WINDOW);
      if (aligned) {
        for (u32 i = lane; i < n * OUT_BYTES / 16; i += 32) ((uint4*)(to + first))[i] = ((uint4*)window)[i];
      } else {
        for (u32 i = lane; i < n; i += 32) to[first + i] = window[i];
      }
      __syncwarp();
      first += WINDOW;
    }
  }
}
