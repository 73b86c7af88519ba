"""`vidtwin fit` of a diffusion model and `vidtwin generate`, as their user calls them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from generation import CLASSES, QUIET, SIZES, write_latents
from PIL import Image
from sweeping import Pool, feature_network

import vidtwin
from vidtwin.apply.generator import split_names
from vidtwin.cli import main
from vidtwin.clips import as_clip
from vidtwin.diffusion.process import RectifiedFlow
from vidtwin.metrics.fvd import FeatureNetwork, frechet_distance, statistics
from vidtwin.storage import checkpoints
from vidtwin.video import iter_frames, write_video

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


SCORED = ["--data", "folder", "--data.num_frames", "16", "--data.resolution", "32", "--data.num_workers", "0"]


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> Path:
    """Generated videos of 16 frames by a model whose latents are means over pixels, and real ones."""
    folder = tmp_path_factory.mktemp("longer")
    write_latents(folder, model=Pool(frames=16), length=16)
    assert fit(folder) == 0
    assert generate(folder, "made", "--num", "4") == 0
    return folder


def score(folder: Path, *words: str) -> int:
    given = ["score", str(folder / "made"), *SCORED, "--data.root", str(folder / "videos"), "--data.augment", "false"]
    return main([*given, "--accelerator", "cpu", "--progress", "false", *words])


def test_score_measures_the_distance_of_the_features_and_says_by_which_protocol(longer, capsys):
    network = feature_network(longer / "i3d.pt")
    fvd = ["--fvd.path", str(network.path), "--fvd.sha256", str(network.sha256), "--data.val_fraction", "0"]
    assert score(longer, *fvd, "--data.test_fraction", "0") == 0
    shown = capsys.readouterr().out
    found = json.loads((longer / "made" / "score.json").read_text())
    assert f"gFVD {found['gfvd']['value']:.1f} (not ranked below 401 clips" in shown
    assert f"8 samples of 2 classes against 6 clips of the train split, protocol {found['protocol_hash']}" in shown
    assert found["protocol"]["samples"] == {"Falling": 4, "Rising": 4}
    features = {}
    for name, pattern in (("real", "videos/*/*.mp4"), ("made", "made/*/*.mp4")):
        clips = as_clip([np.stack(list(iter_frames(path))) for path in sorted(longer.glob(pattern))])
        features[name] = FeatureNetwork(network.path, network.sha256)(clips)
    expected = frechet_distance(*statistics(features["real"]), *statistics(features["made"]))
    assert found["gfvd"]["value"] == pytest.approx(float(expected), rel=0.05)  # real ones are resized by another filter


def test_another_split_or_number_of_samples_is_another_protocol(longer, capsys):
    hashes = set()
    for words in ([], ["--split", "val"], ["--data.seed", "1"]):
        assert score(longer, "--data.val_fraction", "0.4", *words) == 0
        hashes.add(json.loads((longer / "made" / "score.json").read_text())["protocol_hash"])
        assert (
            "gFVD unavailable: expected an I3D network, got none; give --fvd.path and --fvd.sha256"
            in capsys.readouterr().out
        )
    assert len(hashes) == 3
    manifest = longer / "made" / "samples.json"
    before = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(before) | {"samples": json.loads(before)["samples"][1:]}))
    assert score(longer, "--data.val_fraction", "0.4") == 0
    manifest.write_text(before)
    assert json.loads((longer / "made" / "score.json").read_text())["protocol_hash"] not in hashes


def test_clips_of_another_size_and_other_folders_are_refused(longer, capsys):
    assert score(longer, "--data.resolution", "16") == 2
    assert "set --data.num_frames 16 --data.resolution 32" in capsys.readouterr().err
    score(longer, "--data.fps", "4")
    assert "the generated clips have 8 frames per second, the real ones 4; --data.fps 8" in capsys.readouterr().err
    assert main(["score", str(longer / "videos"), *SCORED, "--data.root", str(longer / "videos")]) == 2
    assert "make it by `vidtwin generate`" in capsys.readouterr().err
    assert main(["score", str(longer / "made")]) == 2
    assert "give --data ucf101" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["samples", "size", "num_frames", "fps", "weights_sha256"])
def test_a_damaged_manifest_is_one_line(longer, capsys, key):
    manifest = longer / "made" / "samples.json"
    before = manifest.read_text()
    manifest.write_text(json.dumps({name: value for name, value in json.loads(before).items() if name != key}))
    assert score(longer) == 2
    assert "Expected a manifest written by `vidtwin generate` in" in capsys.readouterr().err
    manifest.write_text(before)


def test_a_generated_video_of_another_length_is_refused_by_name(longer, capsys):
    video = longer / "made" / "Rising" / "0001.mp4"
    before = video.read_bytes()
    write_video(video, np.zeros((3, 32, 32, 3), np.uint8), 8)
    assert score(longer) == 2
    assert f"Expected 16 frames of 32x32 in {video}, got 3 of 32x32" in capsys.readouterr().err
    video.write_bytes(before)


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
        (["--guidance", ".nan"], "Expected a finite --guidance, got nan"),
        (["--fps", ".inf"], "Expected a finite --fps above 0, got inf"),
        (["--autoencoder", "nowhere.ckpt"], "got none at nowhere.ckpt"),
    ],
)
def test_a_mistake_is_one_line(trained, capsys, words, message):
    assert generate(trained, "nothing", *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (trained / "nothing").exists()


def test_names_with_commas_are_classes_too():
    classes = ["Push, pull", "Push", "Walk"]
    assert split_names("Walk,Push, pull", classes) == ["Walk", "Push, pull"]
    assert split_names("Push, Walk,,Push", classes) == ["Push", "Walk"]
    assert split_names("pull, Q", classes) == ["pull", "Q"]
    assert split_names("", classes) == []


def test_another_autoencoder_is_refused(trained, tmp_path, capsys):
    write_latents(tmp_path, seed=1)
    capsys.readouterr()
    assert generate(trained, "nothing", "--autoencoder", str(tmp_path / "model")) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"vidtwin: error: Expected the autoencoder VidTwin \w{8}, whose latents .*; give .*\n", error)


def test_flow_is_laid_over_the_papers_config_and_options_over_both(capsys):
    configs = [f"--config={CONFIGS / name}.yaml" for name in ("vidtwin_ucf101", "flow")]
    assert main(["fit", *configs, "--model.transformer.depth=3", "--print_config"]) == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert model["process"]["class_path"] == "vidtwin.diffusion.process.RectifiedFlow"
    assert (model["transformer"]["depth"], model["transformer"]["width"]) == (3, 1152)
    assert (model["guidance"], model["condition_dropout"], model["sampling_steps"]) == (2.0, 0.2, 50)


def test_validate_measures_the_loss_of_a_checkpoint(trained, capsys):
    given = ["--config", str(CONFIGS / "tiny.yaml"), "--data.root", str(trained / "latents"), "--data.batch_size=2"]
    given += [f"--model.transformer.{name}={value}" for name, value in SIZES.items()]
    given += ["--data.val_share", "0.5", "--ckpt_path", str(checkpoint_of(trained))]
    assert main(["validate", *given, "--trainer.enable_progress_bar", "false"]) == 0
    assert main(["predict", *given, "--trainer.enable_progress_bar", "false"]) == 2
    assert "Expected an AutoencoderTask, got DiffusionTask" in capsys.readouterr().err


def test_a_skipped_step_is_replayed_from_the_command_line(trained, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        broken.setattr(RectifiedFlow, "loss", lambda *given: given[1].mean(1) * torch.nan)
        assert fit(trained, "--guard.patience=1", f"--trainer.logger.init_args.save_dir={tmp_path}") == 2
    assert "Expected finite losses and gradients, got none" in capsys.readouterr().err
    (dump,) = tmp_path.rglob("nonfinite/*.pt")
    assert main(["replay", str(dump), "--trainer.accelerator", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"clip Rising/v\d: structure from .*; dynamics from ", shown)
    assert "not reproduced: all values are finite" in shown


def test_a_class_that_is_not_trusted_is_not_imported_from_a_checkpoint(trained, tmp_path, capsys):
    (tmp_path / "evil_process.py").write_text("raise SystemExit('it ran')")
    content = checkpoints.read(checkpoint_of(trained))
    content["diffusion"]["process"]["class_path"] = "evil_process.DDPM"
    torch.save(content, tmp_path / "evil.ckpt")
    assert main(["generate", "--ckpt_path", str(tmp_path / "evil.ckpt"), "--out", str(tmp_path / "out"), *QUIET]) == 2
    assert "Expected a class of vidtwin or of an installed plug-in in" in capsys.readouterr().err


def test_a_checkpoint_of_the_other_kind_is_refused_by_name(trained, capsys):
    assert main(["generate", "--ckpt_path", str(trained / "model"), "--out", str(trained / "nothing")]) == 2
    assert "Expected a checkpoint of a diffusion model, got one of an autoencoder" in capsys.readouterr().err
    assert main(["decode", str(trained / "latents"), "--out", "no", "--ckpt_path", str(checkpoint_of(trained))]) == 2
    assert "`vidtwin generate` samples from it" in capsys.readouterr().err
