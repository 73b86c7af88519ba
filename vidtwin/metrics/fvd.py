"""Fréchet video distance: an I3D network from a file, sums of its features that are exact, and the distance.

FVD (Unterthiner et al. 2018) is biased by the number of clips: the same pairs of synthetic features had 642 by 16 clips
and 25 by 2,048.
A value is therefore of all clips together, never a mean over batches, and its number of clips stands beside it.
"""

import hashlib
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchmetrics import Metric

from vidtwin.errors import UserError
from vidtwin.precision import full_precision

Convention = Literal["styleganv", "videogpt", "internal"]

NUM_FEATURES = 400
MIN_FRAMES = 10
RANKED_FROM = NUM_FEATURES + 1
SETTLED_FROM = 2048

_SIDE = 224
_SCALE = 2**20
_LIMIT = 2**11
_LOW_BITS = 15  # a feature on the grid has 31 bits and a sign: 16 high, 15 low ones
_ROWS_AT_ONCE = 2**20  # of products below 2^32, so that their sums stay below 2^53


class FeatureNetwork:
    """I3D (Carreira and Zisserman 2017) from a TorchScript file: clips (B, 3, T, H, W) in [-1, 1] → features (B, 400).

    A TorchScript file is a program, which loading and calling runs: hence its SHA-256 is required, and a file that has
    another one is not opened.

    Args:
        path: The TorchScript file.
        sha256: Its SHA-256 in hexadecimal digits.
        convention: How clips reach the network, and which file it is:

            - "styleganv": shorter side resized to 224 (bilinear, no antialiasing), centre crop, values in [-1, 1],
              called with rescale=False, resize=False, return_features=True. File: StyleGAN-V's `i3d_torchscript.pt`,
              which TokenBench and Open-Sora-Plan use.
            - "internal": values in [0, 255] of any size; the same file resizes and scales itself, called with
              rescale=True, resize=True, return_features=True, as StyleGAN-V itself does.
            - "videogpt": resized to 224x224 without a crop (bilinear), values in [-1, 1], called with the clip alone,
              which gives the logits. VideoGPT's `i3d_pretrained_400.pt` holds weights only: `torch.jit.script` its
              model once.
    """

    def __init__(self, path: str | Path, sha256: str, convention: Convention = "styleganv") -> None:
        if convention not in get_args(Convention):
            raise UserError(
                f"Expected the convention to be one of {', '.join(get_args(Convention))}, got {convention}."
            )
        self.path = Path(path)
        self.convention = convention
        content = _content(self.path)
        found = hashlib.sha256(content).hexdigest()
        if found != sha256.lower():
            raise UserError(
                f"Expected a file with the SHA-256 {sha256.lower()} at {path}, got one with {found}; "
                "TorchScript is code, so that only a file that you know is run."
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated, but it is what FVD's files are
                self.network = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
        except Exception as error:
            raise UserError(
                f"Expected a TorchScript file at {path}, got one that torch.jit.load refuses "
                f"({_first_line(error)}); a file of weights has to be exported with torch.jit.script first."
            ) from error
        self(torch.zeros(1, 3, 16, 32, 32))  # what is no I3D is refused before anything is measured

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) in [-1, 1], clamped to it; at least 10 frames → (B, 400)."""
        if clip.ndim != 5 or clip.shape[1] != 3 or clip.shape[2] < MIN_FRAMES:
            raise UserError(
                f"Expected clips (B, 3, T, H, W) of at least {MIN_FRAMES} frames for FVD, below which I3D pools time "
                f"away, got {tuple(clip.shape)}."
            )
        network: Any = self.network.to(clip.device)
        clip, options = _CONVENTIONS[self.convention](clip.float().clamp(-1.0, 1.0))
        try:
            with full_precision(clip.device):
                features = network(clip, **options)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            called = ", ".join(["clip", *(f"{key}={value}" for key, value in options.items())])
            raise UserError(
                f"Expected an I3D network that can be called with ({called}) for fvd={self.convention}, got "
                f"{self.path}, which fails: {_first_line(error)}"
            ) from error
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if shape != (len(clip), NUM_FEATURES):
            raise UserError(f"Expected features of shape {(len(clip), NUM_FEATURES)} from {self.path}, got {shape}.")
        return features.float()


class FrechetVideoDistance(Metric):
    """Fréchet distance of the features of real and reconstructed clips; its sums are exact.

    Features are rounded to multiples of 2⁻²⁰, which moves each by 2⁻²¹ at most: less than the last place of a float32
    from 8 on. What is summed are then whole numbers, the features and their products in parts that no sum of up to
    2³¹ clips overflows. Mean and covariance therefore do not depend on the order of the clips, their batches or ranks,
    to the last bit, and adding the states of two metrics is exact.

        metric = FrechetVideoDistance()
        metric.update(network(target), real=True)
        metric.update(network(prediction), real=False)
        metric.result()                     # {"value": 123.4, "num_clips": 23, "ranked": False, "note": "…"}

    Args:
        num_features: Length of a clip's features.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    real_num: Tensor
    fake_num: Tensor

    def __init__(self, num_features: int = NUM_FEATURES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_features < 1:
            raise UserError(f"Expected num_features of at least 1, got {num_features}.")
        self.num_features = num_features
        square = (num_features, num_features)
        for side in ("real", "fake"):
            self.add_state(f"{side}_num", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(num_features, dtype=torch.int64), dist_reduce_fx="sum")
            for part in ("high", "mixed", "low"):
                zeros = torch.zeros(square, dtype=torch.int64)
                self.add_state(f"{side}_{part}", zeros, dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool) -> None:
        """Add clips by their features (B, num_features); those of size 2048 and more, and NaN, are an error."""
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise UserError(f"Expected features of shape (B, {self.num_features}), got {tuple(features.shape)}.")
        # On the CPU: not every accelerator has doubles.
        features = features.detach().cpu().double()
        if not (features.abs() < _LIMIT).all():  # NaN is not below it
            raise UserError(
                f"Expected features that are numbers below {_LIMIT} in size, which I3D's are far from, got one of "
                f"{features.abs().max().item()}; look at the clip and the network's file."
            )
        for rows in features.split(_ROWS_AT_ONCE):
            self._add(rows, "real" if real else "fake")

    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        """Add the clips of another metric of this kind, or of its states by name; exact in any order."""
        super().merge_state(incoming_state)
        # torchmetrics forgets what it has computed, and knows that there is something to compute, by an update.
        self.update(torch.zeros(0, self.num_features), real=True)

    def compute(self) -> tuple[Tensor | None, int]:
        """The distance, double (), and the number of clips; None with fewer than two, which have no covariance.

        As many real as reconstructed clips have to be there.
        """
        real, fake = int(self.real_num), int(self.fake_num)
        if real != fake:
            raise UserError(f"Expected as many real as reconstructed clips for FVD, got {real} and {fake}.")
        if real < 2:
            return None, real
        return frechet_distance(*self.statistics(real=True), *self.statistics(real=False)), real

    def result(self) -> dict[str, Any] | Literal["unavailable"]:
        """What a row of results says of it, see `rfvd`; "unavailable" with fewer than two clips."""
        value, number = self.compute()
        return "unavailable" if value is None else rfvd(float(value), number)

    def statistics(self, real: bool) -> tuple[Tensor, Tensor]:
        """Mean (F,) and covariance (F, F) of a sample of two clips at least, the exact ones rounded once to double."""
        number, sums, high, mixed, low = (
            getattr(self, f"{'real' if real else 'fake'}_{part}").cpu().numpy().astype(object)
            for part in ("num", "sum", "high", "mixed", "low")
        )
        number = int(number)
        if number < 2:
            raise UserError(f"Expected at least 2 clips for a covariance, got {number}.")
        # Python's whole numbers have no limit, and the quotient of two is the double next to it.
        products = (high << 2 * _LOW_BITS) + ((mixed + mixed.T) << _LOW_BITS) + low
        spread = number * products - np.multiply.outer(sums, sums)
        mean = sums / (number * _SCALE)
        covariance = spread / (number * (number - 1) * _SCALE**2)
        return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))

    def _add(self, features: Tensor, side: str) -> None:
        whole = (features * _SCALE).round()
        high = (whole / 2**_LOW_BITS).floor()
        low = whole - high * 2**_LOW_BITS
        # Whole numbers in doubles: exact in any order of summing, as no sum reaches 2^53.
        parts = {
            "num": torch.tensor(len(features)),
            "sum": whole.sum(0),
            "high": high.T @ high,
            "mixed": high.T @ low,
            "low": low.T @ low,
        }
        for name, part in parts.items():
            state: Tensor = getattr(self, f"{side}_{name}")
            setattr(self, f"{side}_{name}", state + part.to(state.dtype).to(state.device))


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of two normal distributions (Dowson and Landau 1982), double ().

    |m₁ − m₂|² + tr(C₁) + tr(C₂) − 2 tr((C₁C₂)^½). The last trace is the sum of the singular values of C₁^½ C₂^½: with
    symmetric roots, which singular covariances have too, there is neither an imaginary part nor an added epsilon. Of 23
    clips SciPy's `sqrtm` of C₁C₂ is off by 1e-5 of the distance, this by 1e-13.

    Args:
        mean1: (F,).
        covariance1: (F, F), symmetric, no eigenvalue below 0.
        mean2: (F,).
        covariance2: Like the first.
    """
    mean1, covariance1, mean2, covariance2 = (
        given.detach().cpu().double() for given in (mean1, covariance1, mean2, covariance2)
    )
    shared = torch.linalg.svdvals(_root(covariance1) @ _root(covariance2)).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2.0 * shared
    # No distance is below 0: what is left of two equal distributions is rounding, of either sign.
    return distance.clamp_min(0.0)


def rfvd(value: float, num_clips: int) -> dict[str, Any]:
    """A row's rFVD: {"value", "num_clips", "ranked", "note": why not ranked, a warning, or None}."""
    if num_clips < 2 or not math.isfinite(value):
        raise UserError(f"Expected a finite rFVD of at least 2 clips, got {value} of {num_clips}.")
    note = None
    if num_clips < RANKED_FROM:
        note = f"not ranked below {RANKED_FROM} clips: the covariance of {NUM_FEATURES} features is singular"
    elif num_clips < SETTLED_FROM:
        note = f"biased upwards below {SETTLED_FROM:,} clips: compare at an equal number only"
    return {"value": value, "num_clips": num_clips, "ranked": num_clips >= RANKED_FROM, "note": note}


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits."""
    return hashlib.sha256(_content(Path(path))).hexdigest()


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"Expected a file at {path}, got none there.")
    return path.read_bytes()


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root (F, F); eigenvalues that are rounding of 0 count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > noise, values, 0.0).sqrt()
    return (vectors * roots) @ vectors.T


def _styleganv(clip: Tensor) -> tuple[Tensor, dict[str, bool]]:
    height, width = clip.shape[3:]
    scale = _SIDE / min(height, width)
    size = (_SIDE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), _SIDE)
    clip = _resized(clip, size)
    top, left = (size[0] - _SIDE) // 2, (size[1] - _SIDE) // 2
    clip = clip[..., top : top + _SIDE, left : left + _SIDE]
    return clip.contiguous(), {"rescale": False, "resize": False, "return_features": True}


def _videogpt(clip: Tensor) -> tuple[Tensor, dict[str, bool]]:
    return _resized(clip, (_SIDE, _SIDE)), {}


def _internal(clip: Tensor) -> tuple[Tensor, dict[str, bool]]:
    return (clip + 1.0) * 127.5, {"rescale": True, "resize": True, "return_features": True}


_CONVENTIONS: dict[str, Callable[[Tensor], tuple[Tensor, dict[str, bool]]]] = {
    "styleganv": _styleganv,
    "videogpt": _videogpt,
    "internal": _internal,
}


def _resized(clip: Tensor, size: tuple[int, int]) -> Tensor:
    frames = F.interpolate(rearrange(clip, "b c t h w -> (b t) c h w"), size, mode="bilinear", align_corners=False)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=len(clip))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
