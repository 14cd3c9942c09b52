// BPECounter for Python, with the interface of tinylm/tokenizer/bpe_reference.py.
#include "bpe_train.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "text_batch.hpp"
#include "threads.hpp"

namespace tinylm {

namespace {

void count(BpeCounter& counter, const py::sequence& texts, bool replace, int threads) {
  const TextBatch batch(texts);
  if (!replace) batch.refuse_surrogates();
  const py::gil_scoped_release release;
  const auto lock = counter.lock();
  const std::vector<std::size_t> starts = batch.chunk_starts();
  threads = resolve_threads(threads, starts.size() - 1);
  counter.reserve_workers(threads);
  std::vector<std::string> buffers(static_cast<std::size_t>(threads));
  Watch watch;
  parallel_for(starts.size() - 1, threads, watch, [&](std::size_t chunk, int worker) {
    std::string& buffer = buffers[static_cast<std::size_t>(worker)];
    for (std::size_t i = starts[chunk]; i < starts[chunk + 1]; ++i) {
      counter.add(to_utf8(batch[i], buffer), worker, watch);
    }
  });
}

std::pair<py::list, py::array> counted_items(BpeCounter& counter) {
  // Who holds the lock may wait for the GIL, so nobody may do it the other way round.
  std::unique_lock<std::mutex> lock;
  std::vector<PieceCounter::Entry> entries;
  {
    const py::gil_scoped_release release;
    lock = counter.lock();
    entries = counter.sorted_entries();
  }
  py::list pieces(entries.size());
  py::array_t<std::int64_t> counts(static_cast<py::ssize_t>(entries.size()));
  for (std::size_t i = 0; i < entries.size(); ++i) {
    pieces[i] = py::bytes(entries[i].piece.data(), entries[i].piece.size());
    counts.mutable_at(static_cast<py::ssize_t>(i)) = entries[i].count;
  }
  return {std::move(pieces), std::move(counts)};
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

MergeArray train(BpeCounter& counter, const std::vector<TokenId>& byte_ids, TokenId first_free_id,
                 std::size_t vocab_size, std::int64_t min_frequency) {
  const std::array<TokenId, 256> ids = to_byte_ids(byte_ids);
  std::vector<BpeMerge> merges;
  {
    const py::gil_scoped_release release;
    const auto lock = counter.lock();
    Watch watch;
    merges =
        train_bpe(counter.sorted_entries(), ids, first_free_id, vocab_size, min_frequency, watch);
  }
  return to_array(merges);
}

}  // namespace

void bind_bpe_train(py::module_& m) {
  py::class_<BpeCounter>(m, "BPECounter")
      .def(py::init([](const std::string& pattern) {
             return std::make_unique<BpeCounter>(to_pattern(pattern));
           }),
           py::arg("pattern"))
      .def("add", &count, py::arg("texts"), py::arg("replace"), py::arg("threads"))
      .def("__len__",
           [](BpeCounter& counter) {
             const py::gil_scoped_release release;
             const auto lock = counter.lock();
             return counter.size();
           })
      .def("items", &counted_items)
      .def("train", &train, py::arg("byte_ids"), py::arg("first_free_id"), py::arg("vocab_size"),
           py::arg("min_frequency"));
}

}  // namespace tinylm
