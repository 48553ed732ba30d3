// Backward of a plain layer or cell on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include "bind_cpu.h"
#include "bind_plain.h"
#include "cpu/choice.h"

namespace lstm_ext {

class CpuPlainBackward {
  using Object = pybind11::object;
  using Handle = pybind11::handle;
  using Sizes = PlainTensors::Sizes;

 public:
  // Arguments as for PlainSaved::read. Returns the gradients of the inputs, None where not wanted.
  // Or None, for what PlainSaved::read refuses; if there are two directions, or more than most_rows
  // rows; or if only gradients of biases are wanted, or bf16 is not multiplied. Some products are
  // torch's: not under autocast.
  static Object run(const PlainTensors& tensors, const pybind11::tuple& gradients,
                    const pybind11::tuple& saved, const pybind11::tuple& wanted, int64_t T,
                    bool batch_first, int threads, int64_t most_rows,
                    const pybind11::function& workspace) {
    CpuPlainBackward in(tensors);
    in.p_.threads = threads;
    const auto accepts = [&] { return in.accepts(most_rows); };
    const auto read = [&] {
      return in.call_.read(gradients, saved, wanted, T, batch_first, nullptr, false, accepts);
    };
    if (!PlainTensors::answered(read)) return pybind11::none();
    return in.made(workspace);
  }

 private:
  static constexpr int kX = PlainCall::kX, kH0 = PlainCall::kH0, kC0 = PlainCall::kC0,
                       kWih = PlainCall::kWih, kWhh = PlainCall::kWhh, kBih = PlainCall::kBih,
                       kBhh = PlainCall::kBhh;

  explicit CpuPlainBackward(const PlainTensors& tensors) : call_(tensors) {}

  bool accepts(int64_t most_rows) {
    if (call_.directions != 1) return false;
    if (call_.code == Dtype::kBFloat16) {
      p_.bf16_products = cpu_kernels().bf16_products && openmp_grants(p_.threads);
      if (!p_.bf16_products) return false;
    }
    const bool biases = wanted(kBih) || wanted(kBhh);
    return call_.steps.rows <= most_rows && (wanted(kWih) || wanted(kWhh) || !biases);
  }

  Object made(const pybind11::function& workspace) {
    const int64_t rows = call_.steps.rows, H = call_.H, I = call_.I;
    const bool one_step = call_.steps.T == 1;
    p_.dtype = call_.code;
    p_.steps = call_.steps;
    p_.H = p_.P = p_.y_stride = p_.dy_stride = H;
    p_.I = I;
    p_.h0 = call_.memory[kH0];
    p_.c0 = call_.memory[kC0];
    p_.y = one_step ? p_.h0 : call_.y;  // read only at a step before another
    p_.gates = call_.gates;
    p_.c_seq = call_.c_seq;
    p_.dy = call_.dy;
    p_.dh_n = call_.dh_n[0];
    p_.dc_n = call_.dc_n[0];
    // Of one step, W_hh was multiplied with h_0 itself: dh_0 is a product over all rows.
    if (!one_step) p_.w_hh = call_.memory[kWhh];
    const Object dgates = like_x({rows, 4 * H});
    const Object h_prev = wanted(kWhh) && !one_step ? like_x({rows, H}) : Object();
    for (int k : {kH0, kC0}) made_[k] = call_.like(k);
    p_.dgates = memory_of(dgates);
    p_.h_prev = h_prev ? memory_of(h_prev) : nullptr;
    p_.dh0 = memory_of(made_[kH0]);
    p_.dc0 = memory_of(made_[kC0]);
    const LayerKernels<LstmBackward>& kernels = cpu_kernels().backward;
    run_core(kernels.run, kernels.workspace, p_, workspace);
    const auto by_weights = [&](int k, int weight, int64_t width) {
      if (wanted(k)) made_[k] = times_weights(dgates, k, weight, width, workspace);
    };
    by_weights(kX, kWih, I);
    if (one_step) by_weights(kH0, kWhh, H);
    if (wanted(kWih) || wanted(kWhh))
      of_weights(dgates, h_prev ? h_prev : call_.kept[kH0], workspace);
    if (wanted(kBhh)) {
      // Two tensors, as for two parameters: a caller may change one in place.
      made_[kBhh] =
          wanted(kBih) ? PlainTensors::call(made_[kBih], PlainTensors::names().clone) : made_[kBih];
    }
    return call_.all(made_);
  }

  bool wanted(int k) const { return call_.wanted[k]; }

  // dgates w for w (4H, N), the input `weight`; of the size of the input k.
  Object times_weights(const Object& dgates, int k, int weight, int64_t N,
                       const pybind11::function& workspace) const {
    Matmul m{};
    m.M = call_.steps.rows;
    m.N = N;
    m.K = 4 * call_.H;
    if (!core_multiplies(p_.bf16_products, m.M, m.N, m.K, false)) {
      const Object product =
          PlainTensors::call(dgates, PlainTensors::names().mm, call_.kept[weight]);
      return PlainTensors::make(product, PlainTensors::names().view, call_.input_size(k));
    }
    const Object out = call_.like(k);
    m.w = call_.memory[weight];
    m.out = memory_of(out);
    multiply(m, workspace);
    return out;
  }

  // dW_ih, dW_hh and db, in one pass over dgates. h_prev: rows of H.
  void of_weights(const Object& dgates, const Object& h_prev, const pybind11::function& workspace) {
    const auto& names = PlainTensors::names();
    const int64_t rows = call_.steps.rows, H = call_.H, I = call_.I;
    const bool wanted_b = wanted(kBih) || wanted(kBhh);
    Matmul m{};
    m.M = 4 * H;
    m.K = rows;
    m.a_transposed = true;
    Object sums;
    if (core_multiplies(p_.bf16_products, m.M, wanted(kWih) * I + wanted(kWhh) * H, rows, true)) {
      const auto side = [&](int k, int64_t N, const void* w, int64_t& columns, const void*& from,
                            void*& to) {
        made_[k] = like_x({4 * H, N});
        columns = N;
        from = w;
        to = memory_of(made_[k]);
      };
      const void* const previous = p_.h_prev ? p_.h_prev : p_.h0;
      if (wanted(kWih)) side(kWih, I, call_.memory[kX], m.N, m.w, m.out);
      if (wanted(kWih) && wanted(kWhh)) side(kWhh, H, previous, m.more_N, m.more_w, m.more_out);
      if (!wanted(kWih)) side(kWhh, H, previous, m.N, m.w, m.out);
      if (wanted_b) {
        sums = PlainCall::empty(call_.kept[kX], 4 * H, call_.acc);
        m.sums = memory_of(sums);
      }
      multiply(m, workspace);
    } else {
      const Object columns = PlainTensors::call(dgates, names.t);
      const auto product = [&](const Object& value, int64_t width) {
        const Object matrix = PlainTensors::make(value, names.view, {rows, width});
        return PlainTensors::call(columns, names.mm, matrix);
      };
      if (wanted(kWih)) made_[kWih] = product(call_.kept[kX], I);
      if (wanted(kWhh)) made_[kWhh] = product(h_prev, H);
      if (wanted_b) sums = PlainTensors::make(dgates, names.sum, 0, call_.acc);
    }
    if (wanted_b) {
      made_[kBih] = p_.bf16_products ? PlainTensors::call(sums, names.to, call_.dtype) : sums;
    }
  }

  void multiply(Matmul& m, const pybind11::function& workspace) const {
    m.dtype = call_.code;
    m.bf16_products = p_.bf16_products;
    m.threads = p_.threads;
    m.a = p_.dgates;
    m.rounded = true;
    const CpuKernels& kernels = cpu_kernels();
    run_core(kernels.matmul, kernels.matmul_workspace, m, workspace);
  }

  Object like_x(const Sizes& sizes) const { return PlainCall::empty(call_.kept[kX], sizes); }

  PlainSaved call_;
  LstmBackward p_{};
  PlainCall::Objects made_;
};

}  // namespace lstm_ext
