"""Adversarial losses, the discriminator's regularizers and the adaptive weight.

Logits are (N, ...), with N samples: B·T frames in 2-D, B clips in 3-D. Means are over all logits unless a docstring
says otherwise.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vidtwin.errors import UserError


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Compute ½ (mean max(0, 1 − D(x)) + mean max(0, 1 + D(x̂))), the released code's default."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def hinge_generator_loss(logits_fake: Tensor) -> Tensor:
    """Compute −mean D(x̂)."""
    return -logits_fake.mean()


def non_saturating_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Compute ½ (mean softplus(−D(x)) + mean softplus(D(x̂))): cross-entropy of x as 1 and x̂ as 0, halved like hinge."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def non_saturating_generator_loss(logits_fake: Tensor) -> Tensor:
    """Compute mean_n softplus(−mean D(x̂_n)): cross-entropy of x̂ as 1, for logits (N, ...).

    As in the released code, the logits of a sample n (a frame, or a clip in 3-D) are averaged before the cross-entropy;
    the discriminator's loss applies it to each logit.
    """
    return F.softplus(-logits_fake.flatten(1).mean(1)).mean()


def lecam_penalty(logits_real: Tensor, logits_fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """Compute LeCAM (Tseng et al. 2021): mean relu(D(x) − mean_fake)² + mean relu(mean_real − D(x̂))².

    As in the released code, differences below 0 count as 0; the paper squares them unclipped.

    Args:
        logits_real: D(x).
        logits_fake: D(x̂).
        mean_real: Scalar, running mean of D(x), without a gradient.
        mean_fake: Scalar, running mean of D(x̂), without a gradient.
    """
    return F.relu(logits_real - mean_fake).square().mean() + F.relu(mean_real - logits_fake).square().mean()


def r1_penalty(logits_real: Tensor, clip: Tensor) -> Tensor:
    """Compute R1 (Mescheder et al. 2018), mean_n ‖∇_{x_n} Σ D(x_n)‖², without its factor weight / 2.

    Both the patch logits of a sample n and the squares over its 3·H·W numbers (a frame, 2-D) or 3·T·H·W (a clip, 3-D)
    are summed, not averaged. With batch norm a logit also depends on the other samples; the gradient is then that of
    all logits.

    Args:
        logits_real: (N, ...), with the graph from `clip`, in fp32.
        clip: (B, 3, T, H, W), with requires_grad.

    Returns:
        Scalar with a graph to the discriminator's parameters.
    """
    (gradient,) = torch.autograd.grad(logits_real.sum(), clip, create_graph=True)
    return gradient.square().sum() / len(logits_real)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average `values` over all ranks in place; return them unchanged if torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def adaptive_weight(
    reference_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor | None, maximum: float, eps: float = 1e-4
) -> Tensor:
    """Compute the weight that balances both losses' gradients at the last layer W (VQGAN, Esser et al. 2021, eq. 7).

        min(‖∇_W reference‖ / (‖∇_W adversarial‖ + eps), maximum)

    If torch.distributed is initialised, gradients are averaged over the ranks before their norms are computed, so every
    rank gets the weight of the whole batch; all ranks have to call this together.

    Args:
        reference_loss: Scalar; its graph is kept for the backward pass.
        adversarial_loss: Scalar; its graph is kept for the backward pass.
        last_layer: The last weight before the pixels (`VideoAutoencoder.last_layer`).
        maximum: Upper limit of the ratio.
        eps: Keeps the ratio finite if the discriminator's gradient is 0.

    Returns:
        Detached scalar.

    Raises:
        UserError: There is no trainable last layer, or a loss does not depend on it.
    """
    remedy = "give the autoencoder a trainable last_layer or set --model.loss.adaptive_weight false"
    if last_layer is None or not last_layer.requires_grad:
        state = "none" if last_layer is None else "one that does not require a gradient"
        raise UserError(f"Expected a trainable last layer for the adaptive GAN weight, got {state}; {remedy}.")
    gradients = [
        torch.autograd.grad(loss, last_layer, retain_graph=True, allow_unused=True)[0] if loss.requires_grad else None
        for loss in (reference_loss, adversarial_loss)
    ]
    if gradients[0] is None or gradients[1] is None:
        raise UserError(f"Expected losses that depend on the last layer for the adaptive GAN weight; {remedy}.")
    both = torch.stack([gradient.detach().float().flatten() for gradient in gradients if gradient is not None])
    reference, adversarial = mean_over_ranks(both).norm(dim=1)
    return (reference / (adversarial + eps)).clamp(max=maximum)
