"""convert and revert: which layers are replaced, which fuse and which must not, and other people's models."""

from __future__ import annotations

import copy
import enum
import pickle
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dispatch_log import ran_kernels
from models import NETWORKS, CifarNet, MnistNet, Network, first_result
from torch import Tensor, nn
from torch.nn.utils import prune

import fastnn
from fastnn import conversion_report, convert, revert
from fastnn.convert import ConversionReport

pytestmark = pytest.mark.filterwarnings("ignore:TF32")  # said by the switch of oneDNN, of other devices

IMAGES = (2, 1, 10, 10)


class Mode(enum.Enum):
    WHOLE, FEATURES = range(2)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def images(*shape: int) -> Tensor:
    return torch.randn(shape or IMAGES, generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, x: Tensor, *arguments: Any) -> list[Tensor]:
    """The output, and the gradients of its squares: zeros where a parameter has none."""
    torch.manual_seed(2)  # of dropout
    output = first_result(model(x, *arguments))
    model.zero_grad()
    output.square().mean().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [output.detach(), *grads]


def assert_same_results(model: nn.Module, converted: nn.Module, x: Tensor, *arguments: Any) -> None:
    """For small nets with few sums, whose float64 results on both sides agree to the last digits."""
    model, converted = copy.deepcopy(model).double(), copy.deepcopy(converted).double()
    for actual, expected in zip(
        results(converted, x.double(), *arguments), results(model, x.double(), *arguments), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------ replacing

LAYERS: dict[str, nn.Module] = {
    "Conv2d": nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
    "CrossEntropyLoss": nn.CrossEntropyLoss(label_smoothing=0.1),
    "Linear": nn.Linear(10, 3, bias=False),
    "LogSoftmax": nn.LogSoftmax(1),
    "MSELoss": nn.MSELoss(reduction="sum"),
    "MaxPool2d": nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    "NLLLoss": nn.NLLLoss(ignore_index=1),
    "ReLU": nn.ReLU(inplace=True),
    "Softmax": nn.Softmax(-1),
}


def test_every_layer_of_fastnn_replaces_torchs() -> None:
    assert sorted([*LAYERS, "Sequential"]) == fastnn.nn.__all__


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_by_itself(name: str) -> None:
    layer = copy.deepcopy(LAYERS[name])
    converted = convert(layer)
    assert type(converted) is getattr(fastnn.nn, name)
    assert type(layer) is getattr(nn, name)
    assert repr(converted) == repr(layer)
    logits = (torch.rand(4, 3), torch.tensor([0, 1, 2, 0]))
    inputs = {"CrossEntropyLoss": logits, "NLLLoss": logits, "MSELoss": (torch.rand(3), torch.rand(3))}
    x = inputs.get(name, (images(),))
    operator = {"MaxPool2d": "max_pool2d", "MSELoss": "mse_loss", "NLLLoss": "nll_loss", "LogSoftmax": "log_softmax"}
    with ran_kernels(operator.get(name, name.removesuffix("EntropyLoss").lower())):
        actual = converted(*(value.clone() for value in x))
    torch.testing.assert_close(actual, layer(*x))
    assert conversion_report(converted).replaced == {"": name}


def test_a_copy_shares_parameters_and_leaves_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    before = str(model)
    converted = convert(model)
    assert converted is not model and str(model) == before
    mine, theirs = (each.state_dict(keep_vars=True) for each in (converted, model))
    assert list(mine) == list(theirs)
    assert all(mine[key] is theirs[key] for key in theirs)


def test_in_place_keeps_every_object() -> None:
    model = small_net()
    modules, parameters = list(model.modules()), list(model.parameters())
    assert convert(model, inplace=True) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_what_a_model_holds_survives() -> None:
    model = small_net().double().eval()
    model[6].train()
    model[0].weight.requires_grad_(False)
    model[4].note = {"mine": 1}  # type: ignore[assignment]
    model.add_module("tied", nn.Linear(8, 3))
    model.tied.weight = model[6].weight
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model[3].register_forward_hook(lambda *_: seen.append("flatten"))
    handle = model[6].register_forward_hook(lambda *_: seen.append("last"))
    keys = list(model.state_dict())
    converted: Any = convert(model)
    assert [m.training for m in converted.modules()] == [m.training for m in model.modules()]
    assert not converted[0].weight.requires_grad and converted[0].weight.dtype is torch.float64
    assert converted[4].note == {"mine": 1}
    assert converted.tied.weight is converted[6].weight
    assert list(converted.state_dict()) == keys
    del converted.tied
    output = converted(images().double())
    assert seen == ["flatten", "last", "model"]
    output.sum().backward()
    before = model[6].weight.clone()
    optimizer.step()
    assert not torch.equal(model[6].weight, before)
    handle.remove()  # of the model's; the copy has its own
    model.load_state_dict(converted.state_dict(), strict=False)


def test_a_hook_can_be_removed_from_a_model_converted_in_place() -> None:
    model, seen = small_net(), []
    handle = model[6].register_forward_hook(lambda *_: seen.append(1))
    convert(model, inplace=True)
    handle.remove()
    model(images())
    assert not seen


def test_meta_and_half_precision_models_convert() -> None:
    assert convert(small_net().to("meta"))(images().to("meta")).shape == (2, 3)
    half = small_net().bfloat16()
    assert torch.equal(convert(half)(images().bfloat16()), half(images().bfloat16()))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaced_forward() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


KEPT = {
    "subclass": (lambda: Scaled(3, 3), "a subclass of Linear, which may compute something else"),
    "lazy": (lambda: nn.LazyLinear(3), "a subclass of Linear, which may compute something else"),
    "parametrized": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "parametrized"),
    "replaced forward": (replaced_forward, "its forward was replaced"),
    "unknown": (lambda: nn.GELU(), "fastnn has no GELU"),
    "script": (lambda: torch.jit.script(nn.Linear(3, 3)), "compiled by torch.jit"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("case", KEPT)
def test_what_stays_as_it_is_and_why(case: str) -> None:
    make, reason = KEPT[case]
    model = nn.Sequential(make(), nn.ReLU())
    converted = convert(model)
    assert type(converted[0]) is type(model[0])
    assert type(converted[1]) is fastnn.nn.ReLU
    assert conversion_report(converted).kept == {"0": reason}
    if case == "replaced forward":
        assert torch.equal(converted(torch.ones(1, 3)), torch.ones(1, 3))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("compiled", ["model", "part"])
def test_what_torch_jit_compiled_stays(compiled: str) -> None:
    model: Any = torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()))
    kept = {"": "compiled by torch.jit", **{name: "compiled by torch.jit" for name in "012"}}
    if compiled == "part":
        model = nn.Sequential(model, nn.Conv2d(2, 3, 3), nn.ReLU())
        kept = {f"0.{name}".rstrip("."): reason for name, reason in kept.items()}
    x = images()
    expected = model.eval()(x)
    model.train()
    converted = convert(model)
    report = conversion_report(converted)
    assert report.kept == kept
    assert report.fused == ({"1": ("2",)} if compiled == "part" else {})
    mine, theirs = (each.state_dict(keep_vars=True) for each in (converted, model))
    assert all(mine[key] is theirs[key] for key in theirs)
    torch.testing.assert_close(converted.eval()(x), expected)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(revert(convert(model, inplace=True)).eval()(x), expected)


@pytest.mark.parametrize("normalise", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_layers_go_on_working(normalise: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(normalise(nn.Conv2d(1, 2, 3)), nn.ReLU()).eval()
    assert_same_results(model, convert(model), images())
    assert str(convert(model)) == str(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", ["weight_norm", "spectral_norm", "prune"])
def test_weights_that_a_hook_computes_are_used(change: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    if change == "prune":
        prune.l1_unstructured(model[0], "weight", amount=0.5)
    else:
        getattr(nn.utils, change)(model[0])
    converted = convert(model, inplace=True)
    assert conversion_report(converted).fused == {"0": ("1",)}  # the hook sees the input alone
    actual = results(converted, images())
    for a, b in zip(actual, results(revert(converted, inplace=True), images()), strict=True):
        torch.testing.assert_close(a, b)


def test_filter_fn_decides_by_layer_and_name() -> None:
    asked: dict[str, type] = {}

    def filter_fn(module: nn.Module, name: str) -> bool:
        asked[name] = type(module)
        return name != "1"

    converted = convert(small_net(), filter_fn=filter_fn)
    assert asked == {n: type(m) for n, m in small_net().named_modules() if n and not isinstance(m, nn.Flatten)}
    report = conversion_report(converted)
    assert type(converted[1]) is nn.ReLU
    assert report.kept["1"] == "filter_fn"
    assert report.not_fused == {"0": "1 is kept: filter_fn"}


# -------------------------------------------------------------------------------------------------- fusing


class Block(nn.Module):
    """Layers to be called in ways that tests give."""

    def __init__(self, forward: Callable[..., Any] | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.way = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        assert self.way is not None
        return self.way(self, x)


def conv(out_channels: int = 4, in_channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def stages(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


FUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[str, ...]]]] = {
    "conv, relu": (lambda: stages(conv(4, 1), nn.ReLU()), {"0": ("1",)}),
    "conv, relu in place": (lambda: stages(conv(4, 1), nn.ReLU(inplace=True)), {"0": ("1",)}),
    "conv, relu, pool": (lambda: stages(conv(4, 1), nn.ReLU(), nn.MaxPool2d(2)), {"0": ("1", "2")}),
    "conv, pool, relu": (lambda: stages(conv(4, 1), nn.MaxPool2d(3, 2, 1), nn.ReLU()), {"0": ("1", "2")}),
    "conv, pool": (lambda: stages(conv(4, 1), nn.MaxPool2d((2, 1), (2, 3))), {"0": ("1",)}),
    "linear, relu": (lambda: stages(nn.Linear(10, 4), nn.ReLU()), {"0": ("1",)}),
    "identity between": (lambda: stages(conv(4, 1), nn.Identity(), nn.ReLU()), {"0": ("2",)}),
    "nested": (
        lambda: stages(stages(conv(4, 1)), stages(nn.ReLU(), stages(nn.MaxPool2d(2)))),
        {"0.0": ("1.0", "1.1.0")},
    ),
    "own forward": (lambda: Block(lambda m, x: m.pool(m.relu(m.conv(x)))), {"conv": ("relu", "pool")}),
    "over two forwards": (
        lambda: stages(Block(lambda m, x: m.relu(m.conv(x))), nn.MaxPool2d(2)),
        {"0.conv": ("0.relu", "1")},
    ),
    "one relu after two": (
        lambda: Block(lambda m, x: m.relu(m.more(m.relu(m.conv(x)))), more=conv()),
        {"conv": ("relu",), "more": ("relu",)},
    ),
    "one conv before two": (
        lambda: Block(lambda m, x: m.relu(m.conv(x)) + m.other(m.conv(x.neg())), other=nn.ReLU()),
        {"conv": ("relu", "other")},
    ),
    "as far as calls agree": (
        lambda: Block(lambda m, x: m.pool(m.relu(m.conv(x))).mean() + m.relu(m.conv(x.neg())).mean()),
        {"conv": ("relu",)},
    ),
    "part of a sequential": (
        lambda: Block(lambda m, x: m.body[1](m.body[0](x)), body=stages(conv(4, 1), nn.ReLU(), nn.GELU())),
        {"body.0": ("body.1",)},
    ),
}


@pytest.mark.parametrize("case", FUSED)
def test_what_fuses(case: str) -> None:
    make, fused = FUSED[case]
    torch.manual_seed(0)
    model = make()
    converted = convert(model)
    report = conversion_report(converted)
    assert report.fused == fused
    for name, others in fused.items():
        layer: Any = converted.get_submodule(name)
        kinds = {type(model.get_submodule(other)) for other in others}
        assert layer.activation == ("relu" if nn.ReLU in kinds else None)
        assert all(type(converted.get_submodule(other)) is nn.Identity for other in others)
        assert not {name, *others} & (report.kept.keys() | {other for other in others if other in report.replaced})
    with ran_kernels("linear" if case.startswith("linear") else "conv2d") as log:
        converted(images())
    assert not [record for record in log if record.operator.startswith("relu")]
    assert_same_results(model, converted, images())
    assert list(converted.state_dict()) == list(model.state_dict())
    assert str(revert(converted)) == str(model)


class OptionalReLU(Block):
    def forward(self, x: Tensor, relu: bool = True) -> Tensor:
        x = self.conv(x)
        return self.relu(x) if relu else x


class OptionalMask(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        return self.relu(x) if mask is None else x * mask


class TrainsWithout(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.training else self.relu(x)


class DependsOnData(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.conv, self.relu, self.body = conv(4, 1), nn.ReLU(), body

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        return self.body(x) if x.sum() > 0 else x


class LooksInside(DependsOnData):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return self.body(x)
        for layer in self.body[:1]:
            x = layer(self.conv(x))
        return x


def stores(m: Any, x: Tensor) -> Tensor:
    m.before = m.conv(x)
    return m.relu(m.before)


def stores_deeper(m: Any, x: Tensor) -> Tensor:
    m.kept["all"] = [m.conv(x)]
    return m.relu(m.kept["all"][0])


def in_nested_containers() -> nn.Module:
    model = Block(stores_deeper)
    model.kept = {}
    return model


def if_gradients_are_recorded(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    return m.relu(x) if torch.is_grad_enabled() else x


def without_gradient(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    with torch.no_grad():
        x = m.relu(x)
    return x + m.bias


def hooked(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = stages(conv(4, 1), nn.ReLU())
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: output + 1)
        return model

    return make


def with_bias() -> nn.Module:
    model = Block(without_gradient)
    model.bias = nn.Parameter(torch.ones(()))
    return model


FUNCTION = 'relu is called as a function; torch.compile(model, backend="fastnn") fuses it'
DIFFERS = "what follows differs between its calls, or is called elsewhere, too"
NOT_FUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hook on the conv": (hooked("0"), "it has hooks"),
    "hook on the relu": (hooked("1"), "1 has hooks or another forward"),
    "batch norm": (
        lambda: stages(conv(4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        "a batch norm follows (fold_batch_norm=True folds it)",
    ),
    "used twice": (lambda: Block(lambda m, x: m.relu(y := m.conv(x)) + y), "its result is used 2 times"),
    "returned too": (lambda: Block(lambda m, x: ((y := m.conv(x)), m.relu(y))), "its result is used 2 times"),
    "F.relu": (lambda: Block(lambda m, x: F.relu(m.conv(x))), FUNCTION),
    "torch.relu": (lambda: Block(lambda m, x: torch.relu(m.conv(x))), FUNCTION),
    "x.relu()": (lambda: Block(lambda m, x: m.conv(x).relu()), FUNCTION),
    "F.max_pool2d": (lambda: Block(lambda m, x: F.max_pool2d(m.conv(x), 2)), FUNCTION.replace("relu", "max_pool2d")),
    "relu elsewhere": (lambda: Block(lambda m, x: m.relu(m.relu(m.conv(x)) - 1)), DIFFERS),
    "two ways after one": (lambda: Block(lambda m, x: m.relu(m.conv(x)) - m.conv(x.neg())), DIFFERS),
    "a fused relu's neighbour": (
        lambda: Block(lambda m, x: m.relu(m.more(m.relu(m.conv(x)))) + m.relu(x), more=conv()),
        DIFFERS,
    ),
    "ceil_mode": (
        lambda: stages(conv(4, 1), nn.MaxPool2d(3, ceil_mode=True)),
        "1 has dilation, ceil_mode or return_indices",
    ),
    "subclass": (lambda: Block(lambda m, x: m.act(m.conv(x)), act=type("Act", (nn.ReLU,), {})()), FUNCTION),
    "in another order": (lambda: Block(lambda m, x: m.conv(m.relu(x))), ""),
    "an optional argument": (OptionalReLU, "OptionalReLU.forward cannot be traced: symbolically traced variables"),
    "an optional tensor": (OptionalMask, DIFFERS),
    "in training alone": (TrainsWithout, DIFFERS),
    "stored in an attribute": (lambda: Block(stores), "its result is used 2 times"),
    "stored in containers": (in_nested_containers, "its result is used 2 times"),
    "with gradients alone": (lambda: Block(if_gradients_are_recorded), DIFFERS),
    "grad mode between": (with_bias, "relu runs under another grad or autocast mode"),
    "ours, fused by hand": (
        lambda: stages(fastnn.nn.Conv2d(1, 4, 3, activation="relu"), nn.ReLU()),
        "it computes an activation or a pooling already",
    ),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_what_must_not_fuse_and_why(case: str) -> None:
    make, reason = NOT_FUSED[case]
    torch.manual_seed(0)
    model = make()
    converted = convert(model)
    report = conversion_report(converted)
    assert not report.fused
    first = next(iter(report.not_fused.values()), "")
    assert first.startswith(reason) and bool(first) == bool(reason)
    assert_same_results(model, converted, images())
    for arguments in {"an optional argument": (False,), "an optional tensor": (torch.ones(()),)}.get(case, ()):
        assert_same_results(model, converted, images(), arguments)


@pytest.mark.parametrize("training", [True, False])
def test_the_other_branch_of_forward_computes_what_it_did(training: bool) -> None:
    for model, arguments in ((OptionalReLU(), (False,)), (OptionalMask(), (torch.tensor(2.0),)), (TrainsWithout(), ())):
        model.train(training)
        assert_same_results(model, convert(model), images(), *arguments)


QUESTIONS: dict[str, Callable[[Any], bool]] = {
    "isinstance": lambda x: isinstance(x, Tensor),
    "isinstance of a list": lambda x: not isinstance(x, (list, tuple)),
    "isinstance of a sequence": lambda x: not isinstance(x, Sequence),
    "is_tensor": lambda x: torch.is_tensor(x),
    "hasattr": lambda x: not hasattr(x, "mask"),
    "getattr": lambda x: getattr(x, "mask", None) is None,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_the_class_of_the_input_decides_does_not_fuse(question: str) -> None:
    class Asks(DependsOnData):
        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.conv(x) if QUESTIONS[question](x) else self.relu(self.conv(x))

    model = Asks(stages(conv(1, 1), nn.ReLU()))
    converted = convert(model)
    report = conversion_report(converted)
    assert report.fused == {"body.0": ("body.1",)}
    assert report.not_fused["conv"] == (
        "Asks.forward cannot be traced: it asks for the class or attributes of a tensor, which may decide what it calls"
    )
    assert_same_results(model, converted, images())


def test_questions_to_others_are_no_question() -> None:
    """As those of torch's functions, whose C++ asks what their arguments are, and of code that asks layers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.relu(getattr(m, "conv")(x)) if isinstance(m.conv, nn.Conv2d) and hasattr(x, "shape") else x  # noqa: B009
        return halved(x)

    def halved(x: Tensor) -> Tensor:
        return torch.where(x > 0, x / 2, 0.0)

    assert conversion_report(convert(Block(forward))).fused == {"conv": ("relu",)}


def test_what_a_model_has_stored_is_what_it_was() -> None:
    model, converted = Block(stores), convert(Block(stores))
    converted.load_state_dict(model.state_dict())
    model(images()), converted(images())
    torch.testing.assert_close(converted.before, model.before)


def test_without_gradients_a_model_computes_what_it_did() -> None:
    model = Block(if_gradients_are_recorded)
    converted = convert(model)
    with torch.no_grad():
        torch.testing.assert_close(converted(images()), model(images()))


def test_an_untraceable_forward_fuses_what_it_calls_as_a_whole() -> None:
    model = DependsOnData(body=stages(conv(), nn.ReLU(), Block(lambda m, x: m.relu(m.conv(x[:, :1])))))
    converted = convert(model)
    report = conversion_report(converted)
    assert report.fused == {"body.0": ("body.1",), "body.2.conv": ("body.2.relu",)}
    assert report.not_fused["conv"].startswith("DependsOnData.forward cannot be traced: symbolically traced variables")
    assert_same_results(model, converted, images().abs())


def test_an_untraceable_forward_that_looks_into_a_sequential_keeps_it() -> None:
    model = LooksInside(body=stages(conv(), nn.ReLU()))
    converted = convert(model)
    assert not conversion_report(converted).fused
    assert_same_results(model, converted, images())


class ReachesInside(DependsOnData):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else self.body.conv(x)


def test_an_untraceable_forward_that_reaches_into_a_module_keeps_it() -> None:
    model = ReachesInside(Block(lambda m, x: m.relu(m.conv(x))))
    converted = convert(model)
    assert conversion_report(converted).not_fused["body.conv"].startswith("ReachesInside.forward cannot be traced")
    assert_same_results(model, converted, images().abs().neg())


class Reversed(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for layer in reversed(self):
            input = layer(input)
        return input


def test_a_sequential_with_its_own_forward_is_not_taken_at_its_order() -> None:
    model = Reversed(nn.ReLU(), conv(4, 1))
    assert conversion_report(convert(model)).fused == {"1": ("0",)}
    assert not conversion_report(convert(Reversed(conv(4, 1), nn.ReLU()))).fused
    assert_same_results(model, convert(model), images())


def test_tracing_leaves_no_trace() -> None:
    class Counts(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.steps += 1  # a buffer
            return self.relu(self.conv(x))

    model = Counts()
    model.calls = 0
    model.register_buffer("steps", torch.zeros(()))
    converted = convert(model, inplace=True)
    assert conversion_report(converted).fused == {"conv": ("relu",)}
    assert (model.calls, model.steps.item(), model.training) == (0, 0, True)


def test_converting_draws_no_random_numbers() -> None:
    drawn = []
    for model in (small_net(), Block(lambda m, x: m.relu(m.conv(x)) * sum(draw() for draw in DRAWS.values()))):
        random.seed(0), torch.manual_seed(0), np.random.seed(0)
        convert(model)
        drawn.append([draw() for draw in DRAWS.values()])
    random.seed(0), torch.manual_seed(0), np.random.seed(0)
    assert drawn == 2 * [[draw() for draw in DRAWS.values()]]


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "Python": random.random,
    "numpy": np.random.random_sample,
}


@pytest.mark.parametrize("generator", DRAWS)
def test_layers_that_are_skipped_at_random_do_not_fuse(generator: str) -> None:
    draw = DRAWS[generator]

    class SkipsAtRandom(DependsOnData):
        chance = 0.0  # to skip: tracing meets the ReLU

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.body(x) if self.training and draw() < self.chance else self.body(self.relu(x))

    inner = SkipsAtRandom(stages(conv(), nn.ReLU(), conv(1)))
    model = stages(Block(lambda m, x: m.relu(m.conv(x))), conv(1), inner, conv(4, 1), nn.ReLU())
    converted: Any = convert(model)
    report = conversion_report(converted)
    assert report.fused == {"0.conv": ("0.relu",), "2.body.0": ("2.body.1",), "3": ("4",)}
    assert report.not_fused["2.conv"] == (
        "SkipsAtRandom.forward cannot be traced: it draws random numbers, which may decide what it calls"
    )
    model[2].chance = converted[2].chance = 1.0
    assert_same_results(model, converted, images())


def test_attributes_are_taken_as_they_stand() -> None:
    class MayUseReLU(Block):
        use = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.relu(x) if self.use else x

    model = MayUseReLU()
    converted: Any = convert(model)
    model.use = converted.use = False
    assert (converted(images()) >= 0).all()
    for other in (convert(revert(converted)), convert(model, filter_fn=lambda module, name: name != "relu")):
        assert_same_results(model, other, images())


def test_a_model_that_cannot_be_copied_converts_in_place_unfused() -> None:
    model = Block(lambda m, x: m.relu(m.conv(x)))
    model.lock = threading.Lock()
    converted = convert(model, inplace=True)
    assert "cannot be copied to be traced" in conversion_report(converted).not_fused["conv"]
    assert type(model.conv) is fastnn.nn.Conv2d


class Pair(nn.Module):
    """A linear layer and a ReLU for it, called by a `forward` of the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(3, 3), nn.ReLU()


class Switched(Pair):
    def forward(self, x: Tensor, features: bool = False, mode: Mode = Mode.WHOLE) -> Tensor:
        x = self.linear(x)
        return x if features is True or mode is Mode.FEATURES else self.relu(x)


class LinearCalledDirectly(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x)) + self.linear.forward(x)


class ReluCalledDirectly(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x)) - self.relu.forward(-x)


class Collecting(nn.Module):
    """Keeps what layers of one kind return, as feature extractors do."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.layers, self.kind = small_net()[:3], kind

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, self.kind):
                found.append(x.sum())
        return x.sum() + torch.stack(found).sum()


@pytest.mark.parametrize("arguments", [(), (True,), (False, Mode.FEATURES)], ids=["default", "flag", "member"])
def test_branches_by_the_identity_of_an_optional_argument_keep_what_they_call(arguments: tuple[Any, ...]) -> None:
    model = Switched()
    converted = convert(model)
    assert_same_results(model, converted, images(4, 3), *arguments)
    assert not conversion_report(converted).fused


@pytest.mark.parametrize("kind", [LinearCalledDirectly, ReluCalledDirectly])
def test_layers_whose_forward_is_called_directly_do_not_fuse(kind: type[Pair]) -> None:
    model = kind()
    converted = convert(model)
    assert_same_results(model, converted, images(4, 3))
    assert conversion_report(converted).not_fused["linear"] == "its forward is called directly, past its hooks"


@pytest.mark.parametrize("kind", [nn.ReLU, nn.MaxPool2d])
def test_models_that_ask_what_their_layers_are_keep_them(kind: type) -> None:
    model = Collecting(kind)
    converted = convert(model)
    assert_same_results(model, converted, images())
    report = conversion_report(converted)
    assert not report.fused and report.replaced["layers.2"] == "MaxPool2d"
    assert set(report.not_fused) == {"layers.0"}


def test_converting_twice_changes_nothing_more() -> None:
    once = convert(small_net())
    twice = convert(once)
    assert str(twice) == str(once)
    assert not conversion_report(twice).replaced
    assert str(revert(twice)) == str(small_net())


def test_a_converted_sequential_trains_in_compiled_steps() -> None:
    model = convert(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = fastnn.training.compile_step(model, nn.CrossEntropyLoss(), optimizer)
    loss, _ = step(images(), torch.tensor([0, 2]))
    torch.testing.assert_close(loss, F.cross_entropy(small_net()(images()), torch.tensor([0, 2])))


# ------------------------------------------------------------------------------------- batch norm, revert


def normalised(bias: bool = True, affine: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=bias), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.MaxPool2d(2), conv(), nn.ReLU()
    )
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    if affine:
        nn.init.uniform_(model[1].weight, -2, 2)
    return model.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folding_batch_norm(bias: bool, affine: bool) -> None:
    model = normalised(bias, affine)
    weight = model[0].weight
    folded = convert(model, fold_batch_norm=True)
    report = conversion_report(folded)
    assert report.fused == {"0": ("1", "2", "3"), "4": ("5",)}
    assert model[0].weight is weight and type(model[1]) is nn.BatchNorm2d
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert folded[0].weight.requires_grad and folded[4].weight is model[4].weight
    with ran_kernels("conv2d_forward") as log, torch.no_grad():
        actual = folded(images())
    assert len(log) == 2
    torch.testing.assert_close(actual, model(images()))
    reverted = revert(folded)
    assert reverted[0].weight is weight
    assert str(reverted) == str(model) and list(reverted.state_dict()) == list(model.state_dict())
    assert torch.equal(reverted(images()), model(images()))


def test_one_batch_norm_behind_two_convolutions_folds_into_both() -> None:
    model = Block(lambda m, x: m.norm(m.conv(x)) * m.norm(m.other(x)), other=conv(4, 1), norm=normalised()[1]).eval()
    folded = convert(model, fold_batch_norm=True)
    assert conversion_report(folded).fused == {"conv": ("norm",), "other": ("norm",)}
    torch.testing.assert_close(folded(images()), model(images()))


class Reading(nn.Module):
    """A convolution and its batch norm, and a tensor of either that `forward` reads by itself."""

    def __init__(self, owner: str, name: str) -> None:
        super().__init__()
        self.convolution, self.batch_norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.owner, self.name = owner, name

    def forward(self, x: Tensor) -> Tensor:
        tensor = getattr(getattr(self, self.owner), self.name)
        return self.batch_norm(self.convolution(x)).sum() * tensor.square().sum()


@pytest.mark.parametrize("tensor", ["convolution.weight", "convolution.bias", "batch_norm.weight", "batch_norm.bias"])
def test_a_batch_norm_does_not_fold_where_forward_reads_the_tensors(tensor: str) -> None:
    model = Reading(*tensor.split(".")).eval()
    model.batch_norm.running_mean.uniform_(-1, 1)
    model.batch_norm.running_var.uniform_(0.5, 3)
    folded = convert(model, fold_batch_norm=True)
    assert type(folded.batch_norm) is nn.BatchNorm2d
    assert_same_results(model, folded, images(2, 3, 8, 8))
    assert "forward reads the tensors" in conversion_report(folded).not_fused["convolution"]


def test_folding_needs_eval_mode_and_running_statistics() -> None:
    with pytest.raises(ValueError, match="fold_batch_norm: expected a model in eval mode, got one in training mode"):
        convert(normalised().train(), fold_batch_norm=True)
    model = normalised()
    model[1].train()
    reason = "the batch norm that follows takes the batch's own statistics"
    assert conversion_report(convert(model, fold_batch_norm=True)).not_fused["0"] == reason
    pruned = normalised()
    prune.l1_unstructured(pruned[0], "weight", amount=0.5)
    assert "computed anew" in conversion_report(convert(pruned, fold_batch_norm=True)).not_fused["0"]


def test_revert_gives_back_torchs_layers_and_the_same_parameters() -> None:
    model = small_net()
    converted = convert(model)
    for reverted in (
        revert(converted),
        revert(pickle.loads(pickle.dumps(converted))),
        revert(copy.deepcopy(converted)),
    ):
        assert str(reverted) == str(model)
        assert all(vars(a).keys() == vars(b).keys() for a, b in zip(reverted.modules(), model.modules(), strict=True))
        assert torch.equal(reverted(images()), model(images()))
    assert all(a is b for a, b in zip(revert(converted).parameters(), model.parameters(), strict=True))
    assert type(converted[0]) is fastnn.nn.Conv2d  # reverted was a copy
    assert revert(converted, inplace=True) is converted and str(converted) == str(model)


def test_revert_keeps_a_parametrization_made_since() -> None:
    converted = convert(small_net())
    nn.utils.parametrizations.weight_norm(converted[0])
    x = images()
    reverted = revert(converted)
    assert_same_results(converted, reverted, x)
    assert [type(reverted[i]) for i in (1, 2, 4)] == [nn.ReLU, nn.MaxPool2d, nn.Linear]
    folded = convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval(), fold_batch_norm=True)
    nn.utils.parametrizations.weight_norm(folded[0])
    with pytest.raises(ValueError, match=r"expected 0 to be as convert left it.*got a ParametrizedConv2d"):
        revert(folded, inplace=True)
    assert type(folded[1]) is nn.Identity


def test_revert_keeps_layers_that_were_fastnns_before() -> None:
    model = nn.Sequential(fastnn.nn.Conv2d(1, 2, 3), nn.ReLU(), fastnn.nn.Linear(8, 2, activation="relu"))
    converted = convert(model)
    assert conversion_report(converted).fused == {"0": ("1",)}
    assert str(revert(converted)) == str(model)


# ---------------------------------------------------------------------------------------- report and errors


def test_the_report_reads_as_text() -> None:
    assert str(conversion_report(convert(small_net()))).splitlines() == [
        "3 replaced, 2 fused, 0 not fused, 1 kept",
        "fused: 0 + 1 + 2",
        "fused: 4 + 5",
        "replaced, Conv2d: 0",
        "replaced, Linear: 4, 6",
        "kept, fastnn has no Flatten: 3",
    ]
    assert str(ConversionReport()) == "0 replaced, 0 fused, 0 not fused, 0 kept"


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"model: expected one that fastnn.convert returned, got Sequential"):
        conversion_report(revert(convert(small_net())))
    for function in (convert, revert):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
            function(F.relu)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module .*fastnn.optim.convert takes optimizers"):
        convert(torch.optim.SGD(small_net().parameters()))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- other people's models


@pytest.fixture(params=[pytest.param(network, id=network.id) for network in NETWORKS])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    yield request.param


def small_model(network: Network) -> tuple[nn.Module, Tensor]:
    """With statistics and images that are not all alike."""
    torch.manual_seed(0)
    model = network.make_small()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model, images(1 if network.id == "VGG-11" else 4, *network.small_images)


def distance(actual: list[Tensor], exact: list[Tensor]) -> float:
    """Root mean square of the tensors' distances in units of their norms, but for those that are zero."""
    kept = [(a, b) for a, b in zip(actual, exact, strict=True) if b.norm() > 1e-12]
    return (sum(((a - b).norm() / b.norm()).square().item() for a, b in kept) / len(kept)) ** 0.5


def assert_as_exact_as_torch(
    model: nn.Module, changed: nn.Module, x: Tensor, compute: Callable[..., list[Tensor]] = results
) -> None:
    """At most twice as far from float64 as torch, whose distance also depends on the order in which it adds.

    A forward pass alone may be six times as far where Winograd's algorithm served: that is its usual error, as
    docs/performance.md states it. Over outputs and gradients it averages out.
    """
    exact = compute(copy.deepcopy(model).double(), x.double())
    theirs = []
    for with_onednn in (True, False):
        with torch.backends.mkldnn.flags(enabled=with_onednn):
            theirs.append(distance(compute(copy.deepcopy(model), x), exact))
    with ran_kernels("conv2d_forward", *(("conv2d_grad_weight",) if compute is results else ())) as records:
        ours = compute(changed, x)
    by_winograd = any(record.kernel.startswith("winograd") for record in records)
    factor = 6 if compute is output_alone and by_winograd else 2
    assert distance(ours, exact) <= factor * max(theirs)


@torch.no_grad()
def output_alone(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [first_result(model(x))]


EXPECTED = {  # replaced, fused
    "MNIST example": (4, 0),
    "CIFAR-10 tutorial": (6, 0),
    "ResNet-18": (39, 0),
    "MobileNetV3-small": (59, 9),
    "VGG-11": (11, 10),
    "U-Net": (41, 0),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_other_peoples_models_compute_the_same(network: Network, training: bool) -> None:
    model, x = small_model(network)
    converted = convert(model.train(training))
    report = conversion_report(converted)
    assert (len(report.replaced), len(report.fused)) == EXPECTED[network.id]
    assert_as_exact_as_torch(model, converted, x)
    assert str(revert(converted)) == str(model)


def test_other_peoples_models_compute_the_same_folded(network: Network) -> None:
    model, x = small_model(network)
    model.eval()
    folded = convert(model, fold_batch_norm=True)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert_as_exact_as_torch(model, folded, x, output_alone)


CURVES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "MNIST example": (MnistNet, nn.NLLLoss, (4, 1, 28, 28)),
    "CIFAR-10 tutorial": (CifarNet, nn.CrossEntropyLoss, (8, 3, 32, 32)),
}


def curve(script: str, dtype: torch.dtype, with_fastnn: bool, disturbance: float = 0, seed: int = 0) -> Tensor:
    """The losses of 100 steps of a script's training, on images with something to learn.

    ``disturbance`` is the standard deviation of a relative change of the first parameters.
    """
    make, make_loss, shape = CURVES[script]
    torch.manual_seed(0)
    model, loss_function = make().to(dtype), make_loss()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if disturbance else ():
            parameter *= 1 + disturbance * torch.randn(parameter.shape, generator=rng, dtype=dtype)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if with_fastnn:
        model, loss_function = convert(model, inplace=True), convert(loss_function)
        optimizer = fastnn.optim.convert(optimizer)
    pictures = torch.randn((10, *shape[1:]), generator=torch.Generator().manual_seed(3))
    losses = []
    for step in range(100):
        rng = torch.Generator().manual_seed(step)
        labels = torch.randint(10, shape[:1], generator=rng)
        batch = (pictures[labels] + torch.randn(shape, generator=rng)).to(dtype)
        torch.manual_seed(step)  # of dropout
        optimizer.zero_grad()
        loss = loss_function(model(batch), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize("script", CURVES)
def test_training_curves_match_over_100_steps(script: str) -> None:
    """In float64 to the last digits. In float32 rounding grows from step to step, so the measure is what becomes of one
    relative change of the parameters by 2^-20, a little more than Winograd's rounding."""
    exact = curve(script, torch.float64, False)
    assert exact[-10:].mean() < 0.8 * exact[:10].mean()  # it learns
    ours = {}
    for dtype in (torch.float64, torch.float32):
        with ran_kernels("conv2d", "linear", "sgd_step", dtype=dtype):
            ours[dtype] = curve(script, dtype, True)
    torch.testing.assert_close(ours[torch.float64], exact, rtol=1e-12, atol=1e-12)
    changed = [curve(script, torch.float64, False, disturbance=2**-20, seed=seed) for seed in range(4)]
    limit = max((other - exact).abs().max() for other in changed)
    assert (ours[torch.float32] - exact).abs().max() <= limit
