// One token class of the gather kernel: TOK tokens per item.  gather.cu includes this once per class, in a namespace, with
// TOK and SEGMENTED defined.

// x in shared memory.  A column is `COLUMN` bytes further in natural order; in segmented order a step of one column goes
// one row of 32 slots further.  Byte 0 of an entry is SCALE * length, byte z SCALE * offset + flags (tables.py).
#if TOK == 1
constexpr u32 PLANES = SEGMENTED ? 3 : 2, SCALE = PLANES, SLOT = 4, COLUMN = SEGMENTED ? 128 * PLANES : 4 * PLANES;
#else
constexpr u32 SCALE = 4, SLOT = 2 * TOK, COLUMN = SEGMENTED ? 32 * SLOT : SLOT;
#endif
constexpr u32 WEIGHT = COLUMN / SCALE;  // of an entry's byte in an address
static_assert(WEIGHT * SCALE == COLUMN && WEIGHT < 256, "a byte times WEIGHT is an address");

// The entry of no codeword: length 0, every nonzero missing.  Missing is plane 2, the top bit, or bit 1 (tables.py).
constexpr u32 MISSING = TOK > 1 ? 0x02020202u : SEGMENTED ? 0x02020202u : 0x80808080u;
constexpr u32 X_BASE = SHARED_BASE + TABLE_BYTES;

// Fill x, by loads that see what the kernel before wrote (not __ldg).  Segmented: slot c of row `row` holds column
// (c % LANES) * segment + row, in rows 0 .. segment + overlap - 1.
// `ahead`: the first 16 bytes per thread of one token's x, where `aligned`.
__device__ __forceinline__ void fill_x(u8* at, const u16* x, i64 x_stride, const int* tokens, int cols, int segment,
                                       int overlap, int natural_columns, bool aligned, const uint4& ahead) {
#if TOK == 1
  const u16* from = x + tokens[0] * x_stride;
#if SEGMENTED
  // Staged, so that global reads coalesce; an odd `segment` keeps the transposed reads free of bank conflicts.
  u16* raw = (u16*)(at + (segment + overlap) * COLUMN);
  if (aligned) {
    if (threadIdx.x < cols / 8) ((uint4*)raw)[threadIdx.x] = ahead;
    for (int i = threadIdx.x + THREADS; i < cols / 8; i += THREADS) ((uint4*)raw)[i] = __ldcg((const uint4*)from + i);
    for (int i = (cols & ~7) + threadIdx.x; i < cols; i += THREADS) raw[i] = __ldcg(from + i);
  } else {
    for (int i = threadIdx.x; i < cols; i += THREADS) raw[i] = __ldcg(from + i);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (segment + overlap) * 32; i += THREADS) {
    int row = i >> 5, slot = i & 31, column = (slot % LANES) * segment + row;
    u32 v = column < cols ? raw[column] : 0u;
    u32* to = (u32*)(at + row * COLUMN + slot * 4);
    to[0] = v;
    to[32] = v << 16;
    to[64] = 0;
  }
#else
  for (int i = threadIdx.x; i < natural_columns; i += THREADS) {
    u32 v = i < cols ? __ldcg(from + i) : 0u;
    ((uint2*)at)[i] = make_uint2(v, v << 16);
  }
#endif
#else
#if SEGMENTED
  const int n = (segment + overlap) * 32;
#else
  const int n = natural_columns;
#endif
  for (int i = threadIdx.x; i < n; i += THREADS) {
#if SEGMENTED
    // Neighbouring threads read neighbouring columns; their stores conflict, which costs less than strided reads.
    const int length = segment + overlap;
    int slot = i / length, row = i - slot * length, column = (slot % LANES) * segment + row;
    u8* to = at + row * COLUMN + slot * SLOT;
#else
    int column = i;
    u8* to = at + i * SLOT;
#endif
    u32 pair[TOK / 2];
#pragma unroll
    for (int t = 0; t < TOK; t += 2) {
      u32 low = column < cols && tokens[t] >= 0 ? __ldcg(x + tokens[t] * x_stride + column) : 0u;
      u32 high = column < cols && tokens[t + 1] >= 0 ? __ldcg(x + tokens[t + 1] * x_stride + column) : 0u;
      pair[t / 2] = low | high << 16;
    }
#if TOK == 2
    *(u32*)to = pair[0];
#elif TOK == 4
    *(uint2*)to = make_uint2(pair[0], pair[1]);
#else
    *(uint4*)to = make_uint4(pair[0], pair[1], pair[2], pair[3]);
#endif
  }
  if (threadIdx.x < 32 * SLOT / 4) ((u32*)(at + n * SLOT))[threadIdx.x] = 0;  // what missing nonzeros read
#endif
}

// The fragments C of one row so far.
struct Sums { float c[TOK == 8 ? 2 : 1][4]; };

// One codeword's gathers; `base` is where its phrase begins in x, in bytes, and moves on to the next phrase.
struct Gather {
  u32 zero;    // where this lane finds zeros (more than one token)
  u32 wrap;    // added where a segment ends
  u32 b0, b1;  // this lane's part of B

  __device__ __forceinline__ void step(u32& base, const Entry& e) const {
    base = __dp4a(entry_word(e, 0), WEIGHT, base);
#if SEGMENTED
    base = min(base + wrap, base);  // unsigned: below the segment's end the sum wraps round to a large number
#endif
  }

#if TOK == 1
  // v[z] = the z-th nonzero's x in its plane
  __device__ __forceinline__ void take(u32& base, const Entry& e, u32* v) const {
#pragma unroll
    for (int z = 1; z <= NZ; z++) {
      u32 word = entry_word(e, z), offset = __dp4a(word, WEIGHT << (8 * (z & 3)), base);
#if SEGMENTED
      v[z - 1] = load1<X_BASE>(offset);
#else
      v[z - 1] = load_unless<X_BASE>(offset, word & 0x80u << (8 * (z & 3)));
#endif
    }
    step(base, e);
  }
#else
  __device__ __forceinline__ void take(u32& base, const Entry& e, Sums& sums) const {
#if TOK == 2
    u32 held = 0, held_flip = 0;  // the nonzero before, as two of two tokens fill a fragment
#endif
#pragma unroll
    for (int z = 1; z <= NZ; z++) {
      const int byte = 8 * (z & 3);
      u32 word = entry_word(e, z), offset = __dp4a(word & 0xfcfcfcfcu, WEIGHT << byte, base);
      offset = word & 2u << byte ? zero : offset;
      u32 flip = (__byte_perm(word, 0, (z & 3) << 4 | (z & 3) << 12 | 0x0404) << 7) & 0x80008000u;  // bit 0: minus
#if TOK == 2
      u32 r = load1<X_BASE>(offset);
      if (z % 2 == 0) {
        mma(sums.c[0], held, r, held ^ held_flip, r ^ flip, b0, b1);
      } else if (z == NZ) {
        mma(sums.c[0], r, 0u, r ^ flip, 0u, b0, b1);
      }
      held = r;
      held_flip = flip;
#elif TOK == 4
      uint2 r = load2<X_BASE>(offset);
      mma(sums.c[0], r.x, r.y, r.x ^ flip, r.y ^ flip, b0, b1);
#else
      uint4 r = load4<X_BASE>(offset);
      mma(sums.c[0], r.x, r.y, r.z, r.w, b0, b1);
      mma(sums.c[1], r.x ^ flip, r.y ^ flip, r.z ^ flip, r.w ^ flip, b0, b1);
#endif
    }
    step(base, e);
  }
#endif
};

// All items of this class, shared out to the blocks; `filled` is the dictionary in the table.
__device__ __forceinline__ void gather_items(const Work& work, const Items& items, const Geometry& geometry,
                                             const Entry* tables, int& filled) {
  extern __shared__ __align__(128) u8 shared[];
  u8* const shared_x = shared + TABLE_BYTES;
  const int rows = work.rows, cols = work.cols, segment = geometry.segment, overlap = geometry.overlap;
  const int natural_columns = geometry.natural_columns;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, j = lane % LANES, group = lane / LANES;

  Gather gather;
  gather.wrap = SLOT - COLUMN * (u32)segment;
#if TOK == 1
  gather.zero = 0;
  gather.b0 = lane >> 2 & 1 ? ONE_HIGH : ONE_LOW;  // even columns of C sum the low halves, odd ones the high halves
  asm volatile("mov.b32 %0,%1;" : "=r"(gather.b1) : "r"(gather.b0));  // held in two registers, not copied each time
#else
  gather.zero = (SEGMENTED ? (segment + overlap) * 32 : natural_columns) * SLOT + lane * SLOT;
  // Columns 0 and 1 of C sum the even and odd tokens of the first half of A's fragment, columns 2 and 3 of the second.
  gather.b0 = lane >> 2 == 0 ? ONE_LOW : lane >> 2 == 1 ? ONE_HIGH : 0u;
  gather.b1 = lane >> 2 == 2 ? ONE_LOW : lane >> 2 == 3 ? ONE_HIGH : 0u;
  keep(gather.zero);
  Output* const outputs = (Output*)(shared_x + (SEGMENTED ? (segment + overlap) * 32 : natural_columns) * SLOT + 32 * SLOT);
#endif
  keep(gather.b0);
  keep(gather.b1);
  keep(gather.wrap);
  u32 copy = (lane % COPIES) * ENTRY_BYTES * 0x01010101u;
  keep(copy);
  const u32 behind = LANES - 1 - j;

  const u32 units = (rows + ROWS_PER_WARP - 1) / ROWS_PER_WARP;
  const u32 total = units * (items.expert ? *items.n : 1);  // below 2^31 (matvec.py)
  const u32 share = total / gridDim.x, more = total - share * gridDim.x;
  u32 next = blockIdx.x * share + min(blockIdx.x, more);
  const u32 stop = next + share + (blockIdx.x < more);

  while (next < stop) {
    const u32 item = next / units;
    int unit = (int)(next - item * units);
    const int unit_end = (int)min(units, unit + (stop - next));
    next += unit_end - unit;
    const int expert = items.expert ? items.expert[item] : items.only_expert;
    int tokens[TOK];
#pragma unroll
    for (int t = 0; t < TOK; t++) tokens[t] = items.tokens ? items.tokens[(u64)item * TOK + t] : 0;
#if TOK == 1
    if (expert < 0) {  // a dropped token, or an expert that does not exist (route.cu)
      fill_unrouted(work.y + tokens[0] * work.y_stride, expert, unit * ROWS_PER_WARP, min(unit_end * ROWS_PER_WARP, rows));
      continue;
    }
#endif
    unit += warp;
    const int d = work.n_dictionaries > 1 ? work.dictionary[expert] : 0;
    const u32 T = __ldg(work.threshold + d);
    const u32* starts = work.row_start + (u64)expert * (rows + 1);
    const u32* words_of = work.codes + __ldg(work.expert_start + expert) + j;
    keep(starts);
    keep(words_of);

    // Beyond the last row, lanes repeat it: what they load is valid, what they find is not stored.
    auto row_words = [&](int u, u32& at, u32& n) {
      int r = min(u * ROWS_PER_WARP + group, rows - 1);
      const u32* p = starts + r;
      at = __ldg(p);
      n = __ldg(p + 1) - at;
    };
    u32 coming[WORDS];
    // The buffer has BLOCK words after its last row, so all but the last two loads need no bound.
    auto load = [&](u32 at, u32 n) {
      const u32* from = words_of + at;
#pragma unroll
      for (int i = 0; i < WORDS; i++) coming[i] = i < WORDS - 2 || i * LANES + j < (int)n ? __ldg(from + i * LANES) : 0u;
    };
    u32 at, at1, n, n1;
    row_words(unit, at, n);
    row_words(unit + WARPS, at1, n1);
    load(at, n);

    TableFill table;
    if (d != filled) table.load(tables + 512 * d);
    uint4 ahead = make_uint4(0, 0, 0, 0);
    const u16* first_x = work.x + tokens[0] * work.x_stride;
    const bool aligned = ((u64)first_x & 15) == 0;
    if (TOK == 1 && SEGMENTED && aligned && threadIdx.x < cols / 8) ahead = __ldcg((const uint4*)first_x + threadIdx.x);
    __syncthreads();  // the last item's readers are done
    if (d != filled) table.store(shared);
    filled = d;
    fill_x(shared_x, work.x, work.x_stride, tokens, cols, segment, overlap, natural_columns, aligned, ahead);
#if TOK > 1
    if (threadIdx.x < TOK) {
      const int t = items.tokens[(u64)item * TOK + threadIdx.x];
      outputs[threadIdx.x] = t < 0 ? Output{nullptr, 0.f} : Output{work.y + t * work.y_stride, work.scale ? work.scale[t] : 1.f};
    }
#endif
    __syncthreads();

    Threshold threshold(T);
    keep(threshold.either);
    keep(threshold.add);
    const LevelPair* level_of = (const LevelPair*)work.levels + (u64)expert * rows;
    keep(level_of);
#if TOK == 1
    u16* y_of = work.y + tokens[0] * work.y_stride;
    keep(y_of);
    const float factor = work.scale ? work.scale[tokens[0]] : 1.f;
#endif

    for (; unit < unit_end; unit += WARPS) {
      Sums sums = {};
      u32 left = n;
      u32 column0 = 0, carry = 0;  // SCALE * column and codeword where the block begins
      u32 at2, n2;
      row_words(unit + 2 * WARPS, at2, n2);
      const int row = unit * ROWS_PER_WARP + group;
      const LevelPair level_bits = __ldg(level_of + (LANES == 32 ? row : min(row, rows - 1)));
      bool last;
      while (true) {
        u32 w[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i++) w[i] = coming[i];
        const u32 here = ONE ? n : min(left, (u32)BLOCK);
        const int mine = (here + behind) / LANES;  // words of this lane
        int most = (here + LANES - 1) / LANES;
        if (ROWS_PER_WARP > 1) most = __reduce_max_sync(FULL_WARP, most);
        if (ONE) {
          last = true;
        } else {
          left -= here;
          at += here;
          last = ROWS_PER_WARP > 1 ? !__any_sync(FULL_WARP, left > 0) : left == 0;
        }
        if (last) load(at1, n1); else load(at, left);

        u32 last_word = w[SURE ? SURE - 1 : 0];
#pragma unroll
        for (int i = SURE ? SURE : 1; i < WORDS; i++) last_word = mine > i ? w[i] : last_word;
        u32 before = __shfl_up_sync(FULL_WARP, last_word, 1, LANES);
        if (j == 0) before = carry;

        Entry entry[CODES];
        u32 length = 0;
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
          if (i >= USUAL && i >= most) break;
          u32 two[2];  // offsets into the table
          find_entries(w[i], i ? w[i - 1] : before, threshold, copy, two);
          const bool there = i < mine;
#pragma unroll
          for (int k = 0; k < 4; k++) {
            Entry e = load_entry(k & 1 ? two[k >> 1] >> 16 : two[k >> 1] & 0xffffu);
#if NZ > 3
            if (i >= SURE && !there) e = make_uint2(MISSING & 0xffffff00u, MISSING);
#else
            if (i >= SURE && !there) e = MISSING & 0xffffff00u;
#endif
            entry[4 * i + k] = e;
            length = __dp4a(entry_word(e, 0), 1u, length);
          }
        }
        u32 end = length;
#pragma unroll
        for (int s = 1; s < LANES; s <<= 1) end = scan_step(end, s);
        const u32 start = column0 + end - length;
        if (!last) {
          column0 += __shfl_sync(FULL_WARP, end, LANES - 1, LANES);
          carry = __shfl_sync(FULL_WARP, last_word, LANES - 1, LANES);  // more follows, so the block was full
        }
        // SCALE * WEIGHT = COLUMN; `magic` makes start / (SCALE * segment), the slot; a slot further is `wrap` further.
        u32 base = start * WEIGHT;
#if SEGMENTED
        base += __umulhi(start, geometry.magic) * gather.wrap + LANES * group * SLOT;
#endif
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
          if (i >= USUAL && i >= most) break;
#if TOK == 1
          u32 v[4 * NZ];
#pragma unroll
          for (int k = 0; k < 4; k++) gather.take(base, entry[4 * i + k], v + NZ * k);
#pragma unroll
          for (int m = 0; m < NZ; m++) mma(sums.c[0], v[4 * m], v[4 * m + 1], v[4 * m + 2], v[4 * m + 3], gather.b0, gather.b1);
#else
#pragma unroll
          for (int k = 0; k < 4; k++) gather.take(base, entry[4 * i + k], sums);
#endif
        }
        if (last) break;
      }
      const Levels level = to_levels(level_bits);
#if TOK == 1
      float v = level.low * (sums.c[0][0] + sums.c[0][2]) + level.high * (sums.c[0][1] + sums.c[0][3]);
#pragma unroll
      for (int s = 4; s < LANES; s <<= 1) v += __shfl_xor_sync(FULL_WARP, v, s);
      if (work.relu && v < 0.f) v = 0.f;
      if (j == 0 && (LANES == 32 || row < rows)) y_of[row] = float_to_half(v * factor, X_F16);
#else
      // Eight tokens: lanes 4i and 4i + 1 hold T and D of four tokens each.  Else lanes 4i hold T, and lanes 4i + 1 D.
      // A step over the lanes of the row halves the values of a lane while there are several: a shuffle less for each.
      const float even = .5f * (level.high + level.low), odd = .5f * (level.high - level.low);
      float v[4];
#if TOK == 8
#pragma unroll
      for (int t = 0; t < 4; t++) v[t] = even * sums.c[0][t] + odd * sums.c[1][t];
      int values = 4, token = 4 * (lane & 1);
#else
      const float factor = (lane & 3) == 0 ? even : (lane & 3) == 1 ? odd : 0.f;
#if TOK == 4
#pragma unroll
      for (int t = 0; t < 4; t++) v[t] = sums.c[0][t] * factor;
#else
      v[0] = (sums.c[0][0] + sums.c[0][2]) * factor;
      v[1] = (sums.c[0][1] + sums.c[0][3]) * factor;
#endif
      int values = TOK, token = 0;
#endif
      int repeated = 2;  // lanes with a bit of `repeated` hold what another lane holds, or nothing
#pragma unroll
      for (int s = LANES > 4 ? LANES / 2 : 1; s >= 1; s = s == 4 ? 1 : s >> 1) {
        if (TOK == 8 && s == 1) break;
        if (values > 1) {
          values >>= 1;
          const bool upper = lane & s;
#pragma unroll
          for (int t = 0; t < 2; t++) {
            if (t >= values) break;
            float mine = upper ? v[t + values] : v[t], other = upper ? v[t] : v[t + values];
            v[t] = mine + __shfl_xor_sync(FULL_WARP, other, s);
          }
          token += upper ? values : 0;
        } else {
          v[0] += __shfl_xor_sync(FULL_WARP, v[0], s);
          repeated |= s;
        }
      }
      if ((lane & repeated) == 0 && (LANES == 32 || row < rows)) {
#pragma unroll
        for (int t = 0; t < 4; t++) {
          if (t >= values) break;
          u16* to = outputs[token + t].y;
          float r = v[t];
          if (work.relu && r < 0.f) r = 0.f;
          if (to) to[row] = float_to_half(r * outputs[token + t].factor, X_F16);
        }
      }
#endif
      at = at1;
      n = n1;
      at1 = at2;
      n1 = n2;
    }
  }
}
