// Devices, and what happens around a launch.
#include "cuda/device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/launch.cuh"

namespace fastnn::cuda {

bool sync_debug() {
  static const bool on = [] {
    const char* value = std::getenv("FASTNN_SYNC_DEBUG");
    return value && value[0] == '1';
  }();
  return on;
}

#ifdef __CUDACC__

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

__global__ void probe_kernel() {}

// Asked once a device: a query costs as much as a launch.
struct Facts {
  std::once_flag asked;
  int multiprocessors, capability = 0, shared_bytes;
  bool has_code;
  char isa[8];
};

void ask(int device, Facts* f) {
  const int hardware =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  std::snprintf(f->isa, sizeof f->isa, "sm_%d", hardware);
  // A kernel is what its code was compiled for, which may be older than the device: PTX of another build.
  const DeviceGuard guard(device);
  cudaFuncAttributes probe{};
  if (cudaFuncGetAttributes(&probe, probe_kernel) == cudaSuccess) f->capability = std::min(hardware, probe.ptxVersion);
  f->has_code = f->capability > 0;
  f->multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  f->shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

const Facts& facts(int device) {
  static Facts known[kMaxDevices];
  Facts& f = known[device % kMaxDevices];
  std::call_once(f.asked, [&] {
    int count = 0, driver = 0;
    const cudaError_t counted = cudaGetDeviceCount(&count);
    cudaDriverGetVersion(&driver);  // 0 where there is none
    if (device < count) {
      ask(device, &f);
    } else {
      // Only tensors without memory are on a device that is not there; but a driver older than the build shows it none.
      f.has_code = counted != cudaErrorInsufficientDriver || driver == 0;
    }
    cudaGetLastError();  // not the next launch's
  });
  return f;
}

}  // namespace

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

bool device_has_code(int device) { return device < 0 || facts(device).has_code; }

DeviceGuard::DeviceGuard(int device) : before_(device) {
  cudaGetDevice(&before_);
  if (before_ != device) cudaSetDevice(device);
}

DeviceGuard::~DeviceGuard() {
  int now = before_;
  cudaGetDevice(&now);
  if (now != before_) cudaSetDevice(before_);
}

const char* device_isa(int device) { return facts(device).isa; }
int device_multiprocessors(int device) { return facts(device).multiprocessors; }
int device_capability(int device) { return facts(device).capability; }
int device_shared_bytes(int device) { return facts(device).shared_bytes; }

void allow_shared_bytes(const void* kernel, const Queue& queue, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;  // asking each time would cost as much as a launch
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, queue.device}];
  if (bytes <= most) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  most = bytes;
}

void check_launch(const char* operation, const Queue& queue) {
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess && sync_debug()) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(static_cast<cudaStream_t>(queue.stream), &capture);
    if (capture == cudaStreamCaptureStatusNone) error = cudaStreamSynchronize(static_cast<cudaStream_t>(queue.stream));
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(operation) + ": CUDA error on device " + std::to_string(queue.device) + ": " +
                             cudaGetErrorString(error));
}

#else

// The emulator is one device that looks like a recent GPU to the launchers.
int device_count() { return 1; }
bool device_has_code(int) { return true; }
DeviceGuard::DeviceGuard(int device) : before_(device) {}
DeviceGuard::~DeviceGuard() = default;
const char* device_isa(int) { return "emulator"; }
int device_multiprocessors(int) { return 4; }
int device_capability(int) { return emulator::capability; }
int device_shared_bytes(int) { return static_cast<int>(emulator::most_shared_bytes()); }

void check_launch(const char*, const Queue&) {}  // emulator::launch throws

#endif

}  // namespace fastnn::cuda
