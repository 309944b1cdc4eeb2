// The recurrent state of one head and single steps of the gated delta rule, in rows of two vectors of 16 floats.
#pragma once

#include <cstring>
#include <utility>

constexpr int D = 32;  // of keys and of values

typedef float Vector __attribute__((vector_size(64)));

struct Row {
  Vector low, high;
};

struct State {
  Row rows[D];
};

struct Gate {
  float decay, beta, step, rate;
};

inline Row row_of(const float* x) {
  Row row;
  std::memcpy(&row, x, sizeof row);
  return row;
}

inline void write(const Row& row, float* at) { std::memcpy(at, &row, sizeof row); }

inline float dot(const float* x, const float* y) {
  float sum = 0;
  for (int i = 0; i < D; ++i) sum += x[i] * y[i];
  return sum;
}

// Adds what belongs together in two vectors whose sums are still spread over segments of twice `SEGMENT` lanes.
template <int SEGMENT, int... LANES>
inline Vector fold(Vector x, Vector y, std::integer_sequence<int, LANES...>) {
  return __builtin_shufflevector(x, y, (LANES / SEGMENT * 2 * SEGMENT + LANES % SEGMENT)...) +
         __builtin_shufflevector(x, y, (LANES / SEGMENT * 2 * SEGMENT + LANES % SEGMENT + SEGMENT)...);
}

template <int SEGMENT>
inline Vector fold(Vector x, Vector y) {
  return fold<SEGMENT>(x, y, std::make_integer_sequence<int, 16>());
}

// The sum of each of 16 vectors; cheaper together than one by one.
inline Vector sums(const Vector* x) {
  Vector halves[8], quarters[4];
  for (int i = 0; i < 8; ++i) halves[i] = fold<8>(x[2 * i], x[2 * i + 1]);
  for (int i = 0; i < 4; ++i) quarters[i] = fold<4>(halves[2 * i], halves[2 * i + 1]);
  return fold<1>(fold<2>(quarters[0], quarters[1]), fold<2>(quarters[2], quarters[3]));
}

// One step: S <- decay S + k (beta (v - decay S'k))', out = S'q. `delta` receives v - decay S'k.
inline void advance(const State& before, State& after, const float* q, const float* k, const float* v,
                    const Gate& gate, float* delta, float* out) {
  Row read = {};
  for (int i = 0; i < D; ++i) {
    read.low += before.rows[i].low * k[i];
    read.high += before.rows[i].high * k[i];
  }
  const Row value = row_of(v);
  const Row missing = {value.low - gate.decay * read.low, value.high - gate.decay * read.high};
  const Row written = {gate.beta * missing.low, gate.beta * missing.high};
  write(missing, delta);
  Row sum = {};
  for (int i = 0; i < D; ++i) {
    const Row& old = before.rows[i];
    const Row state = {gate.decay * old.low + k[i] * written.low, gate.decay * old.high + k[i] * written.high};
    after.rows[i] = state;
    sum.low += state.low * q[i];
    sum.high += state.high * q[i];
  }
  write(sum, out);
}

// Undoes one step: `dstate` enters as the gradient of the state after it and leaves as that of the state before.
// Adds to dq and dk, sets dv and dbeta, and returns the gradient of the decay.
inline float retreat(const State& before, const float* q, const float* k, const Gate& gate, const float* delta,
                     const float* dout, State& dstate, float* dq, float* dk, float* dv, float* dbeta) {
  const Row dy = row_of(dout), missing = row_of(delta);
  Row dwritten = {};
  for (int i = 0; i < D; ++i) {
    Row& d = dstate.rows[i];
    d = {d.low + q[i] * dy.low, d.high + q[i] * dy.high};
    dwritten.low += d.low * k[i];
    dwritten.high += d.high * k[i];
  }
  const Row dvalue = {gate.beta * dwritten.low, gate.beta * dwritten.high};
  const Row dread = {-gate.decay * dvalue.low, -gate.decay * dvalue.high};
  const Row written = {gate.beta * missing.low, gate.beta * missing.high};
  write(dvalue, dv);
  Row ddecay = {};
  Vector along_q[16], along_k[16];
  const float reached = gate.beta * dot(delta, dout);
  for (int half = 0; half < D; half += 16) {
    for (int i = 0; i < 16; ++i) {
      const Row& old = before.rows[half + i];
      Row& d = dstate.rows[half + i];
      along_q[i] = old.low * dy.low + old.high * dy.high;
      along_k[i] = d.low * written.low + d.high * written.high + old.low * dread.low + old.high * dread.high;
      const Row moved = {d.low - k[half + i] * dvalue.low, d.high - k[half + i] * dvalue.high};
      ddecay.low += old.low * moved.low;
      ddecay.high += old.high * moved.high;
      d = {gate.decay * moved.low, gate.decay * moved.high};
    }
    const Vector from_q = sums(along_q), from_k = sums(along_k);
    for (int i = 0; i < 16; ++i) {
      dq[half + i] += gate.decay * from_q[i] + k[half + i] * reached;
      dk[half + i] += from_k[i];
    }
  }
  const Vector lanes = ddecay.low + ddecay.high;
  float total = 0;
  for (int lane = 0; lane < 16; ++lane) total += lanes[lane];
  float along_beta[D];
  write(dwritten, along_beta);
  *dbeta = dot(along_beta, delta);
  return total;
}
