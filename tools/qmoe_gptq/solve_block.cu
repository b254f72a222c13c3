// One block of columns of the solver (gptq.py, `_solve_block`) for every expert and row, in one launch. Each thread has a row.
//
//   for each column c:
//     ratio = w[c] / (its low or high edge)              margin
//     error = (w[c] - what its digit stands for) / U[c][c]
//     w[d] -= U[c][d] * error, for the columns d behind it
//
// The columns stand in registers, WIDTH at a time. Before their turn they take in the errors of all columns before them, one
// after the other: each weight sees the same subtractions in the same order as in the loop above, so every result has the same
// bits. Compile with --fmad=false, as a fused product and difference would round once where the loop rounds twice.
//
// Arrays are float32 [experts, columns, rows], rows adjacent, with the distances from one expert and one column to the next;
// upper is [experts, columns, columns]; lo and hi are [experts, rows].
// Grid: (rows / blockDim.x rounded up, experts). Shared memory: WIDTH * WIDTH floats.

typedef long long i64;

constexpr int WIDTH = 32;

// tile[j][k] = U[first_row + j][first_column + k], 0 beyond the end; between barriers, as all threads read it.
static __device__ __forceinline__ void load_tile(float* tile, const float* upper, i64 row_step, i64 column_step, int first_row,
                                                 int first_column, int columns) {
  __syncthreads();
  for (int i = threadIdx.x; i < WIDTH * WIDTH; i += blockDim.x) {
    const int j = first_row + i / WIDTH, k = first_column + i % WIDTH;
    tile[i] = j < columns && k < columns ? upper[j * row_step + k * column_step] : 0.0f;
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(128)
    solve_block(const float* w, i64 w_expert, i64 w_column, const float* upper, i64 upper_expert, i64 upper_row,
                i64 upper_column, const float* lo, const float* hi, const float* low_edge, i64 low_expert, i64 low_column,
                const float* high_edge, i64 high_expert, i64 high_column, float* margin, i64 margin_expert,
                i64 margin_column, float* errors, int columns, int rows) {
  extern __shared__ __align__(16) unsigned char shared[];
  float* tile = (float*)shared;
  const i64 expert = blockIdx.y;
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  const bool there = row < rows;  // the others come along for the barriers
  const i64 at = there ? row : 0;
  w += expert * w_expert + at;
  upper += expert * upper_expert;
  low_edge += expert * low_expert + at;
  high_edge += expert * high_expert + at;
  margin += expert * margin_expert + at;
  errors += expert * columns * rows + at;
  const float minus = lo[expert * rows + at], plus = hi[expert * rows + at];

  for (int first = 0; first < columns; first += WIDTH) {
    float value[WIDTH];
#pragma unroll
    for (int k = 0; k < WIDTH; k++) value[k] = first + k < columns ? w[(first + k) * w_column] : 0.0f;

    for (int before = 0; before < first; before += WIDTH) {
      load_tile(tile, upper, upper_row, upper_column, before, first, columns);
      if (!there) continue;
#pragma unroll 4
      for (int j = 0; j < WIDTH; j++) {
        const float error = errors[(i64)(before + j) * rows];
#pragma unroll
        for (int k = 0; k < WIDTH; k++) value[k] -= tile[j * WIDTH + k] * error;
      }
    }

    load_tile(tile, upper, upper_row, upper_column, first, first, columns);
    if (!there) continue;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
      const i64 c = first + k;
      if (c >= columns) break;
      const float ratio = value[k] / (value[k] < 0.0f ? low_edge[c * low_column] : high_edge[c * high_column]);
      const float error = (value[k] - (ratio > 1.0f ? plus : ratio < -1.0f ? minus : 0.0f)) / tile[k * WIDTH + k];
      margin[c * margin_column] = ratio;
      errors[c * rows] = error;
#pragma unroll
      for (int l = k + 1; l < WIDTH; l++) value[l] -= tile[k * WIDTH + l] * error;
    }
  }
}
