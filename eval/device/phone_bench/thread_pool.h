// Threads that take ranges of a loop: the caller is one of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace mobilemoe {

class ThreadPool {
 public:
  explicit ThreadPool(int n_threads) : n_threads_(n_threads) {
    for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ThreadPool(const ThreadPool&) = delete;

  ~ThreadPool() {
    stopping_ = true;
    announce();
    for (std::thread& worker : workers_) worker.join();
  }

  // Calls f(b, e) for ranges that cover [begin, end), each of at least `grain` but the last. A thread that has finished
  // takes the next range, so fast cores take more of them than slow ones.
  template <class F>
  void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
    if (begin >= end) return;
    if (n_threads_ == 1 || end - begin <= grain) return f(begin, end);
    next_ = begin;
    end_ = end;
    step_ = std::max(grain, (end - begin) / (4 * n_threads_));
    context_ = &f;
    call_ = [](const void* context, int64_t b, int64_t e) { (*static_cast<const F*>(context))(b, e); };
    n_working_ = n_threads_ - 1;
    announce();
    take_ranges();
    while (n_working_.load(std::memory_order_acquire)) std::this_thread::yield();
  }

 private:
  void announce() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

  void take_ranges() {
    for (int64_t b = next_.fetch_add(step_); b < end_; b = next_.fetch_add(step_)) {
      call_(context_, b, std::min(b + step_, end_));
    }
  }

  // A layer has a dozen loops of some ten microseconds, so a worker looks for the next one before it sleeps.
  void work() {
    for (int64_t seen = 0;;) {
      for (int i = 0; i < kLooks && generation_.load(std::memory_order_acquire) == seen; ++i) std::this_thread::yield();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stopping_) return;
      take_ranges();
      n_working_.fetch_sub(1, std::memory_order_release);
    }
  }

  static constexpr int kLooks = 2000;
  const int n_threads_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int64_t> generation_{0}, next_{0};
  std::atomic<int> n_working_{0};
  std::atomic<bool> stopping_{false};
  int64_t end_ = 0, step_ = 1;
  const void* context_ = nullptr;
  void (*call_)(const void*, int64_t, int64_t) = nullptr;
};

}  // namespace mobilemoe
