// Fused decode and matrix product for 8-bit dictionaries and items of up to 64 tokens, layout "words" (common.cuh), on
// Hopper (sm_90a).  tile.cu does the same for other architectures, and where there are few tiles.
//
// Naively, for each item (expert, tokens) and each tile of TILE rows:
//   digits[row][column] = 0; for each codeword of each row: for each (offset, sign) of its phrase: digits[row][..] = sign
//   y[token][row] = sum over columns of level[row][digits[row][column]] * x[token][column]
//
// Optimisations:
//  1. A tile of rows is decoded once, whole, into shared memory with two bits per digit, so x is read once per TILE rows.
//  2. Decoding is that of gather.cu (items 1, 2 and 4 there), with 4 copies of the table.  Columns are counted in bits of the
//     tile, two per digit: the position of a nonzero, made by one dp4a, is at once its address and, shifted into 1, its value.
//     An entry with fewer nonzeros than places repeats its last one, which an or forgives.
//  3. wgmma multiplies: weights from registers, x from shared memory.  The order of columns within a sum is free, so a lane's
//     word of 16 digits makes its fragments of four steps: digits of one step stand at every eighth bit, shift and mask spread
//     them, one multiplication makes byte selectors of them, and prmt selects 0, the low or the high level: two 16-bit
//     numbers at once.  arrange.cu has put x into the same order, in the blocks that wgmma reads.
//  4. x comes from the L2 cache by bulk copies into a ring of stages, ahead of the product.  The ring takes the place of the table
//     when the tile is decoded.
//  5. The warpgroups share out the rows (64 each) and then the columns; shares of columns are added up in shared memory at the
//     end.
//  6. Two blocks of 256 threads share a multiprocessor, so one decodes while the other multiplies.  With many tokens per item
//     one block of 512 threads and tiles of 128 rows read x half as often.
//  7. While the tile is cleared, the first row's codewords are on their way; while a row is decoded, the next row's.
//
// Trusts what gather.cu trusts, and: levels of x's type, finite.
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
#ifndef SURE
#define SURE 0
#endif
#ifndef USUAL
#define USUAL 4
#endif
#ifndef ONE
#define ONE 0
#endif
#ifndef HALVES
#define HALVES 1     // of 64 rows
#endif
#ifndef THREADS
#define THREADS 256  // 256: two blocks per multiprocessor; 512: one
#endif
#ifndef SLOTS
#define SLOTS 3      // of each part's ring
#endif
#ifndef SHARED_BASE
#define SHARED_BASE 1024
#endif

constexpr int WARPS = THREADS / 32, TILE = 64 * HALVES, PARTS = WARPS / 4 / HALVES;  // of the columns
constexpr int ROWS_PER_WARP = 32 / LANES, CODES = 4 * WORDS, BLOCK = LANES * WORDS;
constexpr u32 SLOT_BYTES = 8 * THREADS, RING_BYTES = PARTS * SLOTS * SLOT_BYTES;
constexpr u32 BARRIERS = SHARED_BASE + RING_BYTES;  // a full and an empty one for each slot
constexpr u32 DIGITS = BARRIERS + (16 * PARTS * SLOTS + 127) / 128 * 128;
constexpr u32 PARTIAL_PITCH = TILE + 4;  // floats; rows of a fragment lie in different banks

extern __shared__ __align__(128) u8 shared[];  // ring or table, barriers, digits

#if NZ > 3
typedef uint2 Entry;
constexpr u32 ENTRY_BYTES = 8;
#else
typedef u32 Entry;
constexpr u32 ENTRY_BYTES = 4;
#endif
constexpr u32 COPIES = 16 / ENTRY_BYTES;
constexpr u32 TABLE_BYTES = 512 * ENTRY_BYTES * COPIES;
static_assert(TABLE_BYTES <= RING_BYTES, "the table has room where the ring will be");
__device__ __forceinline__ u32 entry_word(const Entry& e, int z) {
#if NZ > 3
  return z < 4 ? e.x : e.y;
#else
  return e;
#endif
}
__device__ __forceinline__ u32 last_word_of(const Entry& e) { return entry_word(e, 7); }
constexpr u32 NOTHING = 0xff000000u;  // in an entry's last word: no nonzero

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

// A nonzero at bit `at` of the tile.
__device__ __forceinline__ void put_digit(u32 at, bool there) {
  asm volatile("{.reg .pred p; setp.ne.u32 p,%2,0; @p red.shared.or.b32 [%0+%3],%1;}"
               :: "r"(at >> 3 & ~3u), "r"(1u << (at & 31)), "r"((u32)there), "n"(DIGITS) : "memory");
}

__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
  asm volatile("{.reg .pred p;\n"
               "again: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n"
               "@!p bra again;}" :: "r"(barrier), "r"(parity) : "memory");
}

// Where a part is in its ring, over all tiles: its next slot's full barrier (the empty one stands EMPTY further), how often it has
// been round, and the slot as an operand of wgmma.
constexpr u32 EMPTY = 8 * SLOTS;
struct Place {
  u32 full, parity, operand, first;
  __device__ __forceinline__ explicit Place(int part)
      : full(BARRIERS + part * 2 * EMPTY), parity(0), operand((SHARED_BASE + part * SLOTS * SLOT_BYTES) / 16), first(full) {}
  __device__ __forceinline__ void next() {
    full += 8;
    operand += SLOT_BYTES / 16;
    if (full == first + EMPTY) {
      full = first;
      operand -= SLOTS * SLOT_BYTES / 16;
      parity ^= 1;
    }
  }
};

// Order a stage of x into a slot.
__device__ __forceinline__ void order(const Place& place, const u8* from, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" :: "r"(place.full), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];"
               :: "r"(place.operand * 16), "l"(from), "r"(bytes), "r"(place.full) : "memory");
}

// How many of the 16-column steps one stage holds, for so many tokens.
template <int TOKENS> struct Stage {
  static constexpr int FIT = SLOT_BYTES / 32 / TOKENS, STEPS = FIT < 4 ? FIT : 4;
};

// Bring share `i` of n of the bytes into the L2 cache: the blocks that have an item's tiles do it together, while they decode.
__device__ __forceinline__ void prefetch_share(const u8* from, u32 bytes, u32 i, u32 n) {
  const u32 share = (bytes / n + 1023) & ~1023u, begin = i * share;
  for (u32 at = begin; at < min(bytes, begin + share); at += 16384)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" :: "l"(from + at), "r"(min(16384u, min(bytes, begin + share) - at)));
}

#if X_F16
#define TYPES "f32.f16.f16"
#else
#define TYPES "f32.bf16.bf16"
#endif
#define F(i) "+f"(c[i])
#define F4(i) F(i), F(i + 1), F(i + 2), F(i + 3)
#define F8(i) F4(i), F4(i + 4)
#define F16(i) F8(i), F8(i + 8)
#define F32(i) F16(i), F16(i + 16)
#define A_AND_B "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
#define L8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h

// c += a * b: 64 rows x 16 columns by 16 columns x N tokens.
template <int N> __device__ __forceinline__ void wgmma(float* c, const u32* a, u64 b);
template <> __device__ __forceinline__ void wgmma<16>(float* c, const u32* a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k16." TYPES " {" L8(0, 1, 2, 3, 4, 5, 6, 7) "},"
               "{%8,%9,%10,%11},%12,1,1,1,0;" : F8(0) : A_AND_B);
}
template <> __device__ __forceinline__ void wgmma<32>(float* c, const u32* a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n32k16." TYPES " {" L8(0, 1, 2, 3, 4, 5, 6, 7) "," L8(8, 9, 10, 11, 12, 13, 14, 15)
               "},{%16,%17,%18,%19},%20,1,1,1,0;" : F16(0) : A_AND_B);
}
template <> __device__ __forceinline__ void wgmma<64>(float* c, const u32* a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." TYPES " {" L8(0, 1, 2, 3, 4, 5, 6, 7) "," L8(8, 9, 10, 11, 12, 13, 14, 15)
               "," L8(16, 17, 18, 19, 20, 21, 22, 23) "," L8(24, 25, 26, 27, 28, 29, 30, 31)
               "},{%32,%33,%34,%35},%36,1,1,1,0;" : F32(0) : A_AND_B);
}
// __byte_perm without its mask: the selector's nibbles are below 7.
__device__ __forceinline__ u32 permute(u32 low, u32 high, u32 select) {
  u32 v;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(v) : "r"(low), "r"(high), "r"(select));
  return v;
}

// The weights of step `step` (0 to 3) out of a word of 16 digits: digits step, step + 4 to `one`, step + 8, step + 12 to `two`.
__device__ __forceinline__ void make_pairs(u32 word, int step, u32 low, u32 high, u32& one, u32& two) {
  const u32 four = word >> (2 * step) & 0x03030303u, select = four * 0x31u;  // digit d: bytes d and 3 d of the two
  one = permute(low, high, select);
  two = permute(low, high, select >> 16);
}

// What the output of a tile needs.
struct Output {
  u16* y;
  i64 y_stride;
  const int* tokens;
  int n_tokens, first, rows;
  Epilogue epilogue;
};

// The product of a decoded tile with up to TOKENS tokens, in 8 * octets slots.  low, high: levels of this lane's two rows, as
// `permute` takes them.
template <int TOKENS> __device__ __forceinline__ void multiply(const u32* low, const u32* high, int warp, const u8* x, int octets,
                                                               int blocks, int pitch, Place& place, const Output& out) {
  constexpr int STEPS = Stage<TOKENS>::STEPS, STAGES = 4 / STEPS;  // of a block
  constexpr int GROUP = STEPS > 2 ? 2 : STEPS;  // steps whose products are queued together
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int group = warp >> 2, part = group / HALVES, row = 64 * (group % HALVES) + 16 * (warp & 3) + g;
  const u32 step_bytes = octets * 256, bytes = step_bytes * STEPS;
  const int n = (blocks - part + PARTS - 1) / PARTS * STAGES;  // stages of this part
  // One thread of each part orders the stages, SLOTS ahead.
  const bool orders = warp % (WARPS / PARTS) == 0 && lane == 0;
  const u8* from = x + part * 4 * step_bytes;
  int ordered = 0;
  auto order_next = [&](const Place& to) {
    order(to, from, bytes);
    ordered++;
    from += bytes;
    if (PARTS > 1 && ordered % STAGES == 0) from += (PARTS - 1) * 4 * step_bytes;  // the next of this part's blocks
  };
  if (orders) {
    Place to = place;
    for (int i = 0; i < min((int)SLOTS, n); i++, to.next()) order_next(to);
  }
  const u32* digits = (const u32*)(shared + (DIGITS - SHARED_BASE)) + row * pitch + t + 4 * part;
  // Blocks of 8 tokens by 8 columns: 128 bytes apart along the tokens, octets * 128 along the columns.
  const u64 layout = (u64)8 << 32 | (octets * 8) << 16;
  float c[TOKENS / 2];
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) c[i] = 0.f;
  u32 a[2][GROUP][4];
  Place before = place;
  auto give_back = [&]() {  // a stage that this warp has read
    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" :: "r"(before.full + EMPTY) : "memory");
    if (orders && ordered < n) {
      wait_barrier(before.full + EMPTY, before.parity);
      order_next(before);
    }
  };
  for (int stage = 0; stage < n; stage += STAGES) {
    const u32 word[2] = {digits[0], digits[8 * pitch]};
    digits += 4 * PARTS;
#pragma unroll
    for (int s = 0; s < 4; s += GROUP) {
      u32(*const here)[4] = a[s / GROUP & 1];
#pragma unroll
      for (int k = 0; k < GROUP; k++)
#pragma unroll
        for (int i = 0; i < 2; i++) make_pairs(word[i], s + k, low[i], high[i], here[k][i], here[k][2 + i]);
      if (s % STEPS == 0) wait_barrier(place.full, place.parity);
      u64 b[GROUP];
#pragma unroll
      for (int k = 0; k < GROUP; k++) {
        b[k] = layout | (place.operand + (s % STEPS + k) * (step_bytes / 16));
        // Nothing of this may move in among the products: ptxas would then wait for each.
        asm volatile("" : "+r"(here[k][0]), "+r"(here[k][1]), "+r"(here[k][2]), "+r"(here[k][3]), "+l"(b[k]));
      }
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < GROUP; k++) wgmma<TOKENS>(c, here[k], b[k]);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (s % STEPS == 0 && (s || stage)) give_back();
      if (s % STEPS == STEPS - GROUP) {
        before = place;
        place.next();
      }
    }
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) asm volatile("" : "+f"(c[i]) :: "memory");
  if (n) give_back();

  float* const partial = (float*)(shared + (DIGITS - SHARED_BASE));  // [token][row]
  __syncthreads();  // all digits are read
#pragma unroll
  for (int p = PARTS - 1; p >= 0; p--) {
    if (part == p) {
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++) {
        const int token = i / 4 * 8 + 2 * t + (i & 1);
        float* const to = partial + token * PARTIAL_PITCH + row + 8 * (i >> 1 & 1);
        *to = p == PARTS - 1 ? c[i] : *to + c[i];
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < out.n_tokens * TILE; i += THREADS) {
    const int n = i / TILE, r = i % TILE;
    if (out.first + r >= out.rows) continue;
    const int token = out.tokens[n];
    out.y[token * out.y_stride + out.first + r] = out.epilogue(partial[n * PARTIAL_PITCH + r], token);
  }
}

// The rows of a tile.
struct Rows {
  const u32* words_of;
  const u32* starts;
  int first, rows, cols, pitch;
  u32 T;
};

// Codewords that are on their way: of the rows a warp decodes now, and the places of those it decodes next.
struct Ahead { u32 word[WORDS], at, n, at1, n1; };

struct Decoder {
  const Rows& rows;
  int lane, warp, j, group;
  __device__ __forceinline__ Decoder(const Rows& r) : rows(r) {
    lane = threadIdx.x & 31;
    warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0);
    j = lane % LANES;
    group = lane / LANES;
  }
  __device__ __forceinline__ int row_of(int turn) const { return rows.first + (turn * WARPS + warp) * ROWS_PER_WARP + group; }
  // Beyond the last row there are no words.
  __device__ __forceinline__ void row_words(int turn, u32& at, u32& n) const {
    const int row = row_of(turn), r = min(row, rows.rows - 1);
    at = __ldg(rows.starts + r);
    n = row < rows.rows ? __ldg(rows.starts + r + 1) - at : 0;
  }
  // The buffer has BLOCK words after its last row, so all but the last two loads need no bound.
  __device__ __forceinline__ void load(Ahead& ahead, u32 at, u32 n) const {
    const u32* from = rows.words_of + at + j;
#pragma unroll
    for (int i = 0; i < WORDS; i++) ahead.word[i] = i < WORDS - 2 || i * LANES + j < (int)n ? __ldg(from + i * LANES) : 0u;
  }
  __device__ __forceinline__ void start(Ahead& ahead) const {
    row_words(0, ahead.at, ahead.n);
    row_words(1, ahead.at1, ahead.n1);
    load(ahead, ahead.at, ahead.n);
  }

  __device__ __forceinline__ void run(Ahead& ahead) const {
    // As gather.cu: T in 1..128: c >= T where the top bit of c or of (c & 127) + 128 - T is set; T in 129..256: where both
    // are, with 256 - T.  Both are the majority with `either`.
    const u32 either = rows.T <= 128 ? ~0u : 0u, add = ((rows.T <= 128 ? 128u : 256u) - rows.T) * 0x01010101u;
    const u32 copy = (lane % COPIES) * (8 * ENTRY_BYTES) * 0x01010101u;
    constexpr int ROWS_PER_TURN = WARPS * ROWS_PER_WARP;
#pragma unroll 1
    for (int turn = 0; turn < (TILE + ROWS_PER_TURN - 1) / ROWS_PER_TURN; turn++) {
      const int row = row_of(turn) - rows.first;
      const u32 origin = row * rows.pitch * 32, limit = row < TILE ? origin + 2 * rows.cols : 0;  // nothing beyond the tile
      u32 at = ahead.at, left = ahead.n, carry = 0, position = origin, at2, n2;
      row_words(turn + 2, at2, n2);
      bool last;
      do {
        u32 w[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i++) w[i] = ahead.word[i];
        const u32 here = ONE ? left : min(left, (u32)BLOCK);
        const int mine = (here + LANES - 1 - j) / LANES;
        int most = (here + LANES - 1) / LANES;
        if (ROWS_PER_WARP > 1) most = __reduce_max_sync(FULL_WARP, most);
        left -= here;
        at += here;
        last = ONE || (ROWS_PER_WARP > 1 ? !__any_sync(FULL_WARP, left > 0) : left == 0);
        if (last) load(ahead, ahead.at1, ahead.n1); else load(ahead, at, left);

        u32 last_word = w[0];
#pragma unroll
        for (int i = 1; i < WORDS; i++) last_word = mine > i ? w[i] : last_word;
        u32 before = __shfl_up_sync(FULL_WARP, last_word, 1, LANES);
        if (j == 0) before = carry;
        Entry entry[CODES];
        u32 length = 0;
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
          if (i >= USUAL && i >= most) break;
          const u32 previous = __funnelshift_l(i ? w[i - 1] : before, w[i], 8);
          const u32 sum = (previous & 0x7f7f7f7fu) + add;
          const u32 second = (sum & previous) | ((sum | previous) & either);
          const u32 low = (second & 0x80808080u) | copy;
          // eight times an offset into the table: the codeword, then its state, then the copy
          const u32 two[2] = {__byte_perm(w[i], low, 0x1504), __byte_perm(w[i], low, 0x3726)};
          const bool there = i < mine;
#pragma unroll
          for (int k = 0; k < 4; k++) {
            Entry e = load_entry(k & 1 ? two[k >> 1] >> 19 : two[k >> 1] >> 3 & 0x1fffu);
#if NZ > 3
            if (i >= SURE && !there) e = make_uint2(0, NOTHING);
#else
            if (i >= SURE && !there) e = NOTHING;
#endif
            entry[4 * i + k] = e;
            length = __dp4a(entry_word(e, 0), 1u, length);
          }
        }
        u32 end = length;
#pragma unroll
        for (int s = 1; s < LANES; s <<= 1) end = scan_step(end, s);
        u32 base = position + end - length;
        if (!last) {
          position += __shfl_sync(FULL_WARP, end, LANES - 1, LANES);
          carry = __shfl_sync(FULL_WARP, last_word, LANES - 1, LANES);
        }
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
          if (i >= USUAL && i >= most) break;
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const Entry e = entry[4 * i + k];
            const bool some = base < limit && last_word_of(e) < NOTHING;  // padding codewords stand beyond the row
#pragma unroll
            for (int z = 1; z <= NZ; z++) put_digit(__dp4a(entry_word(e, z), 1u << (8 * (z & 3)), base), some);
            base = __dp4a(entry_word(e, 0), 1u, base);
          }
        }
      } while (!last);
      ahead.at = ahead.at1;
      ahead.n = ahead.n1;
      ahead.at1 = at2;
      ahead.n1 = n2;
    }
  }
};

// item_first, item_count: the places of an item's tokens in slot_token (route.cu); x as arrange.cu leaves it.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
matmul_tile(const u32* codes, const u64* expert_start, const u32* row_start, const u32* levels, const u8* dictionary,
            const u32* threshold, const u8* x, u16* y, i64 y_stride, const float* scale, int relu, int rows, int cols,
            const Entry* tables, const int* n_items, const int* item_expert, const int* item_first, const int* item_count,
            const int* slot_token, int pitch) {
  if ((u32)__cvta_generic_to_shared(shared) != SHARED_BASE) __trap();
  const int warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0);  // known to be the same in all lanes
  const int g = threadIdx.x >> 2 & 7, tiles = (rows + TILE - 1) / TILE, blocks = (cols + 63) / 64;
  const u32 total = (u32)tiles * *n_items;
  if (threadIdx.x < 2 * PARTS * SLOTS) {
    const u32 arrivals = threadIdx.x / SLOTS % 2 ? WARPS / PARTS : 1;
    asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" :: "r"(BARRIERS + 8 * threadIdx.x), "r"(arrivals) : "memory");
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  Place place((warp >> 2) / HALVES);

  for (u32 unit = blockIdx.x; unit < total; unit += gridDim.x) {
    const u32 item = unit / tiles;
    const int first = (int)(unit - item * tiles) * TILE;
    const int expert = item_expert[item], d = dictionary[expert];
    const int slot = item_first[item], n_tokens = item_count[item], octets = (n_tokens + 7) / 8;
    const u8* const x_of = x + (u64)slot * blocks * 128;
    if (threadIdx.x == 0) prefetch_share(x_of, octets * 1024 * blocks, unit - item * tiles, tiles);
    const Rows r{codes + expert_start[expert], row_start + (u64)expert * (rows + 1), first, rows, cols, pitch, threshold[d]};
    const Decoder decoder(r);
    Ahead ahead;
    decoder.start(ahead);
    __syncthreads();  // the last tile's readers are done
    uint4* const digits = (uint4*)(shared + (DIGITS - SHARED_BASE));
    for (int i = threadIdx.x; i < TILE * pitch / 4; i += THREADS) digits[i] = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; i < (int)(TABLE_BYTES / 16); i += THREADS) {
      const Entry e = __ldg(tables + 512 * d + i);
#if NZ > 3
      ((uint4*)shared)[i] = make_uint4(e.x, e.y, e.x, e.y);
#else
      ((uint4*)shared)[i] = make_uint4(e, e, e, e);
#endif
    }
    __syncthreads();
    decoder.run(ahead);
    u32 low[2], high[2];  // zero, first bytes of the low and the high level, second byte of the low one; in byte 2 that of the high
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = first + 64 * ((warp >> 2) % HALVES) + 16 * (warp & 3) + 8 * i + g;
      const u32 pair = row < rows ? __ldg(levels + (u64)expert * rows + row) : 0u;
      low[i] = (pair << 8 & 0xff00u) | (pair & 0xff0000u) | (pair << 16 & 0xff000000u);
      high[i] = pair >> 8 & 0xff0000u;
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the ring is written where the table was read
    __syncthreads();
    const Output out{y, y_stride, slot_token + slot, n_tokens, first, rows, Epilogue{scale, relu}};
    if (octets <= 2) multiply<16>(low, high, warp, x_of, octets, blocks, pitch, place, out);
    else if (octets <= 4) multiply<32>(low, high, warp, x_of, octets, blocks, pitch, place, out);
    else multiply<64>(low, high, warp, x_of, octets, blocks, pitch, place, out);
  }
}
