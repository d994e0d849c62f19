// Every CUDA kernel and launcher, compiled as C++ for the emulator.
#include "cuda/device.cu"
#include "cuda/relu.cu"
#include "cuda/todo.cu"
