"""The shared table of cases: every operator's geometries, their wrong shapes and the words of the errors."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from device import DEVICE
from torch import Tensor

DTYPES = (torch.float32, torch.float64)

# What a public function may raise for shapes that do not fit: ours is a ValueError, torch's a RuntimeError.
SHAPE_ERRORS = (ValueError, RuntimeError)


@dataclass(frozen=True)
class Wrong:
    """One argument replaced by a tensor of another shape, and a regular expression for the error."""

    argument: str
    shape: tuple[int, ...]
    words: str


@dataclass(frozen=True)
class LinearCase:
    id: str
    input: tuple[int, ...]
    weight: tuple[int, int]
    bias: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrong: tuple[Wrong, ...] = ()


@dataclass(frozen=True)
class Conv2dCase:
    id: str
    input: tuple[int, ...]
    weight: tuple[int, int, int, int]
    bias: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrong: tuple[Wrong, ...] = ()

    @property
    def convolution(self) -> dict[str, Any]:
        return {k: v for k, v in self.kwargs.items() if k not in ("activation", "max_pool")}

    @property
    def pool(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
        """``(kernel_size, stride, padding)`` as pairs."""
        max_pool = self.kwargs.get("max_pool")
        if max_pool is None:
            return None
        kernel, stride, padding = (max_pool, max_pool, 0) if isinstance(max_pool, int) else max_pool
        return pair(kernel), pair(stride), pair(padding)


@dataclass(frozen=True)
class PoolCase:
    id: str
    input: tuple[int, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class SoftmaxCase:
    id: str
    input: tuple[int, ...]
    dim: int


@dataclass(frozen=True)
class LossCase:
    """``target`` is "indices" or "probabilities"; ``weight`` says whether there are class weights."""

    id: str
    input: tuple[int, ...]
    target: str = "indices"
    weight: bool = False
    ignore: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def by_id(cases: Iterable[Any]) -> list[Any]:
    """Cases as pytest parameters with readable ids."""
    return [pytest.param(case, id=case.id) for case in cases]


def find(cases: Iterable[Any], *ids: str) -> list[Any]:
    table = {case.id: case for case in cases}
    return by_id(table[name] for name in ids)


LINEAR_CASES = (
    LinearCase(
        "4x8_to_3",
        (4, 8),
        (3, 8),
        wrong=(
            Wrong("weight", (3, 7), r"weight: expected shape \(out_features, 8\), got \(3, 7\)"),
            Wrong("weight", (3, 8, 1), r"weight: expected .*got .*3, 8, 1"),
            Wrong("bias", (4,), r"bias: expected shape \(3,?\), got \(4,?\)"),
            Wrong("bias", (3, 1), r"bias: expected .*got \(3, 1\)"),
        ),
    ),
    LinearCase("vector", (5,), (7, 5)),
    LinearCase("1x1_to_1", (1, 1), (1, 1)),
    LinearCase("no_bias", (6, 17), (9, 17), bias=False),
    LinearCase("odd_17x65_to_33", (17, 65), (33, 65)),
    LinearCase("3d_2x3x17_to_5", (2, 3, 17), (5, 17)),
    LinearCase("4d_2x1x3x9_to_4", (2, 1, 3, 9), (4, 9), bias=False),
    LinearCase("zero_batch", (0, 8), (3, 8)),
    LinearCase("zero_inner_batch", (2, 0, 8), (3, 8)),
    LinearCase("relu", (5, 19), (18, 19), kwargs={"activation": "relu"}),
    LinearCase("relu_no_bias", (3, 2, 33), (10, 33), bias=False, kwargs={"activation": "relu"}),
    LinearCase("relu_wide", (32, 100), (64, 100), kwargs={"activation": "relu"}),
    LinearCase("one_output", (9, 31), (1, 31)),
    LinearCase("one_input", (9, 1), (31, 1)),
    LinearCase("one_row", (1, 65), (66, 65)),
    LinearCase("deep_513", (3, 513), (7, 513)),
    LinearCase("blocks_150x700_to_130", (150, 700), (130, 700)),
)

CONV2D_CASES = (
    Conv2dCase(
        "3x3_pad1",
        (2, 3, 7, 6),
        (4, 3, 3, 3),
        kwargs={"padding": 1},
        wrong=(
            Wrong("weight", (4, 2, 3, 3), r"weight: expected .*\b3\b.*got \(4, 2, 3, 3\)"),
            Wrong("weight", (4, 3, 3), r"weight: expected .*got .*4, 3, 3"),
            Wrong("bias", (5,), r"bias: expected shape \(4,?\), got \(5,?\)"),
            Wrong("input", (2, 3), r"input: expected .*got .*2, 3"),
            Wrong("input", (2, 5, 7, 6), r"expected .*got "),
        ),
    ),
    Conv2dCase(
        "kernel_too_large",
        (2, 3, 7, 7),
        (4, 3, 7, 7),
        wrong=(
            Wrong("weight", (4, 3, 8, 7), r"(?i)kernel"),
            Wrong("input", (2, 3, 6, 7), r"(?i)kernel"),
        ),
    ),
    Conv2dCase("1x1", (2, 5, 4, 3), (7, 5, 1, 1)),
    Conv2dCase("1x1_stride2", (2, 5, 7, 6), (3, 5, 1, 1), kwargs={"stride": 2}),
    Conv2dCase("1x1_1_channel", (1, 1, 1, 1), (1, 1, 1, 1)),
    Conv2dCase("3x3_no_bias", (2, 3, 8, 8), (5, 3, 3, 3), bias=False),
    Conv2dCase("5x5_stride2_pad2", (2, 4, 11, 9), (6, 4, 5, 5), kwargs={"stride": 2, "padding": 2}),
    Conv2dCase("dilation2", (2, 3, 9, 8), (4, 3, 3, 3), kwargs={"dilation": 2, "padding": 1}),
    Conv2dCase("dilation2_stride2", (1, 3, 11, 10), (4, 3, 3, 3), kwargs={"dilation": 2, "stride": 2}),
    Conv2dCase(
        "asymmetric",
        (2, 3, 9, 13),
        (5, 3, 2, 5),
        kwargs={"stride": (3, 1), "padding": (1, 2), "dilation": (1, 2)},
    ),
    Conv2dCase("stride_beyond_kernel", (2, 3, 11, 10), (4, 3, 2, 2), kwargs={"stride": 4}),
    Conv2dCase("row_kernel", (2, 3, 4, 9), (4, 3, 1, 5), kwargs={"padding": (0, 2)}),
    Conv2dCase(
        "even_kernel_same",
        (2, 3, 6, 7),
        (4, 3, 4, 2),
        kwargs={"padding": "same"},
        wrong=(Wrong("weight", (4, 3, 4), r"weight: expected .*got .*4, 3, 4"),),
    ),
    Conv2dCase("column_kernel_few_outputs", (2, 17, 6, 4), (1, 17, 3, 1), kwargs={"padding": (1, 0)}),
    Conv2dCase("column_kernel_one_input", (2, 1, 9, 3), (32, 1, 5, 1), kwargs={"padding": (2, 0), "stride": (3, 1)}),
    Conv2dCase("column_kernel_one_vector", (2, 3, 6, 5), (8, 3, 3, 1), kwargs={"padding": (1, 0)}),
    Conv2dCase("one_output_channel", (2, 3, 6, 7), (1, 3, 3, 3), kwargs={"padding": 1}),
    Conv2dCase("same_dilation2", (2, 3, 6, 7), (4, 3, 3, 3), kwargs={"padding": "same", "dilation": 2}),
    Conv2dCase("valid", (2, 3, 6, 7), (4, 3, 3, 3), kwargs={"padding": "valid"}),
    Conv2dCase("padding_beyond_kernel", (1, 2, 4, 5), (3, 2, 2, 3), kwargs={"padding": 3}),
    Conv2dCase("kernel_is_image", (3, 2, 5, 6), (4, 2, 5, 6)),
    Conv2dCase("kernel_is_image_wide", (9, 16, 5, 5), (33, 16, 5, 5), kwargs={"stride": 3, "activation": "relu"}),
    Conv2dCase("kernel_is_image_grouped", (3, 6, 4, 4), (4, 3, 4, 4), kwargs={"groups": 2}),
    Conv2dCase("groups2", (2, 6, 7, 6), (8, 3, 3, 3), kwargs={"groups": 2, "padding": 1}),
    Conv2dCase("groups3_stride2", (1, 9, 7, 8), (6, 3, 3, 3), kwargs={"groups": 3, "stride": 2}),
    Conv2dCase("depthwise", (2, 5, 8, 7), (5, 1, 3, 3), kwargs={"groups": 5, "padding": 1}),
    Conv2dCase("depthwise_multiplier2", (2, 3, 8, 7), (6, 1, 3, 3), kwargs={"groups": 3, "stride": 2}),
    Conv2dCase("depthwise_33", (1, 33, 6, 5), (33, 1, 5, 5), bias=False, kwargs={"groups": 33, "padding": 2}),
    Conv2dCase(
        "depthwise_dilation2", (2, 37, 9, 21), (37, 1, 3, 3), kwargs={"groups": 37, "padding": 1, "dilation": 2}
    ),
    Conv2dCase("depthwise_dilation5", (1, 17, 7, 3), (17, 1, 3, 3), kwargs={"groups": 17, "padding": 5, "dilation": 5}),
    Conv2dCase("depthwise_7x7", (2, 37, 9, 23), (37, 1, 7, 7), kwargs={"groups": 37, "padding": 3}),
    Conv2dCase("depthwise_even_kernel", (1, 19, 9, 18), (19, 1, 4, 6), kwargs={"groups": 19}),
    Conv2dCase("depthwise_wide_kernel", (2, 33, 5, 24), (33, 1, 3, 11), kwargs={"groups": 33, "padding": (1, 5)}),
    Conv2dCase("groups_of_2", (2, 38, 7, 9), (38, 2, 3, 3), kwargs={"groups": 19, "padding": 1}),
    Conv2dCase("groups_of_2_few", (3, 6, 5, 6), (6, 2, 3, 3), kwargs={"groups": 3, "padding": 1}),
    Conv2dCase("groups_of_4_1x1", (2, 40, 5, 9), (40, 4, 1, 1), kwargs={"groups": 10}),
    Conv2dCase("groups_of_4_stride2", (2, 36, 9, 18), (36, 4, 3, 3), kwargs={"groups": 9, "padding": 1, "stride": 2}),
    Conv2dCase(
        "groups_of_4_dilation2_stride2",
        (2, 16, 11, 10),
        (16, 4, 3, 3),
        kwargs={"groups": 4, "padding": 2, "dilation": 2, "stride": 2},
    ),
    Conv2dCase("groups_of_8", (1, 24, 6, 21), (24, 8, 5, 5), kwargs={"groups": 3, "padding": 2}),
    Conv2dCase(
        "groups_of_8_dilation3",
        (2, 32, 9, 20),
        (32, 8, 3, 3),
        kwargs={"groups": 4, "padding": (1, 3), "dilation": (1, 3), "activation": "relu"},
    ),
    Conv2dCase("groups_of_16_stride2", (1, 48, 9, 9), (48, 16, 3, 3), kwargs={"groups": 3, "padding": 1, "stride": 2}),
    Conv2dCase("groups12_of_3", (2, 36, 6, 5), (24, 3, 3, 3), kwargs={"groups": 12, "padding": 1}),
    Conv2dCase("groups8_of_16", (3, 128, 6, 7), (128, 16, 3, 3), kwargs={"groups": 8, "padding": 1}),
    Conv2dCase("groups8_of_20_stride2", (1, 160, 5, 6), (136, 20, 3, 3), kwargs={"groups": 8, "stride": 2}),
    Conv2dCase("17_to_33_channels", (1, 17, 5, 6), (33, 17, 3, 3), kwargs={"padding": 1}),
    Conv2dCase("70_to_9_channels", (1, 70, 4, 5), (9, 70, 3, 3)),
    Conv2dCase("first_layer", (2, 1, 12, 12), (32, 1, 3, 3)),
    Conv2dCase("unbatched", (3, 7, 6), (4, 3, 3, 3), kwargs={"padding": 1}),
    Conv2dCase("zero_batch", (0, 3, 7, 6), (4, 3, 3, 3), kwargs={"padding": 1}),
    Conv2dCase("large_3x3", (2, 16, 14, 13), (20, 16, 3, 3), kwargs={"padding": 1}),
    Conv2dCase("large_3x3_64", (2, 64, 11, 12), (64, 64, 3, 3)),
    Conv2dCase("large_3x3_14", (2, 17, 14, 14), (35, 17, 3, 3), kwargs={"padding": 1}),
    Conv2dCase("small_3x3_16", (1, 16, 10, 9), (16, 16, 3, 3), kwargs={"padding": 1}),
    Conv2dCase("large_3x3_odd_groups", (3, 34, 9, 7), (66, 17, 3, 3), kwargs={"padding": 2, "groups": 2}),
    Conv2dCase("large_3x3_parts", (8, 16, 26, 26), (17, 16, 3, 3), kwargs={"padding": 1}),
    Conv2dCase("large_5x5", (3, 17, 13, 14), (33, 17, 5, 5), kwargs={"padding": 2}),
    Conv2dCase("large_5x5_groups2", (5, 32, 12, 11), (32, 16, 5, 5), kwargs={"groups": 2, "activation": "relu"}),
    Conv2dCase("large_5x5_parts", (6, 16, 28, 27), (18, 16, 5, 5), bias=False, kwargs={"padding": (1, 4)}),
    Conv2dCase("large_9x9_stride2", (4, 17, 23, 22), (36, 17, 9, 9), kwargs={"padding": 4, "stride": 2}),
    Conv2dCase("few_5x5", (5, 1, 28, 27), (6, 1, 5, 5), kwargs={"padding": 2}),
    Conv2dCase("few_5x5_colours", (3, 3, 20, 21), (10, 3, 5, 5)),
    Conv2dCase("few_7x7_dilation2", (2, 2, 19, 18), (37, 2, 7, 7), kwargs={"padding": 3, "dilation": (1, 2)}),
    Conv2dCase("few_in_groups", (3, 4, 13, 12), (38, 2, 4, 3), kwargs={"groups": 2, "padding": 1, "stride": (2, 1)}),
    Conv2dCase("pointwise_24_to_32", (3, 24, 13, 12), (32, 24, 1, 1)),
    Conv2dCase("pointwise_odd", (3, 37, 7, 5), (41, 37, 1, 1)),
    Conv2dCase("5x5_outside", (3, 19, 7, 7), (21, 19, 5, 5), kwargs={"padding": (4, 2), "stride": (1, 2)}),
    Conv2dCase("17_to_32_stride2", (3, 34, 9, 8), (64, 17, 3, 3), kwargs={"padding": 1, "stride": 2, "groups": 2}),
    Conv2dCase("wide_3x3", (1, 3, 4, 105), (37, 3, 3, 3), kwargs={"padding": 1}),
    Conv2dCase("wide_3x3_stride2", (2, 3, 9, 102), (32, 3, 3, 3), kwargs={"padding": 1, "stride": 2}),
    Conv2dCase("wide_5x5", (1, 2, 3, 210), (5, 2, 5, 5), kwargs={"padding": 2}),
    Conv2dCase("wide_dilation2", (1, 2, 5, 206), (3, 2, 3, 3), kwargs={"padding": (1, 2), "dilation": 2}),
    Conv2dCase("relu", (2, 3, 7, 6), (4, 3, 3, 3), kwargs={"activation": "relu"}),
    Conv2dCase(
        "relu_groups2",
        (2, 4, 7, 6),
        (6, 2, 3, 3),
        bias=False,
        kwargs={"activation": "relu", "groups": 2, "stride": 2, "padding": 1},
    ),
    Conv2dCase("relu_pool2_even", (2, 3, 8, 10), (5, 3, 3, 3), kwargs={"activation": "relu", "max_pool": 2}),
    Conv2dCase("relu_pool2_odd", (2, 3, 9, 7), (5, 3, 3, 3), kwargs={"activation": "relu", "max_pool": 2}),
    Conv2dCase(
        "relu_pool2_no_bias",
        (2, 4, 8, 8),
        (3, 4, 3, 3),
        bias=False,
        kwargs={"activation": "relu", "max_pool": 2, "padding": 1},
    ),
    Conv2dCase(
        "relu_pool2_first_layer",
        (3, 1, 12, 13),
        (32, 1, 3, 3),
        kwargs={"activation": "relu", "max_pool": 2},
    ),
    Conv2dCase(
        "relu_pool2_32_to_64",
        (2, 32, 13, 13),
        (64, 32, 3, 3),
        kwargs={"activation": "relu", "max_pool": 2},
    ),
    Conv2dCase(
        "relu_pool2_rgb",
        (3, 3, 10, 9),
        (37, 3, 3, 3),
        kwargs={"activation": "relu", "max_pool": 2, "padding": 1},
    ),
    Conv2dCase(
        "relu_pool2_more_than_64_channels",
        (2, 16, 9, 8),
        (70, 16, 3, 3),
        kwargs={"activation": "relu", "max_pool": 2, "padding": 1},
    ),
    Conv2dCase(
        "relu_pool2_many_small",
        (37, 16, 7, 7),
        (17, 16, 3, 3),
        kwargs={"activation": "relu", "max_pool": 2},
    ),
    Conv2dCase(
        "relu_pool2_wide",
        (1, 16, 18, 150),
        (6, 16, 3, 3),
        kwargs={"activation": "relu", "max_pool": 2, "padding": 1},
    ),
    Conv2dCase(
        "relu_pool2_wide_5x5",
        (1, 16, 15, 90),
        (5, 16, 5, 5),
        kwargs={"activation": "relu", "max_pool": 2, "padding": (2, 3)},
    ),
    Conv2dCase(
        "relu_pool2_large_5x5",
        (4, 20, 15, 16),
        (34, 20, 5, 5),
        kwargs={"activation": "relu", "max_pool": 2},
    ),
    Conv2dCase(
        "relu_pool2_tall_kernel",
        (2, 16, 20, 12),
        (7, 16, 7, 3),
        kwargs={"activation": "relu", "max_pool": 2, "padding": (3, 0)},
    ),
    Conv2dCase("pool2_without_relu", (2, 3, 8, 7), (5, 3, 3, 3), kwargs={"max_pool": 2}),
    Conv2dCase(
        "relu_pool3_stride2_pad1",
        (2, 3, 9, 10),
        (5, 3, 3, 3),
        kwargs={"activation": "relu", "max_pool": (3, 2, 1)},
    ),
    Conv2dCase(
        "relu_pool_pairs",
        (2, 3, 9, 11),
        (4, 3, 2, 3),
        kwargs={"activation": "relu", "max_pool": ((3, 2), (1, 2), (1, 0))},
    ),
    Conv2dCase(
        "relu_pool2_unbatched",
        (3, 8, 9),
        (4, 3, 3, 3),
        kwargs={"activation": "relu", "max_pool": 2},
    ),
    Conv2dCase(
        "relu_pool2_zero_batch",
        (0, 3, 8, 8),
        (4, 3, 3, 3),
        kwargs={"activation": "relu", "max_pool": 2},
    ),
    Conv2dCase(
        "relu_pool2_stride2",
        (1, 5, 17, 16),
        (9, 5, 5, 5),
        kwargs={"activation": "relu", "max_pool": 2, "stride": 2, "padding": 2},
    ),
    Conv2dCase(
        "relu_pool2_groups_of_4",
        (2, 24, 9, 8),
        (24, 4, 3, 3),
        kwargs={"activation": "relu", "max_pool": 2, "groups": 6, "padding": 1},
    ),
    Conv2dCase(
        "relu_pool2_depthwise",
        (2, 6, 8, 8),
        (6, 1, 3, 3),
        kwargs={"activation": "relu", "max_pool": 2, "groups": 6, "padding": 1},
    ),
)

POOL_CASES = (
    PoolCase("2", (2, 3, 8, 6), {"kernel_size": 2}),
    PoolCase("2_odd", (2, 3, 7, 9), {"kernel_size": 2}),
    PoolCase("one_window_in_a_wide_row", (1, 2, 4, 300), {"kernel_size": 2, "stride": (1, 400)}),
    PoolCase("3_stride2_pad1", (2, 5, 9, 8), {"kernel_size": 3, "stride": 2, "padding": 1}),
    PoolCase("3_stride1", (1, 17, 6, 7), {"kernel_size": 3, "stride": 1}),
    PoolCase("pairs", (2, 3, 9, 11), {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0)}),
    PoolCase("dilation2", (2, 3, 9, 11), {"kernel_size": 3, "stride": 1, "dilation": 2, "padding": 1}),
    PoolCase("dilation_pair", (1, 4, 10, 9), {"kernel_size": (2, 3), "dilation": (3, 2)}),
    PoolCase("ceil", (2, 3, 7, 10), {"kernel_size": 2, "stride": 2, "ceil_mode": True}),
    PoolCase("ceil_pad", (2, 3, 6, 10), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    PoolCase("ceil_stride_beyond", (1, 2, 9, 9), {"kernel_size": 2, "stride": 4, "ceil_mode": True}),
    PoolCase("kernel_is_image", (2, 33, 4, 5), {"kernel_size": (4, 5)}),
    PoolCase("1", (2, 3, 4, 5), {"kernel_size": 1}),
    PoolCase("1_stride2", (2, 3, 5, 5), {"kernel_size": 1, "stride": 2}),
    PoolCase("unbatched", (3, 8, 7), {"kernel_size": 2}),
    PoolCase("zero_batch", (0, 3, 8, 7), {"kernel_size": 2}),
    PoolCase("channels70", (1, 70, 6, 6), {"kernel_size": 2}),
)

SOFTMAX_CASES = (
    SoftmaxCase("rows_4x10", (4, 10), 1),
    SoftmaxCase("short_rows_37x32", (37, 32), 1),
    SoftmaxCase("rows_5x33", (5, 33), 1),
    SoftmaxCase("columns_5x3", (5, 3), 0),
    SoftmaxCase("vector_17", (17,), 0),
    SoftmaxCase("one_class", (6, 1), -1),
    SoftmaxCase("middle_2x5x7", (2, 5, 7), 1),
    SoftmaxCase("images_2x3x4x5", (2, 3, 4, 5), 1),
    SoftmaxCase("negative_dim", (3, 4, 65), -2),
    SoftmaxCase("wide_1000", (3, 1000), -1),
    SoftmaxCase("zero_batch", (0, 10), 1),
)

CROSS_ENTROPY_CASES = (
    LossCase("10_classes", (6, 10)),
    LossCase("one_sample", (10,)),
    LossCase("sum", (5, 7), kwargs={"reduction": "sum"}),
    LossCase("none", (5, 7), kwargs={"reduction": "none"}),
    LossCase("weight", (9, 5), weight=True),
    LossCase("weight_sum", (9, 5), weight=True, kwargs={"reduction": "sum"}),
    LossCase("ignore", (9, 5), ignore=True),
    LossCase("ignore_weight_none", (9, 5), ignore=True, weight=True, kwargs={"reduction": "none"}),
    LossCase("ignore_index_2", (9, 5), ignore=True, kwargs={"ignore_index": 2}),
    LossCase("smoothing", (6, 10), kwargs={"label_smoothing": 0.1}),
    LossCase("smoothing_weight_ignore", (9, 5), weight=True, ignore=True, kwargs={"label_smoothing": 0.2}),
    LossCase("smoothing_none", (6, 10), kwargs={"label_smoothing": 0.1, "reduction": "none"}),
    LossCase("images", (2, 5, 3, 4)),
    LossCase("images_weight_ignore", (2, 5, 3, 4), weight=True, ignore=True),
    LossCase("sequence_none", (2, 5, 7), kwargs={"reduction": "none"}),
    LossCase("wide_1000", (3, 1000)),
    LossCase("one_class", (4, 1)),
    LossCase("probabilities", (6, 10), target="probabilities"),
    LossCase("probabilities_vector", (10,), target="probabilities"),
    LossCase("probabilities_weight", (6, 10), target="probabilities", weight=True),
    LossCase("probabilities_none", (6, 10), target="probabilities", kwargs={"reduction": "none"}),
    LossCase("probabilities_smoothing", (6, 10), target="probabilities", kwargs={"label_smoothing": 0.1}),
    LossCase("probabilities_images", (2, 5, 3, 4), target="probabilities", weight=True),
)

NLL_CASES = tuple(
    case for case in CROSS_ENTROPY_CASES if case.target == "indices" and "label_smoothing" not in case.kwargs
)

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "offset", "expanded", "size1_strides")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape in another memory layout. "expanded" repeats the first entry of dimension
    0."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        if tensor.dim() == 3:
            return tensor.unsqueeze(0).contiguous(memory_format=torch.channels_last).squeeze(0)
        assert tensor.dim() == 4
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "offset":
        # One element past the start: no vector is aligned.
        buffer = tensor.new_full((tensor.numel() + 1,), float("nan"))
        buffer[1:] = tensor.flatten()
        return buffer[1:].view(tensor.shape)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "size1_strides":
        # A dimension of size 1 may carry any stride; only its index 0 exists.
        strides = tuple(
            12345 if size == 1 else stride
            for size, stride in zip(tensor.shape, tensor.contiguous().stride(), strict=True)
        )
        return tensor.contiguous().as_strided(tensor.shape, strides)
    raise ValueError(layout)


def generator(*key: object) -> torch.Generator:
    """A generator whose seed depends on the case alone, so a failure repeats when it runs by itself."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def random(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)


def integers(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Integers of -3..3: sums of thousands of products stay below 2^24, hence exact in float32."""
    return torch.randint(-3, 4, shape, generator=rng).to(DEVICE, dtype)


FILLS: dict[str, Callable[[tuple[int, ...], torch.dtype, torch.Generator], Tensor]] = {
    "integers": integers,
    "random": random,
}
