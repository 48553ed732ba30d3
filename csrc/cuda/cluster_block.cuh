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
// read all of step n - 1: two mailboxes are enough, and nobody waits for anything else.
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

  // 16 bytes to `place` of a peer's mailbox; place is the address in this block.
  LSTM_EXT_DEVICE void send(int peer, int box, shared_addr place, const uint4& bytes) {
    st_async(map_to_rank(place, peer), bytes, map_to_rank(shared_address(&full_[box]), peer));
  }

 private:
  uint64_t* full_;
};

}  // namespace lstm_ext
#endif
