// Each primitive of primitives.cuh on the emulator, against what the PTX ISA and the formats say, and what the emulator
// promises of its schedules and of its errors.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cuda/emulator/tests/test.h"

namespace fastnn::cuda::tests {
namespace {

constexpr int kWarps = 3;  // in blocks of the tests: lanes are not threads, and warps must not meet

// Launches body() as a kernel of one block; it may write to what is around it.
template <class Body>
void run_block(int threads, size_t shared_bytes, const Body& body) {
  emulator::launch("test", dim3(1), dim3(threads), shared_bytes, body);
}

// The error of a launch, empty where there is none.
template <class Body>
std::string error_of(int threads, size_t shared_bytes, const Body& body) {
  try {
    run_block(threads, shared_bytes, body);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void expect_error(const std::string& error, const std::string& part) {
  expect(error.find(part) != std::string::npos, "expected an error with '" + part + "', got '" + error + "'");
}

int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarpThreads; }

// Matrix products. Where fragments lie, as the PTX ISA's section on each mma shape tells: element i of lane 4 g + t.

struct Place {
  int row, column;
};

struct Tf32 {
  using Word = uint32_t;
  static constexpr int kDepth = 8;
  static Place a(int g, int t, int i) { return {i == 0 || i == 2 ? g : g + 8, i < 2 ? t : t + 4}; }
  static Place b(int g, int t, int i) { return {i == 0 ? t : t + 4, g}; }
  // The bits that are not read are set.
  static uint32_t word(double value) { return float_to_bits(static_cast<float>(value)) | 0x1fff; }
  static void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_tf32(c, a, b); }
};

template <class T>
struct Half {
  using Word = uint16_t;
  static constexpr int kDepth = 16;
  static Place a(int g, int t, int i) {
    return {i < 2 || (4 <= i && i < 6) ? g : g + 8, 2 * t + i % 2 + (i < 4 ? 0 : 8)};
  }
  static Place b(int g, int t, int i) { return {2 * t + i % 2 + (i < 2 ? 0 : 8), g}; }
  static uint16_t word(double value) { return narrow<T>(static_cast<float>(value)).bits; }
  static void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_16bit<T>(c, a, b); }
};

template <class Product>
std::string test_mma() {
  constexpr int kDepth = Product::kDepth, kParts = 4 / sizeof(typename Product::Word);
  struct Matrices {
    double a[16][kDepth], b[kDepth][8], c[16][8], result[16][8];
  };
  std::vector<Matrices> matrices(kWarps);
  int state = 1;
  const auto number = [&] { return (state = state * 31 % 1009) % 17 - 8; };
  for (Matrices& m : matrices) {
    for (auto& row : m.a) std::generate(std::begin(row), std::end(row), number);
    for (auto& row : m.b) std::generate(std::begin(row), std::end(row), number);
    for (auto& row : m.c) std::generate(std::begin(row), std::end(row), number);
  }
  run_block(kWarps * kWarpThreads, 0, [&] {
    Matrices& m = matrices[threadIdx.x / kWarpThreads];
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    uint32_t a[4] = {}, b[2] = {};
    for (int i = 0; i < 4 * kParts; ++i) {
      const Place p = Product::a(g, t, i);
      a[i / kParts] |= uint32_t{Product::word(m.a[p.row][p.column])} << (16 * (i % kParts));
    }
    for (int i = 0; i < 2 * kParts; ++i) {
      const Place p = Product::b(g, t, i);
      b[i / kParts] |= uint32_t{Product::word(m.b[p.row][p.column])} << (16 * (i % kParts));
    }
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(m.c[i < 2 ? g : g + 8][2 * t + i % 2]);
    Product::multiply(c, a, b);
    for (int i = 0; i < 4; ++i) m.result[i < 2 ? g : g + 8][2 * t + i % 2] = c[i];
  });
  for (const Matrices& m : matrices)
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        double sum = m.c[row][column];
        for (int k = 0; k < kDepth; ++k) sum += m.a[row][k] * m.b[k][column];
        expect(m.result[row][column] == sum, "expected " + std::to_string(sum) + " at (" + std::to_string(row) + ", " +
                                                 std::to_string(column) + "), got " +
                                                 std::to_string(m.result[row][column]));
      }
  return "";
}

// The four matrices lie in rows of 24 values: one below the other, each with its rows apart.
template <bool kTransposed>
std::string test_load_matrices() {
  constexpr int kRow = 24;
  uint32_t words[kWarps * kWarpThreads][4];
  run_block(kWarps * kWarpThreads, kWarps * kWarpThreads * kRow * 2, [&] {
    uint16_t* shared = shared_memory<uint16_t>();
    uint16_t* row = shared + threadIdx.x * kRow;
    for (int column = 0; column < 8; ++column) row[column] = static_cast<uint16_t>(threadIdx.x * 8 + column);
    sync_block();
    if constexpr (kTransposed)
      load_matrices_transposed(words[threadIdx.x], row);
    else
      load_matrices(words[threadIdx.x], row);
  });
  for (int thread = 0; thread < kWarps * kWarpThreads; ++thread)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int g = thread % 32 / 4, t = thread % 4, first_row = thread / 32 * 32 + matrix * 8;
      const auto element = [&](int row, int column) { return static_cast<uint32_t>((first_row + row) * 8 + column); };
      const uint32_t low = kTransposed ? element(2 * t, g) : element(g, 2 * t);
      const uint32_t high = kTransposed ? element(2 * t + 1, g) : element(g, 2 * t + 1);
      expect(words[thread][matrix] == (low | high << 16), "thread " + std::to_string(thread) + " got another element");
    }
  return "";
}

template <class V>
std::string test_shuffle_xor() {
  constexpr int kThreads = kWarps * kWarpThreads;
  V got[kThreads];
  for (int mask = 1; mask < kWarpThreads; ++mask) {
    run_block(kThreads, 0, [&] { got[threadIdx.x] = shuffle_xor(static_cast<V>(threadIdx.x + 0.25), mask); });
    for (int i = 0; i < kThreads; ++i)
      expect(got[i] == static_cast<V>((i ^ mask) + 0.25), "mask " + std::to_string(mask) + ": another lane's value");
  }
  return "";
}

// Two groups: after the wait that leaves one, the first has landed; the second too where copies are eager.
template <int kBytes>
std::string test_copies() {
  constexpr int kCount = kBytes / 4;
  Memory memory;
  const float* from = memory.input<float>(2 * kCount, 1);
  const bool eager = emulator::schedule.eager_copies;
  run_block(2 * kWarpThreads, 2 * kWarpThreads * 3 * kBytes, [&] {
    float* to = shared_memory<float>() + threadIdx.x * 3 * kCount;
    const float* first = from + threadIdx.x % 2 * kCount;
    copy_async<kBytes>(to, first, true);
    copy_async<kBytes>(to + kCount, nullptr, false);
    device_check(is_poison(to[0]) != eager, "a copy has landed before its wait, or has not where it is eager");
    commit_copies();
    copy_async<kBytes>(to + 2 * kCount, from, true);
    commit_copies();
    wait_for_copies<1>();
    for (int i = 0; i < kCount; ++i) {
      device_check(to[i] == first[i], "the first group's copy has not landed");
      device_check(to[kCount + i] == 0, "the first group's zeros have not landed");
      device_check(is_poison(to[2 * kCount + i]) != eager,
                   "the second group has landed early, or has not where it is eager");
    }
    wait_for_copies<0>();
    for (int i = 0; i < kCount; ++i) device_check(to[2 * kCount + i] == from[i], "the second group has not landed");
  });
  return memory.check();
}

// Numbers

// The value of a 16-bit format's bits without special cases: what its infinity would be if there were numbers beyond.
template <class T>
double plain_value(uint16_t bits) {
  constexpr int kMantissa = std::is_same_v<T, bfloat16> ? 7 : 10, kBias = std::is_same_v<T, bfloat16> ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> kMantissa, mantissa = bits & ((1 << kMantissa) - 1);
  const double value = exponent ? std::ldexp((1 << kMantissa) + mantissa, exponent - kBias - kMantissa)
                                : std::ldexp(mantissa, 1 - kBias - kMantissa);
  return bits & 0x8000 ? -value : value;
}

// All 65536 bits widened, and narrowed again from the value itself and from around the middle to the next.
template <class T>
std::string test_16bit_format() {
  constexpr uint16_t kInfinity = std::is_same_v<T, bfloat16> ? 0x7f80 : 0x7c00;
  const auto narrowed = [](double x) { return narrow<T>(static_cast<float>(x)).bits; };
  for (int i = 0; i < 0x10000; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i), magnitude = bits & 0x7fff;
    const float wide = widen(T{bits});
    const std::string name = "bits " + std::to_string(i);
    if (magnitude > kInfinity) {
      expect(std::isnan(wide) && std::isnan(widen(narrow<T>(wide))), name + ": expected NaN");
      continue;
    }
    expect(std::signbit(wide) == (bits >= 0x8000), name + ": another sign");
    expect(narrowed(wide) == bits, name + ": narrowed to others");
    if (magnitude == kInfinity) {
      expect(std::isinf(wide), name + ": expected infinity");
      continue;
    }
    expect(wide == plain_value<T>(bits), name + ": another value");
    const uint16_t next = bits + 1, even = bits % 2 ? next : bits;  // away from zero
    const float middle = static_cast<float>((plain_value<T>(bits) + plain_value<T>(next)) / 2);
    const float far = middle < 0 ? -INFINITY : INFINITY;
    expect(narrowed(middle) == even, name + ": expected ties to even");
    expect(narrowed(std::nextafter(middle, 0.0f)) == bits, name + ": rounded away from the nearest, below");
    expect(narrowed(std::nextafter(middle, far)) == next, name + ": rounded away from the nearest, above");
  }
  return "";
}

std::string test_to_tf32() {
  for (uint64_t step = 0; step < 0x100000000u; step += 65521) {  // a prime: all low bits occur
    const float x = bits_to_float(static_cast<uint32_t>(step)), got = bits_to_float(to_tf32(x));
    const std::string name = "bits " + std::to_string(step);
    if (std::isnan(x)) {
      expect(std::isnan(got), name + ": expected NaN");
      continue;
    }
    // A mantissa of 11 bits with the leading one, or as many as lie above the smallest number's tenth.
    const int exponent = std::isinf(x) || x == 0 ? 0 : std::max(std::ilogb(x), -126) - 10;
    const double expected = std::ldexp(std::round(std::ldexp(double{x}, -exponent)), exponent);
    expect(got == static_cast<float>(expected), name + ": expected " + std::to_string(expected));
  }
  expect(std::isnan(bits_to_float(to_tf32(bits_to_float(~0u)))), "poison: expected NaN");
  return "";
}

// What the emulator promises

std::string test_orders() {
  constexpr int kThreads = 4 * kWarpThreads;
  std::vector<unsigned> order, after_shuffle;
  run_block(kThreads, 0, [&] {
    order.push_back(threadIdx.x);
    shuffle_xor(1.0f, 1);
    after_shuffle.push_back(threadIdx.x / kWarpThreads);
  });
  std::vector<unsigned> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (unsigned i = 0; i < kThreads; ++i) expect(sorted[i] == i, "a thread ran twice or not at all");
  switch (emulator::schedule.order) {
    case emulator::Order::forward: expect(order == sorted, "expected threads in their order"); break;
    case emulator::Order::reverse:
      expect(std::equal(order.begin(), order.end(), sorted.rbegin()), "expected threads in reverse");
      break;
    case emulator::Order::random: expect(order != sorted, "expected threads out of order"); break;
    case emulator::Order::greedy:
      expect(std::is_sorted(after_shuffle.begin(), after_shuffle.end()), "expected one warp after the other");
      break;
  }
  return "";
}

std::string test_threads_that_return_before_a_barrier() {
  int reached = 0;
  run_block(100, 0, [&] {
    if (threadIdx.x % 3 == 0) return;
    sync_block();
    ++reached;
  });
  expect(reached == 66, "expected 66 threads after the barrier");
  return "";
}

// An error ends a block, with the objects on its threads' stacks, and leaves nothing for the next launch.
std::string test_errors() {
  int alive = 0;
  struct Counted {
    int& alive;
    explicit Counted(int& alive) : alive(++alive) {}
    ~Counted() { --alive; }
  };
  const std::string error = error_of(100, 0, [&] {
    const Counted counted(alive);
    if (threadIdx.x != 5) sync_block();
    device_check(threadIdx.x != 5, "five");
    sync_block();
  });
  expect(error == "test: five (block (0, 0, 0))", "expected the check's message, got '" + error + "'");
  expect(alive == 0, "expected all threads' objects destroyed");
  return test_threads_that_return_before_a_barrier();
}

std::string test_errors_of_some_blocks() {
  std::string error;
  try {
    emulator::launch("test", dim3(5, 2, 3), dim3(32), 0,
                     [] { device_check(blockIdx.x != 3 || blockIdx.y != 1 || blockIdx.z != 2, "there"); });
  } catch (const std::runtime_error& e) {
    error = e.what();
  }
  expect(error == "test: there (block (3, 1, 2))", "expected the block's number, got '" + error + "'");
  return "";
}

std::string test_limits() {
  expect_error(error_of(1025, 0, [] {}), "1024 threads");
  for (const auto& [capability, kilobytes] : {std::pair{90, 227}, {89, 99}, {86, 99}, {80, 163}, {75, 64}}) {
    emulator::capability = capability;
    const std::string error = error_of(32, (kilobytes << 10) + 1, [] {}), none = error_of(32, kilobytes << 10, [] {});
    emulator::capability = 90;
    expect_error(error, "shared memory");
    expect(none.empty(), none);
  }
  return "";
}

}  // namespace

std::vector<Case> primitive_cases() {
  return {{"primitive/mma_tf32", test_mma<Tf32>},
          {"primitive/mma_bfloat16", test_mma<Half<bfloat16>>},
          {"primitive/mma_float16", test_mma<Half<float16>>},
          {"primitive/load_matrices", test_load_matrices<false>},
          {"primitive/load_matrices_transposed", test_load_matrices<true>},
          {"primitive/shuffle_xor_float", test_shuffle_xor<float>},
          {"primitive/shuffle_xor_double", test_shuffle_xor<double>},
          {"primitive/shuffle_xor_int64", test_shuffle_xor<int64_t>},
          {"primitive/copies_of_4", test_copies<4>},
          {"primitive/copies_of_8", test_copies<8>},
          {"primitive/copies_of_16", test_copies<16>},
          {"primitive/bfloat16", test_16bit_format<bfloat16>},
          {"primitive/float16", test_16bit_format<float16>},
          {"primitive/to_tf32", test_to_tf32},
          {"primitive/orders", test_orders},
          {"primitive/return_before_barrier", test_threads_that_return_before_a_barrier},
          {"primitive/errors", test_errors},
          {"primitive/errors_of_some_blocks", test_errors_of_some_blocks},
          {"primitive/limits", test_limits}};
}

}  // namespace fastnn::cuda::tests
