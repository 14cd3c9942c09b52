// Stopping a long call from outside, such as by Ctrl-C.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <utility>

namespace tinylm {

// One for each long call, made by the thread that makes the call. All threads that work for it
// call `poll` every few milliseconds.
class Watch {
 public:
  // Thrown by `poll` in helping threads once the calling thread has been stopped.
  struct Stopped {};

  // Called by the calling threads about every kInterval; throws to stop the call. The one of the
  // process; set before any call.
  using Check = void (*)();
  static void set_check(Check check) { check_of_process() = check; }

  static constexpr std::chrono::milliseconds kInterval{50};

  // `tick` is called wherever the check of the process is, to show how far this call has come; it
  // may throw to stop it.
  explicit Watch(std::function<void()> tick = {}) : tick_(std::move(tick)) {}
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  void poll() {
    if (stopped_.load(std::memory_order_relaxed)) throw Stopped{};
    if (std::this_thread::get_id() != caller_) return;
    const auto now = std::chrono::steady_clock::now();
    if (now - last_check_ < kInterval) return;
    last_check_ = now;
    try {
      if (check_of_process() != nullptr) check_of_process()();
      if (tick_) tick_();
    } catch (...) {
      stopped_.store(true, std::memory_order_relaxed);
      throw;
    }
  }

 private:
  static Check& check_of_process() {
    static Check check = nullptr;
    return check;
  }

  std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point last_check_ = std::chrono::steady_clock::now();
  std::atomic<bool> stopped_{false};
  std::function<void()> tick_;
};

}  // namespace tinylm
