"""An interrupted and resumed training equals an uninterrupted one, bit for bit."""

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from tiny import BASELINES, Clips, Terminate, baseline_task, tiny_task, trainer, write_config

from vidtwin.cli import main
from vidtwin.errors import REQUEUE_EXIT_CODE, Preempted, UserError
from vidtwin.losses.discriminator import PatchDiscriminator2d
from vidtwin.storage import checkpoints
from vidtwin.training.callbacks.checkpoint import LatestCheckpoint

STEPS = 8  # 3 batches an epoch: all of two epochs and two batches of a third


class Diary(Callback):
    """Clips, losses and rates of each batch; ends the training at a step as a kill would, after the checkpoint."""

    def __init__(self, end_at: int | None = None, by_signal: bool = False) -> None:
        self.end_at = end_at
        self.by_signal = by_signal
        self.entries: list[tuple[Any, ...]] = []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.clips = tuple(zip(batch["name"], batch["clip"].sum((1, 2, 3, 4)).tolist(), strict=True))
        if self.by_signal and trainer.global_step + 1 == self.end_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith(("train", "disc"))}
        self.entries.append((trainer.global_step, self.clips, values))


class End(Callback):
    """Ends the training at a step, when the checkpoint is written."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            saved = next(c for c in trainer.checkpoint_callbacks if isinstance(c, LatestCheckpoint))
            saved.save(trainer)
            raise Killed


class Killed(Exception):  # noqa: N818
    """As by a kill, but in the test's own process."""


def run(
    folder: Path,
    workers: int,
    callbacks: list[Callback],
    ckpt_path: Path | None = None,
    seed: int = 0,
    **arguments: Any,
) -> None:
    torch.manual_seed(1)  # of the discriminator's first weights, which come from the config's seed in real runs
    task = tiny_task(
        gan_start=3,
        ema_decay=0.99,
        use_ema=True,
        model={"qformer_dropout": 0.3},
        loss={
            "discriminator": PatchDiscriminator2d(channels=8, num_layers=1, norm="batch"),
            "lecam_weight": 0.1,
            "adversarial_frames": 2,
            "learn_logvar": True,
        },
    )
    saved = LatestCheckpoint(every_n_steps=100, dirpath=str(folder / "checkpoints"))
    torch.manual_seed(seed)  # whatever state the process is in
    fit = trainer(folder, STEPS, callbacks=[*callbacks, saved], check_val_every_n_epoch=None, **arguments)
    fit.fit(task, datamodule=Clips(num_workers=workers), ckpt_path=ckpt_path)


def state_of(folder: Path) -> dict[str, Any]:
    checkpoint = checkpoints.read(folder / "checkpoints" / "last.ckpt")
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "ema", "training", "global_step", "epoch")
    return {key: checkpoint[key] for key in kept}


def assert_equal(ours: Any, theirs: Any, where: str = "") -> None:
    """Nested states are equal bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    diary = Diary()
    run(folder, 0, [diary], val_check_interval=2)
    return diary.entries, state_of(folder)


# Before the first validation, at an epoch's end, within the last one, and with workers; slow tests end at every step.
ENDS = [(0, 1), (0, 3), (0, 7), (2, 2)]
OTHERS = [*((0, end) for end in (2, 4, 5, 6)), (2, 3), (2, 7)]


@pytest.mark.parametrize(("workers", "end"), [*ENDS, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)])
def test_an_interrupted_training_ends_with_the_same_bits(undisturbed, tmp_path, workers, end):
    entries, state = undisturbed
    first, second = Diary(), Diary()
    with pytest.raises(Killed):
        run(tmp_path, workers, [first, End(end)], val_check_interval=2)
    run(tmp_path, workers, [second], tmp_path / "checkpoints" / "last.ckpt", seed=123, val_check_interval=2)
    assert_equal(first.entries + second.entries, entries)
    assert_equal(state_of(tmp_path), state)


def test_a_validation_more_or_less_changes_no_bit(undisturbed, tmp_path):
    diary = Diary()
    run(tmp_path, 0, [diary], val_check_interval=3, num_sanity_val_steps=0)
    assert_equal(diary.entries, undisturbed[0])
    assert_equal(state_of(tmp_path), undisturbed[1])


def test_another_seed_gives_other_bits(undisturbed, tmp_path):
    class OtherSeed(Callback):
        def on_train_start(self, trainer, task):
            task.seed += 1

    diary = Diary()
    run(tmp_path, 0, [diary, OtherSeed()], val_check_interval=2)
    assert [e[1] for e in diary.entries] == [e[1] for e in undisturbed[0]]  # the data's seed is the data module's
    assert diary.entries[1][2] != undisturbed[0][1][2]


def test_sigterm_saves_and_ends_and_the_handler_is_put_back(undisturbed, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    first, second = Diary(end_at=5, by_signal=True), Diary()
    with pytest.raises(Preempted, match=r"after step 5, saved in .*--resume auto"):
        run(tmp_path, 0, [first], val_check_interval=2)
    assert signal.getsignal(signal.SIGTERM) is before
    run(tmp_path, 0, [second], tmp_path / "checkpoints" / "last.ckpt", val_check_interval=2)
    assert_equal(first.entries + second.entries, undisturbed[0])
    assert_equal(state_of(tmp_path), undisturbed[1])


def test_a_task_that_was_ended_by_sigterm_trains_on_in_the_same_process(tmp_path):
    task = tiny_task()
    with pytest.raises(Preempted):
        trainer(tmp_path, 3, callbacks=[Terminate(at=1)]).fit(task, Clips())
    run = trainer(tmp_path, 3)
    run.fit(task, Clips())
    assert run.global_step == 3


def test_a_signal_that_lightnings_handler_took_is_not_lost(tmp_path):
    class Early(Callback):
        def on_train_start(self, trainer, task):  # before `Preemption`
            trainer._signal_connector.received_sigterm = True

    with pytest.raises(Preempted):
        trainer(tmp_path, 3, callbacks=[Early()]).fit(tiny_task(), Clips())


# From the command line.


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def test_resume_auto_starts_resumes_after_sigterm_and_ends(config, tmp_path, capsys):
    runs = tmp_path / "runs" / "tiny"
    command = ["fit", "--config", str(config), "--resume", "auto"]
    assert main([*command, "--trainer.callbacks+=tiny.Terminate", "--trainer.callbacks.at=3"]) == REQUEUE_EXIT_CODE
    error = capsys.readouterr().err
    assert "starting a new run: no checkpoint in" in error
    assert "ended by SIGTERM after step 4, saved in" in error
    assert main(command) == 0
    error = capsys.readouterr().err
    assert f"resuming from {runs / 'version_0' / 'checkpoints' / 'step-00000004.ckpt'}" in error
    assert [path.name for path in runs.iterdir()] == ["version_0"]
    # Lightning's CSVLogger would have deleted the numbers from before: the validation after step 3.
    assert "val/psnr" in (runs / "version_0" / "metrics-0.csv").read_text()
    assert checkpoints.read(runs / "version_0" / "checkpoints" / "last.ckpt")["global_step"] == 5


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_sanity_check_start", "on_train_start", "teardown"])
def test_sigterm_at_any_other_moment_exits_with_the_requeue_code(config, tmp_path, capsys, hook):
    before = signal.getsignal(signal.SIGTERM)
    command = ["fit", "--config", str(config), "--resume", "auto"]
    at = 5 if hook == "teardown" else 0
    hooked = ["--trainer.callbacks+=tiny.Terminate", f"--trainer.callbacks.at={at}", f"--trainer.callbacks.hook={hook}"]
    assert main([*command, *hooked]) == REQUEUE_EXIT_CODE
    error = capsys.readouterr().err
    assert "run the same command again with --resume auto" in error
    state = "after step 1, saved in" if hook == "on_train_start" else "with no new step to save"
    assert f"ended by SIGTERM {state}" in error
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(command) == 0
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    assert run.name == "version_0"
    assert checkpoints.read(run / "checkpoints" / "last.ckpt")["global_step"] == 5


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_a_refused_training_takes_no_number_of_the_runs(config, tmp_path, capsys, logger):
    chosen = ["--trainer.logger", logger, "--trainer.logger.save_dir", str(tmp_path), "--trainer.logger.name", "own"]
    command = ["fit", "--config", str(config), *chosen]
    assert main([*command, "--trainer.val_check_interval=100"]) == 2
    assert "of at most the 3 batches of an epoch, got 100" in capsys.readouterr().err
    assert list(tmp_path.glob("own/*")) == []
    kept = tmp_path / "own" / "version_0" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert main([*command, "--trainer.logger.version=0", "--model.freeze=[encodr]"]) == 2  # in a folder that exists
    assert kept.exists()


def test_libraries_can_not_catch_the_end_by_sigterm_as_an_exception():
    assert not issubclass(Preempted, Exception)


def test_resume_skips_a_damaged_checkpoint(config, tmp_path, capsys):
    command = ["fit", "--config", str(config), "--resume", "auto"]
    assert main(command) == 0
    folder = tmp_path / "runs" / "tiny" / "version_0" / "checkpoints"
    newest = folder / "step-00000005.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert main([*command, "--trainer.max_steps", "6"]) == 0
    error = capsys.readouterr().err
    assert "step-00000005.ckpt" in error
    assert f"resuming from {folder / 'step-00000004.ckpt'}" in error


@pytest.mark.parametrize("logger", ["default", "several"])
def test_resume_auto_finds_the_run_of_any_logger_that_numbers_its_runs(config, tmp_path, capsys, monkeypatch, logger):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(config.read_text())
    csv = content["trainer"].pop("logger")
    if logger == "several":
        board = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": csv["init_args"]}
        content["trainer"]["logger"] = [board, csv]
    content["trainer"]["log_every_n_steps"] = 1
    config.write_text(yaml.safe_dump(content))
    command = ["fit", "--config", str(config), "--resume", "auto"]
    ended = ["--trainer.callbacks+=tiny.Terminate", "--trainer.callbacks.at=3"]
    assert main([*command, *ended]) == REQUEUE_EXIT_CODE
    assert main(command) == 0
    assert "resuming from" in capsys.readouterr().err
    (run,) = tmp_path.rglob("checkpoints")
    assert checkpoints.read(run / "last.ckpt")["global_step"] == 5


def test_resume_auto_of_a_logger_that_cannot_be_found_again_is_refused(config, capsys):
    content = yaml.safe_load(config.read_text())
    content["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.logger.DummyLogger"}
    config.write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(config), "--resume", "auto"]) == 2
    assert "got DummyLogger; name the run by --resume FOLDER" in capsys.readouterr().err


def test_the_keyboard_ends_with_its_own_code(config):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    interrupted = ["--trainer.callbacks+=tiny.Terminate", "--trainer.callbacks.number=2"]
    try:
        assert main(["fit", "--config", str(config), *interrupted]) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored


def test_resume_of_a_folder_without_checkpoints_is_refused(config, tmp_path, capsys):
    assert main(["fit", "--config", str(config), "--resume", str(tmp_path)]) == 2
    assert "Expected intact checkpoints in" in capsys.readouterr().err
    assert main(["fit", "--config", str(config), "--resume", "auto", "--ckpt_path", "last.ckpt"]) == 2
    assert main(["fit", "--config", str(config), "--resume", str(config)]) == 2
    assert f"give it as --ckpt_path {config}" in capsys.readouterr().err
    torch.save([1], config.parent / "list.pt")
    assert main(["fit", "--config", str(config), "--init_from", str(config.parent / "list.pt")]) == 2
    assert "got a list" in capsys.readouterr().err


def test_init_from_takes_the_fitting_weights_and_lists_the_others(config, tmp_path, capsys):
    assert main(["fit", "--config", str(config)]) == 0
    source = tmp_path / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    wider = ["--model.autoencoder.structure_width", "16", "--model.freeze", "[encoder]", "--trainer.max_steps", "3"]
    assert main(["fit", "--config", str(config), "--init_from", str(source), *wider]) == 0
    error = capsys.readouterr().err
    assert "fresh structure.conv_in.weight: (8, 16, 3, 3) in the file, (16, 16, 3, 3) here" in error
    assert f"{source}: other arguments: structure_width 8 there, 16 here\n" in error
    assert "fresh structure.to_features" not in error
    assert "not in the file" not in error
    old, new = (
        checkpoints.read(source.parents[2] / run / "checkpoints" / "last.ckpt") for run in ("version_0", "version_1")
    )
    own = len(checkpoints.autoencoder_weights(new))
    fresh = error.count(" in the file, ") + error.count("its layer is fresh")
    assert f"{source}: {own - fresh} of {own} tensors, averaged weights" in error
    assert new["global_step"] == 3
    averaged = checkpoints.autoencoder_weights(old, ema=True)
    weights = checkpoints.autoencoder_weights(new)
    frozen = [name for name in weights if name.startswith("encoder.")]
    assert frozen
    assert all(torch.equal(weights[name], averaged[name]) for name in frozen)  # began with the average, never moved
    assert not torch.equal(weights["decoder.linear.weight"], averaged["decoder.linear.weight"])
    assert not any(name.startswith("encoder.") for name in new["ema"]["values"])


def test_init_from_of_another_model_is_refused(tmp_path):
    for held in ({"a": torch.zeros(1)}, {"state_dict": {"a": torch.zeros(1)}}):
        torch.save(held, tmp_path / "other.pt")
        with pytest.raises(UserError, match=r"weights of VidTwin in .*other\.pt, got none that fits; it has a"):
            trainer(tmp_path).fit(tiny_task(), datamodule=Clips(), init_from=str(tmp_path / "other.pt"))


def test_freezing_a_missing_module_lists_the_existing_ones(tmp_path):
    message = r"modules of VidTwin \(encoder, structure, dynamics, decoder\), got 'encodr'; did you mean 'encoder'"
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(tiny_task(freeze=["encodr"]), datamodule=Clips())


# With codes, and with dropout too; the others keep no state beside their weights.
STATEFUL = ("magvit2", "ivideogpt")


@pytest.mark.parametrize(
    "name", [name if name in STATEFUL else pytest.param(name, marks=pytest.mark.slow) for name in BASELINES]
)
def test_a_baseline_resumes_bit_for_bit(name, tmp_path):
    """iVideoGPT's dropout included."""
    logged, weights = {}, {}
    for folder, stops in (("whole", [4]), ("parts", [2, 4])):  # an epoch ends between them
        logged[folder] = []
        for stop in stops:
            diary, saved = Diary(), LatestCheckpoint(every_n_steps=1, dirpath=str(tmp_path / folder))
            callbacks = [diary, saved, *([End(stop)] if stop < 4 else [])]
            run = trainer(tmp_path / folder, 4, callbacks=callbacks, num_sanity_val_steps=0)
            with nullcontext() if stop == 4 else pytest.raises(Killed):
                run.fit(baseline_task(name, ema_decay=0.9), datamodule=Clips(), resume="auto")
            logged[folder] += diary.entries
        weights[folder] = checkpoints.read(tmp_path / folder / "last.ckpt")["state_dict"]
    # The training that ends within a step's hooks has not noted that step.
    assert logged["whole"][2:] == logged["parts"][-2:]
    assert all(torch.equal(value, weights["parts"][key]) for key, value in weights["whole"].items())
