"""torch.compile(backend="fastnn"): what it fuses in models of any kind, and that nothing else changes."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dispatch_log import kernels_of, ran_kernels
from models import NETWORKS, CifarNet, MnistNet, Network
from test_convert import assert_as_exact_as_torch, results, small_model
from torch import Tensor, nn

import fastnn
from fastnn import compile_backend, convert

pytestmark = pytest.mark.filterwarnings("ignore:TF32")  # said by the switch of oneDNN, of other devices

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.linear = nn.Linear(10, 4)
        self.relu, self.pool, self.norm = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.BatchNorm2d(4)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def without_gradient(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    with torch.no_grad():
        z = F.relu(y)
    return z + m.norm.bias.sum()


def with_autocast(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(y)


# How a model may write it, and the operators that run forward then: fused ones have no record of their own.
CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "layers": (lambda m, x: m.pool(m.relu(m.conv(x))), ["conv2d"]),
    "functions": (lambda m, x: F.max_pool2d(F.relu(m.conv(x)), 2, stride=2), ["conv2d"]),
    "pool first": (lambda m, x: torch.relu(F.max_pool2d(m.conv(x), 2)), ["conv2d"]),
    "methods": (lambda m, x: torch.max_pool2d(m.conv(x).relu(), 2), ["conv2d"]),
    "in place": (lambda m, x: m.conv(x).relu_(), ["conv2d"]),
    "F.conv2d": (lambda m, x: F.relu(F.conv2d(x, m.conv.weight, padding="same")), ["conv2d"]),
    "linear": (lambda m, x: m.relu(m.linear(x)), ["linear"]),
    "F.linear": (lambda m, x: F.linear(x, m.linear.weight).relu(), ["linear"]),
    "branches on data": (lambda m, x: F.relu(m.conv(x)) if x.shape[0] > 1 else x, ["conv2d"]),
    "one layer fused and not": (lambda m, x: m.conv(x).relu() + m.conv(x), ["conv2d"]),
    "result used twice": (lambda m, x: F.relu(y := m.conv(x)) - y, ["conv2d", "relu"]),
    "batch norm": (lambda m, x: F.relu(m.norm(m.conv(x))), ["conv2d", "relu"]),
    "pool with ceil_mode": (lambda m, x: F.max_pool2d(m.conv(x), 3, ceil_mode=True), ["conv2d", "max_pool2d"]),
    "softmax": (
        lambda m, x: F.softmax(m.conv(x), 1) * F.log_softmax(m.conv(x), -1),
        ["conv2d", "softmax", "log_softmax"],
    ),
    "losses": (
        lambda m, x: F.mse_loss(m.conv(x)[:, :1], x) + F.cross_entropy(m.linear(x)[:, 0], x[:, 0, :4, 0].abs().long()),
        ["conv2d", "mse_loss", "linear", "cross_entropy"],
    ),
    "grad mode between": (without_gradient, ["conv2d", "relu"]),
    "autocast between": (with_autocast, ["conv2d", "relu"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_captured_runs_on_kernels_and_fused(case: str) -> None:
    way, operators = CASES[case]
    model, x = Net(way).double(), torch.randn(2, 1, 10, 10, dtype=torch.float64)
    if case == "autocast between":
        model, x = model.float(), x.float()
    expected = results(model, x)
    compiled: Any = torch.compile(model, backend=compile_backend, fullgraph=True)
    compiled(x)
    with fastnn.explain_dispatch() as log:
        actual = results(compiled, x)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if x.dtype is torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    ran = {record.operator.removesuffix("_forward") for record in log}
    assert {name for name in ran if "_grad_" not in name and not name.endswith("backward")} == set(operators)
    assert {r.reason for r in log} == ({"", "autocast"} if case == "autocast between" else {""})


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("network", [pytest.param(n, id=n.id) for n in NETWORKS[:3]])
def test_other_peoples_models_compute_the_same(network: Network, training: bool) -> None:
    model, x = small_model(network)
    compiled: Any = torch.compile(model.train(training), backend=compile_backend)
    assert_as_exact_as_torch(model, compiled, x)


@pytest.mark.parametrize("make", [MnistNet, CifarNet])
def test_functions_between_layers_fuse_in_training_scripts(make: Callable[[], nn.Module]) -> None:
    x = torch.rand(2, 1, 28, 28) if make is MnistNet else torch.rand(2, 3, 32, 32)
    compiled: Any = torch.compile(make(), backend=compile_backend)
    with ran_kernels("conv2d_forward", "linear_forward", "conv2d_grad_weight") as log:
        compiled(x).sum().backward()
    assert not kernels_of(log, "relu")
    # The MNIST network has a dropout between neither ReLU nor pooling.
    assert not kernels_of(log, "max_pool2d")


def test_a_converted_model_compiles_to_its_own_functions() -> None:
    model = convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 2)))
    net = Net(lambda m, x: F.relu(m.body(x)))
    net.body = model
    compiled: Any = torch.compile(net, backend=compile_backend, fullgraph=True)
    x = torch.rand(2, 1, 10, 10)
    with ran_kernels("conv2d_forward", "linear_forward") as log:
        actual = results(compiled, x)
    assert not kernels_of(log, "relu", "max_pool2d")
    for a, b in zip(actual, results(net, x), strict=True):
        torch.testing.assert_close(a, b)


def test_other_shapes_compile_again_or_not_at_all() -> None:
    model = Net(lambda m, x: m.pool(m.relu(m.conv(x))))
    compiled: Any = torch.compile(model, backend=compile_backend, dynamic=True)
    for batch, size in ((2, 10), (3, 12), (5, 9)):
        x = torch.rand(batch, 1, size, size)
        with ran_kernels("conv2d_forward") as log:
            torch.testing.assert_close(compiled(x), model(x))
        assert len(log) == 1


def test_the_name_is_found_through_the_entry_point(tmp_path: Path) -> None:
    """As an installed package has it: pip writes pyproject's entry points into such a file."""
    table = (REPOSITORY / "pyproject.toml").read_text().split("[project.entry-points.torch_dynamo_backends]\n")[1]
    entry = re.match(r'fastnn = "(.*)"\n', table)
    assert entry is not None
    folder = tmp_path / "fastnn-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fastnn\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(f"[torch_dynamo_backends]\nfastnn = {entry[1]}\n")
    program = f"""
        import sys
        sys.path[:0] = [{str(tmp_path)!r}, {str(Path(fastnn.__file__).parents[1])!r}]
        import torch
        model = torch.compile(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()), backend="fastnn")
        assert "fastnn" not in sys.modules or "torch._dynamo" in sys.modules
        model(torch.rand(2, 3))
        import fastnn
        with fastnn.explain_dispatch() as log:
            model(torch.rand(2, 3))
        print(*(record.operator for record in log))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert output.stdout.strip() == "linear_forward", output.stderr
