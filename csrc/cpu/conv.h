// A ConvLSTM's layer on the CPU, its convolutions as products: what a kernel sees at each pixel,
// copied side by side, times the weights. For images so small that calls of a library's
// convolutions, and of the cell, take longer than the sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../half.h"
#include "conv_layer.h"
#include "kernels.h"
#include "transpose.h"

namespace lstm_ext {

template <class E>
class ConvSteps {
 public:
  static void take_scratch(ConvLayer& p, ConvScratch& scratch, ConvCall call) {
    const int64_t size = int64_t(sizeof(E)), state = p.rows() * p.C * size;
    const int64_t weights = 4 * p.C * p.all_columns() * size;
    scratch.take(p.columns, p.at_once * p.rows() * p.all_columns() * size);
    if (call == ConvCall::kWeights) {
      scratch.take(p.dw, 2 * weights);
    } else {
      scratch.take(p.w, weights);
    }
    if (call != ConvCall::kForward) scratch.take(p.sums, 4 * p.C * int64_t(sizeof(double)));
    if (call == ConvCall::kBackward && p.w_ch) scratch.take(p.dpeephole, 3 * state);
    if (call != ConvCall::kWeights) {
      if (p.on) scratch.take(p.on_rows, p.rows() * int64_t(sizeof(int64_t)));
      if (p.reset) scratch.take(p.reset_rows, p.rows());
    }
    if (call != ConvCall::kBackward) {
      scratch.take(p.image, p.N * p.of_x.pixels() * p.of_x.channels * size);
    }
    if (call == ConvCall::kForward) {
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

  // Of the kernels' workspace, of each call.
  int64_t forward_bytes(const CpuKernels& kernels) const {
    return kernels.forward.workspace(first_call());
  }
  int64_t backward_bytes(const CpuKernels& kernels) const {
    return std::max(kernels.backward.workspace(first_backward()),
                    kernels.matmul_workspace(back_product()));
  }
  int64_t weights_bytes(const CpuKernels& kernels) const {
    // The last product's steps may be fewer, and take more memory.
    return std::max(kernels.matmul_workspace(weights_product(p_.at_once)),
                    kernels.matmul_workspace(weights_product(p_.T % p_.at_once)));
  }

  void forward(const CpuKernels& kernels, void* workspace) const {
    LstmForward call = first_call();
    lay_out_weights(p_.w_ih, call.I);
    call.workspace = workspace;
    const void* h = p_.h_first;
    channels_last(p_.of_h, p_.N, at(p_.h0, 0), p_.h0_first, at(p_.h_first, 0));
    channels_last(p_.of_h, p_.N, at(p_.c0, 0), p_.c0_first, cell(p_.before(p_.step_at(0))));
    for (int64_t i = 0; i < p_.T; ++i) {
      const int64_t t = p_.step_at(i);
      take_step(t, h, at(p_.columns, 0));
      const bool some_skip = set_rows(t);
      call.h0 = h;
      call.c0 = cell(p_.before(t));
      call.gates = p_.gates ? at(p_.gates, t * 4 * state_) : nullptr;
      call.c_seq = cell(p_.after(t));
      call.y = at(p_.h_out, t * state_);
      call.h_n = i < p_.T - 1 ? call.y : p_.h_n;
      call.c_n = i < p_.T - 1 ? call.c_seq : p_.c_n;
      if (some_skip) {  // their rows are left as they are, but for states
        std::memset(call.y, 0, size_t(state_) * sizeof(E));
        std::memset(call.c_seq, 0, size_t(state_) * sizeof(E));
        if (p_.gates) std::memset(call.gates, 0, size_t(4 * state_) * sizeof(E));
      }
      kernels.forward.run(call);
      round_to(p_.h_dtype, at(call.y, 0), state_);
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
    // Zeros, or what passes a sequence that takes no step: nobody reads them there.
    call.dh0 = p_.columns;
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
    LstmBackward call = first_backward();
    Matmul m = back_product();
    lay_out_weights(p_.dx ? p_.w_ih : nullptr, m.N);
    call.workspace = m.workspace = workspace;
    E* const dh = at(p_.dh, 0);
    if (p_.w_ch) std::memset(p_.dpeephole, 0, size_t(3 * state_) * sizeof(E));
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
      // The kernel leaves rows without a step as they are.
      if (set_rows(t)) std::memset(call.dgates, 0, size_t(4 * state_) * sizeof(E));
      kernels.backward.run(call);
      if (i == 0 && !p_.of_h0 && !p_.dx) continue;
      m.a = call.dgates;
      kernels.matmul(m);
      put_back(p_.of_h, m.N - p_.of_h.columns(), m.N, dh, [&](int64_t b) {
        // Without a step it is that of the state after it.
        return p_.skips(t, b) ? Image::kStays : p_.resets(t, b) ? Image::kZero : Image::kSeen;
      });
      if (!p_.dx) continue;
      put_back(p_.of_x, 0, m.N, at(p_.dx, t * image_size()),
               [&](int64_t b) { return p_.skips(t, b) ? Image::kZero : Image::kSeen; });
    }
    if (p_.w_ch) sum_rows(p_.dpeephole, rows_, 3 * p_.C, p_.dw_ch);
    return last;
  }

  void weights(const CpuKernels& kernels, void* workspace) const {
    if (!p_.dw_ih && !p_.dw_hh) return sum_rows(p_.dgates, p_.T * rows_, 4 * p_.C, p_.dbias);
    const int64_t size = 4 * p_.C * p_.all_columns();
    for (int64_t begin = 0; begin < p_.T; begin += p_.at_once) {
      const int64_t end = std::min(p_.T, begin + p_.at_once);
      for (int64_t t = begin; t < end; ++t) {
        E* const to = at(p_.columns, (t - begin) * rows_ * p_.all_columns());
        take_step(t, at(p_.h_seq, t * state_), to);
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
    const auto in_place = [](E* own, const E* column, int64_t n, int64_t many) {
      exchange_sides(column, many, n, own);
    };
    each_weight(in_place, at(p_.dw, 0), p_.all_columns(), p_.dw_ih, p_.dw_hh);
  }

 private:
  // What becomes of an image, or of its gradient.
  enum class Image { kSeen, kZero, kStays };

  // What set_rows sets.
  Steps one_step() const {
    const auto* lengths = static_cast<const int64_t*>(p_.on_rows);
    const auto* reset = static_cast<const uint8_t*>(p_.reset_rows);
    return {1, rows_, rows_, rows_, 1, nullptr, lengths, reset, false};
  }

  // A pixel is a sequence to the kernels. Returns whether some take no step.
  bool set_rows(int64_t t) const {
    const int64_t n = p_.of_h.places();
    bool some_skip = false;
    for (int64_t b = 0; b < p_.N; ++b) {
      some_skip = some_skip || p_.skips(t, b);
      if (p_.on) std::fill_n(static_cast<int64_t*>(p_.on_rows) + b * n, n, !p_.skips(t, b));
      if (p_.reset) std::fill_n(static_cast<uint8_t*>(p_.reset_rows) + b * n, n, p_.resets(t, b));
    }
    return some_skip;
  }

  static void round_to(Dtype dtype, E* x, int64_t n) {
    if constexpr (std::is_same_v<E, float>) {
      if (dtype == Dtype::kFloat16) {
        for (int64_t k = 0; k < n; ++k) x[k] = to_float(to_float16(x[k]));
      } else if (dtype == Dtype::kBFloat16) {
        for (int64_t k = 0; k < n; ++k) x[k] = rounded_to_bfloat16(x[k]);
      }
    }
  }

  static void add(E* to, const E* more, int64_t n) {
    for (int64_t k = 0; k < n; ++k) to[k] += more[k];
  }

  // In double: of all pixels there may be hundreds of thousands of rows.
  void sum_rows(const void* from, int64_t rows, int64_t width, void* to) const {
    const E* row = at(from, 0);
    auto* const sums = static_cast<double*>(p_.sums);
    std::fill_n(sums, width, 0.0);
    for (int64_t r = 0; r < rows; ++r, row += width)
      for (int64_t k = 0; k < width; ++k) sums[k] += row[k];
    std::copy_n(sums, width, at(to, 0));
  }

  int64_t image_size() const { return p_.N * p_.of_x.pixels() * p_.of_x.channels; }

  template <class Void>
  static auto at(Void* memory, int64_t elements) {
    using Element = std::conditional_t<std::is_const_v<Void>, const E, E>;
    return static_cast<Element*>(memory) + elements;
  }
  E* cell(int64_t k) const { return at(p_.c_seq, k % p_.memories * state_); }

  // done(weight, the same in rows of so many columns, its channels, its pixels), row by row, for
  // each that there is: in those rows the channels of a pixel are side by side, and W_hh's are
  // last.
  template <class Done, class Void>
  void each_weight(Done&& done, E* laid_out, int64_t columns, Void* w_ih, Void* w_hh) const {
    const auto each = [&](const ConvWindow& window, Void* weights, E* column) {
      if (!weights) return;
      const int64_t n = window.channels, many = ConvWindow::product(window.kernel);
      auto* own = at(weights, 0);
      for (int64_t row = 0; row < 4 * p_.C; ++row, own += n * many, column += columns) {
        done(own, column, n, many);
      }
    };
    each(p_.of_x, w_ih, laid_out);
    each(p_.of_h, w_hh, laid_out + columns - p_.of_h.columns());
  }
  void lay_out_weights(const void* w_ih, int64_t columns) const {
    const auto lay_out = [&](bool channels_first, const auto& done) {
      each_weight(done, at(p_.w, 0), columns, p_.w_ih_first == channels_first ? w_ih : nullptr,
                  p_.w_hh_first == channels_first ? p_.w_hh : nullptr);
    };
    lay_out(true, [](const E* own, E* column, int64_t n, int64_t many) {
      exchange_sides(own, n, many, column);
    });
    lay_out(false, [](const E* own, E* column, int64_t n, int64_t many) {
      std::memcpy(column, own, size_t(n * many) * sizeof(E));
    });
  }

  // What the kernels see at a step, of x and of the h before it.
  void take_step(int64_t t, const void* h, E* to) const {
    const E* x = at(p_.x, t * image_size());
    if (p_.x_first) {
      channels_last(p_.of_x, p_.N, x, true, at(p_.image, 0));
      x = at(p_.image, 0);
    }
    take(p_.of_x, x, to, [&](int64_t b) { return p_.skips(t, b); });
    take(p_.of_h, at(h, 0), to + p_.of_x.columns(),
         [&](int64_t b) { return p_.skips(t, b) || p_.resets(t, b); });
  }

  // What the kernel sees of N images, in a part of the columns; of one that is_zero(b) zeros.
  template <class IsZero>
  void take(const ConvWindow& window, const E* images, E* to, IsZero&& is_zero) const {
    const int64_t n = window.channels, columns = p_.all_columns();
    for (int64_t b = 0; b < p_.N; ++b) {
      const bool zero = is_zero(b);
      window.each([&](int64_t place, int64_t at, int64_t pixel, int64_t count) {
        E* const own = to + place * columns + at * n;
        const size_t bytes = size_t(count * n) * sizeof(E);
        if (zero || pixel < 0) {
          std::memset(own, 0, bytes);
        } else {
          std::memcpy(own, images + pixel * n, bytes);
        }
      });
      images += window.pixels() * n;
      to += window.places() * columns;
    }
  }

  // The inverse, for gradients: the columns from one on, of so many. of(b): what becomes of one.
  template <class Of>
  void put_back(const ConvWindow& window, int64_t column, int64_t columns, E* images,
                Of&& of) const {
    const int64_t n = window.channels, size = window.pixels() * n;
    const E* from = at(static_cast<const void*>(p_.columns), column);
    for (int64_t b = 0; b < p_.N; ++b, images += size, from += window.places() * columns) {
      const Image becomes = of(b);
      if (becomes == Image::kStays) continue;
      std::memset(images, 0, size_t(size) * sizeof(E));
      if (becomes == Image::kZero) continue;
      window.each([&](int64_t place, int64_t at, int64_t pixel, int64_t count) {
        if (pixel >= 0) add(images + pixel * n, from + place * columns + at * n, count * n);
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
