// Every CUDA kernel and launcher, compiled as C++ for the emulator.
#include "cuda/conv2d_backward.cu"
#include "cuda/conv2d_depthwise.cu"
#include "cuda/conv2d_forward.cu"
#include "cuda/device.cu"
#include "cuda/linear.cu"
#include "cuda/relu.cu"
#include "cuda/todo.cu"
