// Rows of a matrix as mx.quantize packs them, or as they are, and their products with an input that a lane holds.
#pragma once

#include <metal_stdlib>

namespace mlx_qwen {

// Integers of so many bits, lowest first. A lane takes `step` neighbours, whose input `load` lays ready and sums up.
// Those of 2 and 4 bits are masked where they lie in 16, so the input is scaled down by what that multiplies them with.
template <int bits>
struct Codes {
  static constexpr constant int in_part = 16 / bits;
  static constexpr constant int step = 4 * in_part;

  template <typename T>
  static float load(const device T* x, thread float* values) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const float value = float(x[i]);
      sum += value;
      values[i] = value * (1.0f / (1 << (bits * (i % in_part))));
    }
    return sum;
  }

  static float dot(const device ushort* codes, thread const float* values) {
    const ushort4 parts = *(const device ushort4*)codes;
    float result = 0.0f;
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const ushort mask = ((1 << bits) - 1) << (bits * (i % in_part));
      result += values[i] * float(parts[i / in_part] & mask);
    }
    return result;
  }
};

// The input as it is, and its sum.
template <int step, typename T>
float load_as_it_is(const device T* x, thread float* values) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < step; ++i) sum += values[i] = float(x[i]);
  return sum;
}

// Sixteen codes of 3, 5 or 6 bits fill as many 16-bit parts; some lie across two.
template <int bits>
struct SpreadCodes {
  static constexpr constant int step = 16;

  template <typename T>
  static float load(const device T* x, thread float* values) {
    return load_as_it_is<step>(x, values);
  }

  static float dot(const device ushort* codes, thread const float* values) {
    uint words[(bits + 1) / 2];
#pragma unroll
    for (int i = 0; i < bits; ++i) {
      const uint part = codes[i];
      words[i / 2] = i % 2 == 0 ? part : words[i / 2] | part << 16;
    }
    float result = 0.0f;
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const int word = bits * i / 32;
      const int shift = bits * i % 32;
      uint code = words[word] >> shift;
      if (shift + bits > 32) code |= words[word + 1] << (32 - shift);
      result += values[i] * float(code & ((1 << bits) - 1));
    }
    return result;
  }
};

template <>
struct Codes<3> : SpreadCodes<3> {};
template <>
struct Codes<5> : SpreadCodes<5> {};
template <>
struct Codes<6> : SpreadCodes<6> {};

// Bytes are converted as they are, four from each of two words; nothing need be masked or scaled.
template <>
struct Codes<8> {
  static constexpr constant int step = 8;

  template <typename T>
  static float load(const device T* x, thread float* values) {
    return load_as_it_is<step>(x, values);
  }

  static float dot(const device ushort* codes, thread const float* values) {
    const device uchar4* words = (const device uchar4*)codes;
    const uchar4 first = words[0];
    const uchar4 second = words[1];
    float result = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) result += values[i] * float(first[i]) + values[4 + i] * float(second[i]);
    return result;
  }
};

// Floats of 4 bits (sign, 2 of exponent, 1 of mantissa) and of 8 (sign, 4, 3; but for NaN, which nothing packs): put
// where half floats have these parts, they are 2^-14 and 2^-8 of what they mean.
template <int bits>
struct FloatCodes {
  static constexpr constant int step = 16;
  static constexpr constant float unit = 16384.0f;

  static float dot(const device ushort* codes, thread const float* values) {
    float result = 0.0f;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const uint four = codes[part];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint code = four << (12 - 4 * i);
        const half value = as_type<half>(ushort((code & 0x8000) | (code >> 3 & 0x0E00)));
        result += values[4 * part + i] * float(value);
      }
    }
    return result;
  }
};

inline float half_of_byte(uint code) {
  return float(as_type<half>(ushort((code & 0x80) << 8 | (code & 0x7F) << 7)));
}

template <>
struct FloatCodes<8> {
  static constexpr constant int step = 8;
  static constexpr constant float unit = 256.0f;

  static float dot(const device ushort* codes, thread const float* values) {
    float result = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint two = codes[i];
      result += values[2 * i] * half_of_byte(two) + values[2 * i + 1] * half_of_byte(two >> 8);
    }
    return result;
  }
};

// The scale of a group of floats: of 16 (nvfp4) a float of 8 bits, of 32 (mxfp4, mxfp8) a power of two.
template <int group>
float scale_of(uchar code) {
  return as_type<float>(code == 0 ? 0x400000 : uint(code) << 23);
}

template <>
inline float scale_of<16>(uchar code) {
  return 256.0f * half_of_byte(code);
}

// An element is scale * code + bias of its group of columns.
template <typename T, int bits, int group, bool floats>
struct Matrix {
  const device uint32_t* weight;
  const device T* scales;
  const device T* biases;
  uint columns;

  static constexpr constant int step = Codes<bits>::step;

  static float load(const device T* x, thread float* values) { return Codes<bits>::load(x, values); }

  float product(ulong row, uint column, thread const float* values, float sum) const {
    const ulong element = row * columns + column;
    const float result = Codes<bits>::dot((const device ushort*)weight + element * bits / 16, values);
    return float(scales[element / group]) * result + float(biases[element / group]) * sum;
  }
};

// An element is scale * code; biases are not read.
template <typename T, int bits, int group>
struct Matrix<T, bits, group, true> {
  const device uint32_t* weight;
  const device uint8_t* scales;
  const device uint32_t* biases;
  uint columns;

  static constexpr constant int step = FloatCodes<bits>::step;

  static float load(const device T* x, thread float* values) { return load_as_it_is<step>(x, values); }

  float product(ulong row, uint column, thread const float* values, float) const {
    const ulong element = row * columns + column;
    const float result = FloatCodes<bits>::dot((const device ushort*)weight + element * bits / 16, values);
    return FloatCodes<bits>::unit * scale_of<group>(scales[element / group]) * result;
  }
};

// Rows as they are; scales and biases are not read.
template <typename T, int group>
struct Matrix<T, 0, group, false> {
  const device T* weight;
  const device T* scales;
  const device T* biases;
  uint columns;

  static constexpr constant int step = 8;

  static float load(const device T* x, thread float* values) { return load_as_it_is<step>(x, values); }

  float product(ulong row, uint column, thread const float* values, float) const {
    const device T* elements = weight + row * columns + column;
    float result = 0.0f;
#pragma unroll
    for (int i = 0; i < step; ++i) result += values[i] * float(elements[i]);
    return result;
  }
};

}  // namespace mlx_qwen
