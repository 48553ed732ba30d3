// Rows of a layer norm: x_hat = (x - mean) * rstd over all n elements, the variance that of the
// whole (not n - 1), as torch's layer_norm.
#pragma once

#include <cmath>

#include "simd.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

template <class A>
A sum_of_lanes(Vec<A> v) {
  A sum = 0;
  for (int l = 0; l < Lanes<A>::kCount; ++l) sum += v[l];
  return sum;
}

// Lanes from n on become 0.
template <class A>
LSTM_EXT_INLINE Vec<A> first_lanes(Vec<A> v, int64_t n) {
  if (n >= Lanes<A>::kCount) return v;
  A part[Lanes<A>::kCount];
  store_full<A>(part, v);
  return load<A>(part, n);
}

template <class A>
struct Moments {
  A mean, rstd;

  // Of x[0 .. n). Two passes: the difference of two sums would cancel.
  static Moments of(const A* x, int64_t n, double epsilon) {
    constexpr int L = Lanes<A>::kCount;
    Vec<A> sum{}, squares{};
    for (int64_t j = 0; j < n; j += L) sum += load<A>(x + j, n - j);
    const A mean = sum_of_lanes<A>(sum) / A(n);
    for (int64_t j = 0; j < n; j += L) {
      const Vec<A> d = first_lanes<A>(load<A>(x + j, n - j) - mean, n - j);
      squares += d * d;
    }
    return {mean, A(1) / std::sqrt(sum_of_lanes<A>(squares) / A(n) + A(epsilon))};
  }

  Vec<A> normalize(Vec<A> x) const { return (x - mean) * rstd; }
};

// Backward of a row: from d, the gradient of x_hat, add() sums what couples the elements; then
// gradient() is that of x.
template <class A>
struct NormGradient {
  Vec<A> sum{}, products{};

  void add(Vec<A> d, Vec<A> x_hat, int64_t n) {
    d = first_lanes<A>(d, n);
    sum += d;
    products += d * x_hat;
  }
  // After all were added, once: the means of the n elements.
  void finish(int64_t n, A rstd) {
    mean_ = sum_of_lanes<A>(sum) / A(n);
    mean_product_ = sum_of_lanes<A>(products) / A(n);
    rstd_ = rstd;
  }
  Vec<A> gradient(Vec<A> d, Vec<A> x_hat) const {
    return (d - mean_ - x_hat * mean_product_) * rstd_;
  }

 private:
  A mean_, mean_product_, rstd_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
