"""Features of clips for rFVD: those of the reconstructions stand with their rows, the inputs' in `inputs/` for all."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidtwin.benchmark import rows
from vidtwin.benchmark.plan import Plan
from vidtwin.files import inside, replacing
from vidtwin.metrics.fvd import FeatureNetwork, frechet_video_distance


class ClipFeatures:
    """Features of a sweep's clips.

    Args:
        network: The network of rFVD.
        results: Results folder.
        plan: Clips of the sweep.
        load: Load a clip (1, 3, T, H, W) by its index, as the protocol compares it.
    """

    def __init__(self, network: FeatureNetwork, results: Path, plan: Plan, load: Callable[[int], Tensor]) -> None:
        self.network, self.results, self.plan, self.load = network, results, plan, load

    def measure(self, prediction: Tensor, target: Tensor, indices: list[int]) -> list[str]:
        """Compute the reconstructions' features as text, and the inputs' that are missing in their folder."""
        for place, index in enumerate(indices):
            if not self._input_path(index).exists():
                self._save_input(index, target[place : place + 1])
        return [_encode_features(found) for found in self.network(prediction)]

    def compute_distance(self, keys: Sequence[rows.Key], features: Sequence[np.ndarray]) -> Any:
        """Compute rFVD over clips from their reconstructions' features."""
        order = sorted(range(len(keys)), key=keys.__getitem__)
        real = torch.cat([self._read_input(self.plan.index_of[keys[place]]) for place in order])
        fake = torch.from_numpy(np.stack([features[place] for place in order]))
        return frechet_video_distance(real, fake)

    def compare(self, results: rows.Results) -> dict[str, dict[str, Any]]:
        """Compute rFVD over the common clips, by row, for rows that have other clips too."""
        common = rows.common_clips(results)
        found: dict[str, dict[str, Any]] = {}
        for row in results.rows:
            path = self.results / "rows" / row["name"] / "features.npy"
            keys = [rows.key_of(clip) for clip in results.clips.get(row["name"], [])]
            if not common.issuperset(keys) and row["metrics"].get("rfvd") != "unavailable" and path.exists():
                places = [place for place, key in enumerate(keys) if key in common]
                features = np.load(path, mmap_mode="r")[places]
                found[row["name"]] = {"rfvd": "unavailable"}
                if places:
                    found[row["name"]] = {"rfvd": self.compute_distance([keys[place] for place in places], features)}
        return found

    def _read_input(self, index: int) -> Tensor:
        """Return the features of an input clip (1, 400), computed again if their file is missing or damaged."""
        try:
            found = np.load(self._input_path(index))
        except (OSError, ValueError):
            self._save_input(index, self.load(index))
            found = np.load(self._input_path(index))
        return torch.from_numpy(found)[None]

    def _save_input(self, index: int, clip: Tensor) -> None:
        """Save the features of a clip alone: they do not depend on which others are missing."""
        with replacing(self._input_path(index)) as temporary, temporary.open("wb") as file:
            np.save(file, self.network(clip)[0].cpu().numpy())

    def _input_path(self, index: int) -> Path:
        name, start = self.plan.keys[index]
        mark = hashlib.sha256(f"{self.plan.digest}	{name}	{start}".encode()).hexdigest()[:32]
        return inside(self.results, f"inputs/{mark[:2]}/{mark}.npy")


def decode_features(text: str) -> np.ndarray:
    """Read the features of a reconstruction from the text of a part."""
    return np.frombuffer(base64.b64decode(text), dtype=np.float32).copy()  # writable, as torch wants it


def _encode_features(features: Tensor) -> str:
    return base64.b64encode(features.float().cpu().numpy().tobytes()).decode("ascii")
