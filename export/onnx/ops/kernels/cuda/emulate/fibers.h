// The threads of a block as fibers of one thread.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATE_SWITCH(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define EMULATE_SWITCHED(saved, bottom, size) __sanitizer_finish_switch_fiber(saved, bottom, size)
#else
#define EMULATE_SWITCH(save, bottom, size) (void)(save)
#define EMULATE_SWITCHED(saved, bottom, size) (void)(saved)
#endif

namespace emulate {

enum class Order { kForward, kReversed, kRandom };

struct Fiber {
  static constexpr size_t kStack = 64 << 10;

  unsigned index = 0;
  bool started = false;
  void* place[5] = {};  // where it goes on
  void* fake_stack = nullptr;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context = {};
};

class Block {
 public:
  Order order = Order::kForward;
  Fiber* current = nullptr;

  [[noreturn]] static void fail(const char* reason) {
    std::fprintf(stderr, "emulated CUDA: %s\n", reason);
    std::abort();
  }

  // Runs the body in every thread.
  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    while (fibers_.size() < threads) fibers_.emplace_back(new Fiber);
    warps_.assign((threads + 31) / 32, {});
    alive_ = threads;
    for (unsigned i = 0; i < threads; ++i) {
      fibers_[i]->index = i;
      ready_.push_back(fibers_[i].get());
    }
    while (!ready_.empty()) resume(take());
    if (alive_ > 0) fail("threads wait for others that have ended, or that wait elsewhere");
  }

  void synchronize() {
    waiting_.push_back(current);
    if (waiting_.size() == alive_) release(waiting_);
    wait();
  }

  // The last lane of the warp to come acts for all of them.
  template <typename Act>
  void together(const char* name, void* mine, Act&& act) {
    Warp& warp = warps_[current->index / 32];
    if (warp.waiting.empty()) warp.name = name;
    if (warp.name != name) fail("a warp's lanes are in different operations");
    warp.lanes[current->index % 32] = mine;
    warp.waiting.push_back(current);
    if (warp.waiting.size() == 32) {
      act(warp.lanes);
      release(warp.waiting);
    }
    wait();
  }

 private:
  struct Warp {
    const char* name = nullptr;
    void* lanes[32] = {};
    std::vector<Fiber*> waiting;
  };

  Fiber* take() {
    if (order == Order::kRandom) std::swap(ready_.back(), ready_[random_() % ready_.size()]);
    Fiber* fiber = order == Order::kForward ? ready_.front() : ready_.back();
    order == Order::kForward ? ready_.pop_front() : ready_.pop_back();
    return fiber;
  }

  void release(std::vector<Fiber*>& waiting) {
    ready_.insert(ready_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }

  // Saving a place and going to one are compiler builtins here: setcontext would call into the kernel every time.
  __attribute__((noinline)) void resume(Fiber* fiber) {
    current = fiber;
    if (__builtin_setjmp(scheduler_) == 0) {
      EMULATE_SWITCH(&fake_stack_, fiber->stack.get(), Fiber::kStack);
      go(fiber);
    }
    EMULATE_SWITCHED(fake_stack_, nullptr, nullptr);
  }

  [[noreturn]] __attribute__((noinline)) void go(Fiber* fiber) {
    if (fiber->started) __builtin_longjmp(fiber->place, 1);
    fiber->started = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = Fiber::kStack;
    makecontext(&fiber->context, &Block::enter, 0);
    setcontext(&fiber->context);
    fail("no context");
  }

  __attribute__((noinline)) void wait() {
    if (__builtin_setjmp(current->place) == 0) leave();
    EMULATE_SWITCHED(current->fake_stack, nullptr, nullptr);
  }

  [[noreturn]] __attribute__((noinline)) void leave() {
    EMULATE_SWITCH(&current->fake_stack, scheduler_stack_, scheduler_size_);
    __builtin_longjmp(scheduler_, 1);
  }

  static void enter();

  const std::function<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::deque<Fiber*> ready_;
  std::vector<Fiber*> waiting_;
  size_t alive_ = 0;
  void* scheduler_[5] = {};
  void* fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  std::minstd_rand random_;
};

inline Block& block() {
  static Block block;
  return block;
}

// A fiber is used for one thread after the other.
inline void Block::enter() {
  Block& self = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_size_);
#endif
  for (;;) {
    (*self.body_)();
    --self.alive_;
    if (!self.waiting_.empty() && self.waiting_.size() == self.alive_) self.release(self.waiting_);
    self.wait();
  }
}

}  // namespace emulate
