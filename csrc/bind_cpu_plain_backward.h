// Backward of a plain layer or cell, straight from what autograd hands to a Function.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "bind_cpu.h"
#include "bind_tensors.h"
#include "cpu/choice.h"

namespace lstm_ext {

inline Steps plain_steps(int64_t T, int64_t B, bool batch_first) {
  return {T, B, T * B, batch_first ? 1 : B, batch_first ? T : 1, nullptr, nullptr, nullptr, false};
}

class PlainBackward {
  using Object = pybind11::object;
  using Handle = pybind11::handle;
  using Sizes = PlainTensors::Sizes;

 public:
  // gradients: of y, unless of a cell, h_n and c_n; None for zero. saved: x, h_0, c_0, W_ih, W_hh,
  // b_ih, b_hh, gates, c_seq and, of several steps, y, as forward took and made them. wanted: for
  // each of the first seven, whether its gradient is. T: steps, 0 for a cell's only one.
  //
  // Returns those gradients, None where not wanted. Or None, if anything is not a tensor of the
  // types, dense, on the CPU, of its size and dtype; if there are more than most_rows rows; or if
  // only gradients of biases are wanted, or bf16 is not multiplied. Some products are torch's: not
  // under autocast.
  static Object run(const PlainTensors& tensors, const pybind11::tuple& gradients,
                    const pybind11::tuple& saved, const pybind11::tuple& wanted, int64_t T,
                    bool batch_first, int threads, int64_t most_rows,
                    const pybind11::function& workspace) {
    PlainBackward in(tensors, saved);
    in.p_.threads = threads;
    for (int k = 0; k < 7; ++k) in.wanted_[k] = wanted[k].ptr() == Py_True;
    const auto read = [&] { return in.read(gradients, T, batch_first, most_rows); };
    if (!PlainTensors::answered(read)) return pybind11::none();
    return in.made(workspace);
  }

 private:
  enum { kX, kH0, kC0, kWih, kWhh, kBih, kBhh, kGates, kCSeq, kY, kCount };

  PlainBackward(const PlainTensors& tensors, const pybind11::tuple& saved)
      : tensors_(tensors), saved_(saved) {}

  bool read(const pybind11::tuple& gradients, int64_t T, bool batch_first, int64_t most_rows) {
    if (saved_.size() != kCount || gradients.size() != size_t(T ? 3 : 2)) return false;
    const Handle x = saved_[kX], h_0 = saved_[kH0];
    if (!(dtype_ = tensors_.dtype_of(x, p_.dtype)) || !tensors_.is_plain(h_0)) return false;
    if (p_.dtype == Dtype::kBFloat16) {
      p_.bf16_products = cpu_kernels().bf16_products && openmp_grants(p_.threads);
      if (!p_.bf16_products) return false;
    }
    acc_ = tensors_.acc_of(dtype_, p_.dtype);
    const Sizes x_size(x), h_size(h_0);
    const bool module = x_size.count == 3;
    if (!(module || x_size.count == 2) || h_size.count != x_size.count) return false;
    const int64_t steps = T ? T : 1, B = h_size.of[module], H = h_size.of[module + 1];
    const int64_t rows = steps * B, I = x_size.of[module + 1];
    if (rows < 1 || rows > most_rows) return false;
    const bool weights = wanted_[kWih] || wanted_[kWhh];
    if ((wanted_[kBih] || wanted_[kBhh]) && !weights) return false;
    p_.steps = plain_steps(steps, B, batch_first);
    p_.H = p_.P = p_.y_stride = p_.dy_stride = H;
    p_.I = I;
    const auto layer_size = [&](int64_t width) {
      return !module ? Sizes{rows, width} : batch_first ? Sizes{B, T, width} : Sizes{T, B, width};
    };
    const Sizes state = module ? Sizes{1, B, H} : Sizes{B, H};
    if (!(x_ = dense(kX, layer_size(I))) || !(h_0_ = dense(kH0, state))) return false;
    if (!(p_.c0 = dense(kC0, state))) return false;
    if (!(w_ih_ = dense(kWih, {4 * H, I})) || !(w_hh_ = dense(kWhh, {4 * H, H}))) return false;
    for (int k : {kBih, kBhh}) {
      if (!saved_[k].is_none() && !dense(k, 4 * H)) return false;
    }
    if (!(p_.gates = dense(kGates, {rows, 4 * H}, acc_))) return false;
    if (!(p_.c_seq = dense(kCSeq, {rows, H}, acc_))) return false;
    p_.h0 = h_0_;
    p_.y = h_0_;  // read only at a step before another
    if (steps > 1 && !(p_.y = dense(kY, layer_size(H)))) return false;
    const auto gradient = [&](int k, const Sizes& size, const void*& memory) {
      const Handle value = gradients[k];
      if (value.is_none()) return true;
      memory = tensors_.dense(value, dtype_, size, gradients_[k]);
      return memory != nullptr;
    };
    return (!T || gradient(0, layer_size(H), p_.dy)) && gradient(T ? 1 : 0, state, p_.dh_n) &&
           gradient(T ? 2 : 1, state, p_.dc_n);
  }

  Object made(const pybind11::function& workspace) {
    const int64_t rows = p_.steps.rows, H = p_.H, I = p_.I;
    const bool one_step = p_.steps.T == 1;
    // Of one step, W_hh was multiplied with h_0 itself: dh_0 is a product over all rows.
    if (!one_step) p_.w_hh = w_hh_;
    const Object dgates = like(kX, {rows, 4 * H});
    const Object h_prev = wanted_[kWhh] && !one_step ? like(kX, {rows, H}) : Object();
    for (int k : {kH0, kC0}) made_[k] = like(k, Sizes(kept_[k]));
    p_.dgates = memory_of(dgates);
    p_.h_prev = h_prev ? memory_of(h_prev) : nullptr;
    p_.dh0 = memory_of(made_[kH0]);
    p_.dc0 = memory_of(made_[kC0]);
    const CpuKernels& kernels = cpu_kernels();
    run_core(kernels.backward, kernels.backward_workspace, p_, workspace);
    const auto by_weights = [&](int k, int weight, const void* w, int64_t width) {
      if (wanted_[k]) made_[k] = times_weights(dgates, k, weight, w, width, workspace);
    };
    by_weights(kX, kWih, w_ih_, I);
    if (one_step) by_weights(kH0, kWhh, w_hh_, H);
    if (wanted_[kWih] || wanted_[kWhh]) of_weights(dgates, h_prev ? h_prev : kept_[kH0], workspace);
    if (wanted_[kBhh]) {
      // Two tensors, as for two parameters: a caller may change one in place.
      made_[kBhh] = wanted_[kBih] ? PlainTensors::call(made_[kBih], PlainTensors::names().clone)
                                  : made_[kBih];
    }
    pybind11::tuple result(7);
    for (int k = 0; k < 7; ++k) result[k] = wanted_[k] ? made_[k] : Object(pybind11::none());
    return result;
  }

  // dgates w for w (4H, N), which kept_[weight] holds; of the sizes of kept_[k].
  Object times_weights(const Object& dgates, int k, int weight, const void* w, int64_t N,
                       const pybind11::function& workspace) const {
    const Sizes sizes(kept_[k]);
    Matmul m{};
    m.M = p_.steps.rows;
    m.N = N;
    m.K = 4 * p_.H;
    if (!core_multiplies(p_.bf16_products, m.M, m.N, m.K, false)) {
      const Object product = PlainTensors::call(dgates, PlainTensors::names().mm, kept_[weight]);
      return PlainTensors::make(product, PlainTensors::names().view, sizes);
    }
    const Object out = like(k, sizes);
    m.w = w;
    m.out = memory_of(out);
    multiply(m, workspace);
    return out;
  }

  // dW_ih, dW_hh and db, in one pass over dgates. h_prev: rows of H.
  void of_weights(const Object& dgates, const Object& h_prev, const pybind11::function& workspace) {
    const auto& names = PlainTensors::names();
    const int64_t rows = p_.steps.rows, H = p_.H, I = p_.I;
    const bool wanted_b = wanted_[kBih] || wanted_[kBhh];
    Matmul m{};
    m.M = 4 * H;
    m.K = rows;
    m.a_transposed = true;
    Object sums;
    if (core_multiplies(p_.bf16_products, m.M, wanted_[kWih] * I + wanted_[kWhh] * H, rows, true)) {
      const auto side = [&](int k, int64_t N, const void* w, int64_t& columns, const void*& from,
                            void*& to) {
        made_[k] = like(kX, {4 * H, N});
        columns = N;
        from = w;
        to = memory_of(made_[k]);
      };
      const void* const previous = p_.h_prev ? p_.h_prev : h_0_;
      if (wanted_[kWih]) side(kWih, I, x_, m.N, m.w, m.out);
      if (wanted_[kWih] && wanted_[kWhh]) side(kWhh, H, previous, m.more_N, m.more_w, m.more_out);
      if (!wanted_[kWih]) side(kWhh, H, previous, m.N, m.w, m.out);
      if (wanted_b) {
        sums = PlainTensors::make(kept_[kX], names.new_empty, 4 * H, acc_);
        m.sums = memory_of(sums);
      }
      multiply(m, workspace);
    } else {
      const Object columns = PlainTensors::call(dgates, names.t);
      const auto product = [&](const Object& value, int64_t width) {
        const Object matrix = PlainTensors::make(value, names.view, {rows, width});
        return PlainTensors::call(columns, names.mm, matrix);
      };
      if (wanted_[kWih]) made_[kWih] = product(kept_[kX], I);
      if (wanted_[kWhh]) made_[kWhh] = product(h_prev, H);
      if (wanted_b) sums = PlainTensors::make(dgates, names.sum, 0, acc_);
    }
    if (wanted_b) {
      made_[kBih] = p_.bf16_products ? PlainTensors::call(sums, names.to, dtype_) : sums;
    }
  }

  void multiply(Matmul& m, const pybind11::function& workspace) const {
    m.dtype = p_.dtype;
    m.bf16_products = p_.bf16_products;
    m.threads = p_.threads;
    m.a = p_.dgates;
    m.rounded = true;
    const CpuKernels& kernels = cpu_kernels();
    run_core(kernels.matmul, kernels.matmul_workspace, m, workspace);
  }

  const void* dense(int k, const Sizes& sizes, PyObject* dtype = nullptr) {
    return tensors_.dense(saved_[k], dtype ? dtype : dtype_, sizes, kept_[k]);
  }
  Object like(int k, const Sizes& sizes) const {
    return PlainTensors::make(kept_[k], PlainTensors::names().new_empty, sizes);
  }

  const PlainTensors& tensors_;
  const pybind11::tuple& saved_;
  LstmBackward p_{};
  PyObject* dtype_ = nullptr;
  PyObject* acc_ = nullptr;
  const void *x_ = nullptr, *h_0_ = nullptr, *w_ih_ = nullptr, *w_hh_ = nullptr;
  bool wanted_[7] = {};
  std::array<Object, kCount> kept_;  // what saved_ has, contiguous
  std::array<Object, 3> gradients_;
  std::array<Object, 7> made_;
};

}  // namespace lstm_ext
