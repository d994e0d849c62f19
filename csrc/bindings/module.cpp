// fastnn._C, or fastnn._C_emulator: the list of what it offers. Every operator registers itself in its own file.
#include "bindings/module.h"

PYBIND11_MODULE(FASTNN_MODULE, module) {
  module.doc() = "Kernels of fastnn. Outputs are allocated by the caller and filled here.";
  fastnn::bind_runtime(module);
  fastnn::bind_program(module);
  fastnn::bind_linear(module);
  fastnn::bind_conv2d(module);
  fastnn::bind_batch(module);
  fastnn::bind_optimizer(module);
  fastnn::bind_max_pool2d(module);
  fastnn::bind_relu(module);
  fastnn::bind_softmax(module);
  fastnn::bind_cross_entropy(module);
  fastnn::bind_nll_loss(module);
  fastnn::bind_mse_loss(module);
}
