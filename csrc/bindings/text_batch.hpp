// What the bindings of BPE share: texts of one call and arguments common to all of them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "pair_map.hpp"
#include "pretokenize.hpp"
#include "source_text.hpp"
#include "texts.hpp"

namespace tinylm {

namespace py = pybind11;

using MergeArray = py::array_t<TokenId, py::array::c_style | py::array::forcecast>;

// Texts of one call, str or UTF-8 in bytes, readable without the GIL: it holds references, so
// nothing can free them, and nothing may change them.
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

  // Raises the UnicodeDecodeError of bytes.decode for the first text that is not UTF-8, if any.
  void refuse_invalid_utf8() const {
    for (const SourceText& view : views_) {
      if (is_valid_utf8(view)) continue;
      const py::object decoded = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
          static_cast<const char*>(view.data), static_cast<py::ssize_t>(view.length), "strict"));
      if (!decoded) throw py::error_already_set();
    }
  }

  // All texts in parts of about kPartLength code points, so that several threads share a long one.
  std::vector<TextPart> parts() const {
    std::vector<TextPart> parts;
    for (std::size_t i = 0; i < size(); ++i) cut_text(views_[i], i, kPartLength, parts);
    return parts;
  }

  // Runs of parts for one thread at a time: [starts[i], starts[i + 1]) is a run.
  static std::vector<std::size_t> chunk_starts(const std::vector<TextPart>& parts) {
    std::vector<std::size_t> starts{0};
    std::size_t length = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      length += parts[i].source.length;
      if (length < kPartLength && i + 1 < parts.size()) continue;
      starts.push_back(i + 1);
      length = 0;
    }
    return starts;
  }

 private:
  static constexpr std::size_t kPartLength = 1 << 18;

  void add(py::object text) {
    if (PyBytes_Check(text.ptr())) {
      views_.push_back({{PyBytes_AS_STRING(text.ptr()),
                         static_cast<std::size_t>(PyBytes_GET_SIZE(text.ptr())), TextView::kUtf8},
                        false});
    } else if (PyUnicode_Check(text.ptr())) {
      const TextView view = view_of_str(text.ptr());
      views_.push_back({view, PyUnicode_IS_ASCII(text.ptr()) != 0});
    } else {
      throw py::type_error("texts must be str or bytes, not " +
                           std::string(Py_TYPE(text.ptr())->tp_name));
    }
    owners_.push_back(std::move(text));
  }

  std::vector<py::object> owners_;
  std::vector<SourceText> views_;
};

inline SplitPattern to_pattern(const std::string& name) {
  if (name == "gpt2") return SplitPattern::kGpt2;
  if (name == "cl100k") return SplitPattern::kCl100k;
  if (name == "cl100k_tiktoken") return SplitPattern::kCl100kTiktoken;
  if (name == "o200k") return SplitPattern::kO200k;
  if (name == "whitespace") return SplitPattern::kWhitespace;
  throw py::value_error("unknown pattern " + name);
}

inline std::array<TokenId, 256> to_byte_ids(const std::vector<TokenId>& ids) {
  if (ids.size() != 256) throw py::value_error("byte_ids must have 256 entries");
  std::array<TokenId, 256> array;
  std::copy(ids.begin(), ids.end(), array.begin());
  return array;
}

}  // namespace tinylm
