// A ConvLSTM's layer on the CPU, its convolutions as products: what a kernel sees at each pixel,
// copied side by side, times the weights. For images so small that calls of a library's
// convolutions, and of the cell, take longer than the sums.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace lstm_ext {

// How a kernel moves over images of up to three dimensions; a dimension that is not there has 1
// pixel. Images lie channels last.
struct ConvWindow {
  using Sizes = std::array<int64_t, 3>;

  Sizes size;                              // of an image
  Sizes output;                            // how many places the kernel takes
  Sizes kernel, stride, before, dilation;  // before: zeros before the first pixel
  int64_t channels;

  static int64_t product(const Sizes& of) { return of[0] * of[1] * of[2]; }
  int64_t pixels() const { return product(size); }
  int64_t places() const { return product(output); }
  int64_t columns() const { return product(kernel) * channels; }

  // done(place, k, pixel, count) for each place: what `count` pixels of the kernel, from the k-th
  // on, see there: as many pixels of the image, one after the other in memory; or -1: zeros.
  template <class Done>
  void each(Done&& done) const {
    Sizes o, k{};
    int64_t place = 0;
    for (o[0] = 0; o[0] < output[0]; ++o[0])
      for (o[1] = 0; o[1] < output[1]; ++o[1])
        for (o[2] = 0; o[2] < output[2]; ++o[2], ++place) {
          int64_t at = 0;
          for (k[0] = 0; k[0] < kernel[0]; ++k[0])
            for (k[1] = 0; k[1] < kernel[1]; ++k[1], at += kernel[2]) line(o, k, place, at, done);
        }
  }

 private:
  int64_t seen(const Sizes& o, const Sizes& k, size_t d) const {
    return o[d] * stride[d] - before[d] + k[d] * dilation[d];
  }

  // Of the kernel's pixels along the last dimension, the k-th and following.
  template <class Done>
  void line(const Sizes& o, Sizes k, int64_t place, int64_t at, Done&& done) const {
    const int64_t many = kernel[2], i = seen(o, k, 0), j = seen(o, k, 1);
    if (i < 0 || i >= size[0] || j < 0 || j >= size[1]) return done(place, at, -1, many);
    const int64_t start = (i * size[1] + j) * size[2];
    if (dilation[2] > 1) {
      for (k[2] = 0; k[2] < many; ++k[2]) {
        const int64_t l = seen(o, k, 2);
        done(place, at + k[2], l < 0 || l >= size[2] ? -1 : start + l, 1);
      }
      return;
    }
    const int64_t first = seen(o, k, 2);
    const int64_t left = std::min(many, std::max<int64_t>(0, -first));
    const int64_t right = std::max(left, std::min(many, size[2] - first));
    if (left) done(place, at, -1, left);
    if (right > left) done(place, at + left, start + first + left, right - left);
    if (right < many) done(place, at + right, -1, many - right);
  }
};

// Its tensors are dense, of one dtype, float32 or float64. rows: places of all images.
struct ConvLayer {
  Dtype dtype;
  int threads;
  int64_t T, N, C;
  bool reverse;
  ConvWindow of_x, of_h;
  const void* x;   // [T, N, pixels, in], or, if x_first, [T, N, in, pixels]
  bool x_first;    // channels first; and likewise h0_first and c0_first
  const void* h0;  // [N, pixels, C], or channels first
  bool h0_first;
  const void* c0;
  bool c0_first;
  const void* w_ih;  // [4C, in, kernel], and likewise w_hh
  const void* w_hh;
  const void* bias;  // [4C], or null; and likewise what is added to it
  const void* more_bias;
  const void* w_ch;  // [3C], or null
  // As conv_layer.on_cells has them: of T + 1 states the first is before the first step in memory,
  // so that a reverse direction begins with the last. Null, but for gates: scratch is taken.
  void* h_first;     // [rows, C]: for h0
  void* h_out;       // [T, rows, C]
  void* c_seq;       // [memories, rows, C]
  int64_t memories;  // T + 1, or 2, which the steps take in turn
  void* gates;       // [T, rows, 4C]
  void* h_n;         // [rows, C]
  void* c_n;
  // backward; the gradients of x and of weights are null if they are not wanted
  const void* h_seq;  // [T + 1, rows, C]
  const void* dy;     // [T, rows, C], or null for zero
  int64_t at_once;    // steps whose products for the weights are one; forward: 1
  bool of_h0;         // whether the gradient of h_first is wanted
  void* dx;           // [T, N, pixels, in]
  void* dh;           // [rows, C]: first of h_n, at last of h0
  void* dc;           // [2, rows, C]: the first of c_n, at last of c0
  void* dw_ih;        // [4C, in, kernel]
  void* dw_hh;
  void* dbias;      // [2, 4C], of which the first is it; null only if dw_ih and dw_hh are
  void* dpeephole;  // [rows, 3C], zeros at first; or null
  // scratch
  void* w;        // [4C, columns]: both weights
  void* columns;  // [at_once * rows, columns of x, then of h]
  void* image;    // [N, pixels, in]
  void* dgates;   // [T, rows, 4C]: of backward
  void* dw;       // [2, 4C, columns]: likewise

  int64_t all_columns() const { return of_x.columns() + of_h.columns(); }
  int64_t rows() const { return N * of_h.places(); }
  int64_t step_at(int64_t i) const { return reverse ? T - 1 - i : i; }
  int64_t before(int64_t t) const { return t + reverse; }
  int64_t after(int64_t t) const { return t + !reverse; }
};

// Pieces of a call's scratch, one after the other; of no memory, to see how many bytes they are.
class ConvScratch {
 public:
  explicit ConvScratch(void* memory = nullptr) : start_(reinterpret_cast<uintptr_t>(memory)) {}

  // For what there is none yet.
  void take(void*& piece, int64_t bytes) {
    constexpr int64_t kLine = 64;
    if (piece) return;
    piece = reinterpret_cast<void*>(std::max<uintptr_t>(start_, kLine) + uintptr_t(taken_));
    taken_ += (bytes + kLine - 1) / kLine * kLine;
  }
  int64_t taken() const { return taken_; }

 private:
  uintptr_t start_;
  int64_t taken_ = 0;
};

template <class E>
class ConvSteps {
 public:
  static void take_scratch(ConvLayer& p, ConvScratch& scratch, bool backward) {
    const int64_t size = int64_t(sizeof(E)), state = p.rows() * p.C * size;
    const int64_t weights = 4 * p.C * p.all_columns() * size;
    scratch.take(p.w, weights);
    scratch.take(p.columns, p.at_once * p.rows() * p.all_columns() * size);
    scratch.take(p.image, p.N * p.of_x.pixels() * p.of_x.channels * size);
    if (backward) {
      scratch.take(p.dgates, p.T * 4 * state);
      scratch.take(p.dw, 2 * weights);
    } else {
      scratch.take(p.h_first, state);
      scratch.take(p.h_out, p.T * state);
      scratch.take(p.c_seq, p.memories * state);
    }
  }

  explicit ConvSteps(const ConvLayer& p) : p_(p), rows_(p.rows()), state_(rows_ * p.C) {}

  LstmForward first_call() const {
    LstmForward call{};
    call.dtype = p_.dtype;
    call.threads = p_.threads;
    call.steps = one_step();
    call.H = call.P = call.y_stride = p_.C;
    call.I = p_.all_columns();
    call.x = p_.columns;
    call.w_ih = p_.w;
    call.b_ih = p_.bias;
    call.b_hh = p_.more_bias;
    call.variants.peephole = p_.w_ch;
    return call;
  }

  void forward(const CpuKernels& kernels, void* workspace) const {
    LstmForward call = first_call();
    lay_out_weights(p_.w_ih, call.I);
    call.workspace = workspace;
    const void* h = p_.h_first;
    put(p_.of_h, at(p_.h0, 0), p_.h0_first, at(p_.h_first, 0));
    put(p_.of_h, at(p_.c0, 0), p_.c0_first, cell(p_.before(p_.step_at(0))));
    for (int64_t i = 0; i < p_.T; ++i) {
      const int64_t t = p_.step_at(i);
      take_step(t, h, at(p_.columns, 0));
      call.h0 = h;
      call.c0 = cell(p_.before(t));
      call.gates = p_.gates ? at(p_.gates, t * 4 * state_) : nullptr;
      call.c_seq = cell(p_.after(t));
      call.y = at(p_.h_out, t * state_);
      call.h_n = i < p_.T - 1 ? call.y : p_.h_n;
      call.c_n = i < p_.T - 1 ? call.c_seq : p_.c_n;
      kernels.forward.run(call);
      h = call.y;
    }
  }

  LstmBackward first_backward() const {
    LstmBackward call{};
    call.dtype = p_.dtype;
    call.threads = p_.threads;
    call.steps = one_step();
    call.H = call.P = p_.C;
    call.variants.peephole = p_.w_ch;
    call.dpeephole = p_.dpeephole;
    call.dh0 = p_.columns;  // nothing passes a step but what comes through the gates
    return call;
  }

  // The gradient of the columns, or, unless that of x is wanted, of those of h alone.
  Matmul back_product() const {
    Matmul m{};
    m.dtype = p_.dtype;
    m.threads = p_.threads;
    m.M = rows_;
    m.N = p_.of_h.columns() + (p_.dx ? p_.of_x.columns() : 0);
    m.K = 4 * p_.C;
    m.w = p_.w;
    m.rounded = true;
    m.out = p_.columns;
    return m;
  }

  // That of the weights, of so many steps.
  Matmul weights_product(int64_t steps) const {
    Matmul m{};
    m.dtype = p_.dtype;
    m.threads = p_.threads;
    m.M = 4 * p_.C;
    m.N = p_.all_columns();
    m.K = steps * rows_;
    m.a_transposed = true;
    m.w = p_.columns;
    m.rounded = true;
    return m;
  }

  // Returns which of dc is the last.
  int backward(const CpuKernels& kernels, void* workspace) const {
    const int last = back_steps(kernels, workspace);
    if (p_.dbias) products_of_weights(kernels, workspace);
    return last;
  }

 private:
  Steps one_step() const { return {1, rows_, rows_, rows_, 1, nullptr, nullptr, nullptr, false}; }

  int back_steps(const CpuKernels& kernels, void* workspace) const {
    LstmBackward call = first_backward();
    Matmul m = back_product();
    lay_out_weights(p_.dx ? p_.w_ih : nullptr, m.N);
    call.workspace = m.workspace = workspace;
    E* const dh = at(p_.dh, 0);
    int last = 0;
    for (int64_t i = p_.T - 1; i >= 0; --i, last = 1 - last) {
      const int64_t t = p_.step_at(i);
      if (p_.dy) add(dh, at(p_.dy, t * state_), state_);
      call.gates = at(p_.gates, t * 4 * state_);
      call.c0 = cell(p_.before(t));
      call.c_seq = cell(p_.after(t));
      call.dh_n = dh;
      call.dc_n = at(p_.dc, last * state_);
      call.dc0 = at(p_.dc, (1 - last) * state_);
      call.dgates = at(p_.dgates, t * 4 * state_);
      kernels.backward.run(call);
      if (i == 0 && !p_.of_h0 && !p_.dx) continue;
      m.a = call.dgates;
      kernels.matmul(m);
      put_back(p_.of_h, m.N - p_.of_h.columns(), m.N, dh);
      if (p_.dx) put_back(p_.of_x, 0, m.N, at(p_.dx, t * image_size()));
    }
    return last;
  }

  void products_of_weights(const CpuKernels& kernels, void* workspace) const {
    const int64_t size = 4 * p_.C * p_.all_columns();
    for (int64_t begin = 0; begin < p_.T; begin += p_.at_once) {
      const int64_t end = std::min(p_.T, begin + p_.at_once);
      for (int64_t t = begin; t < end; ++t) {
        E* const to = at(p_.columns, (t - begin) * rows_ * p_.all_columns());
        take_step(t, at(p_.h_seq, p_.before(t) * state_), to);
      }
      Matmul m = weights_product(end - begin);
      m.workspace = workspace;
      m.a = at(p_.dgates, begin * 4 * state_);
      m.out = at(p_.dw, begin ? size : 0);
      m.sums = at(p_.dbias, begin ? 4 * p_.C : 0);
      kernels.matmul(m);
      if (begin) {
        add(at(p_.dw, 0), at(p_.dw, size), size);
        add(at(p_.dbias, 0), at(p_.dbias, 4 * p_.C), 4 * p_.C);
      }
    }
    each_weight([](E& own, const E& laid_out) { own = laid_out; }, at(p_.dw, 0), p_.all_columns(),
                p_.dw_ih, p_.dw_hh);
  }

  static void add(E* to, const E* more, int64_t n) {
    for (int64_t k = 0; k < n; ++k) to[k] += more[k];
  }

  int64_t image_size() const { return p_.N * p_.of_x.pixels() * p_.of_x.channels; }

  template <class Void>
  static auto at(Void* memory, int64_t elements) {
    using Element = std::conditional_t<std::is_const_v<Void>, const E, E>;
    return static_cast<Element*>(memory) + elements;
  }
  E* cell(int64_t k) const { return at(p_.c_seq, k % p_.memories * state_); }

  // N images, channels last.
  void put(const ConvWindow& window, const E* images, bool first, E* to) const {
    const int64_t n = window.channels, pixels = window.pixels();
    if (!first) {
      std::memcpy(to, images, size_t(p_.N * pixels * n) * sizeof(E));
      return;
    }
    for (int64_t b = 0; b < p_.N; ++b, to += pixels * n)
      for (int64_t c = 0; c < n; ++c)
        for (int64_t i = 0; i < pixels; ++i) to[i * n + c] = *images++;
  }

  // done(weight, the same in rows of so many columns), for each that there is: there the channels
  // of a pixel are side by side, and W_hh's are last.
  template <class Done, class Void>
  void each_weight(Done&& done, E* laid_out, int64_t columns, Void* w_ih, Void* w_hh) const {
    const auto each = [&](const ConvWindow& window, Void* weights, E* column) {
      if (!weights) return;
      const int64_t n = window.channels, many = ConvWindow::product(window.kernel);
      auto* own = at(weights, 0);
      for (int64_t row = 0; row < 4 * p_.C; ++row, own += n * many, column += columns) {
        for (int64_t c = 0; c < n; ++c)
          for (int64_t k = 0; k < many; ++k) done(own[c * many + k], column[k * n + c]);
      }
    };
    each(p_.of_x, w_ih, laid_out);
    each(p_.of_h, w_hh, laid_out + columns - p_.of_h.columns());
  }
  void lay_out_weights(const void* w_ih, int64_t columns) const {
    each_weight([](const E& own, E& laid_out) { laid_out = own; }, at(p_.w, 0), columns, w_ih,
                p_.w_hh);
  }

  // What the kernels see at a step, of x and of the h before it.
  void take_step(int64_t t, const void* h, E* to) const {
    const E* x = at(p_.x, t * image_size());
    if (p_.x_first) {
      put(p_.of_x, x, true, at(p_.image, 0));
      x = at(p_.image, 0);
    }
    take(p_.of_x, x, to);
    take(p_.of_h, at(h, 0), to + p_.of_x.columns());
  }

  // What the kernel sees of N images, in a part of the columns.
  void take(const ConvWindow& window, const E* images, E* to) const {
    const int64_t n = window.channels, columns = p_.all_columns();
    for (int64_t b = 0; b < p_.N; ++b) {
      window.each([&](int64_t place, int64_t k, int64_t pixel, int64_t count) {
        E* const own = to + place * columns + k * n;
        const size_t bytes = size_t(count * n) * sizeof(E);
        if (pixel < 0) {
          std::memset(own, 0, bytes);
        } else {
          std::memcpy(own, images + pixel * n, bytes);
        }
      });
      images += window.pixels() * n;
      to += window.places() * columns;
    }
  }

  // The inverse, for gradients: the columns from one on, of so many.
  void put_back(const ConvWindow& window, int64_t column, int64_t columns, E* images) const {
    const int64_t n = window.channels, size = window.pixels() * n;
    std::memset(images, 0, size_t(p_.N * size) * sizeof(E));
    const E* from = at(static_cast<const void*>(p_.columns), column);
    for (int64_t b = 0; b < p_.N; ++b, images += size, from += window.places() * columns) {
      window.each([&](int64_t place, int64_t k, int64_t pixel, int64_t count) {
        if (pixel >= 0) add(images + pixel * n, from + place * columns + k * n, count * n);
      });
    }
  }

  const ConvLayer& p_;
  const int64_t rows_, state_;
};

// run(E) of the dtype's element.
template <class Run>
auto of_dtype(Dtype dtype, const Run& run) {
  return dtype == Dtype::kFloat64 ? run(double()) : run(float());
}

}  // namespace lstm_ext
