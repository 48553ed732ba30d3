// Numbers of one dtype as another.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// run(S()) of a storage type that is computed with in float32.
template <class Run>
void of_storage(Dtype dtype, const Run& run) {
  if (dtype == Dtype::kBFloat16) return run(bfloat16());
  if (dtype == Dtype::kFloat16) return run(float16());
  run(float());
}

inline void convert(const Conversion& p) {
  constexpr int L = Lanes<float>::kCount;
  of_storage(p.own, [&](auto own) {
    of_storage(p.rounded, [&](auto rounded) {
      of_storage(p.made, [&](auto made) {
        const auto* from = static_cast<const decltype(own)*>(p.from);
        auto* to = static_cast<decltype(made)*>(p.to);
        for (int64_t k = 0; k < p.count; k += L) {
          const Vec<float> v = load<float>(from + k, p.count - k);
          store<float>(to + k, rounded_to<float, decltype(rounded)>(v), p.count - k);
        }
      });
    });
  });
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
