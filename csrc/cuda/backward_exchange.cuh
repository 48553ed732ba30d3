// How the blocks of cluster_backward.cuh get their units' gradients of h. Each block has a part of
// every unit's, which it makes by products of 16 units at a time, in fp32, and gives to the block
// that has the unit; that one adds up the parts of all blocks, in an order of its own.
#pragma once

#include "cuda/cluster_block.cuh"
#include "cuda/words.cuh"

namespace lstm_ext {

// Names of kernels, everywhere. kMTiles, kNTiles: of a block.
template <int kMTiles, int kNTiles>
class PartsThroughCluster;
template <int kMTiles, int kNTiles>
class PartsThroughL2;

#ifdef LSTM_EXT_CLUSTERS
// log2(kCount) additions one after another, not kCount.
template <int kCount, class Acc>
LSTM_EXT_DEVICE Acc sum_of_halves(const Acc* terms) {
  if constexpr (kCount == 1) {
    return *terms;
  } else {
    return sum_of_halves<kCount / 2>(terms) + sum_of_halves<kCount / 2>(terms + kCount / 2);
  }
}

// An Exchange has: Place; kCluster, whether it is a cluster's, which has spare blocks and may do a
// part of the steps; end(), of its shared memory; open() and close(), by all of a group; column(),
// the sequence that the lane is to multiply as its column g. And of the parts of step j, of the
// launch's n-th with parts from 0: expect(), before any block can have sent it; put() to its
// target(), the product with the warp's q-th m-tile (of all units: warp + q * kWarps) and the n-th
// n-tile, then send(); receive(), after which sum() is that of one of the thread's cells: its unit
// and sequence `row` of the group.

// What both have: how parts lie in shared memory. A lane has of a product of an m-tile by 8
// sequences rows g and g + 8 of columns 2 pair and 2 pair + 1; columns of sequences that the group
// does not have go nowhere. A part is [pairs][kMTiles][8] vectors, each of row g's two columns and
// row g + 8's: in another order of the g's for each pair, and of a vector's columns in odd m-tiles,
// so that what the threads of a warp write or read together lies in different banks.
template <int kMTiles>
class PartsInShared {
 protected:
  // All m-tiles of a warp may be of one kind: then its product has the columns in the part's order
  // from the start, and where a lane puts it is known but for the peer.
  static constexpr bool kAlike = kWarps % kMTiles == 0;

  // unit: of the block's own, that of the thread's cells; row: of its first.
  LSTM_EXT_DEVICE PartsInShared(int unit, int row)
      : unit_(unit),
        first_sum_(pinned(word_of(row))),
        column_(pinned(kAlike ? g ^ warp % kMTiles % 2 : g)) {}

  static LSTM_EXT_DEVICE int vector_of(int pair, int m, int g) {
    return (pair * kMTiles + m) * 8 + (g ^ pair % 4 * 2);
  }
  // Of the sums of a part, that of a cell of the thread.
  LSTM_EXT_DEVICE int sum_place(int cell, int row) const {
    return cell ? word_of(row) : first_sum_;
  }

  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;

 public:
  LSTM_EXT_DEVICE int column() const { return column_; }

 private:
  LSTM_EXT_DEVICE int word_of(int row) const {
    const int m = unit_ / 16, word = unit_ % 16 / 8 * 2 + (row % 2 ^ m % 2);
    return vector_of(row / 2, m, unit_ % 8) * 4 + word;
  }

  int unit_, first_sum_, column_;
};

// Through distributed shared memory, by bulk copies.
template <int kMTiles, int kNTiles>
class PartsThroughCluster : public PartsInShared<kMTiles> {
  using Base = PartsInShared<kMTiles>;
  using Base::kAlike, Base::warp, Base::g, Base::pair, Base::vector_of;

 public:
  using Place = ClusterPlace;
  using Target = unsigned char*;
  static constexpr bool kCluster = true;

  LSTM_EXT_DEVICE PartsThroughCluster(unsigned char* memory, const BackwardArgs::Direction&,
                                      const Place& place, const BlockShape& shape, int, int unit,
                                      int row)
      : Base(unit, row),
        part_bytes_(int(backward_part_bytes({kMTiles, kNTiles, 0}, shape.group_rows))),
        parts_bytes_(place.slices * part_bytes_),
        slices_(place.slices),
        pairs_((place.rows() + 1) / 2),
        boxes_(memory + kBarrierBytes),
        letters_(boxes_ + 2 * parts_bytes_),
        mailboxes_(memory),
        letter_(mailboxes_, slices_, boxes_ + place.slice * part_bytes_, parts_bytes_),
        first_put_(pinned(warp / kMTiles * part_bytes_ + vector_of(pair, warp % kMTiles, g) * 16)) {
  }

  LSTM_EXT_DEVICE unsigned char* end() const { return letters_ + 2 * parts_bytes_; }
  LSTM_EXT_DEVICE void open() { mailboxes_.open(); }
  LSTM_EXT_DEVICE void close() { mailboxes_.close(); }
  LSTM_EXT_DEVICE void expect(int j) { mailboxes_.expect(j & 1, slices_ * bytes()); }
  LSTM_EXT_DEVICE Target target(int j) const { return letters_ + (j & 1) * parts_bytes_; }
  LSTM_EXT_DEVICE void put(Target parts, int q, int n, const float (&sum)[4]) const {
    if (n * 4 + pair >= pairs_) return;
    const uint32_t bits[4] = {__float_as_uint(sum[0]), __float_as_uint(sum[1]),
                              __float_as_uint(sum[2]), __float_as_uint(sum[3])};
    if constexpr (kAlike) {
      unsigned char* const part = parts + first_put_ + q * (kWarps / kMTiles) * part_bytes_;
      reinterpret_cast<uint4*>(part)[n * 4 * kMTiles * 8] =
          make_uint4(bits[0], bits[1], bits[2], bits[3]);
    } else {
      const int tile = warp + q * kWarps, m = tile % kMTiles;
      reinterpret_cast<uint4*>(parts +
                               tile / kMTiles * part_bytes_)[vector_of(n * 4 + pair, m, g)] =
          m % 2 ? make_uint4(bits[1], bits[0], bits[3], bits[2])
                : make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
  }
  LSTM_EXT_DEVICE void send(int j) const {
    copies_see();
    __syncthreads();  // all warps have put theirs
    letter_.send(j & 1, target(j), part_bytes_, bytes());
  }
  LSTM_EXT_DEVICE void receive(int j, int n) { mailboxes_.wait(j & 1, n >> 1); }
  LSTM_EXT_DEVICE float sum(int j, int cell, int row) const {
    const unsigned char* const sums =
        boxes_ + (j & 1) * parts_bytes_ + this->sum_place(cell, row) * int(sizeof(float));
    float part[kMostBlocksOfCluster];
#pragma unroll
    for (int source = 0; source < kMostBlocksOfCluster; ++source)
      part[source] =
          source < slices_ ? *reinterpret_cast<const float*>(sums + source * part_bytes_) : 0;
    return sum_of_halves<kMostBlocksOfCluster>(part);
  }

 private:
  LSTM_EXT_DEVICE int bytes() const { return pairs_ * kMTiles * 128; }

  int part_bytes_, parts_bytes_, slices_, pairs_;
  // [2] a part from each block; [2] one for each block, until it has it.
  unsigned char *boxes_, *letters_;
  Mailboxes mailboxes_;
  Letter letter_;
  int first_put_;
};

// Through L2, in words that tell their step (words.cuh): a float can spare its last bit, and one is
// enough. A word is stored at every second step, and its reader is always the same thread, to which
// memory does not go back: it can see what was stored two steps ago, nothing older. Each warp adds
// up the parts of every kWarps-th block, and those sums are added up.
//
// Two buffers in turn are enough: a block puts its parts of step j + 2 when it has those of step j
// + 1, some of each peer's, and a peer puts those when all of its threads have had all of step j:
// the loads have returned before its barriers in receive() and at the step's end.
template <int kMTiles, int kNTiles>
class PartsThroughL2 : public PartsInShared<kMTiles> {
  using Base = PartsInShared<kMTiles>;
  using Base::kAlike, Base::warp, Base::g, Base::pair, Base::vector_of;
  static_assert(kNTiles == 1 && kAlike, "a lane has a vector of an m-tile");

 public:
  using Place = GridPlace;
  struct Target {
    uint4* to;
    uint32_t tag;
  };
  static constexpr bool kCluster = false;

  // A direction's words, which are zero before the launch: [groups][2][slices][slices] parts, for
  // whom and from whom, as vectors of a lane: [kMTiles][8 rows g][pairs].
  LSTM_EXT_DEVICE PartsThroughL2(unsigned char* memory, const BackwardArgs::Direction& d,
                                 const Place& place, const BlockShape& shape, int H, int unit,
                                 int row)
      : Base(unit, row), sums_(reinterpret_cast<float*>(memory + kBarrierBytes)) {
    const int slices = place.slices, pairs = (shape.group_rows + 1) / 2;
    const int part = kMTiles * 8 * pairs, mine = g * pairs + pair;
    apart_ = 8 * pairs;
    stride_ = kWarps * part;
    put_stride_ = kWarps / kMTiles * slices * part;
    box_ = slices * slices * part;
    uint4* const words = reinterpret_cast<uint4*>(d.counters) + size_t(place.group) * 2 * box_;
    from_ = words + (place.slice * slices + warp) * part + mine;
    to_ = words + (warp / kMTiles * slices + place.slice) * part + warp % kMTiles * apart_ + mine;
    here_ = pair < (place.rows() + 1) / 2;
    if (here_) count_ = (slices - warp + kWarps - 1) / kWarps;
    m_tiles_ = min(kMTiles, (H + 15) / 16 - place.slice * kMTiles);
  }
  LSTM_EXT_DEVICE unsigned char* end() const {
    return reinterpret_cast<unsigned char*>(sums_ + kWarps * kWarpSums);
  }
  LSTM_EXT_DEVICE void open() { __syncthreads(); }  // the block's first dgates are there
  LSTM_EXT_DEVICE void close() {}
  LSTM_EXT_DEVICE void expect(int) {}
  LSTM_EXT_DEVICE Target target(int j) const { return {to_ + (j & 1) * box_, tag_of(j)}; }
  LSTM_EXT_DEVICE void put(Target target, int q, int, const float (&sum)[4]) const {
    if (!here_) return;
    const auto word = [&](float x) { return (__float_as_uint(x) & ~1u) | target.tag; };
    store_words(target.to + q * put_stride_,
                make_uint4(word(sum[0]), word(sum[1]), word(sum[2]), word(sum[3])));
  }
  LSTM_EXT_DEVICE void send(int) const {}

  LSTM_EXT_DEVICE void receive(int j, int) {
    float sums[kMTiles][4] = {};
    const uint32_t expected = tag_of(j);
    take_words<kMTiles>(
        from_ + (j & 1) * box_, stride_, apart_, count_,
        [&](const uint4(&words)[kMTiles]) {
          uint32_t different = 0;
#pragma unroll
          for (int m = 0; m < kMTiles; ++m)  // what has no units nobody puts
            if (m < m_tiles_)
              different |= (words[m].x ^ expected) | (words[m].y ^ expected) |
                           (words[m].z ^ expected) | (words[m].w ^ expected);
          return !(different & 1);
        },
        [&](int, const uint4(&words)[kMTiles]) {
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            const uint32_t bits[4] = {words[m].x, words[m].y, words[m].z, words[m].w};
#pragma unroll
            for (int i = 0; i < 4; ++i)  // with the bit, infinity would be no number
              sums[m][i] += __uint_as_float(bits[i] & ~1u);
          }
        });
    float4* const to = reinterpret_cast<float4*>(sums_ + warp * kWarpSums);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
      to[vector_of(pair, m, g)] = make_float4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
    __syncthreads();  // all warps' sums are there
  }
  LSTM_EXT_DEVICE float sum(int, int cell, int row) const {
    const float* const sums = sums_ + this->sum_place(cell, row);
    float part[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) part[w] = sums[w * kWarpSums];
    return sum_of_halves<kWarps>(part);
  }

 private:
  static constexpr int kWarpSums = kMTiles * 128;  // floats

  // 1 for the first two steps that have parts, whose words are still zero.
  static LSTM_EXT_DEVICE uint32_t tag_of(int j) { return ~((j - 1) >> 1) & 1; }

  float* sums_;  // [kWarps] of a part as above
  uint4 *from_, *to_;
  int apart_, stride_, put_stride_, box_, count_ = 0, m_tiles_;
  bool here_;
};
#endif

}  // namespace lstm_ext
