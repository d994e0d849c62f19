// What a training step does to its batch besides the network's operators.
//
//   transpose:      output[b][c][r] = input[b][r][c]: channels_last activations into rows that linear reads, and back
//   gather_images:  output[b] = input[index[b]] / divisor, in channels_last order; target_output[b] = target[index[b]]
//   count_correct:  correct = how many rows of logits have their maximum at the target
#pragma once

#include <cstdint>

namespace fastnn {

struct TransposeShape {
  int64_t batch, rows, columns;
};

template <class T>
struct TransposeBuffers {
  T* output;       // (batch, columns, rows)
  const T* input;  // (batch, rows, columns)
};

struct GatherImagesShape {
  int64_t images, batch, channels, pixels;
  bool from_uint8;
  double divisor;
};

template <class T>
struct GatherImagesBuffers {
  T* output;               // (batch, pixels, channels)
  const void* input;       // (images, channels, pixels), uint8 or T
  const int64_t* index;    // (batch), each in [0, images)
  int64_t* target_output;  // (batch), or null where no targets are wanted
  const int64_t* target;   // (images), or null
};

struct CountCorrectShape {
  int64_t batch, classes;
};

template <class T>
struct CountCorrectBuffers {
  int64_t* correct;
  const T* logits;        // (batch, classes)
  const int64_t* target;  // (batch)
};

}  // namespace fastnn
