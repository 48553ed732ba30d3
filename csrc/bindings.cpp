// The Python face of the native core: declarations only, no logic. Addresses are those of
// tensors, contiguous but for dy, that lstm_ext.ops has checked and keeps alive; 0 is null.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "bind_steps.h"
#include "bind_variants.h"
#include "build_info.h"
#include "cpu/kernels.h"
#include "params.h"
#ifdef LSTM_EXT_WITH_CUDA
#include "cuda/bindings.h"
#include "cuda/device_info.h"
#include "cuda/plan.h"
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
  return py::dict(
      "avx2"_a = cpu.avx2, "fma"_a = cpu.fma, "f16c"_a = cpu.f16c, "avx512f"_a = cpu.avx512f,
      "avx512bw"_a = cpu.avx512bw, "avx512dq"_a = cpu.avx512dq, "avx512vl"_a = cpu.avx512vl,
      "avx512cd"_a = cpu.avx512cd, "avx512_bf16"_a = cpu.avx512_bf16, "amx_tile"_a = cpu.amx_tile);
}

py::list cpu_isas() {
  py::list names;
  for (const auto* k = lstm_ext::runnable_cpu_kernels(); *k; ++k) names.append((*k)->name);
  return names;
}

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

const lstm_ext::CpuKernels& cpu_kernels(bool bf16_products) {
  const lstm_ext::CpuKernels& kernels = lstm_ext::cpu_kernels();
  if (bf16_products && !kernels.bf16_products) {
    throw std::invalid_argument(std::string("the CPU kernels ") + kernels.name +
                                " do not multiply bf16");
  }
  return kernels;
}

void cpu_forward(int dtype, bool bf16_products, int threads, const lstm_ext::Steps& steps,
                 int64_t H, int64_t P, int64_t I, Address gx, Address x, Address w_ih, Address b_ih,
                 Address b_hh, Address w_hh, Address w_hr, Address h0, Address c0,
                 const lstm_ext::Variants& variants, Address gates, Address c_seq, Address norm,
                 Address norm_r, Address y, int64_t y_stride, Address h_n, Address c_n,
                 Address workspace) {
  cpu_kernels(bf16_products)
      .forward({static_cast<lstm_ext::Dtype>(dtype),
                bf16_products,
                threads,
                steps,
                H,
                P,
                I,
                pointer(gx),
                pointer(x),
                pointer(w_ih),
                pointer(b_ih),
                pointer(b_hh),
                pointer(w_hh),
                pointer(w_hr),
                pointer(h0),
                pointer(c0),
                variants,
                pointer(gates),
                pointer(c_seq),
                pointer(norm),
                pointer(norm_r),
                pointer(y),
                y_stride,
                pointer(h_n),
                pointer(c_n),
                pointer(workspace)});
}

void cpu_backward(int dtype, bool bf16_products, int threads, const lstm_ext::Steps& steps,
                  int64_t H, int64_t P, const lstm_ext::Variants& variants, Address w_hh,
                  Address w_hr, Address h0, Address c0, Address y, int64_t y_stride, Address gates,
                  Address c_seq, Address norm, Address norm_r, Address dy, int64_t dy_stride,
                  Address dh_n, Address dc_n, Address dcells, Address dgates, Address dproduct,
                  Address h_prev, Address dr, Address cell_out, Address dpeephole, Address dnorm,
                  Address dh0, Address dc0, Address workspace) {
  cpu_kernels(bf16_products)
      .backward({static_cast<lstm_ext::Dtype>(dtype),
                 bf16_products,
                 threads,
                 steps,
                 H,
                 P,
                 variants,
                 pointer(w_hh),
                 pointer(w_hr),
                 pointer(h0),
                 pointer(c0),
                 pointer(y),
                 y_stride,
                 pointer(gates),
                 pointer(c_seq),
                 pointer(norm),
                 pointer(norm_r),
                 pointer(dy),
                 dy_stride,
                 pointer(dh_n),
                 pointer(dc_n),
                 pointer(dcells),
                 pointer(dgates),
                 pointer(dproduct),
                 pointer(h_prev),
                 pointer(dr),
                 pointer(cell_out),
                 pointer(dpeephole),
                 pointer(dnorm),
                 pointer(dh0),
                 pointer(dc0),
                 pointer(workspace)});
}

// What the workspace's size depends on; x, w_hh, w_hr: whether there are such.
template <class Params>
Params sizes(int dtype, bool bf16_products, int threads, const lstm_ext::Steps& steps, int64_t H,
             int64_t P, bool w_hh, bool w_hr, const lstm_ext::Variants& variants) {
  static const char present = 0;
  Params params{};
  params.dtype = static_cast<lstm_ext::Dtype>(dtype);
  params.bf16_products = bf16_products;
  params.threads = threads;
  params.steps = steps;
  params.H = H;
  params.P = P;
  params.w_hh = w_hh ? &present : nullptr;
  params.w_hr = w_hr ? &present : nullptr;
  params.variants = variants;
  return params;
}

int64_t cpu_forward_workspace(int dtype, int threads, const lstm_ext::Steps& steps, int64_t H,
                              int64_t P, int64_t I, bool x, bool w_hh, bool w_hr,
                              const lstm_ext::Variants& variants, bool bf16_products) {
  auto params = sizes<lstm_ext::LstmForward>(dtype, bf16_products, threads, steps, H, P, w_hh, w_hr,
                                             variants);
  static const char present = 0;
  params.I = I;
  params.x = x ? &present : nullptr;
  return cpu_kernels(bf16_products).forward_workspace(params);
}

int64_t cpu_backward_workspace(int dtype, int threads, const lstm_ext::Steps& steps, int64_t H,
                               int64_t P, bool w_hh, bool w_hr, const lstm_ext::Variants& variants,
                               bool bf16_products) {
  return cpu_kernels(bf16_products)
      .backward_workspace(sizes<lstm_ext::LstmBackward>(dtype, bf16_products, threads, steps, H, P,
                                                        w_hh, w_hr, variants));
}

void cpu_matmul(int dtype, bool bf16_products, int threads, int64_t M, int64_t N, int64_t more_N,
                int64_t K, bool a_transposed, Address a, Address w, Address more_w, Address out,
                Address more_out, Address sums, Address workspace) {
  cpu_kernels(bf16_products)
      .matmul({static_cast<lstm_ext::Dtype>(dtype), bf16_products, threads, M, N, more_N, K,
               a_transposed, pointer(a), pointer(w), pointer(more_w), pointer(out),
               pointer(more_out), pointer(sums), pointer(workspace)});
}

int64_t cpu_matmul_workspace(int dtype, bool bf16_products, int threads, int64_t M, int64_t N,
                             int64_t more_N, int64_t K, bool a_transposed) {
  lstm_ext::Matmul params{};
  params.dtype = static_cast<lstm_ext::Dtype>(dtype);
  params.bf16_products = bf16_products;
  params.threads = threads;
  params.M = M;
  params.N = N;
  params.more_N = more_N;
  params.K = K;
  params.a_transposed = a_transposed;
  return cpu_kernels(bf16_products).matmul_workspace(params);
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

lstm_ext::CudaProperties cuda_properties(int index) {
  const lstm_ext::CudaDeviceInfo device = lstm_ext::cuda_device_info(index);
  if (device.error)
    throw std::runtime_error("CUDA device " + std::to_string(index) +
                             " cannot be used: " + device.error_text);
  lstm_ext::CudaProperties properties = {device.major,
                                         device.minor,
                                         device.sm_count,
                                         int64_t(device.shared_memory_optin),
                                         int64_t(device.l2_bytes),
                                         {}};
  std::copy(std::begin(device.clusters), std::end(device.clusters), properties.clusters.begin());
  return properties;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of lstm_ext; called by lstm_ext.ops only.";
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
  lstm_ext::bind_steps(m);
  lstm_ext::bind_variants(m);
  // dtype codes: enum Dtype in params.h, where every argument is described.
  m.def("cpu_forward", &cpu_forward, py::kw_only(), "dtype"_a, "bf16_products"_a = false,
        "threads"_a, "steps"_a, "H"_a, "P"_a, "I"_a, "gx"_a, "x"_a, "w_ih"_a, "b_ih"_a, "b_hh"_a,
        "w_hh"_a, "w_hr"_a, "h0"_a, "c0"_a, "variants"_a, "gates"_a, "c_seq"_a, "norm"_a,
        "norm_r"_a, "y"_a, "y_stride"_a, "h_n"_a, "c_n"_a, "workspace"_a,
        py::call_guard<py::gil_scoped_release>());
  m.def("cpu_backward", &cpu_backward, py::kw_only(), "dtype"_a, "bf16_products"_a = false,
        "threads"_a, "steps"_a, "H"_a, "P"_a, "variants"_a, "w_hh"_a, "w_hr"_a, "h0"_a, "c0"_a,
        "y"_a, "y_stride"_a, "gates"_a, "c_seq"_a, "norm"_a, "norm_r"_a, "dy"_a, "dy_stride"_a,
        "dh_n"_a, "dc_n"_a, "dcells"_a, "dgates"_a, "dproduct"_a, "h_prev"_a, "dr"_a, "cell_out"_a,
        "dpeephole"_a, "dnorm"_a, "dh0"_a, "dc0"_a, "workspace"_a,
        py::call_guard<py::gil_scoped_release>());
  m.def("cpu_forward_workspace", &cpu_forward_workspace, "dtype"_a, "threads"_a, "steps"_a, "H"_a,
        "P"_a, "I"_a, "x"_a, "w_hh"_a, "w_hr"_a, "variants"_a, "bf16_products"_a = false);
  m.def("cpu_backward_workspace", &cpu_backward_workspace, "dtype"_a, "threads"_a, "steps"_a, "H"_a,
        "P"_a, "w_hh"_a, "w_hr"_a, "variants"_a, "bf16_products"_a = false);
  m.def("cpu_matmul", &cpu_matmul, py::kw_only(), "dtype"_a, "bf16_products"_a, "threads"_a, "M"_a,
        "N"_a, "more_N"_a, "K"_a, "a_transposed"_a, "a"_a, "w"_a, "more_w"_a, "out"_a, "more_out"_a,
        "sums"_a, "workspace"_a, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_matmul_workspace", &cpu_matmul_workspace, "dtype"_a, "bf16_products"_a, "threads"_a,
        "M"_a, "N"_a, "more_N"_a, "K"_a, "a_transposed"_a);
#ifdef LSTM_EXT_WITH_CUDA
  m.def("cuda_report", &cuda_report, "CUDA runtime, driver and devices; never raises.");
  m.def("cuda_properties", &cuda_properties, "device"_a, "What the plan asks of a device.");
  lstm_ext::bind_cuda(m);
#endif
}
