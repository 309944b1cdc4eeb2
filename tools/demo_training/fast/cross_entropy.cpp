// Cross entropy of the rows that have a label, its gradient, and whether the label was the likeliest token.
#include "rows.h"

namespace {

// A negative label leaves its row out; returns the sum over the others, each times its weight.
template <typename T>
float cross_entropy(const T* logits, const int64_t* labels, const float* weights, int64_t rows, int64_t vocabulary,
                    T* dlogits, uint8_t* right) {
  double loss = 0;
  for (int64_t row = 0; row < rows; ++row, logits += vocabulary, dlogits += vocabulary) {
    const int64_t label = labels[row];
    right[row] = 0;
    if (label < 0) {
      std::memset(dlogits, 0, vocabulary * sizeof(T));
      continue;
    }
    float largest = widen(logits[0]), total = 0;
    for (int64_t i = 1; i < vocabulary; ++i) largest = widen(logits[i]) > largest ? widen(logits[i]) : largest;
    for (int64_t i = 0; i < vocabulary; ++i) total += std::exp(widen(logits[i]) - largest);
    const float of_label = widen(logits[label]) - largest, inverse = weights[row] / total;
    for (int64_t i = 0; i < vocabulary; ++i) store(dlogits + i, inverse * std::exp(widen(logits[i]) - largest));
    store(dlogits + label, inverse * std::exp(of_label) - weights[row]);
    loss += weights[row] * (std::log(total) - of_label);
    right[row] = of_label >= 0.0f;
  }
  return static_cast<float>(loss);
}

}  // namespace

#define INSTANCE(T)                                                                                              \
  extern "C" float cross_entropy_##T(const T* logits, const int64_t* labels, const float* weights, int64_t rows, \
                                     int64_t vocabulary, T* dlogits, uint8_t* right) {                           \
    return cross_entropy(logits, labels, weights, rows, vocabulary, dlogits, right);                             \
  }

INSTANCE(float)
INSTANCE(bf16)
