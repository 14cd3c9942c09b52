#include "bindings.hpp"

namespace {
#include "unicode_tables.inc"
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of tinylm.";
  m.attr("unicode_version") = kUnicodeVersion;
  tinylm::bind_bpe(m);
  tinylm::bind_word(m);
}
