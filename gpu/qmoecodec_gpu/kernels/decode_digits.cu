// Decoding of the experts of large items to two-bit digits, or of experts to digits of a byte or 16-bit weights (OUT_BYTES), for 8-bit
// dictionaries, layout "words" (common.cuh).
//
// Of the i-th expert, `out` holds for each block of 64 columns, for each row, 16 bytes: 0, 1 for -, 2 for +, in two bits each.
// Column 16 s + 8 h + 2 q + l of the block (s, q = 0..3; h, l = 0, 1) stands from bit 8 (2 h + l) + 2 s of word q on, as
// multiply_digits.cu takes it.  The number of rows is rounded up to a multiple of 64; what is there beyond the last row is
// undefined.  Columns beyond the row are 0, 1 or 2.
// OUT_BYTES: out[i][row][column], of 1 byte the digits -1, 0, +1, of 2 the levels, rounded to X_F16's type.
//
// Naively, for each row: for each codeword: for each (offset, sign) of its phrase: out[..][position + offset] = sign.
//
// Optimisations:
//  1. Decoding is that of gather.cu (items 1, 2 and 4 there), with COPIES copies of the table.  Columns are counted in bits of a
//     row's digits, two per digit: the position of a nonzero, made by one dp4a, is at once its address in shared memory and,
//     shifted into 1, its value.  An entry with fewer nonzeros than places repeats its last one, which an or forgives.  With two
//     places a mark says whether there is a first and a second one; a missing one is a 0, or'ed like a 1.
//  2. A warp has ROWS rows to itself: it decodes them into its part of shared memory, in the columns' own order, then moves them
//     out, 16 bytes of each row side by side, in the order above, clearing behind it.  Warps wait for each other only when the
//     dictionary changes, so some decode, which keeps shared memory busy, while others wait for codewords or move digits.
//  3. While a row is decoded, the next row's codewords are on their way; the next tile's first while this one's digits leave.
//  4. Where there is one dictionary, its table is filled while the kernel before ends.
//
// Trusts what gather.cu trusts.
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
#ifndef WARPS
#define WARPS 8
#endif
#ifndef COPIES
#define COPIES 4     // of the table: 4, 8 or 16
#endif
#ifndef ROWS
#define ROWS 8       // of a warp at a time: 8, 4, 2 or 1, and 32 / LANES at least
#endif
#ifndef RESIDENT
#define RESIDENT 2   // blocks that a multiprocessor has at a time
#endif
#ifndef OUT_BYTES
#define OUT_BYTES 0
#endif
#ifndef SHARED_BASE
#define SHARED_BASE 1024
#endif

constexpr int TILE = ROWS * WARPS;  // rows of a block
constexpr int ROWS_PER_TURN = 32 / LANES, TURNS = ROWS / ROWS_PER_TURN, CODES = 4 * WORDS, BLOCK = LANES * WORDS;
static_assert(ROWS % ROWS_PER_TURN == 0, "whole turns");

#include "entries.cuh"
constexpr u32 TABLE_BYTES = 512 * ENTRY_BYTES * COPIES, DIGITS = SHARED_BASE + TABLE_BYTES;
// A codeword, its state and the copy make 16 bits: this shift makes them an offset into the table.
constexpr int SHIFT = COPIES * ENTRY_BYTES == 16 ? 3 : COPIES * ENTRY_BYTES == 32 ? 2 : COPIES * ENTRY_BYTES == 64 ? 1 : 0;
static_assert(COPIES * ENTRY_BYTES << SHIFT == 128, "an entry's copies take 16, 32, 64 or 128 bytes");

extern __shared__ __align__(128) u8 shared[];  // table, digits

__device__ __forceinline__ u32 last_word_of(const Entry& e) { return entry_word(e, 7); }
#if NZ == 2
constexpr u32 NOTHING = 0, FIRST = 0x80000000u, SECOND = 0x01000000u;  // marks in the free byte: there is a first, a second nonzero
#else
constexpr u32 NOTHING = 0xff000000u;  // in an entry's last word: no nonzero
#endif

#include "scatter.cuh"

// Codewords that are on their way: of the rows a warp decodes now, and the places of those it decodes next.
struct Ahead { u32 word[WORDS], at, n, at1, n1; };

// A warp's rows of one item.
struct Decoder {
  const u32* words_of;
  const u32* starts;
  int first, rows, lane, j, group;
  u32 T;      // threshold
  bool some;  // there is a row

  // Beyond the last row it is decoded again, for nobody.
  __device__ __forceinline__ void row_words(int turn, u32& at, u32& n) const {
    const int row = min(first + turn * ROWS_PER_TURN + group, rows - 1);
    at = __ldg(starts + row);
    n = __ldg(starts + row + 1) - at;
  }
  // The buffer has BLOCK words after its last row, so all but the last two loads need no bound.
  __device__ __forceinline__ void load(Ahead& ahead, u32 at, u32 n) const {
    const u32* from = words_of + at + j;
#pragma unroll
    for (int i = 0; i < WORDS; i++) ahead.word[i] = i < WORDS - 2 || i * LANES + j < (int)n ? __ldg(from + i * LANES) : 0u;
  }
  __device__ __forceinline__ void start(Ahead& ahead) const {
    row_words(0, ahead.at, ahead.n);
    ahead.at1 = ahead.n1 = 0;
    if (TURNS > 1) row_words(1, ahead.at1, ahead.n1);
    load(ahead, ahead.at, ahead.n);
  }

  // own: where this warp's digits stand, in bits from DIGITS; row_bits from one row to the next.
  __device__ __forceinline__ void run(Ahead& ahead, u32 own, u32 row_bits) const {
    const Threshold threshold(T);
    const u32 copy = (lane % COPIES) * (ENTRY_BYTES << SHIFT) * 0x01010101u;
#pragma unroll 1
    for (int turn = 0; turn < TURNS; turn++) {
      const int local = turn * ROWS_PER_TURN + group;
      const u32 origin = own + local * row_bits;
      u32 at = ahead.at, left = ahead.n, carry = 0, position = origin, at2 = 0, n2 = 0;
      if (turn + 2 < TURNS) row_words(turn + 2, at2, n2);
      bool last;
      do {
        u32 w[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i++) w[i] = ahead.word[i];
        const u32 here = ONE ? left : min(left, (u32)BLOCK);
        const int mine = (here + LANES - 1 - j) / LANES;
        int most = (here + LANES - 1) / LANES;
        if (ROWS_PER_TURN > 1) most = __reduce_max_sync(FULL_WARP, most);
        left -= here;
        at += here;
        last = ONE || (ROWS_PER_TURN > 1 ? !__any_sync(FULL_WARP, left > 0) : left == 0);
        if (!last) load(ahead, at, left);
        else if (turn + 1 < TURNS) load(ahead, ahead.at1, ahead.n1);

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
          u32 two[2];
          find_entries(w[i], i ? w[i - 1] : before, threshold, copy, two);
          const bool there = i < mine;
#pragma unroll
          for (int k = 0; k < 4; k++) {
            Entry e = load_entry(k & 1 ? two[k >> 1] >> (16 + SHIFT) : two[k >> 1] >> SHIFT & 0xffffu >> SHIFT);
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
#if NZ == 2
            put_bit(__dp4a(e, 1u << 8, base), e >> 31);
            put_bit(__dp4a(e, 1u << 16, base), e >> 24 & 1);
#else
            const bool some = last_word_of(e) < NOTHING;
#pragma unroll
            for (int z = 1; z <= NZ; z++) put_digit(__dp4a(entry_word(e, z), 1u << (8 * (z & 3)), base), some);
#endif
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

// a's bits where `mask` is 1, b's where it is 0.
__device__ __forceinline__ u32 choose(u32 mask, u32 a, u32 b) { return (a & mask) | (b & ~mask); }

// 64 digits, word s of columns 16 s and on, into the order of `out`.  By place, 16 h + 4 q + 2 l: the other digit of each pair
// changes places with the next word's, each other nibble with the next but one's; then bytes are put in line.
__device__ __forceinline__ uint4 in_order(const uint4& v) {
  constexpr u32 PAIRS = 0x33333333u, NIBBLES = 0x0f0f0f0fu;
  const u32 even0 = choose(PAIRS, v.x, v.y << 2), odd0 = choose(PAIRS, v.x >> 2, v.y);
  const u32 even1 = choose(PAIRS, v.z, v.w << 2), odd1 = choose(PAIRS, v.z >> 2, v.w);
  const u32 even02 = choose(NIBBLES, even0, even1 << 4), even13 = choose(NIBBLES, even0 >> 4, even1);  // of words q = 0, 2 and 1, 3
  const u32 odd02 = choose(NIBBLES, odd0, odd1 << 4), odd13 = choose(NIBBLES, odd0 >> 4, odd1);
  return make_uint4(__byte_perm(even02, odd02, 0x6240), __byte_perm(even13, odd13, 0x6240), __byte_perm(even02, odd02, 0x7351),
                    __byte_perm(even13, odd13, 0x7351));
}

#if OUT_BYTES
// Four digits of two bits, one in each byte.
__device__ __forceinline__ u32 in_bytes(u32 digits) { return ((digits & 0xffu) * 0x1001u & 0x000f000fu) * 0x41u & 0x03030303u; }

// The levels of a row, where they are asked for.
__device__ __forceinline__ LevelBytes read_level_bytes(const void* levels, u64 row) {
#if OUT_BYTES == 2
  const Levels level = read_levels(levels, row);
  return LevelBytes(float_to_half(level.low, X_F16) | (u32)float_to_half(level.high, X_F16) << 16);
#else
  return LevelBytes(0);
#endif
}

// 16 bytes of output from digits, the first ones' in the lowest bits.
__device__ __forceinline__ uint4 to_output(u32 digits, const LevelBytes& level) {
  u32 out[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if OUT_BYTES == 2
    const u32 select = in_bytes(digits >> (8 * (i / 2))) * 0x31u;
    out[i] = __byte_perm(level.low, level.high, i % 2 ? select >> 16 : select);
#else
    const u32 four = in_bytes(digits >> (8 * i));
    out[i] = (four >> 1 & 0x01010101u) | (four & 0x01010101u) * 0xffu;
#endif
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// Write n rows of a warp to `out`, where the first of them begins.  digits: theirs, in the columns' own order; level_row: where the
// levels of the first stand.
__device__ __forceinline__ void write_rows(const u32* digits, int pitch, const void* levels, u64 level_row, int n, int cols, u8* out) {
  constexpr int EACH = 16 / OUT_BYTES;
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int r = 0; r < n; r++, digits += pitch, out += (u64)cols * OUT_BYTES) {
    const LevelBytes level = read_level_bytes(levels, level_row + r);
    auto from = [&](int column) {
      const int word = column / 16;
      return __funnelshift_r(digits[word], digits[min(word + 1, pitch - 1)], 2 * (column % 16));
    };
    // What lies before the first 16-byte boundary of memory and behind the last one leaves one by one.
    const int head = min(cols, (int)((0 - (u64)out) % 16) / OUT_BYTES), whole = (cols - head) / EACH, tail = head + whole * EACH;
    uint4* const to = (uint4*)(out + head * OUT_BYTES);
#pragma unroll 4
    for (int i = lane; i < whole; i += 32) to[i] = to_output(from(head + EACH * i), level);
    const int edge = lane < head ? lane : tail + lane - head;
    if (edge < cols) {
      const u32 one = to_output(from(edge), level).x;
      if (OUT_BYTES == 2) ((u16*)out)[edge] = (u16)one;
      else out[edge] = (u8)one;
    }
  }
}
#endif

// For each part of at_once items, one block: list its experts, each once, in any order, from listed[part * at_once] on,
// n_listed[part] of them; slot[i]: the place of item i's expert in that list.  place: [parts][n_experts], for this kernel alone.
extern "C" __global__ void __launch_bounds__(512) list_experts(const int* n_items, const int* item_expert, int at_once, int n_experts,
                                                               int* n_listed, int* listed, int* slot, int* place) {
  wait_for_previous();
  const int first = blockIdx.x * at_once, n = min(*n_items - first, at_once);
  item_expert += first;
  listed += first;
  slot += first;
  place += (u64)blockIdx.x * n_experts;
  for (int i = threadIdx.x; i < n; i += 512) place[item_expert[i]] = -1;
  if (threadIdx.x == 0) n_listed[blockIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += 512) {
    const int expert = item_expert[i];
    if (atomicCAS(place + expert, -1, -2) == -1) {
      const int at = atomicAdd(n_listed + blockIdx.x, 1);
      listed[at] = expert;
      place[expert] = at;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += 512) slot[i] = place[item_expert[i]];
}

// Experts first to first + most - 1 of the list, as far as there are; without a list, those of these numbers.  pitch: words of digits
// per row in shared memory, with room for four phrases beyond the row (the last one, and three padding codewords), and an odd multiple
// of 4, so that eight rows lie in different banks.  dictionaries: how many there are.  zero: n_zero numbers that become 0, for the
// kernel behind.
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
decode_digits(const u32* codes, const u64* expert_start, const u32* row_start, const u8* dictionary, const u32* threshold,
              const Entry* tables, const void* levels, const int* n_listed, const int* listed, int first, int most, u8* out, int rows,
              int cols, int pitch, int dictionaries, int* zero, int n_zero) {
  if ((u32)__cvta_generic_to_shared(shared) != SHARED_BASE) __trap();
  const int lane = threadIdx.x & 31, warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0);  // known to be the same in all lanes
  const int tiles = (rows + TILE - 1) / TILE;
  const u32 own = warp * ROWS * pitch;
  u32* const digits = (u32*)(shared + TABLE_BYTES) + own;
  for (int i = lane; i < ROWS * pitch / 4; i += 32) ((uint4*)digits)[i] = make_uint4(0, 0, 0, 0);
  int known = -1;  // the dictionary whose table is there
  auto fill = [&](int d) {
    __syncthreads();  // nobody reads the old one
    for (int i = threadIdx.x; i < 512; i += 32 * WARPS) {
      Entry e = __ldg(tables + 512 * d + i);
#if NZ == 2
      if (e >> 24) e &= 0xffu;
      else e |= (e >> 8 & 0xffu) == (e >> 16 & 0xffu) ? FIRST : FIRST | SECOND;
#endif
#pragma unroll
      for (int k = 0; k < (int)(COPIES * ENTRY_BYTES / 16); k++)
#if NZ > 3
        ((uint4*)shared)[i * (COPIES / 2) + k] = make_uint4(e.x, e.y, e.x, e.y);
#else
        ((uint4*)shared)[i * (COPIES / 4) + k] = make_uint4(e, e, e, e);
#endif
    }
    __syncthreads();
    known = d;
  };
  if (dictionaries == 1) fill(0);
  wait_for_previous();
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < n_zero; i += 32 * WARPS) zero[i] = 0;
  const u32 total = (u32)tiles * max(0, n_listed ? min(*n_listed - first, most) : most);
  __syncwarp();

  Ahead ahead;
  auto expert_of = [&](u32 item) { return listed ? listed[first + item] : first + (int)item; };
  auto decoder_of = [&](u32 unit, int& d, u32& item) {
    item = unit / tiles;
    const int expert = expert_of(item), row = (int)(unit - item * tiles) * TILE + warp * ROWS;
    d = dictionary[expert];
    return Decoder{codes + expert_start[expert], row_start + (u64)expert * (rows + 1), row, rows, lane, lane % LANES, lane / LANES,
                   threshold[d], row < rows};
  };
  u32 item, next_item;
  int d, next_d;
  Decoder decoder, next;
  if (blockIdx.x < total) {
    decoder = decoder_of(blockIdx.x, d, item);
    if (decoder.some) decoder.start(ahead);
  }
  for (u32 unit = blockIdx.x; unit < total; unit += gridDim.x) {
    if (d != known) fill(d);
    const bool more = unit + gridDim.x < total;
    if (more) next = decoder_of(unit + gridDim.x, next_d, next_item);
    if (decoder.some) decoder.run(ahead, own * 32, pitch * 32);
    __syncwarp();
    if (more && next.some) next.start(ahead);
#if OUT_BYTES
    if (decoder.some) {
      const u64 at = ((u64)item * rows + decoder.first) * cols * OUT_BYTES;
      write_rows(digits, pitch, levels, (u64)expert_of(item) * rows + decoder.first, min(ROWS, rows - decoder.first), cols, out + at);
      __syncwarp();
      for (int i = lane; i < ROWS * pitch / 4; i += 32) ((uint4*)digits)[i] = make_uint4(0, 0, 0, 0);
    }
#else
    if (decoder.some) {
      constexpr int ABREAST = 32 / ROWS;  // blocks of columns that leave at a time
      const int blocks = (cols + 63) / 64, padded = (rows + 63) / 64 * 64, local = lane % ROWS, ahead_of = lane / ROWS;
      uint4* from = (uint4*)(digits + local * pitch) + ahead_of;
      uint4* to = (uint4*)out + ((u64)item * blocks + ahead_of) * padded + decoder.first + local;
#pragma unroll 4
      for (int block = ahead_of; block < blocks; block += ABREAST) {
        const uint4 v = *from;
        *from = make_uint4(0, 0, 0, 0);
        *to = in_order(v);
        from += ABREAST;
        to += ABREAST * padded;
      }
      for (int i = 4 * blocks + ahead_of; i < pitch; i += ABREAST) digits[local * pitch + i] = 0;  // what padding codewords left
    }
#endif
    __syncwarp();
    decoder = next;
    d = next_d;
    item = next_item;
  }
}
