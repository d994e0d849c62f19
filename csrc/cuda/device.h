// What the CUDA runtime sees. No call fails where there is no driver and no GPU.
#pragma once

namespace fastnn::cuda {

int device_count();

}  // namespace fastnn::cuda
