// What the CUDA runtime sees. No call fails where there is no driver and no GPU.
#pragma once

namespace fastnn::cuda {

constexpr int kMaxDevices = 64;

int device_count();

// Whether this build holds code that the device runs; true for a device that is not here, as a fake tensor may name it.
bool device_has_code(int device);

// Makes `device` current for as long as the guard lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

}  // namespace fastnn::cuda
