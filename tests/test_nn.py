"""The layers' constructors: what their docstrings say they are equal to, and arguments of their own that are wrong."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnn import nn

Inputs = Callable[[], tuple[Tensor, ...]]


def images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 1, 9, 8),)


def rows() -> tuple[Tensor, ...]:
    return (torch.randn(4, 6),)


def labelled() -> tuple[Tensor, ...]:
    return torch.randn(4, 3).log_softmax(1), torch.tensor([2, 0, 1, 2])


def pairs() -> tuple[Tensor, ...]:
    return torch.randn(4, 3), torch.randn(4, 3)


# The layer, the inputs that it takes, and its arguments for each block of code in the docstring.
DOCUMENTED: dict[str, tuple[Inputs, list[dict[str, Any]]]] = {
    "Conv2d": (images, [{"in_channels": 1, "out_channels": 32, "kernel_size": 3}]),
    "CrossEntropyLoss": (labelled, [{"weight": torch.tensor([1.0, 2.0, 3.0]), "label_smoothing": 0.1}]),
    "Linear": (rows, [{"in_features": 6, "out_features": 5, "bias": False}]),
    "LogSoftmax": (rows, [{"dim": 1}]),
    "MSELoss": (pairs, [{"reduction": "sum"}]),
    "MaxPool2d": (images, [{"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}]),
    "NLLLoss": (labelled, [{"weight": torch.tensor([1.0, 2.0, 3.0]), "ignore_index": 1, "reduction": "none"}]),
    "ReLU": (rows, [{"inplace": True}]),
    "Softmax": (rows, [{"dim": 0}]),
}
for name, fused in {"Conv2d": {"activation": "relu", "max_pool": 2}, "Linear": {"activation": "relu"}}.items():
    DOCUMENTED[name][1].append({**DOCUMENTED[name][1][0], **fused})


@pytest.mark.parametrize("name", [name for name in nn.__all__ if name != "Sequential"])
def test_the_docstring_says_what_a_layer_is_equal_to(name: str) -> None:
    layer = getattr(nn, name)
    make_inputs, arguments = DOCUMENTED[name]
    text = inspect.getdoc(layer) or ""
    assert all(parameter in text for parameter in inspect.signature(layer).parameters)
    blocks = re.findall(r"^ {4}(torch\..*)$", text.partition("Equivalent to")[2], re.MULTILINE)
    assert len(blocks) == len(arguments)
    defaults = {p.name: p.default for p in inspect.signature(layer).parameters.values()}
    torch.manual_seed(0)
    inputs = make_inputs()
    for block, given in zip(blocks, arguments, strict=True):
        ours = layer(**given)
        theirs = eval(block, {"torch": torch}, {**defaults, **given})
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.data = mine.data
        expected = theirs(*(tensor.clone() for tensor in inputs))
        torch.testing.assert_close(ours(*(tensor.clone() for tensor in inputs)), expected, rtol=1e-4, atol=1e-5)
        own = {option: value for option, value in given.items() if option in ("activation", "max_pool")}
        assert ", ".join(f"{option}={value!r}".replace("'", '"') for option, value in own.items()) in text


WINDOWS: list[tuple[Any, str]] = [
    ((2, 2, 5), r"a padding from 0 to half of the kernel_size \(2, 2\), got \(5, 5\)"),
    ((2, 2, -1), r"a padding from 0 to half of the kernel_size \(2, 2\), got \(-1, -1\)"),
    (((4, 2), 2, (2, 2)), r"a padding from 0 to half of the kernel_size \(4, 2\), got \(2, 2\)"),
    ((2, 0, 0), r"a stride of at least 1, got \(0, 0\)"),
    ((2, -1, 0), r"a stride of at least 1, got \(-1, -1\)"),
    ((2, (2, 0), 0), r"a stride of at least 1, got \(2, 0\)"),
    ((0, 1, 0), r"a kernel_size of at least 1, got \(0, 0\)"),
]


@pytest.mark.parametrize(("max_pool", "words"), WINDOWS, ids=[str(window) for window, _ in WINDOWS])
def test_a_window_that_pools_nothing_is_named_by_the_constructor(max_pool: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^max_pool: expected {words}"):
        nn.Conv2d(1, 1, 3, max_pool=max_pool)


@pytest.mark.parametrize("window", [(1, None, 0), (2, None, 1), (3, 2, 1), ((4, 2), (1, 3), (2, 0))], ids=str)
def test_every_other_window_pools(window: Any) -> None:
    layer = nn.Conv2d(1, 2, 3, max_pool=window)
    (input,) = images()
    expected = torch.nn.MaxPool2d(*window)(torch.nn.functional.conv2d(input, layer.weight, layer.bias))
    torch.testing.assert_close(layer(input), expected)


def test_max_pool2d_returns_indices() -> None:
    (input,) = images()
    ours, theirs = (module.MaxPool2d(2, return_indices=True)(input) for module in (nn, torch.nn))
    for actual, expected in zip(ours, theirs, strict=True):
        assert torch.equal(actual, expected)


def test_fused_layers_show_what_is_fused() -> None:
    assert "activation='relu', max_pool=2" in repr(nn.Conv2d(1, 1, 3, activation="relu", max_pool=2))
    assert "activation='relu'" in repr(nn.Linear(1, 1, activation="relu"))
