"""The training loss of every autoencoder: pixels, LPIPS, regularization and GAN, in two reductions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from vidtwin.autoencoder import Reconstruction
from vidtwin.errors import UserError
from vidtwin.losses import adversarial as gan
from vidtwin.losses.perceptual import LPIPS

# Learned log-variances stay in here: exp(-6) = 0.0025 is a third of an 8-bit step (2/255), and a mean error below it
# need not weigh more.
LOGVAR_RANGE = (-6.0, 6.0)


class AutoencoderLoss(nn.Module):
    r"""Loss of a video autoencoder and of its discriminator.

    With s the scalar log-variance, N = 3·H·W the numbers in a frame, g the generator's adversarial loss and W the
    last layer, `mean` is

        nll   = (pixel_weight · mean |x − x̂| + perceptual_weight · mean LPIPS) / exp(s) + s
        total = nll + kl_weight · kl / N + Σ regularization_weights · terms + w · g
        w     = adversarial_weight · min(‖∇_W nll‖ / (‖∇_W g‖ + 1e-4), adaptive_weight_maximum / N)

    and `released` is N times that: the released code sums over the numbers of a frame, averages over frames, and sets
    the KL of a whole clip against it. The gradients differ by the factor N and by nothing else, so an optimizer that
    does not see the loss's scale (AdamW) takes the same steps.

    Departures from the released code: before `adversarial_start` it runs the discriminator and the adaptive weight
    and multiplies them by 0 (so batch statistics and weight decay move the discriminator); here neither is computed.

    Args:
        reduction: "mean" (its size does not depend on the resolution) or "released".
        pixel: "l1" |x − x̂| or "l2" (x − x̂)², pixels in [-1, 1].
        pixel_weight: Weight of the pixel term.
        perceptual_weight: Weight of LPIPS (paper Table 6: 0.05); 0 trains without it and needs no backbone.
        perceptual_backbone: File with VGG-16 weights; None is torch hub's cache, see `LPIPS`.
        adversarial_weight: Weight of the GAN (paper Table 6: 0.05), on top of which the adaptive weight comes.
        adversarial: "hinge" (released) or "non_saturating".
        adversarial_start: The first batch with the GAN. The released 20,001 counts the steps of two optimizers, two
            to a batch: it turns the discriminator on at batch 10,000 and the generator's term one batch later.
        adaptive_weight: Balance the GAN by gradient norms; without it w = adversarial_weight (N times that in
            "released").
        adaptive_weight_maximum: Upper limit of the ratio of norms, as counted in "released".
        discriminator: Takes clips and gives logits; None trains without a GAN.
        kl_weight: Weight of the KL, a sum per clip in nats, against the sum per frame of `released`
            (paper Table 6: 0.001).
        regularization_weights: Weights of the autoencoder's other terms (commitment, entropy, …), against the mean
            pixel error. A term without a weight is an error; 0 ignores it.
        learn_logvar: Learn s, as the released code does; else s = 0.
    """

    def __init__(
        self,
        reduction: Literal["mean", "released"] = "mean",
        pixel: Literal["l1", "l2"] = "l1",
        pixel_weight: float = 1.0,
        perceptual_weight: float = 0.05,
        perceptual_backbone: str | None = None,
        adversarial_weight: float = 0.05,
        adversarial: Literal["hinge", "non_saturating"] = "hinge",
        adversarial_start: int = 10_000,
        adaptive_weight: bool = True,
        adaptive_weight_maximum: float = 1e4,
        discriminator: nn.Module | None = None,
        kl_weight: float = 0.001,
        regularization_weights: dict[str, float] | None = None,
        learn_logvar: bool = False,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.pixel = pixel
        self.pixel_weight = pixel_weight
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.adaptive_weight = adaptive_weight
        self.adaptive_weight_maximum = adaptive_weight_maximum
        self.kl_weight = kl_weight
        self.regularization_weights = dict(regularization_weights or {})
        if "kl" in self.regularization_weights:
            raise UserError("Expected the weight of kl in --model.loss.kl_weight, got it in regularization_weights.")
        if adversarial == "hinge":
            self.generator_term, self.discriminator_term = gan.hinge_generator_loss, gan.hinge_discriminator_loss
        else:
            self.generator_term = gan.non_saturating_generator_loss
            self.discriminator_term = gan.non_saturating_discriminator_loss
        self.discriminator = discriminator
        # (clip, clip) → one distance per frame (B·T,)
        self.perceptual: Callable[[Tensor, Tensor], Tensor] = LPIPS(perceptual_backbone)
        self.logvar = nn.Parameter(torch.zeros(())) if learn_logvar else None

    def setup(self) -> None:
        """Load what the configured terms need (LPIPS' backbone); `UserError` if it is not there."""
        if self.perceptual_weight > 0 and isinstance(self.perceptual, LPIPS):
            try:
                self.perceptual.load()
            except UserError as error:
                raise UserError(
                    f"{error} Put it there, name another place by --model.loss.perceptual_backbone PATH, or train "
                    "without LPIPS by --model.loss.perceptual_weight 0."
                ) from error

    def gan_is_on(self, step: int) -> bool:
        """Whether batch `step` (from 0) trains with the GAN."""
        return self.discriminator is not None and self.adversarial_weight > 0 and step >= self.adversarial_start

    def generator_loss(
        self, reconstruction: Reconstruction, clip: Tensor, last_layer: Tensor | None, step: int
    ) -> dict[str, Tensor]:
        """What the autoencoder is trained on.

        The discriminator's parameters are frozen in here, so that the backward pass leaves them without a gradient.
        Without gradients (validation) the adaptive weight can't be computed: `adversarial` is then given, but is not
        part of `total`.

        Args:
            reconstruction: Of `clip`, with the graph that led to it.
            clip: (B, 3, T, H, W) in [-1, 1].
            last_layer: `VideoAutoencoder.last_layer`, for the adaptive weight.
            step: Batches trained before this one.

        Returns:
            `total`, to be minimised, and detached `pixel`, `perceptual`, `nll`, each regularization term by its name
            (unweighted), and where they are in use `logvar`, `adversarial` (g) and `adaptive_weight` (w). `pixel` and
            `perceptual` are means in either reduction; `total`, `nll` and `adaptive_weight` follow `reduction`.
        """
        prediction, target = _as_float(reconstruction.clip), _as_float(clip)
        frame_size = target[0, :, 0].numel()
        scale = frame_size if self.reduction == "released" else 1
        terms: dict[str, Tensor] = {}

        error = prediction - target
        terms["pixel"] = (error.abs() if self.pixel == "l1" else error.square()).mean()
        nll = self.pixel_weight * terms["pixel"]
        if self.perceptual_weight > 0:
            terms["perceptual"] = self.perceptual(prediction, target).mean()
            nll = nll + self.perceptual_weight * terms["perceptual"]
        if self.logvar is not None:
            terms["logvar"] = self._projected_logvar()
            nll = nll / terms["logvar"].exp() + terms["logvar"]
        terms["nll"] = scale * nll

        total = nll
        for name, term in reconstruction.regularization.items():
            terms[name] = term
            total = total + self._regularization_weight(name, frame_size) * term

        if self.gan_is_on(step):
            assert self.discriminator is not None
            with _frozen(self.discriminator):
                terms["adversarial"] = self.generator_term(_as_float(self.discriminator(prediction)))
            weight = self._adversarial_weight(nll, terms["adversarial"], last_layer, frame_size)
            if weight is not None:
                terms["adaptive_weight"] = scale * weight
                total = total + weight * terms["adversarial"]
        return {"total": scale * total} | {name: term.detach() for name, term in terms.items()}

    def discriminator_loss(self, reconstruction_clip: Tensor, clip: Tensor, step: int) -> dict[str, Tensor]:
        """What the discriminator is trained on.

        Args:
            reconstruction_clip: (B, 3, T, H, W); no gradient flows back into it.
            clip: (B, 3, T, H, W) in [-1, 1].
            step: Batches trained before this one.

        Returns:
            `total`, to be minimised (the same in either reduction), and detached mean `logits_real` and
            `logits_fake`; `{}` while the GAN is off.
        """
        if not self.gan_is_on(step):
            return {}
        assert self.discriminator is not None
        # In two passes, as in the released code: with batch norm each has its own statistics.
        logits_real = _as_float(self.discriminator(_as_float(clip)))
        logits_fake = _as_float(self.discriminator(_as_float(reconstruction_clip).detach()))
        return {
            "total": self.discriminator_term(logits_real, logits_fake),
            "logits_real": logits_real.detach().mean(),
            "logits_fake": logits_fake.detach().mean(),
        }

    def _regularization_weight(self, name: str, frame_size: int) -> float:
        if name == "kl":
            return self.kl_weight / frame_size
        if name not in self.regularization_weights:
            raise UserError(
                f"Expected a weight for the regularization term {name!r}, got none; "
                f"set --model.loss.regularization_weights.{name} (0 ignores the term)."
            )
        return self.regularization_weights[name]

    def _adversarial_weight(
        self, nll: Tensor, adversarial: Tensor, last_layer: Tensor | None, frame_size: int
    ) -> Tensor | None:
        if not self.adaptive_weight:
            return torch.full_like(adversarial, self.adversarial_weight, requires_grad=False)
        if not torch.is_grad_enabled():
            return None
        maximum = self.adaptive_weight_maximum / frame_size
        return self.adversarial_weight * gan.adaptive_weight(nll, adversarial, last_layer, maximum)

    def _projected_logvar(self) -> Tensor:
        assert self.logvar is not None
        # The parameter itself is put back into its range: a clamp in the graph has no gradient outside it, and the
        # parameter would never return.
        with torch.no_grad():
            self.logvar.clamp_(*LOGVAR_RANGE)
        return self.logvar


def _as_float(x: Tensor) -> Tensor:
    """Losses are computed in fp32 under bf16 autocast too (and in fp64 where that came in)."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
