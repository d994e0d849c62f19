// Lines along the classes of a dense (outer, classes, inner) array, each walked by a team of threads (reduce.cuh).
//
// Where the classes lie together (inner == 1) a team's neighbours take neighbouring classes of a row; else neighbouring
// teams take lines at neighbouring inner positions. Either way a warp's loads fall into few segments of memory. What a
// line is read for a second time comes from the L1 cache.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>

#include "cuda/divider.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace fastnn::cuda {

// Threads of a block. Wide rows take a block of twice as many, so that the rows a multiprocessor reads at a time stay
// in its L1 cache.
constexpr int kLineThreads = 256, kWideLineThreads = 512;
// For __launch_bounds__: 64 registers, of which double needs more.
template <class T>
constexpr int kWideLineBlocks = sizeof(T) == 8 ? 1 : 2;
// Rows up to here are a warp's at most, 8 classes a lane; beyond, a block hides the loads' latency better.
constexpr int64_t kWarpClasses = 256;
constexpr int64_t kWideClasses = 4096;
// Lines across memory of fewer classes than this are one thread's.
constexpr int64_t kThreadClasses = 32;

// Loads under way at a time in each thread, and the classes a lane takes before a row gets more lanes: shuffles cost
// more than these.
constexpr int kBatch = 4;

struct Lines {
  int64_t count, classes, inner;
  TeamShape team;

  int64_t bundles() const { return (count + team.span - 1) / team.span; }  // of the lines that a block takes at a time
  // The way taken, for the trace.
  const char* variant() const { return inner > 1 ? "lines" : team.parts > 1 ? "block_rows" : "warp_rows"; }
};

// `threads` is the most that a block of narrow lines may have: a power of two.
inline Lines plan_lines(const SoftmaxShape& s, int threads = kLineThreads) {
  Lines lines{s.outer * s.inner, s.classes, s.inner, {1, 1, 1}};
  const auto power = [](int64_t x, int64_t most) {
    return static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::min(x, most))));
  };
  const int64_t some = std::max<int64_t>(lines.count, 1);
  if (s.inner == 1 && s.classes > kWarpClasses) {
    lines.team = block_team(s.classes > kWideClasses ? kWideLineThreads : kLineThreads);
  } else if (s.inner == 1 || s.classes < kThreadClasses) {
    const int lanes = s.inner == 1 ? power((s.classes + kBatch - 1) / kBatch, kWarpThreads) : 1;
    const int needed = round_to_warps(std::min<int64_t>(some, threads) * lanes);
    lines.team = {lanes, 1, std::min(needed, threads) / lanes};
  } else {
    const int span = std::max(power(some, kWarpThreads), 8);  // 8 floats: a sector of memory
    lines.team = {1, kLineThreads / span, span};
  }
  return lines;
}

// Where class 0 of line `number` lies.
__device__ __forceinline__ int64_t line_offset(int64_t number, int64_t classes, int64_t inner) {
  if (inner == 1) return number * classes;
  const int64_t outer = divide64(number, inner);
  return number + outer * inner * (classes - 1);
}

// A thread's share of one line: the classes first, first + step, ... below `classes`.
struct Line {
  int64_t number;
  int64_t offset, stride;  // where the first of the classes lies, and how far apart they are
  int64_t first, step, classes;
  bool there;  // else a number past the last line: without classes, but part of the team's reductions

  __device__ __forceinline__ bool leads() const { return there && first == 0; }

  // visit(load(at, class), at, class) for each of the classes, which lies at `at`.
  template <class Load, class Visit>
  __device__ __forceinline__ void walk(const Load& load, const Visit& visit) const {
    int64_t at = offset;
    for (int64_t c = first; c < classes; c += kBatch * step, at += kBatch * stride) {
      decltype(load(at, c)) values[kBatch] = {};
      for (int k = 0; k < kBatch; ++k)
        if (c + k * step < classes) values[k] = load(at + k * stride, c + k * step);
      for (int k = 0; k < kBatch; ++k)
        if (c + k * step < classes) visit(values[k], at + k * stride, c + k * step);
    }
  }
};

// body(team, line) for the lines that fall to this thread, all threads of a block equally often.
template <class Body>
__device__ __forceinline__ void for_lines(const Lines& lines, const Body& body) {
  const Team team(lines.team);
  const int64_t step = int64_t{gridDim.x} * lines.team.span;
  for (int64_t start = int64_t{blockIdx.x} * lines.team.span; start < lines.count; start += step) {
    const int64_t number = start + team.position;
    const bool there = number < lines.count;
    const int64_t offset = there ? line_offset(number, lines.classes, lines.inner) + team.member() * lines.inner : 0;
    body(team, Line{number, offset, team.members() * lines.inner, team.member(), team.members(),
                    there ? lines.classes : 0, there});
  }
}

template <class C>
constexpr C kMinusInfinity = -std::numeric_limits<C>::infinity();

template <class T>
__device__ __forceinline__ Compute<T> line_largest(const Team& team, const Line& line, const T* x) {
  Compute<T> largest = kMinusInfinity<Compute<T>>;
  line.walk([&](int64_t at, int64_t) { return widen(x[at]); },
            [&](Compute<T> value, int64_t, int64_t) { largest = Larger()(value, largest); });
  return team.largest(largest);
}

}  // namespace fastnn::cuda
