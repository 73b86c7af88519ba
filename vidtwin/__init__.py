"""Train and compare video autoencoders: VidTwin and its baselines behind one interface."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported on first use, so that `vidtwin --help` does not wait for torch and lightning.
_EXPORTS = {
    "AutoencoderTask": "vidtwin.training.task",
    "Encoding": "vidtwin.posteriors",
    "Reconstruction": "vidtwin.autoencoder",
    "TemporalSpec": "vidtwin.autoencoder",
    "UserError": "vidtwin.errors",
    "VidTwin": "vidtwin.models.vidtwin",
    "VideoAutoencoder": "vidtwin.autoencoder",
    "VideoTrainer": "vidtwin.training.trainer",
    "load_clip": "vidtwin.clips",
    "save_clip": "vidtwin.clips",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
