// What the cluster kernels of both passes share: which block does what, and the exchange between
// steps.
#pragma once

#include "cuda/cells.cuh"
#include "cuda/cluster.cuh"

#ifdef LSTM_EXT_CLUSTERS
namespace lstm_ext {

// A cluster has the sequences of one group and one direction, each of its blocks one slice of the
// hidden units. Clusters may have more blocks than there are slices: sizes are powers of two.
struct ClusterPlace {
  int slice, slices, group, direction;
  int row_first, row_end;  // sequences of the group

  LSTM_EXT_DEVICE ClusterPlace(const BlockShape& shape, int B) {
    const int cluster = int(blockIdx.x / cluster_size());
    slice = int(cluster_rank());
    slices = shape.slices;
    group = cluster % shape.groups;
    direction = cluster / shape.groups;
    row_first = group * shape.group_rows;
    row_end = min(B, row_first + shape.group_rows);
  }
  LSTM_EXT_DEVICE int rows() const { return row_end - row_first; }
};

// Two mailboxes in turn, each with an mbarrier that counts the bytes as they come. A block sends
// what belongs to step n + 1 only when it has received all of step n, and by then its peers have
// read all of step n - 1: two mailboxes are enough, and nobody waits for anything else. What it has
// sent of step n its peers have by the time it has received theirs of step n + 1: two copies of what
// is sent are enough, too.
//
// Bulk copies, one to each peer: on an H100 in clusters of 16 a step takes 1200 cycles with 512
// bytes for each peer and 1310 with 1024, st.async of 16 bytes each 1940 and 2930.
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
  // Nobody leaves while a peer may still send to it.
  static LSTM_EXT_DEVICE void close() { cluster_sync(); }

  // Mailbox `box` will get so many bytes; called once for each time it fills.
  LSTM_EXT_DEVICE void expect(int box, int bytes) {
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&full_[box], unsigned(bytes));
  }
  // Waits for mailbox `box` to be full for the (count + 1)-th time.
  LSTM_EXT_DEVICE void wait(int box, int count) { mbarrier_wait(&full_[box], count % 2); }

 private:
  friend class Letter;
  uint64_t* full_;
};

// The peer that this thread copies to: two lanes of each warp have one, since copies that one warp
// asks for start one after the other. -1: none.
LSTM_EXT_DEVICE int peer_to_copy_to(int slices) {
  static_assert(2 * kWarps >= kMostBlocksOfCluster, "a lane for each peer");
  const int lane = threadIdx.x % 32, peer = threadIdx.x / 32 + lane * kWarps;
  return lane < 2 && peer < slices ? peer : -1;
}

// Where a thread sends something step by step: a place in a peer's first mailbox, the second box
// `box_bytes` behind it.
class Letter {
 public:
  LSTM_EXT_DEVICE Letter(const Mailboxes& mailboxes, int peer, const void* place, int box_bytes)
      : to_(map_to_rank(shared_address(place), unsigned(peer))),
        full_(map_to_rank(shared_address(mailboxes.full_), unsigned(peer))),
        box_bytes_(box_bytes) {}

  LSTM_EXT_DEVICE void send(int box, const uint4& bytes) const {
    st_async(to_ + box * box_bytes_, bytes, full_ + box * 8);
  }
  LSTM_EXT_DEVICE void copy(int box, const void* from, int bytes) const {
    copy_async(to_ + box * box_bytes_, from, unsigned(bytes), full_ + box * 8);
  }

 private:
  shared_addr to_, full_;
  int box_bytes_;
};

}  // namespace lstm_ext
#endif
