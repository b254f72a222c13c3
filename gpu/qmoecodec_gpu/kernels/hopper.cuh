// Instructions of Hopper (sm_90a) as functions: barriers and bulk copies of shared memory, and products of a warpgroup.
// Addresses of shared memory are 32-bit numbers.
#pragma once

__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Make initialised barriers known to the copy engine.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" :: "r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" :: "r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of that parity is over.
__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
  asm volatile("{.reg .pred p;\n"
               "again: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n"
               "@!p bra again;}" :: "r"(barrier), "r"(parity) : "memory");
}

// As wait_barrier, for those who have time: they leave the multiprocessor to others.
__device__ __forceinline__ void wait_long(u32 barrier, u32 parity) {
  asm volatile("{.reg .pred p;\n"
               "again: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n"
               "@p bra done;\n"
               "nanosleep.u32 500;\n"
               "bra again;\n"
               "done:}" :: "r"(barrier), "r"(parity) : "memory");
}

// Until all threads of this warpgroup are here.
__device__ __forceinline__ void meet_warpgroup() { asm volatile("bar.sync %0,128;" :: "r"(1 + threadIdx.x / 128) : "memory"); }

// Order a copy into shared memory, of which `barrier` is told.  Addresses and size are multiples of 16.
__device__ __forceinline__ void copy_to_shared(u32 to, const u8* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// A barrier that nobody will use again.
__device__ __forceinline__ void end_barrier(u32 barrier) { asm volatile("mbarrier.inval.shared::cta.b64 [%0];" :: "r"(barrier) : "memory"); }

// Order a copy of 16 bytes into shared memory by this thread; or of `there` of them, 0 or 16, and zeros.
__device__ __forceinline__ void copy_16(u32 to, const u8* from) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" :: "r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_16(u32 to, const u8* from, u32 there) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" :: "r"(to), "l"(from), "r"(there) : "memory");
}
// An arrival, once what this thread has ordered so far is there.
__device__ __forceinline__ void arrive_when_copied(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}
// Let this thread's products from here on read what it knows to have been written by anybody's copies of 16 bytes.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ u32 load_shared(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v) : "r"(address));
  return v;
}

// A square of 8 x 8 16-bit numbers, of which lane l has two neighbours in row l / 4, transposed.
__device__ __forceinline__ u32 transpose(u32 two) {
  u32 v;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(v) : "r"(two));
  return v;
}

// threadIdx.x, read where this stands.
__device__ __forceinline__ u32 thread_number() {
  u32 v;
  asm volatile("mov.u32 %0,%%tid.x;" : "=r"(v));
  return v;
}

// __byte_perm without its mask: the selector's nibbles are below 7.
__device__ __forceinline__ u32 permute(u32 low, u32 high, u32 select) {
  u32 v;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(v) : "r"(low), "r"(high), "r"(select));
  return v;
}

// Nothing that makes these may move in among the products behind: ptxas would then wait for each product.
__device__ __forceinline__ void hold(u32* a, u64& b) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]), "+l"(b));
}
__device__ __forceinline__ void hold(u32& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void hold(float& c) { asm volatile("" : "+f"(c) :: "memory"); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups of products are under way.
template <int N> __device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }

// Registers of each thread of a warpgroup from here on.
template <int N> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }

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
#define F64(i) F32(i), F32(i + 32)
#define A_AND_B "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
#define L8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define L32 L8(0, 1, 2, 3, 4, 5, 6, 7) "," L8(8, 9, 10, 11, 12, 13, 14, 15) "," L8(16, 17, 18, 19, 20, 21, 22, 23) "," \
            L8(24, 25, 26, 27, 28, 29, 30, 31)

// c += a * b: 64 rows x 16 columns, from registers, by 16 columns x N tokens, which the descriptor b names.
template <int N> __device__ __forceinline__ void wgmma(float* c, const u32* a, u64 b);
template <> __device__ __forceinline__ void wgmma<32>(float* c, const u32* a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n32k16." TYPES " {" L8(0, 1, 2, 3, 4, 5, 6, 7) "," L8(8, 9, 10, 11, 12, 13, 14, 15)
               "},{%16,%17,%18,%19},%20,1,1,1,0;" : F16(0) : A_AND_B);
}
template <> __device__ __forceinline__ void wgmma<64>(float* c, const u32* a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." TYPES " {" L32 "},{%32,%33,%34,%35},%36,1,1,1,0;" : F32(0) : A_AND_B);
}
template <> __device__ __forceinline__ void wgmma<128>(float* c, const u32* a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." TYPES " {" L32 "," L8(32, 33, 34, 35, 36, 37, 38, 39) ","
               L8(40, 41, 42, 43, 44, 45, 46, 47) "," L8(48, 49, 50, 51, 52, 53, 54, 55) "," L8(56, 57, 58, 59, 60, 61, 62, 63)
               "},{%64,%65,%66,%67},%68,1,1,1,0;" : F64(0) : A_AND_B);
}
