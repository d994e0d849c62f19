"""Every public function against wrong and strange input: what torch refuses is refused, the rest is torch's result.

The table CALLS has one row per function. Each of its tensors is replaced in turn by each of STRANGE, each of its other
arguments by each of VALUES; fastnn.reference, which is torch's operators, says what must come out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import generator, random
from torch import Tensor

from fastnn import functional, nn, reference

ERRORS = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError, OverflowError)


@dataclass(frozen=True)
class Call:
    """``tensors`` make the tensor arguments by name, ``others`` are the rest."""

    id: str
    name: str
    tensors: Callable[[], dict[str, Tensor]]
    others: dict[str, Any] = field(default_factory=dict)

    def run(self, module: Any, **replaced: Any) -> Any:
        return getattr(module, self.name)(**{**self.tensors(), **self.others, **replaced})


def floats(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: random(shape, torch.float32, generator("wrong", name)) for name, shape in shapes.items()}


def labelled() -> dict[str, Tensor]:
    return {**floats(input=(4, 5))(), "weight": torch.arange(1.0, 6.0), "target": torch.tensor([1, 0, 4, 2])}


CALLS = (
    Call("linear", "linear", floats(input=(4, 6), weight=(5, 6), bias=(5,)), {"activation": None}),
    Call("linear_relu", "linear", floats(input=(4, 6), weight=(5, 6), bias=(5,)), {"activation": "relu"}),
    Call(
        "conv2d",
        "conv2d",
        floats(input=(2, 4, 7, 6), weight=(6, 2, 3, 3), bias=(6,)),
        {"stride": 1, "padding": 1, "dilation": 1, "groups": 2},
    ),
    Call(
        "conv2d_relu_pool",
        "conv2d",
        floats(input=(2, 3, 8, 7), weight=(6, 3, 3, 3), bias=(6,)),
        {"activation": "relu", "max_pool": 2},
    ),
    Call(
        "max_pool2d",
        "max_pool2d",
        floats(input=(2, 3, 6, 8)),
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False, "return_indices": False},
    ),
    Call("relu", "relu", floats(input=(4, 5)), {"inplace": False}),
    Call("softmax", "softmax", floats(input=(4, 5)), {"dim": 1, "dtype": None}),
    Call("log_softmax", "log_softmax", floats(input=(4, 5)), {"dim": 1, "dtype": None}),
    Call(
        "cross_entropy", "cross_entropy", labelled, {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.1}
    ),
    Call("cross_entropy_probabilities", "cross_entropy", floats(input=(4, 5), target=(4, 5)), {"reduction": "sum"}),
    Call("nll_loss", "nll_loss", labelled, {"ignore_index": -100, "reduction": "mean"}),
    Call("mse_loss", "mse_loss", floats(input=(4, 5), target=(4, 5)), {"reduction": "mean", "weight": None}),
)
each_call = pytest.mark.parametrize("call", [pytest.param(call, id=call.id) for call in CALLS])


# What a tensor may be instead of itself


def overlapping(x: Tensor) -> Tensor:
    """All elements along the last dimension overlap those of their neighbours."""
    strides = [max(1, stride // 2) for stride in x.contiguous().stride()]
    values = x.new_ones(x.numel() + 1).cumsum(0)
    if values.is_floating_point():
        values /= len(values)  # of size 1, as sums are compared
    return values.as_strided(x.shape, strides)


def negative_bit(x: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def inside_inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


STRANGE: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "int64": lambda x: x.long(),
    "int32": lambda x: x.int(),
    "uint8": lambda x: x.abs().byte(),
    "bool": lambda x: x > 0,
    "complex64": lambda x: x.to(torch.complex64),
    "scalar": lambda x: x.flatten()[0],
    "one_dimension_more": lambda x: x.unsqueeze(0),
    "one_dimension_less": lambda x: x[0],
    "first_size_0": lambda x: x[:0],
    "second_size_0": lambda x: x[:, :0] if x.dim() > 1 else x[:0],
    "last_size_0": lambda x: x[..., :0],
    "all_sizes_0": lambda x: x.new_empty([0] * x.dim()),
    "last_size_shorter": lambda x: x[..., 1:],
    "first_size_longer": lambda x: torch.cat([x, x]),
    "expanded": lambda x: x.flatten()[0].expand(x.shape),
    "overlapping": overlapping,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "negative_bit": negative_bit,
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr() if x.dim() == 2 else x.to_sparse(),
    "quantized": quantized,
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)) if x.dim() > 1 else torch.nested.nested_tensor([x]),
    "inference": inside_inference,
    "parameter": torch.nn.Parameter,
    "not_finite": lambda x: torch.where(torch.arange(x.numel()).view(x.shape) % 7 == 0, torch.nan, x),
    "infinite": lambda x: torch.where(torch.arange(x.numel()).view(x.shape) % 5 == 0, -torch.inf, x),
    "numpy": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "none": lambda x: None,
    "text": lambda x: "tensor",
    "number": lambda x: 1.5,
}

VALUES: dict[str, Any] = {
    "0": 0,
    "-1": -1,
    "7": 7,
    "2**31": 2**31,
    "2**62": 2**62,
    "2**63": 2**63,
    "-2**62": -(2**62),
    "1.5": 1.5,
    "nan": float("nan"),
    "none": None,
    "true": True,
    "text": "full",
    "empty_tuple": (),
    "one": (1,),
    "pair": (2, 1),
    "three": (1, 1, 1),
    "pair_of_text": ("1", "1"),
    "huge_pair": (2**62, 2**62),
    "tensor": torch.tensor([1.0, 2.0]),
}


# (row, argument, what) where fastnn refuses what torch takes, or the other way round, and why.
DIFFERENCES: dict[tuple[str, str, str], str] = {
    ("conv2d", "stride", "2**62"): "products of such numbers overflow: fastnn takes up to 2**31",
    ("conv2d", "stride", "huge_pair"): "as above",
    ("max_pool2d", "stride", "2**31"): "torch holds them in 32 bits; a single window needs no stride",
    ("cross_entropy", "target", "uint8"): "torch's label smoothing cannot read its own uint8 targets",
    ("cross_entropy", "ignore_index", "true"): "bool is an int",
    ("nll_loss", "ignore_index", "true"): "bool is an int",
    ("cross_entropy", "label_smoothing", "-1"): "torch computes something from a share below 0",
    ("cross_entropy", "label_smoothing", "-2**62"): "as above",
    ("cross_entropy", "label_smoothing", "nan"): "as above",
}
# Infinite weights times the zeros of the padding are NaN in torch; fastnn leaves pixels outside the image out of a sum
# where it can.
PADDED = ("conv2d", "weight", ("not_finite", "infinite"))


def outcome(function: Callable[[], Any], *errors: type[Exception]) -> tuple[str, Any]:
    """("value", the result) or ("error", what was raised)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # test_losses.py and others look at warnings
        try:
            return "value", function()
        except (*ERRORS, *errors) as error:
            return "error", error


def assert_as_torch(actual: tuple[str, Any], expected: tuple[str, Any]) -> None:
    kind, ours = actual
    if expected[0] == "error":
        assert kind == "error", f"torch refuses this ({expected[1]}), fastnn gave {ours}"
        assert str(ours), "an error without words"
        return
    assert kind == "value", f"torch takes this, fastnn raised {type(ours).__name__}: {ours}"
    theirs = expected[1]
    if isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
    else:
        ours, theirs = (ours,), (theirs,)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.layout, a.device, a.is_quantized) == (b.dtype, b.layout, b.device, b.is_quantized)
        assert a.requires_grad == b.requires_grad
        assert a.is_nested == b.is_nested
        if a.is_nested:
            assert all(torch.equal(x, y) for x, y in zip(a.unbind(), b.unbind(), strict=True))
            continue
        assert a.shape == b.shape
        if a.layout is torch._mkldnn:  # type: ignore[attr-defined]
            a, b = a.to_dense(), b.to_dense()
        # Sums of some dozens of terms of size 1, in another order.
        limit = 64 * torch.finfo(a.dtype).eps if a.dtype.is_floating_point or a.dtype.is_complex else 0
        torch.testing.assert_close(a, b, rtol=limit, atol=8 * limit, equal_nan=True)


def compare(call: Call, argument: str, what: str, make: Callable[[], Any]) -> None:
    """Calls fastnn and torch with the argument replaced by what `make` makes, each by one of its own."""
    theirs, ours = make(), make()
    expected = outcome(lambda: call.run(reference, **{argument: theirs}), AttributeError)  # torch's own for a list
    actual = outcome(lambda: call.run(functional, **{argument: ours}))
    if (call.id, argument, what) in DIFFERENCES:
        assert {actual[0], expected[0]} == {"value", "error"}, DIFFERENCES[call.id, argument, what]
    elif call.id == PADDED[0] and argument == PADDED[1] and what in PADDED[2]:
        a, b = actual[1].isfinite(), expected[1].isfinite()
        assert (a | ~b).all()
        assert torch.equal(a[..., 1:-1, 1:-1], b[..., 1:-1, 1:-1])
    else:
        assert_as_torch(actual, expected)


@each_call
@pytest.mark.parametrize("strange", STRANGE)
def test_strange_tensors(call: Call, strange: str) -> None:
    tried = 0
    for name in call.tensors():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                STRANGE[strange](call.tensors()[name])
        except ERRORS:
            continue  # torch itself cannot make such a tensor of these numbers
        compare(call, name, strange, lambda: STRANGE[strange](call.tensors()[name]))  # noqa: B023
        tried += 1
    assert tried


@each_call
def test_a_meta_tensor_among_others_is_refused(call: Call) -> None:
    """torch refuses some and computes with memory that is not there for others."""
    tensors = call.tensors()
    for name in tensors:
        if len(tensors) > 1:
            with pytest.raises(ERRORS, match=r"meta|memory"):
                call.run(functional, **{name: tensors[name].to("meta")})
    everywhere = call.run(functional, **{name: tensor.to("meta") for name, tensor in tensors.items()})
    assert everywhere.is_meta
    assert everywhere.shape == call.run(functional).shape


@pytest.mark.parametrize(
    ("call", "argument"),
    [pytest.param(call, name, id=f"{call.id}-{name}") for call in CALLS for name in call.others],
)
def test_strange_values(call: Call, argument: str) -> None:
    for what, value in VALUES.items():
        compare(call, argument, what, lambda: value)  # noqa: B023


@pytest.mark.parametrize("what", [what for what in VALUES if what not in ("none",)])
def test_strange_options_of_layers(what: str) -> None:
    """activation= and max_pool= are fastnn's own; the other arguments go to torch's constructors."""
    value = VALUES[what]
    with pytest.raises(ERRORS, match=r"^activation: expected"):
        nn.Linear(3, 2, activation=value)
    with pytest.raises(ERRORS, match=r"^activation: expected"):
        nn.Conv2d(1, 1, 3, activation=value)
    if what not in ("7", "2**31", "2**62", "2**63"):
        with pytest.raises(ERRORS, match=r"^max_pool: expected"):
            nn.Conv2d(1, 1, 3, max_pool=value)
    else:
        layer = nn.Conv2d(1, 1, 3, max_pool=value)
        with pytest.raises(ERRORS):  # larger than the image
            layer(torch.zeros(1, 1, 6, 6))
