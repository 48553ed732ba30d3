// Groups of sequences, each with memory and threads of its own.
//
// Groups need nothing of each other until their sums of weights' gradients are added up. Where two
// cores do not share an L3, a line takes six times as long from one to the other, and a line to be
// written that the other has read is slower still. T 50, B 64, H 128 on two threads, GFLOP/s in one
// run (Zen 4): threads that share the units 161 forward and 130 backward, two groups 191 and 188;
// while the cores shared an L3, 192 and 176, 196 and 189.
#pragma once

#include <new>

#include "sequence.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// Part: Forward or Backward of one group, P: their parameters.
//   Part::plan(p)                     the groups, and the threads of each
//   Part(p, sequences, slices, arena)  one group's, with its workspace from the arena
//   work(slices, slice)               the work of one of its threads
//   Part::combine(parts, groups, everyone, threads, thread)  one thread's part of what follows, if
//                                     there are several groups: everyone is where all threads meet
template <class Part, class P>
class Groups {
 public:
  explicit Groups(const P& p) : plan_(Part::plan(p)) {
    Arena arena(p.workspace);
    everyone_ = take_barrier(arena, plan_.threads());
    parts_ = arena.take<Part>(plan_.groups);
    for (int group = 0; group < plan_.groups; ++group) {
      if (group) arena.next_page();
      const Part part(p, share(p.steps.B, plan_.groups, group), plan_.slices, arena);
      if (parts_) new (parts_ + group) Part(part);
    }
    workspace_ = arena.used();
  }

  int64_t workspace() const { return workspace_; }

  // OpenMP may grant fewer threads than the plan has: then teams take groups in turn.
  void run() {
    run_team(plan_.threads(), [this](int thread, int granted) {
      const int slices = std::min(plan_.slices, std::max(1, granted / plan_.groups));
      const int teams = std::min(plan_.groups, granted / slices);
      if (thread >= teams * slices) return;
      for (int group = thread / slices; group < plan_.groups; group += teams) {
        parts_[group].work(slices, thread % slices);
      }
      if (plan_.groups > 1) {
        Part::combine(parts_, plan_.groups, *everyone_, teams * slices, thread);
      }
    });
  }

 private:
  Plan plan_;
  Barrier* everyone_;
  Part* parts_;
  int64_t workspace_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
