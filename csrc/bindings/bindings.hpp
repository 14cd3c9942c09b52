// The only folder of csrc that sees Python. One function per part, called by module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace tinylm {

void bind_bpe(pybind11::module_& m);
void bind_bpe_train(pybind11::module_& m);
void bind_training(pybind11::module_& m);
void bind_word(pybind11::module_& m);
void bind_word_decoder(pybind11::module_& m);

}  // namespace tinylm
