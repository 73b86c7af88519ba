"""Fréchet video distance: an I3D network from a file, and the distance of its features.

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

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.precision import full_precision

Convention = Literal["styleganv", "videogpt", "internal"]

NUM_FEATURES = 400
MIN_FRAMES = 10
RANKED_FROM = NUM_FEATURES + 1
SETTLED_FROM = 2048

_SIDE = 224
_GRID = 2**20  # results folders hold distances of features rounded to its fractions: 2^-21, far below I3D's own noise


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
                warnings.simplefilter("ignore")  # TorchScript is deprecated, but FVD's files are of it
                self.network = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
        except Exception as error:
            raise UserError(
                f"Expected a TorchScript file at {path}, got one that torch.jit.load refuses "
                f"({_first_line(error)}); a file of weights has to be exported with torch.jit.script first."
            ) from error
        self(torch.zeros(1, 3, 16, 32, 32))  # refuses a file of another network before anything is measured

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """Compute features of clips (B, 3, T, H, W) in [-1, 1], clamped to it; at least 10 frames → (B, 400)."""
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


def frechet_video_distance(real: Tensor, fake: Tensor) -> dict[str, Any] | Literal["unavailable"]:
    """Compute rFVD from the features (N, F) of N clips and of their reconstructions; see `rfvd`.

    A sum's last bits depend on the order of the clips: give them in one order, such as that of their names.

        frechet_video_distance(network(target), network(prediction))
        # {"value": 123.4, "num_clips": 23, "ranked": False, "note": "..."}

    Returns:
        "unavailable" for fewer than two clips, which have no covariance.
    """
    if real.shape != fake.shape or real.ndim != 2:
        raise UserError(
            f"Expected features (N, F) of as many real as reconstructed clips, got {tuple(real.shape)} and "
            f"{tuple(fake.shape)}."
        )
    if len(real) < 2:
        return "unavailable"
    return rfvd(float(frechet_distance(*statistics(real), *statistics(fake))), len(real))


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean (F,) and covariance (F, F) of features (N, F) in double; `UserError` if one is not finite."""
    features = features.detach().cpu().double()  # not every accelerator has doubles
    if not features.isfinite().all():
        raise UserError("Expected finite features of clips, got NaN or infinity; look at the clips and the network.")
    features = (features * _GRID).round() / _GRID
    return features.mean(0), features.T.cov()


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Compute the squared 2-Wasserstein distance of two normal distributions (Dowson and Landau 1982), double ().

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
    # No distance is below 0: between two equal distributions rounding is left, of either sign.
    return distance.clamp_min(0.0)


def rfvd(value: float, num_clips: int) -> dict[str, Any]:
    """Make a row's rFVD: {"value", "num_clips", "ranked", "note": why not ranked, a warning, or None}."""
    if num_clips < 2 or not math.isfinite(value):
        raise UserError(f"Expected a finite rFVD of at least 2 clips, got {value} of {num_clips}.")
    note = None
    if num_clips < RANKED_FROM:
        note = f"not ranked below {RANKED_FROM} clips: the covariance of {NUM_FEATURES} features is singular"
    elif num_clips < SETTLED_FROM:
        note = f"biased upwards below {SETTLED_FROM:,} clips: compare at an equal number only"
    return {"value": value, "num_clips": num_clips, "ranked": num_clips >= RANKED_FROM, "note": note}


def file_sha256(path: str | Path) -> str:
    """Compute the SHA-256 of a file's content, 64 hexadecimal digits."""
    return hashlib.sha256(_content(Path(path))).hexdigest()


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"Expected a file at {path}, got none there.")
    return path.read_bytes()


def _root(covariance: Tensor) -> Tensor:
    """Compute the symmetric square root (F, F); eigenvalues that are rounding of 0 count as 0."""
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
