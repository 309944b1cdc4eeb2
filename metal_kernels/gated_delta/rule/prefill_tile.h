// What both forms of the gated-delta prefill share: a tile of tokens taken from where q, k, v and the gates lie into
// threadgroup memory, with q and k normalized, and y taken back out of it.

#include <metal_stdlib>

namespace mlx_qwen {

/// Vectors of consecutive tokens, of one head of one sequence. Strides are in elements.
template <typename T>
struct TokenRows {
  const device T* data;
  int64_t token_stride;
  int64_t element_stride;

  float at(int token, int element) const {
    return static_cast<float>(data[token * token_stride + element * element_stride]);
  }
};

template <typename T>
inline TokenRows<T> token_rows(const device T* x, const constant int64_t* strides, uint batch, uint head) {
  return TokenRows<T>{x + batch * strides[0] + head * strides[2], strides[1], strides[3]};
}

/// Everything one threadgroup reads. A Gates or Mask pointer is in constant memory when the array is tiny.
template <typename QK, typename V, typename Gates, typename Mask>
struct Tokens {
  TokenRows<QK> q;
  TokenRows<QK> k;
  TokenRows<V> v;
  Gates log_decay;
  int64_t log_decay_stride;
  Gates beta;
  int64_t beta_stride;
  Mask mask;
  int64_t mask_stride;
  int count;
};

/// The tokens of a threadgroup (block of ROWS value rows, value head, sequence).
template <int ROWS, typename QK, typename V, typename Gates, typename Mask>
Tokens<QK, V, Gates, Mask> tokens_of(
    const device QK* q,
    const constant int* q_shape,
    const constant int64_t* q_strides,
    const device QK* k,
    const constant int64_t* k_strides,
    const device V* v,
    const constant int* v_shape,
    const constant int64_t* v_strides,
    Gates log_decay,
    const constant int64_t* log_decay_strides,
    Gates beta,
    const constant int64_t* beta_strides,
    Mask mask,
    const constant int64_t* mask_strides,
    uint3 group) {
  const uint batch = group.z, head = group.y, key_head = head / (v_shape[2] / q_shape[2]);
  return {
      token_rows(q, q_strides, batch, key_head),
      token_rows(k, k_strides, batch, key_head),
      token_rows(v + group.x * ROWS * v_strides[3], v_strides, batch, head),
      log_decay + batch * log_decay_strides[0] + head * log_decay_strides[2],
      log_decay_strides[1],
      beta + batch * beta_strides[0] + head * beta_strides[2],
      beta_strides[1],
      mask + batch * mask_strides[0],
      mask_strides[1],
      q_shape[1]};
}

/// TOKENS tokens in threadgroup memory: rows of q and k KEY_STRIDE apart, of v (and then y) VALUE_STRIDE apart. A gate
/// is (log decay, decay, beta, q . k).
template <int TOKENS, int Dk, int KEY_STRIDE, int ROWS, int VALUE_STRIDE>
struct Tile {
  threadgroup float* q;
  threadgroup float* k;
  threadgroup float* v;
  threadgroup float4* gates;

  /// Takes one token, or zeros for one that is not `real`, which then changes nothing; called by a SIMD group.
  template <typename Source>
  void load_key(Source source, int first, int slot, bool real, uint lane) {
    constexpr int each = Dk / 32;
    float queries[each], keys[each];
    float query_squares = 0, key_squares = 0, products = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      queries[i] = real ? source.q.at(first + slot, lane + 32 * i) : 0.0f;
      keys[i] = real ? source.k.at(first + slot, lane + 32 * i) : 0.0f;
      query_squares += queries[i] * queries[i];
      key_squares += keys[i] * keys[i];
      products += queries[i] * keys[i];
    }
    const float eps = 1e-6f;
    const float scale = metal::precise::rsqrt(static_cast<float>(Dk));
    const float query_norm = metal::precise::rsqrt(metal::simd_sum(query_squares) + eps) * scale;
    const float key_norm = metal::precise::rsqrt(metal::simd_sum(key_squares) + eps);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      q[slot * KEY_STRIDE + lane + 32 * i] = queries[i] * query_norm;
      k[slot * KEY_STRIDE + lane + 32 * i] = keys[i] * key_norm;
    }
    const float overlap = metal::simd_sum(products) * query_norm * key_norm;
    if (lane == 0) {
      const float log_decay = real ? source.log_decay[(first + slot) * source.log_decay_stride] : 0.0f;
      const float beta = real ? source.beta[(first + slot) * source.beta_stride] : 0.0f;
      gates[slot] = float4(log_decay, metal::precise::exp(log_decay), beta, overlap);
    }
  }

  /// Takes the tokens from `first` on; those after the last and masked ones are zeros.
  template <bool MASKED, typename Source>
  void load(Source source, int first, uint simdgroup, uint lane) {
    constexpr int simdgroups = ROWS / 8;
    for (int slot = simdgroup; slot < TOKENS; slot += simdgroups) {
      load_key(source, first, slot, is_real<MASKED>(source, first + slot), lane);
    }
    for (int i = simdgroup * 32 + lane; i < TOKENS * ROWS; i += simdgroups * 32) {
      const int slot = i / ROWS, row = i % ROWS;
      v[slot * VALUE_STRIDE + row] = is_real<MASKED>(source, first + slot) ? source.v.at(first + slot, row) : 0.0f;
    }
  }

  /// Writes what stands in the place of v. Each thread reads just what it fills in `load`: no barrier between them.
  template <typename T>
  void store(device T* y, int64_t token_stride, int first, int count, uint simdgroup, uint lane) {
    constexpr int simdgroups = ROWS / 8;
    for (int i = simdgroup * 32 + lane; i < TOKENS * ROWS; i += simdgroups * 32) {
      const int slot = i / ROWS, row = i % ROWS;
      if (first + slot < count) {
        y[(first + slot) * token_stride + row] = static_cast<T>(v[slot * VALUE_STRIDE + row]);
      }
    }
  }

  template <bool MASKED, typename Source>
  static bool is_real(Source source, int token) {
    return token < source.count && (!MASKED || source.mask[token * source.mask_stride]);
  }
};

}  // namespace mlx_qwen
