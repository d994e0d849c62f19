"""torch's own sample inputs, those of its OpInfo, ModuleInfo and OptimInfo tables: the same results, the same errors.

Values are compared by torch's own tolerances, relative to the largest value; the operators' tests have bounds for each.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

pytest.importorskip("expecttest")  # torch's tables import it

import torch
from device import DEVICE, ON_CUDA
from dispatch_log import ran_kernels
from torch import Tensor
from torch.testing._comparison import default_tolerances
from torch.utils._pytree import tree_leaves, tree_map

from fastnn import functional, nn, optim

with pytest.MonkeyPatch.context() as patch:  # importing them would freeze torch's switches for the whole process
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

pytestmark = pytest.mark.skipif(ON_CUDA, reason="the tables are asked for the dtypes that torch has on CPUs")


def name_of(info: Any) -> str:
    return info.optim_cls.__name__ if hasattr(info, "optim_cls") else info.name.split(".")[-1]


OPERATORS = [info for info in op_db if info.name.removeprefix("nn.functional.") in functional.__all__]
MODULES = [info for info in module_db if name_of(info) in nn.__all__]
OPTIMIZERS = [info for info in optim_db if name_of(info) in optim.__all__]

# The others go to torch, whatever their strides.
KERNEL_DTYPES = (torch.float32, torch.float64)

each_operator_dtype_and_format = pytest.mark.parametrize(
    ("info", "dtype", "memory_format"),
    [
        pytest.param(info, dtype, memory_format, id=f"{info.formatted_name}-{dtype}-{memory_format}")
        for info in OPERATORS
        for dtype in sorted(info.dtypes, key=str)
        for memory_format in (torch.preserve_format, torch.channels_last)
        if dtype in KERNEL_DTYPES or memory_format is torch.preserve_format
    ],
)
each_float = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def test_tables_have_every_operator() -> None:
    assert {name_of(info) for info in OPERATORS} == set(functional.__all__)
    assert {name_of(info) for info in MODULES} == set(nn.__all__) - {"Sequential"}
    assert {name_of(info) for info in OPTIMIZERS} == set(optim.__all__) - {"convert"}


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def copied(values: Any, memory_format: torch.memory_format = torch.preserve_format) -> Any:
    """The same values with tensors of their own, images in this format."""

    def copy_of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        clone = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).copy_(leaf.detach())
        if leaf.dim() == 4:
            clone = clone.to(memory_format=memory_format)
        return clone.requires_grad_(leaf.requires_grad)

    return tree_map(copy_of, values)


def assert_near(ours: Any, theirs: Any) -> None:
    for actual, expected in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        rtol, atol = default_tolerances(expected)
        largest = expected.detach().abs().nan_to_num(0, 0, 0).max().item() if expected.numel() else 0
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=max(atol, rtol * largest), equal_nan=True)


def outcome(function: Callable[[], Any]) -> Any:
    """What it returns, or what it raises."""
    try:
        return function()
    except Exception as error:
        return error


def both_raise(ours: Any, theirs: Any) -> bool:
    """Whether both outcomes are errors; fails where one is."""
    raised = isinstance(ours, Exception), isinstance(theirs, Exception)
    assert raised[0] == raised[1], f"fastnn: {ours!r}; torch: {theirs!r}"
    return raised[0]


def assert_same_gradients(outputs: tuple[Any, Any], sources: tuple[Any, Any]) -> None:
    """Of fastnn's output and torch's, where torch's has any, with respect to tensors in the sources."""
    ours, theirs = (tensors_of(output)[0] for output in outputs)
    assert ours.requires_grad == theirs.requires_grad
    if not theirs.requires_grad:
        return
    grad = torch.randn_like(theirs)

    def grads_of(output: Tensor, source: Any) -> Any:
        leaves = [tensor for tensor in tensors_of(source) if tensor.requires_grad]
        return outcome(lambda: torch.autograd.grad(output, leaves, grad, allow_unused=True))

    ours, theirs = grads_of(ours, sources[0]), grads_of(theirs, sources[1])
    if isinstance(theirs, Exception):
        assert str(theirs) == "grad_input must be contiguous"  # torch's nll_loss of images in channels_last
    else:
        assert_near(ours, theirs)


@each_operator_dtype_and_format
def test_operator(info: Any, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    name = name_of(info)
    differentiable = dtype.is_floating_point or dtype.is_complex
    torch.manual_seed(0)
    for sample in info.sample_inputs(DEVICE, dtype, requires_grad=differentiable):
        ours, theirs = (copied((sample.input, sample.args, sample.kwargs), memory_format) for _ in range(2))
        on_kernels = dtype in KERNEL_DTYPES and sample.input.numel() > 0
        with ran_kernels(name) if on_kernels else nullcontext():
            output = outcome(lambda: getattr(functional, name)(ours[0], *ours[1], **ours[2]))  # noqa: B023
        expected = outcome(lambda: getattr(torch.nn.functional, name)(theirs[0], *theirs[1], **theirs[2]))  # noqa: B023
        if both_raise(output, expected):
            continue
        assert_near(output, expected)
        for actual, other in zip(tensors_of(output), tensors_of(expected), strict=True):
            assert actual.stride() == other.stride() or other.numel() == 0
        assert_same_gradients((output, expected), (ours, theirs))


@pytest.mark.parametrize("info", [info for info in OPERATORS if info.error_inputs_func], ids=name_of)
def test_operator_raises_where_torch_does(info: Any) -> None:
    for error in info.error_inputs(DEVICE):
        sample = error.sample_input
        outcomes = [
            outcome(lambda: getattr(module, name_of(info))(sample.input, *sample.args, **sample.kwargs))  # noqa: B023
            for module in (functional, torch.nn.functional)
        ]
        both_raise(*outcomes)
        assert not isinstance(outcomes[0], (IndexError, AttributeError, AssertionError, UnboundLocalError))


@each_float
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("info", MODULES, ids=name_of)
def test_module(info: Any, training: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = info.module_inputs_func(info, device=DEVICE, dtype=dtype, requires_grad=True, training=training)
    for sample in inputs:
        options = {
            **sample.constructor_input.kwargs,
            **({"dtype": dtype} if name_of(info) in ("Conv2d", "Linear") else {}),
        }
        modules = []
        for library in (nn, torch.nn):
            torch.manual_seed(1)
            modules.append(getattr(library, name_of(info))(*sample.constructor_input.args, **options).train(training))
        layer, expected_layer = modules
        assert repr(layer) == repr(expected_layer)
        assert_near(layer.state_dict(), expected_layer.state_dict())
        assert layer.state_dict().keys() == expected_layer.state_dict().keys()
        call = sample.forward_input.args, sample.forward_input.kwargs
        for again in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            ours, theirs = copied(call), copied(call)
            output = outcome(lambda: again(*ours[0], **ours[1]))  # noqa: B023
            expected = outcome(lambda: expected_layer(*theirs[0], **theirs[1]))  # noqa: B023
            if both_raise(output, expected):
                continue
            assert_near(output, expected)
            sources = (ours, list(again.parameters())), (theirs, list(expected_layer.parameters()))
            assert_same_gradients((output, expected), sources)


@pytest.mark.parametrize("info", [info for info in MODULES if info.module_error_inputs_func], ids=name_of)
def test_module_raises_where_torch_does(info: Any) -> None:
    errors = info.module_error_inputs_func(info, device=DEVICE, dtype=torch.float32, requires_grad=False, training=True)
    for error in errors:
        made, called = error.module_error_input.constructor_input, error.module_error_input.forward_input
        outcomes = [
            outcome(lambda: getattr(library, name_of(info))(*made.args, **made.kwargs)(*called.args, **called.kwargs))  # noqa: B023
            for library in (nn, torch.nn)
        ]
        both_raise(*outcomes)


def moved(optimizer_class: type, options: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Parameters and state after five steps, with the state saved and loaded on the way."""
    rng = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in ((3,), (4, 5), (2, 3, 4, 5), ())
    ]
    optimizer = optimizer_class(parameters, **copied(options))
    for step in range(5):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=rng).to(dtype)
        optimizer.step()
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return parameters, optimizer.state_dict()


@each_float
@pytest.mark.parametrize("info", OPTIMIZERS, ids=name_of)
def test_optimizer(info: Any, dtype: torch.dtype) -> None:
    for sample in info.optim_inputs_func(device=DEVICE, dtype=dtype):
        ours, theirs = (
            outcome(lambda: moved(getattr(library, name_of(info)), sample.kwargs, dtype))  # noqa: B023
            for library in (optim, torch.optim)
        )
        if both_raise(ours, theirs):
            continue
        assert_near(ours[0], theirs[0])
        assert ours[1]["param_groups"][0].keys() == theirs[1]["param_groups"][0].keys()
        assert ours[1]["state"].keys() == theirs[1]["state"].keys()
        for number, state in theirs[1]["state"].items():
            assert ours[1]["state"][number].keys() == state.keys()


@pytest.mark.parametrize("info", OPTIMIZERS, ids=name_of)
def test_optimizer_raises_where_torch_does(info: Any) -> None:
    for error in info.optim_error_inputs_func(device=DEVICE, dtype=torch.float32):
        sample = error.optimizer_error_input
        ours, theirs = (
            outcome(lambda: getattr(library, name_of(info))(sample.params, **sample.kwargs))  # noqa: B023
            for library in (optim, torch.optim)
        )
        if error.error_on is OptimizerErrorEnum.STEP_ERROR:
            ours, theirs = outcome(ours.step), outcome(theirs.step)
        if both_raise(ours, theirs):
            assert type(ours) is type(theirs)
