// Products of large items with experts that decode_digits.cu has decoded to two-bit digits, on Hopper (sm_90a).
//
// Naively, for each item (expert, tokens), each token and each row:
//   y[token][row] = sum over columns of level[row][digit[row][column]] * x[token][column]
//
// Optimisations:
//  1. wgmma multiplies: weights from registers, x from shared memory.  A lane's word of 16 digits holds what it needs of a row and 64
//     columns, digits of one step of 16 columns at every eighth bit: shift and mask spread them, one multiplication makes byte
//     selectors of them, and prmt selects 0, the low or the high level, two 16-bit numbers at once.
//  2. Warps of their own fill a ring of stages of 128 columns, as deep as shared memory allows: one orders the digits of up to
//     GROUPS row groups, by bulk copies; X_WARPS gather x of the item's tokens, 16 bytes per lane and copy, to where wgmma wants
//     them.  To wait for a stage takes some 200 cycles even where it is there, hence no smaller ones.  A lane's tokens stay the same
//     for a whole chunk: it keeps where they are.  Each warpgroup takes a group of 64 rows, so x passes the L2 cache once for
//     64 * GROUPS rows; up to 128 tokens share the making of a fragment.
//  3. The products of half a stage are queued together, and the fragments of the next half made meanwhile, from words that were read
//     ahead.
//  4. Nothing waits for a whole block: warpgroups store their sums from registers, transposed there, and go on.  Another warp has
//     brought what they need of the next rows and tokens into shared memory by then.
//  5. Items are cut into chunks of at most GROUPS row groups, as equal as they come, and dealt out in turn, so that neighbours read
//     the same x at the same time.  Chunks that do not make a whole turn are cut further, into row groups and stages, so that all blocks
//     have some.  Where several have stages of the same rows, the last one to finish adds up their sums, in the order of the columns
//     whoever it is.
//
// Trusts: levels of x's type, finite; x finite, its rows on 16-byte boundaries, all within 64 GiB, columns a multiple of 8.
#include "common.cuh"
#include "hopper.cuh"

#ifndef GROUPS
#define GROUPS 3       // of 64 rows, one for each warpgroup, 2 or 3
#endif
#ifndef SLOTS
#define SLOTS 5        // stages that the ring holds
#endif
#ifndef SHARED_BASE
#define SHARED_BASE 1024
#endif

constexpr int MAX_TOKENS = 128, SUMS = MAX_TOKENS / 2;  // per thread
constexpr int WARPS = 4 * GROUPS, X_WARPS = 6, HELPERS = X_WARPS + 2, THREADS = 32 * (WARPS + HELPERS);
// Registers per thread: the warpgroups that fill the ring keep FEW, so that no copy waits until another has read its address; the
// others share the rest.
constexpr int FEW = 40, MANY = (65536 / THREADS / 8 * 8 * THREADS - 32 * HELPERS * FEW) / (128 * GROUPS) / 8 * 8;
constexpr int ABREAST = 4 * X_WARPS, PASSES = (MAX_TOKENS + ABREAST - 1) / ABREAST;  // tokens of x at a time, eight lanes each
constexpr u32 X_BYTES = 128 * MAX_TOKENS, DIGIT_BYTES = 1024 * GROUPS;  // of a half of a stage, 64 columns
constexpr u32 SLOT_BYTES = 2 * (X_BYTES + DIGIT_BYTES);                  // x of both halves, digits of both
constexpr u32 BARRIERS = SHARED_BASE + SLOTS * SLOT_BYTES, EMPTY = 8 * SLOTS;    // full ones, EMPTY further empty ones
static_assert(SHARED_BASE % 1024 == 0, "what is swizzled lies on such boundaries");
static_assert(SLOTS > 2, "a stage is kept until the warpgroup's next two are there");

// x in half a stage, for each octet of tokens 1024 bytes: the 16 bytes of columns 8 c .. 8 c + 7 of token t at 128 t + 16 (c ^ t), so
// that neither copies nor products meet in a bank.  DESCRIPTION: of this, for wgmma, without the address; STEP: from one step of 16
// columns to the next.  Both in units of 16 bytes.
constexpr u64 DESCRIPTION = (u64)1 << 62 | (u64)64 << 32;
constexpr u32 STEP = 2;

// What the other warps need of a chunk: levels of its rows, tokens (-1 for none) and their scales; the number of row groups, 0 behind
// the last chunk, the first of them, the number of tokens, where the expert's digits stand (`slot`, below), and the rest of Chunk.
// There are places for several chunks: the ring's warps are ahead by more than one where rows are short.
constexpr u32 PLACES = 4, CHUNK_BARRIERS = BARRIERS + 2 * EMPTY, CHUNK_EMPTY = 8 * PLACES;
constexpr u32 CHUNKS = (CHUNK_BARRIERS + 2 * CHUNK_EMPTY + 15) / 16 * 16;
constexpr u32 LEVELS = 0, TOKENS_AT = 256 * GROUPS, SCALES = TOKENS_AT + 4 * MAX_TOKENS, GROUPS_AT = SCALES + 4 * MAX_TOKENS;
constexpr u32 GROUP = GROUPS_AT + 4, COUNT = GROUPS_AT + 8, SLOT = GROUPS_AT + 12, STAGE = GROUPS_AT + 16, STAGES = GROUPS_AT + 20;
constexpr u32 PART = GROUPS_AT + 24, PARTS = GROUPS_AT + 28, FIRST = GROUPS_AT + 32, INDEX = GROUPS_AT + 36, CHUNK_BYTES = GROUPS_AT + 48;
constexpr u32 ENDED = CHUNKS + PLACES * CHUNK_BYTES;  // warps that have ended
constexpr u32 IS_LAST = ENDED + 4;                    // of each warpgroup: it adds up the parts
static_assert(GROUPS < 4, "registers do not suffice for more");

extern __shared__ __align__(1024) u8 shared[];  // ring, barriers, chunks

// A place in the ring, its barrier and its stage; all warps go round it alike.
struct Place {
  u32 full = BARRIERS, x = SHARED_BASE, parity = 0;
  __device__ __forceinline__ void next() {
    full += 8;
    x += SLOT_BYTES;
    if (full == BARRIERS + EMPTY) {
      full = BARRIERS;
      x = SHARED_BASE;
      parity ^= 1;
    }
  }
};

// One of the places for a chunk.
struct ChunkPlace {
  u32 number = 0;  // of the chunk, counted by each block
  __device__ __forceinline__ u32 parity() const { return number / PLACES & 1; }
  __device__ __forceinline__ u32 full() const { return CHUNK_BARRIERS + 8 * (number % PLACES); }
  __device__ __forceinline__ u32 at() const { return CHUNKS + number % PLACES * CHUNK_BYTES; }
};

// The weights of step `step` (0 to 3) out of a word of 16 digits (decode_digits.cu): those of two neighbours to `one`, 8 columns on to `two`.
__device__ __forceinline__ void make_pairs(u32 word, int step, u32 low, u32 high, u32& one, u32& two) {
  const u32 four = word >> (2 * step) & 0x03030303u, select = four * 0x31u;  // digit d: bytes d and 3 d of the two
  one = permute(low, high, select);
  two = permute(low, high, select >> 16);
}

// Some stages of some row groups of one item.  parts: blocks that have some of its stages, this one those of `part`.  Where there are
// several, their sums stand at places (`add_parts`), those of part 0 at `first`, of part p at first - first % 2 + 2 p, and `index` is
// the chunk's number among such.
struct Chunk { u32 item, group, n, stage, stages, part, parts, first, index; };

// Call `work` for this block's chunks of `items`, of `per_item` row groups each.  An item's chunks differ by one group at most, and
// which ones are larger differs from item to item, so that no block gets larger ones than others.  For a whole warp.
template <class Work> __device__ __forceinline__ void for_chunks(u32 items, u32 per_item, u32 stages, const Work& work) {
  const u32 of_item = (per_item + GROUPS - 1) / GROUPS, total = items * of_item;  // each has outputs of its own: below 2^32
  const u32 left = total % gridDim.x, whole = total - left, most = (per_item + of_item - 1) / of_item, block = blockIdx.x;
  auto chunk_at = [&](u32 i) {
    const u32 item = i / of_item, chunk = (i + item) % of_item;
    const u32 group = chunk * (per_item / of_item) + min(chunk, per_item % of_item), n = (per_item + of_item - 1 - chunk) / of_item;
    return Chunk{item, group, n, 0, stages, 0, 1, 0, 0};
  };
  for (u32 i = block; i < whole; i += gridDim.x) work(chunk_at(i));
  if (!left) return;

  // The rest: chunks are cut into pieces of fewer groups, and the stages of all pieces dealt out to `blocks` blocks.  Each lane
  // estimates, in ns, one number of pieces of a chunk and of parts of a piece; lane 31, all blocks alike, whose parts fall as they may.
  // The constants are near to what 16 to 128 tokens take on an H200; they decide about time alone.
  constexpr u32 ALIKE = 31, MOST_PARTS = 8;
  const u32 lane = threadIdx.x & 31, few = min(stages, 100000u), k = lane / MOST_PARTS + 1, parts_of_piece = lane % MOST_PARTS + 1;
  u32 ns = 1u << 26;
  auto stage_ns = [](u32 groups) { return 400 + 100 * groups; };
  if (lane == ALIKE) {
    if (left * few >= gridDim.x) ns = (left * few + gridDim.x - 1) / gridDim.x * stage_ns(most) + 2500 + 700 * (gridDim.x / left + 2);
  } else if (k <= most && parts_of_piece <= stages && left * k * parts_of_piece <= gridDim.x) {
    ns = (few + parts_of_piece - 1) / parts_of_piece * stage_ns((most + k - 1) / k);
    if (parts_of_piece > 1) ns += 1500 + 700 * parts_of_piece;
  }
  const u32 choice = __reduce_min_sync(FULL_WARP, min(ns, 1u << 26) * 32 + lane) % 32, pieces = choice == ALIKE ? 1 : choice / MOST_PARTS + 1;
  const u32 blocks = choice == ALIKE ? gridDim.x : left * pieces * (choice % MOST_PARTS + 1);
  if (block >= blocks) return;

  // Block b of them has stages from b * all / blocks on.
  const u64 all = (u64)left * pieces * stages;
  auto block_of = [&](u64 stage) { return (u32)(((stage + 1) * blocks - 1) / all); };
  for (u64 at = block * all / blocks, end = (block + 1) * all / blocks; at < end;) {
    const u32 index = (u32)(at / stages);
    const u64 begin = (u64)index * stages;
    const u32 first = block_of(begin);
    Chunk chunk = chunk_at(whole + index / pieces);
    const u32 from = index % pieces * chunk.n / pieces, to = (index % pieces + 1) * chunk.n / pieces;
    chunk.group += from;
    chunk.n = to - from;
    chunk.stage = (u32)(at - begin);
    chunk.stages = (u32)min(end - at, begin + stages - at);
    chunk.part = block - first;
    chunk.parts = block_of(begin + stages - 1) - first + 1;
    chunk.first = 2 * first + (first * all / blocks < begin);  // that block has a part of the piece before, too
    chunk.index = index;
    if (chunk.n) work(chunk);
    at += chunk.stages;
  }
}

// What a whole warp reads, known to be the same in all lanes: what hangs on it stays in registers that the lanes share.
__device__ __forceinline__ u32 load_same(u32 address) { return __shfl_sync(FULL_WARP, load_shared(address), 0); }

// Call `work` for what another warp has found out about this block's chunks, one after the other, where it stands.
template <bool WHOLE_WARP = true, class Work> __device__ __forceinline__ void for_known_chunks(const Work& work) {
  for (ChunkPlace about;; about.number++) {
    wait_barrier(about.full(), about.parity());
    const u32 n = WHOLE_WARP ? load_same(about.at() + GROUPS_AT) : load_shared(about.at() + GROUPS_AT);
    if (!n) return;
    work(about, n);
  }
}

// What outputs need.  least: what smaller sums become.  in_fours: rows come in fours, those of a token on an 8-byte boundary.
struct Output {
  u16* y;
  i64 y_stride;
  float least;
  int rows;
  bool in_fours;
};

// Store the sums of a warpgroup's 64 rows.  at: the chunk's place.  All that this needs is made after the products, which need the
// registers.  A lane has sums of two tokens and of rows 8 apart; squares of 8 x 8 are transposed, then neighbours exchange a half, and
// each has four rows of one token: 32 bytes of a token leave side by side.
__device__ __forceinline__ void store(const float* c, u32 octets, u32 at, const Output& out) {
  const u32 thread = thread_number(), lane = thread & 31, odd = lane & 1;
  const int row = 64 * (load_shared(at + GROUP) + (thread >> 7)) + 16 * (thread >> 5 & 3) + 8 * odd + 2 * (lane & 2);
  u16* const y = out.y + row;
  constexpr int AT_ONCE = 4;  // octets of tokens
#pragma unroll
  for (int first = 0; first < SUMS / 4; first += AT_ONCE) {
    if (first >= octets) break;
    uint2 four[AT_ONCE];
#pragma unroll
    for (int o = 0; o < AT_ONCE; o++) {
      const float* const sums = c + 4 * (first + o);
      float scale[2];
#pragma unroll
      for (int b = 0; b < 2; b++) scale[b] = __uint_as_float(load_shared(at + SCALES + 4 * (8 * (first + o) + 2 * (lane & 3) + b)));
      u32 square[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 two[2];
#pragma unroll
        for (int b = 0; b < 2; b++) {
          const float sum = sums[2 * half + b];
          two[b] = float_to_half((sum < out.least ? out.least : sum) * scale[b], X_F16);  // a NaN stays one
        }
        square[half] = transpose(two[0] | two[1] << 16);
      }
      const u32 other = __shfl_xor_sync(FULL_WARP, odd ? square[0] : square[1], 1);
      four[o] = odd ? make_uint2(other, square[1]) : make_uint2(square[0], other);
    }
    auto store_tokens = [&](bool in_fours) {
#pragma unroll
      for (int o = 0; o < AT_ONCE; o++) {
        const int token = (int)load_shared(at + TOKENS_AT + 4 * (8 * (first + o) + (lane >> 2))), there = token < 0 ? 0 : out.rows - row;
        u16* const to = y + token * out.y_stride;
        if (in_fours) {
          if (there > 0) *(uint2*)to = four[o];
        } else {
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (i < there) to[i] = (u16)((i < 2 ? four[o].x : four[o].y) >> (16 * (i & 1)));
        }
      }
    };
    if (out.in_fours) store_tokens(true);
    else store_tokens(false);
  }
}

// Leave this warpgroup's sums where others find them, in `sums`: [place][group][octet of tokens][thread], four each.  If the other parts
// have left theirs, add up all of them and return true.  arrived: how many have, for each chunk with parts and each group.
__device__ __forceinline__ bool add_parts(float* c, u32 octets, u32 at, u32 parts, float4* sums, int* arrived) {
  const u32 thread = thread_number() % 128, group = thread_number() / 128, part = load_same(at + PART);
  const u32 first = load_same(at + FIRST), is_last = IS_LAST + 4 * group;
  auto place = [&](u32 p) { return sums + ((p ? first / 2 * 2 + 2 * p : first) * GROUPS + group) * (SUMS / 4 * 128) + thread; };
  float4* const to = place(part);
#pragma unroll
  for (int o = 0; o < SUMS / 4; o++) {
    if (o >= octets) break;
    __stcg(to + 128 * o, make_float4(c[4 * o], c[4 * o + 1], c[4 * o + 2], c[4 * o + 3]));
  }
  __threadfence();
  meet_warpgroup();
  if (thread == 0)
    *(u32*)(shared + (is_last - SHARED_BASE)) = atomicAdd(arrived + load_shared(at + INDEX) * GROUPS + group, 1) == (int)parts - 1;
  meet_warpgroup();
  if (!load_same(is_last)) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < SUMS; i++) c[i] = 0.f;
  constexpr int AT_ONCE = 8;
#pragma unroll 1
  for (u32 p = 0; p < parts; p++) {
    const float4* const from = place(p);
#pragma unroll
    for (int o = 0; o < SUMS / 4; o += AT_ONCE) {
      if (o >= octets) break;
      float4 four[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) four[i] = o + i < octets ? __ldcg(from + 128 * (o + i)) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        float* const mine = c + 4 * (o + i);
        mine[0] += four[i].x;
        mine[1] += four[i].y;
        mine[2] += four[i].z;
        mine[3] += four[i].w;
      }
    }
  }
  return true;
}

// Queue the products of half a stage.
template <int TOKENS> __device__ __forceinline__ void queue(float* c, const u32 (*a)[4], const u64* b) {
  begin_products();
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma<TOKENS>(c, a[k], b[k]);
  end_products();
}

// A stage that is there: its barrier, where its x stands, and for each half this lane's digits of two rows.
struct Stage { u32 barrier, x, word[2][2]; };

// The product of this warpgroup's 64 rows with the tokens of `octets`.  low, high: levels of this lane's two rows (LevelBytes).  digits: where in a stage this lane's first word stands.  blocks: of 64 columns, of this part.
__device__ __forceinline__ void multiply(const u32* low, const u32* high, u32 digits, u32 octets, int blocks, Place& place,
                                         ChunkPlace about, float4* sums, int* arrived, const Output& out) {
  float c[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; i++) c[i] = 0.f;
  u32 before = 0;  // the barrier of the stage before
  auto take = [&] {
    wait_barrier(place.full, place.parity);
    show_to_products();
    Stage stage{place.full, place.x};
#pragma unroll
    for (int i = 0; i < 4; i++) stage.word[i / 2][i % 2] = load_shared(place.x + digits + i / 2 * DIGIT_BYTES + i % 2 * 128);
    place.next();
    return stage;
  };
  auto work = [&](const Stage& stage, int half, u32(*a)[4]) {
    u64 b[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
      for (int i = 0; i < 2; i++) make_pairs(stage.word[half][i], k, low[i], high[i], a[k][i], a[k][2 + i]);
      b[k] = DESCRIPTION | ((stage.x + half * X_BYTES) / 16 + k * STEP);
    }
#pragma unroll
    for (int k = 0; k < 4; k++) hold(a[k], b[k]);
    // One place for each number of tokens, and so the same registers.  Fewer than 32 would take no less time.
    if (octets <= 4) queue<32>(c, a, b);
    else if (octets <= 8) queue<64>(c, a, b);
    else queue<128>(c, a, b);
  };
  u32 a[2][4][4];
  Stage next = take();
#pragma unroll 1
  for (; blocks > 0; blocks -= 2) {
    const Stage stage = next;
    work(stage, 0, a[0]);
    if (blocks > 2) next = take();
    wait_products<1>();  // of the stage before
    if (before) arrive(before + EMPTY);
    before = stage.barrier;
    if (blocks > 1) {
      work(stage, 1, a[1]);
      wait_products<1>();
    }
  }
  wait_products<0>();
#pragma unroll
  for (int i = 0; i < SUMS; i++) hold(c[i]);
  if (before) arrive(before + EMPTY);
  hold(about.number);
  const u32 at = about.at(), parts = load_same(at + PARTS);
  if (parts == 1 || add_parts(c, octets, at, parts, sums, arrived)) store(c, octets, at, out);
}

// Bring x of N tokens of this lane, of all blocks of columns, to the ring.  units: where they are, from `from` on, in units of 16
// bytes; to: where in a stage the first goes.
template <int N> __device__ __forceinline__ void gather(const u8* from, const u32* units, u32 to, int cols, Place& place) {
  const int mine = 8 * (int)(thread_number() & 7);  // first column of this lane in a half
  auto bring = [&](int half, int cols_left) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const u32 at = place.x + half * X_BYTES + to + 128 * ABREAST * i;
      const u8* const token = from + 128 * half + 16 * (u64)units[i];
      if (cols_left == 64) copy_16(at, token);
      else copy_16(at, token, mine < cols_left ? 16 : 0);
    }
  };
  auto stage = [&](int first, int second) {
    wait_barrier(place.full + EMPTY, place.parity ^ 1);
    bring(0, first);
    if (second > 0) bring(1, second);
    arrive_when_copied(place.full);
    place.next();
    from += 256;
  };
#pragma unroll 1
  for (int i = 0; i < cols / 128; i++) stage(64, 64);
  if (cols % 128) stage(min(cols % 128, 63), cols % 128 - 64);
}

// One form for each number of passes, so that what happens for each block of columns is nothing but copies.
template <int N> __device__ __forceinline__ void gather_in_passes(u32 passes, const u8* from, const u32* units, u32 to,
                                                                          int cols, Place& place) {
  if (passes == N) gather<N>(from, units, to, cols, place);
  else if constexpr (N < PASSES) gather_in_passes<N + 1>(passes, from, units, to, cols, place);
}

// The last warp to end leaves no barriers behind: tools that look for misuse count them.
__device__ __forceinline__ void end_warp() {
  __syncwarp();
  const u32 lane = thread_number() & 31;
  int before = 0;
  if (lane == 0) before = atomicAdd((int*)(shared + (ENDED - SHARED_BASE)), 1);
  if (__shfl_sync(FULL_WARP, before, 0) != WARPS + HELPERS - 1) return;
  for (int i = lane; i < 2 * SLOTS; i += 32) end_barrier(BARRIERS + 8 * i);
  if (lane < 2 * PLACES) end_barrier(CHUNK_BARRIERS + 8 * lane);
}

// Items first_item to first_item + max_items - 1, as far as there are.  slot: where the digits of an item's expert stand, as
// decode_digits.cu leaves them, in units of slot_bytes; null where each item has its own, as items come.
// item_first, item_count: the places of an item's tokens in slot_token (route.cu).
// sums, arrived: for `add_parts`, two places for each block, and 0 for each block and group.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
multiply_digits(const u8* digits, const u32* levels, const u8* x, i64 x_stride, u16* y, i64 y_stride, const float* scale, int relu,
                int rows, int cols, const int* n_items, const int* item_expert, const int* item_first, const int* item_count,
                const int* slot_token, const int* slot, int first_item, int max_items, i64 slot_bytes, float4* sums, int* arrived) {
  if ((u32)__cvta_generic_to_shared(shared) != SHARED_BASE) __trap();
  const int warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;  // known to be the same in all lanes
  const int blocks = (cols + 63) / 64;
  const u32 per_item = (rows + 63) / 64;
  if (threadIdx.x < 2 * SLOTS) init_barrier(BARRIERS + 8 * threadIdx.x, threadIdx.x < SLOTS ? 32 * X_WARPS + 1 : 32 * WARPS);
  if (threadIdx.x < 2 * PLACES) init_barrier(CHUNK_BARRIERS + 8 * threadIdx.x, threadIdx.x < PLACES ? 32 : WARPS + X_WARPS + 1);
  if (threadIdx.x == 0) *(int*)(shared + (ENDED - SHARED_BASE)) = 0;
  publish_barriers();
  __syncthreads();
  wait_for_previous();

  Place place;
  if (warp >= WARPS) {
    give_registers<FEW>();
    if (warp < WARPS + X_WARPS) {
      // Eight lanes bring 128 bytes of a token, and of every ABREAST-th from there on.
      const u32 thread = threadIdx.x - 32 * WARPS, c = thread & 7, t = thread >> 3;
      const u32 to = 128 * t + 16 * (c ^ (t & 7)), stride = x_stride / 16;
      static_assert(ABREAST % 8 == 0, "a lane's places have the same 16 bytes of each row");
      for_known_chunks([&](const ChunkPlace& about, u32) {
        const u32 count = load_shared(about.at() + COUNT), stage = load_same(about.at() + STAGE);
        const int cols_here = min(cols - 128 * (int)stage, 128 * (int)load_same(about.at() + STAGES));
        u32 units[PASSES];
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
          const u32 n = t + ABREAST * i;  // where four tokens are not whole, the first one's x again: nobody looks at the product
          units[i] = load_shared(about.at() + TOKENS_AT + (n < count ? 4 * n : 0)) * stride + c;
        }
        __syncwarp();  // all lanes have read what there is about the chunk
        if (lane == 0) arrive(about.full() + CHUNK_EMPTY);
        const u32 first = 4 * (warp - WARPS), passes = count > first ? (count - first + ABREAST - 1) / ABREAST : 0;
        gather_in_passes<0>(passes, x + 256 * (u64)stage, units, to, cols_here, place);
      });
    } else if (warp == WARPS + X_WARPS) {
      if (lane == 0)
        for_known_chunks<false>([&](const ChunkPlace& about, u32 n) {
          const u32 bytes = n * 1024, stage = load_shared(about.at() + STAGE), end = stage + load_shared(about.at() + STAGES);
          const u8* from = digits + load_shared(about.at() + SLOT) * slot_bytes;
          from += ((u64)(2 * stage) * per_item + load_shared(about.at() + GROUP)) * 1024;
          arrive(about.full() + CHUNK_EMPTY);
#pragma unroll 1
          for (u32 i = stage; i < end; i++) {
            const int halves = min(blocks - 2 * (int)i, 2);
            wait_barrier(place.full + EMPTY, place.parity ^ 1);
            arrive_and_expect(place.full, halves * bytes);
#pragma unroll 1
            for (int half = 0; half < halves; half++) {
              copy_to_shared(place.x + 2 * X_BYTES + half * DIGIT_BYTES, from, bytes, place.full);
              from += per_item * 1024;
            }
            place.next();
          }
        });
    } else {
      // All that it asks memory for is on its way before anything waits for it: a chunk of short rows takes no longer.
      ChunkPlace about;
      auto tell = [&](const Chunk& chunk) {
        constexpr int TOKENS = MAX_TOKENS / 32;
        u32 level[2 * GROUPS]{}, at = 0, n_tokens = 0;
        int token[TOKENS]{};
        float factor[TOKENS]{};
        if (chunk.n) {
          const int item = first_item + chunk.item, expert = item_expert[item];
          const int* const tokens = slot_token + item_first[item];
          n_tokens = item_count[item];
          at = slot ? slot[item] : chunk.item;
#pragma unroll
          for (int i = 0; i < 2 * GROUPS; i++) {
            const int row = 64 * chunk.group + 32 * i + lane;
            level[i] = row < min(rows, (int)(64 * (chunk.group + chunk.n))) ? __ldg(levels + (u64)expert * rows + row) : 0u;
          }
#pragma unroll
          for (int i = 0; i < TOKENS; i++) token[i] = 32 * i + lane < n_tokens ? __ldg(tokens + 32 * i + lane) : -1;
#pragma unroll
          for (int i = 0; i < TOKENS; i++) factor[i] = scale && token[i] >= 0 ? __ldg(scale + token[i]) : 1.f;
        }
        wait_long(about.full() + CHUNK_EMPTY, about.parity() ^ 1);
        u32* const to = (u32*)(shared + (about.at() - SHARED_BASE)) + lane;
#pragma unroll
        for (int i = 0; i < 2 * GROUPS; i++) to[LEVELS / 4 + 32 * i] = level[i];
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
          to[TOKENS_AT / 4 + 32 * i] = token[i];
          to[SCALES / 4 + 32 * i] = __float_as_uint(factor[i]);
        }
        if (lane == 0) {
          to[GROUPS_AT / 4] = chunk.n;
          to[GROUP / 4] = chunk.group;
          to[COUNT / 4] = n_tokens;
          to[SLOT / 4] = at;
          to[STAGE / 4] = chunk.stage;
          to[STAGES / 4] = chunk.stages;
          to[PART / 4] = chunk.part;
          to[PARTS / 4] = chunk.parts;
          to[FIRST / 4] = chunk.first;
          to[INDEX / 4] = chunk.index;
        }
        arrive(about.full());
        about.number++;
      };
      for_chunks(max(0, min(*n_items - first_item, max_items)), per_item, (blocks + 1) / 2, tell);
      tell(Chunk{});
    }
    end_warp();
  } else {
    take_registers<MANY>();
    const Output out{y, y_stride, relu ? 0.f : __uint_as_float(0xff800000u), rows, ((rows | y_stride) & 3) == 0 && ((u64)y & 7) == 0};
    for_known_chunks([&](ChunkPlace& about, u32 n) {
      const u32 thread = thread_number(), group = __shfl_sync(FULL_WARP, thread >> 7, 0);
      const u32 stage = load_same(about.at() + STAGE), stages = load_same(about.at() + STAGES);
      if (group < n) {
        const u32 in_chunk = 16 * (thread >> 5) + (thread >> 2 & 7);
        u32 low[2], high[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const LevelBytes level(load_shared(about.at() + LEVELS + 4 * in_chunk + 32 * i));
          low[i] = level.low;
          high[i] = level.high;
        }
        const u32 octets = (load_same(about.at() + COUNT) + 7) / 8, words = 2 * X_BYTES + 16 * in_chunk + 4 * (thread & 3);
        multiply(low, high, words, octets, min(blocks - 2 * (int)stage, 2 * (int)stages), place, about, sums, arrived, out);
      } else {
#pragma unroll 1
        for (u32 i = 0; i < stages; i++) {
          wait_barrier(place.full, place.parity);
          arrive(place.full + EMPTY);
          place.next();
        }
      }
      hold(about.number);  // products need the registers of what it says
      __syncwarp();        // all lanes have read what there is about the chunk
      if ((thread_number() & 31) == 0) arrive(about.full() + CHUNK_EMPTY);
    });
    end_warp();
  }
}
