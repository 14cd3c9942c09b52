// BPEModel for Python, with the interface of tinylm/tokenizer/bpe_reference.py.
#include "bpe.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
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

// Thrown where a text has a surrogate and none may be replaced, and where bytes are not UTF-8.
struct SurrogateFound {};
struct InvalidUtf8Found {};

// Calls function(), and if that finds what is no text raises Python's error for the first one. So
// texts without any are read once.
template <class Function>
void refusing_what_is_no_text(const TextBatch& batch, Function&& function) {
  try {
    function();
  } catch (const SurrogateFound&) {
    batch.refuse_surrogates();
  } catch (const InvalidUtf8Found&) {
    batch.refuse_invalid_utf8();
  }
}

template <class Id>
void encode_text(const BpeModel& model, const SourceText& text, bool replace,
                 BpeModel::Scratch& scratch, Utf8Buffer& buffer, IdVector<Id>& ids, Watch& watch) {
  if (!is_valid_utf8(text)) throw InvalidUtf8Found();
  const Utf8Bytes utf8 = to_utf8(text, buffer);
  if (utf8.has_replaced && !replace) throw SurrogateFound();
  model.encode(utf8.bytes, scratch, ids, watch);
}

py::list encode(const BpeModel& model, const py::str& text, bool replace) {
  const TextBatch batch(py::make_tuple(text));
  IdVector<TokenId> ids;
  refusing_what_is_no_text(batch, [&] {
    const py::gil_scoped_release release;
    const ScratchLease scratch(model);
    Utf8Buffer buffer;
    Watch watch;
    encode_text(model, batch[0], replace, *scratch, buffer, ids, watch);
  });
  py::list list(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i % kSignalCheckIds == 0 && PyErr_CheckSignals() != 0) throw py::error_already_set();
    list[i] = py::int_(ids[i]);
  }
  return list;
}

// Ids of all texts, in pieces: those of each run of texts in the memory of the thread that found
// them.
template <class Id>
struct EncodedChunks {
  struct Chunk {
    std::size_t worker, begin, size;
  };
  std::vector<IdVector<Id>> ids_of_workers;
  std::vector<Chunk> chunks;
  std::vector<std::int64_t> offsets;  // of the texts, in all ids
};

// At least so many bytes of most texts make one id; more room is found if that is wrong.
constexpr std::size_t kBytesPerId = 3;

template <class Id>
EncodedChunks<Id> encode_chunks(const BpeModel& model, const TextBatch& batch,
                                std::optional<TokenId> eos_id, bool replace, int threads) {
  const std::vector<TextPart> parts = batch.parts();
  const std::vector<std::size_t> starts = TextBatch::chunk_starts(parts);
  std::size_t length = parts.size();
  for (const TextPart& part : parts) length += part.source.length;
  EncodedChunks<Id> result;
  result.chunks.resize(starts.size() - 1);
  threads = resolve_threads(threads, result.chunks.size());
  const auto workers = static_cast<std::size_t>(threads);
  result.ids_of_workers.resize(workers);
  std::vector<std::size_t> sizes(parts.size());
  std::vector<std::unique_ptr<ScratchLease>> scratches(workers);
  std::vector<Utf8Buffer> buffers(workers);
  Watch watch;
  parallel_for(result.chunks.size(), threads, watch, [&](std::size_t chunk, int number) {
    const auto worker = static_cast<std::size_t>(number);
    auto& scratch = scratches[worker];
    IdVector<Id>& ids = result.ids_of_workers[worker];
    if (!scratch) {
      scratch = std::make_unique<ScratchLease>(model);
      ids.reserve(length / workers / kBytesPerId);
    }
    const std::size_t begin = ids.size();
    for (std::size_t i = starts[chunk]; i < starts[chunk + 1]; ++i) {
      const std::size_t before = ids.size();
      encode_text(model, parts[i].source, replace, **scratch, buffers[worker], ids, watch);
      if (eos_id && parts[i].is_last) ids.push_back(static_cast<Id>(*eos_id));
      sizes[i] = ids.size() - before;
    }
    result.chunks[chunk] = {worker, begin, ids.size() - begin};
  });
  result.offsets.assign(batch.size() + 1, 0);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    result.offsets[parts[i].text + 1] += static_cast<std::int64_t>(sizes[i]);
  }
  for (std::size_t i = 0; i < batch.size(); ++i) result.offsets[i + 1] += result.offsets[i];
  return result;
}

// The ids as an array of `ArrayId`, as wide as Id, with no copy.
template <class ArrayId, class Id>
py::array to_array(IdVector<Id>&& ids) {
  auto owner = std::make_unique<IdVector<Id>>(std::move(ids));
  const auto size = static_cast<py::ssize_t>(owner->size());
  const auto* const data = reinterpret_cast<const ArrayId*>(owner->data());
  const py::capsule base(owner.get(),
                         [](void* vector) { delete static_cast<IdVector<Id>*>(vector); });
  owner.release();
  return py::array_t<ArrayId>(size, data, base);
}

// One array of `ArrayId`, as wide as Id. It is put together by several threads, for its memory is
// new, and each page of that costs as much as its copying.
template <class ArrayId, class Id>
py::array join_chunks(EncodedChunks<Id>& encoded) {
  static_assert(sizeof(ArrayId) == sizeof(Id));
  if (encoded.ids_of_workers.size() == 1) {
    return to_array<ArrayId>(std::move(encoded.ids_of_workers[0]));
  }
  py::array_t<ArrayId> array(encoded.offsets.back());
  auto* out = reinterpret_cast<char*>(array.mutable_data());
  const py::gil_scoped_release release;
  std::vector<char*> places;
  for (const auto& chunk : encoded.chunks) {
    places.push_back(out);
    out += chunk.size * sizeof(Id);
  }
  const auto copy = [&](std::size_t i, int) {
    const auto& chunk = encoded.chunks[i];
    const Id* const ids = encoded.ids_of_workers[chunk.worker].data() + chunk.begin;
    if (chunk.size != 0) std::memcpy(places[i], ids, chunk.size * sizeof(Id));
  };
  parallel_for(places.size(), static_cast<int>(encoded.ids_of_workers.size()), copy);
  return array;
}

template <class ArrayId, class Id>
std::pair<py::array, py::array> encode_batch_as(const BpeModel& model, const TextBatch& batch,
                                                std::optional<TokenId> eos_id, bool replace,
                                                int threads) {
  EncodedChunks<Id> encoded;
  refusing_what_is_no_text(batch, [&] {
    const py::gil_scoped_release release;
    encoded = encode_chunks<Id>(model, batch, eos_id, replace, threads);
  });
  py::array ids = join_chunks<ArrayId>(encoded);
  return {std::move(ids),
          py::array_t<std::int64_t>(static_cast<py::ssize_t>(encoded.offsets.size()),
                                    encoded.offsets.data())};
}

std::pair<py::array, py::array> encode_batch(const BpeModel& model, const py::sequence& texts,
                                             std::optional<TokenId> eos_id, bool replace,
                                             int threads) {
  const TextBatch batch(texts);
  if (model.is_narrow()) {
    return encode_batch_as<std::uint16_t, std::uint16_t>(model, batch, eos_id, replace, threads);
  }
  return encode_batch_as<std::int32_t, std::uint32_t>(model, batch, eos_id, replace, threads);
}

py::index_error not_in_vocabulary(const BpeModel& model, const std::string& id,
                                  std::size_t position) {
  return py::index_error("id " + id + " at position " + std::to_string(position) +
                         " is not in the vocabulary of " + std::to_string(model.vocab_size()));
}

// So many ids are decoded between two looks at Python's signals.
constexpr std::ptrdiff_t kDecodedIds = std::ptrdiff_t{1} << 20;

template <class Id>
py::bytes decode_range(const BpeModel& model, const Id* first, const Id* last) {
  Watch watch;
  // Calls function(first, last) for some ids at a time, without the GIL.
  const auto for_each_run = [&](auto&& function) {
    const py::gil_scoped_release release;
    for (const Id* run = first; run != last;) {
      watch.poll();
      const Id* const end = run + std::min(kDecodedIds, last - run);
      if (!function(run, end)) break;
      run = end;
    }
  };
  std::vector<std::size_t> sizes;
  std::size_t size = 0;
  const Id* bad = last;
  for_each_run([&](const Id* run, const Id* end) {
    const Id* stop;
    sizes.push_back(model.decoded_size(run, end, stop));
    size += sizes.back();
    if (stop != end) bad = stop;
    return stop == end;
  });
  if (bad != last) {
    throw not_in_vocabulary(model, std::to_string(*bad), static_cast<std::size_t>(bad - first));
  }
  // Filled where it lies: nobody else has seen it.
  const auto bytes = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(size)));
  if (!bytes) throw py::error_already_set();
  char* out = PyBytes_AS_STRING(bytes.ptr());
  auto run_size = sizes.begin();
  for_each_run([&](const Id* run, const Id* end) {
    model.decode(run, end, out, out + *run_size);
    out += *run_size++;
    return true;
  });
  return bytes;
}

template <class Id>
py::bytes decode(const BpeModel& model, const py::array_t<Id, py::array::c_style>& ids) {
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
  Utf8Buffer buffer;
  py::list pieces;
  for_each_piece(to_pattern(pattern), to_utf8(batch[0], buffer).bytes, [&](std::string_view piece) {
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
      .def("decode", &decode<std::uint16_t>, py::arg("ids").noconvert())
      .def("decode", &decode<std::int32_t>, py::arg("ids").noconvert())
      .def("decode", &decode<std::int64_t>, py::arg("ids"));
}

}  // namespace tinylm
