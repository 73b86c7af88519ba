"""Every config is one that `vidtwin fit` takes, and trains: at its own options, with the sizes made small."""

import io
import json
import shutil
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vidtwin.cli import bases, main
from vidtwin.cli.training import LightningParser
from vidtwin.losses import AutoencoderLoss
from vidtwin.models.vidtwin import VidTwin
from vidtwin.storage import checkpoints
from vidtwin.video import probe, write_video

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = sorted(path.name for path in CONFIGS.glob("*.yaml"))
BASELINES = sorted(path.stem for path in (CONFIGS / "baselines").glob("*.yaml"))
FULL_SIZE = [name for name in BASELINES if not name.endswith("_tiny")]
WHOLE = ["cmd_tiny", "magvit2_tiny"]  # without codes and with; by the slow tests every baseline passes all commands
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
QUICK = [
    "--trainer.accelerator=cpu",
    "--name=row",
    "--cost=false",
    "--downstream=false",
    "--players=0",
    "--references=[]",
]


# What all baselines' configs are run with, and the sizes that those in full size get.
ONE_STEP = [
    "--data=synthetic",
    "--data.batch_size=1",
    "--data.num_workers=0",
    "--data.num_train=1",
    "--data.num_val=1",
    "--data.num_test=2",
    "--trainer.max_steps=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.scheduler.init_args.warmup_steps=0",
    "--model.loss.perceptual_weight=0",
]
FAMILIES = {
    "magvit2": ["channels=8", "num_blocks=1"],
    "cmd": ["resolution=32", "hidden_size=48", "depth=1", "num_heads=4"],
    "ivideogpt": ["resolution=32", "channels=[32,32]", "layers_per_block=1", "latent_channels=8", "norm_groups=8"],
    "wfvae": ["channels=4", "encoder_flow_channels=4", "decoder_flow_channels=4", "num_blocks=1"],
    "odvae": ["channels=4", "multipliers=[1,1,1,1]", "num_blocks=1", "norm_groups=2"],
    "opensora": ["channels=[4,4,8]", "num_blocks=1", "frame_channels=[4,4,8]", "frame_blocks=1", "norm_groups=2"],
    "cvvae": ["channels=4", "multipliers=[1,1,1,1]", "num_blocks=1", "norm_groups=2"],
}


def parsed(*configs: str) -> dict[str, Any]:
    """Return the configs as `vidtwin fit` joins them, with every default."""
    config: dict[str, Any] = yaml.safe_load(printed(*(f"--config={CONFIGS / name}" for name in configs)))
    return config


@cache
def printed(*options: str) -> str:
    with redirect_stdout(io.StringIO()) as text:
        assert main(["fit", *options, "--print_config"]) == 0
    return text.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_a_models_config_trains_a_step(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the parts that a config names are found beside it, from any folder
    assert main(["fit", "--config", str(CONFIGS / name), *SMALL]) == 0


def small_options(name: str, config: dict) -> list[str]:
    """List options that make a baseline at full size small: its model and the clips."""
    options = [f"--model.autoencoder.{each}" for each in FAMILIES[name.partition("_")[0]]]
    arguments = config["model"]["autoencoder"].get("init_args", {})
    if arguments.get("inner_resolution"):
        options.append("--model.autoencoder.inner_resolution=32")
    if name.startswith("ivideogpt"):
        small = {"codebook_size": 16, "dynamics_codebook_size": 16, "attention_resolution": 16}
        options += [f"--model.autoencoder.{key}={value}" for key, value in small.items()]
    return [*options, "--data.resolution=32"]


def gan_options(config: dict, resolution: int) -> list[str]:
    discriminator = config["model"]["loss"]["init_args"].get("discriminator")
    if not discriminator:
        return []
    options = ["--model.loss.adversarial_start=0", "--model.discriminator_scheduler.init_args.warmup_steps=0"]
    options += ["--model.loss.discriminator.channels=4", "--model.loss.adaptive_reference=nll"]
    if discriminator["class_path"].endswith("BlurPoolDiscriminator3d"):
        options += [f"--model.loss.discriminator.resolution={resolution}", "--model.loss.discriminator.num_frames=8"]
    if discriminator["class_path"].endswith("PatchDiscriminator3d"):
        options.append("--model.loss.discriminator.num_layers=2")
    return options


def fit_a_step(name: str) -> list[str]:
    """Train a baseline with its own losses, optimizers and options, small unless it is tiny itself → the options."""
    config = parsed(f"baselines/{name}.yaml")
    tiny = name.endswith("_tiny")
    options = ["--config", str(CONFIGS / "baselines" / f"{name}.yaml"), *ONE_STEP]
    options += ["--data.resolution=64"] if tiny else small_options(name, config)
    options += [] if name.startswith("cmd") else ["--data.num_frames=8"]  # its model holds their number
    assert main(["fit", *options, *gan_options(config, 64 if tiny else 32)]) == 0
    return options


# Sizes of others: the quick tests read their figures.
SIZES = ["cmd_patch4", "ivideogpt_64", "ivideogpt_native"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SIZES else n for n in BASELINES if n not in WHOLE],
)
def test_a_baselines_config_trains_a_step(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit_a_step(name)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", [n if n in WHOLE else pytest.param(n, marks=pytest.mark.slow) for n in BASELINES])
def test_a_baselines_config_passes_fit_test_and_reconstruct(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = fit_a_step(name)
    (last,) = tmp_path.rglob("last.ckpt")
    data = [option for option in options if option.startswith("--data")]
    capsys.readouterr()
    assert main(["test", "--ckpt_path", str(last), *data, *QUICK]) == 0
    assert "differs from the config" not in capsys.readouterr().err
    row = json.loads(Path("results/rows/row/results.json").read_text())
    assert row["kind"] == "trained"
    assert row["num_clips"] == 2
    discrete = "ivideogpt" in name or ("magvit2" in name and "continuous" not in name)
    assert (row["bits_per_pixel"] is not None) == discrete
    assert set(row["codebooks"]) == (set(row["latents"]) if discrete else set())
    frames = np.random.default_rng(0).integers(0, 255, (18, 44, 60, 3), dtype=np.uint8)
    write_video("in.mp4", frames, 8)
    assert main(["reconstruct", "in.mp4", "--ckpt_path", str(last), "--accelerator=cpu"]) == 0
    assert probe("reconstructions/in.mp4").num_frames == 18
    if discrete and name not in FULL_SIZE:
        assert main(["predict", "--ckpt_path", str(last), *data, "--trainer.accelerator=cpu"]) == 0
        for file in Path("predictions").rglob("*.safetensors"):
            written = load_file(file)
            codes = {key.removesuffix(".codes"): z[None].long() for key, z in written.items() if key.endswith(".codes")}
            for key, latent in checkpoints.load_autoencoder(last).dequantize(codes).items():
                assert torch.equal(latent[0], written[key])


@pytest.mark.parametrize("name", LATENTS)
def test_latent_sizes_and_the_recipe_compose_with_a_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [f"latents/{name}", "recipes/fast.yaml"]
    arguments = parsed("vidtwin_base.yaml", *files)["model"]["autoencoder"]["init_args"]
    for file in files:
        wanted = yaml.safe_load((CONFIGS / file).read_text())["model"]["autoencoder"]["init_args"]
        assert wanted.items() <= arguments.items()
    assert arguments["hidden_size"] == 768
    with torch.device("meta"):
        model = VidTwin(**arguments)
    assert model.dynamics.shortcut.segments == {8: 8, 12: 12, 16: 8}[arguments["dynamics_channels"]]


def test_base_follows_the_papers_table_6():
    config = parsed("vidtwin_base.yaml")
    optimizer, loss = config["model"]["optimizer"]["init_args"], config["model"]["loss"]["init_args"]
    data = config["data"]["init_args"]
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (1.6e-4, [0.9, 0.99], 1e-4)
    assert config["model"]["scheduler"]["init_args"]["warmup_steps"] == 5000
    weights = [loss[f"{name}_weight"] for name in ("perceptual", "adversarial", "kl")]
    assert weights == [0.05, 0.05, 0.001]
    assert (data["num_frames"], data["resolution"], data["fps"], data["batch_size"]) == (16, 224, 8.0, 6)
    assert config["trainer"]["max_steps"] == 100_000


@pytest.mark.parametrize("name", MODELS)
def test_eps_is_far_below_the_gradients_if_the_loss_is_a_mean(name):
    model = parsed(name)["model"]
    mean = model["loss"]["init_args"]["reduction"] == "mean"
    assert model["optimizer"]["init_args"]["eps"] == (1e-15 if mean else 1e-8)
    if model["loss"]["init_args"].get("discriminator"):  # whose loss is the same in both
        assert model["discriminator_optimizer"]["init_args"]["eps"] == 1e-8


@pytest.mark.parametrize(
    ("name", "figures", "warmup"),
    [
        ("vidtwin_small", {"lr": 1.6e-4, "betas": [0.9, 0.99], "weight_decay": 1e-4}, (5000, 0.0, 0.0)),
        ("vidtwin_base", {"lr": 1.6e-4, "betas": [0.9, 0.99], "weight_decay": 1e-4}, (5000, 0.0, 0.0)),
        ("vidtwin_large", {"lr": 1.6e-4, "betas": [0.9, 0.99], "weight_decay": 1e-4}, (5000, 0.0, 0.0)),
        ("vidtwin_released", {"lr": 1.5e-5, "betas": [0.0, 0.9], "weight_decay": 1e-4}, (5000, 0.6666667, 0.0)),
        ("baselines/magvit2", {"lr": 0.8e-4, "betas": [0.0, 0.99], "weight_decay": 0.0}, (500, 0.0, 0.0)),
        ("baselines/magvit2_continuous", {"lr": 0.8e-4, "betas": [0.0, 0.99], "weight_decay": 0.0}, (500, 0.0, 0.0)),
        ("baselines/ivideogpt", {"lr": 5e-4, "betas": [0.9, 0.999], "weight_decay": 0.0}, (500, 0.0, 1.0)),
        ("baselines/cvvae", {"lr": 2e-5, "betas": [0.9, 0.98], "weight_decay": 0.01}, (0, 0.0, 1.0)),
        ("baselines/wfvae", {"lr": 1e-5, "betas": [0.9, 0.999], "weight_decay": 1e-4}, (0, 0.0, 1.0)),
    ],
)
def test_the_discriminator_has_its_own_rate(name, figures, warmup):
    model = parsed(f"{name}.yaml")["model"]
    given = model["discriminator_optimizer"]["init_args"]
    assert {key: given[key] for key in figures} == figures
    schedule = model["discriminator_scheduler"]["init_args"]
    assert tuple(schedule[key] for key in ("warmup_steps", "start_factor", "end_factor")) == warmup


def test_1_is_one_batch_and_a_fraction_stays_one(tmp_path):
    path = tmp_path / "limits.yaml"
    path.write_text("trainer: {limit_train_batches: 1, limit_val_batches: 1.0, limit_test_batches: 1}")
    argv = ["fit", f"--config={CONFIGS / 'demo.yaml'}", f"--config={path}", "--print_config"]
    with redirect_stdout(io.StringIO()) as text:
        assert main([*argv, "--trainer.limit_predict_batches", "1", "--trainer.overfit_batches=0.5"]) == 0
    names = [*(f"limit_{split}_batches" for split in ("train", "val", "test", "predict")), "overfit_batches"]
    given = [yaml.safe_load(text.getvalue())["trainer"][name] for name in names]
    assert [(type(value), value) for value in given] == [(int, 1), (float, 1.0), (int, 1), (int, 1), (float, 0.5)]


class Limited:
    def __init__(self, limit: float | int = 1.0) -> None:
        pass


def test_1_is_an_integer_if_floats_come_first():
    parser = LightningParser()
    parser.add_class_arguments(Limited, "limited")
    given = parser.parse_args(["--limited.limit", "1"]).limited.limit
    assert (type(given), given) == (int, 1)


def test_configs_take_the_short_names_of_classes(tmp_path):
    path = tmp_path / "short.yaml"
    model = "model:\n  autoencoder:\n    class_path: cmd  # a baseline\n"
    path.write_text(f"{model}data: {{class_path: 'ucf101', init_args: {{root: a}}}}\n")
    config = parsed("demo.yaml", str(path))
    assert config["model"]["autoencoder"]["class_path"] == "vidtwin.baselines.cmd.CMD"
    assert config["data"]["class_path"] == "vidtwin.datamodules.ucf101.UCF101"


@pytest.mark.parametrize(("key", "name", "near"), [("data", "ucf10", "ucf101"), ("model.autoencoder", "cmdd", "cmd")])
def test_an_unknown_short_name_lists_the_others(key, name, near, tmp_path, capsys):
    path = tmp_path / "unknown.yaml"
    content: Any = {"class_path": name}
    for part in reversed(key.split(".")):
        content = {part: content}
    path.write_text(yaml.safe_dump(content))
    assert main(["fit", f"--config={path}", "--print_config"]) == 2
    error = capsys.readouterr().err
    assert f"{key}: Expected a short name or a class path, got {name!r}; did you mean {near!r}? Known: " in error
    assert error.count("\n") == 1


def test_configs_state_what_the_tasks_default_optimizers_would_add():
    """An optimizer's class in a config keeps the default's arguments that the config does not name."""
    stated = {}
    for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("baselines/*.yaml")]:
        for each in map(Path, bases.chain(path)):
            model = yaml.safe_load(each.read_text()).get("model") or {}
            for key in ("optimizer", "discriminator_optimizer"):
                given = model.get(key) or {}
                given = yaml.safe_load((CONFIGS / given).read_text()) if isinstance(given, str) else given
                stated.setdefault((path.name, key), set()).update(given.get("init_args") or {})
    assert len(stated) > 20
    for (name, key), arguments in stated.items():
        if arguments:
            assert arguments >= {"lr", "weight_decay"} | ({"eps"} if key == "optimizer" else set()), (name, key)


def test_the_overlay_for_gpus_composes():
    trainer = parsed("vidtwin_base.yaml", "trainer/gpu.yaml")["trainer"]
    assert (trainer["precision"], trainer["accelerator"], trainer["max_steps"]) == ("bf16-mixed", "gpu", 100_000)


def test_every_yaml_is_used_by_a_test_or_a_config():
    text = "".join(path.read_text() for path in CONFIGS.rglob("*.yaml"))
    parts = [p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.yaml") if p.parent.name in ("loss", "optimizer")]
    assert parts
    assert [str(part) for part in parts if str(part) not in text] == []


def test_magvit2s_discriminator_is_trained_on_half_of_the_released_loss():
    """There: softplus(-real) + softplus(fake) + 10 |gradient|² + 0.001 LeCAM; every 20th step 20 times the penalty."""
    arguments = parsed("baselines/magvit2.yaml")["model"]["loss"]["init_args"]
    discriminator = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 2 * 8 * 8, 1))
    given = {"discriminator": discriminator, "perceptual_weight": 0, "regularization_weights": {}}
    loss = AutoencoderLoss(**arguments | given)
    clip, fake = torch.rand(2, 4, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    terms = loss.discriminator_loss(fake, clip, step=20)
    real, made = discriminator(clip), discriminator(fake)
    weight = discriminator[1].weight
    means = (0.001 * real.mean(), 0.001 * made.mean())
    lecam = (real - means[1]).relu().square().mean() + (means[0] - made).relu().square().mean()
    softplus = torch.nn.functional.softplus
    released = softplus(-real).mean() + softplus(made).mean() + 20 * 10 * weight.square().sum() + 0.001 * lecam
    torch.testing.assert_close(terms["total"], released / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("magvit2", {"lr": 1e-4, "betas": [0.0, 0.99], "pixel": "l2", "pixel_weight": 5.0, "perceptual_weight": 0.1}),
        (
            "magvit2",
            {
                "eps": 1e-8,
                "weight_decay": 0.0,
                "adversarial_weight": 0.1,
                "adaptive_weight": False,
                "adversarial": "non_saturating",
            },
        ),
        ("magvit2", {"latent_channels": 18, "channels": 128, "multipliers": [1, 2, 2, 4], "num_blocks": 4}),
        ("magvit2_continuous", {"latent_channels": 5, "quantizer": "kl", "first_frame": "even"}),
        ("cmd", {"lr": 1e-5, "betas": [0.5, 0.9], "weight_decay": 0.0, "pixel_weight": 4.0, "perceptual_weight": 4.0}),
        (
            "cmd",
            {
                "eps": 1e-8,
                "perceptual_frames": 1,
                "patch_size": 16,
                "motion_channels": 32,
                "hidden_size": 384,
                "depth": 8,
            },
        ),
        ("cmd_patch4", {"patch_size": 4, "motion_channels": 8}),
        ("ivideogpt", {"lr": 5e-4, "weight_decay": 0.0, "leading_frames": 2, "perceptual_weight": 1.0}),
        (
            "ivideogpt",
            {"eps": 1e-8, "adversarial_weight": 0.8, "adversarial": "hinge", "adaptive_reference": "perceptual"},
        ),
        ("ivideogpt", {"adversarial_start": 250_000, "inner_resolution": 256, "codebook_size": 8192}),
        (
            "wfvae",
            {"latent_channels": 4, "channels": 128, "encoder_flow_channels": 128, "norm": "layer", "num_blocks": 2},
        ),
        (
            "wfvae",
            {"regularization_weights": {"wavelet": 0.1}, "kl_weight": 1e-6, "perceptual_weight": 1.0, "lr": 1e-5},
        ),
        ("wfvae", {"adversarial_weight": 0.5, "adversarial_start": 0, "weight_decay": 1e-4, "pixel": "l1"}),
        (
            "odvae",
            {"release": "v1.2", "channels": 128, "multipliers": [1, 2, 4, 4], "num_blocks": 2, "norm_groups": 32},
        ),
        ("odvae", {"adversarial_start": 2000, "regularization_weights": None, "kl_weight": 1e-6, "lr": 1e-5}),
        ("opensora", {"num_blocks": 4, "frame_blocks": 2, "norm_groups": 32, "chunk_frames": 17, "latent_channels": 4}),
        ("opensora", {"channels": [128, 256, 256, 512], "frame_channels": [128, 256, 512, 512], "eps": 1e-8}),
        ("opensora", {"perceptual_weight": 0.1, "kl_weight": 1e-6, "reduction": "released", "lr": 1e-5}),
        ("cvvae", {"release": "sd2.1", "latent_channels": None, "multipliers": [1, 2, 4, 4], "chunk_frames": 16}),
        ("cvvae", {"reduction": "released", "learn_logvar": True, "kl_weight": 1.0, "perceptual_weight": 0.5}),
        ("cvvae", {"adversarial_weight": 0.5, "lr": 4e-5, "betas": [0.9, 0.98], "eps": 1e-4, "weight_decay": 0.01}),
        ("ivideogpt_64", {"resolution": 64, "channels": [128, 256, 512], "attention_resolution": 16}),
    ],
)
def test_baselines_follow_the_figures_of_their_papers(name, figures):
    config = parsed(f"baselines/{name}.yaml")["model"]
    given = {}
    for section in ("autoencoder", "loss", "optimizer"):
        given |= config[section]["init_args"]
    assert {key: given[key] for key in figures} == figures
    if name == "magvit2":
        assert given["regularization_weights"] == {
            "commitment": 0.25,
            "entropy": {"start": 0.3, "end": 0.1, "steps": 2000},
        }
        assert config["discriminator_optimizer"]["init_args"]["lr"] == 0.8e-4
        assert (config["ema_decay"], config["use_ema"]) == (0.999, True)


def test_the_copied_configs_find_their_bases_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "copied"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    variants = ["vidtwin_small.yaml", "baselines/ivideogpt_native.yaml", "baselines/cmd_tiny.yaml"]
    wanted = {name: parsed(name) for name in variants}
    monkeypatch.setattr(f"{__name__}.CONFIGS", Path("../copied"))
    assert {name: parsed(name) for name in variants} == wanted


def test_a_base_is_read_first_and_does_not_stay_in_the_config(tmp_path):
    for part in ("vidtwin_base.yaml", "trainer", "data", "loss", "optimizer"):
        copy = shutil.copytree if (CONFIGS / part).is_dir() else shutil.copy
        copy(CONFIGS / part, tmp_path / part)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.yaml").write_text(
        "# mine\nbase: '../vidtwin_base.yaml'  # the paper's\ntrainer:\n  max_steps: 7\n"
    )
    config, base = parsed(str(tmp_path / "own/mine.yaml")), parsed("vidtwin_base.yaml")
    assert "base" not in config
    assert config["trainer"].pop("max_steps") == 7
    assert base["trainer"].pop("max_steps") == 100_000
    assert config == base


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("base: absent.yaml", "absent.yaml, the base of mine.yaml, got no such file"),
        ("base: mine.yaml", "does not lead back to mine.yaml"),
        ("base: [a.yaml, b.yaml]", "the path of one config after base: in mine.yaml"),
    ],
)
@pytest.mark.parametrize("option", [["--config", "mine.yaml"], ["--config=mine.yaml"], ["-c", "mine.yaml"]])
def test_a_base_that_cannot_be_read_is_one_line(line, message, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"{line}\n")
    assert main(["fit", *option]) == 2
    assert message in capsys.readouterr().err
