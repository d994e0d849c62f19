// Tests of the emulator and, on it, of the CUDA kernels' memory accesses, without Python:
//
//   fastnn_emulator_test [--list] [--schedule ORDER-COPIES]... [CASE...]
//
// runs the cases (all but the broken kernels, where none is named) under schedules (all, where none is named) and
// prints a line for each. Fails where a line says FAILED.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "cuda/emulator/tests/test.h"

namespace fastnn::cuda::tests {

void expect(bool holds, const std::string& otherwise) {
  if (!holds) throw std::runtime_error(otherwise);
}

namespace {

constexpr size_t kAlignment = 256;
#ifdef FASTNN_ASAN
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = kAlignment;
#endif

bool is_untouched(const unsigned char* begin, const unsigned char* end) {
  for (; begin < end; ++begin)
    if (*begin != 0xFF) return false;
  return true;
}

}  // namespace

void* Memory::allocate(size_t bytes, size_t offset) {
  const size_t before = kGuard + offset, total = before + bytes + kGuard;
  void* allocation = nullptr;
  if (posix_memalign(&allocation, kAlignment, total) != 0) throw std::bad_alloc();
  std::memset(allocation, 0xFF, total);
  unsigned char* begin = static_cast<unsigned char*>(allocation);
  arrays_.push_back({begin, begin + before, bytes, false, nullptr, {}});
  return begin + before;
}

Memory::~Memory() {
  for (const Array& array : arrays_) std::free(array.allocation);
}

Queue Memory::queue() {
  return {0, nullptr, [](void* memory, size_t bytes) { return static_cast<Memory*>(memory)->allocate(bytes, 0); },
          this};
}

std::string Memory::check() const {
  std::string result;
  for (size_t i = 0; i < arrays_.size(); ++i) {
    const Array& a = arrays_[i];
    const std::string name = "array " + std::to_string(i);
    const unsigned char* end = a.data + a.bytes;
    expect(is_untouched(a.allocation, a.data), name + " is written to before its begin");
    expect(is_untouched(end, end + kGuard), name + " is written to after its end");
    if (!a.is_output) {
      expect(a.original.empty() || std::memcmp(a.original.data(), a.data, a.bytes) == 0, name + " has changed");
      continue;
    }
    const int64_t missing = a.first_missing(a.data, a.bytes);
    expect(missing < 0, name + " is not written, or NaN, at " + std::to_string(missing));
    result.append(reinterpret_cast<const char*>(a.data), a.bytes);
  }
  return result;
}

namespace {

struct NamedSchedule {
  std::string name;
  emulator::Schedule schedule;
};

std::vector<NamedSchedule> all_schedules() {
  const char* const orders[] = {"forward", "reverse", "random", "greedy"};
  std::vector<NamedSchedule> schedules;
  for (const bool eager : {false, true})
    for (int i = 0; i < 4; ++i)
      schedules.push_back(
          {std::string(orders[i]) + (eager ? "-eager" : "-lazy"), {static_cast<emulator::Order>(i), 1, eager}});
  return schedules;
}

// Runs a case under each schedule; whether all went well.
bool run(const Case& test, const std::vector<NamedSchedule>& schedules) {
  bool passed = true;
  std::optional<std::string> first;
  for (const NamedSchedule& s : schedules) {
    emulator::schedule = s.schedule;
    std::string error;
    try {
      const std::string result = test.run();
      if (!first) first = result;
      if (result != *first) error = "other bits than under an earlier schedule";
    } catch (const std::exception& e) {
      error = e.what();
    }
    passed = passed && error.empty();
    std::printf("%s %s: %s%s\n", test.name.c_str(), s.name.c_str(),
                error.empty() ? "passed" : "FAILED: ", error.c_str());
    std::fflush(stdout);  // before the address sanitizer ends the program
  }
  return passed;
}

bool contains(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

int run_arguments(const std::vector<std::string>& arguments) {
  bool list = false;
  std::vector<std::string> case_names, schedule_names;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--list")
      list = true;
    else if (arguments[i] == "--schedule" && i + 1 < arguments.size())
      schedule_names.push_back(arguments[++i]);
    else
      case_names.push_back(arguments[i]);
  }
  std::vector<NamedSchedule> schedules = all_schedules();
  if (!schedule_names.empty())
    std::erase_if(schedules, [&](const NamedSchedule& s) { return !contains(schedule_names, s.name); });
  std::vector<Case> cases = primitive_cases();
  for (const auto& more : {operator_cases(), broken_cases()}) cases.insert(cases.end(), more.begin(), more.end());
  if (!case_names.empty())
    std::erase_if(cases, [&](const Case& c) { return !contains(case_names, c.name); });
  else if (!list)
    std::erase_if(cases, [](const Case& c) { return c.name.starts_with("broken/"); });
  expect(!cases.empty() && !schedules.empty(), "no such case or schedule");
  bool passed = true;
  for (const Case& test : cases) {
    if (list)
      std::printf("%s\n", test.name.c_str());
    else
      passed = run(test, schedules) && passed;
  }
  return passed ? 0 : 1;
}

}  // namespace
}  // namespace fastnn::cuda::tests

int main(int count, char** arguments) {
  try {
    return fastnn::cuda::tests::run_arguments({arguments + 1, arguments + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fastnn_emulator_test: %s\n", error.what());
    return 2;
  }
}
