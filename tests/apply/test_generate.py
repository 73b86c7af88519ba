"""`vidtwin fit` of a diffusion model and `vidtwin generate`, as their user calls them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from generation import CLASSES, QUIET, SIZES, write_latents
from PIL import Image

import vidtwin
from vidtwin.cli import main
from vidtwin.storage import checkpoints
from vidtwin.video import iter_frames

CONFIGS = Path(vidtwin.__file__).parent / "configs" / "diffusion"


def fit(folder: Path, *words: str, config: str = "tiny.yaml") -> int:
    sizes = [f"--model.transformer.{name}={value}" for name, value in SIZES.items()]
    run = ["--trainer.max_steps=3", "--trainer.logger.init_args.save_dir", str(folder / "runs")]
    run += ["--trainer.log_every_n_steps=1", "--model.scheduler.warmup_steps=1", "--model.sampling_steps=2"]
    run += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--data.batch_size=2"]
    given = ["--config", str(CONFIGS / config), "--data.root", str(folder / "latents")]
    return main(["fit", *given, *sizes, *run, "--model.sample_every_n_steps=2", *words])


def checkpoint_of(folder: Path, run: str = "version_0") -> Path:
    return folder / "runs" / "diffusion_tiny" / run / "checkpoints" / "last.ckpt"


def generate(folder: Path, out: str, *words: str) -> int:
    given = ["generate", "--ckpt_path", str(checkpoint_of(folder)), "--out", str(folder / out)]
    return main([*given, "--batch_size", "3", *QUIET, *words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with latents and a diffusion model trained on them for three steps."""
    folder = tmp_path_factory.mktemp("generation")
    write_latents(folder)
    assert fit(folder) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_says_all_that_generating_needs(trained):
    held = checkpoints.read(checkpoint_of(trained))["diffusion"]
    assert held["classes"] == list(CLASSES)
    assert held["autoencoder"]["checkpoint"] == str(trained / "model")
    assert len(held["autoencoder"]["weights_sha256"]) == 64
    assert (held["num_frames"], held["size"], held["fps"]) == (4, [32, 32], 8.0)
    assert yaml.safe_load(yaml.safe_dump(held)) == held  # plain types


def test_samples_go_to_tensorboard_while_it_trains(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(checkpoint_of(trained).parents[1]))
    events.Reload()
    assert {"samples/frames", "samples/video"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Images("samples/frames")] == [2]
    assert "train/loss" in events.Tags()["scalars"]


def test_generate_writes_videos_a_grid_and_the_seeds(trained, capsys):
    assert generate(trained, "all", "--num", "4", "--seed", "5") == 0
    assert "8 videos, grid.png and samples.json" in capsys.readouterr().out
    manifest = json.loads((trained / "all" / "samples.json").read_text())
    assert [sample["class"] for sample in manifest["samples"]] == [name for name in CLASSES for _ in range(4)]
    assert [sample["seed"] for sample in manifest["samples"]][:2] == [[5, 1, 0], [5, 1, 1]]
    for sample in manifest["samples"]:
        frames = np.stack(list(iter_frames(trained / "all" / sample["file"])))
        assert frames.shape == (4, 32, 32, 3)
    with Image.open(trained / "all" / "grid.png") as picture:
        assert picture.width > 4 * 32


def test_the_same_seed_gives_the_same_bytes_whatever_else_is_generated(trained):
    assert generate(trained, "first", "--num", "4") == 0
    assert generate(trained, "again", "--num", "4") == 0
    assert contents(trained / "first") == contents(trained / "again")
    assert generate(trained, "one", "--num", "2", "--class_name", "Rising") == 0
    assert generate(trained, "other", "--num", "2", "--class_name", "Rising", "--seed", "1") == 0
    for number in range(2):
        name = f"Rising/{number:04d}.mp4"
        ours = (trained / "one" / name).read_bytes()
        assert ours == (trained / "first" / name).read_bytes()
        assert ours != (trained / "other" / name).read_bytes()


def test_existing_videos_are_replaced_when_asked(trained, capsys):
    assert generate(trained, "twice", "--num", "1") == 0
    assert generate(trained, "twice", "--num", "1") == 2
    assert "--overwrite replaces them" in capsys.readouterr().err
    assert generate(trained, "twice", "--num", "1", "--overwrite", "true") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class_name", "Risin"], r"Expected classes of the training data, got 'Risin'; did you mean Rising\?"),
        (["--class_name", "Rising,Q"], "got 'Q'; the model knows Falling, Rising"),
        (["--num", "0"], "Expected --num of at least 1, got 0"),
        (["--autoencoder", "nowhere.ckpt"], "got none at nowhere.ckpt"),
    ],
)
def test_a_mistake_is_one_line(trained, capsys, words, message):
    assert generate(trained, "nothing", *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (trained / "nothing").exists()


def test_another_autoencoder_is_refused(trained, tmp_path, capsys):
    write_latents(tmp_path, seed=1)
    capsys.readouterr()
    assert generate(trained, "nothing", "--autoencoder", str(tmp_path / "model")) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"vidtwin: error: Expected the autoencoder VidTwin \w{8}, whose latents .*; give .*\n", error)


def test_a_checkpoint_of_the_other_kind_is_refused_by_name(trained, capsys):
    assert main(["generate", "--ckpt_path", str(trained / "model"), "--out", str(trained / "nothing")]) == 2
    assert "Expected a checkpoint of a diffusion model, got one of an autoencoder" in capsys.readouterr().err
    assert main(["decode", str(trained / "latents"), "--out", "no", "--ckpt_path", str(checkpoint_of(trained))]) == 2
    assert "`vidtwin generate` samples from it" in capsys.readouterr().err
