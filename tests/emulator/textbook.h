// The textbook's LSTM with projection, layer norm, lengths and resets, and its gradients: loops in
// double, one direction of one layer. For lstm_driver.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "params.h"

namespace lstm_ext::textbook {

using Values = std::vector<double>;

// Named as in engine.h; NaN in rows that nobody is to touch.
struct Direction {
  Values gx, b_ih, b_hh, w_hh, w_hr, h0, c0, dy, dh_n, dc_n, dcells;       // given
  Values gamma_hh, gamma_ch, beta_ch;                                      // empty: no layer norm
  Values gates, c_seq, y, h_n, c_n, dgates, dr, h_prev, c_prev, dh0, dc0;  // results
  Values norm, norm_r, dproduct, dnorm, cell_out;                          // of a layer norm
};
constexpr double kEpsilon = 1e-5;

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// out += matrix v, or its transpose's product; matrix [rows][columns].
inline void multiply(const Values& matrix, int64_t rows, int64_t columns, const Values& v,
                     Values& out, bool transposed = false) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      out[transposed ? c : r] += matrix[r * columns + c] * v[transposed ? r : c];
}

// A normalized row, and its gradient from that of x_hat.
struct Norm {
  Values x_hat;
  double rstd;

  explicit Norm(const Values& x) : x_hat(x) {
    double mean = 0, variance = 0;
    for (const double v : x) mean += v / double(x.size());
    for (const double v : x) variance += (v - mean) * (v - mean) / double(x.size());
    rstd = 1 / std::sqrt(variance + kEpsilon);
    for (double& v : x_hat) v = (v - mean) * rstd;
  }
  Norm(Values x_hat, double rstd) : x_hat(std::move(x_hat)), rstd(rstd) {}
  Values backward(const Values& d) const {
    double mean = 0, along = 0;
    for (size_t k = 0; k < d.size(); ++k) {
      mean += d[k] / double(d.size());
      along += d[k] * x_hat[k] / double(d.size());
    }
    Values out(d.size());
    for (size_t k = 0; k < d.size(); ++k) out[k] = (d[k] - mean - x_hat[k] * along) * rstd;
    return out;
  }
};

// What h is made of.
inline Values seen_of(const Direction& d, const Values& c, const Norm& norm) {
  Values seen = c;
  if (!d.gamma_ch.empty())
    for (size_t k = 0; k < c.size(); ++k) seen[k] = d.gamma_ch[k] * norm.x_hat[k] + d.beta_ch[k];
  return seen;
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
      if (d.gamma_hh.empty()) {
        multiply(d.w_hh, 4 * H, P, h, a);
      } else {
        Values product(4 * H);
        multiply(d.w_hh, 4 * H, P, h, product);
        const Norm norm(product);
        for (int64_t k = 0; k < 4 * H; ++k) a[k] += d.gamma_hh[k] * norm.x_hat[k];
        std::copy(norm.x_hat.begin(), norm.x_hat.end(), &d.norm[row * 4 * H]);
        d.norm_r[row] = norm.rstd;
      }
      for (int64_t k = 0; k < 4 * H; ++k) a[k] = k / H == 2 ? std::tanh(a[k]) : sigmoid(a[k]);
      for (int64_t k = 0; k < H; ++k) c[k] = a[H + k] * c[k] + a[k] * a[2 * H + k];
      const Values seen = seen_of(d, c, Norm(c));
      for (int64_t k = 0; k < H; ++k) hidden[k] = a[3 * H + k] * std::tanh(seen[k]);
      if (!d.cell_out.empty()) std::copy(hidden.begin(), hidden.end(), &d.cell_out[row * H]);
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
      const bool normed = !d.gamma_hh.empty();
      const Values c(&d.c_seq[row * H], &d.c_seq[row * H] + H);
      const Norm of_c(c);
      const Values seen = seen_of(d, c, of_c);
      Values through_h(H);
      for (int64_t k = 0; k < H; ++k) {
        const double o = s[3 * H + k], tanh_c = std::tanh(seen[k]);
        da[3 * H + k] = hidden[k] * tanh_c * o * (1 - o);
        through_h[k] = hidden[k] * o * (1 - tanh_c * tanh_c);
        if (!normed) continue;
        d.dnorm[b * 6 * H + 4 * H + k] += through_h[k] * of_c.x_hat[k];
        d.dnorm[b * 6 * H + 5 * H + k] += through_h[k];
        through_h[k] *= d.gamma_ch[k];
      }
      if (normed) through_h = of_c.backward(through_h);
      for (int64_t k = 0; k < H; ++k) {
        const double i = s[k], f = s[H + k], g = s[2 * H + k];
        dc[k] += d.dcells[row * H + k] + through_h[k];
        da[k] = dc[k] * g * i * (1 - i);
        da[H + k] = dc[k] * d.c_prev[row * H + k] * f * (1 - f);
        da[2 * H + k] = dc[k] * i * (1 - g * g);
        dc[k] *= f;
      }
      Values product(da, da + 4 * H);
      if (normed) {
        const double* x_hat = &d.norm[row * 4 * H];
        for (int64_t k = 0; k < 4 * H; ++k) d.dnorm[b * 6 * H + k] += da[k] * x_hat[k];
        for (int64_t k = 0; k < 4 * H; ++k) product[k] *= d.gamma_hh[k];
        product = Norm(Values(x_hat, x_hat + 4 * H), d.norm_r[row]).backward(product);
        std::copy(product.begin(), product.end(), &d.dproduct[row * 4 * H]);
      }
      dh.assign(P, 0);
      multiply(d.w_hh, 4 * H, P, product, dh, true);
      if (steps.reset && steps.reset[t * steps.B + b]) dh.assign(P, 0), dc.assign(H, 0);
    }
    std::copy(dh.begin(), dh.end(), &d.dh0[b * P]);
    std::copy(dc.begin(), dc.end(), &d.dc0[b * H]);
  }
}

}  // namespace lstm_ext::textbook
