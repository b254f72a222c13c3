// Fused decode and matrix product for 8-bit dictionaries and items of up to 64 tokens, layout "words" (common.cuh), on any
// architecture from sm_80.
//
// Naively, for each item (expert, tokens) and each tile of TILE rows:
//   digits[row][column] = 0; for each codeword of each row: for each (offset, sign) of its phrase: digits[row][..] = sign
//   y[token][row] = sum over columns of level[row][digits[row][column]] * x[token][column]
//
// Optimisations:
//  1. A tile of rows is decoded once, whole, into shared memory with two bits per digit, so x is read once per TILE rows.
//  2. Tensor cores multiply.  The order of columns within a sum is free, so a lane takes 16 consecutive columns of each 64: two
//     16-byte loads of x and one word of digits make the fragments of four mma.m16n8k16.
//  3. Digits lie in a word so that those of one mma are at every eighth bit: shift and mask spread them, one multiplication
//     makes byte selectors of them, and __byte_perm selects 0, the low or the high level: two bfloat16 at once.
//  4. Warps share the columns out among them and add up in shared memory at the end.
//
// Trusts what gather.cu trusts, and: x rows on 16-byte boundaries, cols a multiple of 8, levels of x's type.
#include "common.cuh"

#ifndef NZ
#define NZ 2
#endif
#ifndef LANES
#define LANES 32
#endif
#ifndef WORDS
#define WORDS 5
#endif
#ifndef GROUPS
#define GROUPS 4  // warps along the rows: 32 rows each
#endif

constexpr int THREADS = 512, WARPS = THREADS / 32, TILE = 32 * GROUPS, TOKENS = 64;
constexpr int ROWS_PER_WARP = 32 / LANES, BLOCK = LANES * WORDS;
#include "entries.cuh"
constexpr int COPIES = 8;
constexpr u32 TABLE_BYTES = 512 * COPIES * ENTRY_BYTES;

__device__ __forceinline__ void mma(float* c, const u32* a, u32 b0, u32 b1) {
#if X_F16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Decode one warp's rows of the tile: row `row` of the expert to digits + (row - first) * pitch.
__device__ __forceinline__ void decode_rows_of_tile(const u32* words_of, const u32* starts, const Entry* table, u32 T,
                                                    u32* digits, int pitch, int first, int row, int rows, int cols,
                                                    int lane) {
  const int j = lane % LANES, r = min(row, rows - 1);
  u32 at = __ldg(starts + r), left = row < rows ? __ldg(starts + r + 1) - at : 0;
  u32* const out = digits + (row - first) * pitch;
  u32 column0 = 0, carry = 0;
  while (__any_sync(FULL_WARP, left > 0)) {
    const u32 here = min(left, (u32)BLOCK);
    const int mine = (here + LANES - 1 - j) / LANES;
    u32 w[WORDS], last_word = 0;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      w[i] = i < mine ? __ldg(words_of + at + i * LANES + j) : 0u;
      last_word = i < mine ? w[i] : last_word;
    }
    u32 before = __shfl_up_sync(FULL_WARP, last_word, 1, LANES);
    if (j == 0) before = carry;
    Entry entry[4 * WORDS];
    u32 length = 0;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      u32 previous = __funnelshift_l(i ? w[i - 1] : before, w[i], 8);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        u32 code = w[i] >> (8 * k) & 0xff, second = (previous >> (8 * k) & 0xff) >= T;
        Entry e = table[(code * 2 + second) * COPIES + lane % COPIES];
#if NZ > 3
        if (i >= mine) e = make_uint2(0x02020200u, 0x02020202u);
#else
        if (i >= mine) e = 0x02020200u;
#endif
        entry[4 * i + k] = e;
        length += entry_word(e, 0) & 0xff;
      }
    }
    u32 end = length;
#pragma unroll
    for (int s = 1; s < LANES; s <<= 1) {
      u32 t = __shfl_up_sync(FULL_WARP, end, s, LANES);
      if (j >= s) end += t;
    }
    u32 column = (column0 + end - length) / 4;  // entries count in quarters (tables.py)
    column0 += __shfl_sync(FULL_WARP, end, LANES - 1, LANES);
    carry = __shfl_sync(FULL_WARP, last_word, LANES - 1, LANES);
#pragma unroll
    for (int k = 0; k < 4 * WORDS; k++) {
#pragma unroll
      for (int z = 1; z <= NZ; z++) {
        const int shift = 8 * (z & 3);
        u32 word = entry_word(entry[k], z), c = column + (word >> (shift + 2) & 63);
        u32 value = (2 - (word >> shift & 1)) << ((c & 3) * 8 + (c >> 1 & 6));
        if (!(word >> shift & 2) && c < (u32)cols)  // padding codewords stand beyond the row
          atomicOr((u32*)((u8*)out + (c >> 2 & ~3u)), value);
      }
      column += entry_word(entry[k], 0) >> 2 & 63;
    }
    left -= here;
    at += here;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
matmul_tile(const u32* codes, const u64* expert_start, const u32* row_start, const u32* levels, const u8* dictionary,
            const u32* threshold, const u16* x, i64 x_stride, u16* y, i64 y_stride, const float* scale, int relu,
            int rows, int cols, const Entry* tables, const int* n_items, const int* item_expert, const int* item_first,
            const int* item_count, const int* slot_token, int pitch) {
  extern __shared__ __align__(128) u8 shared[];
  Entry* const table = (Entry*)shared;
  u32* const digits = (u32*)(shared + TABLE_BYTES);
  float* const partial = (float*)digits;  // [slices][TOKENS][TILE], when the digits are done with
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int band = warp % GROUPS;
  const int tiles = (rows + TILE - 1) / TILE, blocks = (cols + 63) / 64;
  const u32 total = (u32)tiles * *n_items;
  int filled = -1;

  for (u32 unit = blockIdx.x; unit < total; unit += gridDim.x) {
    const u32 item = unit / tiles;
    const int first = (int)(unit - item * tiles) * TILE;
    const int expert = item_expert[item], d = dictionary[expert];
    const int* tokens = slot_token + item_first[item];
    const int count = item_count[item], n_tokens = (count + 7) / 8 * 8;
    const u32 T = threshold[d];
    __syncthreads();  // the last tile's readers are done
    if (d != filled)
      for (int i = threadIdx.x; i < 512 * COPIES; i += THREADS) table[i] = __ldg(tables + 512 * d + i / COPIES);
    filled = d;
    for (int i = threadIdx.x; i < TILE * pitch / 4; i += THREADS) ((uint4*)digits)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for (int row = first + warp * ROWS_PER_WARP + lane / LANES; __any_sync(FULL_WARP, row < min(rows, first + TILE));
         row += WARPS * ROWS_PER_WARP)
      decode_rows_of_tile(codes + expert_start[expert], row_start + (u64)expert * (rows + 1), table, T, digits, pitch,
                          first, row < first + TILE ? row : rows, rows, cols, lane);
    __syncthreads();

    // Rows of this lane: two of each of the band's two mma tiles; their levels as the two sources of __byte_perm.
    u32 low[4], high[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int row = first + band * 32 + i * 8 + g;
      u32 pair = row < rows ? __ldg(levels + (u64)expert * rows + row) : 0u;
      low[i] = pair << 16;  // bytes 0 and 1 zero, 2 and 3 the low level
      high[i] = pair >> 16;  // bytes 4 and 5
    }
    // More than 32 tokens are shared out to two warps, and the columns to half as many.
    const int halves = n_tokens > 32 ? 2 : 1, half = warp / GROUPS % halves, slices = WARPS / GROUPS / halves;
    const int slice = warp / (GROUPS * halves);
    const u16* x_of[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      int place = 8 * (4 * half + n) + g, token = place < count ? tokens[place] : -1;
      x_of[n] = token >= 0 ? x + token * x_stride + 16 * t : nullptr;
    }
    const int octets = min(4, n_tokens / 8 - 4 * half);
    float sum[2][4][4] = {};
    const u32* const lane_digits = digits + (band * 32 + g) * pitch + t;
    for (int block = slice; block < blocks; block += slices) {
      const int column = 64 * block + 16 * t;
      uint4 b[4][2];  // all loads of a block are on their way together
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          b[n][h] = make_uint4(0, 0, 0, 0);
          if (x_of[n] && column + 8 * h < cols) b[n][h] = __ldg((const uint4*)(x_of[n] + 64 * block + 8 * h));
        }
      u32 word[4];
#pragma unroll
      for (int i = 0; i < 4; i++) word[i] = lane_digits[i * 8 * pitch + 4 * block];
#pragma unroll
      for (int s = 0; s < 4; s++) {
        u32 a[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          u32 select = (word[i] >> (2 * s) & 0x03030303u) * 0x22u + 0x10101010u;
          a[i >> 1][i & 1] = __byte_perm(low[i], high[i], select);
          a[i >> 1][2 + (i & 1)] = __byte_perm(low[i], high[i], select >> 16);
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
          if (n >= octets) break;
          const uint4 v = b[n][s >> 1];
#pragma unroll
          for (int m = 0; m < 2; m++) mma(sum[m][n], a[m], s & 1 ? v.z : v.x, s & 1 ? v.w : v.y);
        }
      }
    }
    __syncthreads();  // all digits are read
#pragma unroll
    for (int n = 0; n < 4; n++) {
      if (n >= octets) break;
      const int token = 8 * (4 * half + n) + 2 * t;
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          partial[(slice * TOKENS + token + (k & 1)) * TILE + band * 32 + m * 16 + g + 8 * (k >> 1)] = sum[m][n][k];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * TILE; i += THREADS) {
      int n = i / TILE, row = first + i % TILE, token = tokens[n];
      if (row >= rows) continue;
      float v = 0.f;
      for (int s = 0; s < slices; s++) v += partial[(s * TOKENS + n) * TILE + i % TILE];
      y[token * y_stride + row] = Epilogue{scale, relu}(v, token);
    }
  }
}
