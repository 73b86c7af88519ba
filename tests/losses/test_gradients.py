"""Gradients of the loss's networks: those of autograd, in one backward pass of each network."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vidtwin.losses.autoencoder
import vidtwin.losses.frame_distance
from vidtwin.autoencoder import Reconstruction
from vidtwin.losses import AutoencoderLoss, PatchDiscriminator2d
from vidtwin.losses.frame_distance import FrameDistance
from vidtwin.losses.gradients import compute_with_gradient


class Distance(FrameDistance):
    key = "distance"

    def _build(self, download: bool) -> nn.Module:
        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return (self.conv(x).sigmoid() - self.conv(y).sigmoid()).square().mean((1, 2, 3))

        return Network()


class BackwardConvolutions(TorchDispatchMode):
    """Count the backward passes through convolutions, by the number of input channels and frames."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append((args[1].shape[1], args[1].shape[0]))
        return func(*args, **(kwargs or {}))


def make_loss(**arguments: Any) -> AutoencoderLoss:
    torch.manual_seed(0)
    loss = AutoencoderLoss(
        perceptual_weight=0.5,
        discriminator=PatchDiscriminator2d(channels=8, num_layers=2),
        adversarial_start=0,
        learn_logvar=True,
        **arguments,
    )
    loss.perceptual = Distance("a distance", 8)
    loss.perceptual.load()
    return loss


def gradients_of_a_step(loss: AutoencoderLoss) -> dict[str, Tensor]:
    torch.manual_seed(1)
    first, last = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(4, 3, 1)
    clip = torch.rand(2, 3, 4, 32, 32) * 2 - 1
    terms = loss.generator_loss(Reconstruction(last(first(clip)), {}, {}), clip, last.weight, step=0)
    terms["total"].backward()
    assert loss.logvar is not None
    assert loss.logvar.grad is not None
    values = {"logvar": loss.logvar.grad, "weight": terms["adaptive_weight"], "total": terms["total"].detach()}
    for name, parameter in (*first.named_parameters("first"), *last.named_parameters("last")):
        assert parameter.grad is not None
        values[name] = parameter.grad
    return values


@pytest.mark.parametrize("arguments", [{}, {"perceptual_frames": 2, "adversarial_frames": 3}, {"leading_frames": 1}])
def test_the_gradients_of_a_gan_step_are_those_of_autograd(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = gradients_of_a_step(make_loss(**arguments))
    for module in (vidtwin.losses.autoencoder, vidtwin.losses.frame_distance):
        monkeypatch.setattr(module, "compute_with_gradient", lambda function, x: function(x))
    plain = gradients_of_a_step(make_loss(**arguments))
    assert ours["weight"] > 0
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-9)


def test_each_network_runs_backward_once_in_a_gan_step() -> None:
    loss = make_loss()
    with BackwardConvolutions() as counted:
        gradients_of_a_step(loss)
    # (8, 8) and (16, 8): layers of the discriminator alone; (3, 8): its first layer, and the distance's.
    assert [counted.seen.count(shape) for shape in ((8, 8), (16, 8), (3, 8))] == [1, 1, 2]


def test_the_networks_get_no_gradients_from_a_step_of_the_generator() -> None:
    loss = make_loss()
    gradients_of_a_step(loss)
    assert loss.discriminator is not None
    assert all(parameter.grad is None for parameter in loss.discriminator.parameters())


def test_a_value_can_be_differentiated_again_and_again_for_each_row() -> None:
    x = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()
    incoming = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    value = compute_with_gradient(lambda x: x.pow(3).sum(1), x)
    torch.testing.assert_close(value, x.pow(3).sum(1))
    for _ in range(2):
        (gradient,) = torch.autograd.grad(value, x, incoming, retain_graph=True)
        torch.testing.assert_close(gradient, 3 * x.square() * incoming[:, None])
    scalar = compute_with_gradient(lambda x: x.square().mean(), x)
    (gradient,) = torch.autograd.grad(5 * scalar, x)
    torch.testing.assert_close(gradient, 5 * 2 * x / 12)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = compute_with_gradient(lambda x: x.pow(3).sum(), x) + x.square().sum()
    with pytest.raises(RuntimeError, match="Expected one derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_without_gradients_the_function_is_called_as_it_is() -> None:
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not compute_with_gradient(torch.sum, x).requires_grad
    weight = torch.ones((), requires_grad=True)  # the gradient of something else is kept
    assert compute_with_gradient(lambda x: weight * x.sum(), x.detach()).requires_grad
