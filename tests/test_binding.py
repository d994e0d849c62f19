"""The hazards of a binding that reads tensors through DLPack: memory, bits, threads, forks, errors, ISAs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import generator, integers, random
from dispatch_log import ran_kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnn
from fastnn import _C, functional, optim, runtime

REPOSITORY = Path(__file__).resolve().parent.parent


def python(code: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds the same fastnn."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        check=False,
    )


def linear_arguments(**replaced: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "output": torch.empty(4, 3),
        "input": torch.ones(4, 8),
        "weight": torch.ones(3, 8),
        "bias": torch.ones(3),
        "relu": False,
    }
    return {**arguments, **replaced}


# Memory


def fake(*shape: int) -> Tensor:
    return FakeTensorMode().from_tensor(torch.ones(shape))


def freed(*shape: int) -> Tensor:
    tensor = torch.ones(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def functional_tensor(*shape: int) -> Tensor:
    return torch._to_functional_tensor(torch.ones(shape))


NO_MEMORY = r"(?i)memory|storage|data pointer|not on cpu|meta|device"


@pytest.mark.parametrize(
    "make",
    [fake, freed, functional_tensor, lambda *shape: torch.empty(shape, device="meta")],
    ids=["fake", "freed", "functional", "meta"],
)
@pytest.mark.parametrize("argument", ["input", "weight", "bias", "output"])
def test_tensors_without_memory_raise(make: object, argument: str) -> None:
    shape = tuple(linear_arguments()[argument].shape)
    with pytest.raises((RuntimeError, ValueError, TypeError, BufferError, NotImplementedError), match=NO_MEMORY):
        _C.linear_forward(**linear_arguments(**{argument: make(*shape)}))


def test_freed_storage_raises_through_the_public_function() -> None:
    with pytest.raises((RuntimeError, ValueError), match=NO_MEMORY):
        functional.linear(freed(4, 8), torch.ones(3, 8))


def test_zero_size_tensors_have_no_memory_and_are_fine() -> None:
    _C.linear_forward(**linear_arguments(input=torch.empty(0, 8), output=torch.empty(0, 3)))
    output = torch.full((4, 3), float("nan"))
    _C.linear_forward(
        **linear_arguments(input=torch.empty(4, 0), weight=torch.empty(3, 0), bias=torch.arange(3.0), output=output)
    )
    assert torch.equal(output, torch.arange(3.0).expand(4, 3))
    assert functional.linear(torch.ones(4, 8), torch.empty(0, 8)).shape == (4, 0)


def test_strides_of_size_1_dimensions_are_ignored() -> None:
    rng = generator("size 1")
    values, weight = integers((1, 8), torch.float32, rng), integers((3, 8), torch.float32, rng)
    odd = values.as_strided((1, 8), (977, 1))
    output = torch.empty(1, 3).as_strided((1, 3), (5, 1))
    _C.linear_forward(output, odd, weight, None, False)
    assert torch.equal(output, F.linear(values, weight))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_storage_offsets_are_honoured(offset: int, isa: str) -> None:
    rng = generator("offset", offset)
    buffer = integers((offset + 32,), torch.float32, rng)
    values, weight = buffer[offset:].view(4, 8), integers((3, 8), torch.float32, rng)
    assert torch.equal(functional.linear(values, weight), F.linear(values, weight))


def test_negative_bit_of_a_conjugate_view() -> None:
    weight = torch.view_as_complex(integers((3, 8, 2), torch.float32, generator("neg"))).conj().imag
    assert weight.is_neg()
    x = integers((4, 8), torch.float32, generator("neg input"))
    with ran_kernels("linear_forward"):
        y = functional.linear(x, weight)
    assert torch.equal(y, F.linear(x, weight.clone()))


def test_outputs_are_fully_written(isa: str) -> None:
    output = torch.full((4, 3), float("nan"))
    _C.linear_forward(**linear_arguments(output=output))
    assert torch.equal(output, torch.full((4, 3), 9.0))


# Errors


@pytest.mark.parametrize(
    ("replaced", "error", "words"),
    [
        (
            {"weight": torch.ones(4, 7)},
            ValueError,
            r"^weight: expected shape \(out_features, 8\), got \(4, 7\)$",
        ),
        ({"bias": torch.ones(5)}, ValueError, r"^bias: expected shape \(3,\), got \(5,\)$"),
        ({"output": torch.empty(4, 4)}, ValueError, r"^output: expected .*got \(4, 4\)$"),
        ({"output": torch.empty(5, 3)}, ValueError, r"^output: expected .*got \(5, 3\)$"),
        ({"input": torch.tensor(1.0)}, ValueError, r"^input: expected shape \(\.\.\., in_features\), got"),
        ({"weight": torch.ones(3, 8).double()}, TypeError, r"^weight: expected float32.*got float64$"),
        ({"input": torch.ones(4, 8).int()}, TypeError, r"float.*got int32|expected int32.*got float32"),
        ({"weight": torch.ones(8, 3).T}, ValueError, r"^weight: expected a contiguous tensor"),
        ({"input": np.ones((4, 8), np.float32)}, TypeError, r"expected a torch.Tensor, got .*ndarray"),
        ({"input": None}, TypeError, r"expected a torch.Tensor, got NoneType"),
        ({"input": [[1.0] * 8] * 4}, TypeError, r"expected a torch.Tensor, got list"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_errors_of_the_binding(replaced: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _C.linear_forward(**linear_arguments(**replaced))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_numpy_arrays_are_type_errors(position: int) -> None:
    arguments: list[object] = [torch.ones(4, 8), torch.ones(3, 8), torch.ones(3)]
    arguments[position] = arguments[position].numpy()
    with pytest.raises(TypeError, match=r"(?i)tensor.*ndarray"):
        functional.linear(*arguments)


def test_sparse_tensors_do_not_reach_the_kernels() -> None:
    weight = torch.eye(4).to_sparse()
    with pytest.raises((RuntimeError, ValueError, TypeError, BufferError, NotImplementedError)):
        _C.linear_forward(torch.empty(4, 4), torch.ones(4, 4), weight, None, False)


# The record of kernels


def test_a_record_within_a_record_is_refused() -> None:
    with fastnn.explain_dispatch() as log:
        with pytest.raises(RuntimeError, match="no enclosing explain_dispatch"), fastnn.explain_dispatch():
            pass
        functional.relu(torch.ones(3))
    assert [record.operator for record in log] == ["relu_forward"]


def test_kernels_of_a_graph_are_noted_at_its_replays_alone() -> None:
    x = torch.ones(3)
    with fastnn.explain_dispatch() as log:
        functional.relu(x)
        with runtime.capture_kernels() as captured:
            functional.softmax(x, 0)
        runtime.note_kernels(captured)
        functional.relu(x)
        runtime.note_kernels(captured)
    names = [record.operator for record in log]
    assert names == ["relu_forward", "softmax_forward", "relu_forward", "softmax_forward"]
    with runtime.capture_kernels() as captured:  # where nobody asks
        functional.relu(x)
    assert [record.operator for record in captured] == ["relu_forward"]
    runtime.note_kernels(captured)
    functional.relu(x)
    with fastnn.explain_dispatch() as log:
        pass
    assert log == []


# Instruction sets


@pytest.mark.parametrize("name", fastnn.available_isas())
def test_environment_forces_the_isa(name: str) -> None:
    code = """
        import torch, fastnn
        with fastnn.explain_dispatch() as log:
            fastnn.functional.linear(torch.ones(4, 8), torch.ones(3, 8))
        print(fastnn.get_isa(), *{record.isa for record in log})
    """
    result = python(code, FASTNN_ISA=name)
    assert result.stdout.split() == [name, name], result.stderr


def test_unknown_isa_in_the_environment() -> None:
    result = python("import fastnn", FASTNN_ISA="avx9000")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "FASTNN_ISA" in last and "avx9000" in last and "baseline" in last


def test_unknown_isa_by_name() -> None:
    before = fastnn.get_isa()
    with pytest.raises(ValueError, match=r"expected.*baseline.*got.*avx9000"):
        fastnn.set_isa("avx9000")
    assert fastnn.get_isa() == before


def test_baseline_is_always_there_and_the_best_is_the_default() -> None:
    assert fastnn.available_isas()[0] == "baseline"
    environment = {k: v for k, v in os.environ.items() if k != "FASTNN_ISA"}
    code = "import fastnn; print(fastnn.get_isa(), fastnn.available_isas()[-1])"
    path = os.pathsep.join(p for p in sys.path if p)
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**environment, "PYTHONPATH": path},
    ).stdout.split()
    assert output[0] == output[1]


# What each file of csrc/cpu/isa shows to the others.
ISA_OBJECTS = {isa: f"kernel_table_{isa}" for isa in fastnn.build_info()["isas_compiled"]}
if "avx512" in ISA_OBJECTS:
    ISA_OBJECTS["avx512_bf16"] = "conv2d_forward_avx512_bf16"


@pytest.mark.parametrize("isa", ISA_OBJECTS)
def test_isa_objects_share_nothing_but_their_table(isa: str) -> None:
    """A weak symbol compiled for AVX could be linked into baseline code and crash an older processor."""
    objects = sorted((REPOSITORY / "build").glob(f"*/CMakeFiles/fastnn_cpu.dir/csrc/cpu/isa/{isa}.cpp.o"))
    nm = shutil.which("nm")
    if not objects or nm is None:
        pytest.skip("no object files beside this checkout (the package was built elsewhere), or no nm")
    for path in objects:
        listing = subprocess.run([nm, str(path)], capture_output=True, text=True, check=True).stdout
        symbols = [line.split()[-2:] for line in listing.splitlines()]
        # Upper-case letters are visible to the linker; U is undefined. The personality routine's address is data.
        shared = [name for kind, name in symbols if kind in "TDBRCWVuiwv" and "personality" not in name]
        assert len(shared) == 1, shared[:5]
        assert ISA_OBJECTS[isa] in shared[0]


# Threads and processes

# torch's own parallel loops hang in such a child: until it is told to use one thread, only kernels run there.
FORK = """
    import os, signal, torch, fastnn
    torch.set_num_threads(2)
    x, w, g = torch.ones(256, 512), torch.ones(256, 512, requires_grad=True), torch.ones(256, 256)
    assert fastnn.functional.linear(x, w).eq(512).all()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        y = fastnn.functional.linear(x, w)
        grad, = torch.autograd.grad(y, w, g)
        torch.set_num_threads(1)
        os._exit(0 if y.eq(512).all() and grad.eq(256).all() else 1)
    _, status = os.waitpid(child, 0)
    assert fastnn.functional.linear(x, w).eq(512).all()
    print("child", os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_computes() -> None:
    result = python(FORK, timeout=60)
    assert result.stdout.strip() == "child 0", result.stdout + result.stderr


LOADER = """
    import torch, fastnn
    class Data(torch.utils.data.Dataset):
        def __len__(self): return 4
        def __getitem__(self, i):
            return fastnn.functional.linear(torch.full((64, 256), float(i)), torch.ones(64, 256)).sum()
    fastnn.functional.linear(torch.ones(256, 512), torch.ones(256, 512))
    loader = torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context="fork", timeout=30)
    print([int(value) for value in loader])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_data_loader_workers_may_use_kernels() -> None:
    result = python(LOADER, timeout=90)
    assert result.stdout.strip() == str([i * 256 * 64 * 64 for i in range(4)]), result.stderr


def test_gil_is_released_during_a_kernel() -> None:
    x, w, y = torch.ones(1024, 1024), torch.ones(1024, 1024), torch.empty(1024, 1024)
    inside = threading.Event()
    stop = threading.Event()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += inside.is_set()
            time.sleep(0)

    interval = sys.getswitchinterval()
    # The interpreter itself must not be what lets the other thread run.
    sys.setswitchinterval(100)
    thread = threading.Thread(target=tick)
    before = fastnn.get_isa()
    fastnn.set_isa("baseline")
    try:
        thread.start()
        inside.set()
        started = time.perf_counter()
        while time.perf_counter() - started < 2 and ticks == 0:
            _C.linear_forward(y, x, w, None, False)
        inside.clear()
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        fastnn.set_isa(before)
        thread.join()
    assert ticks > 0


def test_concurrent_calls_give_the_right_numbers() -> None:
    rng = generator("threads")
    arguments = [(integers((33, 65), torch.float32, rng), integers((17, 65), torch.float32, rng)) for _ in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        x, w = arguments[number]
        expected = F.linear(x, w)
        for _ in range(50):
            leaf = w.clone().requires_grad_()
            y = functional.linear(x, leaf)
            y.sum().backward()
            if not torch.equal(y, expected) or not torch.equal(leaf.grad, x.sum(0).expand_as(w)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


THREADS = """
    import threading, torch, fastnn
    torch.set_num_threads(1)
    x, w = torch.ones(512, 512), torch.ones(512, 512)
    counts = []
    def work():
        fastnn.functional.linear(x, w)
        counts.append(fastnn.build_info()["threads"])
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    work()
    print(*counts)
"""


def test_new_python_threads_honour_set_num_threads() -> None:
    result = python(THREADS)
    assert result.stdout.split() == ["1", "1"], result.stdout + result.stderr


def test_threads_that_start_meanwhile_do_not_keep_a_limit_of_another_one() -> None:
    before, counts = torch.get_num_threads(), []
    with runtime.without_spinning_threads():
        assert torch.get_num_threads() == fastnn.build_info()["threads"] == 1
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert counts == [before] == [torch.get_num_threads()]


def test_one_openmp_runtime_is_loaded() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    code = """
        import re, torch, fastnn
        fastnn.functional.linear(torch.ones(256, 512), torch.ones(256, 512))
        libraries = re.findall(r"/[^ ]*lib[gi]?omp[^/ ]*[.]so[^/ \\n]*", open("/proc/self/maps").read())
        print(*sorted(set(libraries)))
    """
    result = python(code)
    assert len(result.stdout.split()) == 1, result.stdout + result.stderr


# Optimizers write in place, where autograd has to notice


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizers_bump_the_version_counter(name: str) -> None:
    parameter = torch.nn.Parameter(random((5,), torch.float32, generator("version")))
    optimizer = getattr(optim, name)([parameter], lr=0.1)
    loss = (parameter * parameter).sum()
    parameter.grad = torch.ones(5)
    version, values = parameter._version, parameter.detach().clone()
    optimizer.step()
    assert not torch.equal(parameter, values)
    assert parameter._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# The one-way rule between modules

PYTHON_LAYERS = {
    "runtime": {"_C"},
    "reference": set(),
    "arguments": set(),
    "autograd": {"_C", "arguments", "runtime", "reference"},
    "functional": {"arguments", "autograd", "reference", "runtime"},
    "tracing": set(),
    "stages": {"_C", "arguments", "autograd", "tracing"},
    "sequential": {"_C", "autograd", "stages", "tracing"},
    "nn": {"arguments", "functional", "sequential", "stages"},
    "optim": {"_C", "runtime"},
    "compiled": {"_C", "autograd", "nn", "optim", "runtime", "stages", "tracing"},
    "fusion": {"arguments"},
    "layer_fusion": {"fusion", "nn", "tracing"},
    "convert": {"fusion", "layer_fusion", "nn", "sequential", "tracing"},
    "dynamo": {"autograd", "functional", "fusion"},
}
# Modules that build on the operators: none of those may import one of these.
APPLICATION = {"classifier", "training", "_ranks", "data", "cli", "bench", "__main__"}

INCLUDE_LAYERS = {
    "ops": {"ops"},
    "common": {"common"},
    "cpu": {"cpu", "common", "ops"},
    "cuda": {"cuda", "common", "ops"},
    "bindings": {"bindings", "cpu", "cuda", "common", "ops"},
}


def imports_of(path: Path) -> set[str]:
    """Names of the fastnn modules that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastnn":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "fastnn" and len(name) > 1}
    return found


def files_of(module: str) -> list[Path]:
    single, package = REPOSITORY / "fastnn" / f"{module}.py", REPOSITORY / "fastnn" / module
    return [single] if single.exists() else sorted(package.rglob("*.py"))


@pytest.mark.parametrize("module", sorted(PYTHON_LAYERS))
def test_python_imports_go_one_way(module: str) -> None:
    files = files_of(module)
    if not files:
        pytest.skip(f"fastnn/{module} is not in this checkout")
    for path in files:
        forbidden = imports_of(path) - PYTHON_LAYERS[module] - {module}
        assert not forbidden, f"{path.name} imports {sorted(forbidden)}"


def test_the_application_does_not_reach_below_the_public_layer() -> None:
    for module in sorted(APPLICATION - {"bench"}):
        for path in files_of(module):
            below = imports_of(path) & {"_C", "autograd", "reference"}
            assert not below, f"{path.name} imports {sorted(below)}"


@pytest.mark.parametrize("layer", sorted(INCLUDE_LAYERS))
def test_cpp_includes_go_one_way(layer: str) -> None:
    files = [p for p in sorted((REPOSITORY / "csrc" / layer).rglob("*")) if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    if not files:
        pytest.skip(f"csrc/{layer} is not in this checkout")
    for path in files:
        for include in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            top = include.split("/")[0]
            allowed = INCLUDE_LAYERS[layer]
            assert top in allowed or top not in INCLUDE_LAYERS, f"{path.name} includes {include}"


def test_only_bindings_know_python() -> None:
    for layer in ("ops", "cpu", "cuda"):
        for path in sorted((REPOSITORY / "csrc" / layer).rglob("*")):
            if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
                assert not re.search(r"#\s*include\s+[<\"](pybind11|Python\.h|torch/|ATen)", path.read_text()), path


def test_the_stub_lists_what_the_module_has() -> None:
    tree = ast.parse((REPOSITORY / "fastnn" / "_C.pyi").read_text())
    stub = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert stub == {name for name in dir(_C) if not name.startswith("__")}


def test_every_package_of_the_source_is_installed() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    packages = ast.literal_eval(re.search(r"^packages = (\[.*\])$", text, re.M)[1])
    folders = {path.parent for path in (REPOSITORY / "fastnn").rglob("__init__.py")}
    assert set(packages) == {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
