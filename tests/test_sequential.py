"""nn.Sequential: chains of layers as one node of autograd, with the bits of the layers one by one, and when not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from device import DEVICE, KERNEL_DTYPES
from dispatch_log import ran_kernels
from tolerance import assert_identical

import fastnn
from fastnn import _C, nn, sequential
from fastnn.compiled import CompiledForward

NETWORKS: dict[str, tuple[Callable[[], list[torch.nn.Module]], tuple[int, ...]]] = {
    "digits": (
        lambda: [
            nn.Conv2d(1, 8, 3, activation="relu", max_pool=2),
            nn.Conv2d(8, 16, 3, activation="relu", max_pool=2),
            torch.nn.Flatten(),
            nn.Linear(16, 8, activation="relu"),
            nn.Linear(8, 4),
        ],
        (3, 1, 10, 10),
    ),
    "many kinds": (
        lambda: [
            nn.Conv2d(3, 6, 5, padding=2, stride=2, bias=False),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6, activation="relu", max_pool=(3, 2, 1)),
            torch.nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(6, 7, (1, 2), dilation=(1, 2), activation="relu", max_pool=2),
            torch.nn.Flatten(),
            nn.ReLU(inplace=True),
            nn.Linear(14, 5),
        ],
        (2, 3, 34, 42),
    ),
    "images out": (
        lambda: [nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, activation="relu"), torch.nn.Identity()],
        (2, 2, 9, 7),
    ),
    "rows out of a ReLU": (lambda: [nn.Linear(6, 5, activation="relu"), nn.Linear(5, 9), nn.ReLU()], (4, 6)),
    "flattened out": (
        lambda: [nn.Conv2d(2, 4, 3, activation="relu"), nn.MaxPool2d(3), torch.nn.Flatten()],
        (2, 2, 8, 8),
    ),
}
needs_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="says nothing of a device")


def both(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Sequential, nn.Sequential, torch.Tensor]:
    """The same layers in torch's Sequential and in fastnn's, and an input."""
    torch.manual_seed(0)
    layers, shape = NETWORKS[name]
    plain = torch.nn.Sequential(*layers()).to(DEVICE, dtype)
    return plain, nn.Sequential(*plain), torch.randn(shape, dtype=dtype).to(DEVICE)


def is_chained(output: torch.Tensor) -> bool:
    """Whether a chain's node had a part in a result."""
    nodes = [output.grad_fn]
    for node in nodes:
        if node is not None and not node.name().startswith("_ChainFunction"):
            nodes += [function for function, _ in node.next_functions]
    return any(node is not None and node.name().startswith("_ChainFunction") for node in nodes)


@contextmanager
def called_layers() -> Iterator[list[torch.nn.Module]]:
    """The modules that are called meanwhile, as modules."""
    seen: list[torch.nn.Module] = []
    call = torch.nn.Module.__call__

    def note(module: torch.nn.Module, *args: object) -> object:
        seen.append(module)
        return call(module, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", note)
        yield seen


def results(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, wants_input: bool) -> list[torch.Tensor]:
    """Output, gradients of the parameters that have one, and of the input."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(wants_input)
    assert isinstance(model, torch.nn.Module)
    model.zero_grad()
    output = model(x)
    output.backward(torch.linspace(-1, 1, output.numel()).to(output).view_as(output))
    found = [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return [*found, x.grad] if wants_input else found  # type: ignore[list-item]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_identical(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("wants_input", [False, True], ids=["parameters", "input too"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels_last"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_bits_and_strides_are_those_of_the_layers_one_by_one(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format, wants_input: bool
) -> None:
    plain, model, x = both(name, dtype)
    plain.to(memory_format=memory_format)  # type: ignore[call-overload]
    if x.dim() == 4:
        x = x.contiguous(memory_format=memory_format)
    expected = results(plain, x, wants_input)
    for _ in range(3):  # recorded, and then run again
        with ran_kernels("conv2d_forward" if x.dim() == 4 else "linear_forward", dtype=dtype) as log:
            assert_same(results(model, x, wants_input), expected)
    with ran_kernels() as layers:
        results(plain, x, wants_input)
    copies = ("transpose",)  # of a Flatten, where layers one by one copy with torch
    assert [r.operator for r in log if r.operator not in copies] == [r.operator for r in layers]
    assert is_chained(model(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels_last"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_without_autograd_chains_keep_nothing_and_give_the_same_bits(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    plain, model, x = both(name, dtype)
    plain.to(memory_format=memory_format)  # type: ignore[call-overload]
    if x.dim() == 4:
        x = x.contiguous(memory_format=memory_format)
    flattened = isinstance(plain[-1], torch.nn.Flatten)
    with torch.no_grad(), called_layers() as called:
        assert_same([model(x)], [plain(x)])
    assert called.count(model[0]) == 2  # a shape's first call has no plan
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            with ran_kernels(dtype=dtype) as layers:
                expected = plain(x)
            with ran_kernels(dtype=dtype) as log, called_layers() as called:
                assert_same([model(x)], [expected])
        assert called == ([model, model[-1]] if flattened or name == "images out" else [model])
        copies = ("transpose",)
        assert [r.operator for r in log if r.operator not in copies] == [r.operator for r in layers]
    trained = results(model, x, True)
    assert_same(trained, results(plain, x, True))
    assert_same([model(x).detach()], trained[:1])


def test_without_autograd_a_chain_takes_the_memory_of_two_layers() -> None:
    layers = [nn.Conv2d(4, 4, 3, padding=1, activation="relu") for _ in range(9)]
    model, x = nn.Sequential(*layers, nn.MaxPool2d(2)).to(DEVICE), torch.randn(2, 4, 32, 32).to(DEVICE)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    taken: dict[bool, int] = {}
    with torch.no_grad():
        model(x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.profiler.profile(profile_memory=True) as profile:
            output = model(x)
        sizes = [event.self_cpu_memory_usage + event.self_device_memory_usage for event in profile.events()]
        taken[grad] = sum(size for size in sizes if size > 0) - output.nbytes
    assert taken[False] == 2 * x.nbytes
    assert taken[True] >= 9 * x.nbytes


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels_last"])
@pytest.mark.parametrize("layers", ["one channel", "one pixel", "pooled channel"])
def test_strides_of_one_channel_or_pixel(layers: str, memory_format: torch.memory_format, grad: bool) -> None:
    """Memory that is both layouts at once; the strides say which of them the next layer keeps."""
    last = {
        "one channel": [nn.Conv2d(3, 1, 1)],
        "one pixel": [nn.Conv2d(3, 5, 8)],
        "pooled channel": [nn.Conv2d(3, 1, 1), nn.MaxPool2d(2), nn.Conv2d(1, 4, 1)],
    }[layers]
    plain = torch.nn.Sequential(nn.Conv2d(3, 3, 1), *last).to(DEVICE, memory_format=memory_format)
    x = torch.randn(2, 3, 8, 8).to(DEVICE, memory_format=memory_format)
    with torch.set_grad_enabled(grad):
        ours, theirs = nn.Sequential(*plain)(x), plain(x)
        torchs = fastnn.revert(fastnn.convert(plain))(x)
    assert_same([ours.detach()], [theirs.detach()])
    assert ours.stride() == torchs.stride()


def test_plans_of_training_and_evaluation_do_not_crowd_each_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = sequential._Plan.__init__
    monkeypatch.setattr(sequential._Plan, "__init__", lambda self, *args: (made.append(1), make(self, *args))[1])
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)).to(DEVICE)
    for _ in range(3):
        for grad in (True, False):
            for n in range(1, sequential.MOST_PLANS + 1):
                with torch.set_grad_enabled(grad):
                    model(torch.zeros(n, 5, device=DEVICE))
    assert len(made) == 2 * sequential.MOST_PLANS
    model[0].weight.data = torch.zeros(5, 6, device=DEVICE).T  # a plan in the place of another
    model(torch.zeros(3, 5, device=DEVICE))
    assert len(model.__dict__[sequential.PARTS].made[1][0]._plans[True]) == sequential.MOST_PLANS


def test_replaced_parameters_are_not_held() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)).to(DEVICE), torch.zeros(2, 5, device=DEVICE)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for layer in model:
                output = model(x)
                if grad:
                    output.sum().backward()
                old = weakref.ref(layer.weight)
                layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight))
                del output
                assert old() is None
    assert_identical(model(x).detach(), model[1].bias.detach().expand(2, 4))


def test_a_weight_of_other_sizes_decides_anew_how_its_layer_pools() -> None:
    layer = nn.Conv2d(9, 9, 3, groups=3, max_pool=2)
    plain = torch.nn.Sequential(layer, nn.ReLU()).to(DEVICE)
    model = nn.Sequential(*plain)
    model(torch.randn(1, 9, 8, 8).to(DEVICE))
    layer.weight, layer.bias = (torch.nn.Parameter(torch.randn(shape).to(DEVICE)) for shape in ((12, 4, 3, 3), (12,)))
    x = torch.randn(1, 12, 8, 8).to(DEVICE)
    assert_same(results(model, x, True), results(plain, x, True))


@pytest.mark.parametrize("wants_input", [False, True], ids=["parameters", "input too"])
@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_that_the_backward_pass_does_not_read_may_change_before_it(name: str, wants_input: bool) -> None:
    plain, model, x = both(name)
    expected = results(plain, x, wants_input)[1:]
    x.requires_grad_(wants_input)
    output = model(x)
    with torch.no_grad():
        for layer in plain:
            if getattr(layer, "bias", None) is not None:
                layer.bias.add_(1)
        if not wants_input:
            plain[0].weight.mul_(2)
    model.zero_grad()
    output.backward(torch.linspace(-1, 1, output.numel()).to(output).view_as(output))
    assert_same([p.grad for p in model.parameters()] + ([x.grad] if wants_input else []), expected)


def test_what_a_second_derivative_reads_may_not_change_before_it() -> None:
    _, model, x = both("rows out of a ReLU")
    output = model(x)
    with torch.no_grad():
        model[0].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: expected a tensor of shape \(5,\)"):
        torch.autograd.grad(output.sum(), list(model.parameters()), create_graph=True)
    model[0].weight.requires_grad_(False)
    h = x.clone()
    output = model(h)
    h.add_(1)
    output.sum().backward()


def test_classes_that_look_like_layers_with_stages_are_called() -> None:
    for stages in ([1, 2], 4, lambda self: []):
        block = type("Block", (torch.nn.Module,), {"_stages": stages, "forward": lambda self, x: x + 1})
        model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), block()).to(DEVICE)
        x = torch.zeros(1, 5, device=DEVICE)
        assert_identical(model(x).detach(), torch.nn.Sequential(*model)(x).detach())


def test_parameters_that_are_not_trained_get_no_gradient() -> None:
    for frozen in ([0], [1], [0, 1, 3], [4], [1, 3, 4]):
        plain, model, x = both("digits")
        for number in frozen:
            plain[number].requires_grad_(False)
        assert_same(results(model, x, False), results(plain, x, False))
        assert_same(results(model, x, True), results(plain, x, True))
        with called_layers() as called:
            output = model(x)
        assert is_chained(output) == (frozen != [0, 1, 3])  # one layer alone is no chain
        alone = {(0,): [0], (0, 1, 3): [4]}.get(tuple(frozen), [])  # before or behind it is a chain
        assert called == [model, *(model[number] for number in alone)]
    plain.requires_grad_(False)
    assert_same(results(model, x, True), results(plain, x, True))
    model(x)
    with called_layers() as called:
        assert not model(x).requires_grad
    assert called == [model]


def test_a_pass_for_the_input_alone_makes_no_gradients_of_parameters() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 30 * 30, 10)
    model = fastnn.convert(torch.nn.Sequential(*layers).to(DEVICE))
    x = torch.randn(16, 3, 32, 32, device=DEVICE, requires_grad=True)
    leaves = [x, *model.parameters()]
    whole = torch.autograd.grad(model(x).square().sum(), leaves)
    for count in (1, 2, len(leaves)):
        with fastnn.explain_dispatch() as log:
            output = model(x)
            grads = torch.autograd.grad(output.square().sum(), leaves[:count])
        assert is_chained(output)
        assert ("conv2d_grad_weight" in {record.operator for record in log}) == (count > 1)
        for grad, expected in zip(grads, whole[:count], strict=True):
            assert_identical(grad, expected)
    output = model(x)
    output.retain_grad()
    output.square().sum().backward(inputs=[output])
    assert_identical(output.grad, 2 * output.detach())
    assert x.grad is None and all(parameter.grad is None for parameter in model.parameters())


def test_shapes_dtypes_and_memory_of_one_model_may_change() -> None:
    plain, model, x = both("images out", torch.float64)
    for size in range(5, sequential.MOST_PLANS + 15):
        x = torch.randn(1 + size % 3, 2, size, 2 * size, dtype=torch.float64).to(DEVICE)
        assert_same(results(model, x, True), results(plain, x, True))
    model.float()
    assert_same(results(model, x.float(), True), results(plain, x.float(), True))
    model.to(memory_format=torch.channels_last)
    assert_same(results(model, x.float(), True), results(plain, x.float(), True))
    model[0].weight.data = model[0].weight.data.clone()
    model[1].bias = torch.nn.Parameter(torch.ones_like(model[1].bias))
    assert_same(results(model, x.float(), True), results(plain, x.float(), True))


def test_changes_to_the_layers_are_seen() -> None:
    _, model, x = both("images out")
    changes: list[Callable[[], object]] = [
        lambda: setattr(model[0], "padding", (2, 1)),
        lambda: setattr(model[0], "activation", "relu"),
        lambda: setattr(model[1], "max_pool", 2),
        lambda: setattr(model[1], "bias", None),
        lambda: model.append(nn.ReLU().to(DEVICE)),
        lambda: model.insert(1, nn.Conv2d(4, 4, 1).to(DEVICE)),
        lambda: setattr(model[0], "stride", 2),
        lambda: model.__setitem__(0, nn.Conv2d(2, 4, 5, padding=3, dilation=2).to(DEVICE)),
        lambda: model.__delitem__(1),
    ]
    for change in changes:
        change()
        output = model(x)
        assert is_chained(output)
        assert_same([output.detach()], [torch.nn.Sequential(*model)(x).detach()])


def test_layers_that_something_watches_are_called() -> None:
    seen: list[str] = []
    _, model, x = both("digits")
    handles = [
        lambda: model[1].register_forward_hook(lambda *_: seen.append("forward")),
        lambda: model[1].register_forward_pre_hook(lambda *_: seen.append("pre")),
        lambda: model[1].register_full_backward_hook(lambda *_: seen.append("backward")),
        lambda: torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append("global") if module is model[1] else None
        ),
    ]
    for register, name in zip(handles, ("forward", "pre", "backward", "global"), strict=True):
        handle = register()
        model(x).sum().backward()
        assert seen == [name]
        seen.clear()
        handle.remove()
        assert is_chained(model(x))
    model[1].forward = lambda input: torch.zeros_like(nn.Conv2d.forward(model[1], input))  # type: ignore[method-assign]
    assert_identical(model(x).detach(), model[3:](torch.zeros(3, 16, device=DEVICE)).detach())


def test_chains_end_at_layers_that_no_kernel_has() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        nn.Conv2d(1, 4, 3, activation="relu"),
        nn.Conv2d(4, 4, 3),
        torch.nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.5),
        nn.Linear(8 * 36, 8, activation="relu"),
        nn.Linear(8, 4),
    ).to(DEVICE)
    model, x = nn.Sequential(*plain), torch.randn(2, 1, 10, 10).to(DEVICE)
    for training in (True, False):
        plain.train(training)
        torch.manual_seed(1)
        expected = results(plain, x, True)
        torch.manual_seed(1)
        assert_same(results(model, x, True), expected)
    assert is_chained(model(x))
    kinds = [type(part).__name__ for part in sequential._parts_of(model)]
    assert kinds == ["_Chain", "BatchNorm2d", "ReLU", "Conv2d", "Flatten", "Dropout", "_Chain"]


def test_tensors_that_are_no_parameters_of_a_layer_and_parameters_that_it_does_not_use() -> None:
    plain, model, x = both("digits")
    model[0].register_parameter("unused", torch.nn.Parameter(torch.ones(3, device=DEVICE)))
    assert_same(results(model, x, True), results(plain, x, True))
    assert is_chained(model(x)) and model[0].unused.grad is None
    weight = model[1].weight.detach() * 2
    del model[1].weight  # as in the replicas of DataParallel
    model[1].weight = weight
    assert_same(results(model, x, True), results(plain, x, True))


def test_tensors_that_share_memory_while_a_plan_is_made_are_told_apart_later() -> None:
    plain = torch.nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).to(DEVICE)
    model, x = nn.Sequential(*plain), torch.randn(5, 5).to(DEVICE)
    model(model[0].weight.detach())
    assert_same(results(model, x, True), results(plain, x, True))
    before, model[1].weight.data = model[1].weight.data, model[0].weight.data
    model[0].requires_grad_(True)
    assert_same(results(model, x, False), results(plain, x, False))
    model[1].weight.data = before
    assert_same(results(model, x, True), results(plain, x, True))


def test_parameters_with_the_negative_bit() -> None:
    layer = nn.Linear(5, 5).to(DEVICE)
    layer.weight = torch.nn.Parameter(torch._neg_view(torch.randn(5, 5).to(DEVICE)))
    plain = torch.nn.Sequential(layer, nn.Linear(5, 4).to(DEVICE))
    x = torch.randn(3, 5).to(DEVICE)
    assert_same(results(nn.Sequential(*plain), x, True), results(plain, x, True))


def test_layers_that_differ_from_what_they_say() -> None:
    """Arguments that change in place or hold what a constructor would not leave there, weights of another size."""
    plain, model, x = both("many kinds")
    for pool in ([[2, 2], None, 0], ([2, 2], None, 0)):
        model[5].max_pool = pool
        assert_same(results(model, x, True), results(plain, x, True))
    pool[0][0] = 1
    model[8].weight = torch.nn.Parameter(torch.randn(5, 28).to(DEVICE))
    assert_same(results(model, x, True), results(plain, x, True))
    plain, model, x = both("many kinds")
    model[4].kernel_size = sizes = [2, 2]
    model[4].stride = None
    assert_same(results(model, x, True), results(plain, x, True))
    sizes[0] = 1
    with pytest.raises(ValueError, match="weight") as theirs:
        plain(x)
    with pytest.raises(ValueError, match="weight") as ours:
        model(x)
    assert str(ours.value) == str(theirs.value)
    plain, model, x = both("rows out of a ReLU")
    model[1].weight = torch.nn.Parameter(torch.randn(3, 5, device=DEVICE))
    model[1].bias = None
    assert_same(results(model, x, True), results(plain, x, True))
    assert is_chained(model(x))
    plain, model, x = both("images out")
    model[1].weight = torch.nn.Parameter(torch.randn(3, 36, device=DEVICE))
    with pytest.raises(ValueError, match="weight: expected"):
        model(x)
    nothing = torch.nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1)).to(DEVICE)
    nothing[1].weight, nothing[1].bias = (torch.nn.Parameter(p[:0].detach()) for p in nothing[1].parameters())
    x = torch.randn(3, 5).to(DEVICE)
    assert_same(results(nn.Sequential(*nothing), x, True), results(nothing, x, True))


def test_a_layer_that_is_compiled_by_itself_is_called() -> None:
    _, model, x = both("digits")
    assert is_chained(model(x))
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        seen.append(len(inputs))
        return graph.forward

    model[3].compile(backend=backend)
    model(x)
    assert seen


def test_a_linear_layer_on_images_is_torchs() -> None:
    plain = torch.nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(6, 5), nn.Linear(5, 4)).to(DEVICE)
    x = torch.randn(2, 2, 8, 8).to(DEVICE)
    assert_same(results(nn.Sequential(*plain), x, True), results(plain, x, True))
    vectors = torch.nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(DEVICE)
    for shape in ((6,), (2, 3, 6)):
        x = torch.randn(shape).to(DEVICE)
        assert_same(results(nn.Sequential(*vectors), x, True), results(vectors, x, True))


def test_shared_layers_and_empty_batches() -> None:
    layer = nn.Linear(5, 5)
    plain = torch.nn.Sequential(layer, nn.ReLU(), layer).to(DEVICE)
    x = torch.randn(3, 5).to(DEVICE)
    assert_same(results(nn.Sequential(*plain), x, True), results(plain, x, True))
    plain, model, x = both("digits")
    assert_same(results(model, x[:0], True), results(plain, x[:0], True))


def test_errors_of_images_that_no_window_fits() -> None:
    for last in (nn.Conv2d(4, 2, 3, max_pool=2), nn.Conv2d(4, 2, 3, activation="relu", max_pool=(3, 2, 0))):
        plain = torch.nn.Sequential(nn.Conv2d(1, 4, 3), last, nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)).to(DEVICE)
        model, x = nn.Sequential(*plain), torch.randn(1, 1, 5, 5).to(DEVICE)
        for grad in (True, False):
            messages = []
            for network in (plain, model):
                with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="height of at least") as error:
                    network(x)
                messages.append(str(error.value))
            assert messages[0] == messages[1]
        with pytest.raises(ValueError, match="height of at least"):
            CompiledForward(model[:3]).on_batches(x, torch.zeros(1, dtype=torch.int64, device=DEVICE), 1)


def test_layers_without_a_weight_say_so() -> None:
    _, model, x = both("digits")
    model(x)
    model[3].weight = None
    with pytest.raises(TypeError, match=r"weight: expected a torch\.Tensor, got None"):
        model(x)


@pytest.mark.parametrize("shape", [(3, 2, 10, 10), (3, 1, 3, 3), (3, 1, 30, 30), (1, 10), (2, 2, 2, 2, 2)])
def test_errors_are_those_of_the_layers(shape: tuple[int, ...]) -> None:
    plain, model, _ = both("digits")
    x = torch.randn(shape).to(DEVICE)
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        plain(x)
    for _ in range(2):
        with pytest.raises(type(theirs.value)) as ours:
            model(x)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(TypeError):
        model([1.0])


# ---------------------------------------------------------------------------------------------------- rules of autograd


def test_the_second_derivative() -> None:
    for name in ("digits", "rows out of a ReLU"):
        plain, model, x = both(name, torch.float64)
        found = []
        for net in (plain, model):
            leaf = x.clone().requires_grad_()
            first = torch.autograd.grad(net(leaf).square().sum(), [leaf, *net.parameters()], create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [leaf, *net.parameters()])
            found.append([*first, *second])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_of_some_of_a_batch_of_losses_and_twice() -> None:
    plain, model, x = both("digits")
    wanted = [model[1].weight, model[4].bias]
    assert_same(list(torch.autograd.grad(model(x).sum(), wanted)), list(torch.autograd.grad(plain(x).sum(), wanted)))
    vectors = torch.eye(4, device=DEVICE).unsqueeze(1).expand(4, 3, 4)
    for a, b in zip(
        torch.autograd.grad(model(x), wanted, vectors, is_grads_batched=True),
        torch.autograd.grad(plain(x), wanted, vectors, is_grads_batched=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    output = model(x)
    first = torch.autograd.grad(output.sum(), wanted, retain_graph=True)
    model(x + 1)  # takes other memory
    assert_same(list(torch.autograd.grad(output.sum(), wanted)), list(first))
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


def test_gradients_add_up() -> None:
    plain, model, x = both("digits")
    for net in (plain, model):
        net.zero_grad()
        net(x).sum().backward()
        net(x + 1).square().sum().backward()
        if net is plain:
            expected = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    assert_same([p.grad for p in model.parameters()], expected)  # type: ignore[misc]


def test_what_changes_before_backward_is_noticed_and_what_may_change_may() -> None:
    _, model, x = both("digits")
    output = model(x)
    with torch.no_grad():
        model[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output = model(x)
    output.mul_(2).sum().backward()  # a linear layer's backward does not read it
    _, rectified, rows = both("rows out of a ReLU")
    output = rectified(rows)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_what_comes_before_the_first_trained_layer_is_not_held() -> None:
    _, model, x = both("digits")
    model[0].requires_grad_(False)
    output = model(x)
    assert is_chained(output)
    x.add_(1)
    with torch.no_grad():
        model[0].weight.mul_(2)
    output.sum().backward()
    with torch.inference_mode():
        inference = torch.randn(3, 1, 10, 10).to(DEVICE)
    model[0].requires_grad_(False)
    torch.nn.Sequential(*model)(inference).sum().backward()
    model(inference).sum().backward()


def test_weights_may_be_laid_out_anew_before_backward() -> None:
    plain, model, x = both("images out")
    plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    expected = results(plain, x, False)
    output = model(x)
    model.zero_grad()
    model.to(memory_format=torch.channels_last)
    output.backward(torch.linspace(-1, 1, output.numel()).to(output).view_as(output))
    for parameter, grad in zip(model.parameters(), expected[1:], strict=True):
        torch.testing.assert_close(parameter.grad, grad)
        assert not parameter.grad.requires_grad


def test_a_model_that_its_layers_refer_to_is_collected() -> None:
    plain, model, x = both("digits")
    model[0].__dict__["owner"] = model
    model[1].register_forward_hook(lambda *_, owner=model: None)
    model(x)
    alive = weakref.ref(model)
    del plain, model
    gc.collect()
    assert alive() is None


def test_a_recording_ends_with_an_error() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _C.Program().record(fail)
    _, model, x = both("digits")
    assert is_chained(model(x))


def test_a_graph_is_freed_without_the_garbage_collector() -> None:
    for name in NETWORKS:
        _, model, x = both(name)
        gc.collect()
        gc.disable()
        try:
            x = x.clone()
            alive = weakref.ref(x)
            output = model(x)
            del x
            assert alive() is not None
            del output
            assert alive() is None
        finally:
            gc.enable()


def test_hooks_on_saved_tensors_and_checkpointing() -> None:
    plain, model, x = both("digits")
    expected = results(plain, x, True)
    with torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True):
        assert_same(results(model, x, True), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        assert_same(results(model, x, True), results(plain, x, True))

    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.model, input, use_reentrant=False)  # type: ignore[no-any-return]

    assert_same(results(Checkpointed(), x, True), expected)


def test_modes_of_torch_take_the_layers() -> None:
    plain, model, x = both("digits")
    with torch.no_grad():
        assert_same([model(x)], [plain(x)])
    with torch.inference_mode():
        assert_same([model(x)], [plain(x)])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(model(x), plain(x))
    parameters = dict(model.named_parameters())
    given = {name: parameter * 2 for name, parameter in parameters.items()}
    assert_identical(
        torch.func.functional_call(model, given, (x,)).detach(), torch.func.functional_call(plain, given, (x,)).detach()
    )
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    expected = torch.func.jacrev(lambda p: torch.func.functional_call(plain, p, (x,)))(parameters)
    for name in parameters:
        torch.testing.assert_close(jacobian[name], expected[name])


def test_several_threads_run_one_model() -> None:
    plain, model, _ = both("digits")
    inputs = [torch.randn(1 + i % 4, 1, 10, 10).to(DEVICE) for i in range(24)]
    expected = [torch.autograd.grad(plain(x).square().sum(), list(plain.parameters())) for x in inputs]

    def gradients(x: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))

    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(gradients, inputs), expected, strict=True):
            assert_same(ours, list(theirs))


# ------------------------------------------------------------------------------------------------------ as a container


def test_copies_and_pickles_are_models_of_their_own() -> None:
    _, model, x = both("digits")
    before = model(x).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is nn.Sequential
        assert_identical(other(x).detach(), before)
        with torch.no_grad():
            other[0].weight.zero_()
        assert_identical(model(x).detach(), before)
        assert not torch.equal(other(x), before)
    assert type(model[1:3]) is nn.Sequential


def test_shallow_copies_with_layers_of_their_own_share_no_parts() -> None:
    """What DataParallel makes of a model, and calls in a thread each."""
    _, model, x = both("digits")
    model(x)
    replicas = []
    for factor in (0.5, 2.0):
        replica = model._replicate_for_data_parallel()
        replica._modules = {name: copy.deepcopy(layer) for name, layer in model._modules.items()}
        with torch.no_grad():
            replica[0].weight.mul_(factor)
        replicas.append(replica)
    expected = [replica(x) for replica in replicas]
    assert vars(replicas[0])[sequential.PARTS] is not vars(replicas[1])[sequential.PARTS]
    assert vars(replicas[0])[sequential.PARTS] is not vars(model)[sequential.PARTS]

    def calls(i: int) -> bool:
        return all(torch.equal(replicas[i](x), expected[i]) for _ in range(200))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(calls, range(2)))


def test_convert_takes_sequentials_and_revert_gives_them_back() -> None:
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(8), torch.nn.Flatten(), inner
    ).to(DEVICE)
    x = torch.randn(2, 1, 10, 10).to(DEVICE)
    converted = fastnn.convert(model)
    assert [type(module) for module in (converted, converted[4])] == [nn.Sequential] * 2
    assert is_chained(converted(x))
    torch.testing.assert_close(converted(x), model(x))
    assert fastnn.conversion_report(converted).replaced == {"0": "Conv2d", "4.0": "Linear", "4.2": "Linear"}
    unchanged = fastnn.convert(model, filter_fn=lambda *_: False)
    assert [type(module) for module in (unchanged, unchanged[4])] == [torch.nn.Sequential] * 2
    reverted = fastnn.revert(converted)
    assert [type(module) for module in (reverted, reverted[4])] == [torch.nn.Sequential] * 2

    class Doubled(torch.nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    assert type(fastnn.convert(Doubled(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))) is Doubled


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("name", NETWORKS)
def test_torch_jit_traces_a_model_that_has_not_been_called(name: str) -> None:
    _, ours, x = both(name)
    traced = torch.jit.trace(ours, x)  # traces again to check, and compares the graphs
    torch.testing.assert_close(traced(x), ours(x))


@needs_cpu
def test_compilers_see_the_layers() -> None:
    _, model, x = both("digits")
    expected = model(x).detach()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).detach(), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x).detach(), expected)
