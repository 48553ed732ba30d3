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

// A lane has of a product of an m-tile by 8 sequences: rows g and g + 8 of columns 2 pair and 2
// pair
// + 1. Columns of sequences that the group does not have go nowhere.
struct LaneOfProduct {
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
};

// The vectors of a part in shared memory: [pairs of columns][kMTiles][rows g and g + 8 of 8], each
// of row g's two columns and row g + 8's. In another order of the g's for each pair, and of a
// vector's columns in odd m-tiles: then what the threads of a warp write or read together lies in
// different banks.
template <int kMTiles>
LSTM_EXT_DEVICE int vector_of(int pair, int m, int g) {
  return (pair * kMTiles + m) * 8 + (g ^ pair % 4 * 2);
}
// Where the sum of a unit and a sequence lies there.
template <int kMTiles>
LSTM_EXT_DEVICE int word_of(int unit, int row) {
  const int m = unit / 16;
  return vector_of<kMTiles>(row / 2, m, unit % 8) * 4 + unit % 16 / 8 * 2 + (row % 2 ^ m % 2);
}

// An Exchange has: Place; with kSpareBlocks stand_by(), for blocks of a group without units; end(),
// of its shared memory; open() and close(), by all of a group; column(), the sequence that the lane
// is to multiply as its column g. And of the parts of step j, of the launch's n-th with parts from
// 0: expect(), before any block can have sent it; put(), the product with the warp's q-th m-tile
// (of all units: warp + q * kWarps) and the n-th n-tile, then send(); receive(), after which sum()
// is that of one of the thread's cells: its unit and sequence `row` of the group.

// Through distributed shared memory, by bulk copies.
template <int kMTiles, int kNTiles>
class PartsThroughCluster {
 public:
  using Place = ClusterPlace;
  static constexpr bool kSpareBlocks = true;

  static LSTM_EXT_DEVICE void stand_by(unsigned char* memory) {
    Mailboxes mailboxes(memory);
    mailboxes.open();
    mailboxes.close();
  }
  // unit: of the block's own, that of the thread's cells; row: of its first.
  LSTM_EXT_DEVICE PartsThroughCluster(unsigned char* memory, const BackwardArgs::Direction&,
                                      const Place& place, const BlockShape& shape, int, int unit,
                                      int row)
      : part_bytes_(int(backward_part_bytes({kMTiles, kNTiles, 0}, shape.group_rows))),
        parts_bytes_(place.slices * part_bytes_),
        slices_(place.slices),
        pairs_((place.rows() + 1) / 2),
        unit_(unit),
        boxes_(memory + kBarrierBytes),
        letters_(boxes_ + 2 * parts_bytes_),
        mailboxes_(memory),
        letter_(mailboxes_, slices_, boxes_ + place.slice * part_bytes_, parts_bytes_),
        first_sum_(pinned(sum_of(row))),
        column_(pinned(kAlike ? lane_.g ^ lane_.warp % kMTiles % 2 : lane_.g)),
        first_put_(pinned(lane_.warp / kMTiles * part_bytes_ +
                          vector_of<kMTiles>(lane_.pair, lane_.warp % kMTiles, lane_.g) * 16)) {}

  LSTM_EXT_DEVICE unsigned char* end() const { return letters_ + 2 * parts_bytes_; }
  LSTM_EXT_DEVICE int column() const { return column_; }
  LSTM_EXT_DEVICE void open() { mailboxes_.open(); }
  LSTM_EXT_DEVICE void close() { mailboxes_.close(); }
  LSTM_EXT_DEVICE void expect(int j) { mailboxes_.expect(j & 1, slices_ * bytes()); }
  LSTM_EXT_DEVICE void put(int j, int q, int n, const float (&sum)[4]) const {
    if (n * 4 + lane_.pair >= pairs_) return;
    unsigned char* const parts = letters(j);
    const uint32_t bits[4] = {__float_as_uint(sum[0]), __float_as_uint(sum[1]),
                              __float_as_uint(sum[2]), __float_as_uint(sum[3])};
    if constexpr (kAlike) {
      unsigned char* const part = parts + first_put_ + q * (kWarps / kMTiles) * part_bytes_;
      reinterpret_cast<uint4*>(part)[n * 4 * kMTiles * 8] =
          make_uint4(bits[0], bits[1], bits[2], bits[3]);
    } else {
      const int tile = lane_.warp + q * kWarps, m = tile % kMTiles;
      const int vector = vector_of<kMTiles>(n * 4 + lane_.pair, m, lane_.g);
      reinterpret_cast<uint4*>(parts + tile / kMTiles * part_bytes_)[vector] =
          m % 2 ? make_uint4(bits[1], bits[0], bits[3], bits[2])
                : make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
  }
  LSTM_EXT_DEVICE void send(int j) const {
    copies_see();
    __syncthreads();  // all warps have put theirs
    letter_.send(j & 1, letters(j), part_bytes_, bytes());
  }
  LSTM_EXT_DEVICE void receive(int j, int n) { mailboxes_.wait(j & 1, n >> 1); }
  LSTM_EXT_DEVICE float sum(int j, int cell, int row) const {
    const float* const sums = reinterpret_cast<const float*>(boxes_ + (j & 1) * parts_bytes_) +
                              (cell ? sum_of(row) : first_sum_);
    float part[kMostBlocksOfCluster];
#pragma unroll
    for (int source = 0; source < kMostBlocksOfCluster; ++source)
      part[source] = source < slices_ ? sums[source * (part_bytes_ / 4)] : 0;
    return sum_of_halves<kMostBlocksOfCluster>(part);
  }

 private:
  // All m-tiles of a warp may be of one kind: then its product has the columns in the part's order
  // from the start, and where a lane puts it is known but for the peer.
  static constexpr bool kAlike = kWarps % kMTiles == 0;

  LSTM_EXT_DEVICE int sum_of(int row) const { return word_of<kMTiles>(unit_, row); }
  LSTM_EXT_DEVICE int bytes() const { return pairs_ * kMTiles * 128; }
  LSTM_EXT_DEVICE unsigned char* letters(int j) const { return letters_ + (j & 1) * parts_bytes_; }

  LaneOfProduct lane_;
  int part_bytes_, parts_bytes_, slices_, pairs_, unit_;
  // [2] a part from each block; [2] one for each block, until it has it.
  unsigned char *boxes_, *letters_;
  Mailboxes mailboxes_;
  Letter letter_;
  int first_sum_, column_, first_put_;
};

// Through L2, in words that tell their step (words.cuh): a float can spare its last bit, and one is
// enough, for each word is stored at every second step and nobody sees an older one than the one
// before. Each warp adds up the parts of every kWarps-th block, and those sums are added up.
//
// Two buffers in turn are enough: a block puts its parts of step j + 2 when it has those of step j
// + 1, and each peer has put its own of that with all of its threads past step j.
template <int kMTiles, int kNTiles>
class PartsThroughL2 {
  static_assert(kNTiles == 1 && kWarps % kMTiles == 0, "a lane has a vector of an m-tile");

 public:
  using Place = GridPlace;
  static constexpr bool kSpareBlocks = false;

  // A direction's words, which are zero before the launch: [groups][2][slices][slices] parts, for
  // whom and from whom, as vectors of a lane: [kMTiles][8 rows g][pairs of columns].
  LSTM_EXT_DEVICE PartsThroughL2(unsigned char* memory, const BackwardArgs::Direction& d,
                                 const Place& place, const BlockShape& shape, int H, int unit,
                                 int row)
      : sums_(reinterpret_cast<float*>(memory + kBarrierBytes)), unit_(unit) {
    const int slices = place.slices, warp = lane_.warp;
    const int pairs = (shape.group_rows + 1) / 2;
    const int part = kMTiles * 8 * pairs, mine = lane_.g * pairs + lane_.pair;
    apart_ = 8 * pairs;
    stride_ = kWarps * part;
    put_stride_ = kWarps / kMTiles * slices * part;
    box_ = slices * slices * part;
    uint4* const words = reinterpret_cast<uint4*>(d.counters) + size_t(place.group) * 2 * box_;
    from_ = words + (place.slice * slices + warp) * part + mine;
    to_ = words + (warp / kMTiles * slices + place.slice) * part + warp % kMTiles * apart_ + mine;
    here_ = lane_.pair < (place.rows() + 1) / 2;
    if (here_) count_ = (slices - warp + kWarps - 1) / kWarps;
    m_tiles_ = min(kMTiles, (H + 15) / 16 - place.slice * kMTiles);
    first_sum_ = pinned(sum_of(row));
  }
  LSTM_EXT_DEVICE unsigned char* end() const {
    return reinterpret_cast<unsigned char*>(sums_ + kWarps * kWarpSums);
  }
  LSTM_EXT_DEVICE int column() const { return lane_.g; }
  LSTM_EXT_DEVICE void open() { __syncthreads(); }  // the block's first dgates are there
  LSTM_EXT_DEVICE void close() {}
  LSTM_EXT_DEVICE void expect(int) {}
  LSTM_EXT_DEVICE void put(int j, int q, int, const float (&sum)[4]) const {
    if (!here_) return;
    const uint32_t tag = tag_of(j);
    const auto word = [&](float x) { return (__float_as_uint(x) & ~1u) | tag; };
    store_words(to_ + (j & 1) * box_ + q * put_stride_,
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
            for (int i = 0; i < 4; ++i) sums[m][i] += __uint_as_float(bits[i] & ~1u);
          }
        });
    float4* const to = reinterpret_cast<float4*>(sums_ + lane_.warp * kWarpSums);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
      to[vector_of<kMTiles>(lane_.pair, m, lane_.g)] =
          m % 2 ? make_float4(sums[m][1], sums[m][0], sums[m][3], sums[m][2])
                : make_float4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
    __syncthreads();  // all warps' sums are there
  }
  LSTM_EXT_DEVICE float sum(int, int cell, int row) const {
    const float* const sums = sums_ + (cell ? sum_of(row) : first_sum_);
    float part[kWarps];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) part[warp] = sums[warp * kWarpSums];
    return sum_of_halves<kWarps>(part);
  }

 private:
  static constexpr int kWarpSums = kMTiles * 128;  // floats

  static LSTM_EXT_DEVICE uint32_t tag_of(int j) { return ~((j - 1) >> 1) & 1; }
  LSTM_EXT_DEVICE int sum_of(int row) const { return word_of<kMTiles>(unit_, row); }

  LaneOfProduct lane_;
  float* sums_;  // [kWarps][4 pairs][kMTiles][8] vectors
  int unit_, first_sum_;
  uint4 *from_, *to_;
  int apart_, stride_, put_stride_, box_, count_ = 0, m_tiles_;
  bool here_;
};
#endif

}  // namespace lstm_ext
