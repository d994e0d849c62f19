"""The operators as functions: torch.nn.functional's names, signatures and results, on fastnn's kernels.

Dense CPU tensors of float32 and float64, in any memory layout, run on the kernels. Everything else - other
dtypes and devices, autocast, torch.func transforms, jit tracing - runs on torch's own operators with the same
result; :func:`fastnn.explain_dispatch` tells which it was. Results have the memory format that torch's have.
"""

from __future__ import annotations

from torch import Tensor

from fastnn import reference
from fastnn.autograd.common import needs_grad, route
from fastnn.autograd.linear import LinearFunction, linear_forward, linear_op

__all__ = ["linear"]


def _wants_relu(activation: str | None) -> bool:
    if activation is None:
        return False
    if activation == "relu":
        return True
    raise ValueError(f'activation: expected None or "relu", got {activation!r}')


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """Affine map ``input @ weight.T + bias``, with an optional ReLU in the same pass.

    Args:
        input: ``(*, in_features)``, any number of leading dimensions.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        activation: None or ``"relu"``.

    Returns:
        ``(*, out_features)``.

    Raises:
        ValueError: for shapes that do not fit or an unknown activation; names what was expected and what came.
        TypeError: where an argument is no tensor.

    Equivalent to::

        output = torch.nn.functional.linear(input, weight, bias)
        if activation == "relu": output = torch.relu(output)
    """
    relu = _wants_relu(activation)
    way = route("linear", input, weight, bias)
    if way == "kernel":
        if needs_grad(input, weight, bias):
            return LinearFunction.apply(input, weight, bias, relu)
        return linear_forward(input, weight, bias, relu)
    if way == "op":
        return linear_op(input, weight, bias, relu)
    return reference.linear(input, weight, bias, activation=activation)
