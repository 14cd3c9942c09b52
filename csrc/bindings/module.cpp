#include "bindings.hpp"
#include "watch.hpp"

namespace {

#include "unicode_tables.inc"

// Runs Python's handlers of the signals that have come; the one of Ctrl-C raises.
void check_signals() {
  const pybind11::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of tinylm.";
  m.attr("unicode_version") = kUnicodeVersion;
  tinylm::Watch::set_check(&check_signals);
  tinylm::bind_bpe(m);
  tinylm::bind_bpe_train(m);
  tinylm::bind_training(m);
  tinylm::bind_word(m);
}
