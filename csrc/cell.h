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

  // Forward mode, without peepholes: the tangents of c and h from those of the pre-activations and
  // of c_prev. s, tanh_c, c_prev: where the tangent is taken.
  static LSTM_EXT_INLINE void tangent(const Gates& s, V tanh_c, V c_prev, const Gates& a_dot,
                                      V c_prev_dot, V& c_dot, V& h_dot) {
    const V i_dot = s.i * (1 - s.i) * a_dot.i, f_dot = s.f * (1 - s.f) * a_dot.f;
    const V g_dot = (1 - s.g * s.g) * a_dot.g, o_dot = s.o * (1 - s.o) * a_dot.o;
    c_dot = f_dot * c_prev + s.f * c_prev_dot + i_dot * s.g + s.i * g_dot;
    h_dot = o_dot * tanh_c + s.o * (1 - tanh_c * tanh_c) * c_dot;
  }

  // The tangent of backward: each of its lines, differentiated. dh, dc: what backward had, dc with
  // what comes through h. dh_dot, dc_dot: tangents of the gradients of h and c from all later uses;
  // dc_dot becomes that of c_prev's.
  static LSTM_EXT_INLINE void backward_tangent(const Gates& s, V tanh_c, V c_prev, V dh, V dc,
                                               const Gates& a_dot, V c_dot, V c_prev_dot, V dh_dot,
                                               V& dc_dot, Gates& da_dot) {
    const V by_i = s.i * (1 - s.i), by_f = s.f * (1 - s.f), by_o = s.o * (1 - s.o);
    const V by_g = 1 - s.g * s.g, by_c = 1 - tanh_c * tanh_c;
    const V i_dot = by_i * a_dot.i, f_dot = by_f * a_dot.f, o_dot = by_o * a_dot.o;
    const V g_dot = by_g * a_dot.g, tanh_dot = by_c * c_dot;
    da_dot.o = (dh_dot * tanh_c + dh * tanh_dot) * by_o + dh * tanh_c * (1 - 2 * s.o) * o_dot;
    dc_dot += (dh_dot * s.o + dh * o_dot) * by_c - 2 * dh * s.o * tanh_c * tanh_dot;
    da_dot.i = (dc_dot * s.g + dc * g_dot) * by_i + dc * s.g * (1 - 2 * s.i) * i_dot;
    da_dot.f = (dc_dot * c_prev + dc * c_prev_dot) * by_f + dc * c_prev * (1 - 2 * s.f) * f_dot;
    da_dot.g = (dc_dot * s.i + dc * i_dot) * by_g - 2 * dc * s.i * s.g * g_dot;
    dc_dot = dc_dot * s.f + dc * f_dot;
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
