"""The extension module: every function fills tensors that the caller allocated."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

_Result = TypeVar("_Result")

def initialise(
    tensor_type: type, parameter_type: type, get_num_threads: Any, allocate: Any, is_grad_enabled: Any, modes: Any
) -> None: ...
def quick_way(*tensors: Any) -> str | None: ...
def is_emulator() -> bool: ...
def has_bf16() -> bool: ...
def set_isa(name: str) -> None: ...
def get_isa() -> str: ...
def available_isas() -> list[str]: ...
def build_facts() -> dict[str, Any]: ...
def device_has_code(device: int) -> bool: ...
def num_threads() -> int: ...
def set_openmp_threads(threads: int) -> int: ...
def set_own_threads(own: bool) -> bool: ...
def trace_start() -> None: ...
def trace_stop() -> list[tuple[str, str, str, str, int]]: ...
def linear_forward(
    output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, tf32: bool = False
) -> None: ...
def linear_backward(
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    tf32: bool = False,
) -> None: ...
def conv2d_forward(
    output: Tensor,
    winner: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    relu: bool,
    pool: bool,
    precision: str = "fp32",
) -> None: ...
def conv2d_backward(
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    winner: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    precision: str = "fp32",
) -> None: ...
def adam_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
) -> None: ...
def sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    first: list[bool],
    lr: float | Tensor,
    momentum: float | Tensor,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None: ...
def transpose(output: Tensor, input: Tensor) -> None: ...
def gather_images(
    output: Tensor,
    input: Tensor,
    index: Tensor,
    divisor: float,
    target_output: Tensor | None = None,
    target: Tensor | None = None,
) -> None: ...
def count_correct(correct: Tensor, logits: Tensor, target: Tensor) -> None: ...

class Program:
    """Recorded kernel calls."""

    def record(self, function: Callable[[], _Result]) -> _Result: ...  # its kernel calls are not made but appended
    def run(self) -> None: ...  # or, while another records, the calls become part of that one
    # (tensor, number of a run's tensor, bytes from its begin)
    def place(self, slots: list[Tensor], pieces: list[tuple[Tensor, int, int]]) -> None: ...
    def run_on(self, tensors: list[Tensor]) -> bool: ...
    def __len__(self) -> int: ...

# Side by side, where there is a program for each thread; rows and outputs are each program's own.
def run_batches(
    programs: list[Program], rows: list[Tensor], outputs: list[Tensor], index: Tensor, output: Tensor
) -> None: ...
def stand_in(like: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor: ...
def max_pool2d_forward(
    output: Tensor,
    winners: Tensor | None,
    input: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None: ...
def max_pool2d_backward(
    grad_input: Tensor,
    grad_output: Tensor,
    winners: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None: ...
def relu_forward(output: Tensor, input: Tensor) -> None: ...
def relu_backward(grad_input: Tensor, grad_output: Tensor, output: Tensor) -> None: ...
def softmax_forward(output: Tensor, input: Tensor, dim: int) -> None: ...
def softmax_backward(grad_input: Tensor, grad_output: Tensor, output: Tensor, dim: int) -> None: ...
def log_softmax_forward(output: Tensor, input: Tensor, dim: int) -> None: ...
def log_softmax_backward(grad_input: Tensor, grad_output: Tensor, output: Tensor, dim: int) -> None: ...
def exponentials(output: Tensor, input: Tensor) -> None: ...
def logarithms(output: Tensor, input: Tensor) -> None: ...
def cross_entropy_forward(
    output: Tensor,
    statistics: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> None: ...
def cross_entropy_backward(
    grad_input: Tensor | None,
    grad_target: Tensor | None,
    grad_output: Tensor,
    statistics: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> None: ...
def nll_loss_forward(
    output: Tensor,
    divisor: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
) -> None: ...
def nll_loss_backward(
    grad_input: Tensor,
    grad_output: Tensor,
    divisor: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
) -> None: ...
def mse_loss_forward(
    output: Tensor,
    divisor: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
) -> None: ...
def mse_loss_backward(
    grad_input: Tensor | None,
    grad_target: Tensor | None,
    grad_output: Tensor,
    divisor: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
) -> None: ...
