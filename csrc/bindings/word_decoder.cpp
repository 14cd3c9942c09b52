// WordDecoder for Python, with the interface of tinylm/tokenizer/word_reference.py.
#include "word_decoder.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings.hpp"
#include "memory.hpp"
#include "texts.hpp"
#include "threads.hpp"

namespace py = pybind11;

namespace tinylm {
namespace {

using Offsets = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

constexpr std::size_t kChunkIds = 1 << 15;        // measured and written in one go
constexpr std::size_t kSignalCheckIds = 1 << 20;  // of a list are read between two looks at signals
constexpr std::size_t kLargeText = 1 << 22;       // from here on worth asking for

std::u32string to_u32(const py::handle& word) {
  const TextView view = view_of_str(word.ptr());
  std::u32string text(view.length, U'\0');
  for (std::size_t i = 0; i < view.length; ++i) {
    text[i] = static_cast<char32_t>(PyUnicode_READ(view.kind, view.data, i));
  }
  return text;
}

std::unique_ptr<WordDecoder> make_decoder(const std::vector<py::str>& words, std::uint32_t unk_id) {
  if (unk_id >= words.size()) throw py::value_error("unk_id has no word");
  std::vector<std::u32string> texts;
  texts.reserve(words.size());
  for (const py::str& word : words) texts.push_back(to_u32(word));
  return std::make_unique<WordDecoder>(texts, unk_id);
}

// Ids [first, last) of a text; their words start at `start` in it.
template <class Id>
struct Chunk {
  std::size_t text;
  const Id *first, *last;
  WordDecoder::Size size;
  std::size_t start;
};

template <class Id>
std::vector<Chunk<Id>> cut_ids(const Id* ids, const std::int64_t* offsets, std::size_t texts) {
  std::vector<Chunk<Id>> chunks;
  chunks.reserve(texts);
  for (std::size_t i = 0; i < texts; ++i) {
    const Id* const end = ids + offsets[i + 1];
    for (const Id* first = ids + offsets[i]; first != end;) {
      const auto left = static_cast<std::size_t>(end - first);
      const Id* const last = first + std::min(left, kChunkIds);
      chunks.push_back({i, first, last, {}, 0});
      first = last;
    }
  }
  return chunks;
}

// Strings of the given sizes less the last space, not written yet. As they have room for a zero
// at the end, the space may be written nevertheless.
std::vector<py::object> make_strings(const std::vector<WordDecoder::Size>& sizes) {
  std::vector<py::object> strings;
  strings.reserve(sizes.size());
  for (const WordDecoder::Size& size : sizes) {
    const Py_UCS4 max_char = size.bits < 0x80      ? 0x7F
                             : size.bits < 0x100   ? 0xFF
                             : size.bits < 0x10000 ? 0xFFFF
                                                   : 0x10FFFF;
    const auto length = static_cast<Py_ssize_t>(size.length == 0 ? 0 : size.length - 1);
    PyObject* text = PyUnicode_New(length, max_char);
    if (text == nullptr) throw py::error_already_set();
    strings.push_back(py::reinterpret_steal<py::object>(text));
    const std::size_t bytes = size.length * PyUnicode_KIND(text);
    if (bytes >= kLargeText) advise_huge_pages(PyUnicode_DATA(text), bytes);
  }
  return strings;
}

template <class Function>
void with_units(PyObject* text, Function&& function) {
  void* data = PyUnicode_DATA(text);
  switch (PyUnicode_KIND(text)) {
    case PyUnicode_1BYTE_KIND:
      return function(static_cast<std::uint8_t*>(data));
    case PyUnicode_2BYTE_KIND:
      return function(static_cast<std::uint16_t*>(data));
    default:
      return function(static_cast<std::uint32_t*>(data));
  }
}

template <class Id>
py::list decode_as(const WordDecoder& decoder, const Id* ids, const std::int64_t* offsets,
                   std::size_t texts, int threads) {
  std::vector<Chunk<Id>> chunks;
  std::vector<WordDecoder::Size> sizes(texts);
  int workers = 1;
  {
    const py::gil_scoped_release release;
    chunks = cut_ids(ids, offsets, texts);
    workers = resolve_threads(threads, chunks.size());
    parallel_for(chunks.size(), workers, [&](std::size_t i, int) {
      chunks[i].size = decoder.measure(chunks[i].first, chunks[i].last);
    });
    for (Chunk<Id>& chunk : chunks) {
      WordDecoder::Size& text = sizes[chunk.text];
      chunk.start = text.length;
      text.length += chunk.size.length;
      text.bits |= chunk.size.bits;
    }
  }
  const std::vector<py::object> strings = make_strings(sizes);
  {
    const py::gil_scoped_release release;
    parallel_for(chunks.size(), workers, [&](std::size_t i, int) {
      const Chunk<Id>& chunk = chunks[i];
      if (sizes[chunk.text].length <= 1) return;  // the empty string, of which there is but one
      with_units(strings[chunk.text].ptr(), [&](auto* text) {
        auto* const out = text + chunk.start;
        decoder.write(chunk.first, chunk.last, out, out + chunk.size.length);
      });
    });
  }
  py::list list(texts);
  for (std::size_t i = 0; i < texts; ++i) {
    if (sizes[i].length > 1) {
      with_units(strings[i].ptr(), [&](auto* text) { text[sizes[i].length - 1] = 0; });
    }
    list[i] = strings[i];
  }
  return list;
}

void check_offsets(const Offsets& offsets, py::ssize_t ids) {
  if (offsets.ndim() != 1 || offsets.size() < 1) {
    throw py::value_error("offsets must be a row of at least one number");
  }
  const std::int64_t* at = offsets.data();
  for (py::ssize_t i = 0; i < offsets.size(); ++i) {
    if (at[i] < (i == 0 ? 0 : at[i - 1]) || at[i] > ids) {
      throw py::value_error("offsets[" + std::to_string(i) + "] is " + std::to_string(at[i]) +
                            "; offsets must rise from 0 to at most the number of ids, " +
                            std::to_string(ids));
    }
  }
}

// Calls function(data, size) with the ids in one of the types that are decoded as they are.
template <class Function>
auto with_ids(const py::array& ids, Function&& function) {
  if (ids.ndim() != 1) throw py::type_error("ids must be a row");
  if (ids.dtype().kind() != 'i' && ids.dtype().kind() != 'u') {
    throw py::type_error("ids are not integers");
  }
  const auto call = [&](auto sample) {
    using Id = decltype(sample);
    const auto array = py::array_t<Id, py::array::c_style | py::array::forcecast>::ensure(ids);
    if (!array) throw py::error_already_set();
    return function(array.data(), array.size());
  };
  if (py::isinstance<py::array_t<std::uint16_t>>(ids)) return call(std::uint16_t{});
  if (py::isinstance<py::array_t<std::int32_t>>(ids)) return call(std::int32_t{});
  if (py::isinstance<py::array_t<std::uint32_t>>(ids)) return call(std::uint32_t{});
  return call(std::int64_t{});  // ids too large for it turn negative, which no word has either
}

py::object decode(const WordDecoder& decoder, const py::array& ids, std::optional<int> threads) {
  return with_ids(ids, [&](const auto* data, py::ssize_t size) {
    const std::int64_t offsets[] = {0, size};
    return py::object(decode_as(decoder, data, offsets, 1, threads.value_or(0))[0]);
  });
}

// Reads a list directly: numpy takes several times as long to make an array of one.
py::object decode_list(const WordDecoder& decoder, const py::list& list,
                       std::optional<int> threads) {
  std::vector<std::int64_t> ids;
  ids.reserve(list.size());
  for (std::size_t i = 0; i < list.size(); ++i) {  // which a signal handler may have changed
    if (i % kSignalCheckIds == kSignalCheckIds - 1 && PyErr_CheckSignals() != 0) {
      throw py::error_already_set();
    }
    const auto item =
        py::reinterpret_borrow<py::object>(PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i)));
    int overflow = 0;
    const long long id = PyLong_AsLongLongAndOverflow(item.ptr(), &overflow);
    if (id == -1 && overflow == 0 && PyErr_Occurred()) throw py::error_already_set();
    ids.push_back(overflow != 0 ? -1 : id);
  }
  const std::int64_t offsets[] = {0, static_cast<std::int64_t>(ids.size())};
  return decode_as(decoder, ids.data(), offsets, 1, threads.value_or(0))[0];
}

py::list decode_batch(const WordDecoder& decoder, const py::array& ids, const Offsets& offsets,
                      std::optional<int> threads) {
  check_offsets(offsets, ids.size());
  // Of its own, for another thread might change the caller's.
  const std::vector<std::int64_t> bounds(offsets.data(), offsets.data() + offsets.size());
  return with_ids(ids, [&](const auto* data, py::ssize_t size) {
    if (bounds.back() > size) throw py::value_error("the offsets have changed");
    return decode_as(decoder, data, bounds.data(), bounds.size() - 1, threads.value_or(0));
  });
}

}  // namespace

void bind_word_decoder(py::module_& m) {
  py::class_<WordDecoder>(m, "WordDecoder", "Words of ids, joined by spaces.")
      .def(py::init(&make_decoder), py::arg("words"), py::arg("unk_id"))
      .def("decode", &decode_list, py::arg("ids"), py::arg("threads") = 1)
      .def("decode", &decode, py::arg("ids"), py::arg("threads") = 1,
           "The text of a list or array of integers; ids without a word are ``unk_id``.")
      .def("decode_batch", &decode_batch, py::arg("ids"), py::arg("offsets"),
           py::arg("threads") = py::none(),
           "A text for each two neighbours of ``offsets``, of the ids between.");
}

}  // namespace tinylm
