// Sums and maxima over threads that share a piece of work, a team. The order is always the same: pairs of lanes within
// a warp, then through shared memory one part of the team after the other. So results are the same bits in every run.
#pragma once

#include "cuda/primitives.cuh"

namespace fastnn::cuda {

struct Add {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};

// The second where one of both is NaN: what is computed with the result turns NaN by itself.
struct Larger {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

// How a block's threads are shared out: `span` teams side by side, each of `parts` times `lanes` threads. Letters are
// teams, | separates parts:
//
//   lanes 4, parts 1, span 8     aaaabbbbccccddddeeeeffffgggghhhh                    few numbers to reduce
//   lanes 32, parts 2, span 1    aaaaaaaaaaaaaaaaaaaa... | aaaaaaaaaaaaaaaaaaaa...   many, next to each other
//   lanes 1, parts 2, span 32    abcdefghijklmnopqrst... | abcdefghijklmnopqrst...   many, far from each other
struct TeamShape {
  int lanes;  // neighbours in a warp; a power of two
  int parts;
  int span;
  int threads() const { return lanes * parts * span; }  // of a block: whole warps
  // Shared memory for what a team reduces in values of V.
  template <class V>
  size_t shared_bytes() const {
    return parts > 1 ? parts * span * sizeof(V) : 0;
  }
};

// A thread's place in its team.
struct Team {
  TeamShape shape;
  int position;  // of the team among those of the block
  int part, lane;

  __device__ __forceinline__ explicit Team(const TeamShape& s) : shape(s) {
    const int thread = static_cast<int>(threadIdx.x), group = thread / s.lanes;
    position = group % s.span;
    part = group / s.span;
    lane = thread % s.lanes;
  }

  __device__ __forceinline__ int members() const { return shape.parts * shape.lanes; }
  __device__ __forceinline__ int member() const { return part * shape.lanes + lane; }

  // The team's values combined, for every member. All threads of the block take part.
  template <class Combine, class V>
  __device__ __forceinline__ V reduce(V value, Combine combine) const {
    for (int mask = shape.lanes / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
    if (shape.parts == 1) return value;
    V* slots = shared_memory<V>();
    sync_block();  // the last reduction's readers are done
    if (lane == 0) slots[part * shape.span + position] = value;
    sync_block();
    value = slots[position];
    for (int p = 1; p < shape.parts; ++p) value = combine(value, slots[p * shape.span + position]);
    return value;
  }

  template <class V>
  __device__ __forceinline__ V sum(V value) const {
    return reduce(value, Add());
  }
  template <class V>
  __device__ __forceinline__ V largest(V value) const {
    return reduce(value, Larger());
  }
};

inline int round_to_warps(int64_t threads) {
  return static_cast<int>((threads + kWarpThreads - 1) / kWarpThreads * kWarpThreads);
}

// All threads of a block as one team.
__host__ __device__ __forceinline__ TeamShape block_team(int threads) {
  return {kWarpThreads, threads / kWarpThreads, 1};
}

}  // namespace fastnn::cuda
