#include <metal_stdlib>
#include "activations.h"
#include "matrix.h"
#include "router.h"

// Products of a few rows of input with the matrices of their experts. A SIMD group makes several outputs at a time: its
// lanes split the columns, and each keeps its piece of the input in registers for all rows of the matrix.

namespace mlx_qwen {

// The products of x with R rows of the matrix, the same in every lane.
template <int R, typename M, typename T>
void multiply(M matrix, thread const ulong* rows, const device T* x, uint lane, thread float* products) {
#pragma unroll
  for (int r = 0; r < R; ++r) products[r] = 0.0f;
  for (uint column = lane * M::step; column < matrix.columns; column += 32 * M::step) {
    float values[M::step];
    const float sum = M::load(x + column, values);
#pragma unroll
    for (int r = 0; r < R; ++r) products[r] += matrix.product(rows[r], column, values, sum);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) products[r] = metal::simd_sum(products[r]);
}

// Two outputs: two gate rows and two up rows at a time, so that neither waits for the other.
template <typename M, typename T>
void gate_up_outputs(M matrix, ulong expert, uint I, uint first, const device T* x, device T* hidden, uint lane) {
  if (first >= I) return;
  const ulong gate = expert * 2 * I + first;
  const uint next = first + 1 < I ? 1 : 0;
  const ulong rows[4] = {gate, gate + next, gate + I, gate + I + next};
  float products[4];
  multiply<4>(matrix, rows, x, lane, products);
  if (lane == 0) hidden[first] = T(swiglu(products[0], products[2]));
  if (lane == 1 && next) hidden[first + 1] = T(swiglu(products[1], products[3]));
}

// The activation of a dense MLP, whose gate rows lie before those of up.
template <typename T, int bits, int group, bool floats, typename W, typename Sc, typename B>
void mlp_gate_up(
    const device T* x,
    const constant int* x_shape,
    const device W* weight,
    const constant int* weight_shape,
    const device Sc* scales,
    const device B* biases,
    device T* hidden,
    uint3 position,
    uint lane) {
  const uint K = x_shape[1];
  const uint I = weight_shape[0] / 2;
  const ulong token = position.x / 32;
  const Matrix<T, bits, group, floats> matrix = {weight, scales, biases, K};
  gate_up_outputs(matrix, 0, I, 2 * position.y, x + token * K, hidden + token * I, lane);
}

// Slots 0 to k - 1 of a token are its experts, slot k is the shared one.
template <
    typename T, int bits, int group, bool floats, int shared_bits, int shared_group, bool shared_floats,
    typename W, typename Sc, typename B, typename SharedW, typename SharedSc, typename SharedB>
void slot_gate_up(
    const device T* x,
    uint K,
    uint k,
    uint expert,
    const device W* weight,
    const constant int* weight_shape,
    const device Sc* scales,
    const device B* biases,
    const device SharedW* shared_weight,
    const constant int* shared_weight_shape,
    const device SharedSc* shared_scales,
    const device SharedB* shared_biases,
    device T* hidden,
    device T* shared_hidden,
    uint3 position,
    uint lane) {
  const ulong token = position.x / 32;
  const uint slot = position.z;
  const uint first = 2 * position.y;
  if (slot < k) {
    const Matrix<T, bits, group, floats> matrix = {weight, scales, biases, K};
    const uint I = weight_shape[1] / 2;
    gate_up_outputs(matrix, expert, I, first, x + token * K, hidden + (token * k + slot) * I, lane);
  } else {
    const Matrix<T, shared_bits, shared_group, shared_floats> matrix = {
        shared_weight, shared_scales, shared_biases, K};
    const uint I = shared_weight_shape[0] / 2;
    gate_up_outputs(matrix, 0, I, first, x + token * K, shared_hidden + token * I, lane);
  }
}

template <
    typename T, int bits, int group, bool floats, int shared_bits, int shared_group, bool shared_floats,
    typename Indices, typename W, typename Sc, typename B, typename SharedW, typename SharedSc, typename SharedB>
void expert_gate_up(
    const device T* x,
    const constant int* x_shape,
    Indices indices,
    const constant int* indices_shape,
    const device W* weight,
    const constant int* weight_shape,
    const device Sc* scales,
    const device B* biases,
    const device SharedW* shared_weight,
    const constant int* shared_weight_shape,
    const device SharedSc* shared_scales,
    const device SharedB* shared_biases,
    device T* hidden,
    device T* shared_hidden,
    uint3 position,
    uint lane) {
  const uint k = indices_shape[1];
  const uint expert = position.z < k ? indices[ulong(position.x / 32) * k + position.z] : 0;
  slot_gate_up<T, bits, group, floats, shared_bits, shared_group, shared_floats>(
      x, x_shape[1], k, expert, weight, weight_shape, scales, biases, shared_weight, shared_weight_shape,
      shared_scales, shared_biases, hidden, shared_hidden, position, lane);
}

// The same, with the choice of experts: every SIMD group finds its own expert, those of a token's first outputs of the
// shared one write the whole choice.
template <
    typename T, int E, int k, bool normalize,
    int bits, int group, bool floats, int shared_bits, int shared_group, bool shared_floats,
    typename Logits, typename W, typename Sc, typename B, typename SharedW, typename SharedSc, typename SharedB>
void routed_gate_up(
    const device T* x,
    const constant int* x_shape,
    Logits logits,
    const device W* weight,
    const constant int* weight_shape,
    const device Sc* scales,
    const device B* biases,
    const device SharedW* shared_weight,
    const constant int* shared_weight_shape,
    const device SharedSc* shared_scales,
    const device SharedB* shared_biases,
    device T* hidden,
    device T* shared_hidden,
    device uint32_t* indices,
    device float* scores,
    device float* shared_score,
    uint3 position,
    uint lane) {
  const ulong token = position.x / 32;
  uint expert = 0;
  if (position.z < k) {
    expert = metal::simd_shuffle(choose<E, k, false>(logits + token * (E + 1), 1, position.z, lane).expert, position.z);
  } else if (position.y == 0) {
    write_choice<E, k, normalize>(logits + token * (E + 1), 1, token, indices, scores, shared_score, lane);
  }
  slot_gate_up<T, bits, group, floats, shared_bits, shared_group, shared_floats>(
      x, x_shape[1], k, expert, weight, weight_shape, scales, biases, shared_weight, shared_weight_shape,
      shared_scales, shared_biases, hidden, shared_hidden, position, lane);
}

// Four outputs of one token in a threadgroup: each of its k + 1 SIMD groups multiplies for one slot, then the first
// adds up what they found, in the order of the slots.
template <
    typename T, int k, int bits, int group, bool floats, int shared_bits, int shared_group, bool shared_floats,
    typename Indices, typename Scores, typename SharedScore,
    typename W, typename Sc, typename B, typename SharedW, typename SharedSc, typename SharedB>
void expert_down_combine(
    const device T* hidden,
    const constant int* hidden_shape,
    const device T* shared_hidden,
    const constant int* shared_hidden_shape,
    Indices indices,
    Scores scores,
    SharedScore shared_score,
    const device W* weight,
    const constant int* weight_shape,
    const device Sc* scales,
    const device B* biases,
    const device SharedW* shared_weight,
    const device SharedSc* shared_scales,
    const device SharedB* shared_biases,
    device T* combined,
    threadgroup float* products_of_slots,
    uint3 position,
    uint lane) {
  const uint K = weight_shape[1];
  const ulong token = position.x / 32;
  const uint slot = position.y;
  const uint first = 4 * position.z;
  const uint expert = slot < k ? indices[token * k + slot] : 0;
  ulong rows[4];
#pragma unroll
  for (uint r = 0; r < 4; ++r) rows[r] = ulong(expert) * K + metal::min(first + r, K - 1);

  float products[4];
  if (slot < k) {
    const uint I = hidden_shape[2];
    const Matrix<T, bits, group, floats> matrix = {weight, scales, biases, I};
    multiply<4>(matrix, rows, hidden + (token * k + slot) * I, lane, products);
  } else {
    const uint I = shared_hidden_shape[1];
    const Matrix<T, shared_bits, shared_group, shared_floats> matrix = {shared_weight, shared_scales, shared_biases, I};
    multiply<4>(matrix, rows, shared_hidden + token * I, lane, products);
  }
  if (lane == 0) {
#pragma unroll
    for (uint r = 0; r < 4; ++r) products_of_slots[4 * slot + r] = products[r];
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

  if (slot == 0 && lane < 4 && first + lane < K) {
    float total = 0.0f;
    for (uint s = 0; s < k; ++s) total += scores[token * k + s] * products_of_slots[4 * s + lane];
    total += shared_score[token] * products_of_slots[4 * k + lane];
    combined[token * K + first + lane] = T(total);
  }
}

}  // namespace mlx_qwen
