// The Python face of the native core. CpuForward, CpuBackward and the like take addresses of
// tensors that the engines' Python has checked and keeps alive, contiguous but for dy. The short
// way (bind_plain.h) takes Python's own objects and checks them itself.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "bind_cpu.h"
#include "bind_cpu_conv.h"
#include "bind_cpu_conv_cell.h"
#include "bind_cpu_plain.h"
#include "bind_memory.h"
#include "bind_steps.h"
#include "bind_surroundings.h"
#include "bind_variants.h"
#include "build_info.h"
#include "cpu/choice.h"
#include "packed.h"
#include "params.h"
#ifdef LSTM_EXT_WITH_CUDA
#include "cuda/bindings.h"
#include "cuda/device_info.h"
#include "cuda/plan.h"
#include "cuda/vendor.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

py::dict build_info_dict() {
  const lstm_ext::BuildInfo info = lstm_ext::build_info();
  return py::dict("version"_a = info.version, "compiler"_a = info.compiler, "flags"_a = info.flags,
                  "architecture"_a = info.architecture, "openmp"_a = info.openmp,
                  "cuda"_a = info.cuda, "cuda_version"_a = info.cuda_version,
                  "cuda_archs"_a = info.cuda_archs, "cuda_reason"_a = info.cuda_reason);
}

py::dict cpu_features_dict() {
  const lstm_ext::CpuFeatures cpu = lstm_ext::cpu_features();
  return py::dict("avx2"_a = cpu.avx2, "fma"_a = cpu.fma, "f16c"_a = cpu.f16c,
                  "avx512f"_a = cpu.avx512f, "avx512bw"_a = cpu.avx512bw,
                  "avx512dq"_a = cpu.avx512dq, "avx512vl"_a = cpu.avx512vl,
                  "avx512cd"_a = cpu.avx512cd, "avx512_vnni"_a = cpu.avx512_vnni,
                  "avx512_bf16"_a = cpu.avx512_bf16, "amx_tile"_a = cpu.amx_tile,
                  "neon_dot"_a = cpu.neon_dot, "neon_bf16"_a = cpu.neon_bf16, "sve"_a = cpu.sve);
}

py::list cpu_isas() {
  py::list names;
  for (const auto* k = lstm_ext::runnable_cpu_kernels(); *k; ++k) names.append((*k)->name);
  return names;
}

using lstm_ext::checked_cpu_kernels;
using lstm_ext::LstmBackward;
using lstm_ext::LstmForward;
using lstm_ext::Memory;
using lstm_ext::run_core;
using lstm_ext::run_directions;

LstmForward cpu_forward_call(int dtype, bool bf16_products, int threads, bool pack_input,
                             const lstm_ext::Steps& steps, int64_t H, int64_t P, int64_t I,
                             Memory gx, Memory x, Memory w_ih, Memory b_ih, Memory b_hh,
                             Memory w_hh, Memory w_hr, Memory h0, Memory c0,
                             const lstm_ext::Variants& variants, Memory gates, Memory c_seq,
                             Memory norm, Memory norm_r, Memory y, int64_t y_stride, Memory h_n,
                             Memory c_n) {
  return {static_cast<lstm_ext::Dtype>(dtype),
          bf16_products,
          threads,
          pack_input,
          steps,
          H,
          P,
          I,
          gx.address,
          x.address,
          w_ih.address,
          b_ih.address,
          b_hh.address,
          w_hh.address,
          w_hr.address,
          h0.address,
          c0.address,
          variants,
          gates.address,
          c_seq.address,
          norm.address,
          norm_r.address,
          y.address,
          y_stride,
          h_n.address,
          c_n.address,
          nullptr,
          {},
          {}};
}

LstmBackward cpu_backward_call(int dtype, bool bf16_products, int threads,
                               const lstm_ext::Steps& steps, int64_t H, int64_t P,
                               const lstm_ext::Variants& variants, Memory w_hh, Memory w_hr,
                               Memory h0, Memory c0, Memory y, int64_t y_stride, Memory gates,
                               Memory c_seq, Memory norm, Memory norm_r, Memory dy,
                               int64_t dy_stride, Memory dh_n, Memory dc_n, Memory dcells,
                               Memory dgates, Memory dproduct, Memory h_prev, Memory dr,
                               Memory cell_out, Memory dpeephole, Memory dnorm, Memory dh0,
                               Memory dc0, Memory x, Memory w_ih, int64_t I, Memory dx,
                               Memory dw_ih, Memory dw_hh, Memory db) {
  return {static_cast<lstm_ext::Dtype>(dtype),
          bf16_products,
          threads,
          steps,
          H,
          P,
          variants,
          w_hh.address,
          w_hr.address,
          h0.address,
          c0.address,
          y.address,
          y_stride,
          gates.address,
          c_seq.address,
          norm.address,
          norm_r.address,
          dy.address,
          dy_stride,
          dh_n.address,
          dc_n.address,
          dcells.address,
          x.address,
          w_ih.address,
          I,
          dgates.address,
          dproduct.address,
          h_prev.address,
          dr.address,
          cell_out.address,
          dpeephole.address,
          dnorm.address,
          dh0.address,
          dc0.address,
          nullptr,
          nullptr,
          dx.address,
          dw_ih.address,
          dw_hh.address,
          db.address,
          nullptr,
          {}};
}

// The layer: forward or backward.
template <class P>
auto cpu_runner(lstm_ext::LayerKernels<P> lstm_ext::CpuKernels::* layer) {
  return [layer](const P& first, const P* second, const py::function& workspace) {
    const bool bf16_products = first.bf16_products || (second && second->bf16_products);
    run_directions(checked_cpu_kernels(bf16_products).*layer, first, second, workspace);
  };
}

void cpu_matmul(int dtype, bool bf16_products, int threads, int64_t M, int64_t N, int64_t more_N,
                int64_t K, bool a_transposed, Memory a, Memory w, Memory more_w, bool rounded,
                Memory out, Memory more_out, Memory sums, const py::function& workspace) {
  const lstm_ext::CpuKernels& kernels = checked_cpu_kernels(bf16_products);
  run_core(kernels.matmul, kernels.matmul_workspace,
           {static_cast<lstm_ext::Dtype>(dtype), bf16_products, threads, M, N, more_N, K,
            a_transposed, a.address, w.address, more_w.address, rounded, out.address,
            more_out.address, sums.address, nullptr},
           workspace);
}

#ifdef LSTM_EXT_WITH_CUDA
py::dict cuda_report() {
  const lstm_ext::CudaRuntimeInfo runtime = lstm_ext::cuda_runtime_info();
  py::list devices;
  for (int index = 0; index < runtime.device_count; ++index) {
    const lstm_ext::CudaDeviceInfo device = lstm_ext::cuda_device_info(index);
    devices.append(py::dict(
        "name"_a = device.name, "major"_a = device.major, "minor"_a = device.minor,
        "sm_count"_a = device.sm_count, "shared_memory_optin"_a = device.shared_memory_optin,
        "l2_bytes"_a = device.l2_bytes, "memory_bytes"_a = device.memory_bytes,
        "binary_version"_a = device.binary_version, "ptx_version"_a = device.ptx_version,
        "error"_a = device.error, "error_text"_a = device.error_text));
  }
  return py::dict("runtime_version"_a = runtime.runtime_version,
                  "driver_version"_a = runtime.driver_version, "error"_a = runtime.error,
                  "error_text"_a = runtime.error_text, "devices"_a = devices);
}

lstm_ext::CudaProperties cuda_properties(int index, bool untimed) {
  const lstm_ext::CudaDeviceInfo device = lstm_ext::cuda_device_info(index);
  if (device.error)
    throw std::runtime_error("CUDA device " + std::to_string(index) +
                             " cannot be used: " + device.error_text);
  lstm_ext::CudaProperties properties = {device.major,
                                         device.minor,
                                         device.sm_count,
                                         int64_t(device.shared_memory_optin),
                                         int64_t(device.l2_bytes),
                                         {},
                                         lstm_ext::vendor_version() != 0,
                                         untimed};
  std::copy(std::begin(device.clusters), std::end(device.clusters), properties.clusters.begin());
  return properties;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of lstm_ext, for its own modules only.";
  m.def("build_info", &build_info_dict, "What this binary was built with.");
  m.def("cpu_features", &cpu_features_dict, "Instruction sets usable on this processor.");
  m.def("cpu_isas", &cpu_isas, "Names of the CPU kernel sets that run here, best first.");
  m.def("cpu_isa", [] { return lstm_ext::cpu_kernels().name; }, "The CPU kernel set in use.");
  m.def("select_cpu_isa", &lstm_ext::select_cpu_kernels, "name"_a,
        "Chooses the CPU kernel set; false, and nothing changes, if it does not run here.");
  m.def(
      "cpu_bf16_products", [] { return lstm_ext::cpu_kernels().bf16_products; },
      "Whether the CPU kernel set in use multiplies bf16.");
  m.def("openmp_grants", &lstm_ext::openmp_grants, "threads"_a,
        "Whether OpenMP gives a team that many threads.");
  m.def(
      "is_packed",
      [](std::uintptr_t sizes, int64_t T, int64_t rows) {
        return lstm_ext::is_packed(reinterpret_cast<const int64_t*>(sizes), T, rows);
      },
      "sizes"_a, "T"_a, "rows"_a, "As in packed.h.");
  m.def(
      "packed_rows",
      [](std::uintptr_t sizes, int64_t T, std::uintptr_t table) {
        auto* const offsets = reinterpret_cast<int64_t*>(table);
        lstm_ext::packed_rows(reinterpret_cast<const int64_t*>(sizes), T, offsets, offsets + T);
      },
      "sizes"_a, "T"_a, "table"_a, "As in packed.h; the lengths lie after the offsets.");
  lstm_ext::bind_steps(m);
  lstm_ext::bind_variants(m);
  lstm_ext::bind_surroundings(m);
  lstm_ext::bind_cpu_plain(m);
  lstm_ext::bind_cpu_conv(m);
  lstm_ext::bind_cpu_planes(m);
  lstm_ext::bind_cpu_conv_cell(m);
  m.def(
      "address",
      [](lstm_ext::Memory tensor) { return reinterpret_cast<uintptr_t>(tensor.address); },
      "tensor"_a, "Of a tensor's memory; 0 for None. RuntimeError for elements without memory.");
  m.def("cpu_multiplies", &lstm_ext::core_multiplies, "bf16_products"_a, "M"_a, "N"_a, "K"_a,
        "a_transposed"_a, "Whether cpu_matmul is to be used, or torch's product.");
  m.def("cpu_dh0_is_a_product", &lstm_ext::dh0_is_a_product, "weights"_a, "projected"_a,
        "Whether, of a single step, cpu_backward gets no W_hh.");
  // dtype codes: enum Dtype in params.h, where every argument is described. Positional as a rule:
  // thirty keywords take 2 us. workspace(bytes) returns a tensor to work in.
  py::class_<LstmForward>(m, "CpuForward", py::module_local(), "One direction's forward.")
      .def(py::init(&cpu_forward_call), "dtype"_a, "bf16_products"_a, "threads"_a, "pack_input"_a,
           "steps"_a, "H"_a, "P"_a, "I"_a, "gx"_a, "x"_a, "w_ih"_a, "b_ih"_a, "b_hh"_a, "w_hh"_a,
           "w_hr"_a, "h0"_a, "c0"_a, "variants"_a, "gates"_a, "c_seq"_a, "norm"_a, "norm_r"_a,
           "y"_a, "y_stride"_a, "h_n"_a, "c_n"_a)
      .def(
          "side_by_side",
          [](const LstmForward& p) {
            return checked_cpu_kernels(p.bf16_products).forward.side_by_side(p);
          },
          "Whether it and another direction take less time at once.")
      .def(
          "make_tangents",
          [](LstmForward& p, Memory gates, Memory c_seq, Memory c0, Memory gx_after,
             Memory gx_first, Memory h_more, Memory cell_out) {
            p.tangent_of = {gates.address,    c_seq.address,  c0.address,      gx_after.address,
                            gx_first.address, h_more.address, cell_out.address};
          },
          "gates"_a, "c_seq"_a, "c0"_a, "gx_after"_a, "gx_first"_a, "h_more"_a, "cell_out"_a,
          "As in TangentOf.")
      .def(
          "quantize",
          [](LstmForward& p, Memory ih_scale, Memory hh_scale, Memory hr_scale, int row_bits) {
            if (p.dtype == lstm_ext::Dtype::kFloat64 || (row_bits != 8 && row_bits != 16)) {
              throw std::invalid_argument(
                  "weights of 8 bits: not in float64; rows of 8 or 16 bits");
            }
            p.quantized = {static_cast<const float*>(ih_scale.address),
                           static_cast<const float*>(hh_scale.address),
                           static_cast<const float*>(hr_scale.address), row_bits,
                           lstm_ext::cpu_kernels().byte_products};
          },
          "ih_scale"_a, "hh_scale"_a, "hr_scale"_a, "row_bits"_a, "As in QuantizedWeights.");
  py::class_<LstmBackward>(m, "CpuBackward", py::module_local(), "One direction's backward.")
      .def(py::init(&cpu_backward_call), "dtype"_a, "bf16_products"_a, "threads"_a, "steps"_a,
           "H"_a, "P"_a, "variants"_a, "w_hh"_a, "w_hr"_a, "h0"_a, "c0"_a, "y"_a, "y_stride"_a,
           "gates"_a, "c_seq"_a, "norm"_a, "norm_r"_a, "dy"_a, "dy_stride"_a, "dh_n"_a, "dc_n"_a,
           "dcells"_a, "dgates"_a, "dproduct"_a, "h_prev"_a, "dr"_a, "cell_out"_a, "dpeephole"_a,
           "dnorm"_a, "dh0"_a, "dc0"_a, "x"_a = py::none(), "w_ih"_a = py::none(), "I"_a = 0,
           "dx"_a = py::none(), "dw_ih"_a = py::none(), "dw_hh"_a = py::none(), "db"_a = py::none())
      .def(
          "side_by_side",
          [](const LstmBackward& p) {
            return checked_cpu_kernels(p.bf16_products).backward.side_by_side(p);
          },
          "Whether it and another direction take less time at once.")
      .def(
          "keep_gradients",
          [](LstmBackward& p, Memory dout_seq, Memory dc_seq) {
            p.dout_seq = dout_seq.address;
            p.dc_seq = dc_seq.address;
          },
          "dout_seq"_a, "dc_seq"_a, "As in LstmBackward.")
      .def(
          "make_tangents",
          [](LstmBackward& p, Memory gates, Memory c_seq, Memory c0, Memory dout, Memory dc,
             Memory dh_more, Memory dout_more) {
            p.tangents = {gates.address, c_seq.address,   c0.address,       dout.address,
                          dc.address,    dh_more.address, dout_more.address};
          },
          "gates"_a, "c_seq"_a, "c0"_a, "dout"_a, "dc"_a, "dh_more"_a, "dout_more"_a,
          "As in Tangents.");
  m.def("cpu_forward", cpu_runner(&lstm_ext::CpuKernels::forward), "first"_a, "second"_a,
        "workspace"_a, "Runs one direction, or both of a layer.");
  m.def("cpu_backward", cpu_runner(&lstm_ext::CpuKernels::backward), "first"_a, "second"_a,
        "workspace"_a, "Runs one direction, or both of a layer.");
  m.def("cpu_matmul", &cpu_matmul, "dtype"_a, "bf16_products"_a, "threads"_a, "M"_a, "N"_a,
        "more_N"_a, "K"_a, "a_transposed"_a, "a"_a, "w"_a, "more_w"_a, "rounded"_a, "out"_a,
        "more_out"_a, "sums"_a, "workspace"_a);
#ifdef LSTM_EXT_WITH_CUDA
  m.def("cuda_report", &cuda_report, "CUDA runtime, driver and devices; never raises.");
  m.def("cuda_properties", &cuda_properties, "device"_a, "untimed"_a = false,
        "What the plan asks of a device.");
  lstm_ext::bind_cuda(m);
#endif
}
