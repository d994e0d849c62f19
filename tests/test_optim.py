"""Optimizers: torch's results for every option, torch's state in and out, torch's update where no kernel serves."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import itertools
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import generator, random
from fuzzing import fuzz, running_on
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close_bound, assert_identical, unit_roundoff

import fastnn
from fastnn import _C, optim, reference

DTYPES = [torch.float32, torch.float64]
SHAPES = [(3,), (17, 5), (4, 3, 3, 3), (1,), (0, 4), (20_011,), ()]
STEPS = 6

ADAM_OPTIONS = [
    dict(zip(("amsgrad", "maximize", "weight_decay", "decoupled_weight_decay"), values, strict=True))
    for values in itertools.product((False, True), (False, True), (0.0, 0.1), (False, True))
]
SGD_OPTIONS = [
    dict(zip(("momentum", "dampening", "nesterov", "maximize", "weight_decay"), values, strict=True))
    for values in itertools.product((0.0, 0.9), (0.0, 0.3), (False, True), (False, True), (0.0, 0.1))
    if not values[2] or (values[0] and not values[1])  # nesterov needs momentum and no dampening
]
CASES = [("Adam", options) for options in ADAM_OPTIONS] + [("SGD", options) for options in SGD_OPTIONS]
CASES += [("AdamW", {}), ("AdamW", {"amsgrad": True, "maximize": True})]


def identify(case: tuple[str, dict[str, Any]]) -> str:
    return case[0] + "".join(f",{key}={value}" for key, value in case[1].items() if value)


def make_parameters(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    tensors[2] = tensors[2].contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def clones(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in parameters]


def give_gradients(step: int, *lists: list[torch.nn.Parameter]) -> None:
    """The same gradients, all contiguous and as the first list's dtype rounds them, to each list."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameters in zip(*lists, strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator, dtype=torch.float64)
        for parameter in parameters:
            parameter.grad = gradient.to(parameters[0].dtype).to(parameter.dtype, copy=True)


def worst_ratio(got: list[Any], expected: list[Any], exact: list[Any], dtype: torch.dtype) -> float:
    """The largest distance from the exact values, in units of rounding of the largest parameter after STEPS steps.

    Each step rounds a dozen intermediate results that are at most as large as the parameter or the update.
    """
    unit = torch.finfo(dtype).eps * 12 * STEPS
    ratios = [
        ((a.detach().double() - e).abs().max() / (unit * e.abs().max().clamp_min(1))).item()
        for a, e in zip(got, exact, strict=True)
        if a.numel()
    ]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, expected, strict=True))
    return max(ratios)


@pytest.fixture(params=fastnn.available_isas())
def isa(request: pytest.FixtureRequest) -> Any:
    before = fastnn.get_isa()
    fastnn.set_isa(request.param)
    yield request.param
    fastnn.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_every_option_updates_as_torch_and_float64_do(case: tuple[str, dict[str, Any]], dtype: Any, isa: str) -> None:
    name, options = case
    ours = make_parameters(dtype)
    theirs, exact = clones(ours), [torch.nn.Parameter(p.detach().to(torch.float64, copy=True)) for p in ours]
    optimizer = getattr(optim, name)(ours, lr=0.01, **options)
    others = [getattr(torch.optim, name)(parameters, lr=0.01, **options) for parameters in (theirs, exact)]
    with fastnn.explain_dispatch() as log:
        for step in range(STEPS):
            give_gradients(step, ours, theirs, exact)
            for each in (optimizer, *others):
                each.step()
    assert worst_ratio(ours, theirs, exact, dtype) <= 1
    assert {record.isa for record in log} == {isa}
    assert {record.operator for record in log} == {"sgd_step" if name == "SGD" else "adam_step"}
    for parameter, other in zip(ours, theirs, strict=True):
        mine, its = optimizer.state[parameter], others[0].state[other]
        assert mine.keys() == {key for key, value in its.items() if value is not None}
        for key, value in mine.items():
            assert value.dtype == its[key].dtype
            assert torch.allclose(value, its[key], rtol=1e-4, atol=1e-6)


def test_reference_formulas_give_the_same_update() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = optim.AdamW([parameter], lr=0.1, weight_decay=0.2)
    expected = reference.AdamState(parameter.detach().clone(), torch.zeros(3), torch.zeros(3), None)
    for step in range(3):
        gradient = torch.tensor([0.3, -0.1, 2.0], dtype=torch.float64) * (step + 1)
        parameter.grad = gradient
        optimizer.step()
        expected = reference.adamw_step(
            expected.parameter, gradient, expected.exp_avg, expected.exp_avg_sq, step=step + 1, lr=0.1, weight_decay=0.2
        )
    torch.testing.assert_close(parameter.detach(), expected.parameter, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_state_moves_both_ways_in_the_middle_of_training(name: str, ours_first: bool) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    first, second = (optim, torch.optim) if ours_first else (torch.optim, optim)
    parameters = make_parameters(torch.float64)
    straight = clones(parameters)
    optimizer = getattr(first, name)(parameters, lr=0.01, **options)
    uninterrupted = getattr(torch.optim, name)(straight, lr=0.01, **options)
    for step in range(6):
        if step == 3:
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            optimizer = getattr(second, name)(parameters, lr=0.5)
            optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        give_gradients(step, parameters, straight)
        optimizer.step()
        uninterrupted.step()
    for a, b in zip(parameters, straight, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_groups_schedulers_tensor_rates_and_added_groups() -> None:
    ours = make_parameters(torch.float64)
    theirs = clones(ours)
    optimizers = []
    for module, parameters in ((optim, ours), (torch.optim, theirs)):
        groups = [{"params": parameters[:2]}, {"params": parameters[2:4], "lr": 0.1, "weight_decay": 0.3}]
        optimizer = module.Adam(groups, lr=torch.tensor(0.02, dtype=torch.float64))
        optimizer.add_param_group({"params": parameters[4:], "betas": (0.5, 0.6)})
        optimizers.append((optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)))
    for step in range(5):
        give_gradients(step, ours, theirs)
        for optimizer, scheduler in optimizers:
            optimizer.step()
            scheduler.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_parameters_without_gradient_and_their_state_stay() -> None:
    parameters = make_parameters(torch.float32)
    before = clones(parameters)
    optimizer = optim.Adam(parameters)
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.step()
    for i, (a, b) in enumerate(zip(parameters, before, strict=True)):
        assert torch.equal(a, b) == (i != 1)
    assert list(optimizer.state) == [parameters[1]]


def test_float32_and_float64_in_one_group() -> None:
    parameters = [torch.nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in DTYPES]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optim.SGD(parameters, lr=0.5).step()
    assert all(torch.equal(parameter, torch.full_like(parameter, 0.5)) for parameter in parameters)


def test_layouts_of_parameters_and_gradients() -> None:
    base = torch.randn(6, 8, dtype=torch.float64)
    ours = [torch.nn.Parameter(base.clone().t()), torch.nn.Parameter(base.clone()[:, ::2])]  # dense, and with gaps
    theirs = clones([torch.nn.Parameter(p.detach().contiguous()) for p in ours])
    pair = [optim.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)]
    with fastnn.explain_dispatch() as log:
        for _ in range(3):
            for a, b in zip(ours, theirs, strict=True):
                gradient = torch.randn(a.shape[::-1], dtype=torch.float64).t()  # transposed memory
                a.grad, b.grad = gradient.clone(), gradient.contiguous()
            for optimizer in pair:
                optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-13, atol=1e-14)
    assert {record.kernel for record in log} == {"adam"}


def test_an_infinite_parameter_stays_infinite_without_decay() -> None:
    for make in (optim.Adam, optim.SGD):
        parameter = torch.nn.Parameter(torch.tensor([float("inf"), 1.0]))
        parameter.grad = torch.ones(2)
        make([parameter], lr=0.1, weight_decay=0.0).step()
        assert parameter[0].item() == float("inf")


def test_a_small_gradient_survives_a_large_one_at_beta1_zero() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = optim.Adam([parameter], betas=(0.0, 0.9))
    for gradient in (1e8, 1e-3):
        parameter.grad = torch.full((1,), gradient)
        optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].item() == pytest.approx(1e-3)


def test_a_gradient_whose_square_overflows_keeps_a_finite_average() -> None:
    parameter, reference = torch.nn.Parameter(torch.zeros(40)), torch.nn.Parameter(torch.zeros(40))
    ours, theirs = optim.Adam([parameter], lr=0.1), torch.optim.Adam([reference], lr=0.1, fused=True)
    for gradient in (1e20, 1.0, 1.0):
        parameter.grad, reference.grad = (torch.full((40,), gradient) for _ in range(2))
        ours.step()
        theirs.step()
    assert ours.state[parameter]["exp_avg_sq"].isfinite().all()
    torch.testing.assert_close(parameter, reference)


def test_steps_follow_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = optim.Adam([parameter])
        for _ in range(2):
            parameter.grad = torch.ones(1)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[parameter]["step"].dtype is torch.float64
    assert optimizer.state[parameter]["step"].item() == 2


def test_parameters_that_share_memory_are_updated_in_turn() -> None:
    shared = torch.ones(100_000)
    parameters = [torch.nn.Parameter(shared), torch.nn.Parameter(torch.zeros(1))]
    parameters[1].data = parameters[0].data
    for parameter in parameters:
        parameter.grad = torch.ones(100_000)
    with fastnn.explain_dispatch() as log:
        optim.SGD(parameters, lr=0.25).step()
    assert torch.equal(shared, torch.full_like(shared, 0.5))
    assert [record.reason for record in log] == ["parameters that share memory"]


def test_a_refused_step_changes_nothing() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, 2))]
    parameters[0].grad = torch.ones(3)
    parameters[1].grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2))
    with pytest.raises(RuntimeError, match="sparse"):
        optim.Adam(parameters).step()
    assert torch.equal(parameters[0], torch.ones(3))


def test_closure_and_hooks_run_once() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([parameter], lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> torch.Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert calls == ["pre", "closure", "post"]
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.8))


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_closure_records_gradients_under_no_grad(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([parameter], lr=0.1)

    def closure() -> torch.Tensor:
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        optimizer.step(closure)
    assert (parameter < 1).all()


def test_hooks_run_once_and_are_told_what_torchs_tell() -> None:
    class Halved(optim.Adam):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(0.5)
            return super().step(closure)

    class Copied(optim.Adam):
        @functools.wraps(optim.Adam.step)
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Assigned(optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    seen: dict[type, list[Any]] = {}
    for kind in (torch.optim.Adam, optim.Adam, Halved, Copied, Assigned):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = optim.Adam([parameter]) if kind is Assigned else kind([parameter])
        optimizer.__class__ = kind
        calls = seen.setdefault(kind, [])
        optimizer.register_step_pre_hook(lambda _, args, kwargs, calls=calls: calls.append((len(args), kwargs)))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("post"))
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert seen[optim.Adam] == seen[torch.optim.Adam] == [(1, {}), "post"]
    assert seen[Halved] == [(1, {}), "post"]
    for kind in (Copied, Assigned):
        assert [call for call in seen[kind] if call == "post"] == ["post"]


def test_the_profiler_sees_steps_and_zero_grad() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([parameter])
    parameter.grad = torch.ones(3)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    assert names.count("Optimizer.step#Adam.step") == names.count("Optimizer.zero_grad#Adam.zero_grad") == 1
    assert parameter.grad is None


def test_zero_grad_fills_or_takes_away() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)
    parameters[1].grad = kept = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert parameters[1].grad is kept and torch.equal(kept, torch.zeros(3)) and parameters[0].grad is None
    optimizer.zero_grad()
    assert parameters[1].grad is None


def test_grad_scaler_unscales_and_skips_infinite_gradients() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.Adam([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((parameter * 3).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter.grad, torch.full((4,), 3.0))
    after = parameter.detach().clone()
    assert not torch.equal(after, torch.ones(4))
    parameter.grad = torch.full((4,), float("inf"))
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter, after)
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copier: Any) -> None:
    optimizer = optim.Adam([torch.nn.Parameter(torch.ones(5))], lr=0.1)
    for _ in range(2):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(5)
        optimizer.step()
    other = copier(optimizer)
    for each in (optimizer, other):
        each.param_groups[0]["params"][0].grad = torch.ones(5)
        each.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], other.param_groups[0]["params"][0])


FALLBACKS: dict[str, tuple[torch.dtype, dict[str, Any], str]] = {
    "bfloat16": (torch.bfloat16, {}, "bfloat16"),
    "complex": (torch.complex64, {}, "complex64"),
    "differentiable": (torch.float32, {"differentiable": True}, "differentiable=True"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_torch_updates_what_no_kernel_serves(name: str) -> None:
    dtype, options, reason = FALLBACKS[name]
    ours = torch.randn(4, 3, dtype=dtype)
    theirs = ours.clone()
    pair = []
    for module, tensor in ((optim, ours), (torch.optim, theirs)):
        tensor.requires_grad_(not options)
        pair.append((module.Adam([tensor], lr=0.1, **options), tensor))
    with fastnn.explain_dispatch() as log:
        for optimizer, tensor in pair:
            for step in range(3):
                tensor.grad = torch.full_like(tensor, step + 1.0)
                optimizer.step()
    assert torch.equal(ours, theirs)
    assert {record.kernel for record in log} == {"torch"}
    assert reason in log[0].reason


UNSERVED_OPTIONS = [
    ("Adam", {"lr": 1.0, "betas": (0.6, 0.7), "eps": 0.5, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
    ("AdamW", {"lr": 0.1, "betas": (0.6, 0.7), "eps": 0.5, "weight_decay": 0.3}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.4, "weight_decay": 0.3, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
]


@pytest.mark.parametrize(("name", "options"), UNSERVED_OPTIONS, ids=[identify(case) for case in UNSERVED_OPTIONS])
def test_torch_updates_with_every_option(name: str, options: dict[str, Any]) -> None:
    """Gradients of several sizes that shrink, so that eps, averages, their maxima and buffers all count."""
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16)) for _ in range(2))
    pair = [(getattr(optim, name)([ours], **options), ours), (getattr(torch.optim, name)([theirs], **options), theirs)]
    for optimizer, parameter in pair:
        for step in range(3):
            parameter.grad = torch.tensor([2.0, -0.5, 0.1], dtype=torch.bfloat16) * 0.5**step
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_sparse_gradients_are_refused_by_adam_and_taken_by_sgd() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 2))
    parameter.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2))
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optim.Adam([parameter]).step()
    optim.SGD([parameter], lr=0.5).step()
    assert torch.equal(parameter.detach()[:, 0], torch.tensor([1, 0.5, 1, 1]))


def test_an_update_counts_as_a_modification() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([weight], lr=0.1)
    output = (weight**2).sum()
    output.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_an_update_counts_as_a_modification_of_the_state() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state[weight]
    before = {key: value._version for key, value in state.items()}
    optimizer.step()
    assert before.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(state[key]._version > version for key, version in before.items())


def test_the_thread_count_does_not_change_a_bit() -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        parameters = [torch.nn.Parameter(torch.full((997 * i,), 0.5)) for i in range(1, 60)]
        optimizer = optim.Adam(parameters, lr=0.1)
        for step in range(2):
            give_gradients(step, parameters)
            optimizer.step()
        results.append(torch.cat([parameter.detach() for parameter in parameters]))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", optim.__all__[:3])
def test_the_docstring_has_every_option(name: str) -> None:
    optimizer = getattr(optim, name)
    described = (inspect.getdoc(optimizer) or "").partition("Equivalent to")[0]
    assert not [option for option in inspect.signature(optimizer).parameters if option not in described]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
@pytest.mark.parametrize("options", [{"lr": -1}, {"weight_decay": -1}], ids=str)
def test_bad_options_raise_as_torch_does(name: str, options: dict[str, float]) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError) as theirs:
        getattr(torch.optim, name)(parameters, **options)
    with pytest.raises(ValueError) as ours:
        getattr(optim, name)(parameters, **options)
    assert str(ours.value) == str(theirs.value)


def adam_arguments() -> dict[str, Any]:
    tensors = {name: [torch.zeros(2, 3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")}
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    flags = {"decoupled": False, "amsgrad": True, "maximize": False}
    return {**tensors, "steps": [torch.zeros(())], **numbers, **flags}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("grads", [], r"grads: expected 1 tensors, one for each of params, got 0"),
        (
            "grads",
            [torch.zeros(3, 2)],
            r"grads\[0\]: expected shape and strides of params\[0\], \(2, 3\), got \(3, 2\)",
        ),
        ("exp_avgs", [torch.zeros(2, 3, dtype=torch.float64)], r"exp_avgs\[0\]: expected float32 as params\[0\]"),
        ("max_exp_avg_sqs", [torch.zeros(3, 2).t()], r"max_exp_avg_sqs\[0\]: expected shape and strides"),
        ("params", [torch.zeros(4, 3)[::2]], r"params\[0\]: expected a tensor without gaps or overlaps"),
        ("steps", [torch.zeros(2)], r"steps\[0\]: expected one number"),
        ("steps", [torch.zeros((), dtype=torch.int64)], r"steps\[0\]: expected float32 or float64, got int64"),
        ("params", [torch.zeros(2, 3, dtype=torch.int64)], r"expected|params"),
    ],
)
def test_the_binding_names_what_is_wrong_and_changes_nothing(name: str, value: Any, words: str) -> None:
    arguments = adam_arguments() | {name: value}
    with pytest.raises((ValueError, TypeError), match=words):
        _C.adam_step(**arguments)
    assert all(not tensor.any() for key in ("params", "steps") for tensor in arguments[key])


def test_training_does_not_import_the_compiler(tmp_path: Path) -> None:
    """torch._dynamo takes a second to import, a quarter of a short training."""
    program = """
        import sys, torch, fastnn
        layer = torch.nn.Linear(2, 2)
        optimizer = fastnn.optim.Adam(layer.parameters(), lr=0.5)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.25})
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
        layer.weight.grad = torch.ones(2, 2)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        assert layer.weight.grad is None
        images, labels = torch.rand(8, 1, 12, 12), torch.arange(8)
        schedule = lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2)
        for loss in ("cross_entropy", torch.nn.functional.cross_entropy):  # compiled and through autograd
            model = fastnn.CNNClassifier((1, 12, 12))
            checkpoint = sys.argv[1] if loss == "cross_entropy" else None
            model.fit(images, labels, epochs=2, batch_size=8, loss=loss, scheduler=schedule, checkpoint=checkpoint)
        print("torch._dynamo" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "checkpoint")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.splitlines()[-1] == "False"


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "fused": True}),
    ("AdamW", {"foreach": True}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("convert_at", [0, 3])
@pytest.mark.parametrize("case", OPTIMIZERS, ids=identify)
def test_convert_goes_on_with_state_schedulers_and_hooks(case: tuple[str, dict[str, Any]], convert_at: int) -> None:
    name, options = case
    # Contiguous, since torch's fused=True takes gradients of other strides than the parameter's for such.
    ours = [torch.nn.Parameter(p.detach().contiguous()) for p in make_parameters(torch.float64)]
    theirs = clones(ours)
    optimizer, other = (
        getattr(torch.optim, name)([{"params": p[:3], "lr": 0.5}, {"params": p[3:]}], lr=0.1, **options)
        for p in (ours, theirs)
    )
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (optimizer, other)]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for step in range(STEPS):
        if step == convert_at:
            held = [tensor for state in optimizer.state.values() for tensor in state.values()]
            assert optim.convert(optimizer) is optimizer
            assert type(optimizer) is getattr(optim, name)
            still = [tensor for state in optimizer.state.values() for tensor in state.values()]
            assert all(a is b for a, b in zip(held, still, strict=True))
            assert optim.convert(optimizer) is optimizer
        give_gradients(step, ours, theirs)
        with fastnn.explain_dispatch() as log:
            optimizer.step()
        other.step()
        for scheduler in schedulers:
            scheduler.step()
        operator = "sgd_step" if name == "SGD" else "adam_step"
        assert {record.operator for record in log} == ({operator} if step >= convert_at else set())
    assert calls == ["before", "after"] * STEPS
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in other.param_groups]
    assert optimizer.defaults == other.defaults
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-14)
    other.load_state_dict(optimizer.state_dict())
    copy.deepcopy(optimizer).step()


def test_convert_refuses_what_it_does_not_know() -> None:
    class Own(torch.optim.SGD):
        pass

    parameters = make_parameters(torch.float32)
    for other in (torch.optim.RMSprop(parameters), Own(parameters)):
        got = type(other).__name__
        with pytest.raises(TypeError, match=f"optimizer: expected a torch.optim.SGD, Adam or AdamW, got {got}"):
            optim.convert(other)
    replaced = torch.optim.SGD(parameters)
    replaced.step = lambda: None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError, match="optimizer: expected the step of SGD, got one that replaces it"):
        optim.convert(replaced)
    assert type(replaced) is torch.optim.SGD


SIZES = st.lists(
    st.integers(0, 40).map(lambda n: (n,)) | st.just((3, 5, 3, 3)) | st.just((9001,)), min_size=1, max_size=4
)
RATES = st.sampled_from([0.0, 1e-3, 0.1, 1.0])
DECAYS = st.sampled_from([0.0, 0.01, 0.5])


def drawn_parameters(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, same_sign: bool, sign: int
) -> list[torch.nn.Parameter]:
    """Parameters with gradients; with `same_sign` these point where weight decay points, so that nothing cancels."""
    rng = generator("optimizer", str(shapes))
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(random(shape, dtype, rng))
        grad = random(shape, dtype, rng)
        parameter.grad = grad.abs() * parameter.detach().sign() * sign if same_sign else grad
        parameters.append(parameter)
    return parameters


@fuzz(40)
@given(
    shapes=SIZES,
    options=st.fixed_dictionaries(
        {
            "lr": RATES,
            "betas": st.tuples(st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([0.0, 0.9, 0.999])),
            "eps": st.sampled_from([1e-8, 1e-3]),
            "weight_decay": DECAYS,
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
    decoupled=st.booleans(),
    taken=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(fastnn.available_isas()),
)
def test_adam_from_any_state(
    shapes: list[tuple[int, ...]], options: dict[str, Any], decoupled: bool, taken: int, dtype: torch.dtype, isa: str
) -> None:
    """One step after `taken` others, against the formula in float64."""
    (beta1, beta2), lr, decay, eps = options["betas"], options["lr"], options["weight_decay"], options["eps"]
    coupled = 0.0 if decoupled else decay
    parameters = drawn_parameters(shapes, dtype, coupled != 0, -1 if options["maximize"] else 1)
    optimizer = (optim.AdamW if decoupled else optim.Adam)(parameters, **options)
    rng = generator("state", taken)
    before = []
    for p in parameters:
        state = {key: random(tuple(p.shape), dtype, rng) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
        state["exp_avg_sq"], state["max_exp_avg_sq"] = state["exp_avg_sq"] ** 2, state["max_exp_avg_sq"] ** 2
        if not options["amsgrad"]:
            del state["max_exp_avg_sq"]
        copies = {key: value.to(torch.float64, copy=True) for key, value in state.items()}
        before.append((p.detach().to(torch.float64, copy=True), copies))
        optimizer.state[p] = {"step": torch.tensor(float(taken)), **state}
    with running_on(isa), fastnn.explain_dispatch() as log:
        optimizer.step()
    assert [record.operator for record in log] == ["adam_step"]
    step, u = taken + 1, unit_roundoff(dtype) * (2 if dtype == torch.float64 else 1)
    function = reference.adamw_step if decoupled else reference.adam_step
    for p, (old, state) in zip(parameters, before, strict=True):
        grad = p.grad.double()
        expected = function(old, grad, *state.values(), step=step, **options)
        # A moment is a sum of two products, its factors rounded: 5 roundings of each, and 3 more make the gradient.
        reach = grad.abs() + coupled * old.abs()
        first = 2 * (beta1 * state["exp_avg"].abs() + (1 - beta1) * reach)
        assert_close_bound(optimizer.state[p]["exp_avg"], expected.exp_avg, 8 * u * first, "exp_avg")
        second = beta2 * state["exp_avg_sq"] + (1 - beta2) * reach**2
        bound = 12 * u * second + torch.finfo(dtype).tiny
        assert_close_bound(optimizer.state[p]["exp_avg_sq"], expected.exp_avg_sq, bound, "exp_avg_sq")
        used = second if expected.max_exp_avg_sq is None else torch.maximum(state["max_exp_avg_sq"], second)
        denominator = (used / (1 - beta2**step)).sqrt() + eps
        # The root halves those 12; root, scale, eps, quotient, rate, product and difference round once each.
        update = lr / (1 - beta1**step) * first / denominator
        bound = (8 + 6 + 8) * u * update + 4 * u * old.abs() + torch.finfo(dtype).tiny
        assert_close_bound(p, expected.parameter, bound, "parameter")


@fuzz(30)
@given(
    shapes=SIZES,
    options=st.fixed_dictionaries(
        {
            "lr": RATES,
            "momentum": st.sampled_from([0.0, 0.5, 0.99]),
            "dampening": st.sampled_from([0.0, 0.3]),
            "weight_decay": DECAYS,
            "nesterov": st.booleans(),
            "maximize": st.booleans(),
        }
    ).filter(lambda o: not o["nesterov"] or (o["momentum"] and not o["dampening"])),
    first=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(fastnn.available_isas()),
)
def test_sgd_from_any_state(
    shapes: list[tuple[int, ...]], options: dict[str, Any], first: bool, dtype: torch.dtype, isa: str
) -> None:
    parameters = drawn_parameters(shapes, dtype, False, 1)
    optimizer = optim.SGD(parameters, **options)
    rng = generator("momentum", str(shapes))
    buffers: list[torch.Tensor | None] = []
    for p in parameters:
        buffers.append(None)
        if options["momentum"] and not first:
            buffers[-1] = random(tuple(p.shape), torch.float32, rng).double()
            optimizer.state[p] = {"momentum_buffer": buffers[-1].to(dtype, copy=True)}
    before = [p.detach().to(torch.float64, copy=True) for p in parameters]
    with running_on(isa), fastnn.explain_dispatch() as log:
        optimizer.step()
    assert [record.operator for record in log] == ["sgd_step"]
    u, momentum = unit_roundoff(dtype) * (2 if dtype == torch.float64 else 1), options["momentum"]
    for p, old, buffer in zip(parameters, before, buffers, strict=True):
        expected = reference.sgd_step(old, p.grad.double(), buffer, **options)
        # At most 10 roundings stand behind each term: decay, momentum, dampening, Nesterov, rate and their factors.
        reach = p.grad.double().abs() + options["weight_decay"] * old.abs()
        held = reach + (0 if buffer is None else momentum * buffer.abs())
        bound = 10 * u * (old.abs() + options["lr"] * (reach + 2 * held)) + torch.finfo(dtype).tiny
        assert_close_bound(p, expected.parameter, bound, "parameter")
        if momentum:
            assert_close_bound(
                optimizer.state[p]["momentum_buffer"], expected.momentum_buffer, 10 * u * held, "momentum_buffer"
            )


def test_a_momentum_buffer_of_another_dtype_is_updated_by_torch() -> None:
    outcomes = []
    for module in (optim, torch.optim):
        parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = module.SGD([parameter], lr=0.1, momentum=0.9)
        parameter.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        optimizer.step()
        parameter.data = parameter.data.float()
        parameter.grad = torch.tensor([3.0, 2.0, 1.0])
        optimizer.step()
        outcomes.append((parameter.detach(), optimizer.state[parameter]["momentum_buffer"]))
    for actual, expected in zip(*outcomes, strict=True):
        assert_identical(actual, expected)


def test_differentiable_in_a_group_alone_updates_without_recording() -> None:
    for module in (optim, torch.optim):
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        module.SGD([{"params": [parameter], "differentiable": True}], lr=0.5).step()
        assert_identical(parameter.detach(), torch.full((3,), 0.5))
        assert parameter.is_leaf and parameter.grad_fn is None
