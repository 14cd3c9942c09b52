// Running tasks on a few threads that live for one call: no pool, so nothing to break after fork().
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "watch.hpp"

namespace tinylm {

constexpr int kMaxThreads = 256;

// How many threads to use where the caller asked for `requested` (0 or less: as many as the machine
// has for this process) and no more than `tasks` can be busy at once: 1 to kMaxThreads.
inline int resolve_threads(int requested, std::size_t tasks) {
  const int available = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const int wanted = std::min(requested > 0 ? requested : available, kMaxThreads);
  const std::size_t useful = std::max<std::size_t>(1, tasks);
  return useful < static_cast<std::size_t>(wanted) ? static_cast<int>(useful) : wanted;
}

// Calls function(task, worker) once for every task in [0, tasks), with 0 <= worker < threads; one
// worker runs one task at a time, and worker 0 is the calling thread. Tasks are started in order.
// The first exception stops the handing out of tasks and is rethrown here when all have stopped;
// so does `watch`, which is polled between tasks and while waiting for the helpers.
template <class Function>
void parallel_for(std::size_t tasks, int threads, Watch& watch, Function&& function) {
  std::atomic<std::size_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;  // of what is shared below
  int helping = 0;
  std::condition_variable helper_left;
  const auto fail = [&] {
    next.store(tasks);
    const std::lock_guard<std::mutex> lock(mutex);
    if (!error) error = std::current_exception();
  };
  const auto work = [&](int worker) {
    try {
      for (std::size_t task; (task = next.fetch_add(1)) < tasks;) {
        watch.poll();
        function(task, worker);
      }
    } catch (const Watch::Stopped&) {
      next.store(tasks);  // The exception that stopped it is in the calling thread.
    } catch (...) {
      fail();
    }
  };
  const auto help = [&](int worker) {
    work(worker);
    const std::lock_guard<std::mutex> lock(mutex);
    --helping;
    helper_left.notify_one();
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(std::max(0, threads - 1)));
  for (int worker = 1; worker < threads; ++worker) {
    const std::lock_guard<std::mutex> lock(mutex);
    try {
      helpers.emplace_back(help, worker);
      ++helping;
    } catch (const std::system_error&) {
      break;  // No more threads to be had: the ones that run do all the work.
    }
  }
  work(0);
  bool is_watching = true;
  for (std::unique_lock<std::mutex> lock(mutex); helping > 0;) {
    helper_left.wait_for(lock, Watch::kInterval);
    lock.unlock();
    try {
      if (is_watching) watch.poll();
    } catch (...) {
      is_watching = false;
      fail();
    }
    lock.lock();
  }
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

template <class Function>
void parallel_for(std::size_t tasks, int threads, Function&& function) {
  Watch watch;
  parallel_for(tasks, threads, watch, function);
}

}  // namespace tinylm
