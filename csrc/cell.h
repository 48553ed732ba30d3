// The LSTM cell, forward and backward, once for every engine. No memory access, no loops.
//
// Formulas (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, as nn.LSTM):
//   i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o);  g = tanh(a_g)
//   c = f * c_prev + i * g;  h = o * tanh(c)
// With peepholes (Gers et al. 2002, as ONNX LSTM), a_i += p_i * c_prev, a_f += p_f * c_prev,
// a_o += p_o * c. With zoneout (Krueger et al. 2017) a part of the old state stays, of c after h
// was made of it.
//
// Math supplies the value type V (a scalar, or a vector of hidden units) with its operators, and
// V sigmoid(V), V tanh(V). The functions of two halves, and what lies between them, are for a layer
// norm: h = o * tanh(norm(c)).
#pragma once

#include "inline.h"

namespace lstm_ext {

template <class Math>
struct Cell {
  using V = typename Math::V;

  struct Gates {
    V i, f, g, o;
  };
  struct Peephole {
    V i, f, o;
  };

  // a: pre-activations. On return s holds the activated gates, c and h the new state.
  static LSTM_EXT_INLINE void forward(const Gates& a, V c_prev, Gates& s, V& c, V& h,
                                      const Peephole* peephole = nullptr) {
    forward_state(a, c_prev, s, c, peephole);
    h = forward_output(s, c);
  }

  static LSTM_EXT_INLINE void forward_state(Gates a, V c_prev, Gates& s, V& c,
                                            const Peephole* peephole) {
    if (peephole) {
      a.i += peephole->i * c_prev;
      a.f += peephole->f * c_prev;
    }
    s.i = Math::sigmoid(a.i);
    s.f = Math::sigmoid(a.f);
    s.g = Math::tanh(a.g);
    c = s.f * c_prev + s.i * s.g;
    if (peephole) a.o += peephole->o * c;
    s.o = Math::sigmoid(a.o);
  }

  static LSTM_EXT_INLINE V tanh_of(V c) { return Math::tanh(c); }
  static LSTM_EXT_INLINE V forward_output(const Gates& s, V c) { return s.o * tanh_of(c); }

  // dh, dc: gradients of h and c from all later uses. On return da is the gradient of the
  // pre-activations and dc that of c_prev. tanh(c) is recomputed rather than saved.
  static LSTM_EXT_INLINE void backward(const Gates& s, V c, V c_prev, V dh, V& dc, Gates& da,
                                       const Peephole* peephole = nullptr) {
    dc += backward_output(s, Math::tanh(c), dh, da);
    backward_state(s, c_prev, dc, da, peephole);
  }

  // The gradient of what tanh_c is the tanh of; sets da.o.
  static LSTM_EXT_INLINE V backward_output(const Gates& s, V tanh_c, V dh, Gates& da) {
    da.o = dh * tanh_c * s.o * (1 - s.o);
    return dh * s.o * (1 - tanh_c * tanh_c);
  }

  // The same without peepholes in two steps, for where dh is waited for: what dh and dc are
  // multiplied with, and the rest.
  struct Slopes {
    V c, i, f, g, o, c_prev;
  };
  static LSTM_EXT_INLINE Slopes slopes(const Gates& s, V tanh_c, V c_prev) {
    Gates by_c;
    V kept = V(1);
    backward_state(s, c_prev, kept, by_c, nullptr);
    const V by_h = backward_output(s, tanh_c, V(1), by_c);
    return {by_h, by_c.i, by_c.f, by_c.g, by_c.o, kept};
  }
  static LSTM_EXT_INLINE void backward(const Slopes& by, V dh, V& dc, Gates& da) {
    dc += dh * by.c;
    da = {dc * by.i, dc * by.f, dc * by.g, dh * by.o};
    dc *= by.c_prev;
  }

  // dc: of c, but for what comes through o's peephole; becomes that of c_prev. Sets the rest of da.
  static LSTM_EXT_INLINE void backward_state(const Gates& s, V c_prev, V& dc, Gates& da,
                                             const Peephole* peephole) {
    if (peephole) dc += da.o * peephole->o;
    da.i = dc * s.g * s.i * (1 - s.i);
    da.f = dc * c_prev * s.f * (1 - s.f);
    da.g = dc * s.i * (1 - s.g * s.g);
    dc = dc * s.f;
    if (peephole) dc += da.i * peephole->i + da.f * peephole->f;
  }

  // keep: what part of the old value stays; 0 and 1 are exact.
  static LSTM_EXT_INLINE V zoneout(V keep, V old, V fresh) {
    return keep * old + (1 - keep) * fresh;
  }
};

}  // namespace lstm_ext
