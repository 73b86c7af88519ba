"""LPIPS on frames, with a VGG-16 backbone from a file: never downloaded behind one's back, never a random network."""

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import lpips
import torch
from einops import rearrange
from torch import Tensor, nn

from vidtwin.errors import UserError

BACKBONE_FILE = "vgg16-397923af.pth"
BACKBONE_URL = f"https://download.pytorch.org/models/{BACKBONE_FILE}"
_HEADS_FILE = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"


def default_backbone() -> Path:
    """Where torch hub caches torchvision's VGG-16 (IMAGENET1K_V1)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE_FILE


class LPIPS:
    """Learned perceptual distance of frames (Zhang et al. 2018), version 0.1 with VGG-16 as in the released code.

    Not an `nn.Module`, so that no module that holds one registers it: the network is frozen, and registered it would
    enter every checkpoint (59 MB), the optimizer's and DDP's parameters, and `train()` would switch on its dropout.
    It follows the input to its device instead.

    Args:
        backbone: File with torchvision's VGG-16 weights (.pth or .safetensors); None is `default_backbone()`.
    """

    def __init__(self, backbone: str | os.PathLike[str] | None = None) -> None:
        self.backbone = backbone
        self.network: nn.Module | None = None

    def load(self, download: bool = True) -> None:
        """Read the weights, once.

        Args:
            download: Fetch the default file (528 MB) if it is absent; not done where VIDTWIN_OFFLINE is set.
        """
        if self.network is None:
            path = Path(self.backbone) if self.backbone is not None else default_backbone()
            if not path.is_file():
                if self.backbone is not None or not download or os.environ.get("VIDTWIN_OFFLINE"):
                    raise UserError(_absent(path))
                _download(path)
            self.network = _build(_read(path), path)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) or frames (N, 3, H, W) in [-1, 1] → one distance per frame, (B·T,) or (N,)."""
        # The first call may come from validation in inference mode; weights made there bar training.
        with torch.inference_mode(False):
            self.load()
            assert self.network is not None
            self.network.to(prediction.device)
        if prediction.ndim == 5:
            prediction = rearrange(prediction, "b c t h w -> (b t) c h w")
            target = rearrange(target, "b c t h w -> (b t) c h w")
        return self.network(prediction.float(), target.float()).flatten()


def _absent(path: Path, why: str = "") -> str:
    return f"Expected the VGG-16 backbone of LPIPS at {path}, got no such file{why}; download it from {BACKBONE_URL}."


def _download(path: Path) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10.0)  # a machine whose network swallows packets must not hang
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(BACKBONE_URL, str(path), hash_prefix=digest)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(_absent(path, f" and could not fetch it ({reason})")) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"Expected VGG-16 weights in {path}, could not read them ({reason}).") from error
    if not isinstance(weights, dict):
        raise UserError(f"Expected a state dict of VGG-16 in {path}, got {type(weights).__name__}.")
    return weights


def _build(weights: dict[str, Any], path: Path) -> nn.Module:
    with warnings.catch_warnings(), torch.device("meta"):
        # On the meta device nothing is allocated or drawn: the lpips package builds the whole VGG-16, 124 million
        # weights of classifier included, and asks torchvision for it in a way that warns.
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    # net.slice1.0.weight in the lpips package is features.0.weight in torchvision
    wanted = {
        "features." + key.split(".", 2)[2]: (key, tensor.shape)
        for key, tensor in network.state_dict().items()
        if key.startswith("net.")
    }
    given = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
    problems = [f"{k} is missing" for k in wanted if k not in given] + [
        f"{k} is unexpected" for k in given if k not in wanted
    ]
    for key, (_, shape) in wanted.items():
        came = tuple(given[key].shape) if isinstance(given.get(key), Tensor) else None
        if key in given and came != tuple(shape):
            problems.append(f"{key} is {came or type(given[key]).__name__}, expected {tuple(shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"Expected torchvision's VGG-16 weights in {path}: {'; '.join(problems[:5])}{more}.")
    heads = torch.load(_HEADS_FILE, map_location="cpu", weights_only=True)
    loaded = {name: given[key].float() for key, (name, _) in wanted.items()} | heads
    network.load_state_dict(loaded, strict=False, assign=True)
    left = [name for name, tensor in network.state_dict().items() if tensor.is_meta]
    if left:
        raise RuntimeError(f"LPIPS tensors without a value: {left}; the lpips package has changed.")
    return network.requires_grad_(False).eval()
