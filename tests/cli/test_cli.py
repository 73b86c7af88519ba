"""The command line in process, from data to results; each mistake is one line with exit code 2."""

import csv
import errno
import json
import struct
import sys
import threading
import time
import zlib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import capture_parser
from lightning.pytorch.loggers import CSVLogger
from lightning_utilities.core.imports import RequirementCache
from safetensors.torch import load_file

from vidtwin.cli import benchmark, main, messages, options
from vidtwin.cli.parser import Parser, name_data_first, read_config
from vidtwin.cli.training import VidTwinCLI, _naming_logs
from vidtwin.datamodules.synthetic import write_ucf_like
from vidtwin.video import iter_frames, panels, probe, write_video

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

QUICK = ["--cost=false", "--downstream=false", "--players=0"]
CONFIG = {
    "model": {
        "autoencoder": {
            "class_path": "vidtwin.models.vidtwin.VidTwin",
            "init_args": {
                "num_frames": 4,
                "resolution": 32,
                "patch_size": 8,
                "hidden_size": 32,
                "depth": 1,
                "num_heads": 2,
                "num_queries": 2,
                "structure_width": 8,
                "query_size": 16,
                "qformer_depth": 1,
                "qformer_heads": 2,
                "qformer_intermediate_size": 16,
            },
        },
        "loss": {
            "class_path": "vidtwin.losses.autoencoder.AutoencoderLoss",
            "init_args": {
                "perceptual_weight": 0.0,
                "adversarial_start": 2,
                "discriminator": {
                    "class_path": "vidtwin.losses.discriminator.PatchDiscriminator2d",
                    "init_args": {"channels": 4, "num_layers": 1},
                },
            },
        },
        "scheduler": {"class_path": "vidtwin.schedules.WarmupCosine", "init_args": {"warmup_steps": 1}},
        "discriminator_scheduler": {"class_path": "vidtwin.schedules.WarmupCosine", "init_args": {"warmup_steps": 1}},
    },
    "data": {
        "class_path": "vidtwin.datamodules.ucf101.UCF101",
        "init_args": {"num_frames": 4, "resolution": 32, "fps": 25.0, "batch_size": 2, "num_workers": 0},
    },
    "trainer": {
        "max_steps": 3,
        "accelerator": "cpu",
        "num_sanity_val_steps": -1,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "runs", "name": "tiny", "version": ""},
        },
    },
}


def fails(capsys, *argv: str) -> str:
    """Run a command that must fail; return its one line."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vidtwin: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a small data set and a config."""
    folder = tmp_path_factory.mktemp("work")
    write_ucf_like(folder / "data", classes=2, groups=8, clips=1, size=(48, 36), frames=10)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def run(place):
    """Run `vidtwin fit` through the command line; return the run's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["fit", "--config", "tiny.yaml", "--data.root", "data/UCF-101"]) == 0
    return place / "runs" / "tiny"


def events(run: Path) -> dict[str, list[int]]:
    """Read the tags of a TensorBoard file with their steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    found = {tag: [e.step for e in accumulator.Scalars(tag)] for tag in tags["scalars"]}
    return found | {tag: [e.step for e in accumulator.Images(tag)] for tag in tags["images"]}


def test_fit_leaves_checkpoints_and_its_config(run):
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "step-00000003.ckpt"]
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 3


def test_a_disk_that_is_full_for_tensorboard_ends_the_training_in_one_line(here, tmp_path, monkeypatch, capfd):
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, written, run_thread = RecordWriter.write, [], _AsyncWriterThread.run
    threads: list[threading.Thread] = []

    def fill(writer: RecordWriter, data: bytes) -> None:
        written.append(data)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, data)

    def end_late(thread: _AsyncWriterThread) -> None:
        threads.append(thread)
        try:
            run_thread(thread)
        finally:
            time.sleep(0.3)  # the next event raises the error before the thread ends by it

    monkeypatch.setattr(RecordWriter, "write", fill)
    monkeypatch.setattr(_AsyncWriterThread, "run", end_late)
    unnamed: list[threading.ExceptHookArgs] = []
    hook = unnamed.append
    monkeypatch.setattr(threading, "excepthook", hook)
    argv = ["--data.root=data/UCF-101", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    assert main(["fit", "--config", "tiny.yaml", *argv]) == 2
    for thread in threads:
        thread.join()
    lines = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith(("vidtwin: ", "Traceback", "  File"))
    ]
    assert lines == [
        "vidtwin: error: Expected room to write TensorBoard's events, got 'No space left on device'; free space, or "
        "name another disk.",
    ]
    assert not unnamed
    assert threading.excepthook is hook


def test_an_error_of_tensorboard_that_no_event_raised_is_logged(capfd):
    class Writer(threading.Thread):
        __module__ = "tensorboard.summary.writer"

        def run(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with _naming_logs():
        writer = Writer()
        writer.start()
        writer.join()
    assert capfd.readouterr().err == "vidtwin: TensorBoard can't write its events: No space left on device\n"


def test_a_disk_that_is_full_for_a_loggers_files_names_them(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1})
    logger.experiment.metrics_file_path = "/dev/full"
    with pytest.raises(OSError, match='No space left on device: "the logger\'s files"') as caught, _naming_logs():
        logger.save()
    assert caught.value.errno == errno.ENOSPC


def test_tensorboard_shows_losses_rates_norms_quality_and_clips_from_step_0_on(run):
    tags = events(run)
    every_step = ["loss", "pixel", "kl", "psnr", "gradient_norm"]
    assert all(tags[f"train/{name}"] == [0, 1, 2] for name in every_step)
    assert tags["lr/generator"] == [0, 1, 2]
    assert tags["lr/discriminator"] == tags["discriminator/loss"] == tags["train/adversarial"] == [2]
    # Training's are of batches, counted from 0; validation's are after so many steps, the untrained model's included.
    assert all(tags[f"val/{name}"] == [0, 3] for name in ("psnr", "ssim", "loss", "pixel", "kl"))
    assert tags["val_clips/0/frames"] == tags["val_clips/0/video"] == [0, 3]


def test_test_writes_rows_for_the_model_and_the_references(here, run, capsys):
    argv = ["test", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--results_dir", "results", *QUICK]
    assert main([*argv, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    printed = capsys.readouterr().out
    rows = {path.parent.name: json.loads(path.read_text()) for path in Path("results").glob("rows/*/results.json")}
    assert set(rows) == {"VidTwin", "mean_colour", "temporal_mean"}
    row = rows["VidTwin"]
    # structure 4 x 2 queries x 2 x 2, dynamics 8 x 4 frames x (2 + 2), of 3 x 4 x 32 x 32 numbers
    assert {name: latent["numbers"] for name, latent in row["latents"].items()} == {"structure": 32, "dynamics": 128}
    assert row["compression_rate"] == 160 / 12288
    assert row["kind"] == "trained"
    assert row["metrics"]["lpips"] == "unavailable"
    assert "vgg16" in row["unavailable"]["lpips"]
    assert rows["mean_colour"]["compression_rate"] == 3 / 12288
    assert len({r["protocol_hash"] for r in rows.values()}) == 1
    with open("results/rows/VidTwin/clips.csv") as file:
        clips = list(csv.DictReader(file))
    assert len(clips) == row["num_clips"] == 4
    assert sum(float(clip["psnr"]) for clip in clips) / 4 == pytest.approx(row["metrics"]["psnr"]["mean"])
    assert "| VidTwin " in printed
    assert "temporal_mean" in printed
    for suffix in ("png", "mp4"):
        assert Path(f"results/rows/VidTwin/clip0.{suffix}").stat().st_size > 0
        assert f"clip0.{suffix}" in printed


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("config", [None, "data: {init_args: {num_frames: 4}}\nprotocol: {preset: vidtwin}\n"])
def test_a_checkpoint_without_a_config_of_a_model_rebuilds_its_own(here, run, config):
    argv = ["test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--data", "ucf101"]
    argv += ["--data.root=data/UCF-101", "--data.resolution=32", "--data.fps=25"]
    if config:
        Path("clips.yaml").write_text(config)
    argv += ["--config", "clips.yaml"] if config else ["--data.num_frames=4"]
    argv += [
        "--data.num_workers=0",
        "--data.batch_size=2",
        "--trainer.enable_progress_bar=false",
        f"--results_dir=rebuilt{bool(config)}",
        *QUICK,
    ]
    assert main(argv) == 0
    with_config, without = (
        json.loads(Path(folder, "rows/VidTwin/results.json").read_text())
        for folder in ("results", f"rebuilt{bool(config)}")
    )
    assert with_config["metrics"] == without["metrics"]
    assert with_config["protocol_hash"] == without["protocol_hash"]


@pytest.mark.usefixtures("without_pictures")
def test_a_row_without_a_checkpoint_is_marked_as_untrained(here, capsys):
    argv = ["test", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--results_dir", "untrained", *QUICK]
    assert main(argv) == 0
    assert "untrained" in capsys.readouterr().out
    assert json.loads(Path("untrained/rows/VidTwin/results.json").read_text())["kind"] == "untrained"


def test_a_config_that_differs_from_the_checkpoint_wins_and_the_difference_is_printed(here, run, capsys):
    argv = ["validate", "--config", "tiny.yaml", "--data.root", "data/UCF-101"]
    argv += ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--model.autoencoder.qformer_dropout=0.5"]
    assert main(argv) == 0
    assert "which wins: qformer_dropout: 0.5 in the config, 0.1 in the checkpoint" in capsys.readouterr().err


def test_reconstruct_keeps_frames_and_rate_and_uses_the_checkpoints_weights(here, run):
    source = next(Path("data/UCF-101").rglob("*.avi"))
    last = str(run / "checkpoints" / "last.ckpt")
    assert main(["reconstruct", str(source), "--ckpt_path", last, "--out", "plain"]) == 0
    assert main(["reconstruct", "--ckpt_path", last, "--side_by_side", str(source), "--out=wide"]) == 0
    info = probe(f"plain/{source.stem}.mp4")
    assert (info.num_frames, float(info.fps), info.width, info.height) == (10, 25.0, 32, 32)  # 4 + 4 + 2 frames
    assert probe(f"wide/{source.stem}.mp4").width == 4 * 128  # small frames are shown enlarged
    # Compare with the trained model's first window, at a scale that the codec's chroma subsampling preserves.
    from vidtwin.storage.checkpoints import load_autoencoder

    model = load_autoencoder(last)
    frames = list(iter_frames(source, 32))[:4]
    clip = torch.stack([torch.from_numpy(f) for f in frames]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        expected = (model(clip).clip[0].clamp(-1, 1) + 1) * 127.5
    written = torch.stack([torch.from_numpy(f) for f in iter_frames(f"plain/{source.stem}.mp4")][:4])
    difference = torch.nn.functional.avg_pool2d(written.permute(3, 0, 1, 2) - expected, 8)
    assert difference.abs().mean() < 4
    torch.manual_seed(1)  # not the training's
    untrained = type(model)(**model.init_args).eval()
    with torch.no_grad():
        other = (untrained(clip).clip[0].clamp(-1, 1) + 1) * 127.5
    assert torch.nn.functional.avg_pool2d(other - expected, 8).abs().mean() > 2 * difference.abs().mean()


def test_predict_writes_latents_that_decode_to_the_clip(here, run):
    argv = ["predict", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--out", "latents"]
    assert main([*argv, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    files = sorted(Path("latents").rglob("*.avi.safetensors"))
    assert len(files) == len(list(Path("latents").rglob("*.mp4"))) == 4
    latents = load_file(files[0])
    assert {name: tuple(z.shape) for name, z in latents.items()} == {"structure": (4, 2, 2, 2), "dynamics": (8, 4, 4)}


def test_predict_keeps_all_clips_of_a_video_apart(here, run):
    argv = ["predict", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--out", "every"]
    argv += ["--data.eval_clips=all", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert main(argv) == 0
    names = sorted(path.name for path in Path("every").rglob("*.safetensors"))
    # 10 frames at 25 fps are two clips of 4.
    assert len(names) == 8
    assert names[0].endswith(".avi.000000.safetensors")
    assert names[1].endswith(".avi.000004.safetensors")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fti"], "did you mean 'fit'?"),
        (["fit", "--config", "tiny.yaml", "--trainer.max_stesp", "3"], "did you mean 'trainer.max_steps'?"),
        (["fit", "--config", "tiny.yaml", "--trainer.max_step", "3"], "did you mean 'trainer.max_steps'?"),
        (["fit", "--config", "tiny.yaml", "--model.autoencoder.detph", "3"], "did you mean 'depth'?"),
        (["fit", "--config", "tiny.yaml", "--data.resolutoin", "3"], "did you mean 'resolution'?"),
        (["fit", "--model.autoencoder", "vidtwim"], "did you mean 'vidtwin'?"),
        (["fit", "--model.autoencoder.class_path", "vidtwin.models.vidtwin.VidTwim"], "did you mean 'VidTwin'?"),
        (["fit", "--config", "tiny.yaml", "--model.autoencoder.depth", "deep"], "depth: Expected int, got deep."),
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        (["fit", "--config", "tiny.yaml", "--data.root", "nowhere"], "nowhere"),
        (["test", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--ckpt_path", "no.ckpt"], "no.ckpt"),
        (["test", "--config", "tiny.yaml", "--trainer.strategy", "ddp"], "got --trainer.strategy; there are --accel"),
        (["test", "--config", "tiny.yaml", "--model.freeze", "[a]"], "--protocol.weights average"),
        (["test", "--model.autoencoder", "vidtwin"], "Expected data to test on"),
        (["test", "--data", "ucf101", "--data.root=data/UCF-101"], "give --ckpt_path FILE"),
        (["reconstruct", "data/UCF-101", "--ckpt_path", "no.ckpt"], "no.ckpt"),
        (["reconstruct", "nothing.mp4", "--ckpt_path", "no.ckpt"], "Expected a video at nothing.mp4"),
        (["fit", "--model.autoencoder", "vidtwin"], "--data ucf101"),
        (["test", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--name", "../up"], "that can be a folder's"),
        (["plugins", "extra"], "Expected options that exist, got extra."),
        (["configs", "a", "b"], "Expected options that exist, got b."),
        (["fit", "--config", "tiny.yml"], "did you mean 'tiny.yaml'?"),
        (["fit", "--config", "tiny.yaml", "--data", "vidtwin.datamodule.ucf101.UCF101"], "did you mean 'datamodules'?"),
        (["fit", "--config", "tiny.yaml", "--model.optimizer", "torch.optim.AdmW"], "did you mean 'AdamW'?"),
        (["fit", "--config", "tiny.yaml", "--trainer.logger", "TensorBordLogger"], "did you mean 'TensorBoardLogger'?"),
        (
            ["fit", "--config", "tiny.yaml", "--model.loss.discriminator", "vidtwin.losses.discriminator.Patch2d"],
            "model.loss.discriminator: Expected a class in vidtwin.losses.discriminator, got 'Patch2d'; did you mean",
        ),
        (
            ["fit", "--config", "tiny.yaml", "--model.loss.pixel", "l3"],
            "model.loss.pixel: Expected one of l1, l2, got l3; did you mean 'l2'?",
        ),
        (["fit", "--config", "tiny.yaml", "--trainer.precision", "bf17"], "bf16-mixed, 32-true"),
        (["test", "--config", "tiny.yaml", "--protocol.preset", "wfvea"], "got wfvea; did you mean 'wfvae'?"),
        (["test", "--config", "tiny.yaml", "--protocol.psnr", "fram"], "got fram; did you mean 'frame'?"),
        (["test", "--config", f"{CONFIGS}/data/folder.yaml"], f"; give it as --data {CONFIGS}/data/folder.yaml."),
        (["fit", "--config", f"{CONFIGS}/optimizer/paper.yaml"], "AdamW; give it as --model.optimizer "),
        (["cache", "out", "--config", f"{CONFIGS}/data/folder.yaml"], "; give it as --data "),
        (["check", "--config", f"{CONFIGS}/loss/vidtwin.yaml"], "; give it as --model.loss "),
        (["cache", "out", "--config", f"{CONFIGS}/protocols/wfvae.yaml"], "wfvae.yaml, got none; add --data NAME."),
        (["fit", "--config", "tiny.yaml", "--data.root=data/UCF-101", "--trainer.accelerator", "gpuu"], "gpuu"),
        (["fit", "--config", "tiny.yaml", "--data.root=data/UCF-101", "--data.num_workers=-1"], "num_workers"),
        (
            ["fit", "--config", "tiny.yaml", "--data.root=data/UCF-101", "--model.autoencoder.depth=0"],
            "depth of at least 1",
        ),
        (
            ["test", "--config", "tiny.yaml", "--data.root=data/UCF-101", "--name", "mean_colour"],
            "several called mean_colour",
        ),
        (
            ["test", "--config=tiny.yaml", "--data.root=data/UCF-101", "--references=[mean_color]", "--results_dir=r"],
            "got 'mean_color'; did you mean 'mean_colour'?",
        ),
        (["reconstruct", "a.mp4"], "give --ckpt_path PATH"),
        (["reconstruct", "a.mp4", "--ckpt_path"], "expected one argument"),
        (["validate", "--config", "tiny.yaml", "--data.root", "data/UCF-101"], "give --ckpt_path FILE"),
        (["fit"], "give --config FILE or --model.autoencoder NAME"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(here, capsys, argv, expected):
    assert expected in fails(capsys, *argv)


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        ("--config P --data folder --data.root R", "--data=folder --config P --data.root R"),
        ("--data.root R --config=P --data=folder", "--data=folder --data.root R --config=P"),
        ("fit -c P --data.root R --data folder --seed 3", "fit --data=folder -c P --data.root R --seed 3"),
        ("--data folder --config P --data.root R", "--data=folder --config P --data.root R"),
    ],
)
def test_the_data_module_may_stand_behind_its_settings(given, ordered):
    """The settings of a protocol's config are those of the class that --data names, wherever it stands."""
    protocol = f"{CONFIGS}/protocols/wfvae.yaml"
    assert name_data_first(given.replace("P", protocol).split()) == ordered.replace("P", protocol).split()


def test_a_config_that_names_its_data_module_keeps_its_place():
    words = ["--config", f"{CONFIGS}/demo.yaml", "--config", f"{CONFIGS}/protocols/wfvae.yaml", "--data", "folder"]
    assert name_data_first(words) == words


def test_a_protocol_before_the_data_module_is_taken(here, capsys):
    argv = ["--config", f"{CONFIGS}/protocols/tokenbench.yaml", "--data", "folder", "--data.root", "data"]
    assert main(["test", "--model.autoencoder", "magvit2", *argv, "--print_config"]) == 0
    arguments = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert (arguments["root"], arguments["num_frames"], arguments["resolution"]) == ("data", None, None)


def test_a_message_of_another_wording_passes_through_in_one_line():
    parser = Parser()
    parser.add_argument("--resolution", type=int)
    error = KeyError("There is no\n  'resolutoin' here")
    assert str(messages.shorten("Wording\n  of another  version", parser, None)) == "Wording of another version."
    assert str(messages.shorten(error.args[0], parser, error)).endswith("here; did you mean 'resolution'?")


def test_configs_are_merged_key_by_key_but_not_from_one_class_to_another(tmp_path):
    loss = {"class_path": "Loss", "init_args": {"weight": 1, "pixel": "l1"}}
    contents = [
        {"model": {"loss": loss, "ema": 0.9}, "trainer": {"max_steps": 3}},
        {"base": "a.yaml", "model": {"loss": {"init_args": {"pixel": "l2"}}}, "trainer": {"devices": 2}},
        {"model": {"loss": {"class_path": "Other", "init_args": {"scale": 2}}}},
    ]
    paths = [tmp_path / f"{number}.yaml" for number in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(yaml.safe_dump(content))
    both = {"class_path": "Loss", "init_args": {"weight": 1, "pixel": "l2"}}
    trainer = {"max_steps": 3, "devices": 2}
    assert read_config(paths[:2]) == {"model": {"loss": both, "ema": 0.9}, "trainer": trainer}
    assert read_config(paths)["model"]["loss"] == contents[2]["model"]["loss"]


def test_mistyped_options_are_refused_by_a_list_that_fits_the_parsers():
    parser = capture_parser(lambda: VidTwinCLI(["fit"]))
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    for command, inner in commands.items():
        names = {word[2:].partition(".")[0] for word in inner._option_string_actions if word.startswith("--")}
        assert names == set(options.NAMES[command]), command
    ours = [parser() for parser in (benchmark._make_sweep_parser, lambda: benchmark._make_model_parser([]))]
    words = {word for parser in ours for word in parser._option_string_actions if word.startswith("--")}
    assert {word[2:].partition(".")[0].rstrip("+") for word in words} | {"trainer"} == options.names_of_test()


@pytest.mark.parametrize("first", ["ckpt_path", "model"])
def test_the_order_of_options_does_not_choose_the_model(here, run, capsys, first):
    options = {"ckpt_path": ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]}
    options["model"] = ["--model.autoencoder", "vidtwin.baselines.references.TemporalMean"]
    words = [*options.pop(first), *next(iter(options.values()))]
    data = ["--data=ucf101", "--data.root=data/UCF-101", "--data.num_frames=4", "--data.resolution=32"]
    assert "another model or size" in fails(capsys, "test", *words, *data, "--results_dir=order")


def test_an_unknown_key_of_a_tests_config_is_refused(here, capsys):
    Path("typo.yaml").write_text(Path("tiny.yaml").read_text() + "protocl: {preset: wfvae}\n")
    assert "got 'protocl'; did you mean 'protocol'?" in fails(capsys, "test", "-c", "typo.yaml")


@pytest.mark.parametrize(
    ("end", "code"),
    [("sys.exit(2)", 2), ("sys.exit()", 0), ("return 3", 3), ("sys.exit('broken')", None), ("sys.exit(9)", None)],
)
def test_a_commands_exit_counts_only_as_argparse_ends(tmp_path, monkeypatch, end, code):
    (tmp_path / "their_command.py").write_text(f"import sys\n\ndef run(argv):\n    {end}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_command", raising=False)
    entry = EntryPoint("theirs", "their_command:run", "vidtwin.commands")
    monkeypatch.setattr("vidtwin.plugins.entry_points", lambda group: [entry])
    if code is not None:
        assert main(["theirs"]) == code
    else:
        with pytest.raises(SystemExit):
            main(["theirs"])


def test_a_typo_in_a_config_file_is_one_line(here, capsys):
    for text, meant in {
        "trainer: {max_stesp: 3}": "max_steps",
        "model: {autoencoder: {class_path: vidtwin.models.vidtwin.VidTwin, init_args: {hiden_size: 3}}}": "hidden_size",
    }.items():
        Path("typo.yaml").write_text(text)
        assert f"did you mean '{meant}'?" in fails(capsys, "fit", "--config", "typo.yaml")


def test_mismatched_and_damaged_checkpoints_change_nothing(here, run, capsys, tmp_path):
    base = ["test", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--results_dir", str(tmp_path / "results")]
    last = run / "checkpoints" / "last.ckpt"
    line = fails(capsys, *base, "--ckpt_path", str(last), "--model.autoencoder.hidden_size=48")
    assert "another model or size" in line
    assert "expected (" in line
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(last.read_bytes()[:5000])
    assert "damaged or cut off" in fails(capsys, *base, "--ckpt_path", str(cut))
    marker = tmp_path / "executed"

    class Code:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"state_dict": Code()}, tmp_path / "code.ckpt")
    assert "never run" in fails(capsys, *base, "--ckpt_path", str(tmp_path / "code.ckpt"))
    assert not marker.exists()
    assert not (tmp_path / "results").exists()


def test_a_new_run_does_not_replace_an_old_one(here, run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    argv = ["fit", "--config", "tiny.yaml", "--data.root", "data/UCF-101"]
    assert "resume it by --ckpt_path" in fails(capsys, *argv)
    resumed = [*argv, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert "warmup_steps=9" in fails(capsys, *resumed, "--model.scheduler.warmup_steps=9")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.usefixtures("without_pictures")
def test_a_row_of_another_checkpoint_is_kept_in_earlier(here, run, capsys):
    argv = ["test", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--results_dir", "aside", *QUICK]
    assert main([*argv, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    files = {path.name: path.read_bytes() for path in Path("aside/rows/VidTwin").iterdir()}
    capsys.readouterr()
    assert main(argv) == 0
    assert "moved the earlier row to" in capsys.readouterr().err
    (earlier,) = Path("aside/rows/VidTwin/earlier").iterdir()
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == files
    assert json.loads(Path("aside/rows/VidTwin/results.json").read_text())["kind"] == "untrained"


@pytest.mark.usefixtures("without_pictures")
def test_a_model_measured_alone_is_complete_in_a_sweep_over_the_same_folder(here, run, capsys):
    last = str(run / "checkpoints" / "last.ckpt")
    argv = ["test", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--results_dir", "shared"]
    assert main([*argv, "--ckpt_path", last, *QUICK, "--accelerator=cpu"]) == 0
    rows = {path: path.read_bytes() for path in Path("shared/rows").rglob("*") if path.is_file()}
    sweep = {
        "autoencoders": [
            {"name": "VidTwin", "config": "tiny.yaml", "checkpoint": last},
            {"name": "untrained", "config": "tiny.yaml"},
        ],
        "data": CONFIG["data"],
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    capsys.readouterr()
    options = ["--data.root=data/UCF-101", "--results_dir=shared", "--accelerator=cpu", *QUICK]
    assert main(["test", "--config", "sweep.yaml", *options]) == 0
    assert "3 of 4 rows are complete" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in rows} == rows
    alone, other = (json.loads(Path(f"shared/rows/{n}/results.json").read_text()) for n in ("VidTwin", "untrained"))
    assert alone["protocol_hash"] == other["protocol_hash"]
    assert alone["metrics"].keys() == other["metrics"].keys()
    sweep["autoencoders"][0].pop("config")  # the checkpoint's own model is the same one
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert main(["test", "--config", "sweep.yaml", *options]) == 0
    assert {path: path.read_bytes() for path in rows} == rows


def test_an_option_changes_the_model_of_a_checkpoint_and_the_difference_is_printed(here, run, capsys):
    last = str(run / "checkpoints" / "last.ckpt")
    argv = ["validate", "--ckpt_path", last, "--model.autoencoder.qformer_dropout=0.5", "--data=ucf101"]
    argv += ["--data.root=data/UCF-101", "--data.num_frames=4", "--data.resolution=32", "--data.fps=25"]
    assert main([*argv, "--data.num_workers=0", "--trainer.enable_progress_bar=false"]) == 0
    assert "qformer_dropout: 0.5 in the config, 0.1 in the checkpoint" in capsys.readouterr().err


def test_no_command_writes_over_its_input(here, run, capsys, tmp_path):
    source = tmp_path / "x.mp4"
    video = next(Path("data/UCF-101").rglob("*.avi"))
    write_video(source, iter_frames(video), 25)
    before = source.read_bytes()
    last = str(run / "checkpoints" / "last.ckpt")
    assert "would be replaced" in fails(capsys, "reconstruct", str(source), "--ckpt_path", last, "--out", str(tmp_path))
    (tmp_path / "list.csv").write_text(f"path,split\n{source},test\n")
    argv = ["predict", "--ckpt_path", last, "--data", "folder", f"--data.root={tmp_path}"]
    argv += [f"--data.csv={tmp_path / 'list.csv'}", "--data.num_frames=4", "--data.resolution=32", "--data.fps=25"]
    argv += ["--data.num_workers=0", "--trainer.enable_progress_bar=false"]
    assert main([*argv, f"--out={tmp_path}"]) == 0
    assert main([*argv, f"--out={tmp_path / 'out'}"]) == 0
    assert source.read_bytes() == before
    assert [p.name for p in (tmp_path / "out").rglob("*.mp4")] == ["x.mp4.mp4"]


def test_a_clip_of_the_wrong_shape_names_the_option(here, capsys):
    argv = ["test", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--results_dir", "wrong"]
    line = fails(capsys, *argv, "--data.num_frames=3")
    assert "Expected a float clip of shape (B, 3, 4, 32, 32)" in line
    assert "got (1, 3, 3, 32, 32)" in line
    assert "set data.num_frames=4" in line


def test_rows_of_another_protocol_are_refused(here, run, capsys):
    argv = ["test", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--results_dir", "results"]
    before = Path("results/rows/VidTwin/results.json").read_text()
    line = fails(capsys, *argv, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--data.fps=12.5")
    assert "they differ in data.clips_sha256" in line
    assert "data.fps 12.5 for 25.0" in line
    assert Path("results/rows/VidTwin/results.json").read_text() == before


def test_a_broken_video_is_named_through_the_workers(here, run, capsys):
    video = next(Path("data/UCF-101").rglob("*_g01_*.avi"))
    whole = video.read_bytes()
    video.write_bytes(whole[:300])
    argv = ["test", "--config", "tiny.yaml", "--data.root", "data/UCF-101", "--results_dir", "broken"]
    try:
        line = fails(
            capsys,
            *argv,
            "--data.num_workers=1",
            "--data.max_broken=0",
            "--ckpt_path",
            str(run / "checkpoints" / "last.ckpt"),
        )
    finally:
        video.write_bytes(whole)
    assert video.name in line
    assert not list(Path("broken").glob("rows/*/results.json"))


def test_configs_are_copied_once(here, capsys):
    assert main(["configs", "copied"]) == 0
    assert Path("copied/vidtwin_base.yaml").is_file()
    assert "nothing was overwritten" in fails(capsys, "configs", "copied")


def test_plugins_lists_what_is_registered(capsys):
    assert main(["plugins"]) == 0
    printed = capsys.readouterr().out
    assert "vidtwin.models.vidtwin.VidTwin" in printed
    assert "vidtwin.datamodules.ucf101.UCF101" in printed
    assert "vidtwin.commands: none" in printed


def test_a_folder_that_cannot_be_is_named(here, capsys):
    argv = ["fit", "--config", "tiny.yaml", "--data.root=data/UCF-101"]
    line = fails(capsys, *argv, "--trainer.logger.init_args.save_dir=tiny.yaml")
    assert "Expected a path that can be used, not " in line
    assert line.endswith("/tiny.yaml/tiny, got 'Not a directory'; name another.")


@pytest.mark.usefixtures("without_pictures")
def test_a_read_only_results_folder_is_named(here, run, capsys, monkeypatch):
    def refuse(*_, dir, prefix, suffix, **__):
        raise OSError(30, "Read-only file system", f"{dir}/{prefix}abcd1234{suffix}")

    argv = ["test", "--config", "tiny.yaml", "--data.root=data/UCF-101", *QUICK]
    assert main([*argv, "--results_dir=read_only"]) == 0
    monkeypatch.setattr("vidtwin.files.tempfile.mkstemp", refuse)
    assert "Expected permission for read_only/" in fails(capsys, "report", "read_only")
    argv.append("--results_dir=new")
    assert "Expected permission for new/videos.json, got 'Read-only" in fails(capsys, *argv)
    argv = ["fit", "--config", "tiny.yaml", "--data.root=data/UCF-101", "--trainer.logger.init_args.name=frozen"]
    assert "frozen/checkpoints/" in fails(capsys, *argv)


def test_a_logger_whose_package_is_missing_is_one_line(here, capsys, monkeypatch):
    absent = RequirementCache("absent-package>=1")
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", absent)
    argv = ["fit", "--config", "tiny.yaml", "--data.root=data/UCF-101", "--trainer.logger=MLFlowLogger"]
    line = fails(capsys, *argv)
    assert "Expected the packages that the config's classes need, got none: " in line
    assert "absent-package>=1" in line


def test_dict_kwargs_are_arguments_too(here, capsys):
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    config["data"]["dict_kwargs"] = {"colour": "grey"}
    Path("kwargs.yaml").write_text(yaml.safe_dump(config))
    for command in ("fit", "test"):
        line = fails(capsys, command, "--config", "kwargs.yaml", "--data.root=data/UCF-101")
        assert "ucf101.UCF101 takes in dict_kwargs, got others: " in line
        assert "'colour'" in line


def test_a_printed_config_prints_itself(here, capsys):
    printed = []
    for config in ("tiny.yaml", "printed.yaml"):
        capsys.readouterr()
        assert main(["fit", "--config", config, "--data.root=data/UCF-101", "--print_config"]) == 0
        printed.append(capsys.readouterr().out)
        Path("printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]


def test_a_limit_of_test_batches_is_named_as_one_that_does_not_hold(here, capsys):
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    config["trainer"]["limit_test_batches"] = 1
    Path("limited.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "--config", "limited.yaml", "--data.root=nowhere"]) == 2
    assert "limit_test_batches 1 does not hold here: every test clip is measured" in capsys.readouterr().err


def test_the_still_is_a_png_of_four_rows(here, run):
    data = Path("results/rows/VidTwin/clip0.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (width, height) == (panels.LABEL_WIDTH + 4 * 128, 4 * 128)
    assert zlib.crc32(data[12:29]) == struct.unpack(">I", data[29:33])[0]


def test_a_model_written_by_hand_that_does_not_parse_is_one_line(here, capsys):
    for text in ("{autoencoder: nothing}", "{autoencoder: [}"):
        assert main(["fit", "--model", text, "--data", "synthetic"]) == 2
        assert "vidtwin: error: " in capsys.readouterr().err
