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
  // Arguments as for PlainSaved::read. Returns the gradients of the inputs, None where not wanted,
  // and last, if with_dgates, those of the gates before activation (rows, 4H), which for a step the
  // caller then multiplies with x and h_0. Or None, for what PlainSaved::read refuses; if there are
  // two directions, or more than most_rows rows; if only gradients of biases are wanted; or if bf16
  // is not multiplied, or projected to an odd number. Some products are torch's: not under
  // autocast.
  static Object run(const PlainTensors& tensors, const pybind11::tuple& gradients,
                    const pybind11::tuple& saved, const pybind11::tuple& wanted, int64_t T,
                    bool batch_first, bool with_dgates, int threads, int64_t most_rows,
                    const pybind11::function& workspace) {
    CpuPlainBackward in(tensors);
    in.p_.threads = threads;
    const auto accepts = [&] { return in.accepts(most_rows); };
    const auto read = [&] {
      return in.call_.read(gradients, saved, wanted, T, batch_first, nullptr, false, accepts);
    };
    if (!PlainTensors::answered(read)) return pybind11::none();
    return in.made(with_dgates, workspace);
  }

 private:
  static constexpr int kX = PlainCall::kX, kH0 = PlainCall::kH0, kC0 = PlainCall::kC0,
                       kWih = PlainCall::kWih, kWhh = PlainCall::kWhh, kBih = PlainCall::kBih,
                       kBhh = PlainCall::kBhh, kWhr = PlainCall::kWhr;

  explicit CpuPlainBackward(const PlainTensors& tensors) : call_(tensors) {}

  bool accepts(int64_t most_rows) {
    if (call_.directions != 1) return false;
    if (call_.code == Dtype::kBFloat16) {
      p_.bf16_products = cpu_kernels().bf16_products && openmp_grants(p_.threads);
      // An odd number of rows would be padded.
      if (!p_.bf16_products || (call_.projected && call_.P % 2)) return false;
    }
    const bool biases = wanted(kBih) || wanted(kBhh);
    return call_.steps.rows <= most_rows && (wanted(kWih) || wanted(kWhh) || !biases);
  }

  Object made(bool with_dgates, const pybind11::function& workspace) {
    const int64_t rows = call_.steps.rows, H = call_.H, P = call_.P;
    const bool one_step = call_.steps.T == 1;
    p_.dtype = call_.code;
    p_.steps = call_.steps;
    p_.H = H;
    p_.P = p_.y_stride = p_.dy_stride = P;
    p_.I = call_.I;
    p_.w_hr = call_.memory[kWhr];
    p_.h0 = call_.memory[kH0];
    p_.c0 = call_.memory[kC0];
    p_.y = one_step ? p_.h0 : call_.y;  // read only at a step before another
    p_.gates = call_.gates;
    p_.c_seq = call_.c_seq;
    p_.dy = call_.dy;
    p_.dh_n = call_.dh_n[0];
    p_.dc_n = call_.dc_n[0];
    // Of one step, W_hh was multiplied with h_0 itself, and dh_0 can be a product over all rows.
    const bool by_product = one_step && dh0_is_a_product(4 * H * P, call_.projected);
    if (!by_product) p_.w_hh = call_.memory[kWhh];
    const Object dgates = like_x({rows, 4 * H});
    const auto rows_if = [&](bool is_needed, int64_t width, void*& memory) {
      const Object made = is_needed ? like_x({rows, width}) : Object();
      memory = made ? memory_of(made) : nullptr;
      return made;
    };
    const Object h_prev = rows_if(wanted(kWhh) && !one_step, P, p_.h_prev);
    const Object dr = rows_if(call_.projected, P, p_.dr);
    const Object cell_out = rows_if(wanted(kWhr), H, p_.cell_out);
    for (int k : {kH0, kC0}) made_[k] = call_.like(k);
    p_.dgates = memory_of(dgates);
    p_.dh0 = memory_of(made_[kH0]);
    p_.dc0 = memory_of(made_[kC0]);
    const LayerKernels<LstmBackward>& kernels = cpu_kernels().backward;
    run_core(kernels.run, kernels.workspace, p_, workspace);
    const auto by_weights = [&](int k, int weight, int64_t width) {
      if (wanted(k)) made_[k] = times_weights(dgates, k, weight, width, workspace);
    };
    by_weights(kX, kWih, call_.I);
    if (by_product) by_weights(kH0, kWhh, P);
    if (wanted(kWih) || wanted(kWhh))
      of_weights(dgates, h_prev ? h_prev : call_.kept[kH0], workspace);
    if (wanted(kWhr)) made_[kWhr] = of_projection(dr, cell_out, workspace);
    if (wanted(kBhh)) {
      // Two tensors, as for two parameters: a caller may change one in place.
      made_[kBhh] =
          wanted(kBih) ? PlainTensors::call(made_[kBih], PlainTensors::names().clone) : made_[kBih];
    }
    return call_.all(made_, with_dgates ? dgates : Object());
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
    multiply(m, p_.dgates, workspace);
    return out;
  }

  // dW_hr.
  Object of_projection(const Object& dr, const Object& cell_out,
                       const pybind11::function& workspace) const {
    Matmul m{};
    m.M = call_.P;
    m.N = call_.H;
    m.K = call_.steps.rows;
    m.a_transposed = true;
    if (!core_multiplies(p_.bf16_products, m.M, m.N, m.K, true)) {
      const Object columns = PlainTensors::call(dr, PlainTensors::names().t);
      return PlainTensors::call(columns, PlainTensors::names().mm, cell_out);
    }
    const Object out = like_x({m.M, m.N});
    m.w = p_.cell_out;
    m.out = memory_of(out);
    multiply(m, p_.dr, workspace);
    return out;
  }

  // dW_ih, dW_hh and db, in one pass over dgates. h_prev: rows of P.
  void of_weights(const Object& dgates, const Object& h_prev, const pybind11::function& workspace) {
    const auto& names = PlainTensors::names();
    const int64_t rows = call_.steps.rows, H = call_.H, P = call_.P, I = call_.I;
    const bool wanted_b = wanted(kBih) || wanted(kBhh);
    Matmul m{};
    m.M = 4 * H;
    m.K = rows;
    m.a_transposed = true;
    Object sums;
    if (core_multiplies(p_.bf16_products, m.M, wanted(kWih) * I + wanted(kWhh) * P, rows, true)) {
      const auto side = [&](int k, int64_t N, const void* w, int64_t& columns, const void*& from,
                            void*& to) {
        made_[k] = like_x({4 * H, N});
        columns = N;
        from = w;
        to = memory_of(made_[k]);
      };
      const void* const previous = p_.h_prev ? p_.h_prev : p_.h0;
      if (wanted(kWih)) side(kWih, I, call_.memory[kX], m.N, m.w, m.out);
      if (wanted(kWih) && wanted(kWhh)) side(kWhh, P, previous, m.more_N, m.more_w, m.more_out);
      if (!wanted(kWih)) side(kWhh, P, previous, m.N, m.w, m.out);
      if (wanted_b) {
        sums = PlainCall::empty(call_.kept[kX], 4 * H, call_.acc);
        m.sums = memory_of(sums);
      }
      multiply(m, p_.dgates, workspace);
    } else {
      const Object columns = PlainTensors::call(dgates, names.t);
      const auto product = [&](const Object& value, int64_t width) {
        const Object matrix = PlainTensors::make(value, names.view, {rows, width});
        return PlainTensors::call(columns, names.mm, matrix);
      };
      if (wanted(kWih)) made_[kWih] = product(call_.kept[kX], I);
      if (wanted(kWhh)) made_[kWhh] = product(h_prev, P);
      if (wanted_b) sums = PlainTensors::make(dgates, names.sum, 0, call_.acc);
    }
    if (wanted_b) {
      made_[kBih] = p_.bf16_products ? PlainTensors::call(sums, names.to, call_.dtype) : sums;
    }
  }

  void multiply(Matmul& m, const void* a, const pybind11::function& workspace) const {
    m.dtype = call_.code;
    m.bf16_products = p_.bf16_products;
    m.threads = p_.threads;
    m.a = a;
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
