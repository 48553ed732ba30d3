// One pass of the CUDA engine over a problem, against the textbook's LSTM in double: for the
// sanitizers and the mutants of test_emulated_races.py, without Python. Several problems share what
// takes ThreadSanitizer longest, its view of the emulator's threads.
//
//   lstm_driver PASS DTYPE FAMILY MxN HELD+SHARED GROUPS DIRECTIONS T B H P BATCH SEED...
//
// and more of them after a word "/".
//
// PASS: forward, backward. DTYPE: float64, float32, tf32, bfloat16, float16. FAMILY: step, grid,
// cluster, tagged, vendor. MxN: the plan's tiles, of vendor 0x0. HELD+SHARED: chunks of weights
// (backward of cluster and tagged m-tiles) that a warp keeps in registers and in shared memory; 0+0
// streams them all, 0+0a ahead. GROUPS: of sequences; each takes several tiles if it has more than
// 8 N, which those of cluster and tagged may not. P: below H for a projection. BATCH: dense;
// lengths (padded, with resets); packed (no padding, with resets); norm, norm+lengths, norm+packed:
// the same with a layer norm, which has the families step and vendor only; +parts: a launch for the
// first step, one for the last, one for those between, which only clusters can. SEED: of the
// emulator's scheduling; each is a run.
//
// Exit code 0: all right, 1: a wrong result, 2: not run. Every buffer ends where malloc's block
// does, so that AddressSanitizer sees an overrun (the engine cuts its scratch itself: there, what
// lies between the pieces is NaN). What is not to be read is NaN, what is not to be written stays.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/engine.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "textbook.h"

namespace lstm_ext {
namespace {

using textbook::Direction;
using textbook::Values;

struct Request {
  bool backward, packed, ragged, parts;
  CudaProblem problem;
  CudaPlan plan;
  double tolerance;  // of the largest element, or of 1
};

template <class E>
E to_element(double x) {
  return E(float(x));
}
template <>
double to_element<double>(double x) {
  return x;
}
double to_double(double x) { return x; }
double to_double(float x) { return x; }
double to_double(__nv_bfloat16 x) { return float(x); }
double to_double(__half x) { return float(x); }

// Arrays in the engine's element types, as many elements as there are values and not a byte more.
class Memory {
 public:
  template <class E>
  E* put(const Values& values) {
    pieces_.emplace_back(std::malloc(values.size() * sizeof(E)), std::free);
    E* data = static_cast<E*>(pieces_.back().get());
    for (size_t i = 0; i < values.size(); ++i) data[i] = to_element<E>(values[i]);
    return data;
  }
  template <class E>
  E* empty(int64_t count) {
    return put<E>(Values(size_t(count), NAN));
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> pieces_;
};

std::mt19937 g_random(1);

// Normal numbers, as E rounds them.
template <class E>
Values numbers(size_t count, double scale) {
  std::normal_distribution<double> normal(0, scale);
  Values out(count);
  for (double& x : out) x = to_double(to_element<E>(normal(g_random)));
  return out;
}

// [rows][columns] into [columns or rows][padded], zeros past the end.
Values weights(const Values& from, int64_t rows, int64_t columns, bool transposed, Dtype dtype) {
  if (transposed) std::swap(rows, columns);
  const int64_t length = padded(columns, dtype);
  Values to(size_t(rows * length));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      to[r * length + c] = transposed ? from[c * rows + r] : from[r * columns + c];
  return to;
}

// ---- the problem

constexpr double kBefore = 1;  // what sums over the steps are added to

// Which rows of a padded batch belong to a step that is taken; the others' values are NaN.
template <class E>
Values rows_of(const Steps& steps, int64_t width, double scale) {
  Values out(size_t(steps.rows * width), NAN);
  const Values some = numbers<E>(out.size(), scale);
  for (int64_t t = 0; t < steps.T; ++t)
    for (int64_t b = 0; b < steps.B; ++b)
      if (steps.active(t, b))
        std::copy_n(&some[steps.row(t, b) * width], width, &out[steps.row(t, b) * width]);
  return out;
}

template <class S, class A>
Direction make_direction(const CudaProblem& p, const Steps& steps) {
  Direction d;
  const int64_t rows = steps.rows, B = p.B, H = p.H, P = p.P;
  d.gx = rows_of<A>(steps, 4 * H, 1);
  d.b_ih = numbers<S>(4 * H, 0.5);
  d.b_hh = numbers<S>(4 * H, 0.5);
  d.w_hh = numbers<S>(4 * H * P, 1 / std::sqrt(double(P)));
  if (p.projection) d.w_hr = numbers<S>(P * H, 1 / std::sqrt(double(H)));
  d.h0 = numbers<S>(B * P, 1);
  d.c0 = numbers<S>(B * H, 1);
  d.dy = rows_of<S>(steps, P, 1);
  d.dh_n = numbers<S>(B * P, 1);
  d.dc_n = numbers<S>(B * H, 1);
  d.dcells = rows_of<S>(steps, H, 1);
  if (p.normed) {
    for (Values* gamma : {&d.gamma_hh, &d.gamma_ch}) {
      *gamma = numbers<S>(gamma == &d.gamma_hh ? 4 * H : H, 0.25);
      for (double& x : *gamma) x = to_double(to_element<S>(x + 1));
    }
    d.beta_ch = numbers<S>(H, 0.25);
    d.norm = Values(rows * 4 * H, NAN);
    d.norm_r = Values(rows, NAN);
    d.dproduct.resize(rows * 4 * H);
    d.dnorm = Values(B * 6 * H, kBefore);
    d.cell_out = Values(rows * H, NAN);
  }
  d.gates = Values(rows * 4 * H, NAN);
  d.c_prev = Values(rows * H, NAN);
  // Zero in the rows of steps that are not taken.
  d.c_seq = d.y = d.dgates = d.dr = d.h_prev = {};
  d.c_seq.resize(rows * H), d.y.resize(rows * P), d.h_prev.resize(rows * P);
  d.dgates.resize(rows * 4 * H), d.dr.resize(rows * P);
  d.h_n.resize(B * P), d.c_n.resize(B * H), d.dh0.resize(B * P), d.dc0.resize(B * H);
  return d;
}

// Prints how wrong a result is; NaN is right only where it is expected. Rows of `width` elements
// lie `stride` apart.
template <class E>
bool agree(const char* name, const void* result, const Values& expected, double tolerance,
           int64_t width = 1, int64_t stride = 1) {
  double largest = 1, error = 0;
  for (const double x : expected) largest = std::fmax(largest, std::fabs(x));
  for (int64_t i = 0; i < int64_t(expected.size()); ++i) {
    const double got = to_double(static_cast<const E*>(result)[i / width * stride + i % width]);
    if (std::isnan(got) && std::isnan(expected[i])) continue;
    const double here = std::fabs(got - expected[i]) / largest;
    error = std::isnan(here) ? INFINITY : std::fmax(error, here);
  }
  std::printf(" %s %.1e%s", name, error, error <= tolerance ? "" : " WRONG");
  return error <= tolerance;
}

// ---- the engine

template <class S>
Variants variants_of(const Direction& d, Memory& memory) {
  Variants v = {};
  if (d.gamma_hh.empty()) return v;
  v.gamma_hh = memory.put<S>(d.gamma_hh);
  v.gamma_ch = memory.put<S>(d.gamma_ch);
  v.beta_ch = memory.put<S>(d.beta_ch);
  v.epsilon = textbook::kEpsilon;
  return v;
}

// What each launch does.
std::vector<StepRange> ranges(const Request& r) {
  const int64_t T = r.problem.T;
  if (!r.parts) return {{0, T}};
  if (T < 3) throw std::invalid_argument("three parts have three steps");
  return {{0, 1}, {1, T - 1}, {T - 1, T}};
}

// NaN; of the family tagged, what an earlier launch may have left: words of the first step.
std::unique_ptr<void, void (*)(void*)> scratch(int64_t bytes, const CudaPlan& plan) {
  const bool tagged = plan.family == CudaFamily::kTagged;
  void* p = std::aligned_alloc(256, size_t(bytes));
  std::fill_n(static_cast<uint32_t*>(p), bytes / 4, tagged ? 0x00010001 : 0xffffffff);
  return {p, std::free};
}

template <class S, class A>
bool run_forward(const Request& r, const CudaLayer& layer, const std::vector<Direction>& all) {
  const CudaProblem& p = r.problem;
  const int64_t rows = layer.steps.rows, B = p.B, H = p.H, P = p.P, y_stride = p.directions * P;
  Memory memory;
  S* const y = memory.empty<S>(rows * y_stride);
  std::vector<CudaForwardDirection> directions;
  for (const Direction& d : all) {
    const auto put = [&](const Values& values) { return memory.put<S>(values); };
    A* const gates = memory.put<A>(d.gx);
    directions.push_back({
        .reverse = !directions.empty(),
        .gx = gates,
        .b_ih = put(d.b_ih),
        .b_hh = put(d.b_hh),
        .w_hh = put(weights(d.w_hh, 4 * H, P, false, p.dtype)),
        .w_hr = p.projection ? put(weights(d.w_hr, P, H, false, p.dtype)) : nullptr,
        .h0 = put(d.h0),
        .c0 = put(d.c0),
        .variants = variants_of<S>(d, memory),
        .gates = gates,
        .c_seq = memory.empty<A>(rows * H),
        .norm = p.normed ? memory.empty<A>(rows * 4 * H) : nullptr,
        .norm_r = p.normed ? memory.empty<A>(rows) : nullptr,
        .y = y + int64_t(directions.size()) * P,
        .y_stride = y_stride,
        .h_n = memory.empty<S>(B * P),
        .c_n = memory.empty<S>(B * H),
    });
  }
  const auto workspace = scratch(cuda_forward_workspace(layer, p.projection), r.plan);
  for (const StepRange& range : ranges(r))
    cuda_forward(layer, directions.data(), workspace.get(), range);
  bool ok = true;
  for (size_t i = 0; i < all.size(); ++i) {
    const CudaForwardDirection& got = directions[i];
    ok &= agree<A>("gates", got.gates, all[i].gates, r.tolerance);
    ok &= agree<A>("c_seq", got.c_seq, all[i].c_seq, r.tolerance);
    ok &= agree<S>("y", got.y, all[i].y, r.tolerance, P, y_stride);
    ok &= agree<S>("h_n", got.h_n, all[i].h_n, r.tolerance);
    ok &= agree<S>("c_n", got.c_n, all[i].c_n, r.tolerance);
    if (!p.normed) continue;
    ok &= agree<A>("norm", got.norm, all[i].norm, r.tolerance);
    ok &= agree<A>("norm_r", got.norm_r, all[i].norm_r, r.tolerance);
  }
  return ok;
}

template <class S, class A>
bool run_backward(const Request& r, const CudaLayer& layer, const std::vector<Direction>& all) {
  const CudaProblem& p = r.problem;
  const int64_t rows = layer.steps.rows, B = p.B, H = p.H, P = p.P;
  Memory memory;
  std::vector<CudaBackwardDirection> directions;
  for (const Direction& d : all) {
    const auto put = [&](const Values& values) { return memory.put<S>(values); };
    directions.push_back({
        .reverse = !directions.empty(),
        .w_hh = put(weights(d.w_hh, 4 * H, P, true, p.dtype)),
        .w_hr = p.projection ? put(weights(d.w_hr, P, H, true, p.dtype)) : nullptr,
        .h0 = put(d.h0),
        .c0 = put(d.c0),
        .y = put(d.y),
        .y_stride = P,
        .gates = memory.put<A>(d.gates),
        .c_seq = memory.put<A>(d.c_seq),
        .variants = variants_of<S>(d, memory),
        .norm = p.normed ? memory.put<A>(d.norm) : nullptr,
        .norm_r = p.normed ? memory.put<A>(d.norm_r) : nullptr,
        .dy = put(d.dy),
        .dy_stride = P,
        .dh_n = put(d.dh_n),
        .dc_n = put(d.dc_n),
        .dcells = put(d.dcells),
        .dgates = p.normed ? (void*)memory.empty<A>(rows * 4 * H) : memory.empty<S>(rows * 4 * H),
        .dproduct = p.normed ? memory.empty<S>(rows * 4 * H) : nullptr,
        .cell_out = p.normed ? memory.empty<S>(rows * H) : nullptr,
        .dpeephole = nullptr,
        .dnorm = p.normed ? memory.put<A>(Values(B * 6 * H, kBefore)) : nullptr,
        .h_prev = memory.empty<S>(rows * P),
        .dr = p.projection ? memory.empty<S>(rows * P) : nullptr,
        .dh0 = memory.empty<S>(B * P),
        .dc0 = memory.empty<S>(B * H),
    });
  }
  const auto workspace = scratch(cuda_backward_workspace(layer, p.projection), r.plan);
  for (const StepRange& range : ranges(r))
    cuda_backward(layer, directions.data(), workspace.get(), range);
  bool ok = true;
  for (size_t i = 0; i < all.size(); ++i) {
    const CudaBackwardDirection& got = directions[i];
    ok &= (p.normed ? agree<A> : agree<S>)("dgates", got.dgates, all[i].dgates, r.tolerance, 1, 1);
    if (p.normed) {
      ok &= agree<S>("dproduct", got.dproduct, all[i].dproduct, r.tolerance);
      ok &= agree<S>("cell_out", got.cell_out, all[i].cell_out, r.tolerance);
      ok &= agree<A>("dnorm", got.dnorm, all[i].dnorm, r.tolerance);
    }
    ok &= agree<S>("h_prev", got.h_prev, all[i].h_prev, r.tolerance);
    if (p.projection) ok &= agree<S>("dr", got.dr, all[i].dr, r.tolerance);
    ok &= agree<S>("dh0", got.dh0, all[i].dh0, r.tolerance);
    ok &= agree<S>("dc0", got.dc0, all[i].dc0, r.tolerance);
  }
  return ok;
}

template <class S, class A>
bool run_typed(const Request& r, const std::vector<uint64_t>& seeds) {
  const CudaProblem& p = r.problem;
  // Lengths from T down, the last sequence without a step; a third of the steps begin anew.
  std::unique_ptr<int64_t[]> lengths(new int64_t[p.B]), offsets(new int64_t[p.T]);
  std::unique_ptr<uint8_t[]> reset(new uint8_t[p.T * p.B]);
  for (int64_t b = 0; b < p.B; ++b) lengths[b] = b + 1 < p.B ? p.T - b * p.T / p.B : 0;
  for (int64_t i = 0; i < p.T * p.B; ++i) reset[i] = (i / p.B + i % p.B) % 3 == 0;
  Steps steps = {p.T, p.B, p.T * p.B, p.B, 1, nullptr, nullptr, nullptr, false};
  if (r.ragged) steps.lengths = lengths.get(), steps.reset = reset.get();
  if (r.packed) {
    steps.offsets = offsets.get();
    steps.rows = 0;
    for (int64_t t = 0; t < p.T; ++t) {
      offsets[t] = steps.rows;
      for (int64_t b = 0; b < p.B; ++b) steps.rows += steps.active(t, b);
    }
  }

  std::vector<Direction> directions;
  for (int i = 0; i < p.directions; ++i) {
    directions.push_back(make_direction<S, A>(p, steps));
    steps.reverse = i == 1;
    textbook::forward(steps, p.H, p.P, directions[i]);
    if (r.backward) textbook::backward(steps, p.H, p.P, directions[i]);
  }
  const CudaLayer layer = {
      p.dtype,    p.tf32,   0,     nullptr, p.directions, steps, p.H, p.P, padded(p.P, p.dtype),
      p.variants, p.normed, r.plan};
  bool ok = true;
  for (const uint64_t seed : seeds) {
    emu::g_seed = seed;
    std::printf("seed %llu:", (unsigned long long)seed);
    ok &= (r.backward ? run_backward<S, A> : run_forward<S, A>)(r, layer, directions);
    std::printf("\n");
  }
  return ok;
}

Request parse(char** word) {
  const auto is = [&](int i, const char* value) { return !std::strcmp(word[i], value); };
  const auto number = [&](int i) { return std::atoll(word[i]); };
  Request r{};
  CudaProblem& p = r.problem;
  CudaPlan& plan = r.plan;
  r.backward = p.backward = is(0, "backward");
  p.tf32 = is(1, "tf32");
  p.dtype = is(1, "float64")    ? Dtype::kFloat64
            : is(1, "float16")  ? Dtype::kFloat16
            : is(1, "bfloat16") ? Dtype::kBFloat16
                                : Dtype::kFloat32;
  const double half = p.dtype == Dtype::kBFloat16 ? 2e-2 : 3e-3;
  r.tolerance = is(1, "float64") ? 1e-12 : is(1, "float32") ? 1e-5 : half;
  plan.family = is(2, "cluster")  ? CudaFamily::kCluster
                : is(2, "tagged") ? CudaFamily::kTagged
                : is(2, "vendor") ? CudaFamily::kVendor
                : is(2, "grid")   ? CudaFamily::kGrid
                                  : CudaFamily::kStep;
  char ahead = 0;
  if (std::sscanf(word[3], "%dx%d", &plan.m_tiles, &plan.n_tiles) != 2 ||
      std::sscanf(word[4], "%d+%d%c", &plan.held, &plan.shared, &ahead) < 2)
    throw std::invalid_argument("MxN and HELD+SHARED are expected");
  plan.ahead = ahead == 'a';
  const int64_t groups = number(5);
  p.directions = int(number(6));
  p.T = number(7), p.B = number(8), p.H = number(9), p.P = number(10);
  p.projection = p.P != p.H;
  const std::string batch = word[11];
  const auto has = [&](const char* part) { return batch.find(part) != std::string::npos; };
  p.variants = p.normed = has("norm");
  r.packed = has("packed");
  r.ragged = r.packed || has("lengths");
  r.parts = has("parts");

  const bool vendor = plan.family == CudaFamily::kVendor;
  const int units = vendor ? kThreads : units_of(plan.m_tiles, p.backward);
  plan.slices = ceil_div(p.H, units);
  plan.group_rows = ceil_div(p.B, groups);
  const bool cluster = plan.family == CudaFamily::kCluster;
  const bool resident = cluster || plan.family == CudaFamily::kTagged;
  if (!resident && !vendor) plan.group_rows = ceil_div(plan.group_rows, 8) * 8;
  plan.groups = ceil_div(p.B, plan.group_rows);
  int64_t of_a_tile = plan.m_tiles * kTileBytes;  // of what `shared` counts
  if (resident) {
    if (cluster)
      for (plan.cluster = 2; plan.cluster < plan.slices;) plan.cluster *= 2;
    const Tile tile = {plan.m_tiles, plan.n_tiles, plan.held};
    const int element = int(storage_bytes(p.dtype));
    plan.shared_bytes =
        p.backward ? backward_resident_bytes(tile, plan.slices, plan.group_rows, element, !cluster)
                   : forward_resident_bytes(tile, plan.slices, plan.group_rows,
                                            padded(p.P, p.dtype) * element, element);
    if (p.backward)
      of_a_tile *= element;
    else
      of_a_tile /= warps_of_rows(plan.m_tiles);
  } else if (!vendor) {
    const int acc = int(acc_bytes(p.dtype));
    plan.shared_bytes = partial_bytes(plan.m_tiles, units, plan.n_tiles, acc);
    const int rounds = plan.n_tiles / round_tiles(units, plan.n_tiles);
    plan.fetches = can_fetch(plan.m_tiles, rounds, acc, p.variants, p.backward);
    if (plan.fetches) plan.shared_bytes += fetched_bytes(rounds, p.backward);
    if (plan.ahead) plan.shared_bytes += kStreamBytes;
  }
  plan.shared_bytes += int64_t(plan.shared) * kWarps * of_a_tile;
  return r;
}

bool run(const Request& r, const std::vector<uint64_t>& seeds) {
  std::printf("%s\n", describe(r.plan, r.problem).c_str());
  switch (r.problem.dtype) {
    case Dtype::kFloat64:
      return run_typed<double, double>(r, seeds);
    case Dtype::kFloat32:
      return run_typed<float, float>(r, seeds);
    case Dtype::kBFloat16:
      return run_typed<__nv_bfloat16, float>(r, seeds);
    default:
      return run_typed<__half, float>(r, seeds);
  }
}

}  // namespace
}  // namespace lstm_ext

int main(int count, char** words) try {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was said is there when a sanitizer ends it
  bool ok = true;
  for (char **next = words + 1, **const end = words + count; next < end; ++next) {
    char** const first = next;
    next = std::find_if(first, end, [](const char* word) { return !std::strcmp(word, "/"); });
    if (next - first < 13) throw std::invalid_argument("see the top of lstm_driver.cpp");
    std::vector<uint64_t> seeds;
    for (char** seed = first + 12; seed < next; ++seed)
      seeds.push_back(std::strtoull(*seed, nullptr, 10));
    ok &= lstm_ext::run(lstm_ext::parse(first), seeds);
  }
  return !ok;
} catch (const std::exception& error) {
  std::printf("not run: %s\n", error.what());
  return 2;
}
