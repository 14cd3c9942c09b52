#include "bpe.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "bpe_train.hpp"
#include "source_text.hpp"
#include "threads.hpp"
#include "unicode_class_ranges.hpp"
#include "unicode_classes.hpp"

namespace tinylm {

namespace {

namespace py = pybind11;

using MergeArray = py::array_t<TokenId, py::array::c_style | py::array::forcecast>;
using IdArray = py::array_t<std::int64_t, py::array::c_style>;

// Texts of one call, readable without the GIL: it holds references, so nothing can free them.
class TextBatch {
 public:
  explicit TextBatch(const py::sequence& texts) {
    const std::size_t size = texts.size();
    owners_.reserve(size);
    views_.reserve(size);
    for (std::size_t i = 0; i < size; ++i) add(texts[i]);
  }

  std::size_t size() const { return views_.size(); }
  const SourceText& operator[](std::size_t i) const { return views_[i]; }

  // Raises the UnicodeEncodeError of str.encode for the first text with a lone surrogate, if any.
  void refuse_surrogates() const {
    std::size_t i = 0;
    {
      const py::gil_scoped_release release;
      while (i < size() && find_surrogate(views_[i]) == kNoPosition) ++i;
    }
    if (i == size()) return;
    const py::object encoded = py::reinterpret_steal<py::object>(
        PyUnicode_AsEncodedString(owners_[i].ptr(), "utf-8", "strict"));
    if (!encoded) throw py::error_already_set();
  }

  // Runs of texts of about kChunkLength code points: [starts[i], starts[i + 1]) is a run.
  std::vector<std::size_t> chunk_starts() const {
    std::vector<std::size_t> starts{0};
    std::size_t length = 0;
    for (std::size_t i = 0; i < size(); ++i) {
      length += views_[i].length;
      if (length < kChunkLength && i + 1 < size()) continue;
      starts.push_back(i + 1);
      length = 0;
    }
    return starts;
  }

 private:
  static constexpr std::size_t kChunkLength = 1 << 18;

  void add(py::object text) {
    if (!PyUnicode_Check(text.ptr())) {
      throw py::type_error("texts must be str, not " + std::string(Py_TYPE(text.ptr())->tp_name));
    }
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(text.ptr()) != 0) throw py::error_already_set();
#endif
    views_.push_back(
        {PyUnicode_DATA(text.ptr()), static_cast<std::size_t>(PyUnicode_GET_LENGTH(text.ptr())),
         static_cast<int>(PyUnicode_KIND(text.ptr())), PyUnicode_IS_ASCII(text.ptr()) != 0});
    owners_.push_back(std::move(text));
  }

  std::vector<py::object> owners_;
  std::vector<SourceText> views_;
};

SplitPattern to_pattern(const std::string& name) {
  if (name == "gpt2") return SplitPattern::kGpt2;
  if (name == "cl100k") return SplitPattern::kCl100k;
  if (name == "cl100k_tiktoken") return SplitPattern::kCl100kTiktoken;
  if (name == "o200k") return SplitPattern::kO200k;
  if (name == "whitespace") return SplitPattern::kWhitespace;
  throw py::value_error("unknown pattern " + name);
}

std::array<TokenId, 256> to_byte_ids(const std::vector<TokenId>& ids) {
  if (ids.size() != 256) throw py::value_error("byte_ids must have 256 entries");
  std::array<TokenId, 256> array;
  std::copy(ids.begin(), ids.end(), array.begin());
  return array;
}

std::vector<BpeMerge> to_merges(const MergeArray& array) {
  if (array.ndim() != 2 || array.shape(1) != 3) throw py::value_error("merges must be [n, 3]");
  std::vector<BpeMerge> merges(static_cast<std::size_t>(array.shape(0)));
  const auto rows = array.unchecked<2>();
  for (py::ssize_t i = 0; i < array.shape(0); ++i) {
    merges[static_cast<std::size_t>(i)] = {rows(i, 0), rows(i, 1), rows(i, 2)};
  }
  return merges;
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

std::unique_ptr<BpeModel> make_model(const std::vector<py::bytes>& tokens, const MergeArray& merges,
                                     const std::vector<TokenId>& byte_ids,
                                     const std::vector<TokenId>& special_ids, bool ignore_merges,
                                     bool ranks_are_ids, bool add_prefix_space,
                                     const std::string& pattern) {
  const std::vector<BpeMerge> merge_list = to_merges(merges);
  const auto check = [&](TokenId id) {
    if (id >= tokens.size()) throw py::value_error("an id is not below the number of tokens");
  };
  for (const BpeMerge& merge : merge_list) {
    check(merge.left);
    check(merge.right);
    check(merge.result);
  }
  std::for_each(byte_ids.begin(), byte_ids.end(), check);
  std::for_each(special_ids.begin(), special_ids.end(), check);
  return std::make_unique<BpeModel>(
      std::vector<std::string>(tokens.begin(), tokens.end()), merge_list, to_byte_ids(byte_ids),
      special_ids, BpeOptions{to_pattern(pattern), ignore_merges, ranks_are_ids, add_prefix_space});
}

// A list of so many ids is made between two looks at Python's signals.
constexpr std::size_t kSignalCheckIds = std::size_t{1} << 20;

py::list encode(const BpeModel& model, const py::str& text, bool replace) {
  const TextBatch batch(py::make_tuple(text));
  if (!replace) batch.refuse_surrogates();
  std::vector<TokenId> ids;
  {
    const py::gil_scoped_release release;
    const ScratchLease scratch(model);
    std::string buffer;
    Watch watch;
    model.encode(to_utf8(batch[0], buffer), *scratch, ids, watch);
  }
  py::list list(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i % kSignalCheckIds == 0 && PyErr_CheckSignals() != 0) throw py::error_already_set();
    list[i] = py::int_(ids[i]);
  }
  return list;
}

// Ids of all texts, in pieces: one vector for each run of texts.
struct EncodedChunks {
  std::vector<std::vector<TokenId>> ids;
  std::vector<std::int64_t> offsets;  // of the texts, in all ids
};

EncodedChunks encode_chunks(const BpeModel& model, const TextBatch& batch,
                            std::optional<TokenId> eos_id, int threads) {
  const std::vector<std::size_t> starts = batch.chunk_starts();
  const std::size_t chunks = starts.size() - 1;
  EncodedChunks result;
  result.ids.resize(chunks);
  result.offsets.assign(batch.size() + 1, 0);
  threads = resolve_threads(threads, chunks);
  std::vector<std::unique_ptr<ScratchLease>> scratches(static_cast<std::size_t>(threads));
  std::vector<std::string> buffers(scratches.size());
  Watch watch;
  parallel_for(chunks, threads, watch, [&](std::size_t chunk, int worker) {
    auto& scratch = scratches[static_cast<std::size_t>(worker)];
    if (!scratch) scratch = std::make_unique<ScratchLease>(model);
    std::vector<TokenId>& ids = result.ids[chunk];
    for (std::size_t i = starts[chunk]; i < starts[chunk + 1]; ++i) {
      const std::size_t before = ids.size();
      model.encode(to_utf8(batch[i], buffers[static_cast<std::size_t>(worker)]), **scratch, ids,
                   watch);
      if (eos_id) ids.push_back(*eos_id);
      result.offsets[i + 1] = static_cast<std::int64_t>(ids.size() - before);
    }
  });
  for (std::size_t i = 0; i < batch.size(); ++i) result.offsets[i + 1] += result.offsets[i];
  return result;
}

template <class Id>
py::array join_chunks(EncodedChunks& encoded) {
  py::array_t<Id> array(encoded.offsets.back());
  Id* out = array.mutable_data();
  const py::gil_scoped_release release;
  for (std::vector<TokenId>& ids : encoded.ids) {
    out =
        std::transform(ids.begin(), ids.end(), out, [](TokenId id) { return static_cast<Id>(id); });
    std::vector<TokenId>().swap(ids);
  }
  return array;
}

std::pair<py::array, py::array> encode_batch(const BpeModel& model, const py::sequence& texts,
                                             std::optional<TokenId> eos_id, bool replace,
                                             int threads) {
  const TextBatch batch(texts);
  if (!replace) batch.refuse_surrogates();
  EncodedChunks encoded;
  {
    const py::gil_scoped_release release;
    encoded = encode_chunks(model, batch, eos_id, threads);
  }
  const bool is_narrow = model.vocab_size() <= std::size_t{1} << 16;
  py::array ids =
      is_narrow ? join_chunks<std::uint16_t>(encoded) : join_chunks<std::int32_t>(encoded);
  return {std::move(ids),
          py::array_t<std::int64_t>(static_cast<py::ssize_t>(encoded.offsets.size()),
                                    encoded.offsets.data())};
}

py::index_error not_in_vocabulary(const BpeModel& model, const std::string& id,
                                  std::size_t position) {
  return py::index_error("id " + id + " at position " + std::to_string(position) +
                         " is not in the vocabulary of " + std::to_string(model.vocab_size()));
}

py::bytes decode_range(const BpeModel& model, const std::int64_t* first, const std::int64_t* last) {
  const auto limit = static_cast<std::int64_t>(model.vocab_size());
  std::string bytes;
  const std::int64_t* bad = first;
  {
    const py::gil_scoped_release release;
    std::size_t size = 0;
    for (; bad != last && *bad >= 0 && *bad < limit; ++bad) {
      const std::string_view token = model.token(static_cast<TokenId>(*bad));
      if (token.empty()) break;
      size += token.size();
    }
    if (bad == last) bytes.reserve(size);
    for (auto id = first; bad == last && id != last; ++id) {
      bytes.append(model.token(static_cast<TokenId>(*id)));
    }
  }
  if (bad != last) {
    throw not_in_vocabulary(model, std::to_string(*bad), static_cast<std::size_t>(bad - first));
  }
  return py::bytes(bytes);
}

py::bytes decode(const BpeModel& model, const IdArray& ids) {
  return decode_range(model, ids.data(), ids.data() + ids.size());
}

// Reads a list directly: numpy takes several times as long to make an array of one.
py::bytes decode_list(const BpeModel& model, const py::list& list) {
  std::vector<std::int64_t> ids;
  ids.reserve(list.size());
  for (const py::handle item : list) {
    int overflow = 0;
    const long long id = PyLong_AsLongLongAndOverflow(item.ptr(), &overflow);
    if (id == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (overflow != 0) throw not_in_vocabulary(model, py::str(item), ids.size());
    ids.push_back(id);
  }
  return decode_range(model, ids.data(), ids.data() + ids.size());
}

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

py::list pretokenize(const py::str& text, const std::string& pattern) {
  const TextBatch batch(py::make_tuple(text));
  batch.refuse_surrogates();
  std::string buffer;
  py::list pieces;
  for_each_piece(to_pattern(pattern), to_utf8(batch[0], buffer), [&](std::string_view piece) {
    pieces.append(py::str(piece.data(), piece.size()));
  });
  return pieces;
}

}  // namespace

void bind_bpe(py::module_& m) {
  m.attr("bpe_unicode_version") = kClassesUnicodeVersion;
  m.def("bpe_pretokenize", &pretokenize, py::arg("text"), py::arg("pattern"));

  py::class_<BpeModel>(m, "BPEModel")
      .def(py::init(&make_model), py::kw_only(), py::arg("tokens"), py::arg("merges"),
           py::arg("byte_ids"), py::arg("special_ids"), py::arg("ignore_merges"),
           py::arg("ranks_are_ids"), py::arg("add_prefix_space"), py::arg("pattern"))
      .def("encode", &encode, py::arg("text"), py::arg("replace"))
      .def("encode_batch", &encode_batch, py::arg("texts"), py::arg("eos_id"), py::arg("replace"),
           py::arg("threads"))
      .def("decode", &decode_list, py::arg("ids"))
      .def("decode", &decode, py::arg("ids"));

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
