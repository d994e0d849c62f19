// Numbers to compute with, and comparisons with the references of reference.h, which are in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace fastnn::tests {

// -3..3: sums of thousands of products stay below 2^24, hence exact in float, and kernels must give them bit for bit.
template <class T>
std::vector<T> integers(int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(static_cast<int>(engine() % 7) - 3);
  return values;
}

// Fractions of low..high that float holds exactly.
template <class T>
std::vector<T> fractions(int64_t count, double low, double high, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(static_cast<float>(low + (high - low) * (engine() % 4096) / 4096));
  return values;
}

// What a kernel has to overwrite.
template <class T>
std::vector<T> unwritten(int64_t count) {
  return std::vector<T>(static_cast<size_t>(count), std::is_floating_point_v<T> ? std::numeric_limits<T>::quiet_NaN()
                                                                                : std::numeric_limits<T>::max());
}

template <class T>
std::vector<double> as_double(const std::vector<T>& values) {
  return {values.begin(), values.end()};
}

// Counts comparisons and says which failed, for one ISA, dtype and case.
class Report {
 public:
  void enter(std::string where) { where_ = std::move(where); }
  int64_t checks() const { return checks_; }
  int64_t failures() const { return failures_; }

  // Every element within relative * |expected| + absolute.
  template <class T>
  void close(const char* name, const std::vector<T>& got, const std::vector<double>& expected, double relative,
             double absolute = 0) {
    ++checks_;
    if (got.size() != expected.size())
      return fail(name, "expected " + std::to_string(expected.size()) + " elements, got " + std::to_string(got.size()));
    for (size_t i = 0; i < got.size(); ++i) {
      const double value = static_cast<double>(got[i]);
      if (std::fabs(value - expected[i]) <= relative * std::fabs(expected[i]) + absolute) continue;
      return fail(name, "expected " + std::to_string(expected[i]) + " at " + std::to_string(i) + ", got " +
                            std::to_string(value));
    }
  }
  template <class T>
  void exact(const char* name, const std::vector<T>& got, const std::vector<double>& expected) {
    close(name, got, expected, 0);
  }
  void that(const char* name, bool holds, const std::string& otherwise) {
    ++checks_;
    if (!holds) fail(name, otherwise);
  }

 private:
  void fail(const char* name, const std::string& what) {
    ++failures_;
    std::printf("FAILED %s: %s: %s\n", where_.c_str(), name, what.c_str());
  }

  std::string where_;
  int64_t checks_ = 0, failures_ = 0;
};

// Half the distance from 1 to the next number.
template <class T>
constexpr double kUnitRoundoff = std::numeric_limits<T>::epsilon() / 2.0;

}  // namespace fastnn::tests
