// The texts of a call, wherever Python keeps them.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <string>
#include <vector>

#include "text_view.hpp"

namespace tinylm {

inline TextView view_of_str(PyObject* text) {
#if PY_VERSION_HEX < 0x030C0000
  if (PyUnicode_READY(text) != 0) throw pybind11::error_already_set();
#endif
  return {PyUnicode_DATA(text), static_cast<std::size_t>(PyUnicode_GET_LENGTH(text)),
          static_cast<int>(PyUnicode_KIND(text))};
}

// Strings, or objects with a buffer of bytes, that may be read without the GIL: references are
// held, a str never changes, and a buffer that is in use is neither freed nor resized. Made and
// destroyed with the GIL held.
class Texts {
 public:
  explicit Texts(const pybind11::iterable& texts) : owner_(texts) {
    views_.reserve(owner_.size());
    for (const pybind11::handle text : owner_) {
      if (PyUnicode_Check(text.ptr())) {
        views_.push_back(view_of_str(text.ptr()));
      } else {
        buffers_.emplace_back(text, views_.size());
        views_.push_back(buffers_.back().view());
      }
    }
  }
  const std::vector<TextView>& views() const { return views_; }

 private:
  class Buffer {
   public:
    Buffer(pybind11::handle text, std::size_t index) {
      const std::string name = "texts[" + std::to_string(index) + "]";
      const char* type = Py_TYPE(text.ptr())->tp_name;
      if (!PyObject_CheckBuffer(text.ptr())) {
        throw pybind11::type_error(name + " is of type " + type + ", not str or bytes");
      }
      if (PyObject_GetBuffer(text.ptr(), &buffer_, PyBUF_ND | PyBUF_FORMAT) != 0) {
        throw pybind11::error_already_set();
      }
      if (buffer_.itemsize != 1 || buffer_.ndim > 1) {
        PyBuffer_Release(&buffer_);
        throw pybind11::type_error(name + " is of type " + type + ", but not a row of bytes");
      }
    }
    ~Buffer() { PyBuffer_Release(&buffer_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    TextView view() const {
      return {buffer_.buf, static_cast<std::size_t>(buffer_.len), TextView::kUtf8};
    }

   private:
    Py_buffer buffer_{};
  };

  pybind11::tuple owner_;
  std::deque<Buffer> buffers_;
  std::vector<TextView> views_;
};

}  // namespace tinylm
