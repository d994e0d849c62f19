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
