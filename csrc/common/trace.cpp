#include "common/trace.h"

#include <atomic>
#include <mutex>
#include <vector>

namespace fastnn {
namespace {

std::atomic<bool> tracing{false};
std::mutex records_mutex;
std::vector<TraceRecord> records;

}  // namespace

void trace_kernel(const TraceRecord& record) {
  if (!tracing.load(std::memory_order_relaxed)) return;
  const std::lock_guard<std::mutex> lock(records_mutex);
  records.push_back(record);
}

void trace_start() {
  const std::lock_guard<std::mutex> lock(records_mutex);
  records.clear();
  tracing = true;
}

void trace_stop(void (*visit)(const TraceRecord&, void*), void* context) {
  const std::lock_guard<std::mutex> lock(records_mutex);
  tracing = false;
  for (const TraceRecord& record : records) visit(record, context);
  records.clear();
}

}  // namespace fastnn
