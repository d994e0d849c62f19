// What the CUDA runtime sees. No call fails where there is no driver and no GPU.
#pragma once

namespace fastnn::cuda {

constexpr int kMaxDevices = 64;

int device_count();

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
