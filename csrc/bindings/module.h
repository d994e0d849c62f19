// One registration function per file of this folder.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace fastnn {

namespace py = pybind11;

void bind_runtime(py::module_& module);
void bind_program(py::module_& module);
void bind_linear(py::module_& module);
void bind_conv2d(py::module_& module);
void bind_batch(py::module_& module);
void bind_optimizer(py::module_& module);
void bind_max_pool2d(py::module_& module);
void bind_relu(py::module_& module);
void bind_softmax(py::module_& module);
void bind_cross_entropy(py::module_& module);
void bind_nll_loss(py::module_& module);
void bind_mse_loss(py::module_& module);

}  // namespace fastnn
