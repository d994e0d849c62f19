#include "cuda/fork.h"

#include <array>

#include "cuda/device.h"
#include "cuda/launch.cuh"

namespace fastnn::cuda {

#ifdef __CUDACC__

namespace {

// A thread's second stream on a device. A capture holds it until its end, so that no other thread may have it.
struct Side {
  cudaStream_t stream = nullptr;
  cudaEvent_t event = nullptr;
  // The streams whose next kernel is the first after a fork, or a join.
  cudaStream_t forked = nullptr, joined = nullptr;
};

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
  side.forked = side.stream;
  side_.stream = side.stream;
}

void Fork::join() const {
  if (side_.stream == queue_.stream) return;
  const cudaStream_t stream = static_cast<cudaStream_t>(queue_.stream);
  order("join", queue_, static_cast<cudaStream_t>(side_.stream), stream);
  side_of(queue_.device).joined = stream;
}

bool may_come_early(const Queue& queue) {
  Side& side = side_of(queue.device);
  for (cudaStream_t* waiting : {&side.forked, &side.joined})
    if (*waiting && *waiting == queue.stream) {
      *waiting = nullptr;
      return false;
    }
  return true;
}

#else

// On the emulator a launch has run when it returns.
Fork::Fork(const Queue& queue, bool) : queue_(queue), side_(queue) {}
void Fork::join() const {}
bool may_come_early(const Queue&) { return true; }

#endif

}  // namespace fastnn::cuda
