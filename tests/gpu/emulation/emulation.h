// CUDA on the host, as far as the kernels for digits and the quantizer's need it: the threads of a block are fibers that take
// turns in random order; bulk copies arrive at random times; products of a warpgroup read their operands when they are waited
// for, as late as Hopper may.  A block that no longer gets on is reported, as is an access beyond shared memory.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx (Dim3{current, 0, 0})

struct Dim3 { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };

static Dim3 gridDim, blockIdx, blockDim;
static unsigned current, shared_size;
static unsigned long moves;  // of anything that another thread may wait for
static std::mt19937 dice;

constexpr unsigned MOST_SHARED = 232448;
extern unsigned char shared[];
unsigned char shared[MOST_SHARED] __attribute__((aligned(1024)));

// ---- fibers ----

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static void (*body)();

static bool in_fiber;
static char failure[200];
[[noreturn]] static void fail(const char* why) {
  snprintf(failure, sizeof failure, "%s, block %u, thread %u", why, blockIdx.x, current);
  if (in_fiber) setcontext(&scheduler);
  throw 1;  // to launch
}

static void pause() { swapcontext(&fibers[current].context, &scheduler); }

static void run_fiber() {
  body();
  fibers[current].done = true;
  moves++;
  pause();
}

// A place where `size` threads meet and see each other's numbers.
struct Meeting {
  std::vector<uint64_t> number[2] = {std::vector<uint64_t>(1024), std::vector<uint64_t>(1024)};
  unsigned count = 0;
  unsigned long turn = 0;
  const uint64_t* meet(unsigned index, unsigned size, uint64_t mine) {
    const unsigned long now = turn;
    number[now & 1][index] = mine;
    if (++count == size) {
      count = 0;
      turn++;
      moves++;
    } else {
      while (turn == now) pause();
    }
    return number[now & 1].data();
  }
};
static std::vector<Meeting> warps, warpgroups;
static Meeting block, named[16];

static const uint64_t* meet_warp(uint64_t mine) { return warps[current / 32].meet(current % 32, 32, mine); }
static void __syncthreads() { block.meet(current, blockDim.x, 0); }
static void __syncwarp() { meet_warp(0); }
static void meet_warpgroup() { named[1 + current / 128].meet(current % 128, 128, 0); }

template <class T> T __shfl_sync(unsigned, T v, int from, int width = 32) {
  const int lane = current % 32;
  return (T)meet_warp((uint64_t)v)[(lane & ~(width - 1)) | (from & (width - 1))];
}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) { return (T)meet_warp((uint64_t)v)[current % 32 ^ mask]; }
template <class T> T __shfl_up_sync(unsigned, T v, int distance, int width = 32) {
  const int lane = current % 32;
  const uint64_t* all = meet_warp((uint64_t)v);
  return lane % width >= distance ? (T)all[lane - distance] : v;
}
static int __reduce_max_sync(unsigned, int v) {
  const uint64_t* all = meet_warp((uint64_t)(int64_t)v);
  int most = (int)(int64_t)all[0];
  for (int i = 1; i < 32; i++) most = (int)(int64_t)all[i] > most ? (int)(int64_t)all[i] : most;
  return most;
}
static unsigned __reduce_min_sync(unsigned, unsigned v) {
  const uint64_t* all = meet_warp(v);
  return (unsigned)*std::min_element(all, all + 32);
}
static bool __any_sync(unsigned, bool v) {
  const uint64_t* all = meet_warp(v);
  bool any = false;
  for (int i = 0; i < 32; i++) any |= all[i] != 0;
  return any;
}

// ---- arithmetic ----

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcg(T* p, const T& v) { *p = v; }
static void __threadfence() {}
static float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return uint2{x, y}; }
template <class A, class B> auto min(A a, B b) -> std::common_type_t<A, B> { return (std::common_type_t<A, B>)a < (std::common_type_t<A, B>)b ? a : b; }
template <class A, class B> auto max(A a, B b) -> std::common_type_t<A, B> { return (std::common_type_t<A, B>)a < (std::common_type_t<A, B>)b ? b : a; }
static unsigned __byte_perm(unsigned low, unsigned high, unsigned select) {
  const uint64_t both = (uint64_t)high << 32 | low;
  unsigned v = 0;
  for (int i = 0; i < 4; i++) {
    unsigned byte = (unsigned)(both >> (8 * (select >> (4 * i) & 7)) & 0xff);
    if (select >> (4 * i) & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign
    v |= byte << (8 * i);
  }
  return v;
}
static unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) { return (unsigned)(((uint64_t)high << 32 | low) << (by & 31) >> 32); }
static unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) { return (unsigned)(((uint64_t)high << 32 | low) >> (by & 31)); }
static unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 0xff) * (b >> i & 0xff);
  return c;
}
static float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned v; memcpy(&v, &f, 4); return v; }
static unsigned short emulated_bfloat16(float f) {
  unsigned v;
  memcpy(&v, &f, 4);
  if (f != f) return 0x7fff;
  return (unsigned short)((v + 0x7fff + (v >> 16 & 1)) >> 16);
}
static uint64_t __cvta_generic_to_shared(const void* p) { return (const unsigned char*)p - shared + SHARED_BASE; }
static void __trap() { fail("trap"); }

static unsigned char* shared_at(unsigned address, unsigned bytes) {
  if (address < SHARED_BASE || address - SHARED_BASE + bytes > shared_size || address % (bytes < 16 ? bytes : 16)) fail("bad address in shared memory");
  return shared + (address - SHARED_BASE);
}

// ---- barriers and copies ----

struct Barrier { unsigned arrivals, left; long bytes; bool phase; };
static std::map<unsigned, Barrier> barriers;
static Barrier& barrier_at(unsigned address) {
  shared_at(address, 8);
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("no such barrier");
  return found->second;
}
static void settle(Barrier& b) {
  if (b.left == 0 && b.bytes == 0) {
    b.left = b.arrivals;
    b.phase = !b.phase;
  }
  moves++;
}
static void init_barrier(unsigned address, unsigned arrivals) {
  shared_at(address, 8);
  barriers[address] = Barrier{arrivals, arrivals, 0, false};
}
static void publish_barriers() {}
static void arrive(unsigned address) {
  Barrier& b = barrier_at(address);
  if (!b.left) fail("one arrival too many");
  b.left--;
  settle(b);
}
static void arrive_and_expect(unsigned address, unsigned bytes) {
  barrier_at(address).bytes += bytes;
  arrive(address);
}
static void wait_barrier(unsigned address, unsigned parity) {
  while (barrier_at(address).phase == (bool)parity) pause();
}
static void wait_long(unsigned address, unsigned parity) { wait_barrier(address, parity); }

struct Copy { unsigned to; const unsigned char* from; unsigned bytes, barrier; };
static std::vector<Copy> copies;
static void copy_to_shared(unsigned to, const unsigned char* from, unsigned bytes, unsigned barrier) {
  if (to % 16 || (uintptr_t)from % 16 || bytes % 16) fail("a copy is not on 16-byte boundaries");
  shared_at(to, bytes);
  copies.push_back(Copy{to, from, bytes, barrier});
  moves++;
}
static void do_some_bulk_copy() {
  if (copies.empty()) return;
  const size_t i = dice() % copies.size();
  const Copy c = copies[i];
  copies.erase(copies.begin() + i);
  memcpy(shared_at(c.to, 16), c.from, c.bytes);
  Barrier& b = barrier_at(c.barrier);
  b.bytes -= c.bytes;
  settle(b);
}

static void end_barrier(unsigned address) {
  const Barrier& b = barrier_at(address);
  if (b.left != b.arrivals || b.bytes) fail("a barrier ends amid a phase");
  barriers.erase(address);
}

// Copies of single threads, and the barriers that they arrive at when those before are there: in order for each thread, at random
// times.
struct Piece { unsigned to; const unsigned char* from; bool done; unsigned barrier; };  // to 0: an arrival
static std::vector<std::vector<Piece>> pieces;  // by thread
// When the 16 bytes were written by such a copy, and when each thread had its products see what was written.
static std::vector<unsigned long> written, seen;
static unsigned long now;
static void copy_now(Piece& piece) {
  if (piece.done) return;
  piece.done = true;
  unsigned char* to = shared_at(piece.to, 16);
  if (piece.from) memcpy(to, piece.from, 16);
  else memset(to, 0, 16);
  written[(to - shared) / 16] = ++now;
}
static void copy_16(unsigned to, const unsigned char* from, unsigned there = 16) {
  if (to % 16 || (there && (uintptr_t)from % 16)) fail("a copy is not on 16-byte boundaries");
  if (there != 0 && there != 16) fail("a copy of neither 0 nor 16 bytes");
  memset(shared_at(to, 16), 0xff, 16);  // undefined until it is there
  written[(to - SHARED_BASE) / 16] = ++now;
  pieces[current].push_back(Piece{to, there ? from : nullptr, false, 0});
  if (dice() % 8 == 0) copy_now(pieces[current].back());
}
static void arrive_when_copied(unsigned barrier) {
  pieces[current].push_back(Piece{0, nullptr, false, barrier});
  moves++;
}
static void show_to_products() { seen[current] = now; }
// What a thread has ordered, up to its next arrival.
static void do_some_copies_of(unsigned thread) {
  auto& mine = pieces[thread];
  for (size_t i = 0; i < mine.size(); i++) {
    if (mine[i].to) {
      copy_now(mine[i]);
      continue;
    }
    const unsigned barrier = mine[i].barrier;
    mine.erase(mine.begin(), mine.begin() + i + 1);
    current = thread;
    arrive(barrier);
    return;
  }
}
static void do_some_copies() {
  if (dice() % 2) do_some_bulk_copy();
  for (unsigned thread = 0; thread < pieces.size(); thread++)
    if (!pieces[thread].empty() && dice() % 4 == 0) do_some_copies_of(thread);
}

static int atomicCAS(int* at, int old, int v) {
  const int was = *at;
  if (was == old) *at = v;
  return was;
}
static int atomicAdd(int* at, int v) { return (*at += v) - v; }

static unsigned load_shared(unsigned address) { unsigned v; memcpy(&v, shared_at(address, 4), 4); return v; }
static unsigned transpose(unsigned two) {
  const uint64_t* all = meet_warp(two);
  const unsigned row = current % 32 / 4, first = current % 4 * 2;
  auto at = [&](unsigned r, unsigned c) { return (unsigned)(all[4 * r + c / 2] >> (16 * (c & 1)) & 0xffff); };
  return at(first, row) | at(first + 1, row) << 16;
}
static unsigned thread_number() { return current; }
static unsigned permute(unsigned low, unsigned high, unsigned select) { return __byte_perm(low, high, select); }
template <int N> void give_registers() { meet_warp(0); }
template <int N> void take_registers() { meet_warp(0); }

// ---- products of a warpgroup ----

struct Product { float* c; const unsigned* a; uint64_t b; int n; unsigned long seen; };
static std::vector<std::vector<std::vector<Product>>> groups;  // by thread; the last is open
static void hold(unsigned*, unsigned long long&) {}
static void hold(unsigned&) {}
static void hold(float&) {}
static void begin_products() {}
static void end_products() { groups[current].emplace_back(); }
template <int N> void wgmma(float* c, const unsigned* a, unsigned long long b) { groups[current].back().push_back(Product{c, a, b, N, seen[current]}); }

static double sixteen_bits(unsigned short v) {
#if X_F16
  const int exponent = v >> 10 & 31;
  const double m = v & 1023, s = v >> 15 ? -1 : 1;
  return s * (exponent ? __builtin_ldexp(1024 + m, exponent - 25) : __builtin_ldexp(m, -24));
#else
  return __uint_as_float((unsigned)v << 16);
#endif
}

// wgmma m64nNk16: this thread's part of one product, from the fragments of its warp's lanes and x in swizzled rows of 128 bytes.
static void multiply_now(size_t group, size_t place) {
  const Product& p = groups[current][group][place];
  const unsigned lane = current % 32, first = current - lane, g = lane / 4, t = lane % 4;
  const unsigned start = (p.b & 0x3fff) * 16;
  if (p.b >> 62 != 1 || (p.b >> 32 & 0x3fff) * 16 != 1024 || start % 1024 >= 128) fail("no such layout");
  double a[2][16];
  for (unsigned k = 0; k < 16; k++)
    for (unsigned half = 0; half < 2; half++) {
      const Product& other = groups[first + 4 * g + k % 8 / 2][group][place];
      if (other.b != p.b || other.n != p.n) fail("the threads of a warp multiply different things");
      a[half][k] = sixteen_bits(other.a[half + 2 * (k / 8)] >> (16 * (k & 1)) & 0xffff);
    }
  for (int i = 0; i < p.n / 2; i++) {
    const unsigned n = i / 4 * 8 + 2 * t + (i & 1), half = i >> 1 & 1;
    double sum = p.c[i];
    for (unsigned k = 0; k < 16; k++) {
      unsigned short x;
      unsigned address = start + n * 128 + k * 2;
      address ^= address >> 3 & 0x70;
      const unsigned char* const at = shared_at(address, 2);
      if (written[(at - shared) / 16] > p.seen) fail("a product reads what it was not told of");
      memcpy(&x, at, 2);
      if (a[half][k] != 0 || x) sum += a[half][k] * sixteen_bits(x);
    }
    p.c[i] = (float)sum;
  }
}

template <int N> void wait_products() {
  Meeting& together = warpgroups[current / 128];
  auto& mine = groups[current];
  together.meet(current % 128, 128, mine.size());
  while (mine.size() > N + 1) {
    for (size_t i = 0; i < mine[0].size(); i++) multiply_now(0, i);
    together.meet(current % 128, 128, 0);  // all have read the others' fragments
    mine.erase(mine.begin());
    together.meet(current % 128, 128, 0);
  }
}

// Called from within the kernel's file, where Entry, LANES and DIGITS are known.
#define SCATTER \
  static Entry load_entry(u32 offset) { Entry e; memcpy(&e, shared_at(SHARED_BASE + offset, sizeof e), sizeof e); return e; } \
  static u32 scan_step(u32 v, int distance) { \
    const uint64_t* all = meet_warp(v); \
    return (int)(current % LANES) >= distance ? v + (u32)all[current % 32 - distance] : v; \
  } \
  static void put_bit(u32 at, u32 value) { *(u32*)shared_at(DIGITS + (at >> 3 & ~3u), 4) |= value << (at & 31); } \
  static void put_digit(u32 at, bool there) { if (there) put_bit(at, 1); }

// ---- launches ----

template <class... A, size_t... I> static void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(std::remove_const_t<A>*)arguments[I]...);
}
template <class... A> static void call(void (*kernel)(A...), void** arguments) { call(kernel, arguments, std::index_sequence_for<A...>{}); }

static void run_grid(unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared_bytes, unsigned seed, void (*work)()) {
  if (shared_bytes > MOST_SHARED) fail("too much shared memory");
  gridDim = Dim3{grid_x, grid_y, 1};
  blockDim = Dim3{threads, 1, 1};
  shared_size = shared_bytes;
  dice.seed(seed);
  body = work;
  fibers.resize(threads);
  std::vector<unsigned> order(grid_x);
  for (unsigned y = 0; y < grid_y; y++) {
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), dice);  // one after the other, in any order
    for (unsigned x : order) {
      blockIdx = Dim3{x, y, 0};
      memset(shared, 0xcd, sizeof shared);
      barriers.clear();
      warps.assign((threads + 31) / 32, Meeting());
      warpgroups.assign((threads + 127) / 128, Meeting());
      block = Meeting();
      for (Meeting& meeting : named) meeting = Meeting();
      groups.assign(threads, {{}});
      pieces.assign(threads, {});
      written.assign(MOST_SHARED / 16, 0);
      seen.assign(threads, 0);
      now = 0;
      for (Fiber& f : fibers) {
        f.stack.resize(1 << 16);
        f.done = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &scheduler;
        makecontext(&f.context, run_fiber, 0);
      }
      unsigned long before = 0, idle = 0;
      for (unsigned left = threads; left;) {
        left = 0;
        const unsigned turn = dice() % threads;
        for (unsigned i = 0; i < threads; i++) {
          current = (i + turn) % threads;
          if (fibers[current].done) continue;
          in_fiber = true;
          swapcontext(&scheduler, &fibers[current].context);
          in_fiber = false;
          if (*failure) throw 1;
          left += !fibers[current].done;
        }
        do_some_copies();
        idle = moves == before ? idle + 1 : 0;
        before = moves;
        if (idle > 200) fail("nobody gets on");
      }
      if (!copies.empty()) fail("a copy nobody waited for");
      if (!barriers.empty()) fail("a barrier is left");
      for (const auto& thread : pieces)
        if (!thread.empty()) fail("a thread's copy nobody waited for");
    }
  }
}

// Returns what went wrong, or "".
static const char* launch(unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared_bytes, unsigned seed, void (*work)()) {
  *failure = 0;
  in_fiber = false;
  copies.clear();
  try {
    run_grid(grid_x, grid_y, threads, shared_bytes, seed, work);
  } catch (int) {
  }
  return failure;
}
