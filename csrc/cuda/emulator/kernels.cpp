// Every CUDA kernel and launcher, compiled as C++ for the emulator.
#include "cuda/cross_entropy.cu"
#include "cuda/device.cu"
#include "cuda/mse_loss.cu"
#include "cuda/nll_loss.cu"
#include "cuda/relu.cu"
#include "cuda/softmax.cu"
#include "cuda/todo.cu"
