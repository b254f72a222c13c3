// x of the tokens of large items, in the order in which tile_sm90.cu multiplies.
//
// An item of n tokens takes 8 * octets slots, octets = ceil(n / 8), beginning with slot item_first (route.cu), and its x begins at
// byte item_first * blocks * 128 of `out`, blocks = ceil(cols / 64).  For each block of 64 columns, for each of its steps s = 0..3
// and each half h = 0, 1 of a step, for each slot: eight 16-bit numbers; number 2 t + b is of the column
// 16 t + s + 8 h + 4 b of the block.  Slots without a token and columns beyond the row are 0.
#include "common.cuh"

// Grid: x the items at most, y shares of an item's blocks.  A thread takes 64 columns of one token.
extern "C" __global__ void __launch_bounds__(256) arrange_x(const u16* x, i64 x_stride, int cols, const int* n_items,
                                                            const int* item_first, const int* item_count,
                                                            const int* slot_token, u8* out) {
  if ((int)blockIdx.x >= *n_items) return;
  const int first = item_first[blockIdx.x], n = item_count[blockIdx.x], slots = (n + 7) / 8 * 8, blocks = (cols + 63) / 64;
  uint4* const to = (uint4*)(out + (u64)first * blocks * 128);
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < slots * blocks; i += gridDim.y * blockDim.x) {
    const int block = i / slots, slot = i - block * slots;
    const int token = slot < n ? slot_token[first + slot] : -1;
    const u16* from = x + token * x_stride + 64 * block;
    u32 v[32];  // two columns each
    if (token >= 0 && 64 * block + 64 <= cols && ((u64)from & 15) == 0) {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const uint4 four = __ldg((const uint4*)from + k);
        v[4 * k] = four.x, v[4 * k + 1] = four.y, v[4 * k + 2] = four.z, v[4 * k + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int k = 0; k < 32; k++) {
        const int column = 64 * block + 2 * k;
        const u32 low = token >= 0 && column < cols ? __ldg(from + 2 * k) : 0u;
        const u32 high = token >= 0 && column + 1 < cols ? __ldg(from + 2 * k + 1) : 0u;
        v[k] = low | high << 16;
      }
    }
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        u32 w[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
          const int column = 16 * t + s + 8 * h;
          w[t] = __byte_perm(v[column / 2], v[column / 2 + 2], column & 1 ? 0x7632 : 0x5410);
        }
        to[(block * 8 + 2 * s + h) * slots + slot] = make_uint4(w[0], w[1], w[2], w[3]);
      }
  }
}
