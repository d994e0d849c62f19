#include "cuda/fork.h"

#include <array>
#include <atomic>
#include <mutex>
#include <set>

#include "cuda/device.h"
#include "cuda/launch.cuh"

namespace fastnn::cuda {

#ifdef __CUDACC__

namespace {

// A thread's second stream on a device. A capture holds it until its end, so that no other thread may have it.
struct Side {
  cudaStream_t stream = nullptr;
  cudaEvent_t event = nullptr;
};

// The streams whose next kernel is the first after a fork or a join: of all threads, since the optimizer's may launch
// what follows autograd's.
class Waiting {
 public:
  void add(cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    streams_.insert(stream);
    count_ = streams_.size();
  }
  bool remove(cudaStream_t stream) {
    if (count_ == 0) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool found = streams_.erase(stream) > 0;
    count_ = streams_.size();
    return found;
  }

 private:
  std::mutex mutex_;
  std::set<cudaStream_t> streams_;
  std::atomic<size_t> count_{0};
};

Waiting waiting;

Side& side_of(int device) {
  thread_local std::array<Side, kMaxDevices> sides;
  return sides[device % kMaxDevices];
}

// The number of the capture that the stream is part of; 0 where nothing is being captured.
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long number = 0;
  cudaStreamGetCaptureInfo(stream, &status, &number);
  return status == cudaStreamCaptureStatusActive ? number : 0;
}

// Has `after` wait for all that `before` has.
void order(const char* operation, const Queue& queue, cudaStream_t before, cudaStream_t after) {
  const cudaEvent_t event = side_of(queue.device).event;
  cudaEventRecord(event, before);
  cudaStreamWaitEvent(after, event, 0);
  check_launch(operation, queue);
}

// Makes the stream and the event, for which captures have to look away.
void prepare(Side& side) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking);
  cudaEventCreateWithFlags(&side.event, cudaEventDisableTiming);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

}  // namespace

Fork::Fork(const Queue& queue, bool two) : queue_(queue), side_(queue) {
  const cudaStream_t stream = static_cast<cudaStream_t>(queue.stream);
  const unsigned long long capture = two ? capture_of(stream) : 0;
  if (!capture) return;
  Side& side = side_of(queue.device);
  if (!side.stream) prepare(side);
  const unsigned long long other = capture_of(side.stream);
  if (side.stream == stream || (other && other != capture)) return;
  order("fork", queue, stream, side.stream);
  waiting.add(side.stream);
  side_.stream = side.stream;
}

void Fork::join() const {
  if (side_.stream == queue_.stream) return;
  const cudaStream_t stream = static_cast<cudaStream_t>(queue_.stream);
  order("join", queue_, static_cast<cudaStream_t>(side_.stream), stream);
  waiting.add(stream);
}

bool may_come_early(const Queue& queue) { return !waiting.remove(static_cast<cudaStream_t>(queue.stream)); }

#else

// On the emulator a launch has run when it returns.
Fork::Fork(const Queue& queue, bool) : queue_(queue), side_(queue) {}
void Fork::join() const {}
bool may_come_early(const Queue&) { return true; }

#endif

}  // namespace fastnn::cuda
