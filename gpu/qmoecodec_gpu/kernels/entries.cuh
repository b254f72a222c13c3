// Entries of the tables that decode 8-bit codewords of NZ nonzeros at most (tables.py), and where they stand: by codeword and
// state.  The file that includes this has NZ and common.cuh.
#pragma once

#if NZ > 3
typedef uint2 Entry;
constexpr u32 ENTRY_BYTES = 8;
#else
typedef u32 Entry;
constexpr u32 ENTRY_BYTES = 4;
#endif

// The word with byte z.
__device__ __forceinline__ u32 entry_word(const Entry& e, int z) {
#if NZ > 3
  return z < 4 ? e.x : e.y;
#else
  return e;
#endif
}

// Which codewords are at least the threshold T, four at a time.  T in 1..128: those where the top bit of c or of
// (c & 127) + 128 - T is set; T in 129..256: where both are, with 256 - T.  Both are the majority with `either`.
struct Threshold {
  u32 either, add;
  __device__ __forceinline__ explicit Threshold(u32 T)
      : either(T <= 128 ? ~0u : 0u), add(((T <= 128 ? 128u : 256u) - T) * 0x01010101u) {}
};

// 128 * state + copy, beside the codeword, 16 bits for each of the four codewords of `word`; copy: four times, below 128; before:
// the word that ends with the codeword before.
__device__ __forceinline__ void find_entries(u32 word, u32 before, const Threshold& threshold, u32 copy, u32* two) {
  const u32 previous = __funnelshift_l(before, word, 8), sum = (previous & 0x7f7f7f7fu) + threshold.add;
  const u32 second = (sum & previous) | ((sum | previous) & threshold.either), low = (second & 0x80808080u) | copy;
  two[0] = __byte_perm(word, low, 0x1504);
  two[1] = __byte_perm(word, low, 0x3726);
}
