// The LSTM cell, forward and backward, once for every engine. No memory access, no loops.
//
// Formulas (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, as nn.LSTM):
//   i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o);  g = tanh(a_g)
//   c = f * c_prev + i * g;  h = o * tanh(c)
//
// Math supplies the value type V (a scalar, or a vector of hidden units) with its operators, and
// V sigmoid(V), V tanh(V).
#pragma once

#include "inline.h"

namespace lstm_ext {

template <class Math>
struct Cell {
  using V = typename Math::V;

  struct Gates {
    V i, f, g, o;
  };

  // a: pre-activations. On return s holds the activated gates, c and h the new state.
  static LSTM_EXT_INLINE void forward(const Gates& a, V c_prev, Gates& s, V& c, V& h) {
    s.i = Math::sigmoid(a.i);
    s.f = Math::sigmoid(a.f);
    s.g = Math::tanh(a.g);
    s.o = Math::sigmoid(a.o);
    c = s.f * c_prev + s.i * s.g;
    h = s.o * Math::tanh(c);
  }

  // dh, dc: gradients of h and c from all later uses. On return da is the gradient of the
  // pre-activations and dc that of c_prev. tanh(c) is recomputed rather than saved.
  static LSTM_EXT_INLINE void backward(const Gates& s, V c, V c_prev, V dh, V& dc, Gates& da) {
    const V tanh_c = Math::tanh(c);
    dc += dh * s.o * (1 - tanh_c * tanh_c);
    da.i = dc * s.g * s.i * (1 - s.i);
    da.f = dc * c_prev * s.f * (1 - s.f);
    da.g = dc * s.i * (1 - s.g * s.g);
    da.o = dh * tanh_c * s.o * (1 - s.o);
    dc = dc * s.f;
  }
};

}  // namespace lstm_ext
