// Every CUDA kernel and launcher, compiled as C++ for the emulator.
#include "cuda/batch.cu"
#include "cuda/device.cu"
#include "cuda/max_pool2d.cu"
#include "cuda/optimizer.cu"
#include "cuda/relu.cu"
#include "cuda/todo.cu"
