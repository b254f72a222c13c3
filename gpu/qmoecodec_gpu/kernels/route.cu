// Routing: which expert multiplies which tokens, as work lists on the device.
#include "common.cuh"

// An item is an expert with some of its tokens.  Items stand in five lists by size class: 1, 2, up to 4, up to 8 tokens, and
// large ones; item_expert[c * tokens + i] is the expert of item i of list c.  Of lists 0 to 3, item_tokens[c * 8 * tokens + size *
// i + j] are its tokens, -1 where it has fewer.  A large item has whole octets of slots: slot_token[item_first[i] + j], j <
// item_count[i], with these three one behind the other where list 4 of item_tokens would be: 6, 1 and 1 places per token.
//
// for each expert: cut its tokens, as they come, into items of `largest`, and the rest as fits
//
// largest: 1, 2, 4 or 8, or more for large items; these have `least` tokens at least (5 or more), other items 8 at most.
// n_items[5] = slots that were given out.
//
// Nothing is sorted: each token counts those of its expert before it, which tells its place once the expert's items are made.  One
// block does this for few tokens (route_tokens).  Of many, each block ranks a chunk (rank_tokens), a thread for each expert adds up the
// chunks and makes its items (make_items), and the tokens take their places (place_tokens).
//
// A token of expert -1 is dropped: an item of expert -1, whose y is 0.  A token of an expert that does not exist is an item of
// expert -2, whose y is NaN: the host is not asked, so nothing can be raised.

// The lists, as above.
struct Lists {
  int tokens, largest, least;
  int *n_items, *item_expert, *item_tokens;

  // Tokens of an expert with n that stand in large items: the first ones.
  __device__ int in_large(int n) const {
    const int rest = n % largest;
    return largest <= 8 ? 0 : rest < least ? n - rest : n;
  }
  // Further items have so many tokens, but for the last.
  __device__ int size() const { return min(largest, 8); }
  // The list of items of n tokens.
  __device__ static int list_of(int n) { return n == 1 ? 0 : n == 2 ? 1 : n <= 4 ? 2 : 3; }
  __device__ int* tokens_of(int list) const { return item_tokens + (i64)list * 8 * tokens; }

  // Make n items of an expert, one behind the other; return the first one's number.
  __device__ int make(int list, int n, int expert) const {
    if (!n) return 0;
    const int first = atomicAdd(n_items + list, n);
    for (int i = 0; i < n; i++) item_expert[(i64)list * tokens + first + i] = expert;
    return first;
  }
  // Make the large items of `n` tokens; return the first one's first slot.
  __device__ int make_large(int n, int expert) const {
    if (!n) return 0;
    const int items = (n + largest - 1) / largest, first = make(4, items, expert);
    const int slot = atomicAdd(n_items + 5, (n + 7) / 8 * 8);
    int* const to = tokens_of(4);
    for (int i = 0; i < items; i++) {
      to[6 * (i64)tokens + first + i] = slot + i * largest;
      to[7 * (i64)tokens + first + i] = min(largest, n - i * largest);
    }
    return slot;
  }
  // Make the last item, of n tokens; return its number.
  __device__ int make_rest(int n, int expert) const {
    if (!n) return 0;
    const int list = list_of(n), item = make(list, 1, expert);
    for (int j = n; j < 1 << list; j++) tokens_of(list)[((i64)item << list) + j] = -1;
    return item;
  }
  __device__ void drop(int token, int expert) const { tokens_of(0)[make(0, 1, expert)] = token; }
};

// What an expert's thread tells its tokens.
struct Places { int n, slot, first, rest; };

__device__ __forceinline__ Places make_all(const Lists& lists, int n, int expert) {
  const int large = lists.in_large(n), others = n - large, size = lists.size();
  return Places{n, lists.make_large(large, expert), lists.make(Lists::list_of(size), others / size, expert),
                lists.make_rest(others % size, expert)};
}

// Put the token that comes `rank`-th of an expert's to its place.
__device__ __forceinline__ void place(const Lists& lists, const Places& places, int rank, int token) {
  const int large = lists.in_large(places.n), size = lists.size(), others = places.n - large;
  if (rank < large) {
    lists.tokens_of(4)[places.slot + rank] = token;
    return;
  }
  rank -= large;
  const bool whole = rank / size < others / size;
  const int list = Lists::list_of(whole ? size : others % size);
  lists.tokens_of(list)[((i64)(whole ? places.first + rank / size : places.rest) << list) + rank % size] = token;
}

// Tokens of the same expert among `n`, before and after the `me`-th, and the first one's place (me if it is that).
struct Counts { int before, behind, first; };

__device__ __forceinline__ Counts count_same(const int* of, int n, int me) {
  Counts counts{0, 0, me};
  const int expert = of[me], own = me / 32 * 32;  // of this warp, which goes the same way up to there
  for (int i = 0; i < own; i++)
    if (of[i] == expert && !counts.before++) counts.first = i;
  for (int i = own; i < min(own + 32, n); i++)
    if (of[i] == expert) {
      if (i < me && !counts.before++) counts.first = i;
      counts.behind += i > me;
    }
  for (int i = own + 32; i < n; i++) counts.behind += of[i] == expert;
  return counts;
}

// One block, of a thread for each token.  The first token of each expert makes its items.
extern "C" __global__ void __launch_bounds__(512)
route_tokens(const i64* expert, int tokens, int experts, int largest, int least, int* n_items, int* item_expert, int* item_tokens) {
  wait_for_previous();
  extern __shared__ int shared[];
  Places* const places = (Places*)shared;                // [tokens]
  int* const of = (int*)(places + tokens);               // [tokens]
  const Lists lists{tokens, largest, least, n_items, item_expert, item_tokens};
  const int t = threadIdx.x;
  if (t < 6) n_items[t] = 0;  // the barrier below orders this before the atomics
  if (t < tokens) of[t] = checked_expert(expert[t], experts);
  __syncthreads();
  const bool some = t < tokens && of[t] >= 0;
  Counts counts{};
  if (some) {
    counts = count_same(of, tokens, t);
    if (counts.first == t) places[t] = make_all(lists, 1 + counts.behind, of[t]);
  } else if (t < tokens) {
    lists.drop(t, of[t]);
  }
  __syncthreads();
  if (some) place(lists, places[counts.first], counts.before, t);
}

// A block's chunk has a token, or an expert, for each thread.  rank[t]: tokens of the same expert before t in its chunk.
// counts[chunk][expert]: their number, where there are any.
extern "C" __global__ void __launch_bounds__(512)
rank_tokens(const i64* expert, int tokens, int experts, int* n_items, int* counts, int* rank) {
  wait_for_previous();
  extern __shared__ int shared[];
  int* const of = shared;  // [threads]
  const int first = blockIdx.x * blockDim.x, n = min(tokens - first, (int)blockDim.x), me = threadIdx.x;
  if (blockIdx.x == 0 && me < 6) n_items[me] = 0;  // for the kernels behind
  if (me < n) of[me] = checked_expert(expert[first + me], experts);
  __syncthreads();
  if (me >= n || of[me] < 0) return;
  const Counts same = count_same(of, n, me);
  rank[first + me] = same.before;
  if (!same.behind) counts[(i64)blockIdx.x * experts + of[me]] = same.before + 1;
}

// Counts become those of the chunks before; places: of each expert.
extern "C" __global__ void __launch_bounds__(512)
make_items(int tokens, int experts, int largest, int least, int* n_items, int* item_expert, int* item_tokens, int* counts, Places* places) {
  wait_for_previous();
  const int expert = blockIdx.x * blockDim.x + threadIdx.x, chunks = (tokens + blockDim.x - 1) / blockDim.x;
  if (expert >= experts) return;
  int n = 0;
#pragma unroll 8
  for (int chunk = 0; chunk < chunks; chunk++) {
    int& count = counts[(i64)chunk * experts + expert];
    const int here = count;
    count = n;
    n += here;
  }
  if (n) places[expert] = make_all(Lists{tokens, largest, least, n_items, item_expert, item_tokens}, n, expert);
}

extern "C" __global__ void __launch_bounds__(512)
place_tokens(const i64* expert, int tokens, int experts, int largest, int least, int* n_items, int* item_expert, int* item_tokens,
             const int* counts, const int* rank, const Places* places) {
  wait_for_previous();
  const Lists lists{tokens, largest, least, n_items, item_expert, item_tokens};
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= tokens) return;
  const int e = checked_expert(expert[t], experts);
  if (e < 0) lists.drop(t, e);
  else place(lists, places[e], counts[(i64)blockIdx.x * experts + e] + rank[t], t);
}
