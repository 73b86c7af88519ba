"""Layers that are run again in the backward pass."""

import pytest
import torch
from torch import Tensor, nn

from vidtwin.layers.recompute import Recomputing


class Counted(nn.Module):
    """Dropout of a product, which counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.runs = 0

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        self.runs += 1
        x = self.linear(x).sin()
        return nn.functional.dropout(x if scale is None else x * scale, 0.5)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_layer_is_run_twice_with_the_gradients_of_once(scaled: bool) -> None:
    x, scale, gradients = torch.randn(4, 16), torch.randn(16) if scaled else None, []
    layer = Counted()
    for recompute, runs in ((False, 1), (True, 2)):
        torch.manual_seed(0)
        layer.runs, given = 0, x.clone().requires_grad_()
        output = Recomputing(recompute).run(layer, given, scale)
        gradients.append(torch.autograd.grad(output.square().sum(), [given, *layer.parameters()]))
        assert layer.runs == runs
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_without_gradients_a_layer_is_run_once() -> None:
    layer = Counted()
    with torch.no_grad():
        assert not Recomputing(True).run(layer, torch.randn(4, 16), None).requires_grad
    assert layer.runs == 1
