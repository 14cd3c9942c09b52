// BPEModel for Python, with the interface of tinylm/tokenizer/bpe_reference.py.
#include "bpe.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "source_text.hpp"
#include "text_batch.hpp"
#include "threads.hpp"
#include "unicode_class_ranges.hpp"
#include "unicode_classes.hpp"

namespace tinylm {

namespace {

using IdArray = py::array_t<std::int64_t, py::array::c_style>;

std::vector<BpeMerge> to_merges(const MergeArray& array) {
  if (array.ndim() != 2 || array.shape(1) != 3) throw py::value_error("merges must be [n, 3]");
  std::vector<BpeMerge> merges(static_cast<std::size_t>(array.shape(0)));
  const auto rows = array.unchecked<2>();
  for (py::ssize_t i = 0; i < array.shape(0); ++i) {
    merges[static_cast<std::size_t>(i)] = {rows(i, 0), rows(i, 1), rows(i, 2)};
  }
  return merges;
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
}

}  // namespace tinylm
