// Encoding (spec 5.1).  One thread per row: the walk is serial, but thousands of rows walk at once.
//
// Naively (encode_rows, any dictionary): for each digit: go to the child; at a leaf, put its codeword and go to the root; where
// there is no child, put the node's codeword and take the digit again from root 1.
//
// count_rows_small and write_rows_small, for two trees of at most 8,192 nodes without leaves and codewords below 256:
//  1. One look-up per digit: transitions[node][digit] holds the next node and the codewords, none to two, that go out.
//  2. The transitions are in shared memory, and the digits come sixteen at a time.
//  3. Where rows are too few to fill the device, a thread walks one segment of a row.  It supposes that its segment begins at root
//     0, and walks again as long as the segment before it ends elsewhere than supposed.  After k rounds the first k
//     segments are right, whatever the digits; parses of sparse rows soon meet, so that three or four rounds do.
#include "common.cuh"

// The parse trees of one dictionary: children[node][digit] and codeword[node], -1 where there is none.
struct Trees {
  const int4* nodes;  // x, y, z: children for the digits 0, -, +; w: codeword
  int root[2];        // of state 0 and state 1
  int is_table;
};

constexpr int NO_PHRASE = 1, BAD_DIGIT = 2;

// Sixteen digits at a time out of a row of int8 digits -1, 0, 1; returns 0, 1 (-), 2 (+), 3 for anything else.
struct Digits {
  const signed char* at;
  bool aligned;
  u32 held;  // first column of `chunk` / 16
  uint4 chunk;
  __device__ __forceinline__ Digits(const signed char* p, int cols)
      : at(p), aligned((u64)p % 16 == 0 && cols % 16 == 0), held(~0u), chunk(make_uint4(0, 0, 0, 0)) {}
  __device__ __forceinline__ u32 operator[](u32 column) {
    int d;
    if (aligned) {
      if (column >> 4 != held) {
        held = column >> 4;
        chunk = *((const uint4*)at + held);
      }
      u32 w = column >> 2 & 3, v = w & 2 ? (w & 1 ? chunk.w : chunk.z) : (w & 1 ? chunk.y : chunk.x);
      d = (signed char)(v >> (8 * (column & 3)));
    } else {
      d = at[column];
    }
    return d == 0 ? 0 : d == -1 ? 1 : d == 1 ? 2 : 3;
  }
};

// Codewords to bytes, lowest bit first (spec 5.3); counts only when out is null.
struct Writer {
  u8* out;
  u32 bits, n, pending;
  __device__ __forceinline__ void put(u32 codeword) {
    if (out) {
      if (bits == 8) {
        *out++ = (u8)codeword;
      } else if (bits == 16) {
        *out++ = (u8)codeword;
        *out++ = (u8)(codeword >> 8);
      } else if (n & 1) {
        *out++ = (u8)(pending | codeword << 4);
        *out++ = (u8)(codeword >> 4);
      } else {
        *out++ = (u8)codeword;
        pending = codeword >> 8;
      }
    }
    n++;
  }
  __device__ __forceinline__ void finish() {
    if (out && bits == 12 && (n & 1)) *out = (u8)pending;
  }
};

__device__ int encode_aivf(const Trees& trees, Digits digits, u32 cols, Writer& writer) {
  int node = trees.root[0];
  bool on_root = true;
  for (u32 column = 0; column < cols; column++) {
    u32 digit = digits[column];
    if (digit > 2) return BAD_DIGIT;
    int4 here = __ldg(trees.nodes + node);
    int next = digit == 0 ? here.x : digit == 1 ? here.y : here.z;
    if (next < 0) {  // incomplete, and the digit is not 0
      writer.put(here.w);
      here = __ldg(trees.nodes + trees.root[1]);
      next = digit == 1 ? here.y : here.z;
    }
    here = __ldg(trees.nodes + next);
    on_root = here.w >= 0 && here.x < 0;
    if (on_root) {  // a leaf
      writer.put(here.w);
      next = trees.root[0];
    }
    node = next;
  }
  if (!on_root) {
    int4 here = __ldg(trees.nodes + node);
    while (here.w < 0) here = __ldg(trees.nodes + here.x);
    writer.put(here.w);
  }
  return 0;
}

__device__ int encode_table(const Trees& trees, Digits digits, u32 cols, Writer& writer) {
  u32 at = 0;
  while (at < cols) {
    int node = trees.root[0], codeword = -1;
    u32 length = 0, left = cols - at;
    for (u32 n = 1;; n++) {
      u32 digit = n <= left ? digits[at + n - 1] : 0;
      if (digit > 2) return BAD_DIGIT;
      int4 here = __ldg(trees.nodes + node);
      node = digit == 0 ? here.x : digit == 1 ? here.y : here.z;
      if (node < 0) break;
      int c = __ldg(&trees.nodes[node].w);
      if (c >= 0) {
        codeword = c;
        length = n;
        if (n >= left) break;  // of the phrases that reach the end, the shortest
      }
    }
    if (codeword < 0) return NO_PHRASE;
    writer.put(codeword);
    at += length;
  }
  return 0;
}

// Pass 1, codes null: counts[row] = number of codewords.  Pass 2: the bytes, at codes + row_byte[row].
// bad: the least row that cannot be encoded, times 4, plus why.
extern "C" __global__ void encode_rows(const signed char* digits, const int4* nodes, int root0, int root1, int is_table,
                                       int bits, u32* counts, u8* codes, const u64* row_byte, u64* bad, u64 rows,
                                       int cols) {
  u64 r = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (r >= rows) return;
  Trees trees{nodes, {root0, root1}, is_table};
  Writer writer{codes ? codes + row_byte[r] : nullptr, (u32)bits, 0, 0};
  Digits row(digits + r * (u64)cols, cols);
  int why = is_table ? encode_table(trees, row, cols, writer) : encode_aivf(trees, row, cols, writer);
  if (why) atomicMin(bad, r * 4 + why);
  if (codes) writer.finish();
  else counts[r] = why ? 0 : writer.n;
}

// transitions[node * 4 + (digit & 3)]: next node | (first codeword + 1) << 14 | (second codeword + 1) << 23, so the digits 0,
// +1 and -1 have the places 0, 1 and 3; place 2: the codeword that ends a row here, none for a root.  (No digit has place 2, but
// what is no digit may: it leads to a node, too.)
__device__ __forceinline__ void load_transitions(u32* table, const u32* transitions, int n_nodes) {
  for (int i = threadIdx.x; i < n_nodes; i += blockDim.x) ((uint4*)table)[i] = __ldg((const uint4*)transitions + i);
  __syncthreads();
}

// A walk along part of a row; WRITE: the codewords go to `out`, else they are counted only.
template <bool WRITE> struct Walk {
  const u32* table;
  u8* out;
  u32 node, n, wrong;

  // Without a branch but for the store: lanes put at different digits.
  __device__ __forceinline__ void put(u32 codeword_plus_1) {
    if (WRITE && codeword_plus_1) out[n] = (u8)(codeword_plus_1 - 1);
    n += codeword_plus_1 != 0;
  }
  __device__ __forceinline__ void take(u32 byte) {
    u32 t = table[node * 4 + (byte & 3)];
    put(t >> 14 & 0x1ff);
    put(t >> 23);
    node = t & 0x3fff;
  }
  __device__ __forceinline__ void take_one(signed char digit) {
    wrong |= (u8)(digit + 1) > 2;
    take((u32)digit);
  }
  __device__ __forceinline__ void columns(const signed char* row, u32 column, u32 end) {
    for (; column < end && (u64)(row + column) % 16; column++) take_one(row[column]);
    if (column + 16 <= end) {
      uint4 chunk = *(const uint4*)(row + column);
      for (; column + 16 <= end; column += 16) {
        u32 v[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
        if (column + 32 <= end) chunk = *(const uint4*)(row + column + 16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          u32 up = __vadd4(v[i], 0x01010101u);  // 0, 1, 2 for what is a digit
          wrong |= (up & 0xfcfcfcfcu) | (up & up >> 1 & 0x01010101u);
#pragma unroll
          for (int k = 0; k < 4; k++) take(v[i] >> (8 * k));
        }
      }
    }
    for (; column < end; column++) take_one(row[column]);
  }
  __device__ __forceinline__ void end_row() { put(table[node * 4 + 2] >> 14 & 0x1ff); }
};

// Pass 1.  `segments` divides blockDim; segments * segment >= cols.
// places[row * segments + s]: the node where segment s begins, and the codewords of the row before it.
extern "C" __global__ void count_rows_small(const signed char* digits, const u32* transitions, int n_nodes, u32* counts,
                                            uint2* places, u64* bad, u64 rows, int cols, int segments, int segment) {
  extern __shared__ __align__(16) u32 table[];
  load_transitions(table, transitions, n_nodes);
  u32* const shared = table + 4 * n_nodes;  // [blockDim]
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x, r = i / segments;
  const u32 s = (u32)(i - r * segments), last = segments - 1;
  const u64 begin = min((u64)s * segment, (u64)cols), end = min(begin + segment, (u64)cols);
  const signed char* row = digits + r * (u64)cols;
  Walk<false> walk{table, nullptr, 0, 0, 0};
  u32 start = 0;
  bool again = r < rows;
  do {
    if (again) {
      walk = Walk<false>{table, nullptr, start, 0, 0};
      walk.columns(row, (u32)begin, (u32)end);
    }
    shared[threadIdx.x] = walk.node;
    __syncthreads();
    const u32 truth = s ? shared[threadIdx.x - 1] : 0;
    again = r < rows && truth != start;
    start = truth;
  } while (__syncthreads_or(again));
  if (s == last) walk.end_row();
  shared[threadIdx.x] = walk.n;
  __syncthreads();
  if (r >= rows) return;
  u32 before = 0;
  for (u32 t = 0; t < s; t++) before += shared[threadIdx.x - s + t];
  places[i] = make_uint2(start, before);
  if (walk.wrong) atomicMin(bad, r * 4 + BAD_DIGIT);
  if (s == last) counts[r] = before + walk.n;
}

// Pass 2: the bytes, at codes + row_byte[row].
extern "C" __global__ void write_rows_small(const signed char* digits, const u32* transitions, int n_nodes,
                                            const uint2* places, u8* codes, const u64* row_byte, u64 rows, int cols,
                                            int segments, int segment) {
  extern __shared__ __align__(16) u32 table[];
  load_transitions(table, transitions, n_nodes);
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x, r = i / segments;
  if (r >= rows) return;
  const u32 s = (u32)(i - r * segments);
  const u64 begin = min((u64)s * segment, (u64)cols), end = min(begin + segment, (u64)cols);
  const uint2 place = places[i];
  Walk<true> walk{table, codes + row_byte[r] + place.y, place.x, 0, 0};
  walk.columns(digits + r * (u64)cols, (u32)begin, (u32)end);
  if (s == (u32)segments - 1) walk.end_row();
}
