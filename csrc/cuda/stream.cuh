// Weights that do not stay on the multiprocessor, but come from L2 in the same order at every step.
//
// They depend on nothing that a step makes: a warp has the next chunks of its share always on their
// way into shared memory, through the barrier and the cell too, when nothing else would be read. A
// lane asks for what it will itself use, and so waits for nobody else.
//
// But the warp that arrives at the barrier asks for the next turn's after that, or when it goes on
// to another tile: its fence may wait for all that the warp has on its way.
#pragma once

#include "cuda/primitives.cuh"
#include "cuda/tiles.h"

namespace lstm_ext {

// The chunks first, first + 1, ... end - 1 of a warp, over and over: if it is on, chunks_ahead() of
// them at least. A chunk is kMTiles pieces of 1 KB.
template <int kMTiles>
class WeightStream {
  static constexpr unsigned kSlots = chunks_ahead(kMTiles);
  // Pieces that are waited for together: a load of shared memory takes longer than its products.
  static constexpr int kTogether = kMTiles > 1 ? 2 : 1;
  static_assert(kMTiles % kTogether == 0, "each m-tile is waited for");
  static_assert((kSlots & (kSlots - 1)) == 0 &&
                    kSlots * kMTiles * kTileBytes * kWarps == kStreamBytes,
                "turn_ may wrap, and the slots fill their memory");

 public:
  // memory: of the block, kStreamBytes; null: there is no stream. in_l2: how many of the chunks
  // L2 is to have at the next step still. Where it cannot have all of them it would have none,
  // since those that are needed next are the first to go.
  LSTM_EXT_DEVICE WeightStream(unsigned char* memory, int first, int end, int in_l2)
      : memory_(reinterpret_cast<uint4*>(memory) + threadIdx.x / 32 * (kSlots * kMTiles * 64) +
                threadIdx.x % 32),
        on_(memory),
        first_(first),
        end_(end),
        passing_(first + in_l2),
        turn_(-unsigned(first)) {}

  LSTM_EXT_DEVICE bool on() const { return on_; }

  // Asks for the first chunks, if that is due. from(m, half, chunk): where the lane's 16 bytes lie,
  // of rows g and g + 8 of an m-tile.
  template <class From>
  LSTM_EXT_DEVICE void begin(From from) {
    if (!on_ || !due_) return;
    due_ = false;
#pragma unroll
    for (int i = 0; i < int(kSlots); ++i)
#pragma unroll
      for (int m = 0; m < kMTiles; m += kTogether) fetch(m, first_ + i, slot_of(first_ + i), from);
  }
  // Of a chunk, m-tile by m-tile and chunk by chunk. What comes a round of slots later follows it
  // into its place, if need be the next turn's.
  template <class From>
  LSTM_EXT_DEVICE void take(int m, int chunk, uint4 (&rows)[2], From from) {
    if (m % kTogether == 0) async_wait<int(kSlots) * kMTiles - kTogether>();
    const unsigned slot = slot_of(chunk);
    rows[0] = *place(m, 0, slot);
    rows[1] = *place(m, 1, slot);
    if (m % kTogether != kTogether - 1) return;
    int next = chunk + int(kSlots);
    if (next >= end_) {
      if (arrives()) {  // empty groups, for async_wait() counts them
        for (int i = 0; i < kTogether; ++i) async_commit();
        return;
      }
      next -= end_ - first_;
    }
    fetch(m + 1 - kTogether, next, slot, from);
  }
  // All chunks have been taken.
  LSTM_EXT_DEVICE void turn() {
    turn_ += unsigned(end_ - first_);
    due_ = arrives();
  }
  // What is on its way is waited for: nothing may come after the block has gone.
  LSTM_EXT_DEVICE void stop() { async_wait<0>(); }

 private:
  static LSTM_EXT_DEVICE bool arrives() { return threadIdx.x < 32; }  // see GroupBarrier
  LSTM_EXT_DEVICE unsigned slot_of(int chunk) const { return (turn_ + unsigned(chunk)) % kSlots; }
  // Of kTogether m-tiles.
  template <class From>
  LSTM_EXT_DEVICE void fetch(int m, int chunk, unsigned slot, From from) {
    if (chunk < passing_)
      fetch<false>(m, chunk, slot, from);
    else
      fetch<true>(m, chunk, slot, from);
  }
  template <bool kPassing, class From>
  LSTM_EXT_DEVICE void fetch(int m, int chunk, unsigned slot, From from) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        async_load16<kPassing>(place(m + i, half, slot), from(m + i, half, chunk));
      async_commit();
    }
  }
  LSTM_EXT_DEVICE uint4* place(int m, int half, unsigned slot) const {
    return memory_ + (slot * kMTiles + unsigned(m)) * 64 + half * 32;
  }

  uint4* memory_;
  bool on_, due_ = true;
  int first_, end_, passing_;
  unsigned turn_;  // and a chunk's number: its slot
};

// Of kernels without.
template <>
class WeightStream<0> {
 public:
  LSTM_EXT_DEVICE WeightStream(unsigned char*, int, int, int) {}
};

}  // namespace lstm_ext
