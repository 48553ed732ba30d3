// The textbook's LSTM with projection, lengths and resets, and its gradients: loops in double, one
// direction of one layer. For lstm_driver.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "params.h"

namespace lstm_ext::textbook {

using Values = std::vector<double>;

// Named as in engine.h; NaN in rows that nobody is to touch.
struct Direction {
  Values gx, b_ih, b_hh, w_hh, w_hr, h0, c0, dy, dh_n, dc_n, dcells;       // given
  Values gates, c_seq, y, h_n, c_n, dgates, dr, h_prev, c_prev, dh0, dc0;  // results
};

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// out += matrix v, or its transpose's product; matrix [rows][columns].
inline void multiply(const Values& matrix, int64_t rows, int64_t columns, const Values& v,
                     Values& out, bool transposed = false) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      out[transposed ? c : r] += matrix[r * columns + c] * v[transposed ? r : c];
}

inline void forward(const Steps& steps, int64_t H, int64_t P, Direction& d) {
  for (int64_t b = 0; b < steps.B; ++b) {
    Values h(&d.h0[b * P], &d.h0[b * P] + P), c(&d.c0[b * H], &d.c0[b * H] + H);
    for (int64_t i = 0; i < steps.T; ++i) {
      const int64_t t = steps.step_at(i);
      if (!steps.active(t, b)) continue;
      const int64_t row = steps.row(t, b);
      if (steps.reset && steps.reset[t * steps.B + b]) h.assign(P, 0), c.assign(H, 0);
      std::copy(h.begin(), h.end(), &d.h_prev[row * P]);
      std::copy(c.begin(), c.end(), &d.c_prev[row * H]);
      Values a(&d.gx[row * 4 * H], &d.gx[row * 4 * H] + 4 * H), hidden(H);
      for (int64_t k = 0; k < 4 * H; ++k) a[k] += d.b_ih[k] + d.b_hh[k];
      multiply(d.w_hh, 4 * H, P, h, a);
      for (int64_t k = 0; k < 4 * H; ++k) a[k] = k / H == 2 ? std::tanh(a[k]) : sigmoid(a[k]);
      for (int64_t k = 0; k < H; ++k) {
        c[k] = a[H + k] * c[k] + a[k] * a[2 * H + k];
        hidden[k] = a[3 * H + k] * std::tanh(c[k]);
      }
      h = hidden;
      if (!d.w_hr.empty()) h.assign(P, 0), multiply(d.w_hr, P, H, hidden, h);
      std::copy(a.begin(), a.end(), &d.gates[row * 4 * H]);
      std::copy(c.begin(), c.end(), &d.c_seq[row * H]);
      std::copy(h.begin(), h.end(), &d.y[row * P]);
    }
    std::copy(h.begin(), h.end(), &d.h_n[b * P]);
    std::copy(c.begin(), c.end(), &d.c_n[b * H]);
  }
}

inline void backward(const Steps& steps, int64_t H, int64_t P, Direction& d) {
  for (int64_t b = 0; b < steps.B; ++b) {
    Values dh(&d.dh_n[b * P], &d.dh_n[b * P] + P), dc(&d.dc_n[b * H], &d.dc_n[b * H] + H);
    for (int64_t i = steps.T - 1; i >= 0; --i) {
      const int64_t t = steps.step_at(i);
      if (!steps.active(t, b)) continue;
      const int64_t row = steps.row(t, b);
      for (int64_t k = 0; k < P; ++k) d.dr[row * P + k] = dh[k] += d.dy[row * P + k];
      Values hidden = dh;
      if (!d.w_hr.empty()) hidden.assign(H, 0), multiply(d.w_hr, P, H, dh, hidden, true);
      const double* s = &d.gates[row * 4 * H];
      double* da = &d.dgates[row * 4 * H];
      for (int64_t k = 0; k < H; ++k) {
        const double i = s[k], f = s[H + k], g = s[2 * H + k], o = s[3 * H + k];
        const double tanh_c = std::tanh(d.c_seq[row * H + k]);
        dc[k] += d.dcells[row * H + k] + hidden[k] * o * (1 - tanh_c * tanh_c);
        da[k] = dc[k] * g * i * (1 - i);
        da[H + k] = dc[k] * d.c_prev[row * H + k] * f * (1 - f);
        da[2 * H + k] = dc[k] * i * (1 - g * g);
        da[3 * H + k] = hidden[k] * tanh_c * o * (1 - o);
        dc[k] *= f;
      }
      dh.assign(P, 0);
      multiply(d.w_hh, 4 * H, P, Values(da, da + 4 * H), dh, true);
      if (steps.reset && steps.reset[t * steps.B + b]) dh.assign(P, 0), dc.assign(H, 0);
    }
    std::copy(dh.begin(), dh.end(), &d.dh0[b * P]);
    std::copy(dc.begin(), dc.end(), &d.dc0[b * H]);
  }
}

}  // namespace lstm_ext::textbook
