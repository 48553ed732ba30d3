// How a block of cluster_forward.cuh gets h of its peers' units, and they that of its own.
#pragma once

#include "cuda/cluster_block.cuh"
#include "cuda/words.cuh"

namespace lstm_ext {

// Names of kernels, everywhere.
template <class Arithmetic>
class ThroughCluster;
template <class Arithmetic>
class ThroughL2;

#ifdef LSTM_EXT_CLUSTERS
// [2] states of all units in shared memory, as StateInShared has them: h as the i-th step finds it
// lies in [i % 2]. Behind them [2] this block's part, likewise.
struct StateBoxes {
  unsigned char* states;
  int bytes, slice_bytes;  // of a state, of a part
  int rows;                // that a state has room for

  LSTM_EXT_DEVICE unsigned char* state(int i) const { return states + (i & 1) * bytes; }
  LSTM_EXT_DEVICE unsigned char* own(int i) const {
    return states + 2 * bytes + (i & 1) * slice_bytes;
  }
  LSTM_EXT_DEVICE unsigned char* end() const { return states + 2 * (bytes + slice_bytes); }
};

// An Exchange has: Place; kCluster, whether it is a cluster's, which has spare blocks and may do a
// part of the steps, else a block puts zeros where it has cells past the last unit; open() and
// close(), by all of a group; and of the state that step i finds: put(), an element of this block's
// part, then send(); expect(), before any block can have sent it; receive(i, n), the launch's (n +
// 1)-th, after which all of the block may read it. put() counts elements from first_element().

// Through distributed shared memory, by bulk copies: `own` keeps this block's part until all peers
// have it.
template <class Arithmetic>
class ThroughCluster {
  using T = typename Arithmetic::Element;

 public:
  using Place = ClusterPlace;
  static constexpr bool kCluster = true;

  LSTM_EXT_DEVICE ThroughCluster(unsigned char* memory, const ForwardArgs::Direction&,
                                 const Place& place, const StateBoxes& boxes, int)
      : mailboxes_(memory),
        boxes_(boxes),
        letter_(mailboxes_, place.slices, boxes.states + place.slice * boxes.slice_bytes,
                boxes.bytes),
        slices_(place.slices) {}
  LSTM_EXT_DEVICE int first_element(const Place& place) const {
    return place.slice * (boxes_.slice_bytes / int(sizeof(T)));
  }

  LSTM_EXT_DEVICE void open() { mailboxes_.open(); }
  LSTM_EXT_DEVICE void close() { mailboxes_.close(); }
  LSTM_EXT_DEVICE void expect(int i) { mailboxes_.expect(i & 1, slices_ * boxes_.slice_bytes); }
  LSTM_EXT_DEVICE void receive(int i, int n) { mailboxes_.wait(i & 1, n >> 1); }
  LSTM_EXT_DEVICE void put(int i, int element, T h) {
    reinterpret_cast<T*>(boxes_.own(i))[element] = h;
  }
  LSTM_EXT_DEVICE void send(int i) {
    copies_see();
    __syncthreads();  // all of this block's part is there
    letter_.send(i & 1, boxes_.own(i), 0, boxes_.slice_bytes);
  }

 private:
  Mailboxes mailboxes_;
  StateBoxes boxes_;
  Letter letter_;
  int slices_;
};

// Through L2, an element as a word of 4 bytes that carries the number of its step (words.cuh): h
// takes a store's and a load's time, where a barrier takes those twice.
//
// Two buffers in turn are enough: a block puts what step i + 1 finds when it has all of what step i
// finds, and each peer has put its part of that with all of its own threads past step i - 1.
template <class Arithmetic>
class ThroughL2 {
  using T = typename Arithmetic::Element;
  static constexpr bool kHalf = sizeof(T) == 2;
  // 16-bit elements have their step in the other half; TF32 in the 13 bits that it does not have.
  static constexpr uint32_t kTagBits = kHalf ? 0xffff0000 : 0x1fff;
  static constexpr int kLoads = kHalf ? 2 : 1;  // of words, for a vector of elements

 public:
  using Place = GridPlace;
  static constexpr bool kCluster = false;

  // A direction's words, which are zero before the launch, and the first state that is put has
  // number 1: [groups][2][as the elements of a state].
  LSTM_EXT_DEVICE ThroughL2(unsigned char*, const ForwardArgs::Direction& d, const Place& place,
                            const StateBoxes& boxes, int H)
      : elements_(boxes.bytes / int(sizeof(T))), states_(boxes.states + threadIdx.x * 16) {
    words_ = d.counters + size_t(place.group) * 2 * elements_;
    // kThreads vectors are whole multiples of 4 k's: all of the thread's are of one sequence.
    const int vector = int(threadIdx.x), k = vector / boxes.rows;
    const int row = vector % boxes.rows ^ StateInShared::swapped(k, boxes.rows);
    const int vectors = (H * int(sizeof(T)) + 15) / 16 * boxes.rows;
    if (row < place.rows() && vector < vectors)
      count_ = (vectors - vector + kThreads - 1) / kThreads;
  }
  LSTM_EXT_DEVICE int first_element(const Place&) const { return 0; }

  LSTM_EXT_DEVICE void open() { __syncthreads(); }  // the block's first state is there
  LSTM_EXT_DEVICE void close() {}
  LSTM_EXT_DEVICE void expect(int) {}
  LSTM_EXT_DEVICE void put(int i, int element, T h) {
    store_word(words_ + (i & 1) * elements_ + element, word_of(h) | tag(i));
  }
  LSTM_EXT_DEVICE void send(int) {}

  LSTM_EXT_DEVICE void receive(int i, int) {
    const uint4* from = reinterpret_cast<const uint4*>(words_ + (i & 1) * elements_);
    uint4* const to = reinterpret_cast<uint4*>(states_ + (i & 1) * (elements_ * int(sizeof(T))));
    const uint32_t expected = tag(i);
    take_words<kLoads>(
        from + threadIdx.x * kLoads, kThreads * kLoads, 1, count_,
        [&](const uint4(&words)[kLoads]) {
          uint32_t different = 0;
          for (const uint4& w : words)
            different |= (w.x ^ expected) | (w.y ^ expected) | (w.z ^ expected) | (w.w ^ expected);
          return !(different & kTagBits);
        },
        [&](int n, const uint4(&words)[kLoads]) { to[n * kThreads] = elements_of(words); });
    __syncthreads();  // other threads' vectors too
  }

 private:
  static LSTM_EXT_DEVICE uint32_t tag(int i) { return kHalf ? uint32_t(i) << 16 : i & kTagBits; }
  static LSTM_EXT_DEVICE uint32_t word_of(T h) {
    uint32_t bits = 0;
    memcpy(&bits, &h, sizeof(T));
    return bits & ~kTagBits;
  }
  static LSTM_EXT_DEVICE uint4 elements_of(const uint4 (&words)[kLoads]) {
    if constexpr (kHalf) {
      const uint4 &a = words[0], &b = words[1];
      const auto pair = [](uint32_t lo, uint32_t hi) { return (lo & 0xffff) | hi << 16; };
      return make_uint4(pair(a.x, a.y), pair(a.z, a.w), pair(b.x, b.y), pair(b.z, b.w));
    } else {
      // PTX leaves it to the architecture what a tensor core makes of bits that TF32 has not.
      const uint4& w = words[0];
      return make_uint4(w.x & ~kTagBits, w.y & ~kTagBits, w.z & ~kTagBits, w.w & ~kTagBits);
    }
  }

  int elements_;  // of a state
  unsigned char* states_;
  unsigned* words_;
  int count_ = 0;  // of the thread's vectors, kThreads apart
};

#endif

}  // namespace lstm_ext
