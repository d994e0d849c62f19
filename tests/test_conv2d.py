"""conv2d with its fused ReLU and max-pool: every ISA, dtype and layout against the float64 reference."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    CONV2D_CASES,
    DTYPES,
    FILLS,
    LAYOUTS,
    Conv2dCase,
    Wrong,
    by_id,
    find,
    generator,
    random,
)
from device import ON_CUDA
from dispatch_log import fell_back, ran_kernels
from fuzzing import fuzz, running_on
from hypothesis import assume, given
from hypothesis import strategies as st
from operator_checks import check_conv2d
from tolerance import (
    assert_close_bound,
    assert_identical,
    rounding_bound,
    winograd_bf16_bound,
    winograd_bound,
)
from torch import Tensor

import fastnn
from fastnn import _C, functional, reference
from fastnn.runtime import thread_limit


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("case", by_id(CONV2D_CASES))
def test_matches_reference(case: Conv2dCase, fill: str, isa: str, dtype: torch.dtype) -> None:
    check_conv2d(case, fill, dtype)


WINOGRAD_KERNELS = [  # input, weight, padding, kernel forward and for the input, kernel for the weight
    ((8, 16, 26, 26), (32, 16, 3, 3), 1, "winograd_4x4", "winograd_4x4"),
    ((1, 32, 14, 14), (32, 32, 3, 3), 0, "winograd_2x2", "winograd_4x4"),
    ((4, 32, 14, 14), (32, 32, 5, 5), 2, "winograd_2x2_5x5", "winograd_2x2_5x5"),
]


@pytest.mark.skipif(ON_CUDA, reason="kernels of the CPU's")
@pytest.mark.parametrize("case", WINOGRAD_KERNELS, ids=str)
def test_many_channels_by_winograd(case: tuple[Any, ...], isa: str) -> None:
    size, weight, padding, of_images, of_weight = case
    rng = generator("winograd", str(case))
    x, w = (random(shape, torch.float32, rng).requires_grad_() for shape in (size, weight))
    results = {}
    for threads in (1, 2, 16):  # the weight's gradient in parts of one thread each, or of all
        with thread_limit(threads), fastnn.explain_dispatch() as log:
            y = functional.conv2d(x, w, padding=padding)
            results[threads] = [y, *torch.autograd.grad(y.square().sum(), (x, w))]
        kernels = {record.operator: record.kernel for record in log if record.operator.startswith("conv2d_")}
        assert kernels == {
            "conv2d_forward": of_images,
            "conv2d_grad_input": of_images,
            "conv2d_grad_weight": of_weight,
        }
    for threads in (2, 16):
        assert all(map(torch.equal, results[threads], results[1])), threads


BF16_SHAPES = [  # batch, in_channels, out_channels, size, padding, fused ReLU and pooling, float32's kernel
    (8, 32, 64, 13, 0, True, "winograd_4x4"),
    (4, 17, 33, 14, 1, False, "winograd_4x4"),
    (2, 16, 16, 9, 2, True, "winograd_4x4"),
    (1, 64, 40, 14, 0, False, "winograd_2x2"),
]


@pytest.mark.skipif(not _C.has_bf16(), reason="this processor has no AVX512-BF16")
@pytest.mark.parametrize("shape", BF16_SHAPES, ids=str)
def test_products_in_bf16_are_within_their_bound(shape: tuple[int, int, int, int, int, bool, str]) -> None:
    batch, inputs, outputs, size, padding, fused, in_float32 = shape
    rng = generator("bf16", str(shape))
    x = random((batch, inputs, size, size), torch.float32, rng).contiguous(memory_format=torch.channels_last)
    w = random((outputs, inputs, 3, 3), torch.float32, rng)
    b = random((outputs,), torch.float32, rng)
    expected = F.conv2d(x.double(), w.double(), b.double(), padding=padding)
    bound = winograd_bf16_bound(x, w, padding=padding)
    bound = bound + rounding_bound(1, torch.float32, expected.abs() + bound)
    if fused:
        expected, bound = F.max_pool2d(expected.relu(), 2), F.max_pool2d(bound, 2)
    results = {}
    for precision in ("fp32", "bf16"):
        y = torch.empty(expected.shape).contiguous(memory_format=torch.channels_last)
        winner = torch.empty_like(y, dtype=torch.uint8) if fused else None
        with ran_kernels("conv2d_forward", dtype=torch.float32) as records:
            _C.conv2d_forward(y, winner, x, w, b, (1, 1), (padding, padding), (1, 1), 1, fused, fused, precision)
        assert [record.kernel for record in records] == ["winograd_bf16" if precision == "bf16" else in_float32]
        results[precision] = y
    assert_close_bound(results["bf16"], expected, bound, "output")
    error = (results["bf16"] - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < error < 1e-2  # bfloat16's, neither float32's nor an index that is wrong


@pytest.mark.skipif(not _C.has_bf16(), reason="this processor has no AVX512-BF16")
def test_5x5_stays_in_float32_under_bf16() -> None:
    rng = generator("bf16", "5x5")
    x = random((2, 16, 14, 14), torch.float32, rng).contiguous(memory_format=torch.channels_last)
    w = random((32, 16, 5, 5), torch.float32, rng)
    results = []
    for precision in ("fp32", "bf16"):
        y = torch.empty(2, 32, 10, 10).contiguous(memory_format=torch.channels_last)
        with ran_kernels("conv2d_forward", dtype=torch.float32) as records:
            _C.conv2d_forward(y, None, x, w, None, (1, 1), (0, 0), (1, 1), 1, False, False, precision)
        assert [record.kernel for record in records] == ["winograd_2x2_5x5"]
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.skipif(not _C.has_bf16(), reason="this processor has no AVX512-BF16")
def test_bf16_is_for_float32_and_its_isa() -> None:
    x = torch.ones(1, 16, 14, 14).contiguous(memory_format=torch.channels_last)
    w, y = torch.ones(16, 16, 3, 3), torch.empty(1, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    arguments = ((1, 1), (0, 0), (1, 1), 1, False, False, "bf16")
    with pytest.raises(TypeError, match="input: expected float32, got float64"):
        _C.conv2d_forward(y.double(), None, x.double(), w.double(), None, *arguments)
    before = fastnn.get_isa()
    fastnn.set_isa("baseline")
    try:
        with pytest.raises(
            ValueError, match="precision: expected 'fp32' with the ISA baseline on this processor, got 'bf16'"
        ):
            _C.conv2d_forward(y, None, x, w, None, *arguments)
    finally:
        fastnn.set_isa(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    find(
        CONV2D_CASES,
        "3x3_pad1",
        "1x1",
        "asymmetric",
        "groups2",
        "groups_of_4_stride2",
        "groups_of_8",
        "depthwise_multiplier2",
        "first_layer",
        "relu_pool2_odd",
        "relu_pool3_stride2_pad1",
        "unbatched",
    ),
)
def test_layouts(case: Conv2dCase, layout: str, isa: str, dtype: torch.dtype) -> None:
    if layout == "channels_last" and len(case.input) == 3:
        pytest.skip("channels_last is a layout of four dimensions")
    check_conv2d(case, "integers", dtype, layout)


@pytest.mark.parametrize(
    "case",
    find(
        CONV2D_CASES,
        "3x3_pad1",
        "1x1",
        "groups2",
        "relu_pool2_odd",
        "depthwise",
        "one_output_channel",
        "kernel_is_image",
    ),
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_has_the_memory_format_of_the_input(case: Conv2dCase, memory_format: torch.memory_format) -> None:
    x = torch.ones(case.input).contiguous(memory_format=memory_format).requires_grad_()
    w = torch.ones(case.weight).requires_grad_()
    y = functional.conv2d(x, w, **case.kwargs)
    expected = reference.conv2d(x, w, **case.kwargs)
    assert y.stride() == expected.stride()
    grads = torch.autograd.grad(y.sum(), (x, w))
    assert grads[0].is_contiguous(memory_format=memory_format)


ROW_CASES = [  # input, output channels, padding, further arguments: for tiles of 1x4 and few input channels
    ((3, 1, 28, 28), 32, 0, {"activation": "relu", "max_pool": 2}),
    ((2, 3, 32, 32), 32, 1, {"activation": "relu", "max_pool": 2}),
    ((9, 3, 11, 14), 17, 1, {"max_pool": 2}),  # odd rows, tiles half empty, one channel in a second vector
    ((1, 1, 5, 270), 5, 1, {}),  # more tiles than a row of V holds
    ((1, 3, 6, 98), 40, (2, 4), {"activation": "relu"}),  # the tile beside the image
    ((2, 2, 9, 8), 8, 1, {}),
    ((2, 4, 8, 13), 33, 0, {"activation": "relu"}),
    ((1, 15, 7, 42), 16, 2, {}),
    ((2, 9, 12, 12), 21, 1, {"groups": 3, "activation": "relu", "max_pool": 2}),
    ((8, 6, 3, 6), 4, 0, {"groups": 2}),
    ((1, 5, 1, 1), 3, (3, 4), {}),  # a border of zeros alone but for one pixel
]


@pytest.mark.skipif(ON_CUDA, reason="a kernel of the CPU's")
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_few_channels_in_tiles_of_a_row(case: tuple[Any, ...], fill: str, isa: str) -> None:
    size, outputs, padding, arguments = case
    weight = (outputs, size[1] // arguments.get("groups", 1), 3, 3)
    check_conv2d(Conv2dCase("row", size, weight, kwargs={"padding": padding, **arguments}), fill, torch.float32)
    rng = generator("row", str(case))
    x, w = random(size, torch.float32, rng), random(weight, torch.float32, rng)
    with ran_kernels("conv2d_forward", dtype=torch.float32) as records:
        expected = functional.conv2d(x, w, padding=padding, **arguments)
    assert [record.kernel for record in records] == ["winograd_1x4"]

    # Numbers whose transformation might overflow, wherever they lie.
    for tensor, place in itertools.product((x, w), (0, -1)):
        before = tensor.flatten()[place].item()
        tensor.view(-1)[place] = 1e30
        with ran_kernels("conv2d_forward", dtype=torch.float32) as records:
            functional.conv2d(x, w, padding=padding, **arguments)
        other_group = "groups" in arguments and place == 0  # than the last one, which is on record
        assert [record.kernel for record in records] == ["winograd_1x4" if other_group else "gather"]
        tensor.view(-1)[place] = before
    assert torch.equal(functional.conv2d(x, w, padding=padding, **arguments), expected)


# Input, members of a group, kernel, further arguments, and the instruction sets whose vectors hold several of them, or
# with AVX-512 one.
NARROW_GROUPS = [
    ((2, 32, 9, 17), 2, 3, {"padding": 1}, ("avx2", "avx512")),
    ((2, 32, 9, 17), 4, 3, {"padding": 2, "dilation": 2}, ("avx2", "avx512")),
    ((1, 24, 12, 9), 8, 5, {"padding": 2, "stride": 2}, ("avx512",)),
    ((2, 40, 7, 7), 4, 1, {}, ("avx2", "avx512")),
    ((1, 48, 9, 9), 16, 3, {"stride": 2}, ("avx512",)),
    ((1, 48, 9, 9), 16, 3, {"padding": 1}, ()),  # Winograd takes fewer multiplications
    ((1, 48, 9, 9), 3, 3, {"padding": 1}, ()),
]


@pytest.mark.skipif(ON_CUDA, reason="kernels of the CPU's")
@pytest.mark.parametrize("case", NARROW_GROUPS, ids=str)
def test_narrow_groups_have_kernels_of_their_own(case: tuple[Any, ...], isa: str) -> None:
    size, members, kernel, arguments, served = case
    rng = generator("narrow groups", str(case))
    x = random(size, torch.float32, rng).requires_grad_()
    w = random((size[1], members, kernel, kernel), torch.float32, rng).requires_grad_()
    stages = ("conv2d_forward", "conv2d_grad_input", "conv2d_grad_weight")
    with ran_kernels(*stages, dtype=torch.float32) as records:
        functional.conv2d(x, w, groups=size[1] // members, **arguments).sum().backward()
    for record in records:
        assert (record.kernel == "grouped") == (isa in served), record


DOTS = [  # input, few output channels, kernel, further arguments, and the vectors, in numbers, that serve them
    ((2, 17, 9, 27), 1, (3, 3), {"padding": 1}, (2, 4, 8, 16)),  # edges a pixel wide where the image lies
    ((1, 64, 6, 7), 3, (3, 3), {"padding": 1, "activation": "relu"}, (8, 16)),  # copied with its border
    ((3, 40, 5, 5), 2, (5, 5), {"padding": 2, "stride": 2}, (4, 8, 16)),
    ((2, 48, 8, 9), 4, (1, 1), {}, (8, 16)),
    ((1, 20, 9, 30), 5, (3, 3), {"padding": 2, "dilation": 2}, (16,)),
    ((2, 70, 7, 3), 7, (2, 2), {}, (16,)),
    ((2, 33, 6, 6), 8, (3, 3), {"padding": 1}, (16,)),
    ((2, 96, 5, 6), 6, (3, 3), {"groups": 3, "padding": 1}, (4, 8, 16)),
    ((1, 130, 1, 40), 6, (1, 3), {"padding": (0, 1)}, (16,)),
    ((2, 19, 8, 8), 8, (3, 3), {"stride": 2}, ()),  # the lanes of the sums would take longer
    ((2, 16, 8, 8), 9, (3, 3), {"stride": 2}, ()),
]


@pytest.mark.skipif(ON_CUDA, reason="a kernel of the CPU's")
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("case", DOTS, ids=str)
def test_few_channels_to_compute_are_dot_products(
    case: tuple[Any, ...], fill: str, isa: str, dtype: torch.dtype
) -> None:
    size, few, kernel, arguments, lanes = case
    groups = arguments.get("groups", 1)
    served = {"baseline": 16, "avx2": 32, "avx512": 64}[isa] // dtype.itemsize in lanes
    check_conv2d(Conv2dCase("dots", size, (few, size[1] // groups, *kernel), kwargs=arguments), fill, dtype)
    rng = generator("dots", str(case))
    x, w = random(size, dtype, rng), random((few, size[1] // groups, *kernel), dtype, rng)
    with ran_kernels("conv2d_forward", dtype=dtype) as records:
        functional.conv2d(x, w, **arguments)
    assert [record.kernel == "dot" for record in records] == [served]

    # The other way round: an input of few channels, whose gradient is what is computed.
    x_shape, w_shape = (size[0], few, *size[2:]), (size[1], few // groups, *kernel)
    check_conv2d(Conv2dCase("dots back", x_shape, w_shape, kwargs=arguments), fill, dtype)
    x, w = random(x_shape, dtype, rng).requires_grad_(), random(w_shape, dtype, rng)
    for number, kernels in (
        (1.0, {"dot"} if served else {"gather", "winograd_2x2", "winograd_4x4"}),
        (math.inf, {"scatter"}),
    ):
        w.view(-1)[-1] = number
        y = functional.conv2d(x, w, **arguments)
        with ran_kernels("conv2d_grad_input", dtype=dtype) as records:
            torch.autograd.grad(y, x, torch.ones_like(y))
        assert {record.kernel for record in records} <= kernels


def test_fused_equals_separate_operators() -> None:
    rng = generator("fused")
    x, w, b = (
        random((2, 5, 9, 8), torch.float32, rng),
        random((7, 5, 3, 3), torch.float32, rng),
        torch.ones(7),
    )
    fused = functional.conv2d(x, w, b, activation="relu", max_pool=(3, 2, 1))
    separate = functional.max_pool2d(functional.relu(functional.conv2d(x, w, b)), 3, 2, 1)
    magnitude = F.max_pool2d(F.conv2d(x.double().abs(), w.double().abs(), b.double()), 3, 2, 1)
    reach = winograd_bound(x, w, torch.float32, ["winograd_4x4"])
    bound = rounding_bound(46, torch.float32, magnitude) + F.max_pool2d(reach, 3, 2, 1)
    assert_close_bound(fused, separate.double(), 2 * bound)


@pytest.mark.parametrize("channels", [1, 3, 16], ids="{} channels".format)
@pytest.mark.parametrize("activation", [None, "relu"], ids=str)
def test_pooling_without_winners_has_the_same_bits(channels: int, activation: str | None, isa: str) -> None:
    """Where no backward pass follows, their places are neither sought nor stored."""
    rng = generator("no winners", str(channels))
    x, w = random((3, channels, 13, 12), torch.float32, rng), random((18, channels, 3, 3), torch.float32, rng)
    x[1, 0, 4, 4], x[2, 0, 2, 7], x[2, 0, 9, 1] = float("nan"), float("inf"), -float("inf")
    arguments = {"activation": activation, "max_pool": 2}
    with ran_kernels("conv2d_forward", dtype=torch.float32):
        expected = functional.conv2d(x, w.requires_grad_(), **arguments)
        actual = functional.conv2d(x, w.detach(), **arguments)
    assert expected.isnan().any() and torch.equal(expected.isnan(), actual.isnan())
    assert torch.equal(expected.nan_to_num(), actual.nan_to_num())


@pytest.mark.parametrize(
    "case",
    find(
        CONV2D_CASES,
        "relu_pool2_32_to_64",
        "relu_pool2_wide_5x5",
        "groups2",
        "groups_of_4_stride2",
        "groups8_of_20_stride2",
        "5x5_stride2_pad2",
        "depthwise",
    ),
)
def test_same_bits_for_every_thread_count(case: Conv2dCase, isa: str) -> None:
    rng = generator("threads", case.id)
    x = random((9, *case.input[1:]), torch.float32, rng).requires_grad_()
    w = random(case.weight, torch.float32, rng).requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = functional.conv2d(x, w, **case.kwargs)
            results.append((y.detach(), *torch.autograd.grad(y, (x, w), torch.ones_like(y))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_weight_gradients_of_first_layers_look_winners_up(channels: int, isa: str) -> None:
    """What a window reads of a source row, 4 pixels, has to fit a vector."""
    lanes = {"avx2": 8, "avx512": 16}.get(isa, 4)
    x, w = torch.rand(2, channels, 10, 9), torch.rand(20, channels, 3, 3, requires_grad=True)
    with ran_kernels("conv2d_grad_weight") as records:
        functional.conv2d(x, w, activation="relu", max_pool=2).sum().backward()
    expected = "lookup" if 4 * channels <= lanes else "sparse"
    assert [record.kernel for record in records if record.operator == "conv2d_grad_weight"] == [expected]


@pytest.mark.parametrize("case", by_id([c for c in CONV2D_CASES if "pool2" in c.id and c.weight[1] == 16]))
def test_input_gradients_of_pooled_blocks_come_from_winners(case: Conv2dCase, isa: str, dtype: torch.dtype) -> None:
    rng = generator("winners", case.id)
    x, w = random(case.input, dtype, rng).requires_grad_(), random(case.weight, dtype, rng)
    with ran_kernels("conv2d_grad_input") as records:
        functional.conv2d(x, w, **case.kwargs).sum().backward()
    assert [record.kernel for record in records if record.operator == "conv2d_grad_input"] == ["sparse"]


@pytest.mark.parametrize("name", ["1x1", "3x3", "3x3_stride2", "depthwise", "depthwise_stride2", "groups_of_4"])
def test_a_batch_that_exceeds_the_caches_has_the_bits_of_its_images(name: str, isa: str, dtype: torch.dtype) -> None:
    """From 16 MiB on, outputs are stored past the caches and inputs fetched ahead; a single image has 2 or 4 MiB."""
    size = 1 if name == "1x1" else 3
    stride, groups = 2 if "stride2" in name else 1, 32 if "depthwise" in name else 8 if "groups" in name else 1
    rng = generator("exceeds the caches", name)
    x = random((8, 32, 128, 128), dtype, rng).contiguous(memory_format=torch.channels_last)
    w = random((32, 32 // groups, size, size), dtype, rng)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.detach().requires_grad_()
        y = functional.conv2d(images, w, stride=stride, padding=size // 2, groups=groups)
        return y.detach(), torch.autograd.grad(y.square().sum() / 2, images)[0]

    with ran_kernels("conv2d_forward", "conv2d_grad_input", dtype=dtype):
        y, grad = run(x)
    images = [run(x[i : i + 1]) for i in range(8)]
    assert_identical(y, torch.cat([output for output, _ in images]), "output")
    assert_identical(grad, torch.cat([gradient for _, gradient in images]), "gradient")


@pytest.mark.parametrize("lines", range(4))
@pytest.mark.parametrize("stride", [1, 2])
def test_streamed_depthwise_bits_at_any_distance_of_the_memories(stride: int, lines: int, isa: str) -> None:
    """An output past the caches so many lines behind the source, modulo 4 KiB, decides the order of the channels."""
    rng = generator("distance", stride)
    shape = (21, 1024, 14, 14)
    x = random(shape, torch.float32, rng).contiguous(memory_format=torch.channels_last)
    w = random((1024, 1, 3, 3), torch.float32, rng).contiguous(memory_format=torch.channels_last)
    options = {"stride": (stride, stride), "padding": (1, 1), "dilation": (1, 1), "groups": 1024}

    def strided(source: Tensor, distance: int) -> Tensor:
        """Memory like `x` with its first number so many lines behind that of `source`, modulo 4 KiB."""
        memory = torch.empty(x.numel() + 1024)
        offset = (source.data_ptr() + 64 * distance - memory.data_ptr()) % 4096
        return memory[offset // 4 :].as_strided(x.shape, x.stride())

    def run(distance: int) -> Tensor:
        if stride == 1:
            output = strided(x, distance)
            _C.conv2d_forward(output, None, x, w, None, *options.values(), False, False)
            return output
        grad = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
        output = strided(grad, distance)
        _C.conv2d_backward(output, None, None, grad, x, w, None, None, *options.values())
        return output

    assert_identical(run(lines), run(8), "output")


@pytest.mark.parametrize("max_pool", [2, (2, 2, 0), ((2, 2), (2, 2), (0, 0)), [2, 2, 0]], ids=str)
def test_forms_of_max_pool(max_pool: object) -> None:
    x, w = torch.arange(64.0).reshape(1, 1, 8, 8), torch.ones(1, 1, 3, 3)
    expected = reference.conv2d(x, w, max_pool=2)
    assert torch.equal(functional.conv2d(x, w, max_pool=max_pool), expected)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_ties_go_to_the_first_element(activation: str | None, isa: str) -> None:
    x = torch.ones(1, 1, 5, 5, requires_grad=True)
    w = torch.ones(1, 1, 2, 2)
    grads = []
    for function in (functional.conv2d, reference.conv2d):
        y = function(x, w, activation=activation, max_pool=2)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    assert_identical(grads[0], grads[1])


@pytest.mark.parametrize("kwargs", [{}, {"activation": "relu"}, {"activation": "relu", "max_pool": 2}], ids=str)
@pytest.mark.parametrize(("channels", "padding"), [(3, 0), (3, 1), (32, 0), (32, 1)])
def test_nan_reaches_exactly_where_torch_puts_it(channels: int, padding: int, kwargs: dict, isa: str) -> None:
    rng = generator("nan")
    x = random((2, channels, 11, 11), torch.float32, rng)
    x[0, 1, 4, 4] = x[1, 0, 0, -1] = float("nan")
    w = random((5, channels, 3, 3), torch.float32, rng)
    y, expected = (module.conv2d(x, w, padding=padding, **kwargs) for module in (functional, reference))
    assert_identical(y.isnan(), expected.isnan())


class Block(NamedTuple):
    """A convolution that ReLU and 2x2 max-pooling may follow."""

    input: tuple[int, int, int, int]
    out_channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1


# One for each kernel of the gradients; odd outputs leave pixels that no window pools.
BLOCKS = [
    Block((2, 1, 14, 13), 20, 3),
    Block((3, 32, 13, 10), 32, 3),
    Block((3, 32, 12, 12), 24, 3, padding=1),
    Block((2, 8, 11, 9), 12, 5, padding=2),
    Block((3, 17, 13, 12), 20, 5, padding=2),
    Block((2, 3, 13, 13), 12, 3, stride=2, padding=1),
    Block((4, 32, 12, 11), 32, 3, padding=1, groups=2),
    Block((4, 32, 12, 11), 32, 3, padding=1, groups=8),
    Block((4, 32, 12, 11), 32, 3, stride=2, groups=4),
    Block((5, 16, 12, 12), 16, 1),
]


@pytest.mark.skipif(ON_CUDA, reason="CUDA's products are dense, the padding's among them")
@pytest.mark.parametrize("place", ["input", "weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fused", [{"activation": "relu", "max_pool": 2}, {}], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_what_is_not_finite_goes_where_torch_puts_it(
    block: Block, fused: dict, bad: float, place: str, isa: str, dtype: torch.dtype
) -> None:
    rng = generator("not finite", str(block))
    channels, size = block.input[1], block.kernel
    x = random(block.input, dtype, rng)
    w = random((block.out_channels, channels // block.groups, size, size), dtype, rng)
    b = random((block.out_channels,), dtype, rng)
    if place == "input":
        for index in ((0, 0, 0, 0), (1, channels // 2, 4, 5), (1, channels - 1, -1, -1)):
            x[index] = bad
    else:
        w[1, 0, 0, 0] = w[-1, -1, size // 2, -1] = bad
    kwargs = {"stride": block.stride, "padding": block.padding, "groups": block.groups}
    ours, theirs = (_output_and_gradients(module, x, w, b, **kwargs, **fused) for module in (functional, reference))
    with fastnn.explain_dispatch() as log:
        functional.conv2d(x, w, b, **kwargs)
    assert log[0].kernel != "winograd_4x4"  # in whose tiles it would spread
    # An infinity may come out of Winograd as NaN, and passes where ReLU and pooling cut an infinity. Whether torch
    # multiplies zeros of the padding depends on its kernel.
    winograd = "winograd" in log[0].kernel and not math.isnan(bad)
    padded = place == "weight" and block.padding > 0
    if winograd or (padded and not math.isnan(bad)):
        ours, theirs = ([torch.where(t.isfinite(), 0.0, float("nan")) for t in side] for side in (ours, theirs))
    if winograd or padded:
        ours, theirs = ours[1:], theirs[1:]
    for mine, expected in zip(ours, theirs, strict=True):
        assert_identical(mine.isnan(), expected.isnan())
        assert_identical(mine.isinf(), expected.isinf())


def _output_and_gradients(module: Any, x: Tensor, w: Tensor, b: Tensor, **kwargs: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    output = module.conv2d(*leaves, **kwargs)
    grad = random(output.shape, output.dtype, generator("gradient"))
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        pytest.param(case, wrong, id=f"{case.id}-{wrong.argument}-{wrong.shape}")
        for case in CONV2D_CASES
        for wrong in case.wrong
    ],
)
def test_wrong_shapes(case: Conv2dCase, wrong: Wrong) -> None:
    arguments = {
        "input": torch.zeros(case.input),
        "weight": torch.zeros(case.weight),
        "bias": torch.zeros(case.weight[0]),
    }
    arguments[wrong.argument] = torch.zeros(wrong.shape)
    with pytest.raises((ValueError, RuntimeError), match=wrong.words):
        functional.conv2d(**arguments, **case.kwargs)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_input_channels(size: int, isa: str, dtype: torch.dtype) -> None:
    """A sum of nothing: the bias. torch returns no channels."""
    x, w = torch.ones(2, 0, 9, 9, dtype=dtype), torch.ones(4, 0, size, size, dtype=dtype)
    bias = torch.arange(4, dtype=dtype).requires_grad_()
    y = functional.conv2d(x, w, bias)
    assert_identical(y, bias.view(4, 1, 1).expand(2, 4, 10 - size, 10 - size))
    (grad,) = torch.autograd.grad(y.sum(), bias)
    assert grad.tolist() == [2 * (10 - size) ** 2] * 4


@pytest.mark.skipif(ON_CUDA, reason="what a GPU cannot allocate is another size")
def test_more_than_memory_holds(isa: str) -> None:
    x, w = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 3)
    with pytest.raises(RuntimeError, match="allocate"):  # the output, by torch
        functional.conv2d(x, w, padding=2**20)
    for reach in (2**30, 2**31 - 1):  # a copy of the image with its padding
        with pytest.raises(MemoryError):
            functional.conv2d(x, w, padding=reach, dilation=reach)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"stride": 0}, r"(?i)stride"),
        ({"stride": -1}, r"(?i)stride"),
        ({"padding": -1}, r"(?i)padding"),
        ({"dilation": 0}, r"(?i)dilation"),
        ({"groups": 2}, r"(?i)groups|weight"),
        ({"groups": 0}, r"(?i)groups"),
        ({"padding": "full"}, r"(?i)padding"),
        ({"padding": "same", "stride": 2}, r"(?i)same"),
        ({"activation": "tanh"}, r"activation: expected .*relu.*got 'tanh'"),
        ({"max_pool": (2, 2)}, r"max_pool: expected .*got \(2, 2\)"),
        ({"max_pool": 0}, r"(?i)max_pool|kernel"),
        ({"max_pool": 9}, r"(?i)max_pool|output size|small"),
        ({"max_pool": (2, 2, 2)}, r"(?i)pad"),
    ],
    ids=str,
)
def test_wrong_parameters(kwargs: dict, words: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=words):
        functional.conv2d(torch.zeros(1, 3, 7, 7), torch.zeros(4, 3, 3, 3), **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    rng = generator("conv2d", dtype)
    x, w, b = (random(s, torch.float64, rng).to(dtype) for s in ((2, 3, 6, 6), (4, 3, 3, 3), (4,)))
    with fell_back():
        y = functional.conv2d(x, w, b, 1, 1)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.conv2d(x, w, b, 1, 1))


pairs = st.tuples


@fuzz(120)
@given(data=st.data())
def test_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(pairs(st.integers(1, 5), st.integers(1, 5)))
    stride = draw(pairs(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(pairs(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.sampled_from(["valid", "same"]) | pairs(st.integers(0, 4), st.integers(0, 4)))
    size = draw(pairs(st.integers(1, 14), st.integers(1, 14)))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    if groups > 1 and draw(st.booleans()):
        in_channels = out_channels = groups * draw(st.sampled_from([1, 2, 4, 8]))
    else:
        in_channels = groups * draw(st.integers(1, 20 // groups))
        out_channels = groups * draw(st.integers(1, 36 // groups))
    batch = draw(st.integers(0, 3))
    if padding == "same":
        stride = (1, 1)
    around = (0, 0) if padding == "valid" else padding
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        conv_size = list(size)
    else:
        conv_size = [(n + 2 * p - e) // s + 1 for n, p, e, s in zip(size, around, extents, stride, strict=True)]
        assume(all(n + 2 * p >= e for n, p, e in zip(size, around, extents, strict=True)))
    kwargs: dict = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if draw(st.booleans()):
        kwargs["activation"] = "relu"
    if draw(st.booleans()):
        pool_kernel = draw(pairs(st.integers(1, 3), st.integers(1, 3)))
        pool_stride = draw(st.just(pool_kernel) | pairs(st.integers(1, 3), st.integers(1, 3)))
        pool_padding = tuple(draw(st.integers(0, k // 2)) for k in pool_kernel)
        fits = zip(conv_size, pool_kernel, pool_padding, strict=True)
        assume(all(n + 2 * p >= k for n, k, p in fits))
        kwargs["max_pool"] = (pool_kernel, pool_stride, pool_padding)
    case = Conv2dCase(
        "fuzz",
        (batch, in_channels, *size),
        (out_channels, in_channels // groups, *kernel),
        draw(st.booleans()),
        kwargs,
    )
    fill = draw(st.sampled_from(sorted(FILLS)))
    dtype = draw(st.sampled_from(DTYPES))
    layout = draw(st.sampled_from(LAYOUTS)) if fill == "integers" else "contiguous"
    with running_on(draw(st.sampled_from(fastnn.available_isas()))):
        check_conv2d(case, fill, dtype, layout)


@pytest.mark.parametrize("two", [np.int64(2), torch.tensor(2), [2], (np.int32(2), 2)], ids=repr)
def test_numbers_are_whatever_is_an_integer(two: Any) -> None:
    x, w = (random(shape, torch.float32, generator("integers")) for shape in ((2, 3, 9, 9), (4, 3, 3, 3)))
    expected = functional.conv2d(x, w, stride=2, padding=2, max_pool=(2, 1, 0))
    assert_identical(functional.conv2d(x, w, stride=two, padding=two, max_pool=(two, 1, 0)), expected)
    assert_identical(functional.max_pool2d(x, two, ()), functional.max_pool2d(x, 2))


def test_a_bias_may_change_before_the_backward_pass() -> None:
    """Pooling, too, is undone from the winners alone, once or to be differentiated again."""
    source = generator("bias")
    x, w, bias = (random(shape, torch.float64, source).requires_grad_() for shape in ((2, 3, 9, 9), (4, 3, 3, 3), (4,)))
    grad = random((2, 4, 3, 3), torch.float64, source).requires_grad_()
    expected = torch.autograd.grad(
        reference.conv2d(x, w, bias, activation="relu", max_pool=2), (x, w, bias), grad, create_graph=True
    )
    output = functional.conv2d(x, w, bias, activation="relu", max_pool=2)
    with torch.no_grad():
        bias.add_(1)
    for create_graph in (True, False):
        actual = torch.autograd.grad(output, (x, w, bias), grad, create_graph=create_graph, retain_graph=True)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        if create_graph:
            seconds = [
                torch.autograd.grad(sum(g.square().sum() for g in grads), grad, retain_graph=True)
                for grads in (actual, expected)
            ]
            torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("max_pool", [2, 3, (3, 2, 1)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_pooled_image_without_a_batch_is_contiguous(max_pool: Any, activation: str | None) -> None:
    rng = generator("unbatched", str(max_pool))
    input, weight = random((3, 13, 11), torch.float32, rng), random((8, 3, 3, 3), torch.float32, rng)
    weight = weight.to(memory_format=torch.channels_last)
    with ran_kernels("conv2d_forward"):
        actual = functional.conv2d(input, weight, activation=activation, max_pool=max_pool)
    expected = reference.conv2d(input, weight, activation=activation, max_pool=max_pool)
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected)


def test_second_derivatives_of_one_channel_in_channels_last() -> None:
    results = []
    for conv2d in (functional.conv2d, F.conv2d):
        leaves = [
            random(shape, torch.float64, generator("one channel", str(shape)))
            .to(memory_format=torch.channels_last)
            .requires_grad_()
            for shape in ((3, 4, 9, 8), (1, 4, 3, 3))
        ]
        grads = torch.autograd.grad(conv2d(*leaves).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_hooks_of_saved_tensors_may_change_strides() -> None:
    """As save_on_cpu(pin_memory=True) does."""
    x = random((2, 3, 8, 8), torch.float32, generator("hooks"))
    weight = random((8, 3, 3, 3), torch.float32, generator("hooks", "weight")).requires_grad_()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(functional.conv2d(x, weight, activation="relu", max_pool=2).sum(), weight)[0]

    expected = gradient()
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda saved: saved):
        assert torch.equal(gradient(), expected)
