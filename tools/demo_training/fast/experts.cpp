// The gated activations of all experts, scaled by the router's weights, forward and backward.
//
// A row holds every routed expert and then the shared one. Scaling before the down projection makes that projection
// one matrix product over all of them; experts that the router did not choose contribute zeros.
#include "rows.h"

namespace {

constexpr int kMaxExperts = 16;

// Softmax over the chosen logits equals the softmax over all of them, renormalised over the chosen.
template <typename T>
void route(const T* logits, int64_t experts, int64_t top_k, float* weights) {
  bool chosen[kMaxExperts] = {};
  float total = 0, largest = 0;
  for (int pick = 0; pick < top_k; ++pick) {
    int best = -1;
    for (int e = 0; e < experts; ++e)
      if (!chosen[e] && (best < 0 || widen(logits[e]) > widen(logits[best]))) best = e;
    chosen[best] = true;
    if (pick == 0) largest = widen(logits[best]);
    total += std::exp(widen(logits[best]) - largest);
  }
  for (int e = 0; e < experts; ++e) weights[e] = chosen[e] ? std::exp(widen(logits[e]) - largest) / total : 0.0f;
  weights[experts] = sigmoid(widen(logits[experts]));
}

template <typename T>
void activate(const T* gate_up, const T* logits, int64_t rows, int64_t experts, int64_t inter, int64_t top_k,
              float* weights, T* active) {
  for (int64_t row = 0; row < rows; ++row, logits += experts + 1, weights += experts + 1) {
    route(logits, experts, top_k, weights);
    for (int e = 0; e <= experts; ++e, gate_up += 2 * inter, active += inter) {
      const float w = weights[e];
      if (w == 0.0f) {
        std::memset(active, 0, inter * sizeof(T));
        continue;
      }
      for (int i = 0; i < inter; ++i) store(active + i, w * silu(widen(gate_up[i])) * widen(gate_up[inter + i]));
    }
  }
}

template <typename T>
void activate_backward(const T* dactive, const T* gate_up, const float* weights, int64_t rows, int64_t experts,
                       int64_t inter, T* dgate_up, T* dlogits) {
  float dweights[kMaxExperts];
  for (int64_t row = 0; row < rows; ++row, weights += experts + 1, dlogits += experts + 1) {
    float mean = 0;
    for (int e = 0; e <= experts; ++e, gate_up += 2 * inter, dgate_up += 2 * inter, dactive += inter) {
      const float w = weights[e];
      dweights[e] = 0;
      if (w == 0.0f) {
        std::memset(dgate_up, 0, 2 * inter * sizeof(T));
        continue;
      }
      float along = 0;
      for (int i = 0; i < inter; ++i) {
        const float gate = widen(gate_up[i]), up = widen(gate_up[inter + i]), d = widen(dactive[i]);
        const float s = sigmoid(gate), activated = gate * s;
        along += d * activated * up;
        store(dgate_up + i, d * w * up * s * (1.0f + gate * (1.0f - s)));
        store(dgate_up + inter + i, d * w * activated);
      }
      dweights[e] = along;
      if (e < experts) mean += w * along;
    }
    for (int e = 0; e < experts; ++e) store(dlogits + e, weights[e] * (dweights[e] - mean));
    store(dlogits + experts, dweights[experts] * weights[experts] * (1.0f - weights[experts]));
  }
}

}  // namespace

#define INSTANCE(T)                                                                                             \
  extern "C" void activate_##T(const T* gate_up, const T* logits, int64_t rows, int64_t experts, int64_t inter, \
                               int64_t top_k, float* weights, T* active) {                                      \
    activate(gate_up, logits, rows, experts, inter, top_k, weights, active);                                    \
  }                                                                                                             \
  extern "C" void activate_backward_##T(const T* dactive, const T* gate_up, const float* weights, int64_t rows, \
                                        int64_t experts, int64_t inter, T* dgate_up, T* dlogits) {              \
    activate_backward(dactive, gate_up, weights, rows, experts, inter, dgate_up, dlogits);                      \
  }

INSTANCE(float)
INSTANCE(bf16)
