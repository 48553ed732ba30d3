// What the kernels that keep all of their weights share: which block does what, and the exchange of
// a cluster between steps.
#pragma once

#include "cuda/block.cuh"
#include "cuda/cluster.cuh"

#ifdef LSTM_EXT_CLUSTERS
namespace lstm_ext {

// The blocks that exchange have the sequences of one group and one direction, each of them one
// slice of the hidden units. The grid's y is the direction, for the compiler sees that it is the
// same for all threads: addresses are then added up beside what they compute.
struct SlicePlace {
  int slice, slices, group, direction;
  int row_first, row_end;  // sequences of the group

  LSTM_EXT_DEVICE SlicePlace(const BlockShape& shape, int B, int slice_, int group_) {
    slice = slice_;
    slices = shape.slices;
    group = group_;
    direction = int(blockIdx.y);
    row_first = group * shape.group_rows;
    row_end = min(B, row_first + shape.group_rows);
  }
  LSTM_EXT_DEVICE int rows() const { return row_end - row_first; }
};
// Clusters may have more blocks than there are slices: sizes are powers of two.
struct ClusterPlace : SlicePlace {
  LSTM_EXT_DEVICE ClusterPlace(const BlockShape& shape, int B)
      : SlicePlace(shape, B, int(cluster_rank()), int(blockIdx.x / cluster_size())) {}
};

// Blocks of a grid: one group's slices, then the next one's.
struct GridPlace : SlicePlace {
  LSTM_EXT_DEVICE GridPlace(const BlockShape& shape, int B)
      : SlicePlace(shape, B, int(blockIdx.x) % shape.slices, int(blockIdx.x) / shape.slices) {}
};

// Two mailboxes in turn, each with an mbarrier that counts the bytes as they come. A block sends
// what belongs to step n + 1 only when it has received all of step n, and by then its peers have
// read all of step n - 1: two mailboxes are enough, and nobody waits for anything else. What it has
// sent of step n its peers have by the time it has received theirs of step n + 1: two copies of
// what is sent are enough, too.
//
// Bulk copies, one to each peer, asked for by different warps: on an H100 a step of nothing else
// takes in a cluster of 16 blocks 580, 950 and 1360 cycles for 128, 512 and 1024 bytes a peer, in
// one of 8 510, 640 and 850; st.async of 16 bytes each 920, 2060 and 2920, and 720, 930 and 1170.
class Mailboxes {
 public:
  LSTM_EXT_DEVICE explicit Mailboxes(unsigned char* memory)
      : full_(reinterpret_cast<uint64_t*>(memory)) {}

  // By all of the cluster, whose shared memory is then ready for what peers send.
  LSTM_EXT_DEVICE void open() {
    if (threadIdx.x == 0) {
      mbarrier_init(&full_[0], 1);
      mbarrier_init(&full_[1], 1);
      fence_mbarrier_init();
    }
    copies_see();  // what was written here before; peers' copies may follow on it
    cluster_sync();
  }
  // All that a block without units has to do.
  static LSTM_EXT_DEVICE void stand_by(unsigned char* memory) {
    Mailboxes(memory).open();
    close();
  }
  // Nobody leaves while a peer may still send to it, or has not got what it was sent.
  static LSTM_EXT_DEVICE void close() { cluster_sync(); }

  // Mailbox `box` will get so many bytes; called once for each time it fills.
  LSTM_EXT_DEVICE void expect(int box, int bytes) {
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&full_[box], unsigned(bytes));
  }
  // Waits for mailbox `box` to be full for the (count + 1)-th time.
  LSTM_EXT_DEVICE void wait(int box, int count) { mbarrier_wait(&full_[box], count & 1); }

 private:
  friend class Letter;
  uint64_t* full_;
};

// What a thread sends to a peer step by step: to a place in its first mailbox, the second box
// `box_bytes` behind it. Two lanes of each warp have a peer: what one warp asks for starts one
// after the other.
class Letter {
 public:
  LSTM_EXT_DEVICE Letter(const Mailboxes& mailboxes, int slices, const void* place, int box_bytes)
      : box_bytes_(box_bytes) {
    static_assert(2 * kWarps >= kMostBlocksOfCluster, "a lane for each peer");
    const int lane = threadIdx.x % 32;
    if (lane < 2 && threadIdx.x / 32 + lane * kWarps < unsigned(slices))
      peer_ = threadIdx.x / 32 + lane * kWarps;
    peer_ = pinned(peer_);
    const unsigned rank = peer_ < 0 ? 0 : unsigned(peer_);
    to_ = map_to_rank(shared_address(place), rank);
    full_ = map_to_rank(shared_address(mailboxes.full_), rank);
  }

  // Copies to the thread's peer the `bytes` that lie at from + peer * stride. After copies_see() of
  // those who wrote them, and a barrier.
  LSTM_EXT_DEVICE void send(int box, const unsigned char* from, int stride, int bytes) const {
    if (peer_ >= 0)
      copy_async(to_ + box * box_bytes_, from + peer_ * stride, unsigned(bytes), full_ + box * 8);
  }

 private:
  int peer_ = -1;  // none
  shared_addr to_, full_;
  int box_bytes_;
};

// What a thread's cells need of a step from global memory, fetched a step before it is used.
template <int kWords, int kCells>
struct Ahead : FetchedWords<kWords> {
  using FetchedWords<kWords>::FetchedWords;

  static LSTM_EXT_DEVICE int slot(int step, int cell) { return step % 2 * kCells + cell; }
  // Ends what is fetched for a step; called for each, whether or not there was anything.
  LSTM_EXT_DEVICE void close() { async_commit(); }
  // All but the step that was closed last is here.
  LSTM_EXT_DEVICE void wait() { async_wait<1>(); }
};

}  // namespace lstm_ext
#endif
