// A step of a ConvLSTM's cell on the CPU: a layer of one step (conv.h), of tensors of any dtype, in
// the caller's memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "conv.h"

namespace lstm_ext {

// As the caller has it. Images that are written lie channels last, gradients of weights first.
struct ConvTensor {
  void* memory = nullptr;  // null: there is none, or it is not wanted
  Dtype own{};
  bool first = true;  // channels first; else last
  int64_t count = 0;  // numbers
};

struct ConvCellStep {
  Dtype dtype;  // of h_1 and c_1, to which all that is read is rounded
  int threads;
  int64_t N, C;
  ConvWindow of_x, of_h;
  ConvTensor x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_ch;
  // Of backward's dtype, which half types are computed with in: what it reads; forward writes it,
  // unless it is null.
  void* gates;      // [rows, 4C]
  void* c_seq;      // [2, rows, C]: c_0 and c_1
  void* h_before;   // [rows, C]: h_0
  ConvTensor h, c;  // h_1 and c_1; in backward their gradients, null for zero
  ConvTensor dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_ch;
};

// E: what it is computed in. Each call returns how many bytes of memory it takes; without memory it
// does no more.
template <class E>
class ConvCellCall {
 public:
  ConvCellCall(const ConvCellStep& step, const CpuKernels& kernels, void* memory)
      : s_(step), kernels_(kernels), memory_(static_cast<char*>(memory)), scratch_(memory) {}

  int64_t forward() {
    ConvLayer p = layer(true);
    p.h0 = given(s_.h0);
    p.h0_first = s_.h0.first;
    p.c0 = given(s_.c0);
    p.c0_first = s_.c0.first;
    p.bias = given(s_.b_ih);
    p.more_bias = given(s_.b_hh);
    p.h_first = s_.h_before;
    p.c_seq = s_.c_seq;
    p.gates = s_.gates;
    p.h_n = made(s_.h);
    p.c_n = made(s_.c);
    ConvSteps<E>::take_scratch(p, scratch_, ConvCall::kForward);
    const ConvSteps<E> steps(p);
    if (memory_) {
      steps.forward(kernels_, memory_ + scratch_.taken());
      put(p.h_n, s_.h);
      put(p.c_n, s_.c);
    }
    return scratch_.taken() + steps.forward_bytes(kernels_);
  }

  int64_t backward() {
    const int64_t rows = s_.N * s_.of_h.places(), state = rows * s_.C;
    const bool of_biases = s_.db_ih.memory || s_.db_hh.memory;
    const bool of_weights = s_.dw_ih.memory || s_.dw_hh.memory;
    ConvLayer p = layer(of_weights);
    p.gates = s_.gates;
    p.c_seq = s_.c_seq;
    p.of_h0 = s_.dh0.memory;
    p.dgates = piece(4 * state);
    p.dx = made(s_.dx);
    p.dh = s_.dh0.memory ? made(s_.dh0) : piece(state);
    p.dc = piece(2 * state);
    if (p.w_ch) p.dw_ch = piece(3 * s_.C);
    const void* const dh = given(s_.h);
    const void* const dc = given(s_.c);
    ConvLayer w = p;
    w.h_seq = s_.h_before;
    w.dw_ih = made(s_.dw_ih);
    w.dw_hh = made(s_.dw_hh);
    w.dbias = piece(2 * 4 * s_.C);
    // One after the other, in the same memory.
    ConvScratch back = scratch_, weights = scratch_;
    ConvSteps<E>::take_scratch(p, back, ConvCall::kBackward);
    ConvSteps<E>::take_scratch(w, weights, ConvCall::kWeights);
    const ConvSteps<E> steps(p), products(w);
    if (memory_) {
      take_gradient(dh, s_.h.first, p.dh);
      take_gradient(dc, s_.c.first, p.dc);
      const int last = steps.backward(kernels_, memory_ + back.taken());
      if (of_weights || of_biases) products.weights(kernels_, memory_ + weights.taken());
      put(p.dx, s_.dx);
      put(p.dh, s_.dh0);
      put(static_cast<const E*>(p.dc) + last * state, s_.dc0);
      put(w.dw_ih, s_.dw_ih);
      put(w.dw_hh, s_.dw_hh);
      put(w.dbias, s_.db_ih);
      put(w.dbias, s_.db_hh);
      put(p.dw_ch, s_.dw_ch);
    }
    return std::max(back.taken() + steps.backward_bytes(kernels_),
                    weights.taken() + (of_weights ? products.weights_bytes(kernels_) : 0));
  }

 private:
  static constexpr Dtype kComputed = std::is_same_v<E, double> ? Dtype::kFloat64 : Dtype::kFloat32;

  // What forward and backward have in common. of_x: whether x is read.
  ConvLayer layer(bool of_x) {
    ConvLayer p{};
    p.dtype = p.h_dtype = kComputed;
    p.threads = s_.threads;
    p.T = p.at_once = 1;
    p.memories = 2;
    p.N = s_.N;
    p.C = s_.C;
    p.of_x = s_.of_x;
    p.of_h = s_.of_h;
    if (of_x) p.x = given(s_.x);
    p.x_first = s_.x.first;
    p.w_ih = given(s_.w_ih);
    p.w_ih_first = s_.w_ih.first;
    p.w_hh = given(s_.w_hh);
    p.w_hh_first = s_.w_hh.first;
    p.w_ch = given(s_.w_ch);
    return p;
  }

  void* piece(int64_t count) {
    void* taken = nullptr;
    scratch_.take(taken, count * int64_t(sizeof(E)));
    return taken;
  }

  // What is read, as E, rounded as the call's dtype would be; and where what is written is made.
  void* given(const ConvTensor& t) {
    if (!t.memory || (t.own == kComputed && s_.dtype == kComputed)) return t.memory;
    void* const to = piece(t.count);
    if (memory_) kernels_.convert({t.memory, t.own, s_.dtype, to, kComputed, t.count});
    return to;
  }
  void* made(const ConvTensor& t) {
    return !t.memory || t.own == kComputed ? t.memory : piece(t.count);
  }
  void put(const void* from, const ConvTensor& t) const {
    if (!t.memory || from == t.memory) return;
    if (t.own == kComputed) {
      std::memcpy(t.memory, from, size_t(t.count) * sizeof(E));
    } else {
      kernels_.convert({from, kComputed, t.own, t.memory, t.own, t.count});
    }
  }

  void take_gradient(const void* from, bool first, void* to) const {
    if (from) {
      channels_last(s_.of_h, s_.N, static_cast<const E*>(from), first, static_cast<E*>(to));
    } else {
      std::memset(to, 0, size_t(s_.N * s_.of_h.places() * s_.C) * sizeof(E));
    }
  }

  const ConvCellStep& s_;
  const CpuKernels& kernels_;
  char* const memory_;
  ConvScratch scratch_;
};

}  // namespace lstm_ext
