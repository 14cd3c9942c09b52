// Running tasks on a few threads that live for one call: no pool, so nothing to break after fork().
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

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
// The first exception stops the handing out of tasks and is rethrown here when all have stopped.
template <class Function>
void parallel_for(std::size_t tasks, int threads, Function&& function) {
  std::atomic<std::size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&](int worker) {
    try {
      for (std::size_t task; (task = next.fetch_add(1)) < tasks;) function(task, worker);
    } catch (...) {
      next.store(tasks);
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(std::max(0, threads - 1)));
  for (int worker = 1; worker < threads; ++worker) {
    try {
      helpers.emplace_back(work, worker);
    } catch (const std::system_error&) {
      break;  // No more threads to be had: the ones that run do all the work.
    }
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace tinylm
