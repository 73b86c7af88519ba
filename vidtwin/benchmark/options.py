"""Options of a sweep, which its parts read too: `vidtwin test` and configs with `autoencoders:` have their names."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule

from vidtwin import plugins
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark.protocol import ProtocolSettings
from vidtwin.compilation import Mode, check_backend
from vidtwin.data import ClipSource
from vidtwin.distributed import Precision
from vidtwin.errors import UserError, suggestion


@dataclass
class ModelConfig:
    """An autoencoder of configs before it is built: its `class_path` and `init_args`, and its builder."""

    spec: dict[str, Any]
    build: Callable[[], VideoAutoencoder]


ConfigReader = Callable[[Sequence[str], Mapping[str, Any]], ModelConfig]


@dataclass
class Entry:
    """One autoencoder of a sweep.

    Args:
        name: Name of the row and of its folder.
        config: A config of `fit`, or several, each over those before it, of which the autoencoder counts; by default
            the model of the checkpoint. Paths are relative to the sweep's config, then to the current folder.
        checkpoint: Trained weights; without them the row is marked as untrained.
        claimed_rate: Compression rate that a paper states for it; 0.002 is 0.2%.
        windows: Give clips in windows to a model that takes shorter ones; its row says so.
        arguments: Arguments of the autoencoder over those of its config.
        model: Class path or short name of an autoencoder in place of a config, with its `arguments`, such as a codec.
        seed_of: Name of the model of which this is one of several trainings with other seeds; their spread is reported.
    """

    name: str
    config: str | list[str] | None = None
    checkpoint: str | None = None
    claimed_rate: float | None = None
    windows: bool = False
    arguments: dict[str, Any] | None = None
    model: str | None = None
    seed_of: str | None = None


@dataclass
class FVD:
    """Network of rFVD, without which rFVD is unavailable.

    Args:
        path: TorchScript file of I3D.
        sha256: SHA-256 of the file: it is a program, and is run only if it has this digest.
    """

    path: str | None = None
    sha256: str | None = None


@dataclass
class RateDistortion:
    """Rate-distortion curves of models, whose latents are quantized and coded, and their robustness to noise.

    Args:
        bits: Bits a number of the uniform quantizers, a point of a curve each; codes of codebooks stay as they are.
        noise: Standard deviations of Gaussian noise on the latents, in those of their channels.
        tables: Where ranges and probabilities come from: "val", fitted on validation clips and known to the decoder, or
            "clip", of each clip and sent with it.
        clips: Number of validation clips of the fit.
    """

    bits: Sequence[int] = (2, 3, 4, 6, 8)
    noise: Sequence[float] = (0.05, 0.1, 0.2, 0.5, 1.0)
    tables: Literal["val", "clip"] = "val"
    clips: int = 64

    def __post_init__(self) -> None:
        if not all(1 <= bits <= 12 for bits in self.bits):
            raise UserError(f"Expected rate_distortion.bits from 1 to 12, got {self.bits}.")
        if not all(0 < level < math.inf for level in self.noise):
            raise UserError(f"Expected rate_distortion.noise above 0, got {self.noise}.")
        for name, levels in (("bits", self.bits), ("noise", self.noise)):
            if len(set(levels)) < len(levels):
                raise UserError(f"Expected rate_distortion.{name} without repetition, got {levels}.")
        if self.tables not in ("val", "clip"):
            raise UserError(f"Expected rate_distortion.tables of val or clip, got {self.tables!r}.")
        if self.clips < 1:
            raise UserError(f"Expected rate_distortion.clips of at least 1, got {self.clips}.")


@dataclass
class SweepOptions:
    """Choose the autoencoders of a sweep, their clips and what is measured.

    Args:
        autoencoders: Models: {name, config, checkpoint, claimed_rate, windows, arguments, model, seed_of}.
        data: Data module with the test clips.
        protocol: How reconstructions are compared; `preset` is vidtwin, vidtok, tokenbench or wfvae.
        checkpoints_dir: Folder of relative paths of checkpoints.
        results_dir: Folder of the results. Complete rows in it are not measured again.
        dataset: Name of the data set in papers (MCL-JCV), used to look up published numbers.
        references: Short names of autoencoders without weights to measure too; by default all that are registered as
            `vidtwin.references`: the clip's mean colour and its temporal mean frame.
        accelerator: Kind of device, as in Lightning: auto, cpu, cuda, ….
        devices: Number of devices, or which; each is a process that takes its share of the chunks.
        num_nodes: Number of machines with so many devices.
        precision: Precision of the models; metrics are always in full precision.
        compile: Compile the blocks of the models by torch.compile in this mode; costs are those of the plain models.
        compile_backend: Backend of torch.compile.
        perceptual_backbones: Files of torchvision's weights for LPIPS, by "vgg" and "alex" (default: torch hub's
            cache).
        fvd: Network of rFVD.
        vmaf: Measure VMAF too; needs the extra `vmaf`.
        st_lpips: Measure shift-tolerant LPIPS too, by VGG-16 (vgg), AlexNet (alex) or both; needs the extra `offline`.
        rate_distortion: Curves of quality over the bits of coded latents, and over noise on them; needs the extra
            `rates`.
        cvvdp: Measure ColorVideoVDP too, on this display (standard_4k, standard_fhd, ...); needs the extra `cvvdp`.
        cost: Measure FLOPs, clips per second and peak memory.
        downstream: Measure the cost of the paper's DiT on each model's latents.
        repeats: Timed passes of both.
        players: Number of worst and of median clips to keep for the report's players.
        analysis: Analyze failures and latents too, in a second pass over the clips: PSNR against motion, texture and
            cuts and by frame, what each latent carries (docs/evidence.md).
        random_players: Number of further clips to keep, drawn by the seed, as a rating study needs them.
        player_side: Side in pixels of the kept pictures, which larger ones are shrunk to.
        seed: Seed of the samples of posteriors.
        progress: Show a progress bar.
        meta: Count parameters, latents, rates and FLOPs alone, in meta.md and meta.json: no data, no weights, no run.
        read_config: Reader of an entry's configs, with arguments over theirs; raises `UserError` if they have no
            autoencoder.
        pictures: Number of first clips to write as rows/<name>/clip<i>.mp4 and .png for each entry.
        strict: Refuse entries that can't be built before anything is written, instead of writing failed rows.
    """

    autoencoders: list[Entry]
    data: LightningDataModule
    protocol: ProtocolSettings = ProtocolSettings()  # noqa: RUF009 - it is frozen
    checkpoints_dir: str = "."
    results_dir: str = "results"
    dataset: str | None = None
    references: list[str] | None = None
    accelerator: str = "auto"
    devices: int | list[int] | str = 1
    num_nodes: int = 1
    precision: Precision = "32-true"
    compile: Mode | None = None
    compile_backend: str = "inductor"
    perceptual_backbones: dict[str, str | None] | None = None
    fvd: FVD | None = None
    vmaf: bool = False
    st_lpips: Literal["vgg", "alex", "both"] | None = None
    rate_distortion: RateDistortion | None = None
    cvvdp: str | None = None
    cost: bool = True
    downstream: bool = True
    repeats: int = 5
    players: int = 2
    analysis: bool = False
    random_players: int = 0
    player_side: int = 160
    seed: int = 0
    progress: bool = True
    meta: bool = False
    read_config: ConfigReader | None = None
    pictures: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        self.source: Any = self.data
        self.checkpoints, self.folder = Path(self.checkpoints_dir), Path(self.results_dir)
        self.i3d, self.backbones = self.fvd or FVD(), self.perceptual_backbones or {}
        self._check_names()
        check_backend(self.compile_backend, "compile_backend")
        if (self.i3d.path is None) != (self.i3d.sha256 is None):
            raise UserError("Expected fvd.path and fvd.sha256 together: only a file that is known is run.")
        for name, value, least in (
            ("repeats", self.repeats, 1),
            ("players", self.players, 0),
            ("random_players", self.random_players, 0),
            ("player_side", self.player_side, 64),
        ):
            if value < least:
                raise UserError(f"Expected {name} of at least {least}, got {value}.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"Expected seed of at least 0 and below 2^32, got {self.seed}.")
        for entry in self.autoencoders:
            if entry.claimed_rate is not None and not 0 < entry.claimed_rate < math.inf:
                raise UserError(
                    f"Expected claimed_rate of {entry.name} above 0, as 0.002 for 0.2%, got {entry.claimed_rate}."
                )
        if not isinstance(self.data, ClipSource):
            raise UserError(f"Expected a data module with test clips of its own, got {type(self.data).__name__}.")

    def _check_names(self) -> None:
        known = sorted(plugins.available("vidtwin.references"))
        self.reference_names = known if self.references is None else self.references
        if not self.autoencoders and not self.reference_names:
            raise UserError("Expected autoencoders to measure, got none.")
        for name in self.reference_names:
            if name not in known:
                raise UserError(f"Expected references of {', '.join(known)}, got {name!r}{suggestion(name, known)}")
        names = [entry.name for entry in self.autoencoders] + self.reference_names
        for name in names:
            if name != Path(name).name or name.startswith(".") or not name.strip():
                raise UserError(f"Expected an autoencoder's name that can be a folder's, got {name!r}.")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"Expected a name of its own for each row, got several called {', '.join(twice)}.")
