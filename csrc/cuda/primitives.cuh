// What kernels are made of, each with two bodies: instructions for nvcc, and their meaning for the emulator. The only
// place with inline PTX.
//
// mma fragments are as in the PTX ISA. With lane = 4 g + t: c[r] is element (g + 8 (r / 2), 2 t + r % 2) of 16 x 8.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "ops/dtype.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define GRID_CONSTANT __grid_constant__  // a kernel's parameter that may be referred to without a copy of it
#else
#include <cmath>

#include "cuda/emulator/emulator.h"
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define GRID_CONSTANT
#define threadIdx (::fastnn::cuda::emulator::thread->index)
#define blockIdx (::fastnn::cuda::emulator::block->index)
#define blockDim (::fastnn::cuda::emulator::block->size)
#define gridDim (::fastnn::cuda::emulator::block->grid)
#endif

// Instructions of sm_80; older devices get kernels without them (see device_capability), so what stands here for them
// is never reached.
#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
#define FASTNN_SM80 1
#endif

namespace fastnn::cuda {

constexpr int kWarpThreads = 32;

// Threads and blocks

__device__ __forceinline__ int64_t global_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return int64_t{gridDim.x} * blockDim.x; }

// Every kernel calls it before it touches memory. The next kernel of the stream may come onto the device from now on,
// as blocks leave room for its own, and waits here until this one is done: so kernels of a few microseconds do not pay
// for each other's start. launch() allows it from sm_90 on.
__device__ __forceinline__ void begin_kernel() {
#ifndef __CUDACC__
  emulator::thread->begun = true;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// All threads of the block reach the same call, or have returned; the emulator tells calls apart by their lines.
__device__ __forceinline__ void sync_block([[maybe_unused]] int line = __builtin_LINE()) {
#ifdef __CUDACC__
  __syncthreads();
#else
  emulator::sync_block(line);
#endif
}

// All lanes of the warp take part: each then sees what the others wrote to shared memory before.
__device__ __forceinline__ void sync_warp() {
#ifdef __CUDACC__
  __syncwarp();
#else
  const uint32_t nothing = 0;
  emulator::collective(&nothing, 1);
#endif
}

// The block's dynamic shared memory, 16-byte aligned.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char fastnn_shared[];
  return reinterpret_cast<T*>(fastnn_shared);
#else
  return static_cast<T*>(emulator::shared_memory());
#endif
}

// The value of the lane whose number is this lane's xor `mask`. All lanes of the warp take part.
template <class V>
__device__ __forceinline__ V shuffle_xor(V value, int mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, value, mask);
#else
  static_assert(sizeof(V) <= 8);
  uint32_t words[2] = {0, 0};
  std::memcpy(words, &value, sizeof(V));
  const emulator::Slots slots = emulator::collective(words, 2);
  V result;
  std::memcpy(&result, slots[emulator::lane() ^ mask], sizeof(V));
  return result;
#endif
}

#ifdef __CUDACC__
// Out of line, so that the printing does not take registers and stack where all is well.
__device__ __noinline__ [[noreturn]] inline void device_fail(const char* message) {
  printf("fastnn: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  __trap();
}
#endif

// Ends the kernel with an error where `condition` is false; the host learns of it at its next synchronisation.
__device__ __forceinline__ void device_check(bool condition, const char* message) {
#ifdef __CUDACC__
  if (!condition) device_fail(message);
#else
  if (!condition) emulator::fail(message);
#endif
}

// Numbers

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

__device__ __forceinline__ uint32_t float_to_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float widen(float16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return half;
#endif
}

__device__ __forceinline__ void narrow_to(float x, float& result) { result = x; }
__device__ __forceinline__ void narrow_to(double x, double& result) { result = x; }
__device__ __forceinline__ void narrow_to(float x, bfloat16& result) {
#ifdef __CUDACC__
  result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = float_to_bits(x);
  result.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
#endif
}
__device__ __forceinline__ void narrow_to(float x, float16& result) {
#ifdef __CUDACC__
  result.bits = __half_as_ushort(__float2half_rn(x));
#else
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&result.bits, &half, 2);
#endif
}

// x rounded to T, to nearest.
template <class T>
__device__ __forceinline__ T narrow(Compute<T> x) {
  T result;
  narrow_to(x, result);
  return result;
}

// x rounded to 10 bits of mantissa, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef FASTNN_SM80
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return x != x ? 0x7fffffffu : (float_to_bits(x) + 0x1000u) & 0xffffe000u;
#endif
}

// Bytes that are moved at once.
template <int kBytes>
struct [[gnu::may_alias]] alignas(kBytes) Chunk {
  uint32_t words[kBytes / 4];
};

// Asynchronous copies, global to shared memory

// So many bytes - 4, 8 or 16 - to shared memory, both places aligned to as many; zeros where not `valid`, and then
// `from` is not read.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef FASTNN_SM80
  const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)  // past the L1 cache, which no neighbour would find it in
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(place), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(place), "l"(from), "n"(kBytes),
                 "r"(valid ? kBytes : 0)
                 : "memory");
#elif defined(__CUDACC__)
  *static_cast<Chunk<kBytes>*>(to) = valid ? *static_cast<const Chunk<kBytes>*>(from) : Chunk<kBytes>{};
#else
  emulator::copy_async(to, from, kBytes, valid);
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef FASTNN_SM80
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#elif !defined(__CUDACC__)
  emulator::commit_copies();
#endif
}

// Waits until at most the last kGroupsLeft committed groups are under way. Other threads see the data after a barrier.
template <int kGroupsLeft>
__device__ __forceinline__ void wait_for_copies() {
#ifdef FASTNN_SM80
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroupsLeft) : "memory");
#elif !defined(__CUDACC__)
  emulator::wait_for_copies(kGroupsLeft);
#endif
}

// Tensor cores

#ifndef __CUDACC__
namespace emulator {

// The float next to `exact`, towards zero.
inline float cut_off(double exact) {
  const float rounded = static_cast<float>(exact);
  const bool is_beyond = std::isfinite(rounded) && std::fabs(double{rounded}) > std::fabs(exact);
  return is_beyond ? std::nextafterf(rounded, 0) : rounded;
}

// c += a b for a 16 x 8 tile, cut off as tensor cores do: lanes hand over a (4 words), b (2 words) and c (4 floats).
// kPack values a word.
template <int kPack>
void multiply_fragments(Slots s, float (*value)(uint32_t word, int part)) {
  constexpr int kDepth = 8 * kPack;
  float a[16][kDepth], b[kDepth][8];
  double c[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r)
      for (int p = 0; p < kPack; ++p) a[g + 8 * (r & 1)][kPack * t + p + 4 * kPack * (r >> 1)] = value(s[l][r], p);
    for (int r = 0; r < 2; ++r)
      for (int p = 0; p < kPack; ++p) b[kPack * t + p + 4 * kPack * r][g] = value(s[l][4 + r], p);
    for (int r = 0; r < 4; ++r) c[g + 8 * (r >> 1)][2 * t + (r & 1)] = bits_to_float(s[l][6 + r]);
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += double{a[i][k]} * b[k][j];
  for (int l = 0; l < kWarp; ++l)
    for (int r = 0; r < 4; ++r) s[l][6 + r] = float_to_bits(cut_off(c[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)]));
}

inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Combine combine) {
  uint32_t in[10] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  std::memcpy(in + 6, c, 16);
  std::memcpy(c, collective(in, 10, combine)[lane()] + 6, 16);
}

}  // namespace emulator
#endif

// c (16 x 8) += a (16 x 8) b (8 x 8); the 13 low bits of a and b are not read.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FASTNN_SM80
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  emulator::multiply(c, a, b, [](emulator::Slots s) {
    emulator::multiply_fragments<1>(s, [](uint32_t word, int) { return bits_to_float(word & 0xffffe000u); });
  });
#endif
}

// c (16 x 8) += a (16 x 16) b (16 x 8); a word holds two values, the lower first.
template <class T>
__device__ __forceinline__ void mma_16bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_16bit<bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FASTNN_SM80
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  emulator::multiply(c, a, b, [](emulator::Slots s) {
    emulator::multiply_fragments<2>(
        s, [](uint32_t word, int part) { return widen(bfloat16{static_cast<uint16_t>(word >> 16 * part)}); });
  });
#endif
}

template <>
__device__ __forceinline__ void mma_16bit<float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FASTNN_SM80
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  emulator::multiply(c, a, b, [](emulator::Slots s) {
    emulator::multiply_fragments<2>(
        s, [](uint32_t word, int part) { return widen(float16{static_cast<uint16_t>(word >> 16 * part)}); });
  });
#endif
}

// Four 8 x 8 matrices of 16-bit values: lane 8 i + j gives the address of matrix i's row j (16 bytes), and words[i]
// becomes matrix i's (g, 2 t) and (g, 2 t + 1). So of a matrix of 8 x 4 words it becomes (g, t).
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  const emulator::Slots rows = emulator::exchange_rows(row);
  for (int i = 0; i < 4; ++i) words[i] = rows[8 * i + emulator::lane() / 4][emulator::lane() % 4];
#endif
}

// The same, transposed: words[i] becomes matrix i's (2 t, g) and (2 t + 1, g).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  const emulator::Slots rows = emulator::exchange_rows(row);
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t low, high;
    std::memcpy(&low, reinterpret_cast<const char*>(rows[8 * i + 2 * t]) + 2 * g, 2);
    std::memcpy(&high, reinterpret_cast<const char*>(rows[8 * i + 2 * t + 1]) + 2 * g, 2);
    words[i] = low | uint32_t{high} << 16;
  }
#endif
}

}  // namespace fastnn::cuda
