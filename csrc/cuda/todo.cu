// Stages without a kernel yet.
#include "cuda/launch.cuh"

namespace fastnn::cuda {

template <class T>
void Kernels<T>::max_pool2d_forward(const MaxPool2dShape&, const MaxPool2dForward<T>&) const {
  throw std::runtime_error("max_pool2d_forward: not there");
}
FASTNN_INSTANTIATE(void, max_pool2d_forward, MaxPool2dShape, MaxPool2dForward)
template <class T>
void Kernels<T>::max_pool2d_backward(const MaxPool2dShape&, const MaxPool2dBackward<T>&) const {
  throw std::runtime_error("max_pool2d_backward: not there");
}
FASTNN_INSTANTIATE(void, max_pool2d_backward, MaxPool2dShape, MaxPool2dBackward)
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
template <class T>
void Kernels<T>::transpose(const TransposeShape&, const TransposeBuffers<T>&) const {
  throw std::runtime_error("transpose: not there");
}
FASTNN_INSTANTIATE(void, transpose, TransposeShape, TransposeBuffers)
template <class T>
void Kernels<T>::gather_images(const GatherImagesShape&, const GatherImagesBuffers<T>&) const {
  throw std::runtime_error("gather_images: not there");
}
FASTNN_INSTANTIATE(void, gather_images, GatherImagesShape, GatherImagesBuffers)
template <class T>
void Kernels<T>::count_correct(const CountCorrectShape&, const CountCorrectBuffers<T>&) const {
  throw std::runtime_error("count_correct: not there");
}
FASTNN_INSTANTIATE(void, count_correct, CountCorrectShape, CountCorrectBuffers)
template <class T>
void Kernels<T>::adam_step(const AdamOptions&, const TensorList<AdamTensor<T>>&) const {
  throw std::runtime_error("adam_step: not there");
}
template void Kernels<float>::adam_step(const AdamOptions&, const TensorList<AdamTensor<float>>&) const;
template void Kernels<double>::adam_step(const AdamOptions&, const TensorList<AdamTensor<double>>&) const;
template void Kernels<bfloat16>::adam_step(const AdamOptions&, const TensorList<AdamTensor<bfloat16>>&) const;
template void Kernels<float16>::adam_step(const AdamOptions&, const TensorList<AdamTensor<float16>>&) const;
template <class T>
void Kernels<T>::sgd_step(const SgdOptions&, const TensorList<SgdTensor<T>>&) const {
  throw std::runtime_error("sgd_step: not there");
}
template void Kernels<float>::sgd_step(const SgdOptions&, const TensorList<SgdTensor<float>>&) const;
template void Kernels<double>::sgd_step(const SgdOptions&, const TensorList<SgdTensor<double>>&) const;
template void Kernels<bfloat16>::sgd_step(const SgdOptions&, const TensorList<SgdTensor<bfloat16>>&) const;
template void Kernels<float16>::sgd_step(const SgdOptions&, const TensorList<SgdTensor<float16>>&) const;

}  // namespace fastnn::cuda
