"""What every differentiable operator owes PyTorch: autograd, dispatcher, compile, fake tensors, torch.func.

One row per operator; a row is the function, its reference and a maker of small arguments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import generator, random
from dispatch_log import ran_kernels
from tolerance import assert_identical
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fastnn
from fastnn import functional, reference


@dataclass(frozen=True)
class Operator:
    """``shapes`` are those of the differentiable arguments, ``others`` the arguments after them."""

    id: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    others: Callable[[], tuple[Any, ...]] = tuple
    kwargs: dict[str, Any] | None = None
    saves_input: bool = True

    def ours(self, *tensors: Tensor) -> Tensor:
        return getattr(functional, self.name)(*tensors, *self.others(), **(self.kwargs or {}))

    def oracle(self, *tensors: Tensor) -> Tensor:
        return getattr(reference, self.name)(*tensors, *self.others(), **(self.kwargs or {}))

    def make(self, dtype: torch.dtype, requires_grad: bool = True) -> list[Tensor]:
        rng = generator("operator", self.id)
        return [random(shape, dtype, rng).requires_grad_(requires_grad) for shape in self.shapes]


LABELS = (torch.tensor([1, 0, 4, 2]),)

OPERATORS = (
    Operator("linear", "linear", ((4, 6), (5, 6), (5,))),
    Operator("linear_relu", "linear", ((4, 6), (5, 6), (5,)), kwargs={"activation": "relu"}),
    Operator("linear_no_bias", "linear", ((2, 2, 6), (5, 6))),
    Operator("conv2d", "conv2d", ((2, 3, 6, 5), (4, 3, 3, 3), (4,)), kwargs={"padding": 1}),
    Operator(
        "conv2d_groups",
        "conv2d",
        ((2, 4, 6, 5), (4, 2, 3, 2)),
        kwargs={"groups": 2, "stride": 2, "dilation": (1, 2)},
    ),
    Operator("conv2d_relu", "conv2d", ((2, 3, 6, 5), (4, 3, 3, 3), (4,)), kwargs={"activation": "relu"}),
    Operator(
        "conv2d_relu_pool",
        "conv2d",
        ((2, 3, 8, 7), (4, 3, 3, 3), (4,)),
        kwargs={"activation": "relu", "max_pool": 2},
    ),
    Operator(
        "conv2d_relu_pool_overlapping",
        "conv2d",
        ((1, 2, 7, 8), (3, 2, 3, 3), (3,)),
        kwargs={"activation": "relu", "max_pool": (3, 2, 1)},
    ),
    Operator("max_pool2d", "max_pool2d", ((2, 3, 6, 5),), lambda: (2,)),
    Operator("max_pool2d_overlapping", "max_pool2d", ((2, 3, 7, 7),), lambda: (3, 2, 1)),
    Operator("relu", "relu", ((4, 5),), saves_input=False),
    Operator("softmax", "softmax", ((4, 5),), lambda: (1,), saves_input=False),
    Operator("log_softmax", "log_softmax", ((4, 5, 2),), lambda: (1,), saves_input=False),
    Operator("cross_entropy", "cross_entropy", ((4, 5),), lambda: LABELS),
    Operator(
        "cross_entropy_smoothing",
        "cross_entropy",
        ((4, 5),),
        lambda: LABELS,
        kwargs={"label_smoothing": 0.1, "reduction": "sum"},
    ),
    Operator("cross_entropy_none", "cross_entropy", ((4, 5),), lambda: LABELS, {"reduction": "none"}),
    Operator("nll_loss", "nll_loss", ((4, 5),), lambda: LABELS, saves_input=False),
    Operator("mse_loss", "mse_loss", ((4, 5), (4, 5))),
)

each_operator = pytest.mark.parametrize("operator", [pytest.param(o, id=o.id) for o in OPERATORS])


def assert_near(actual: Any, expected: Any) -> None:
    """For float64 on both sides, where only the order of the additions differs."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@each_operator
def test_gradcheck(operator: Operator) -> None:
    leaves = operator.make(torch.float64)
    assert torch.autograd.gradcheck(operator.ours, leaves, fast_mode=False)


@each_operator
def test_gradgradcheck(operator: Operator) -> None:
    leaves = operator.make(torch.float64)
    assert torch.autograd.gradgradcheck(operator.ours, leaves, fast_mode=True)


@each_operator
def test_every_subset_of_requires_grad(operator: Operator) -> None:
    for wanted in itertools.product((False, True), repeat=len(operator.shapes)):
        results = []
        for function in (operator.ours, operator.oracle):
            leaves = operator.make(torch.float64, requires_grad=False)
            for leaf, needed in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(needed)
            output = function(*leaves)
            assert output.requires_grad == any(wanted)
            if any(wanted):
                output.sum().backward()
            results.append((output.detach(), *(leaf.grad for leaf in leaves)))
        for actual, expected in zip(*results, strict=True):
            assert (actual is None) == (expected is None), wanted
            if actual is not None:
                assert_near(actual, expected)


def test_unneeded_gradients_are_not_computed() -> None:
    x, w = torch.ones(2, 3, 6, 6), torch.ones(4, 3, 3, 3, requires_grad=True)
    with ran_kernels("conv2d_grad_weight") as records:
        functional.conv2d(x, w).sum().backward()
    assert not [record for record in records if record.operator == "conv2d_grad_input"]


@each_operator
def test_no_grad_and_inference_mode(operator: Operator) -> None:
    leaves = operator.make(torch.float64)
    expected = operator.oracle(*leaves).detach()
    with torch.no_grad():
        output = operator.ours(*leaves)
    assert not output.requires_grad
    assert_near(output, expected)
    with torch.inference_mode():
        inferred = operator.ours(*leaves)
    assert inferred.is_inference()
    assert_near(inferred.clone(), expected)


@each_operator
def test_modifying_a_saved_tensor_raises(operator: Operator) -> None:
    if not operator.saves_input:
        pytest.skip("backward reads the output, not the input")
    leaves = operator.make(torch.float64)
    values = [leaf * 1 for leaf in leaves]
    try:
        probe = operator.oracle(*values)
        with torch.no_grad():
            values[0].mul_(2)
        probe.sum().backward()
    except RuntimeError:
        pass
    else:
        pytest.skip("torch's own operator does not save its input")
    values = [leaf * 1 for leaf in leaves]
    output = operator.ours(*values)
    with torch.no_grad():
        values[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_operator
def test_backward_twice_raises_unless_retained(operator: Operator) -> None:
    leaves = operator.make(torch.float64)
    loss = operator.ours(*leaves).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@each_operator
def test_grad_output_of_any_layout(operator: Operator) -> None:
    leaves = operator.make(torch.float64)
    output, expected = operator.ours(*leaves), operator.oracle(*leaves)
    rng = generator("grad_output", operator.id)
    grads = [torch.ones((), dtype=torch.float64).expand(output.shape)]
    if output.dim():
        wide = random((*output.shape[:-1], 2 * output.shape[-1]), torch.float64, rng)
        grads += [wide[..., ::2], wide.flip(-1)[..., 1::2]]
        turned = random(tuple(reversed(output.shape)), torch.float64, rng)
        grads.append(turned.permute(*reversed(range(output.dim()))))
    for grad in grads:
        actual = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        wanted = torch.autograd.grad(expected, leaves, grad, retain_graph=True)
        for a, b in zip(actual, wanted, strict=True):
            assert_near(a, b)


@each_operator
def test_negative_and_conjugate_views(operator: Operator) -> None:
    """A negative bit is a view's promise that its memory does not know."""
    leaves = operator.make(torch.float64, requires_grad=False)
    expected = operator.oracle(*leaves)
    lazy = []
    for leaf in leaves:
        pairs = torch.complex(torch.zeros_like(leaf), -leaf)
        view = torch.conj(pairs).imag
        assert view.is_neg()
        assert torch.equal(view, leaf)
        lazy.append(view)
    assert_near(operator.ours(*lazy), expected)
    if torch.is_tensor(expected) and expected.dim():
        tracked = operator.make(torch.float64)
        grad = torch.conj(torch.complex(torch.zeros_like(expected), -torch.ones_like(expected))).imag
        actual = torch.autograd.grad(operator.ours(*tracked), tracked, grad)
        wanted = torch.autograd.grad(operator.oracle(*tracked), tracked, torch.ones_like(expected))
        for a, b in zip(actual, wanted, strict=True):
            assert_near(a, b)


@each_operator
def test_inputs_are_neither_changed_nor_aliased(operator: Operator) -> None:
    leaves = operator.make(torch.float32)
    before = [(leaf.detach().clone(), leaf._version) for leaf in leaves]
    output = operator.ours(*leaves)
    torch.autograd.grad(output.sum(), leaves)
    for leaf, (values, version) in zip(leaves, before, strict=True):
        assert torch.equal(leaf, values)
        assert leaf._version == version
        assert output.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()


@each_operator
def test_same_bits_for_every_thread_count(operator: Operator) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = operator.make(torch.float32)
            output = operator.ours(*leaves)
            results.append((output.detach(), *torch.autograd.grad(output.sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_identical(a, b)


@each_operator
def test_create_graph(operator: Operator) -> None:
    results = []
    for function in (operator.ours, operator.oracle):
        leaves = operator.make(torch.float64)
        grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append((*grads, *torch.autograd.grad(penalty, leaves, allow_unused=True)))
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_near(actual, expected)


@each_operator
@pytest.mark.parametrize("alone", [False, True], ids=["all_require", "one_requires"])
def test_second_derivatives_of_each_gradient(operator: Operator, alone: bool) -> None:
    """Zeros where an input only says which values a ReLU or a maximum lets through; absent where it says nothing."""
    for i in range(len(operator.make(torch.float64))):
        results = []
        for function in (operator.ours, operator.oracle):
            leaves = operator.make(torch.float64)
            for j, leaf in enumerate(leaves):
                leaf.requires_grad_(i == j or not alone)
            grad = torch.autograd.grad(function(*leaves).sum(), leaves[i], create_graph=True)[0]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            nothing = (None,) * len(wanted)
            results.append(
                torch.autograd.grad(grad.sum(), wanted, allow_unused=True) if grad.requires_grad else nothing
            )
        for actual, expected in zip(*results, strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None:
                assert_near(actual, expected)


@each_operator
def test_torch_func(operator: Operator) -> None:
    leaves = operator.make(torch.float64, requires_grad=False)
    numbers = tuple(range(len(leaves)))

    def through(transform: Callable[..., Any]) -> tuple[Any, Any]:
        return transform(operator.ours), transform(operator.oracle)

    ours, oracle = through(lambda f: torch.func.grad(lambda *t: f(*t).square().sum(), argnums=numbers))
    for actual, expected in zip(ours(*leaves), oracle(*leaves), strict=True):
        assert_near(actual, expected)
    stacked = [torch.stack([leaf, leaf + 1, leaf - 1]) for leaf in leaves]
    ours, oracle = through(torch.func.vmap)
    assert_near(ours(*stacked), oracle(*stacked))
    ours, oracle = through(lambda f: lambda *t: torch.func.jvp(f, t, tuple(map(torch.ones_like, t))))
    assert_near(ours(*leaves), oracle(*leaves))


@each_operator
def test_forward_mode_where_a_mode_or_a_compiler_sees_ops(operator: Operator) -> None:
    leaves = operator.make(torch.float64, requires_grad=False)
    ones = tuple(map(torch.ones_like, leaves))

    def tangent(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: torch.func.jvp(function, t, ones)[1]

    def gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.func.grad(lambda *t: function(*t).square().sum())

    for transform in (tangent, gradient):
        expected = transform(operator.oracle)(*leaves)
        torch._dynamo.reset()
        ours = transform(operator.ours)
        assert_near(torch.compile(ours, backend="aot_eager")(*leaves), expected)
        assert_near(make_fx(ours)(*leaves)(*leaves), expected)
    expected = tangent(operator.oracle)(*leaves)
    with FlopCounterMode(display=False), forward_ad.dual_level():
        output = operator.ours(*map(forward_ad.make_dual, leaves, ones))
        assert_near(forward_ad.unpack_dual(output).tangent, expected)


@each_operator
def test_a_dual_gradient_of_a_graph_from_before(operator: Operator) -> None:
    if operator.name == "mse_loss":
        pytest.skip("torch's own raises: it writes to a ZeroTensor")

    def tangents(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = operator.make(torch.float64)
        output = function(*leaves)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(output), torch.full_like(output, 2))
            grads = torch.autograd.grad(output, leaves, dual)
            return [forward_ad.unpack_dual(grad).tangent for grad in grads]

    for actual, expected in zip(tangents(operator.ours), tangents(operator.oracle), strict=True):
        assert_near(actual, expected)


@each_operator
def test_batched_gradients(operator: Operator) -> None:
    """is_grads_batched runs backward under vmap, where tensors have no memory of their own."""
    leaves = operator.make(torch.float64)
    output, expected = operator.ours(*leaves), operator.oracle(*leaves)
    grads = random((3, *output.shape), torch.float64, generator("batched", operator.id))
    actual = torch.autograd.grad(output, leaves, grads, is_grads_batched=True)
    wanted = torch.autograd.grad(expected, leaves, grads, is_grads_batched=True)
    for a, b in zip(actual, wanted, strict=True):
        assert_near(a, b)
        assert not a.requires_grad


@each_operator
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(operator: Operator) -> None:
    leaves = operator.make(torch.float64, requires_grad=False)
    traced = torch.jit.trace(operator.ours, tuple(leaves), check_trace=False)
    others = [leaf + 1 for leaf in leaves]
    assert_near(traced(*others), operator.oracle(*others))


@each_operator
def test_compile_without_graph_break(operator: Operator) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(operator.ours, fullgraph=True, backend="aot_eager")
    leaves = operator.make(torch.float64)
    output, expected = compiled(*leaves), operator.oracle(*leaves)
    assert_near(output, expected)
    assert output.stride() == operator.ours(*leaves).stride()
    actual = torch.autograd.grad(output.square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(actual, wanted, strict=True):
        assert_near(a, b)


@each_operator
def test_compile_with_dynamic_shapes(operator: Operator) -> None:
    if operator.others() is LABELS:
        pytest.skip("its labels fix the batch")
    torch._dynamo.reset()
    compiled = torch.compile(operator.ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 6):
        leaves = operator.make(torch.float64, requires_grad=False)
        count = len(leaves) if operator.name == "mse_loss" else 1
        leaves[:count] = [leaf[:1].expand(batch, *leaf.shape[1:]).contiguous() for leaf in leaves[:count]]
        assert_near(compiled(*leaves), operator.oracle(*leaves))


@each_operator
def test_meta_and_fake_tensors(operator: Operator) -> None:
    leaves = operator.make(torch.float32, requires_grad=False)
    expected = operator.ours(*leaves)
    if operator.others() is not LABELS:
        meta = operator.ours(*(leaf.to("meta") for leaf in leaves))
        assert meta.is_meta
        assert (meta.shape, meta.stride(), meta.dtype) == (expected.shape, expected.stride(), expected.dtype)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [mode.from_tensor(leaf) for leaf in leaves]
        fake = operator.ours(*fakes)
    assert (fake.shape, fake.stride(), fake.dtype) == (expected.shape, expected.stride(), expected.dtype)


@each_operator
def test_backward_on_meta(operator: Operator) -> None:
    if operator.others() is LABELS:
        pytest.skip("its labels lie on the CPU")
    leaves = [leaf.detach().to("meta").requires_grad_() for leaf in operator.make(torch.float32)]
    operator.ours(*leaves).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.is_meta and leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("name", ["conv2d", "max_pool2d"])
def test_fake_tensors_keep_channels_last(name: str) -> None:
    x = torch.ones(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    arguments = (torch.ones(4, 3, 3, 3),) if name == "conv2d" else (2,)
    expected = getattr(functional, name)(x, *arguments)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = getattr(functional, name)(mode.from_tensor(x), *arguments)
    assert fake.stride() == expected.stride()


# Four units in the last place: bfloat16 has 8 bits, float16 has 11.
HALF_TOLERANCES = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
each_half = pytest.mark.parametrize("half", HALF_TOLERANCES, ids=str)


def with_labels(operator: Operator, move: Callable[[Tensor], Tensor]) -> Operator:
    """The operator with its labels moved."""
    others = tuple(move(other) if isinstance(other, Tensor) else other for other in operator.others())
    return replace(operator, others=lambda: others)


@each_half
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@each_operator
def test_autocast_gives_what_torch_gives(operator: Operator, device: str, half: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    operator = with_labels(operator, lambda labels: labels.to(device))
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in operator.make(torch.float32)]
    with torch.autocast(device, dtype=half):
        output, expected = operator.ours(*leaves), operator.oracle(*leaves)
    assert output.dtype == expected.dtype
    tolerance = HALF_TOLERANCES[half]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(output.sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.float32] * len(leaves)


@pytest.fixture
def cuda_autocast() -> Iterator[Callable[[torch.dtype], None]]:
    """Switches CUDA's autocast on; torch.autocast itself does not where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

    def switch_on(half: torch.dtype) -> None:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", half)

    yield switch_on
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@each_half
@each_operator
def test_autocast_on_cuda_gives_torchs_dtypes_without_a_gpu(
    operator: Operator, half: torch.dtype, cuda_autocast: Callable[[torch.dtype], None]
) -> None:
    """Fake tensors have a device and a dtype but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        operator = with_labels(operator, lambda labels: torch.empty_like(labels, device="cuda"))
        tensors = [torch.empty(shape, device="cuda") for shape in operator.shapes]
        cuda_autocast(half)
        output, expected = operator.ours(*tensors), operator.oracle(*tensors)
    assert output.device.type == "cuda"
    assert (output.dtype, output.shape) == (expected.dtype, expected.shape)


def captured_ops(operator: Operator) -> list[tuple[Any, tuple[Any, ...]]]:
    """The fastnn ops of an operator's compiled forward and backward graphs with the arguments they
    received."""
    from torch._dynamo.backends.common import aot_autograd
    from torch.fx import GraphModule, Interpreter

    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recording(Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if getattr(target, "namespace", "") == "fastnn":
                values = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
                calls.append((target, tuple(values)))
            return super().call_function(target, args, kwargs)

    def compiler(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        def execute(arguments: list[Any]) -> Any:
            return Recording(graph).run(*arguments)

        execute._boxed_call = True  # type: ignore[attr-defined]
        return execute

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    leaves = operator.make(torch.float32)
    torch.compile(operator.ours, fullgraph=True, backend=backend)(*leaves).square().sum().backward()
    return calls


@pytest.fixture(scope="module")
def captured() -> dict[str, list[tuple[Any, tuple[Any, ...]]]]:
    return {operator.id: captured_ops(operator) for operator in OPERATORS}


def test_every_op_is_in_a_compiled_graph_and_so_under_opcheck(
    captured: dict[str, list[tuple[Any, tuple[Any, ...]]]],
) -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastnn::")}
    assert registered
    assert {op._schema.name for calls in captured.values() for op, _ in calls} == registered


@each_operator
def test_opcheck(operator: Operator, captured: dict[str, list[tuple[Any, tuple[Any, ...]]]]) -> None:
    calls = captured[operator.id]
    assert calls, "the compiled graphs hold no fastnn op"
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)
        name = op._schema.name
        if "backward" not in name and "grad" not in name:
            tracked = [
                a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
            ]
            torch.library.opcheck(op, tuple(tracked))


@each_operator
def test_matches_in_a_chain_of_layers(operator: Operator) -> None:
    """The gradient arrives through other operators and leaves through them."""
    results = []
    for function in (operator.ours, operator.oracle):
        leaves = operator.make(torch.float64)
        loss = F.silu(function(*(leaf.tanh() for leaf in leaves))).mean()
        results.append(torch.autograd.grad(loss, leaves))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected)


PARTIAL = {  # a function of an input, a weight and a bias, with their shapes
    "conv2d": (functional.conv2d, (4, 3, 40, 40), (6, 3, 3, 3)),
    "linear": (functional.linear, (5, 300), (60, 300)),
}


@pytest.mark.parametrize("operator", PARTIAL)
def test_a_backward_pass_makes_the_gradients_that_it_is_for(operator: str) -> None:
    """As torch's operators do: one for the input alone, as for an adversarial image, leaves out the weight's."""
    function, *shapes = PARTIAL[operator]
    rng = generator("partial", operator)
    sizes = (*shapes, shapes[1][:1])
    x, w, b = (random(size, torch.float32, rng).requires_grad_() for size in sizes)
    leaves = {"input": x, "weight": w, "bias": b}
    # Of twice the input: autograd runs the nodes of what is no leaf, and keeps what it brings to leaves.
    expected = dict(zip(leaves, torch.autograd.grad(function(x * 2, w, b).square().sum(), [x, w, b]), strict=True))
    for names in (["input"], ["weight"], ["bias"], ["input", "bias"], ["input", "weight", "bias"]):
        output = function(x * 2, w, b).square().sum()
        with fastnn.explain_dispatch() as log:
            grads = torch.autograd.grad(output, [leaves[name] for name in names])
        for name, grad in zip(names, grads, strict=True):
            assert_identical(grad, expected[name], name)
        if operator == "conv2d":
            made = {record.operator for record in log} & {"conv2d_grad_input", "conv2d_grad_weight"}
            assert made == {f"conv2d_grad_{name}" for name in names if name != "bias"}

    for leaf in leaves.values():
        leaf.grad = None
    function(x, w, b).square().sum().backward(inputs=[w])
    assert x.grad is None and b.grad is None and w.grad is not None
    assert_identical(w.grad, torch.autograd.grad(function(x, w, b).square().sum(), w)[0])
    output = function(x, w, b)
    output.retain_grad()
    output.square().sum().backward(inputs=[output])  # whose node runs all the same
    assert x.grad is None and b.grad is None
    # A whole pass, and one in which a hook wants what nobody else does.
    function(x, w, b).square().sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    middle = x * 2
    seen: list[torch.Tensor] = []
    middle.register_hook(seen.append)
    function(middle, w, b).square().sum().backward(inputs=[x])
    assert_identical(seen[0] * 2, expected["input"])
