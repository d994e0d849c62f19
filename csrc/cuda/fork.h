// Two chains of kernels that need nothing of each other, side by side on the device: neither of two small products
// fills it alone.
//
//   Fork fork(queue, two);
//   ... launches on `queue`, and others on fork.side() ...
//   fork.join();  // what `queue` launches from now on waits for both
//
// Only while a CUDA graph is being captured: there a second chain is an edge of the graph, where launches one by one
// would pay the driver for it with each call. Otherwise, and where `two` says that there is one chain alone, side() is
// the queue itself.
#pragma once

#include "cuda/queue.h"

namespace fastnn::cuda {

class Fork {
 public:
  Fork(const Queue& queue, bool two);
  Fork(const Fork&) = delete;
  Fork& operator=(const Fork&) = delete;
  const Queue& side() const { return side_; }
  void join() const;

 private:
  const Queue& queue_;
  Queue side_;
};

// Whether the stream's next kernel may come onto the device before all that it waits for is done (begin_kernel()):
// asked once a kernel. Not the first after a fork or join, whose edges come from another stream.
bool may_come_early(const Queue& queue);

}  // namespace fastnn::cuda
