// Many threads at once: kernels on fastnn's own threads from several callers, while others change the number of
// threads, the instruction set and the record of what ran. Made for ThreadSanitizer, which sees every access of this
// program but not how libgomp synchronises: OpenMP's threads take no part.
#include <omp.h>

#include <atomic>
#include <thread>

#include "check.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "common/trace.h"
#include "reference.h"

namespace fastnn::tests {
namespace {

constexpr int kCallers = 4;
constexpr int kRounds = 200;

// One caller: a layer forward and backward again and again, always with the same integers.
int64_t call_kernels(int caller) {
  cpu::set_own_threads(true);
  Report report;
  report.enter("caller " + std::to_string(caller));
  const LinearShape s{60 + caller, 33, 40, true, Precision::fp32};
  const auto input = integers<float>(s.batch * s.in_features, 1), weight = integers<float>(s.out_features * 33, 2);
  const auto bias = integers<float>(s.out_features, 3), grad = integers<float>(s.batch * s.out_features, 4);
  const LinearReference expected(s, as_double(input), as_double(weight), as_double(bias), as_double(grad));
  for (int round = 0; round < kRounds; ++round) {
    omp_set_num_threads(1 + (round + caller) % 5);
    auto output = unwritten<float>(s.batch * s.out_features), grad_input = unwritten<float>(s.batch * s.in_features);
    auto grad_weight = unwritten<float>(s.out_features * s.in_features), grad_bias = unwritten<float>(s.out_features);
    cpu::kernels<float>().linear_forward(s, {output.data(), input.data(), weight.data(), bias.data()});
    cpu::kernels<float>().linear_backward(s, {grad_input.data(), grad_weight.data(), grad_bias.data(), grad.data(),
                                              input.data(), weight.data(), output.data()});
    report.exact("linear_forward", output, expected.output);
    report.exact("linear grad_input", grad_input, expected.grad_input);
    report.exact("linear grad_weight", grad_weight, expected.grad_weight);
    report.exact("linear grad_bias", grad_bias, expected.grad_bias);
  }
  return report.failures();
}

}  // namespace
}  // namespace fastnn::tests

int main() {
  using namespace fastnn;
  std::atomic<int64_t> failures{0};
  std::atomic<bool> done{false};
  std::thread switching([&] {
    while (!done) {
      for (int isa = 0; isa < cpu::isa_count(); ++isa) cpu::set_isa(cpu::isa_name(isa));
      trace_start();
      std::this_thread::yield();
      trace_stop([](const TraceRecord&, void*) {}, nullptr);
    }
  });
  std::vector<std::thread> callers;
  for (int caller = 0; caller < tests::kCallers; ++caller)
    callers.emplace_back([&, caller] { failures += tests::call_kernels(caller); });
  for (std::thread& caller : callers) caller.join();
  done = true;
  switching.join();

  // A loop inside a task runs on the thread of that task.
  cpu::set_own_threads(true);
  omp_set_num_threads(3);
  std::atomic<int64_t> visited{0};
  cpu::parallel_for(50, [&](int64_t) { cpu::parallel_for(20, [&](int64_t) { ++visited; }); });
  if (visited != 50 * 20) ++failures;
  std::printf("%d callers, %d rounds each: %lld failed\n", tests::kCallers, tests::kRounds,
              static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}
