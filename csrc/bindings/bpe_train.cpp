// BPECounter for Python, with the interface of tinylm/tokenizer/bpe_reference.py.
#include "bpe_train.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "piece_counter.hpp"
#include "text_batch.hpp"
#include "threads.hpp"

namespace tinylm {

namespace {

// So many Python objects are made between two looks at Python's signals.
constexpr std::size_t kSignalCheckObjects = std::size_t{1} << 16;

// Called with how much of a call is done, and of how much, whenever Python's signals are looked at.
using Progress = std::optional<py::function>;

template <class Done>
std::function<void()> make_tick(const Progress& progress, std::size_t total, Done done) {
  if (!progress) return {};
  return [&progress, total, done] {
    const py::gil_scoped_acquire acquire;
    (*progress)(done(), total);
  };
}

void count(PieceCounter& counter, const py::sequence& texts, bool replace, int threads,
           const Progress& progress) {
  const TextBatch batch(texts);
  if (!replace) batch.refuse_surrogates();
  std::size_t total = 0;
  for (std::size_t i = 0; i < batch.size(); ++i) total += batch[i].length;
  std::atomic<std::size_t> done{0};
  const py::gil_scoped_release release;
  const PieceCounter::Lock lock(counter);
  const std::vector<TextPart> parts = batch.parts();
  const std::vector<std::size_t> starts = TextBatch::chunk_starts(parts);
  threads = resolve_threads(threads, starts.size() - 1);
  counter.reserve_workers(threads);
  std::vector<Utf8Buffer> buffers(static_cast<std::size_t>(threads));
  Watch watch(make_tick(progress, total, [&] { return done.load(); }));
  parallel_for(starts.size() - 1, threads, watch, [&](std::size_t chunk, int worker) {
    Utf8Buffer& buffer = buffers[static_cast<std::size_t>(worker)];
    for (std::size_t i = starts[chunk]; i < starts[chunk + 1]; ++i) {
      counter.add(to_utf8(parts[i].source, buffer), worker, watch);
      done += parts[i].source.length;
    }
  });
}

std::size_t size(PieceCounter& counter) {
  const py::gil_scoped_release release;
  const PieceCounter::Lock lock(counter);
  Watch watch;
  return counter.size(watch);
}

std::pair<py::list, py::array> items(PieceCounter& counter) {
  std::string text;
  std::vector<std::size_t> ends;
  std::vector<std::int64_t> counts;
  {
    const py::gil_scoped_release release;
    const PieceCounter::Lock lock(counter);
    Watch watch;
    counter.for_each_sorted(
        [&](const PieceCount& entry) {
          text.append(entry.piece);
          ends.push_back(text.size());
          counts.push_back(entry.count);
        },
        watch);
  }
  py::list pieces(ends.size());
  std::size_t begin = 0;
  for (std::size_t i = 0; i < ends.size(); ++i) {
    if (i % kSignalCheckObjects == 0 && PyErr_CheckSignals() != 0) throw py::error_already_set();
    pieces[i] = py::bytes(text.data() + begin, ends[i] - begin);
    begin = ends[i];
  }
  return {std::move(pieces),
          py::array_t<std::int64_t>(static_cast<py::ssize_t>(counts.size()), counts.data())};
}

MergeArray to_array(const std::vector<BpeMerge>& merges) {
  MergeArray array({static_cast<py::ssize_t>(merges.size()), py::ssize_t{3}});
  auto rows = array.mutable_unchecked<2>();
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const auto row = static_cast<py::ssize_t>(i);
    rows(row, 0) = merges[i].left;
    rows(row, 1) = merges[i].right;
    rows(row, 2) = merges[i].result;
  }
  return array;
}

MergeArray train(PieceCounter& counter, const std::vector<TokenId>& byte_ids, TokenId first_free_id,
                 std::size_t vocab_size, std::int64_t min_frequency,
                 std::unordered_set<std::string> reserved, const Progress& progress) {
  BpeTrainer trainer(to_byte_ids(byte_ids), first_free_id, std::move(reserved));
  std::vector<BpeMerge> merges;
  {
    const py::gil_scoped_release release;
    Watch watch(make_tick(progress, vocab_size, [&] { return trainer.vocab_size(); }));
    const PieceCounter::Lock lock(counter);
    counter.for_each([&](const PieceCount& entry) { trainer.add(entry); }, watch);
    merges = trainer.train(vocab_size, min_frequency, watch);
  }
  return to_array(merges);
}

// Errors of the disk become OSError.
void translate_disk_errors(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
  }
}

}  // namespace

void bind_bpe_train(py::module_& m) {
  py::register_local_exception_translator(&translate_disk_errors);
  py::class_<PieceCounter>(m, "BPECounter")
      .def(py::init([](const std::string& pattern, std::size_t memory, std::string folder) {
             return std::make_unique<PieceCounter>(to_pattern(pattern), memory, std::move(folder));
           }),
           py::arg("pattern"), py::arg("memory") = std::numeric_limits<std::size_t>::max(),
           py::arg("folder") = "")
      .def("add", &count, py::arg("texts"), py::arg("replace"), py::arg("threads"),
           py::arg("progress") = py::none())
      .def("__len__", &size)
      .def("items", &items)
      .def("train", &train, py::arg("byte_ids"), py::arg("first_free_id"), py::arg("vocab_size"),
           py::arg("min_frequency"), py::arg("reserved") = std::unordered_set<std::string>(),
           py::arg("progress") = py::none());
}

}  // namespace tinylm
