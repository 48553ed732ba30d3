// Words of global memory by which blocks of one launch exchange without a barrier and without a
// fence: each tells its step, by a number or by one bit of it, so that whoever reads it knows
// whether it is the one that he waits for. Nothing depends on the order of two of them.
#pragma once

#include "cuda/primitives.cuh"
#include "cuda/tiles.h"

namespace lstm_ext {

// Waits for `count` pieces of kLoads vectors, which a thread finds at from, from + stride, ..., a
// piece's vectors `apart`: take(n, piece) is told of the n-th when it has come, which
// arrived(piece) knows. A load from L2 takes hundreds of cycles: 8 are on their way at once, and
// only what was late is asked for again.
template <int kLoads, class Arrived, class Take>
LSTM_EXT_DEVICE void take_words(const uint4* from, int stride, int apart, int count,
                                Arrived arrived, Take take) {
  constexpr int kPieces = 8 / kLoads;
#pragma unroll 1
  for (int n = 0; n < count; n += kPieces) {
    uint4 pieces[kPieces][kLoads];
    bool late[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) late[p] = n + p < count;
    while (true) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p)
#pragma unroll
        for (int load = 0; load < kLoads; ++load)
          if (late[p]) pieces[p][load] = load_words(from + p * stride + load * apart);
      bool any = false;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        late[p] = late[p] && !arrived(pieces[p]);
        any = any || late[p];
      }
      if (!any) break;
      poll_again();
    }
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
      if (n + p < count) take(n + p, pieces[p]);
    from += kPieces * stride;
  }
}

}  // namespace lstm_ext
