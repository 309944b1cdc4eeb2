// A Gated DeltaNet layer between its projections, forward and backward (Yang, Kautz and Hatamizadeh, 2024):
// causal convolution, SiLU, L2 norm of queries and keys, the recurrence, and the gated RMSNorm.
//
// The forward pass keeps nothing; the backward pass runs each sequence again and stores a head's states as it goes,
// which for a few hundred tokens fit the second-level cache.
#include <vector>

#include "rows.h"
#include "state.h"

namespace {

constexpr int kTaps = 4;
constexpr float kEps = 1e-6f;

struct Weights {
  const float* conv;            // [taps, channels]
  const float* log_decay_rate;  // A_log [Hv]
  const float* step_bias;       // dt_bias [Hv]
  const float* norm;            // [D]
};

struct Gradients {
  float *conv, *log_decay_rate, *step_bias, *norm;
};

struct Shape {
  int64_t T;
  int64_t Hk, Hv;
  int64_t channels() const { return (2 * Hk + Hv) * D; }
  int64_t width() const { return channels() + Hv * D + 2 * Hv; }  // qkv, z, b, a
  int64_t z(int64_t head) const { return channels() + head * D; }
  int64_t b(int64_t head) const { return channels() + Hv * D + head; }
  int64_t a(int64_t head) const { return channels() + Hv * D + Hv + head; }
  int64_t query(int64_t head) const { return head / (Hv / Hk) * D; }
  int64_t key(int64_t head) const { return Hk * D + query(head); }
  int64_t value(int64_t head) const { return 2 * Hk * D + head * D; }
};

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// What the recurrence reads of one sequence: the convolved channels, activated, queries and keys normalised.
struct Sequence {
  std::vector<float> convolved, mixed, inverse_lengths, outputs, deltas;
  std::vector<Gate> gates;  // [T, Hv]
  std::vector<State> states;

  template <typename T>
  void prepare(const Shape& shape, const Weights& weights, const T* rows) {
    const int64_t channels = shape.channels(), width = shape.width();
    convolved.assign(shape.T * channels, 0.0f);
    mixed.resize(shape.T * channels);
    inverse_lengths.resize(shape.T * 2 * shape.Hk);
    gates.resize(shape.T * shape.Hv);
    for (int64_t t = 0; t < shape.T; ++t) {
      float* __restrict out = convolved.data() + t * channels;
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t from = t + tap - (kTaps - 1);
        if (from < 0) continue;
        const T* __restrict in = rows + from * width;
        const float* __restrict taps = weights.conv + tap * channels;
        for (int64_t c = 0; c < channels; ++c) out[c] += taps[c] * widen(in[c]);
      }
      float* __restrict at = mixed.data() + t * channels;
      for (int64_t c = 0; c < channels; ++c) at[c] = silu(out[c]);
      for (int64_t head = 0; head < 2 * shape.Hk; ++head) {
        float* x = at + head * D;
        const float inverse = 1.0f / std::sqrt(dot(x, x) + kEps);
        const float scale = head < shape.Hk ? inverse / std::sqrt(float(D)) : inverse;
        inverse_lengths[t * 2 * shape.Hk + head] = inverse;
        for (int i = 0; i < D; ++i) x[i] *= scale;
      }
      for (int64_t head = 0; head < shape.Hv; ++head) {
        const T* row = rows + t * width;
        const float step = softplus(widen(row[shape.a(head)]) + weights.step_bias[head]);
        const float rate = std::exp(weights.log_decay_rate[head]);
        gates[t * shape.Hv + head] = {std::exp(-rate * step), sigmoid(widen(row[shape.b(head)])), step, rate};
      }
    }
  }
};

template <typename T>
void forward(const Shape& shape, const Weights& weights, const T* rows, T* out, Sequence& sequence) {
  const int64_t channels = shape.channels(), width = shape.width();
  sequence.prepare(shape, weights, rows);
  for (int64_t head = 0; head < shape.Hv; ++head) {
    State state = {};
    float delta[D], y[D];
    for (int64_t t = 0; t < shape.T; ++t) {
      const float* mixed = sequence.mixed.data() + t * channels;
      const T* row = rows + t * width;
      advance(state, state, mixed + shape.query(head), mixed + shape.key(head), mixed + shape.value(head),
              sequence.gates[t * shape.Hv + head], delta, y);
      const float scale = 1.0f / std::sqrt(dot(y, y) / D + kEps);
      T* at = out + (t * shape.Hv + head) * D;
      const T* z = row + shape.z(head);
      for (int j = 0; j < D; ++j) store(at + j, y[j] * scale * weights.norm[j] * silu(widen(z[j])));
    }
  }
}

// Gradient of the gated RMSNorm: fills `dy` and the row's share for z.
template <typename T>
void norm_backward(const T* dout, const float* y, const T* z, const float* weight, float* dy, T* dz, float* dweight) {
  const float scale = 1.0f / std::sqrt(dot(y, y) / D + kEps);
  float along = 0;
  for (int j = 0; j < D; ++j) {
    const float gate = widen(z[j]), open = silu(gate), d = widen(dout[j]), normed = y[j] * scale;
    store(dz + j, d * normed * weight[j] * silu_slope(gate));
    dweight[j] += d * open * normed;
    dy[j] = d * open * weight[j];
    along += dy[j] * y[j];
  }
  const float pull = along * scale * scale * scale / D;
  for (int j = 0; j < D; ++j) dy[j] = dy[j] * scale - pull * y[j];
}

template <typename T>
void head_backward(const Shape& shape, const Weights& weights, const T* rows, const T* dout, Sequence& sequence,
                   int64_t head, float* dmixed, T* drows, Gradients& gradients) {
  const int64_t channels = shape.channels(), width = shape.width();
  State* states = sequence.states.data();
  states[0] = {};
  for (int64_t t = 0; t < shape.T; ++t) {
    const float* mixed = sequence.mixed.data() + t * channels;
    advance(states[t], states[t + 1], mixed + shape.query(head), mixed + shape.key(head), mixed + shape.value(head),
            sequence.gates[t * shape.Hv + head], &sequence.deltas[t * D], &sequence.outputs[t * D]);
  }
  State dstate = {};
  float dy[D], dbeta;
  for (int64_t t = shape.T - 1; t >= 0; --t) {
    const T* row = rows + t * width;
    T* drow = drows + t * width;
    const float* mixed = sequence.mixed.data() + t * channels;
    float* d = dmixed + t * channels;
    const Gate& gate = sequence.gates[t * shape.Hv + head];
    norm_backward(dout + (t * shape.Hv + head) * D, &sequence.outputs[t * D], row + shape.z(head), weights.norm, dy,
                  drow + shape.z(head), gradients.norm);
    const float ddecay =
        retreat(states[t], mixed + shape.query(head), mixed + shape.key(head), gate, &sequence.deltas[t * D], dy,
                dstate, d + shape.query(head), d + shape.key(head), d + shape.value(head), &dbeta);
    const float dexponent = ddecay * gate.decay;
    const float dstep = -dexponent * gate.rate * (1.0f - std::exp(-gate.step));  // softplus' = 1 - exp(-softplus)
    gradients.log_decay_rate[head] -= dexponent * gate.rate * gate.step;
    gradients.step_bias[head] += dstep;
    store(drow + shape.a(head), dstep);
    store(drow + shape.b(head), dbeta * gate.beta * (1.0f - gate.beta));
  }
}

// From gradients of the normalised queries, keys and values back to the rows that entered the convolution.
template <typename T>
void mixed_backward(const Shape& shape, const Weights& weights, const T* rows, const Sequence& sequence, float* dmixed,
                    T* drows, Gradients& gradients) {
  const int64_t channels = shape.channels(), width = shape.width();
  for (int64_t t = 0; t < shape.T; ++t) {
    float* d = dmixed + t * channels;
    for (int64_t head = 0; head < 2 * shape.Hk; ++head) {
      float* dx = d + head * D;
      const float* x = sequence.mixed.data() + t * channels + head * D;  // already scaled
      const float inverse = sequence.inverse_lengths[t * 2 * shape.Hk + head];
      const float extra = head < shape.Hk ? 1.0f / std::sqrt(float(D)) : 1.0f;
      const float pull = dot(dx, x) / (extra * extra);
      for (int i = 0; i < D; ++i) dx[i] = inverse * extra * (dx[i] - pull * x[i]);
    }
    const float* in = sequence.convolved.data() + t * channels;
    for (int64_t c = 0; c < channels; ++c) d[c] *= silu_slope(in[c]);
  }
  std::vector<float> sum(channels);
  for (int64_t t = 0; t < shape.T; ++t) {
    sum.assign(channels, 0.0f);
    const T* __restrict row = rows + t * width;
    for (int tap = 0; tap < kTaps; ++tap) {
      const int64_t to = t - tap + (kTaps - 1);
      if (to >= shape.T) continue;
      const float* __restrict d = dmixed + to * channels;
      const float* __restrict taps = weights.conv + tap * channels;
      float* __restrict dtaps = gradients.conv + tap * channels;
      float* __restrict total = sum.data();
      for (int64_t c = 0; c < channels; ++c) {
        total[c] += taps[c] * d[c];
        dtaps[c] += widen(row[c]) * d[c];
      }
    }
    T* drow = drows + t * width;
    for (int64_t c = 0; c < channels; ++c) store(drow + c, sum[c]);
  }
}

template <typename T>
void all_forward(const T* rows, int64_t B, int64_t length, int64_t Hk, int64_t Hv, const Weights& weights, T* out) {
  const Shape shape{length, Hk, Hv};
  Sequence sequence;
  for (int64_t b = 0; b < B; ++b)
    forward(shape, weights, rows + b * length * shape.width(), out + b * length * Hv * D, sequence);
}

template <typename T>
void all_backward(const T* dout, const T* rows, int64_t B, int64_t length, int64_t Hk, int64_t Hv,
                  const Weights& weights, T* drows, Gradients gradients) {
  const Shape shape{length, Hk, Hv};
  Sequence sequence;
  sequence.states.resize(length + 1);
  sequence.deltas.resize(length * D);
  sequence.outputs.resize(length * D);
  std::vector<float> dmixed;
  for (int64_t b = 0; b < B; ++b) {
    const T* own = rows + b * length * shape.width();
    T* down = drows + b * length * shape.width();
    sequence.prepare(shape, weights, own);
    dmixed.assign(length * shape.channels(), 0.0f);
    for (int64_t head = 0; head < Hv; ++head)
      head_backward(shape, weights, own, dout + b * length * Hv * D, sequence, head, dmixed.data(), down, gradients);
    mixed_backward(shape, weights, own, sequence, dmixed.data(), down, gradients);
  }
}

}  // namespace

#define INSTANCE(T)                                                                                             \
  extern "C" void gated_delta_##T(const T* rows, int64_t B, int64_t length, int64_t Hk, int64_t Hv,             \
                                  const float* conv, const float* log_decay_rate, const float* step_bias,       \
                                  const float* norm, T* out) {                                                  \
    all_forward(rows, B, length, Hk, Hv, {conv, log_decay_rate, step_bias, norm}, out);                         \
  }                                                                                                             \
  extern "C" void gated_delta_backward_##T(const T* dout, const T* rows, int64_t B, int64_t length, int64_t Hk, \
                                           int64_t Hv, const float* conv, const float* log_decay_rate,          \
                                           const float* step_bias, const float* norm, T* drows, float* dconv,   \
                                           float* dlog_decay_rate, float* dstep_bias, float* dnorm) {           \
    all_backward(dout, rows, B, length, Hk, Hv, {conv, log_decay_rate, step_bias, norm}, drows,                 \
                 {dconv, dlog_decay_rate, dstep_bias, dnorm});                                                  \
  }

INSTANCE(float)
INSTANCE(bf16)
