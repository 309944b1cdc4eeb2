// Rows of keys or values of one head: what is remembered of a token each, read eight neighbours at a time.
#pragma once

#include <metal_stdlib>

namespace mlx_qwen {

/// Rows as they are.
template <typename T>
struct PlainRows {
  const device T* rows;
  int64_t stride;

  void read(uint row, uint first, thread float* eight) const {
    const device T* x = rows + row * stride + first;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      eight[i] = static_cast<float>(x[i]);
    }
  }
};

/// Rows packed by mx.quantize, lowest bits first: scale * code + bias of its group of channels.
template <int BITS, int GROUP, typename Words, typename Factors>
struct PackedRows {
  Words words;
  int64_t word_stride;
  Factors scales;
  Factors biases;
  int64_t scale_stride;
  int64_t bias_stride;

  void read(uint row, uint first, thread float* eight) const {
    constexpr uint MASK = (1u << BITS) - 1;
    Words x = words + row * word_stride + first * BITS / 32;
    const float scale = static_cast<float>(scales[row * scale_stride + first / GROUP]);
    const float bias = static_cast<float>(biases[row * bias_stride + first / GROUP]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      eight[i] = scale * static_cast<float>((x[i * BITS / 32] >> (i * BITS % 32)) & MASK) + bias;
    }
  }
};

}  // namespace mlx_qwen
