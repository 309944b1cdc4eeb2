// The parts of gated attention around its two matrix products, forward and backward.
#include "rows.h"

namespace {

// Zero-centred RMSNorm of each head and rotary embedding of its first `rotary` numbers.
// in [B, T, H, stride] (its first `width` numbers are used), cos and sin [B, T, rotary], out [B, H, T, width].
template <typename T>
void turn(const T* in, const float* weight, const float* cosine, const float* sine, int64_t B, int64_t length,
          int64_t H, int64_t width, int64_t stride, int64_t rotary, float eps, T* out) {
  const int half = rotary / 2;
  float x[256];
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < length; ++t) {
      const float* c = cosine + (b * length + t) * rotary;
      const float* s = sine + (b * length + t) * rotary;
      for (int h = 0; h < H; ++h) {
        const T* row = in + ((b * length + t) * H + h) * stride;
        T* to = out + ((b * H + h) * length + t) * width;
        float squares = 0;
        for (int i = 0; i < width; ++i) {
          x[i] = widen(row[i]);
          squares += x[i] * x[i];
        }
        const float scale = 1.0f / std::sqrt(squares / width + eps);
        for (int i = 0; i < width; ++i) x[i] *= scale * (1.0f + weight[i]);
        for (int i = rotary; i < width; ++i) store(to + i, x[i]);
        for (int i = 0; i < half; ++i) {
          store(to + i, x[i] * c[i] - x[half + i] * s[i]);
          store(to + half + i, x[half + i] * c[half + i] + x[i] * s[half + i]);
        }
      }
    }
}

template <typename T>
void turn_backward(const T* dout, const T* in, const float* weight, const float* cosine, const float* sine, int64_t B,
                   int64_t length, int64_t H, int64_t width, int64_t stride, int64_t rotary, float eps, T* din,
                   float* dweight) {
  const int half = rotary / 2;
  float d[256], x[256];
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < length; ++t) {
      const float* c = cosine + (b * length + t) * rotary;
      const float* s = sine + (b * length + t) * rotary;
      for (int h = 0; h < H; ++h) {
        const T* row = in + ((b * length + t) * H + h) * stride;
        T* to = din + ((b * length + t) * H + h) * stride;
        const T* from = dout + ((b * H + h) * length + t) * width;
        float squares = 0, along = 0;
        for (int i = 0; i < width; ++i) {
          x[i] = widen(row[i]);
          d[i] = widen(from[i]);
          squares += x[i] * x[i];
        }
        for (int i = 0; i < half; ++i) {
          const float first = d[i], second = d[half + i];
          d[i] = first * c[i] + second * s[half + i];
          d[half + i] = second * c[half + i] - first * s[i];
        }
        const float scale = 1.0f / std::sqrt(squares / width + eps);
        for (int i = 0; i < width; ++i) {
          dweight[i] += d[i] * x[i] * scale;
          d[i] *= 1.0f + weight[i];
          along += d[i] * x[i];
        }
        const float pull = along * scale * scale * scale / width;
        for (int i = 0; i < width; ++i) store(to + i, d[i] * scale - pull * x[i]);
      }
    }
}

// Causal softmax of scale * scores, in place: [rows of T x T]; what a token may not see becomes zero.
template <typename T>
void causal_softmax(T* scores, int64_t blocks, int64_t length, float scale) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t t = 0; t < length; ++t, scores += length) {
      float largest = widen(scores[0]), total = 0;
      for (int64_t i = 1; i <= t; ++i) largest = widen(scores[i]) > largest ? widen(scores[i]) : largest;
      for (int64_t i = 0; i <= t; ++i) total += std::exp(scale * (widen(scores[i]) - largest));
      const float inverse = 1.0f / total;
      for (int64_t i = 0; i <= t; ++i) store(scores + i, inverse * std::exp(scale * (widen(scores[i]) - largest)));
      std::memset(scores + t + 1, 0, (length - t - 1) * sizeof(T));
    }
}

// The gradient of the scores replaces that of the probabilities.
template <typename T>
void causal_softmax_backward(const T* probabilities, T* gradient, int64_t blocks, int64_t length, float scale) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t t = 0; t < length; ++t, gradient += length, probabilities += length) {
      float mean = 0;
      for (int64_t i = 0; i <= t; ++i) mean += widen(probabilities[i]) * widen(gradient[i]);
      for (int64_t i = 0; i <= t; ++i)
        store(gradient + i, scale * widen(probabilities[i]) * (widen(gradient[i]) - mean));
      std::memset(gradient + t + 1, 0, (length - t - 1) * sizeof(T));
    }
}

}  // namespace

#define INSTANCE(T)                                                                                                \
  extern "C" void turn_##T(const T* in, const float* weight, const float* cosine, const float* sine, int64_t B,    \
                           int64_t length, int64_t H, int64_t width, int64_t stride, int64_t rotary, float eps,    \
                           T* out) {                                                                               \
    turn(in, weight, cosine, sine, B, length, H, width, stride, rotary, eps, out);                                 \
  }                                                                                                                \
  extern "C" void turn_backward_##T(const T* dout, const T* in, const float* weight, const float* cosine,          \
                                    const float* sine, int64_t B, int64_t length, int64_t H, int64_t width,        \
                                    int64_t stride, int64_t rotary, float eps, T* din, float* dweight) {           \
    turn_backward(dout, in, weight, cosine, sine, B, length, H, width, stride, rotary, eps, din, dweight);         \
  }                                                                                                                \
  extern "C" void causal_softmax_##T(T* scores, int64_t blocks, int64_t length, float scale) {                     \
    causal_softmax(scores, blocks, length, scale);                                                                 \
  }                                                                                                                \
  extern "C" void causal_softmax_backward_##T(const T* probabilities, T* gradient, int64_t blocks, int64_t length, \
                                              float scale) {                                                       \
    causal_softmax_backward(probabilities, gradient, blocks, length, scale);                                       \
  }

INSTANCE(float)
INSTANCE(bf16)
