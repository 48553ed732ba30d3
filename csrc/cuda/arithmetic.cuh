// What the kernels are templates over: the elements, how a chunk of a product is multiplied, and
// the cell's functions beside it.
#pragma once

#include "cell.h"
#include "cuda/primitives.cuh"

namespace lstm_ext {

// ---- the arithmetic of one chunk of one m16n8 tile
// ------------------------------------------------
//
// An Arithmetic has: Element (of weights and state), Acc; kParts, the number of 16-byte loads of a
// row that a lane makes per chunk, and vector(lane, part), which of a chunk's four they are;
// kColumns, the number of sequences a lane loads for, and column(lane, j), which; prepare(rows),
// what a lane has of the rows g and g + 8 of the weights as multiply() wants it, to be kept so;
// round_state(), of the other operand; and multiply(d, rows, b), b[kColumns]. d is laid out as in
// primitives.cuh.

template <class T>
struct Vector16 {  // 16 bytes as elements
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};
template <class T>
LSTM_EXT_DEVICE Vector16<T> elements(const uint4& bits) {
  Vector16<T> out;
  memcpy(&out, &bits, 16);
  return out;
}

// Fused multiply-adds, exact in the element's own precision. A lane loads whole chunks of rows g
// and g + 8 and of the sequences 2t and 2t + 1.
template <class T>
struct Scalar {
  using Element = T;
  using Acc = decltype(to_acc(T()));
  static constexpr int kParts = 4, kColumns = 2;

  static LSTM_EXT_DEVICE int vector(int, int part) { return part; }
  static LSTM_EXT_DEVICE int column(int lane, int j) { return 2 * (lane % 4) + j; }
  static LSTM_EXT_DEVICE int slot(int lane) { return lane / 4; }  // lanes of a row share
  static LSTM_EXT_DEVICE void prepare(uint4 (&)[2]) {}
  static LSTM_EXT_DEVICE T round_state(T x) { return x; }

  static LSTM_EXT_DEVICE void multiply(Acc (&d)[4], const uint4 (&rows)[2],
                                       const uint4 (&b)[kColumns]) {
    const Vector16<T> l = elements<T>(rows[0]), h = elements<T>(rows[1]);
    const Vector16<T> b0 = elements<T>(b[0]), b1 = elements<T>(b[1]);
#pragma unroll
    for (int k = 0; k < Vector16<T>::kSize; ++k) {
      d[0] += to_acc(l.v[k]) * to_acc(b0.v[k]);
      d[1] += to_acc(l.v[k]) * to_acc(b1.v[k]);
      d[2] += to_acc(h.v[k]) * to_acc(b0.v[k]);
      d[3] += to_acc(h.v[k]) * to_acc(b1.v[k]);
    }
  }
};

// Lanes of the tensor cores' layout: lane (g, t) loads the t-th 16 bytes of rows g and g + 8 and
// of sequence g.
struct TensorLanes {
  static constexpr int kParts = 1, kColumns = 1;
  static LSTM_EXT_DEVICE int vector(int lane, int) { return lane % 4; }
  static LSTM_EXT_DEVICE int column(int lane, int) { return lane / 4; }
  static LSTM_EXT_DEVICE int slot(int lane) { return lane; }
  // Registers of a product's first operand lie side by side: its words of both rows, by turns.
  static LSTM_EXT_DEVICE void interleave(uint4 (&rows)[2]) {
    const uint4 lo = rows[0], hi = rows[1];
    rows[0] = make_uint4(lo.x, hi.x, lo.y, hi.y);
    rows[1] = make_uint4(lo.z, hi.z, lo.w, hi.w);
  }
  template <class Product>
  static LSTM_EXT_DEVICE void halves(float (&d)[4], float (&e)[4], const uint4 (&rows)[2],
                                     const uint4 (&b)[1], Product product) {
    const uint32_t a_first[4] = {rows[0].x, rows[0].y, rows[0].z, rows[0].w};
    const uint32_t a_second[4] = {rows[1].x, rows[1].y, rows[1].z, rows[1].w};
    const uint32_t b_first[2] = {b[0].x, b[0].y}, b_second[2] = {b[0].z, b[0].w};
    product(d, a_first, b_first);
    product(e, a_second, b_second);
  }
};

// fp16 and bf16, summed in fp32.
template <class T>
struct Tensor16 : TensorLanes {
  using Element = T;
  using Acc = float;
  static LSTM_EXT_DEVICE void prepare(uint4 (&rows)[2]) { interleave(rows); }
  static LSTM_EXT_DEVICE T round_state(T x) { return x; }

  static LSTM_EXT_DEVICE void multiply(float (&d)[4], const uint4 (&rows)[2], const uint4 (&b)[1]) {
    multiply(d, d, rows, b);
  }
  // The halves of the chunk to sums of their own: a product waits for the one before it in its sum.
  static LSTM_EXT_DEVICE void multiply(float (&d)[4], float (&e)[4], const uint4 (&rows)[2],
                                       const uint4 (&b)[1]) {
    halves(d, e, rows, b, [](auto&... of) { mma_m16n8k16<T>(of...); });
  }
};

// The names are the same for every architecture, since kernels are named after them: only what they
// stand for differs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// Turing: neither bf16 nor TF32 in its tensor cores.
template <>
struct Tensor16<__nv_bfloat16> : Scalar<__nv_bfloat16> {};
struct Tf32 : Scalar<float> {};
#else
// fp32 operands rounded to TF32 (10 bits of mantissa), summed in fp32.
struct Tf32 : TensorLanes {
  using Element = float;
  using Acc = float;
  static LSTM_EXT_DEVICE void prepare(uint4 (&rows)[2]) {
    for (uint4& row : rows) {
      const Vector16<float> x = elements<float>(row);
      row = make_uint4(tf32_operand(x.v[0]), tf32_operand(x.v[1]), tf32_operand(x.v[2]),
                       tf32_operand(x.v[3]));
    }
    interleave(rows);
  }
  // The state is rounded once by who writes it, not by each of its readers.
  static LSTM_EXT_DEVICE float round_state(float x) {
    const uint32_t bits = to_tf32(x);
    float out;
    memcpy(&out, &bits, 4);
    return out;
  }
  static LSTM_EXT_DEVICE void multiply(float (&d)[4], const uint4 (&rows)[2], const uint4 (&b)[1]) {
    multiply(d, d, rows, b);
  }
  // The halves of the chunk to sums of their own: a product waits for the one before it in its sum.
  static LSTM_EXT_DEVICE void multiply(float (&d)[4], float (&e)[4], const uint4 (&rows)[2],
                                       const uint4 (&b)[1]) {
    halves(d, e, rows, b, [](auto&... of) { mma_m16n8k8_tf32(of...); });
  }
};
#endif

// ---- the cell's functions
// -------------------------------------------------------------------------

// For Cell<> of cell.h. fp32: within 2 units of the last place of the true value.
template <class T>
struct ExactMath {
  using V = T;
  static LSTM_EXT_DEVICE V sigmoid(V x) { return 1 / (1 + exact_exp(-x)); }
  static LSTM_EXT_DEVICE V tanh(V x) { return exact_tanh(x); }
};
// Beside products of half types and TF32: relative error below 3e-6, a few times as fast.
struct FastMath {
  using V = float;
  static LSTM_EXT_DEVICE V sigmoid(V x) { return __fdividef(1.f, 1.f + exp2_fast(x * -kLog2E)); }
  static LSTM_EXT_DEVICE V tanh(V x) {
    const float x2 = x * x;
    // The first terms of the series, where 1 - 2 / (1 + e^2x) would cancel.
    const float small = x + x * x2 * (-1.f / 3 + x2 * (2.f / 15 - x2 * (17.f / 315)));
    const float large = 1.f - __fdividef(2.f, 1.f + exp2_fast(x * (2 * kLog2E)));
    return x2 < 0.0225f ? small : large;
  }

 private:
  static constexpr float kLog2E = 1.44269504088896341f;
};

template <class Arithmetic>
struct CellOf {
  using type = Cell<FastMath>;
};
template <class T>
struct CellOf<Scalar<T>> {
  using type = Cell<ExactMath<T>>;
};

}  // namespace lstm_ext
