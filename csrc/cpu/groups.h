// Groups of sequences, and the directions of a layer, each with memory and threads of its own.
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
  Groups(const P& p, Arena& arena) : plan_(Part::plan(p)) {
    everyone_ = take_barrier(arena, plan_.threads());
    parts_ = arena.take<Part>(plan_.groups);
    for (int group = 0; group < plan_.groups; ++group) {
      if (group) arena.next_page();
      const Part part(p, share(p.steps.B, plan_.groups, group), plan_.slices, arena);
      if (parts_) new (parts_ + group) Part(part);
    }
  }

  int threads() const { return plan_.threads(); }

  // One thread's work of `granted`, which may be fewer than the plan has: then teams take groups in
  // turn.
  void work(int thread, int granted) const {
    const int slices = std::min(plan_.slices, std::max(1, granted / plan_.groups));
    const int teams = std::min(plan_.groups, granted / slices);
    if (thread >= teams * slices) return;
    for (int group = thread / slices; group < plan_.groups; group += teams) {
      parts_[group].work(slices, thread % slices);
    }
    if (plan_.groups > 1) {
      Part::combine(parts_, plan_.groups, *everyone_, teams * slices, thread);
    }
  }

 private:
  Plan plan_;
  Barrier* everyone_;
  Part* parts_;
};

// One direction of a layer, with all threads.
template <class Part, class P>
class OneDirection {
 public:
  explicit OneDirection(const P& p) : arena_(p.workspace), groups_(p, arena_) {}

  int64_t workspace() const { return arena_.used(); }

  void run() const {
    run_team(groups_.threads(), [this](int thread, int threads) { groups_.work(thread, threads); });
  }

 private:
  Arena arena_;
  const Groups<Part, P> groups_;
};

// Both directions of a layer at once, each with half of the threads: they need nothing of each
// other. For parameters of which Part::side_by_side() says so.
template <class Part, class P>
class SideBySide {
 public:
  explicit SideBySide(const OfTwo<P>& p)
      : p_{half(p), half(p.second)},
        arena_(p.workspace),
        first_(p_[0], arena_),
        second_(p_[1], next_page(arena_)) {}

  int64_t workspace() const { return arena_.used(); }

  void run() const {
    const int own = first_.threads(), others = second_.threads();
    run_team(own + others, [&](int thread, int granted) {
      if (granted < own + others) {  // one after the other
        first_.work(thread, granted);
        second_.work(thread, granted);
      } else if (thread < own) {
        first_.work(thread, own);
      } else {
        second_.work(thread - own, others);
      }
    });
  }

 private:
  static P half(P p) {
    p.threads /= 2;
    return p;
  }
  static Arena& next_page(Arena& arena) {
    arena.next_page();
    return arena;
  }

  const P p_[2];
  Arena arena_;
  const Groups<Part, P> first_, second_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
