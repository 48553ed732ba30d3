// What the kernels of both passes share: which block does what, the barrier between steps, and the
// arguments that the host makes of a layer.
#pragma once

#include "cuda/engine.h"
#include "cuda/reduction.cuh"

namespace lstm_ext {

// Blocks are numbered group first, then slice, then direction: blocks that read the same weights
// run at about the same time, so that those come from memory once and from L2 after that.
struct BlockShape {
  int slices, groups, group_rows;
  int shared;       // chunks of weights in shared memory
  bool ahead;       // whether a stream of the others goes through it
  int in_l2;        // chunks of a warp's stream that are to stay in L2
  bool fetches;     // whether cells get what they need through FetchedWords
  int first, last;  // of the steps, in the order of taking them: what this launch does
};

struct BlockPlace {
  int slice, group, direction;
  int row_first, row_end;  // sequences of the group

  LSTM_EXT_DEVICE BlockPlace(const BlockShape& shape, int B) {
    const int block = int(blockIdx.x);
    group = block % shape.groups;
    slice = block / shape.groups % shape.slices;
    direction = block / shape.groups / shape.slices;
    row_first = group * shape.group_rows;
    row_end = min(B, row_first + shape.group_rows);
  }
};

// Blocks of a cell's kernel that a multiprocessor must have room for: two, where a launch of one
// step has many small ones and registers suffice.
LSTM_EXT_INLINE constexpr int blocks_at_once(bool small, int held, bool variants) {
  return small && held == 0 && !variants ? 2 : 1;
}

// Element `column` of row `row`, which is not negative: the row's start may lie past 2^31, its
// number not past 2^32.
LSTM_EXT_DEVICE int64_t at(unsigned row, int stride, int column) {
  return int64_t(uint64_t(row) * unsigned(stride)) + column;
}

// Counters lie a cache line apart.
constexpr int kCounterStride = 32;

// The barrier of the blocks of one group: all have the same sequences and need each other's units.
class GroupBarrier {
 public:
  LSTM_EXT_DEVICE GroupBarrier(unsigned* counters, const BlockShape& shape, const BlockPlace& place)
      : counter_(counters + place.group * kCounterStride), blocks_(unsigned(shape.slices)) {}

  // What this block wrote for the others is finished. Thread 0 tells: stream.cuh knows.
  LSTM_EXT_DEVICE void arrive() {
    __syncthreads();  // all of the block has written, and has read its partial sums
    if (threadIdx.x == 0) arrive_at(counter_);
  }
  // What the other blocks wrote before they arrived, as often as this one, is visible.
  LSTM_EXT_DEVICE void wait() {
    target_ += blocks_;
    if (threadIdx.x == 0) wait_until(counter_, target_);
    __syncthreads();  // nobody reads before thread 0 has seen it
  }

 private:
  unsigned* counter_;
  unsigned blocks_, target_ = 0;
};

// Words that a thread's cells need of a step from global memory, fetched before they are used:
// [slots][kWords][kThreads] in shared memory, each thread's own. A slot may be fetched into again
// once its words have been used.
template <int kWords>
class FetchedWords {
 public:
  // thread: threadIdx.x, pinned where a register can be had for it.
  LSTM_EXT_DEVICE FetchedWords(unsigned char* memory, int thread)
      : words_(reinterpret_cast<float*>(memory) + thread) {}

  LSTM_EXT_DEVICE void fetch(int slot, int word, const float* from) {
    async_load4(at(slot, word), from);
  }
  LSTM_EXT_DEVICE float get(int slot, int word) const { return *at(slot, word); }

 private:
  LSTM_EXT_DEVICE float* at(int slot, int word) const {
    return words_ + (slot * kWords + word) * kThreads;
  }
  float* words_;
};

// A typed view of an address, with null kept.
template <class T>
LSTM_EXT_DEVICE T* as(void* p) {
  return static_cast<T*>(p);
}
template <class T>
LSTM_EXT_DEVICE const T* as(const void* p) {
  return static_cast<const T*>(p);
}

// A step as one sequence sees it.
struct Turn {
  int t, b;
  unsigned row;      // if there is one: a packed batch has none for a step that is not taken
  bool active;       // the sequence takes it
  bool first, last;  // of the steps that it takes, in the order of taking
  bool reset;        // the state is zero before it; only a step that is taken resets
};

// Steps as the kernels walk them. 64-bit numbers cost several instructions each, which a step would
// wait for: a layer has fewer than 2^30 steps and sequences and 2^32 rows.
class Walk {
 public:
  LSTM_EXT_DEVICE Walk(const Steps& steps, bool reverse) : steps_(steps), reverse_(reverse) {}

  LSTM_EXT_DEVICE int T() const { return int(steps_.T); }
  LSTM_EXT_DEVICE int B() const { return int(steps_.B); }
  LSTM_EXT_DEVICE bool reverse() const { return reverse_; }
  LSTM_EXT_DEVICE bool packed() const { return steps_.offsets; }
  LSTM_EXT_DEVICE bool ragged() const { return steps_.lengths; }

  // The step taken in the i-th place.
  LSTM_EXT_DEVICE int step_at(int i) const { return reverse_ ? T() - 1 - i : i; }
  LSTM_EXT_DEVICE int length(int b) const { return steps_.lengths ? int(steps_.lengths[b]) : T(); }
  LSTM_EXT_DEVICE bool active(int t, int b) const { return t < length(b); }
  // Row of sequence 0 at a step, from which that of each other follows.
  LSTM_EXT_DEVICE unsigned first_row(int t) const {
    return steps_.offsets ? unsigned(steps_.offsets[t]) : unsigned(t) * unsigned(steps_.stride_t);
  }
  LSTM_EXT_DEVICE unsigned row_from(unsigned first_row, int b) const {
    return first_row + unsigned(b) * unsigned(steps_.stride_b);
  }
  LSTM_EXT_DEVICE unsigned row(int t, int b) const { return row_from(first_row(t), b); }
  // Of the step in the i-th place, from that in the place before, with kForth, or after it; any row
  // if there is no such step.
  template <bool kForth>
  LSTM_EXT_DEVICE unsigned first_row_beside(unsigned row, int i) const {
    if (packed()) return unsigned(i) < unsigned(T()) ? first_row(step_at(i)) : 0;
    const auto stride = unsigned(steps_.stride_t);
    return reverse_ == kForth ? row - stride : row + stride;
  }
  // Of a sequence of so many steps.
  LSTM_EXT_DEVICE bool resets(int t, int b, int length) const { return t < length && marked(t, b); }
  // Whether the reset mask says so.
  LSTM_EXT_DEVICE bool marked(int t, int b) const {
    return steps_.reset && steps_.reset[int64_t(t) * B() + b];
  }
  LSTM_EXT_DEVICE bool resets(int t, int b) const { return resets(t, b, length(b)); }
  // first_row: of step t, length: of sequence b, where they are known.
  LSTM_EXT_DEVICE Turn turn(unsigned first_row, int t, int b, int length) const {
    return {t,
            b,
            row_from(first_row, b),
            t < length,
            t == (reverse_ ? length - 1 : 0),
            t == (reverse_ ? 0 : length - 1),
            resets(t, b, length)};
  }
  LSTM_EXT_DEVICE Turn turn(int t, int b, int length) const {
    return turn(first_row(t), t, b, length);
  }
  LSTM_EXT_DEVICE Turn turn(int t, int b) const { return turn(t, b, length(b)); }
  // The row of the step taken before a turn that is not the first.
  LSTM_EXT_DEVICE unsigned row_before(const Turn& turn) const {
    return row(reverse_ ? turn.t + 1 : turn.t - 1, turn.b);
  }

 private:
  const Steps& steps_;
  bool reverse_;
};

// The turns of one sequence, for those who ask for one after another: a turn costs two comparisons
// with numbers that are kept.
class Course {
 public:
  // Of no sequence: none of its turns is active.
  Course() = default;
  LSTM_EXT_DEVICE Course(const Walk& walk, int b, int length)
      : b_(b),
        begin_(walk.reverse() ? walk.T() - length : 0),
        end_(walk.reverse() ? walk.T() : length) {}

  // In the i-th place, whose first row is known; not active where there is no such place.
  LSTM_EXT_DEVICE Turn turn(const Walk& walk, int i, unsigned first_row) const {
    const bool active = i >= begin_ && i < end_;
    const int t = walk.step_at(i);
    return {t,
            b_,
            walk.row_from(first_row, b_),
            active,
            active && i == begin_,
            active && i + 1 == end_,
            active && walk.marked(t, b_)};
  }

 private:
  int b_ = 0, begin_ = 0, end_ = 0;  // the places that the sequence takes
};

// ---- arguments of the kernels
// ----------------------------------------------------------------------

struct ForwardArgs {
  struct Direction : CudaForwardDirection {
    void* state;  // storage [2][B][K]: h as the i-th step finds it lies in [i % 2], resets applied
    void* cells;  // acc [B][H]: c
    void* product;  // acc [B][4H]: h W_hh^T, for the kernel that does all else; null: none
    void* hidden;   // storage [B][hidden_K]: o * tanh(c) before the projection; null: none
    unsigned* counters;
  };
  Steps steps;
  int H, P, K, hidden_K;
  int64_t counter_words;  // of a direction's counters, or (family tagged) of what blocks exchange
  BlockShape shape;
  Direction direction[kMaxDirections];
};

struct BackwardArgs {
  struct Direction : CudaBackwardDirection {
    void* state;   // storage [2][B][K]: dgates of the j-th step taken backwards in [j % 2], zero
                   // where no gradient goes further back
    void* hidden;  // storage [B][hidden_K]: gradient of h before the projection; null: none
    void* cells;   // acc [B][H]: gradient of c
    // The product, for the kernel that does all else: acc [B][H]; with a layer norm, whose kernel
    // puts more there, the first H of acc [B][6H]; null: none.
    void* product;
    void* carry;  // acc [B][P]: gradient of h that waits for another step
    unsigned* counters;
  };
  Steps steps;
  int H, P, K, hidden_K;  // K: padded(4H); hidden_K: padded(P)
  int64_t counter_words;
  BlockShape shape;  // steps 0 to T - 1 are the sequence's from the last taken, T makes dh0
  Direction direction[kMaxDirections];
};

}  // namespace lstm_ext
