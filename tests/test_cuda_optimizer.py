"""adam_step and sgd_step in the emulator: each update against the float64 formulas, from the state before it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import lay_out
from emulated import DTYPES, each_dtype, each_schedule, emulator, ran_on_the_emulator, scheduled
from tolerance import assert_close_bound, rounded_bound, unit_roundoff

from fastnn import reference

# Less than a vector, several tiles and a rest in every dtype, nothing at all, and one in channels_last order.
SHAPES = ((3,), (17, 5), (4, 3, 3, 3), (1,), (0, 4), (5003,), ())
STEPS = 3
BETAS = (0.9, 0.99)
EPS = 1e-6
LR = 0.01

ADAM_OPTIONS = [
    dict(zip(("amsgrad", "maximize", "weight_decay", "decoupled"), values, strict=True))
    for values in itertools.product((False, True), (False, True), (0.0, 0.1), (False, True))
]
SGD_OPTIONS = [
    dict(zip(("momentum", "dampening", "nesterov", "maximize", "weight_decay"), values, strict=True))
    for values in itertools.product((0.0, 0.9), (0.0, 0.3), (False, True), (False, True), (0.0, 0.1))
    if not values[2] or (values[0] and not values[1])  # nesterov needs momentum and no dampening
]


def identify(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items() if value) or "plain"


class State:
    """Parameters and all that an optimizer keeps of them; "offset" puts none of it at a multiple of 16 bytes."""

    def __init__(self, dtype: torch.dtype, shapes: Any = SHAPES, layout: str = "contiguous") -> None:
        self.rng = torch.Generator().manual_seed(0)
        self.shapes, self.layout = shapes, layout
        self.params = self.draw(dtype)
        self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.buffers = (
            [self.arrange(torch.zeros_like(param)) for param in self.params] for _ in range(4)
        )
        self.steps = [torch.zeros(()) for _ in shapes]
        self.updates = 0

    def draw(self, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [torch.randn(shape, generator=self.rng, dtype=torch.float64).to(dtype) for shape in self.shapes]
        return [self.arrange(tensor) for tensor in tensors]

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        return lay_out(tensor, "channels_last" if tensor.dim() == 4 else self.layout)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.max_exp_avg_sqs, *self.buffers, *self.steps]

    def adam(self, lr: float | torch.Tensor = LR, **options: Any) -> list[torch.Tensor]:
        """One update; returns its gradients."""
        options = {"weight_decay": 0.0, "decoupled": False, "amsgrad": False, "maximize": False} | options
        grads = self.draw(self.params[0].dtype)
        moments = (self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs if options["amsgrad"] else [])
        arguments = (options[key] for key in ("weight_decay", "decoupled", "amsgrad", "maximize"))
        with ran_on_the_emulator("adam_step", "adamw" if options["decoupled"] else "adam"):
            emulator.adam_step(self.params, grads, *moments, self.steps, *as_lr((lr, *BETAS)), EPS, *arguments)
        self.updates += 1
        return grads

    def sgd(self, lr: float | torch.Tensor = LR, **options: Any) -> list[torch.Tensor]:
        defaults = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
        options = defaults | options
        grads = self.draw(self.params[0].dtype)
        has_momentum = options["momentum"] != 0
        first = [self.updates == 0] * len(grads) if has_momentum else []
        momentum, *rest = options.values()
        with ran_on_the_emulator("sgd_step", "momentum" if has_momentum else "plain"):
            buffers = self.buffers if has_momentum else []
            emulator.sgd_step(self.params, grads, buffers, first, *as_lr((lr, momentum)), *rest)
        self.updates += 1
        return grads


def as_lr(options: tuple[Any, ...]) -> list[Any]:
    """What schedules change, as tensors if the learning rate is one."""
    return [torch.tensor(float(x), dtype=torch.float64) if isinstance(options[0], torch.Tensor) else x for x in options]


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to(torch.float64, copy=True) for tensor in tensors]


def roundings(count: int, dtype: torch.dtype) -> float:
    """Relative error of `count` operations in the precision of the update, first order and 1 %."""
    if dtype == torch.float64:
        return 2 * 1.01 * count * unit_roundoff(torch.float64)  # the reference rounds as often
    return 1.01 * count * unit_roundoff(torch.float32)


def assert_adam(state: State, before: list[list[torch.Tensor]], grads: list[torch.Tensor], lr: float, o: Any) -> None:
    """The state is that of one update of `before`: parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs."""
    dtype = state.params[0].dtype
    decoupled, decay = o["decoupled"], o["weight_decay"]
    formula = reference.adamw_step if decoupled else reference.adam_step
    few, many = roundings(4, dtype), roundings(8, dtype)
    tiny = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    for i, (param, exp_avg, exp_avg_sq, most) in enumerate(zip(*before, strict=True)):
        grad = grads[i].double()
        options = {"betas": BETAS, "eps": EPS, "amsgrad": o["amsgrad"], "maximize": o["maximize"]}
        moments = (exp_avg, exp_avg_sq, most if o["amsgrad"] else None)
        expected = formula(param, grad, *moments, step=state.updates, lr=lr, weight_decay=decay, **options)
        # Errors of the gradient with its decay, of both averages, of the root, and of the quotient.
        size = grad.abs() + (0 if decoupled else decay * param.abs())
        avg_error = few * (exp_avg.abs() + 2 * size) + tiny
        sq_error = few * (exp_avg_sq + 3 * (1 - BETAS[1]) * size**2) + tiny
        if o["amsgrad"]:
            sq_error = sq_error.maximum(few * most)
        square = expected.max_exp_avg_sq if o["amsgrad"] else expected.exp_avg_sq
        scale = 1 / (1 - BETAS[1] ** state.updates) ** 0.5
        root = square.sqrt() * scale + EPS
        root_error = ((square + sq_error).sqrt() - (square - sq_error).clamp_min(0).sqrt()) * scale + few * root
        step_size = lr / (1 - BETAS[0] ** state.updates)
        update = step_size * expected.exp_avg.abs() / root
        update_error = step_size * avg_error / (root - root_error).clamp_min(EPS / 2)
        update_error = update_error + update * (root_error / (root - root_error).clamp_min(EPS / 2) + many)
        param_error = update_error + few * (param.abs() + update) + tiny
        for name, actual, wanted, bound in (
            ("exp_avg", state.exp_avgs[i], expected.exp_avg, avg_error),
            ("exp_avg_sq", state.exp_avg_sqs[i], expected.exp_avg_sq, sq_error),
            ("max_exp_avg_sq", state.max_exp_avg_sqs[i], expected.max_exp_avg_sq, sq_error),
            ("param", state.params[i], expected.parameter, param_error),
        ):
            if wanted is not None:
                assert_close_bound(actual, wanted, rounded_bound(bound, wanted, dtype), f"{name} of tensor {i}")
    assert all(step.item() == state.updates for step in state.steps)


def assert_sgd(state: State, before: list[list[torch.Tensor]], grads: list[torch.Tensor], lr: float, o: Any) -> None:
    dtype = state.params[0].dtype
    few = roundings(4, dtype)
    tiny = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    for i, (param, buffer) in enumerate(zip(*before, strict=True)):
        grad = grads[i].double()
        expected = reference.sgd_step(param, grad, None if state.updates == 1 else buffer, lr=lr, **o)
        size = grad.abs() + o["weight_decay"] * param.abs()
        held = size if state.updates == 1 else o["momentum"] * buffer.abs() + size
        step = size + held
        assert_close_bound(
            state.params[i],
            expected.parameter,
            rounded_bound(few * (param.abs() + 3 * lr * step) + tiny, expected.parameter, dtype),
            f"param of tensor {i}",
        )
        if expected.momentum_buffer is not None:
            bound = rounded_bound(few * 2 * held + tiny, expected.momentum_buffer, dtype)
            assert_close_bound(state.buffers[i], expected.momentum_buffer, bound, f"buffer of tensor {i}")


def check_adam(state: State, options: dict[str, Any], lr: Any = LR, steps: int = STEPS) -> None:
    for _ in range(steps):
        before = [copies(t) for t in (state.params, state.exp_avgs, state.exp_avg_sqs, state.max_exp_avg_sqs)]
        grads = state.adam(lr, **options)
        assert_adam(state, before, grads, float(lr), options)


def check_sgd(state: State, options: dict[str, Any], lr: Any = LR, steps: int = STEPS) -> None:
    for _ in range(steps):
        before = [copies(t) for t in (state.params, state.buffers)]
        grads = state.sgd(lr, **options)
        assert_sgd(state, before, grads, float(lr), options)


@each_dtype
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=identify)
def test_adam(options: dict[str, Any], dtype: torch.dtype) -> None:
    check_adam(State(dtype), options)


@each_dtype
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=identify)
def test_sgd(options: dict[str, Any], dtype: torch.dtype) -> None:
    check_sgd(State(dtype), options)


@each_dtype
def test_addresses_that_fit_no_vector(dtype: torch.dtype) -> None:
    check_adam(State(dtype, layout="offset"), ADAM_OPTIONS[-1])
    check_sgd(State(dtype, layout="offset"), {"momentum": 0.9, "weight_decay": 0.1})


@each_dtype
def test_more_tensors_than_a_launch_takes(dtype: torch.dtype) -> None:
    """Some 48 of Adam's and 70 of SGD's fit into the parameters of a kernel."""
    shapes = [(i % 13,) for i in range(230)]
    check_adam(State(dtype, shapes), ADAM_OPTIONS[-1], steps=1)
    check_sgd(State(dtype, shapes), {"momentum": 0.9, "weight_decay": 0.1}, steps=2)


def test_more_tensors_than_a_launch_takes_steps() -> None:
    state = State(torch.float32, [(1,)] * 1200)
    for i, step in enumerate(state.steps):
        step.fill_(i)
    state.adam()
    assert [step.item() for step in state.steps] == list(range(1, 1201))


def test_empty_tensors_alone_count_their_steps() -> None:
    state = State(torch.float32, [(0,), (3, 0)])
    state.adam()
    assert [step.item() for step in state.steps] == [1, 1]


@each_dtype
def test_scheduled_options_on_the_device(dtype: torch.dtype) -> None:
    lr = torch.tensor(0.02, dtype=torch.float64)
    adamw = {"decoupled": True, "weight_decay": 0.1, "amsgrad": False, "maximize": False}
    check_adam(State(dtype), adamw, lr)
    check_sgd(State(dtype), {"momentum": 0.9, "weight_decay": 0.1}, lr)


def test_each_tensor_has_its_own_step() -> None:
    together, apart = State(torch.float32), State(torch.float32)
    for state in (together, apart):
        for i, step in enumerate(state.steps):
            step.fill_(1000 * i)
    together.adam()
    grads = apart.draw(torch.float32)
    for i, param in enumerate(apart.params):
        lists = ([t[i]] for t in (grads, apart.exp_avgs, apart.exp_avg_sqs))
        options = (LR, *BETAS, EPS, 0.0, False, False, False)
        emulator.adam_step([param], *lists, [], [apart.steps[i]], *options)
    assert all(torch.equal(a, b) for a, b in zip(together.tensors(), apart.tensors(), strict=True))
    assert [step.item() for step in together.steps] == [1000 * i + 1 for i in range(len(SHAPES))]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_six_steps_are_torchs(dtype: torch.dtype) -> None:
    """The bound of tests/test_optim.py: a dozen roundings a step of what is at most as large as the parameter."""
    for name, options in (("adam", {"amsgrad": True}), ("sgd", {"momentum": 0.9})):
        state = State(dtype)
        exact = [torch.nn.Parameter(param) for param in copies(state.params)]
        if name == "adam":
            optimizer: Any = torch.optim.Adam(exact, LR, BETAS, EPS, **options)
        else:
            optimizer = torch.optim.SGD(exact, LR, **options)
        for _ in range(6):
            grads = getattr(state, name)(**options)
            for parameter, grad in zip(exact, grads, strict=True):
                parameter.grad = grad.double()
            optimizer.step()
        for actual, parameter in zip(state.params, exact, strict=True):
            wanted = parameter.detach()
            largest = wanted.abs().max().item() if wanted.numel() else 0
            assert_close_bound(actual, wanted, torch.finfo(dtype).eps * 12 * 6 * max(largest, 1), name)


def test_an_infinite_parameter_stays_infinite_without_decay() -> None:
    for name in ("adam", "sgd"):
        state = State(torch.float32)
        state.params[0][0] = float("inf")
        getattr(state, name)()
        assert state.params[0][0].item() == float("inf")


def test_a_small_gradient_survives_a_large_one_at_beta1_zero() -> None:
    param, exp_avg, exp_avg_sq = (torch.zeros(1) for _ in range(3))
    step = torch.zeros(())
    for gradient in (1e8, 1e-3):
        lists = [[param], [torch.full((1,), gradient)], [exp_avg], [exp_avg_sq], [], [step]]
        emulator.adam_step(*lists, 0.1, 0.0, 0.9, 1e-8, 0.0, False, False, False)
    assert exp_avg.item() == pytest.approx(1e-3)


@each_schedule
@pytest.mark.parametrize("layout", ["contiguous", "offset"])
def test_same_bits_under_every_schedule(layout: str, schedule: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        usual, other = State(dtype, layout=layout), State(dtype, layout=layout)
        for _ in range(2):
            for state, order in ((usual, ("forward", False)), (other, schedule)):
                with scheduled(order):
                    state.adam(**ADAM_OPTIONS[-1])
                    state.sgd(momentum=0.9)
        assert all(torch.equal(a, b) for a, b in zip(usual.tensors(), other.tensors(), strict=True))
