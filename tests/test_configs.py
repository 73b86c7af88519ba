"""Every config is one that `vidtwin fit` takes, and trains: at its own options, with the sizes made small."""

from pathlib import Path

import pytest
import yaml

from vidtwin.cli import main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = sorted(path.name for path in CONFIGS.glob("*.yaml"))
LATENTS = sorted(path.name for path in (CONFIGS / "latents").glob("*.yaml"))

# Sizes only: losses, optimizers, schedules, discriminators and what else a config says stay its own.
SMALL = [
    "--model.autoencoder.resolution=64",
    "--model.autoencoder.patch_size=8",
    "--model.autoencoder.hidden_size=48",
    "--model.autoencoder.depth=1",
    "--model.autoencoder.num_heads=4",
    "--data=synthetic",
    "--data.resolution=64",
    "--data.batch_size=1",
    "--data.num_workers=0",
    "--data.num_train=1",
    "--data.num_val=1",
    "--model.loss.perceptual_weight=0",
    "--trainer.fast_dev_run=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.mark.parametrize("name", MODELS)
def test_a_models_config_trains_a_step(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the parts that a config names are found beside it, from any folder
    assert main(["fit", "--config", str(CONFIGS / name), *SMALL]) == 0


@pytest.mark.parametrize("name", LATENTS)
def test_latent_sizes_compose_with_a_model(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = str(CONFIGS / "vidtwin_base.yaml")
    assert main(["fit", "--config", base, "--config", str(CONFIGS / "latents" / name), "--print_config"]) == 0
    arguments = yaml.safe_load(capsys.readouterr().out)["model"]["autoencoder"]["init_args"]
    wanted = yaml.safe_load((CONFIGS / "latents" / name).read_text())["model"]["autoencoder"]["init_args"]
    assert wanted.items() <= arguments.items()
    assert arguments["hidden_size"] == 768


def test_base_follows_the_papers_table_6(capsys):
    assert main(["fit", "--config", str(CONFIGS / "vidtwin_base.yaml"), "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    optimizer, loss = config["model"]["optimizer"]["init_args"], config["model"]["loss"]["init_args"]
    data = config["data"]["init_args"]
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (1.6e-4, [0.9, 0.99], 1e-4)
    assert config["model"]["scheduler"]["init_args"]["warmup_steps"] == 5000
    weights = [loss[f"{name}_weight"] for name in ("perceptual", "adversarial", "kl")]
    assert weights == [0.05, 0.05, 0.001]
    assert (data["num_frames"], data["resolution"], data["fps"], data["batch_size"]) == (16, 224, 8.0, 6)
    assert config["trainer"]["max_steps"] == 100_000


@pytest.mark.parametrize("path", [*CONFIGS.glob("trainer/gpu.yaml")], ids=str)
def test_the_overlay_for_gpus_composes(path, capsys):
    base = str(CONFIGS / "vidtwin_base.yaml")
    assert main(["fit", "--config", base, "--config", str(path), "--print_config"]) == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["precision"], trainer["accelerator"], trainer["max_steps"]) == ("bf16-mixed", "gpu", 100_000)


def test_every_yaml_is_used_by_a_test_or_a_config():
    text = "".join(path.read_text() for path in CONFIGS.rglob("*.yaml"))
    parts = [p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.yaml") if p.parent.name in ("loss", "optimizer")]
    assert parts
    assert [str(part) for part in parts if str(part) not in text] == []
