// Products of large items with experts that decode_digits.cu has decoded to two-bit digits, on Hopper (sm_90a).
//
// Naively, for each item (expert, tokens), each token and each row:
//   y[token][row] = sum over columns of level[row][digit[row][column]] * x[token][column]
//
// Optimisations:
//  1. wgmma multiplies: weights from registers, x from shared memory.  The order of columns within a sum is free, so a lane's
//     word of 16 digits makes its fragments of four steps: digits of one step stand at every eighth bit, shift and mask spread
//     them, one multiplication makes byte selectors of them, and prmt selects 0, the low or the high level: two 16-bit
//     numbers at once.  arrange.cu has put x into the same order, in the blocks that wgmma reads.
//  2. A warp of its own orders stages of 64 columns, digits of up to GROUPS row groups and x of all the item's tokens, by bulk
//     copies into a ring that is as deep as shared memory allows.  Each warpgroup takes a group of 64 rows, so x passes the L2
//     cache once for 64 * GROUPS rows; up to 128 tokens share the making of a fragment.
//  3. Nothing waits for a whole block: warpgroups store their sums from registers and go on.  Another warp has brought what they
//     need of the next rows and tokens into shared memory by then.
//  4. All row groups of all items are dealt out evenly: chunks of GROUPS groups in turn, so that neighbours read the same x at the
//     same time, and what does not make a whole turn in smaller chunks.  There warpgroups without rows of their own share the
//     columns of others', and their sums are added up in shared memory (SHARE).
//
// Trusts: levels of x's type, finite; x finite.
#include "common.cuh"
#include "hopper.cuh"

#ifndef GROUPS
#define GROUPS 4       // of 64 rows, one for each warpgroup
#endif
#ifndef SLOTS
#define SLOTS 11       // stages that the ring holds
#endif
#ifndef SHARE
#define SHARE 0        // warpgroups without rows of their own share the columns of others'
#endif
#ifndef SHARED_BASE
#define SHARED_BASE 1024
#endif

constexpr int MAX_TOKENS = 128, WARPS = 4 * GROUPS, THREADS = 32 * WARPS + 128;
// Registers per thread: the block gets THREADS times ENTRY; the warpgroup that orders keeps FEW, the others share the rest.
#ifdef ENTRY
#define BOUNDS __maxnreg__(ENTRY)
#else
#define BOUNDS __launch_bounds__(THREADS, 1)
#define ENTRY (65536 / THREADS / 8 * 8)
#endif
constexpr int FEW = 32, MANY = (THREADS * ENTRY - 128 * FEW) / (128 * GROUPS) / 8 * 8;
constexpr u32 X_BYTES = 128 * MAX_TOKENS, SLOT_BYTES = X_BYTES + 1024 * GROUPS;  // of a stage: x, digits
constexpr u32 BARRIERS = SHARED_BASE + SLOTS * SLOT_BYTES, EMPTY = 8 * SLOTS;    // full ones, EMPTY further empty ones

// What the warpgroups need of a chunk, twice: levels of its rows, tokens (-1 for none) and their scales, and the number of tokens.
constexpr u32 CHUNK_BARRIERS = BARRIERS + 2 * EMPTY, CHUNK_EMPTY = 16, CHUNKS = (CHUNK_BARRIERS + 32 + 15) / 16 * 16;
constexpr u32 LEVELS = 0, TOKENS_AT = 256 * GROUPS, SCALES = TOKENS_AT + 4 * MAX_TOKENS, COUNT = SCALES + 4 * MAX_TOKENS;
constexpr u32 CHUNK_BYTES = COUNT + 16;
static_assert(!SHARE || SLOTS > GROUPS + 1, "a stage is kept until the warpgroup's next one is there");
constexpr u32 SUMS = CHUNKS + 2 * CHUNK_BYTES, SUMS_BYTES = SHARE ? 256 * MAX_TOKENS : 0;  // of one warpgroup, to be added

extern __shared__ __align__(128) u8 shared[];  // ring, barriers, chunks, sums

// A place in the ring; all warps go round it alike.
struct Place {
  u32 slot, parity;
  __device__ __forceinline__ u32 full() const { return BARRIERS + 8 * slot; }
  __device__ __forceinline__ u32 x() const { return SHARED_BASE + slot * SLOT_BYTES; }
  __device__ __forceinline__ void next() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// One of the two places for a chunk.
struct ChunkPlace {
  u32 place, parity;
  __device__ __forceinline__ u32 full() const { return CHUNK_BARRIERS + 8 * place; }
  __device__ __forceinline__ u32 at() const { return CHUNKS + place * CHUNK_BYTES; }
  __device__ __forceinline__ void next() {
    parity ^= place;
    place ^= 1;
  }
};

// The weights of step `step` (0 to 3) out of a word of 16 digits: digits step, step + 4 to `one`, step + 8, step + 12 to `two`.
__device__ __forceinline__ void make_pairs(u32 word, int step, u32 low, u32 high, u32& one, u32& two) {
  const u32 four = word >> (2 * step) & 0x03030303u, select = four * 0x31u;  // digit d: bytes d and 3 d of the two
  one = permute(low, high, select);
  two = permute(low, high, select >> 16);
}

// Some row groups of one item.
struct Chunk { u32 item, group, n; };

// Call `work` for this block's chunks of `total` row groups, of which each item has `per_item`.
template <class Work> __device__ __forceinline__ void for_chunks(u32 total, u32 per_item, const Work& work) {
  const u32 turn = GROUPS * gridDim.x, whole = total / turn * turn, less = (total - whole + gridDim.x - 1) / gridDim.x;
  for (u32 at = 0;; at += turn) {
    const bool last = at == whole;
    const u32 size = last ? less : GROUPS, end = min(at + (blockIdx.x + 1) * size, total);
    for (u32 begin = at + blockIdx.x * size; begin < end;) {
      const u32 item = begin / per_item, group = begin - item * per_item, n = min(end - begin, per_item - group);
      work(Chunk{item, group, n});
      begin += n;
    }
    if (last) break;
  }
}

// What outputs need.
struct Output {
  u16* y;
  i64 y_stride;
  int relu, rows;
};

// Store the sums c[TOKENS / 2] of a warpgroup's 64 rows.  at: the chunk's place.  All that this needs is made after the products,
// which need the registers.
template <int TOKENS> __device__ __forceinline__ void store(const float* c, u32 at, u32 first_group, const Output& out) {
  hold(at);
  const u32 thread = thread_number(), lane = thread & 31;
  const int row = 64 * (first_group + (thread >> 7)) + 16 * (thread >> 5 & 3) + (lane >> 2);
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i += 4)
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const u32 n = 4 * (2 * i + 2 * (lane & 3) + b);
      const int token = (int)load_shared(at + TOKENS_AT + n);
      const float scale = __uint_as_float(load_shared(at + SCALES + n));
      u16* const y = out.y + token * out.y_stride + row;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float sum = c[i + b + 2 * half];
        const u16 value = float_to_half((out.relu && sum < 0.f ? 0.f : sum) * scale, X_F16);  // a NaN stays one
        if (token >= 0 && row + 8 * half < out.rows) y[8 * half] = value;
      }
    }
}

// Add the sums of all parts of each of n row groups to those of part 0.  All warpgroups come here, those without a part too.
template <int TOKENS> __device__ __forceinline__ void add_parts(float* c, u32 n, u32 part, u32 parts) {
  constexpr int ROUNDS = TOKENS == MAX_TOKENS ? 2 : 1, MANY_SUMS = TOKENS / 2 / ROUNDS;  // so that two row groups find room
  const u32 thread = thread_number(), to = SUMS + (thread / 128 % n) * (SUMS_BYTES / 2) + thread % 128 * 4;
#pragma unroll 1
  for (u32 p = 1; p < parts; p++)
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      if (part == p)
#pragma unroll
        for (int i = 0; i < MANY_SUMS; i++) store_shared(to + 512 * i, c[round * MANY_SUMS + i]);
      meet<1>(128 * GROUPS);
      if (part == 0)
#pragma unroll
        for (int i = 0; i < MANY_SUMS; i++) c[round * MANY_SUMS + i] += __uint_as_float(load_shared(to + 512 * i));
      meet<1>(128 * GROUPS);
    }
}

// The product of this warpgroup's 64 rows with up to TOKENS tokens, in 8 * octets slots.  low, high: levels of this lane's two
// rows, as `permute` takes them.  digits: where in a stage this lane's first word stands.
template <int TOKENS> __device__ __forceinline__ void multiply(const u32* low, const u32* high, u32 digits, int octets, int blocks,
                                                               Place& place, u32 at, u32 first_group, u32 n, u32 part,
                                                               u32 parts, const Output& out) {
  constexpr int QUEUED = TOKENS > 32 ? 1 : 2;  // steps whose products are queued together; registers do not suffice for more
  const int lane = threadIdx.x & 31;
  // Blocks of 8 tokens by 8 columns: 128 bytes apart along the tokens, octets * 128 along the columns.
  const u64 layout = (u64)8 << 32 | (octets * 8) << 16;
  const u32 step = octets * 16;  // 16-byte units
  float c[TOKENS / 2];
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) c[i] = 0.f;
  u32 a[2][QUEUED][4];
  u32 before = 0;  // the barrier of the stage before
  auto pass = [&](u32 stages) {  // other warpgroups' stages
#pragma unroll 1
    for (; SHARE && stages; stages--) {
      wait_barrier(place.full(), place.parity);
      if (lane == 0) arrive(place.full() + EMPTY);
      place.next();
    }
  };
  pass(min(part, (u32)blocks));
#pragma unroll 1
  for (int block = part; block < blocks; block += SHARE ? parts : 1) {
    wait_barrier(place.full(), place.parity);
    const u32 word[2] = {load_shared(place.x() + digits), load_shared(place.x() + digits + 128)};
    const u32 operand = place.x() / 16;
#pragma unroll
    for (int s = 0; s < 4; s += QUEUED) {
      u32(*const here)[4] = a[s / QUEUED & 1];
      u64 b[QUEUED];
#pragma unroll
      for (int k = 0; k < QUEUED; k++) {
#pragma unroll
        for (int i = 0; i < 2; i++) make_pairs(word[i], s + k, low[i], high[i], here[k][i], here[k][2 + i]);
        b[k] = layout | (operand + (s + k) * step);
      }
#pragma unroll
      for (int k = 0; k < QUEUED; k++) hold(here[k], b[k]);
      begin_products();
#pragma unroll
      for (int k = 0; k < QUEUED; k++) wgmma<TOKENS>(c, here[k], b[k]);
      end_products();
      wait_products<1>();
      if (s == 0 && before && lane == 0) arrive(before + EMPTY);
    }
    before = place.full();
    place.next();
    pass(min(parts, blocks - block) - 1);
  }
  wait_products<0>();
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) hold(c[i]);
  if (before && lane == 0) arrive(before + EMPTY);
  if (SHARE && parts > 1) add_parts<TOKENS>(c, n, part, parts);
  if (part == 0) store<TOKENS>(c, at, first_group, out);
}

// Items first_item to first_item + max_items - 1, as far as there are; digits: their leaders', as decode_digits.cu leaves them,
// item_bytes from one item to the next; where `leader` is null, the first item leads all.
// item_first, item_count: the places of an item's tokens in slot_token (route.cu); x as arrange.cu leaves it.
extern "C" __global__ void BOUNDS
multiply_digits(const u8* digits, const u32* levels, const u8* x, u16* y, i64 y_stride, const float* scale, int relu, int rows,
                int cols, const int* n_items, const int* item_expert, const int* item_first, const int* item_count,
                const int* slot_token, const int* leader, int first_item, int max_items, i64 item_bytes) {
  if ((u32)__cvta_generic_to_shared(shared) != SHARED_BASE) __trap();
  const int warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;  // known to be the same in all lanes
  const int blocks = (cols + 63) / 64;
  const u32 per_item = (rows + 63) / 64, total = per_item * max(0, min(*n_items - first_item, max_items));
  if (threadIdx.x < 2 * SLOTS) init_barrier(BARRIERS + 8 * threadIdx.x, threadIdx.x < SLOTS ? 1 : WARPS);
  if (threadIdx.x < 4) init_barrier(CHUNK_BARRIERS + 8 * threadIdx.x, threadIdx.x < 2 ? 32 : WARPS);
  publish_barriers();
  __syncthreads();

  Place place{0, 0};
  ChunkPlace about{0, 0};
  if (warp >= WARPS) {
    give_registers<FEW>();
    item_first += first_item;
    item_count += first_item;
    item_expert += first_item;
    if (leader) leader += first_item;
    if (warp == WARPS && lane == 0) {
      for_chunks(total, per_item, [&](const Chunk& chunk) {
        const u32 x_bytes = (item_count[chunk.item] + 7) / 8 * 1024, digit_bytes = chunk.n * 1024;
        const u8* from_x = x + (u64)item_first[chunk.item] * blocks * 128;
        const u8* from_digits = digits + (leader ? leader[chunk.item] - first_item : 0) * item_bytes + (u64)chunk.group * 1024;
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
          wait_barrier(place.full() + EMPTY, place.parity ^ 1);
          arrive_and_expect(place.full(), x_bytes + digit_bytes);
          copy_to_shared(place.x() + X_BYTES, from_digits, digit_bytes, place.full());
          copy_to_shared(place.x(), from_x, x_bytes, place.full());
          from_x += x_bytes;
          from_digits += per_item * 1024;
          place.next();
        }
      });
    } else if (warp == WARPS + 1) {
      for_chunks(total, per_item, [&](const Chunk& chunk) {
        const int expert = item_expert[chunk.item], n_tokens = item_count[chunk.item];
        const int* const tokens = slot_token + item_first[chunk.item];
        u32* const to = (u32*)(shared + (about.at() - SHARED_BASE));
        wait_barrier(about.full() + CHUNK_EMPTY, about.parity ^ 1);
#pragma unroll 1
        for (int i = lane; i < (int)(64 * chunk.n); i += 32) {
          const int row = 64 * chunk.group + i;
          to[LEVELS / 4 + i] = row < rows ? __ldg(levels + (u64)expert * rows + row) : 0u;
        }
#pragma unroll 1
        for (int i = lane; i < MAX_TOKENS; i += 32) {
          const int token = i < n_tokens ? __ldg(tokens + i) : -1;
          to[TOKENS_AT / 4 + i] = token;
          to[SCALES / 4 + i] = __float_as_uint(scale && token >= 0 ? __ldg(scale + token) : 1.f);
        }
        if (lane == 0) to[COUNT / 4] = n_tokens;
        arrive(about.full());
        about.next();
      });
    }
  } else {
    take_registers<MANY>();
    const Output out{y, y_stride, relu, rows};
    for_chunks(total, per_item, [&](const Chunk& chunk) {
      const u32 parts = SHARE ? GROUPS / chunk.n : 1, part = (warp >> 2) / chunk.n, group = (warp >> 2) - part * chunk.n;
      wait_barrier(about.full(), about.parity);
      if (part < parts) {
        const u32 in_chunk = 64 * group + 16 * (warp & 3) + (lane >> 2);
        u32 low[2], high[2];  // zero, first bytes of the low and the high level, second byte of the low one; in byte 2 that of the high
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const u32 pair = load_shared(about.at() + LEVELS + 4 * in_chunk + 32 * i);
          low[i] = (pair << 8 & 0xff00u) | (pair & 0xff0000u) | (pair << 16 & 0xff000000u);
          high[i] = pair >> 8 & 0xff0000u;
        }
        const int octets = (load_shared(about.at() + COUNT) + 7) / 8;
        const u32 words = X_BYTES + 16 * in_chunk + 4 * (lane & 3);
        // Fewer tokens than 32 take no less time: it is the fragments that do.
        if (octets <= 4) multiply<32>(low, high, words, octets, blocks, place, about.at(), chunk.group, chunk.n, part, parts, out);
        else if (octets <= 8) multiply<64>(low, high, words, octets, blocks, place, about.at(), chunk.group, chunk.n, part, parts, out);
        else multiply<128>(low, high, words, octets, blocks, place, about.at(), chunk.group, chunk.n, part, parts, out);
      } else {
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
          wait_barrier(place.full(), place.parity);
          if (lane == 0) arrive(place.full() + EMPTY);
          place.next();
        }
      }
      __syncwarp();  // all lanes have read what there is about the chunk
      if (lane == 0) arrive(about.full() + CHUNK_EMPTY);
      about.next();
    });
  }
}
