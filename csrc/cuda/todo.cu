// Stages without a kernel yet.
#include "cuda/launch.cuh"

namespace fastnn::cuda {

template <class T>
void Kernels<T>::linear_forward(const LinearShape&, const LinearForward<T>&) const {
  throw std::runtime_error("linear_forward: not there");
}
FASTNN_INSTANTIATE(void, linear_forward, LinearShape, LinearForward)
template <class T>
void Kernels<T>::linear_backward(const LinearShape&, const LinearBackward<T>&) const {
  throw std::runtime_error("linear_backward: not there");
}
FASTNN_INSTANTIATE(void, linear_backward, LinearShape, LinearBackward)
template <class T>
void Kernels<T>::conv2d_forward(const Conv2dShape&, const Conv2dForward<T>&) const {
  throw std::runtime_error("conv2d_forward: not there");
}
FASTNN_INSTANTIATE(void, conv2d_forward, Conv2dShape, Conv2dForward)
template <class T>
void Kernels<T>::conv2d_backward(const Conv2dShape&, const Conv2dBackward<T>&) const {
  throw std::runtime_error("conv2d_backward: not there");
}
FASTNN_INSTANTIATE(void, conv2d_backward, Conv2dShape, Conv2dBackward)
template <class T>
void Kernels<T>::softmax_forward(const SoftmaxShape&, const SoftmaxForward<T>&) const {
  throw std::runtime_error("softmax_forward: not there");
}
FASTNN_INSTANTIATE(void, softmax_forward, SoftmaxShape, SoftmaxForward)
template <class T>
void Kernels<T>::softmax_backward(const SoftmaxShape&, const SoftmaxBackward<T>&) const {
  throw std::runtime_error("softmax_backward: not there");
}
FASTNN_INSTANTIATE(void, softmax_backward, SoftmaxShape, SoftmaxBackward)
template <class T>
void Kernels<T>::log_softmax_forward(const SoftmaxShape&, const SoftmaxForward<T>&) const {
  throw std::runtime_error("log_softmax_forward: not there");
}
FASTNN_INSTANTIATE(void, log_softmax_forward, SoftmaxShape, SoftmaxForward)
template <class T>
void Kernels<T>::log_softmax_backward(const SoftmaxShape&, const SoftmaxBackward<T>&) const {
  throw std::runtime_error("log_softmax_backward: not there");
}
FASTNN_INSTANTIATE(void, log_softmax_backward, SoftmaxShape, SoftmaxBackward)
template <class T>
void Kernels<T>::mse_loss_forward(const MseLossShape&, const MseLossForward<T>&) const {
  throw std::runtime_error("mse_loss_forward: not there");
}
FASTNN_INSTANTIATE(void, mse_loss_forward, MseLossShape, MseLossForward)
template <class T>
void Kernels<T>::mse_loss_backward(const MseLossShape&, const MseLossBackward<T>&) const {
  throw std::runtime_error("mse_loss_backward: not there");
}
FASTNN_INSTANTIATE(void, mse_loss_backward, MseLossShape, MseLossBackward)
template <class T>
void Kernels<T>::cross_entropy_backward(const CrossEntropyShape&, const CrossEntropyBackward<T>&) const {
  throw std::runtime_error("cross_entropy_backward: not there");
}
FASTNN_INSTANTIATE(void, cross_entropy_backward, CrossEntropyShape, CrossEntropyBackward)
template <class T>
void Kernels<T>::nll_loss_backward(const NllLossShape&, const NllLossBackward<T>&) const {
  throw std::runtime_error("nll_loss_backward: not there");
}
FASTNN_INSTANTIATE(void, nll_loss_backward, NllLossShape, NllLossBackward)
template <class T>
int64_t Kernels<T>::cross_entropy_forward(const CrossEntropyShape&, const CrossEntropyForward<T>&) const {
  throw std::runtime_error("cross_entropy_forward: not there");
}
FASTNN_INSTANTIATE(int64_t, cross_entropy_forward, CrossEntropyShape, CrossEntropyForward)
template <class T>
int64_t Kernels<T>::nll_loss_forward(const NllLossShape&, const NllLossForward<T>&) const {
  throw std::runtime_error("nll_loss_forward: not there");
}
FASTNN_INSTANTIATE(int64_t, nll_loss_forward, NllLossShape, NllLossForward)

}  // namespace fastnn::cuda
