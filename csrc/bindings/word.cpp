// WordCounter and WordEncoder for Python, with the interface of tinylm/tokenizer/word_reference.py.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdio>
#include <optional>
#include <string>

#include "bindings.hpp"
#include "simd/instruction_set.hpp"
#include "texts.hpp"
#include "utf8.hpp"
#include "word_counter.hpp"
#include "word_encoder.hpp"

namespace py = pybind11;

namespace tinylm {
namespace {

constexpr std::uint32_t kUnkId = 0, kEosId = 1;

std::string to_wtf8(const py::str& text) {
  const TextView view = view_of_str(text.ptr());
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

// The texts cut into pieces. Throws std::invalid_argument for the first byte that is no UTF-8,
// unless such bytes are to be read as U+FFFD.
std::vector<TextPiece> cut_and_check(const std::vector<TextView>& texts, bool replace, int threads,
                                     std::size_t piece_length) {
  if (piece_length < 1) throw py::value_error("piece_length is 0");
  std::vector<TextPiece> pieces = cut_texts(texts, piece_length);
  if (replace) return pieces;
  const InvalidUtf8 invalid = find_invalid(texts, pieces, threads);
  if (invalid.text == texts.size()) return pieces;
  const auto* bytes = static_cast<const std::uint8_t*>(texts[invalid.text].data);
  char byte[8];
  std::snprintf(byte, sizeof byte, "0x%02x", bytes[invalid.position]);
  throw py::value_error("text " + std::to_string(invalid.text) + " is not UTF-8: byte " + byte +
                        " at position " + std::to_string(invalid.position) +
                        "; pass errors='replace' to read such bytes as U+FFFD");
}

void add(WordCounter& counter, const py::iterable& texts, std::optional<int> threads, bool replace,
         std::size_t piece_length) {
  const Texts held(texts);
  const py::gil_scoped_release release;
  const std::vector<TextPiece> pieces =
      cut_and_check(held.views(), replace, threads.value_or(0), piece_length);
  counter.add(held.views(), pieces, threads.value_or(0));
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

struct EncodeOptions {
  bool add_eos;
  int threads;
  bool replace;
  std::size_t piece_length;
};

template <class Id>
py::tuple encode_as(const WordEncoder& encoder, const py::iterable& texts, const py::dtype& dtype,
                    const EncodeOptions& options) {
  const Texts held(texts);
  std::vector<TextPiece> pieces;
  {
    const py::gil_scoped_release release;
    pieces = cut_and_check(held.views(), options.replace, options.threads, options.piece_length);
  }
  // As many ids as there could be: memory that is never written to costs nothing, and what is too
  // much is given back.
  const std::size_t room = WordEncoder::max_ids(pieces, held.views().size(), options.add_eos);
  py::array ids(dtype, static_cast<py::ssize_t>(room));
  py::array_t<std::int64_t> offsets(static_cast<py::ssize_t>(held.views().size() + 1));
  Id* out = static_cast<Id*>(ids.mutable_data());
  std::int64_t* starts = offsets.mutable_data();
  {
    const py::gil_scoped_release release;
    encoder.encode(held.views(), pieces, options.add_eos, options.threads, out, starts);
  }
  ids.resize({starts[held.views().size()]}, /*refcheck=*/false);
  return py::make_tuple(ids, offsets);
}

py::tuple encode_batch(const WordEncoder& encoder, const py::iterable& texts, bool add_eos,
                       const py::object& dtype_like, std::optional<int> threads, bool replace,
                       std::size_t piece_length) {
  const EncodeOptions options{add_eos, threads.value_or(0), replace, piece_length};
  const py::dtype dtype = py::dtype::from_args(dtype_like);
  const bool integer = dtype.kind() == 'u' || dtype.kind() == 'i';
  if (integer && dtype.itemsize() == 4) {
    return encode_as<std::uint32_t>(encoder, texts, dtype, options);
  }
  if (dtype.kind() == 'u' && dtype.itemsize() == 2) {
    if (encoder.max_id() > UINT16_MAX) {
      PyErr_Format(PyExc_OverflowError, "id %u does not fit into uint16", encoder.max_id());
      throw py::error_already_set();
    }
    return encode_as<std::uint16_t>(encoder, texts, dtype, options);
  }
  throw py::type_error("dtype is " + py::cast<std::string>(py::str(dtype)) +
                       "; it must be uint16, int32 or uint32");
}

constexpr std::array<const char*, 4> kInstructionSets = {"portable", "avx2", "avx512", "amx"};

py::list instruction_sets() {
  py::list names;
  for (int i = 0; i <= static_cast<int>(best_instruction_set()); ++i) {
    names.append(kInstructionSets[static_cast<std::size_t>(i)]);
  }
  return names;
}

void use_instruction_set_named(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best_instruction_set()); ++i) {
    if (name != kInstructionSets[static_cast<std::size_t>(i)]) continue;
    return use_instruction_set(static_cast<InstructionSet>(i));
  }
  throw py::value_error("this processor has no instruction set " + name);
}

}  // namespace

void bind_word(py::module_& m) {
  py::class_<WordCounter>(m, "WordCounter",
                          "Counts words of any number of texts; remembers the order of first "
                          "appearance. Equal to the class of the same name in Python.")
      .def(py::init<>())
      .def("add", &add, py::arg("texts"), py::arg("threads") = py::none(),
           py::arg("replace") = false, py::kw_only(), py::arg("piece_length") = kPieceLength,
           "Counts the words of ``texts`` on ``threads`` threads, as many as there are if None. "
           "Bytes are UTF-8; ValueError where they are not, unless ``replace``. The result does "
           "not depend on ``piece_length``, in which texts are cut.")
      .def("most_common", &most_common, py::arg("n"),
           "The ``n`` most frequent words, most frequent first, ties by first appearance.")
      .def("items", &items, "All words by first appearance, and their counts (int64).");
  py::class_<WordEncoder>(m, "WordEncoder",
                          "Maps words to ids by a fixed vocabulary; unknown words become 0.")
      .def(py::init(&make_encoder), py::arg("vocab"))
      .def("encode_batch", &encode_batch, py::arg("texts"), py::arg("add_eos"), py::arg("dtype"),
           py::arg("threads") = py::none(), py::arg("replace") = false, py::kw_only(),
           py::arg("piece_length") = kPieceLength,
           "Ids of all texts in one array of ``dtype`` (uint16, int32 or uint32), and each text's "
           "start in it (int64, n + 1). See WordCounter.add for the rest.");
  bind_word_decoder(m);
  m.def("instruction_sets", &instruction_sets,
        "Those of which there are variants and which this processor has, slowest first.");
  m.def("use_instruction_set", &use_instruction_set_named, py::arg("name"),
        "For tests and measurements, while nothing else runs. The last of instruction_sets() is "
        "in use unless changed.");
}

}  // namespace tinylm
