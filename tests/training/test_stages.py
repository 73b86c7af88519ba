"""A stage that trains the decoder alone: all that encodes stays as it is, bit for bit, and costs no graph."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from tiny import BASELINES, Clips, SmoothClips, tiny_model, tiny_task, trainer, write_config

from vidtwin import plugins
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.cli import main
from vidtwin.storage import checkpoints
from vidtwin.training.callbacks.checkpoint import LatestCheckpoint
from vidtwin.training.checks import freeze

OVERLAY = Path(__file__).resolve().parents[2] / "configs" / "stages" / "decoder.yaml"
ENCODING = yaml.safe_load(OVERLAY.read_text())["model"]["freeze"]
# As docs/training.md names them.
OF_BASELINES = {
    "magvit2": ["encoder", "quantizer"],
    "cmd": ["patch_embed", "encoder", "to_logits", "to_motion_width", "to_motion_height"],
    "ivideogpt": ["encoder", "cond_encoder", "quant_conv", "quantize", "quant_linear", "dynamics_quantize"],
    "wfvae": ["encoder"],
    "odvae": ["encoder", "quant_conv"],
    "opensora": ["spatial_vae.encoder", "spatial_vae.quant_conv", "temporal_vae.encoder", "temporal_vae.quant_conv"],
    "cvvae": ["encoder"],
}
CLIPS = torch.stack([torch.from_numpy(SmoothClips(2).clip(0, i)["clip"]) for i in range(2)])
CLIPS = CLIPS.permute(0, 4, 1, 2, 3) / 127.5 - 1


def trained_alone(model: VideoAutoencoder, parts: list[str]) -> None:
    """Frozen parts need no graph in training, and all other parameters get a gradient from decoded latents."""
    freeze(model, parts)
    model.train()
    latents = model.encode(CLIPS).sample()
    assert not any(z.requires_grad for z in latents.values())
    model.decode(latents, CLIPS.shape[2]).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"structure_downsamples": 0, "dynamics_downsamples": 0},
        {"structure_downsamples": 2, "dynamics_downsamples": 2, "activation_checkpointing": True},
        {"structure_shortcut": 1},
    ],
    ids=["default", "no halvings", "two halvings", "shortcut"],
)
def test_the_config_freezes_all_that_encodes_and_nothing_that_decodes(arguments: dict[str, Any]) -> None:
    trained_alone(tiny_model(**arguments), ENCODING)


@pytest.mark.parametrize("name", BASELINES)
def test_the_documented_parts_of_a_baseline_are_all_that_encodes(name: str) -> None:
    trained_alone(plugins.load(name, "vidtwin.autoencoders")(**BASELINES[name]), OF_BASELINES[name])
    page = (OVERLAY.parents[2] / "docs" / "training.md").read_text()
    assert f"`[{', '.join(OF_BASELINES[name])}]`" in page


class Graphs(Callback):
    """Outputs of frozen modules that have a graph, and frozen modules in training mode; both should stay empty."""

    def __init__(self) -> None:
        self.runs = 0
        self.wrong: list[str] = []

    def on_train_start(self, trainer: Any, task: Any) -> None:
        for part in ENCODING:
            module = task.autoencoder.get_submodule(part)
            module.register_forward_hook(lambda module, inputs, output, part=part: self._watch(part, module, output))

    def _watch(self, part: str, module: torch.nn.Module, output: torch.Tensor) -> None:
        self.runs += 1
        if output.requires_grad or any(child.training for child in module.modules()):
            self.wrong.append(part)


def test_encoder_and_latents_keep_their_bits_under_gan_dropout_average_and_resume(tmp_path: Path) -> None:
    def task() -> Any:
        return tiny_task(
            gan_start=1,
            ema_decay=0.9,
            freeze=ENCODING,
            model={"qformer_dropout": 0.3},
            loss={"kl_weight": 0.0, "learn_logvar": True},
            accumulation=2,
        )

    first, graphs = task(), Graphs()
    before = {name: value.clone() for name, value in first.autoencoder.state_dict().items()}
    with torch.no_grad():
        latents = first.autoencoder.eval().encode(CLIPS).mode()
    saved = LatestCheckpoint(every_n_steps=9, dirpath=str(tmp_path))
    trainer(tmp_path, 3, callbacks=[graphs, saved], val_check_interval=2).fit(first, datamodule=Clips())
    assert graphs.runs > 3 * 2 * len(ENCODING)
    assert graphs.wrong == []
    second = task()
    saved = LatestCheckpoint(every_n_steps=9, dirpath=str(tmp_path))
    trainer(tmp_path, 5, callbacks=[saved]).fit(second, datamodule=Clips(), ckpt_path=tmp_path / "last.ckpt")
    after = second.autoencoder.eval().state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    decoding = {n for n in after if not n.startswith(tuple(f"{part}." for part in ENCODING))}
    assert moved == decoding
    with torch.no_grad():  # as `vidtwin encode` does
        again = checkpoints.load_autoencoder(tmp_path / "last.ckpt", ema=True).encode(CLIPS).mode()
    assert all(torch.equal(z, latents[name]) for name, z in again.items())
    assert set(checkpoints.read(tmp_path / "last.ckpt")["ema"]["values"]) == decoding


def test_the_stage_is_a_second_config_and_leaves_the_kl_out_of_the_loss(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert main(["fit", "--config", str(config), "--config", str(OVERLAY), "--trainer.log_every_n_steps=1"]) == 0
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 5
    assert all(float(row["train/kl"]) > 0 and row["train/loss"] == row["train/nll"] for row in rows)
