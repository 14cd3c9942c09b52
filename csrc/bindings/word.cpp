// WordCounter and WordEncoder for Python, with the interface of tinylm/tokenizer/word_reference.py.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings.hpp"
#include "utf8.hpp"
#include "word_counter.hpp"
#include "word_encoder.hpp"

namespace py = pybind11;

namespace tinylm {
namespace {

constexpr std::uint32_t kUnkId = 0, kEosId = 1;

TextView view_of(PyObject* text) {
#if PY_VERSION_HEX < 0x030C0000
  if (PyUnicode_READY(text) != 0) throw py::error_already_set();
#endif
  return {PyUnicode_DATA(text), static_cast<std::size_t>(PyUnicode_GET_LENGTH(text)),
          static_cast<int>(PyUnicode_KIND(text))};
}

// Strings whose characters may be read without the GIL: it holds references, and a str never
// changes.
class Texts {
 public:
  explicit Texts(const py::iterable& texts) : owner_(texts) {
    views_.reserve(owner_.size());
    for (const py::handle text : owner_) {
      if (!PyUnicode_Check(text.ptr())) {
        throw py::type_error("texts[" + std::to_string(views_.size()) + "] is of type " +
                             Py_TYPE(text.ptr())->tp_name + ", not str");
      }
      views_.push_back(view_of(text.ptr()));
    }
  }
  const std::vector<TextView>& views() const { return views_; }

 private:
  py::tuple owner_;
  std::vector<TextView> views_;
};

std::string to_wtf8(const py::str& text) {
  const TextView view = view_of(text.ptr());
  std::string result(view.length * kMaxUtf8Bytes, '\0');
  char* end = result.data();
  for (std::size_t i = 0; i < view.length; ++i) {
    end = encode_utf8(PyUnicode_READ(view.kind, view.data, i), end);
  }
  result.resize(static_cast<std::size_t>(end - result.data()));
  return result;
}

py::list words_of(const WordCounts& counts) {
  py::list words(counts.ends.size());
  std::size_t begin = 0;
  for (std::size_t i = 0; i < counts.ends.size(); ++i) {
    const auto size = static_cast<Py_ssize_t>(counts.ends[i] - begin);
    PyObject* word = PyUnicode_DecodeUTF8(counts.text.data() + begin, size, "surrogatepass");
    if (word == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(words.ptr(), static_cast<Py_ssize_t>(i), word);
    begin = counts.ends[i];
  }
  return words;
}

void add(WordCounter& counter, const py::iterable& texts, std::optional<int> threads) {
  const Texts held(texts);
  const py::gil_scoped_release release;
  counter.add(held.views(), threads.value_or(0));
}

py::list most_common(WordCounter& counter, std::size_t n) {
  WordCounts counts;
  {
    const py::gil_scoped_release release;
    counts = counter.most_common(n);
  }
  return words_of(counts);
}

py::tuple items(WordCounter& counter) {
  WordCounts counts;
  {
    const py::gil_scoped_release release;
    counts = counter.items();
  }
  const auto size = static_cast<py::ssize_t>(counts.counts.size());
  return py::make_tuple(words_of(counts), py::array_t<std::int64_t>(size, counts.counts.data()));
}

std::unique_ptr<WordEncoder> make_encoder(const py::dict& vocab) {
  std::vector<std::string> words;
  std::vector<std::uint32_t> ids;
  for (const auto& [word, id] : vocab) {
    words.push_back(to_wtf8(py::cast<py::str>(word)));
    ids.push_back(py::cast<std::uint32_t>(id));
    if (ids.back() > INT32_MAX) throw py::value_error("an id is larger than 2**31 - 1");
  }
  return std::make_unique<WordEncoder>(std::vector<std::string_view>(words.begin(), words.end()),
                                       ids, kUnkId, kEosId);
}

template <class Id>
py::tuple encode_as(const WordEncoder& encoder, const py::iterable& texts, bool add_eos,
                    const py::dtype& dtype, int threads) {
  const Texts held(texts);
  std::vector<TextPiece> pieces;
  {
    const py::gil_scoped_release release;
    pieces = cut_texts(held.views());
  }
  // As many ids as there could be: memory that is never written to costs nothing, and what is too
  // much is given back.
  const std::size_t room = WordEncoder::max_ids(pieces, held.views().size(), add_eos);
  py::array ids(dtype, static_cast<py::ssize_t>(room));
  py::array_t<std::int64_t> offsets(static_cast<py::ssize_t>(held.views().size() + 1));
  Id* out = static_cast<Id*>(ids.mutable_data());
  std::int64_t* starts = offsets.mutable_data();
  {
    const py::gil_scoped_release release;
    encoder.encode(held.views(), pieces, add_eos, threads, out, starts);
  }
  ids.resize({starts[held.views().size()]}, /*refcheck=*/false);
  return py::make_tuple(ids, offsets);
}

py::tuple encode_batch(const WordEncoder& encoder, const py::iterable& texts, bool add_eos,
                       const py::object& dtype_like, std::optional<int> threads) {
  const py::dtype dtype = py::dtype::from_args(dtype_like);
  const bool integer = dtype.kind() == 'u' || dtype.kind() == 'i';
  if (integer && dtype.itemsize() == 4) {
    return encode_as<std::uint32_t>(encoder, texts, add_eos, dtype, threads.value_or(0));
  }
  if (dtype.kind() == 'u' && dtype.itemsize() == 2) {
    if (encoder.max_id() > UINT16_MAX) {
      PyErr_Format(PyExc_OverflowError, "id %u does not fit into uint16", encoder.max_id());
      throw py::error_already_set();
    }
    return encode_as<std::uint16_t>(encoder, texts, add_eos, dtype, threads.value_or(0));
  }
  throw py::type_error("dtype is " + py::cast<std::string>(py::str(dtype)) +
                       "; it must be uint16, int32 or uint32");
}

}  // namespace

void bind_word(py::module_& m) {
  py::class_<WordCounter>(m, "WordCounter",
                          "Counts words of any number of texts; remembers the order of first "
                          "appearance. Equal to the class of the same name in Python.")
      .def(py::init<>())
      .def("add", &add, py::arg("texts"), py::arg("threads") = py::none(),
           "Counts the words of ``texts`` on ``threads`` threads, as many as there are if None.")
      .def("most_common", &most_common, py::arg("n"),
           "The ``n`` most frequent words, most frequent first, ties by first appearance.")
      .def("items", &items, "All words by first appearance, and their counts (int64).");
  py::class_<WordEncoder>(m, "WordEncoder",
                          "Maps words to ids by a fixed vocabulary; unknown words become 0.")
      .def(py::init(&make_encoder), py::arg("vocab"))
      .def("encode_batch", &encode_batch, py::arg("texts"), py::arg("add_eos"), py::arg("dtype"),
           py::arg("threads") = py::none(),
           "Ids of all texts in one array of ``dtype`` (uint16, int32 or uint32), and each text's "
           "start in it (int64, n + 1).");
}

}  // namespace tinylm
