// Where a convolution's kernel sees what of an image.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace lstm_ext {

// How a kernel moves over images of up to three dimensions; a dimension that is not there has 1
// pixel. Images lie channels last.
struct ConvWindow {
  using Sizes = std::array<int64_t, 3>;

  Sizes size;                              // of an image
  Sizes output;                            // how many places the kernel takes
  Sizes kernel, stride, before, dilation;  // before: zeros before the first pixel
  int64_t channels;

  static int64_t product(const Sizes& of) { return of[0] * of[1] * of[2]; }
  int64_t pixels() const { return product(size); }
  int64_t places() const { return product(output); }
  int64_t columns() const { return product(kernel) * channels; }

  // done(place, at, pixel, count) for each place: what `count` pixels of the kernel, from the at-th
  // on, see there: as many pixels of the image, one after the other in memory; or -1: zeros.
  template <class Done>
  void each(Done&& done) const {
    Sizes o, k{};
    int64_t place = 0;
    for (o[0] = 0; o[0] < output[0]; ++o[0])
      for (o[1] = 0; o[1] < output[1]; ++o[1])
        for (o[2] = 0; o[2] < output[2]; ++o[2], ++place) {
          int64_t at = 0;
          for (k[0] = 0; k[0] < kernel[0]; ++k[0])
            for (k[1] = 0; k[1] < kernel[1]; ++k[1], at += kernel[2]) line(o, k, place, at, done);
        }
  }

 private:
  int64_t seen(const Sizes& o, const Sizes& k, size_t d) const {
    return o[d] * stride[d] - before[d] + k[d] * dilation[d];
  }

  // Of the kernel's pixels along the last dimension, the at-th and following.
  template <class Done>
  void line(const Sizes& o, Sizes k, int64_t place, int64_t at, Done&& done) const {
    const int64_t many = kernel[2], i = seen(o, k, 0), j = seen(o, k, 1);
    if (i < 0 || i >= size[0] || j < 0 || j >= size[1]) return done(place, at, -1, many);
    const int64_t start = (i * size[1] + j) * size[2];
    if (dilation[2] > 1) {
      for (k[2] = 0; k[2] < many; ++k[2]) {
        const int64_t l = seen(o, k, 2);
        done(place, at + k[2], l < 0 || l >= size[2] ? -1 : start + l, 1);
      }
      return;
    }
    const int64_t first = seen(o, k, 2);
    const int64_t left = std::min(many, std::max<int64_t>(0, -first));
    const int64_t right = std::max(left, std::min(many, size[2] - first));
    if (left) done(place, at, -1, left);
    if (right > left) done(place, at + left, start + first + left, right - left);
    if (right < many) done(place, at + right, -1, many - right);
  }
};

}  // namespace lstm_ext
