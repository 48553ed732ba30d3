// The layer of cpu/conv.h, called by cpu/conv.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bind_cpu.h"
#include "cpu/conv.h"

namespace lstm_ext {

// run(steps, memory) with the scratch of a call, after that of the kernels, bytes(steps) of it.
template <class E, class Bytes, class Run>
auto with_scratch(ConvLayer p, ConvCall call, const pybind11::function& workspace,
                  const Bytes& bytes, const Run& run) {
  ConvScratch size;
  ConvLayer sized = p;  // where something is, wherever: what a kernel takes depends on that
  ConvSteps<E>::take_scratch(sized, size, call);
  const pybind11::object tensor = workspace(size.taken() + bytes(ConvSteps<E>(sized)));
  void* const memory = memory_of(tensor);
  const pybind11::gil_scoped_release release;
  ConvScratch scratch(memory);
  ConvSteps<E>::take_scratch(p, scratch, call);
  return run(ConvSteps<E>(p), static_cast<char*>(memory) + scratch.taken());
}

inline void conv_forward(const ConvLayer& p, const pybind11::function& workspace) {
  const CpuKernels& kernels = cpu_kernels();
  of_dtype(p.dtype, [&](auto element) {
    with_scratch<decltype(element)>(
        p, ConvCall::kForward, workspace,
        [&](const auto& steps) { return steps.forward_bytes(kernels); },
        [&](const auto& steps, void* memory) { steps.forward(kernels, memory); });
  });
}

inline int conv_backward(const ConvLayer& p, const pybind11::function& workspace) {
  const CpuKernels& kernels = cpu_kernels();
  return of_dtype(p.dtype, [&](auto element) {
    return with_scratch<decltype(element)>(
        p, ConvCall::kBackward, workspace,
        [&](const auto& steps) { return steps.backward_bytes(kernels); },
        [&](const auto& steps, void* memory) { return steps.backward(kernels, memory); });
  });
}

inline void conv_weights(const ConvLayer& p, const pybind11::function& workspace) {
  const CpuKernels& kernels = cpu_kernels();
  of_dtype(p.dtype, [&](auto element) {
    with_scratch<decltype(element)>(
        p, ConvCall::kWeights, workspace,
        [&](const auto& steps) { return steps.weights_bytes(kernels); },
        [&](const auto& steps, void* memory) { steps.weights(kernels, memory); });
  });
}

inline CellPlanes cell_planes(int given, int states, int threads, int64_t N, int64_t units) {
  CellPlanes p{};
  p.given = static_cast<Dtype>(given);
  p.states = static_cast<Dtype>(states);
  p.threads = threads;
  p.N = N;
  p.units = units;
  return p;
}

inline void bind_cpu_planes(pybind11::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "cpu_planes_forward",
      [](int given, int states, int threads, int64_t N, int64_t units, Memory a, Memory c0,
         Memory w_ch, Memory gates, Memory c, Memory h_n, Memory c_n) {
        CellPlanes p = cell_planes(given, states, threads, N, units);
        p.a = a.address;
        p.c0 = c0.address;
        p.w_ch = w_ch.address;
        p.gates = gates.address;
        p.c = c.address;
        p.h_n = h_n.address;
        p.c_n = c_n.address;
        const pybind11::gil_scoped_release release;
        cpu_kernels().planes_forward(p);
      },
      "given"_a, "states"_a, "threads"_a, "N"_a, "units"_a, "a"_a, "c0"_a, "w_ch"_a, "gates"_a,
      "c"_a, "h_n"_a, "c_n"_a, "Cells as CellPlanes has them.");
  m.def(
      "cpu_planes_backward",
      [](int given, int states, int threads, int64_t N, int64_t units, Memory c0, Memory w_ch,
         Memory gates, Memory c, Memory dh, Memory dc, Memory da, Memory dc0, Memory dw_ch) {
        CellPlanes p = cell_planes(given, states, threads, N, units);
        p.c0 = c0.address;
        p.w_ch = w_ch.address;
        p.gates = gates.address;
        p.c = c.address;
        p.dh = dh.address;
        p.dc = dc.address;
        p.da = da.address;
        p.dc0 = dc0.address;
        p.dw_ch = dw_ch.address;
        const pybind11::gil_scoped_release release;
        cpu_kernels().planes_backward(p);
      },
      "given"_a, "states"_a, "threads"_a, "N"_a, "units"_a, "c0"_a, "w_ch"_a, "gates"_a, "c"_a,
      "dh"_a, "dc"_a, "da"_a, "dc0"_a, "dw_ch"_a, "Cells as CellPlanes has them.");
}

inline void bind_cpu_conv(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  using Sizes = ConvWindow::Sizes;
  const auto make_window = [](Sizes size, Sizes output, Sizes kernel, Sizes stride, Sizes before,
                              Sizes dilation, int64_t channels) {
    return ConvWindow{size, output, kernel, stride, before, dilation, channels};
  };
  py::class_<ConvWindow>(m, "ConvWindow", py::module_local())
      .def(py::init(make_window), "size"_a, "output"_a, "kernel"_a, "stride"_a, "before"_a,
           "dilation"_a, "channels"_a);
  const auto make_layer = [](int dtype, int h_dtype, int threads, int64_t T, int64_t N, int64_t C,
                             bool reverse, const ConvWindow& of_x, const ConvWindow& of_h, Memory x,
                             bool x_first, Memory w_ih, bool w_ih_first, Memory w_hh,
                             bool w_hh_first, Memory bias, Memory more_bias, Memory w_ch, Memory on,
                             Memory reset) {
    ConvLayer p{};
    p.dtype = static_cast<Dtype>(dtype);
    p.h_dtype = static_cast<Dtype>(h_dtype);
    p.threads = threads;
    p.T = T;
    p.N = N;
    p.C = C;
    p.reverse = reverse;
    p.of_x = of_x;
    p.of_h = of_h;
    p.x = x.address;
    p.x_first = x_first;
    p.w_ih = w_ih.address;
    p.w_ih_first = w_ih_first;
    p.w_hh = w_hh.address;
    p.w_hh_first = w_hh_first;
    p.bias = bias.address;
    p.more_bias = more_bias.address;
    p.w_ch = w_ch.address;
    p.on = static_cast<const uint8_t*>(on.address);
    p.reset = static_cast<const uint8_t*>(reset.address);
    p.at_once = 1;
    return p;
  };
  py::class_<ConvLayer>(m, "CpuConv", py::module_local())
      .def(py::init(make_layer), "dtype"_a, "h_dtype"_a, "threads"_a, "T"_a, "N"_a, "C"_a,
           "reverse"_a, "of_x"_a, "of_h"_a, "x"_a, "x_first"_a, "w_ih"_a, "w_ih_first"_a, "w_hh"_a,
           "w_hh_first"_a, "bias"_a, "more_bias"_a, "w_ch"_a, "on"_a, "reset"_a)
      .def(
          "forward",
          [](ConvLayer p, Memory h0, bool h0_first, Memory c0, bool c0_first, Memory h_first,
             Memory h_out, Memory c_seq, int64_t memories, Memory gates, Memory h_n, Memory c_n,
             const py::function& workspace) {
            p.h0 = h0.address;
            p.h0_first = h0_first;
            p.c0 = c0.address;
            p.c0_first = c0_first;
            p.h_first = h_first.address;
            p.h_out = h_out.address;
            p.c_seq = c_seq.address;
            p.memories = memories;
            p.gates = gates.address;
            p.h_n = h_n.address;
            p.c_n = c_n.address;
            conv_forward(p, workspace);
          },
          "h0"_a, "h0_first"_a, "c0"_a, "c0_first"_a, "h_first"_a, "h_out"_a, "c_seq"_a,
          "memories"_a, "gates"_a, "h_n"_a, "c_n"_a, "workspace"_a)
      .def(
          "backward",
          [](ConvLayer p, Memory gates, Memory c_seq, Memory dy, bool of_h0, Memory dgates,
             Memory dx, Memory dh, Memory dc, Memory dw_ch, const py::function& workspace) {
            p.gates = gates.address;
            p.c_seq = c_seq.address;
            p.memories = p.T + 1;
            p.dy = dy.address;
            p.of_h0 = of_h0;
            p.dgates = dgates.address;
            p.dx = dx.address;
            p.dh = dh.address;
            p.dc = dc.address;
            p.dw_ch = dw_ch.address;
            return conv_backward(p, workspace);
          },
          "gates"_a, "c_seq"_a, "dy"_a, "of_h0"_a, "dgates"_a, "dx"_a, "dh"_a, "dc"_a, "dw_ch"_a,
          "workspace"_a)
      .def(
          "weights",
          [](ConvLayer p, Memory h_seq, Memory dgates, int64_t at_once, Memory dw_ih, Memory dw_hh,
             Memory dbias, const py::function& workspace) {
            p.h_seq = h_seq.address;
            p.dgates = dgates.address;
            p.at_once = at_once;
            p.dw_ih = dw_ih.address;
            p.dw_hh = dw_hh.address;
            p.dbias = dbias.address;
            conv_weights(p, workspace);
          },
          "h_seq"_a, "dgates"_a, "at_once"_a, "dw_ih"_a, "dw_hh"_a, "dbias"_a, "workspace"_a);
}

}  // namespace lstm_ext
