// Routing: which expert multiplies which tokens, as work lists on the device.
#include "common.cuh"

// An item is an expert with some of its tokens.  Items stand in five lists by size class: 1, 2, up to 4, up to 8 tokens, and
// large ones; item_expert[c * tokens + i] is the expert of item i of list c.  Of lists 0 to 3, item_tokens[c * 8 * tokens + size *
// i + j] are its tokens, -1 where it has fewer.  A large item has whole octets of slots: slot_token[item_first[i] + j], j <
// item_count[i], with these three one behind the other where list 4 of item_tokens would be: 6, 1 and 1 places per token.
//
// sort tokens by (expert, token); for each expert: cut its tokens into items of `largest`, and the rest as fits
//
// largest: 1, 2, 4 or 8, or more for large items; these have `least` tokens at least (5 or more), other items 8 at most.
// n_items[5] = slots that were given out.
//
// One block; or several, where the lists come sorted and n_items zeroed.  A token of expert -1 is dropped: an item of expert -1,
// whose y is 0.  A token of an expert that does not exist is an item of expert -2, whose y is NaN: the host is not asked, so
// nothing can be raised.
extern "C" __global__ void __launch_bounds__(1024) route_tokens(const i64* expert, const i64* sorted_expert,
                                                                const i64* sorted_token, int tokens, int experts,
                                                                int largest, int least, int* n_items,
                                                                int* item_expert, int* item_tokens) {
  // Without a sorted list (few tokens) the position of a token is the number of pairs before it.
  extern __shared__ int shared[];
  int* by_expert = sorted_expert ? nullptr : shared;          // [tokens]
  int* by_token = sorted_expert ? nullptr : shared + tokens;  // [tokens]
  if (!sorted_expert && threadIdx.x < 6) n_items[threadIdx.x] = 0;  // the barrier below orders this before the atomics
  if (!sorted_expert) {
    int* raw = shared + 2 * tokens;
    for (int t = threadIdx.x; t < tokens; t += blockDim.x) {
      i64 e = expert[t];
      raw[t] = e >= experts ? experts : e < -1 ? -2 : (int)e;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < tokens; t += blockDim.x) {
      int e = raw[t], place = 0;
      for (int u = 0; u < tokens; u++) place += raw[u] < e || (raw[u] == e && u < t);
      by_expert[place] = e;
      by_token[place] = t;
    }
  }
  __syncthreads();
  auto expert_at = [&](int s) -> i64 { return sorted_expert ? sorted_expert[s] : (i64)by_expert[s]; };
  auto token_at = [&](int s) -> int { return sorted_expert ? (int)sorted_token[s] : by_token[s]; };
  for (int s = blockIdx.x * blockDim.x + threadIdx.x; s < tokens; s += gridDim.x * blockDim.x) {
    i64 e = expert_at(s);
    if (e < 0 || e >= experts) {
      int i = atomicAdd(n_items, 1);
      item_expert[i] = e == -1 ? -1 : -2;
      item_tokens[i] = token_at(s);
      continue;
    }
    int low = 0, high = s;  // first place of this expert
    while (low < high) {
      int middle = (low + high) / 2;
      if (expert_at(middle) < e) low = middle + 1; else high = middle;
    }
    int end = s + 1, beyond = tokens;  // behind its last place
    while (end < beyond) {
      int middle = (end + beyond) / 2;
      if (expert_at(middle) > e) beyond = middle; else end = middle + 1;
    }
    int in_large = (s - low) % largest, of_large = min(largest, end - (s - in_large));
    int size_here = largest > 8 && of_large < least ? 8 : largest;
    if (in_large % size_here) continue;
    int n = min(size_here, end - s);
    int list = n == 1 ? 0 : n == 2 ? 1 : n <= 4 ? 2 : size_here <= 8 ? 3 : 4;
    int i = atomicAdd(n_items + list, 1);
    item_expert[list * tokens + i] = (int)e;
    int* to = item_tokens + (i64)list * 8 * tokens;
    if (list < 4) {
      int size = 1 << list;
      for (int j = 0; j < size; j++) to[(i64)i * size + j] = j < n ? token_at(s + j) : -1;
    } else {
      int slot = atomicAdd(n_items + 5, (n + 7) / 8 * 8);
      to[6 * (i64)tokens + i] = slot;
      to[7 * (i64)tokens + i] = n;
      for (int j = 0; j < n; j++) to[slot + j] = token_at(s + j);
    }
  }
}
