"""Values whose gradients are computed at once, so that no later backward pass runs through their networks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compute_with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute `function(x)` and its gradient for `x` in one go.

    Every backward pass through the result multiplies that gradient by the incoming one, a small product: the adaptive
    weight of a GAN asks for gradients twice before the backward pass of the loss. What the network keeps for its
    backward pass is freed before this returns. If `x` needs no gradient, or none are recorded, this is a plain call.

    Args:
        function: From `x` to a scalar, or to a vector (N,) of which each number depends on its own row of `x` alone.
            Its parameters get no gradients.
        x: Of any shape; (N, ...) for a vector.

    Returns:
        The value of `function`. It can be differentiated once, which may be done again and again.

    Raises:
        RuntimeError: In a backward pass through the result with `create_graph`.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return function(x)
    leaf = x.detach().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    result: Tensor = _WithGradient.apply(x, value.detach(), gradient)
    return result


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph: the stored gradient would count as a constant
            raise RuntimeError("Expected one derivative of a value computed with its gradient, got a graph of it.")
        (gradient,) = ctx.saved_tensors
        rows = incoming.reshape(incoming.shape + (1,) * (gradient.ndim - incoming.ndim))
        return (rows * gradient).to(gradient.dtype), None, None
