// Where dynamic shared memory begins: a number that gather.cu is compiled with.
extern "C" __global__ void shared_base(unsigned* to) {
  extern __shared__ __align__(128) unsigned char shared[];
  *to = (unsigned)__cvta_generic_to_shared(shared);
}
