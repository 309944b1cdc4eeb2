// h = residual + delta and its zero-centred RMSNorm, forward and backward (Zhang and Sennrich, 2019).
#include "rows.h"

namespace {

template <typename T>
void add_norm(const float* residual, const T* delta, const float* weight, int64_t rows, int64_t width, float eps,
              float* h, T* normed) {
  for (int64_t row = 0; row < rows; ++row, residual += width, h += width, normed += width) {
    float squares = 0;
    for (int64_t i = 0; i < width; ++i) {
      h[i] = residual[i] + (delta ? widen(delta[i]) : 0.0f);
      squares += h[i] * h[i];
    }
    const float scale = 1.0f / std::sqrt(squares / width + eps);
    for (int64_t i = 0; i < width; ++i) store(normed + i, h[i] * scale * (1.0f + weight[i]));
    if (delta) delta += width;
  }
}

template <typename T>
void add_norm_backward(const float* dh, const T* dnormed, const float* h, const float* weight, int64_t rows,
                       int64_t width, float eps, float* dresidual, T* ddelta, float* dweight) {
  for (int64_t row = 0; row < rows; ++row, dnormed += width, h += width, dresidual += width) {
    float squares = 0, along = 0;
    for (int64_t i = 0; i < width; ++i) {
      squares += h[i] * h[i];
      along += widen(dnormed[i]) * (1.0f + weight[i]) * h[i];
    }
    const float scale = 1.0f / std::sqrt(squares / width + eps);
    const float pull = along * scale * scale * scale / width;
    for (int64_t i = 0; i < width; ++i) {
      const float slope = widen(dnormed[i]) * scale;
      dweight[i] += slope * h[i];
      dresidual[i] = slope * (1.0f + weight[i]) - pull * h[i] + (dh ? dh[i] : 0.0f);
    }
    if (ddelta) {
      for (int64_t i = 0; i < width; ++i) store(ddelta + i, dresidual[i]);
      ddelta += width;
    }
    if (dh) dh += width;
  }
}

}  // namespace

#define INSTANCE(T)                                                                                             \
  extern "C" void add_norm_##T(const float* residual, const T* delta, const float* weight, int64_t rows,        \
                               int64_t width, float eps, float* h, T* normed) {                                 \
    add_norm(residual, delta, weight, rows, width, eps, h, normed);                                             \
  }                                                                                                             \
  extern "C" void add_norm_backward_##T(const float* dh, const T* dnormed, const float* h, const float* weight, \
                                        int64_t rows, int64_t width, float eps, float* dresidual, T* ddelta,    \
                                        float* dweight) {                                                       \
    add_norm_backward(dh, dnormed, h, weight, rows, width, eps, dresidual, ddelta, dweight);                    \
  }

INSTANCE(float)
INSTANCE(bf16)
