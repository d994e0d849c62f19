"""Every operator through the public functions on CUDA's kernels: on a GPU, or on the emulator.

The checks are those of the CPU's tests, in the four dtypes that CUDA's kernels have.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CONV2D_CASES,
    CROSS_ENTROPY_CASES,
    FILLS,
    LINEAR_CASES,
    NLL_CASES,
    POOL_CASES,
    SOFTMAX_CASES,
    Conv2dCase,
    LinearCase,
    LossCase,
    PoolCase,
    SoftmaxCase,
    by_id,
    generator,
    random,
)
from device import DEVICE, KERNEL_DTYPES, ON_CUDA
from dispatch_log import fell_back, ran_kernels
from operator_checks import (
    check_conv2d,
    check_cross_entropy,
    check_linear,
    check_max_pool2d,
    check_mse_loss,
    check_nll_loss,
    check_softmax,
)
from tolerance import assert_close_bound, tf32_bound

from fastnn import _C, functional, nn

pytestmark = pytest.mark.skipif(
    not ON_CUDA, reason="runs with FASTNN_TEST_DEVICE=cuda, or with FASTNN_CUDA_EMULATOR=1 on the emulator"
)

each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
each_fill = pytest.mark.parametrize("fill", FILLS)


@each_dtype
@each_fill
@pytest.mark.parametrize("case", by_id(LINEAR_CASES))
def test_linear(case: LinearCase, fill: str, dtype: torch.dtype) -> None:
    check_linear(case, fill, dtype)


@each_dtype
@each_fill
@pytest.mark.parametrize("case", by_id(CONV2D_CASES))
def test_conv2d(case: Conv2dCase, fill: str, dtype: torch.dtype) -> None:
    check_conv2d(case, fill, dtype)


@each_dtype
@each_fill
@pytest.mark.parametrize("case", by_id(POOL_CASES))
def test_max_pool2d(case: PoolCase, fill: str, dtype: torch.dtype) -> None:
    check_max_pool2d(case, fill, dtype)


# The bounds of these are made for dtypes that are computed in themselves.
each_wide_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)


@each_wide_dtype
@pytest.mark.parametrize("case", by_id(SOFTMAX_CASES))
def test_softmax(case: SoftmaxCase, dtype: torch.dtype) -> None:
    check_softmax(case, dtype, scale=2.0)


@each_wide_dtype
@pytest.mark.parametrize("case", by_id(CROSS_ENTROPY_CASES))
def test_cross_entropy(case: LossCase, dtype: torch.dtype) -> None:
    check_cross_entropy(case, dtype)


@each_wide_dtype
@pytest.mark.parametrize("case", by_id(NLL_CASES))
def test_nll_loss(case: LossCase, dtype: torch.dtype) -> None:
    check_nll_loss(case, dtype)


@each_wide_dtype
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_mse_loss(reduction: str, dtype: torch.dtype) -> None:
    check_mse_loss((3, 17), reduction, True, dtype)


# Precision


def test_products_in_tf32_are_within_their_bound() -> None:
    rng = generator("tf32")
    x, w = random((33, 70), torch.float32, rng), random((65, 70), torch.float32, rng)
    exact, magnitude = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    outputs = {}
    for tf32 in (False, True):
        y = outputs[tf32] = x.new_empty(33, 65)
        with ran_kernels("linear_forward") as records:
            _C.linear_forward(y, x, w, None, False, tf32)
        assert [record.kernel for record in records] == ["tf32" if tf32 else "tf32x3"]
    assert_close_bound(outputs[True], exact, tf32_bound(70, magnitude))
    error = (outputs[True] - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 5e-5 < error < 1e-3  # tf32's, neither float32's nor that of a wrong index
    assert (outputs[False] - exact).square().mean().sqrt() < 1e-6 * exact.square().mean().sqrt()


def test_long_sums_are_rounded_and_not_cut_off() -> None:
    """Of numbers of one sign: tensor cores would cut off 3e-5 of this sum, where float32 has errors of 3e-7."""
    rng = generator("long sums")
    x, w = (random((16, 4096), torch.float32, rng).abs() for _ in range(2))
    exact, y = x.double() @ w.double().T, x.new_empty(16, 16)
    with ran_kernels("linear_forward") as records:
        _C.linear_forward(y, x, w, None, False, False)
    assert [record.kernel for record in records] == ["tf32x3"]
    assert ((y - exact) / exact).abs().max() < 2e-6


@pytest.mark.skipif(DEVICE.type != "cuda", reason="torch's switches are for tensors on a GPU")
@pytest.mark.parametrize("allowed", [False, True])
def test_torchs_switches_choose_the_precision(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    rng = generator("switches")
    images, weight = random((2, 8, 9, 9), torch.float32, rng), random((16, 8, 3, 3), torch.float32, rng)
    with ran_kernels("conv2d_forward", "linear_forward") as records:
        functional.conv2d(images, weight)
        functional.linear(images.flatten(1), random((5, 648), torch.float32, rng))
    assert {record.kernel for record in records} == {"tf32" if allowed else "tf32x3"}


def test_a_layer_without_gradients_costs_one_launch() -> None:
    rng = generator("launches")
    x, w, b = (random(s, torch.float32, rng) for s in ((8, 20), (12, 20), (12,)))
    with ran_kernels("linear_forward") as records:
        y = functional.linear(x, w, b, activation="relu")
    assert len(records) == 1
    torch.testing.assert_close(y, F.linear(x, w, b).relu())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_the_kernels_of_its_dtype(half: torch.dtype) -> None:
    rng = generator("autocast")
    x, w, b = (random(s, torch.float32, rng).requires_grad_() for s in ((2, 4, 9, 9), (8, 4, 3, 3), (8,)))
    head = random((3, 8 * 9), torch.float32, rng).requires_grad_()
    with torch.autocast(DEVICE.type, dtype=half), ran_kernels("conv2d_forward", "linear_forward", dtype=half):
        y = functional.linear(functional.conv2d(x, w, b, activation="relu", max_pool=2).flatten(1), head)
    assert y.dtype == half
    exact = F.linear(F.max_pool2d(F.conv2d(x, w, b).relu(), 2).flatten(1), head)
    assert (y - exact).norm() < 0.02 * exact.norm()
    grads = torch.autograd.grad(y.float().square().sum(), (x, w, b, head))
    wanted = torch.autograd.grad(exact.square().sum(), (x, w, b, head))
    for actual, expected in zip(grads, wanted, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 0.06 * expected.norm()


WIDENED = {
    "softmax": lambda f, x, t: f.softmax(x, 1),
    "log_softmax": lambda f, x, t: f.log_softmax(x, 1),
    "cross_entropy": lambda f, x, t: f.cross_entropy(x, t, label_smoothing=0.1),
    "cross_entropy, deprecated": lambda f, x, t: f.cross_entropy(x, t, size_average=False),
    "nll_loss": lambda f, x, t: f.nll_loss(x, t, ignore_index=2),
    "mse_loss": lambda f, x, t: f.mse_loss(x, F.one_hot(t, 5).to(x.dtype), reduction="sum"),
}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WIDENED)
def test_autocast_runs_losses_and_softmax_in_float32(name: str, half: torch.dtype) -> None:
    """On 16-bit logits, as a network under autocast gives them."""
    rng = generator("autocast", name)
    x = random((7, 5), half, rng).requires_grad_()
    target = torch.randint(5, (7,), generator=rng).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=half), ran_kernels(name.split(",")[0], dtype=torch.float32):
        y = WIDENED[name](functional, x, target)
    assert y.dtype == torch.float32
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.dtype == half
    wide = x.detach().float().requires_grad_()
    exact = WIDENED[name](F, wide, target)
    (expected,) = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(grad, expected.to(half), rtol=torch.finfo(half).eps, atol=1e-6)


def test_torch_serves_images_beyond_2_to_31_values() -> None:
    x, weight = torch.ones(1, 2, 1, 1, device=DEVICE), torch.ones(2, 2, 1, 1, device=DEVICE)
    with fell_back():
        output = functional.conv2d(x, weight, None, 20_000, 20_000)
    assert torch.equal(output, F.conv2d(x, weight, None, 20_000, 20_000))
    layers = nn.Sequential(nn.Conv2d(2, 2, 1, 20_000, 20_000), nn.ReLU()).to(DEVICE)
    assert layers(x).shape == (1, 2, 3, 3)
