// LSTM cells whose gates were made elsewhere, in planes: of each sequence all of i, then all of f,
// g and o, as a convolution leaves them channels first. A sequence's units, all channels and
// pixels, lie side by side, so that vectors are full whatever the number of channels is.
#pragma once

#include "convert.h"
#include "simd.h"
#include "team.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// A: what is computed in; S: of the pre-activations and their gradients; T: of the states and
// theirs.
template <class A, class S, class T>
class Planes {
  using V = Vec<A>;
  using LstmCell = Cell<Math<A>>;
  using Gates = typename LstmCell::Gates;
  using Peephole = typename LstmCell::Peephole;
  static constexpr int L = Lanes<A>::kCount;
  static constexpr int kChains = 4;  // of dependent instructions side by side, as in ForwardCells
  // Some 40 ns each: below, a second thread takes longer to start than it saves.
  static constexpr int64_t kBlocksAThread = 512;

 public:
  explicit Planes(const CellPlanes& p) : p_(p), n_(p.units), blocks_((p.units + L - 1) / L) {}

  void forward() const {
    each([&](int64_t b, Range blocks) {
      for (int64_t first = blocks.begin; first < blocks.end; first += kChains) {
        const int64_t end = std::min(blocks.end, first + kChains);
        V o[kChains], c[kChains];
        for (int64_t k = first; k < end; ++k) o[k - first] = state(b, k * L, c[k - first]);
        for (int64_t k = first; k < end; ++k) {
          store<A>(at<T>(p_.h_n, b, k * L), o[k - first] * Math<A>::tanh(c[k - first]), n_ - k * L);
        }
      }
    });
  }

  void backward() const {
    each([&](int64_t b, Range blocks) {
      for (int64_t k = blocks.begin; k < blocks.end; ++k) gradient(b, k * L);
    });
  }

 private:
  // body(b, blocks) of all sequences, by several threads where it pays.
  template <class Body>
  void each(const Body& body) const {
    const int64_t all = p_.N * blocks_;
    const int64_t wanted =
        std::max<int64_t>(1, std::min<int64_t>(p_.threads, all / kBlocksAThread));
    run_team(int(wanted), [&](int thread, int threads) {
      const Range own = share(all, threads, thread);
      for (int64_t k = own.begin; k < own.end;) {
        const int64_t b = k / blocks_, first = k % blocks_;
        const int64_t count = std::min(own.end - k, blocks_ - first);
        body(b, Range{first, first + count});
        k += count;
      }
    });
  }

  // Of a sequence, unit j of one of its planes.
  template <class E, class Void>
  auto at(Void* memory, int64_t b, int64_t j, int64_t planes = 1) const {
    using Element = std::conditional_t<std::is_const_v<Void>, const E, E>;
    return static_cast<Element*>(memory) + b * planes * n_ + j;
  }
  template <class E>
  Gates load_gates(const void* memory, int64_t b, int64_t j) const {
    const E* a = at<E>(memory, b, j, 4);
    const int64_t n = n_ - j;
    return {load<A>(a, n), load<A>(a + n_, n), load<A>(a + 2 * n_, n), load<A>(a + 3 * n_, n)};
  }
  template <class E>
  void store_gates(void* memory, int64_t b, int64_t j, const Gates& s) const {
    E* a = at<E>(memory, b, j, 4);
    const int64_t n = n_ - j;
    store<A>(a, s.i, n);
    store<A>(a + n_, s.f, n);
    store<A>(a + 2 * n_, s.g, n);
    store<A>(a + 3 * n_, s.o, n);
  }
  Peephole load_peephole(int64_t j) const {
    const A* w = static_cast<const A*>(p_.w_ch) + j;
    const int64_t n = n_ - j;
    return {load<A>(w, n), load<A>(w + n_, n), load<A>(w + 2 * n_, n)};
  }
  // Gradients that may be zero throughout.
  V load_gradient(const void* memory, int64_t b, int64_t j) const {
    return memory ? load<A>(at<T>(memory, b, j), n_ - j) : broadcast<A>(A(0));
  }

  // The cell up to c; returns o.
  LSTM_EXT_INLINE V state(int64_t b, int64_t j, V& c) const {
    const Gates a = load_gates<S>(p_.a, b, j);
    const V c_prev = load<A>(at<T>(p_.c0, b, j), n_ - j);
    Gates s;
    if (p_.w_ch) {
      const Peephole peephole = load_peephole(j);
      LstmCell::forward_state(a, c_prev, s, c, &peephole);
    } else {
      LstmCell::forward_state(a, c_prev, s, c, nullptr);
    }
    if (p_.gates) store_gates<A>(p_.gates, b, j, s);
    if (p_.c) store<A>(at<A>(p_.c, b, j), c, n_ - j);
    store<A>(at<T>(p_.c_n, b, j), c, n_ - j);
    return s.o;
  }

  LSTM_EXT_INLINE void gradient(int64_t b, int64_t j) const {
    const Gates s = load_gates<A>(p_.gates, b, j);
    const V c = load<A>(at<A>(static_cast<const void*>(p_.c), b, j), n_ - j);
    const V c_prev = load<A>(at<T>(p_.c0, b, j), n_ - j);
    V dc = load_gradient(p_.dc, b, j);
    Gates da;
    if (p_.w_ch) {
      const Peephole peephole = load_peephole(j);
      LstmCell::backward(s, c, c_prev, load_gradient(p_.dh, b, j), dc, da, &peephole);
      A* to = at<A>(p_.dw_ch, b, j, 3);
      store<A>(to, da.i * c_prev, n_ - j);
      store<A>(to + n_, da.f * c_prev, n_ - j);
      store<A>(to + 2 * n_, da.o * c, n_ - j);
    } else {
      LstmCell::backward(s, c, c_prev, load_gradient(p_.dh, b, j), dc, da);
    }
    store_gates<S>(p_.da, b, j, da);
    store<A>(at<T>(p_.dc0, b, j), dc, n_ - j);
  }

  const CellPlanes& p_;
  const int64_t n_, blocks_;
};

// run(cells) of the types of the call.
template <class Run>
void of_planes(const CellPlanes& p, const Run& run) {
  if (p.states == Dtype::kFloat64) return run(Planes<double, double, double>(p));
  of_storage(p.given, [&](auto given) {
    of_storage(p.states,
               [&](auto states) { run(Planes<float, decltype(given), decltype(states)>(p)); });
  });
}

inline void planes_forward(const CellPlanes& p) {
  of_planes(p, [](const auto& cells) { cells.forward(); });
}

inline void planes_backward(const CellPlanes& p) {
  of_planes(p, [](const auto& cells) { cells.backward(); });
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
