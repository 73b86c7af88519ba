"""Latest and best checkpoints: which are kept, and that an intact one exists at every moment."""

import itertools
import os
import resource
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from vidtwin import files
from vidtwin.errors import UserError
from vidtwin.storage import checkpoints
from vidtwin.training.callbacks.checkpoint import BestCheckpoint, LatestCheckpoint


class Task(LightningModule):
    """One layer. Batches in `skipped` (counted from 1) are no steps; the validations give `scores` one by one."""

    def __init__(self, skipped=(), scores=()):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(64, 64)
        self.skipped = skipped
        self.scores = list(scores)
        self.batches = 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        if self.batches in self.skipped:
            return
        optimizer = self.optimizers()
        self.manual_backward(self.layer(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        self.log("val/psnr", torch.tensor(float(self.scores.pop(0))))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Recorder(checkpoints.AtomicCheckpointIO):
    """Keeps the names of what is written."""

    def __init__(self):
        self.written: list[str] = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written.append(Path(path).name)


class RollBack(Callback):
    """After batch `at` (counted from 1) the count of steps is put back to `to`."""

    def __init__(self, at, to):
        self.at, self.to = at, to

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if task.batches == self.at:
            trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = self.to


def fit(folder, *callbacks, steps, task=None, ckpt_path=None, **arguments):
    """Train for so many steps, validating after every second batch → names of the checkpoints as they were written."""
    recorder, task = Recorder(), task or Task()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    validation = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    validation["limit_val_batches"] = 1 if task.scores else 0
    settings = {"max_steps": steps, "plugins": [recorder], "callbacks": list(callbacks), "default_root_dir": folder}
    trainer = Trainer(**{**quiet, **validation, **settings, **arguments})
    data = DataLoader(torch.ones(100, 64), batch_size=1)
    with warnings.catch_warnings():
        for message in ("does not have many workers", "not resumable", "is not empty", "training_step` returned"):
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        trainer.fit(task, data, data, ckpt_path=ckpt_path)
    return recorder.written


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def step_names(*steps):
    return [f"step-{step:08d}.ckpt" for step in steps]


@pytest.fixture
def limit_file_size():
    """Writes beyond so many bytes fail as on a full disk (Python ignores the signal); without a size as before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The latest.


def test_every_so_many_steps_and_at_the_end_one_is_saved_and_the_newest_stay(tmp_path):
    latest = LatestCheckpoint(every_n_steps=2, keep=2)
    written = fit(tmp_path, latest, steps=7)
    folder = tmp_path / "checkpoints"
    assert written == step_names(2, 4, 6, 7)
    assert latest.dirpath == folder
    assert names(folder) == ["last.ckpt", *step_names(6, 7)]
    assert os.readlink(folder / "last.ckpt") == "step-00000007.ckpt"
    assert [step_of(folder / name) for name in names(folder)] == [7, 6, 7]
    assert checkpoints.newest(folder) == folder / "step-00000007.ckpt"


def test_the_last_step_is_not_saved_twice_and_one_may_be_kept(tmp_path):
    written = fit(tmp_path, LatestCheckpoint(every_n_steps=3, keep=1), steps=6)
    assert written == step_names(3, 6)
    assert names(tmp_path / "checkpoints") == ["last.ckpt", *step_names(6)]


def test_batches_that_are_no_steps_save_nothing(tmp_path):
    task = Task(skipped=(1, 2, 5, 6, 7))
    assert fit(tmp_path, LatestCheckpoint(every_n_steps=2), task=task, steps=5) == step_names(2, 4, 5)
    assert task.batches == 10


@pytest.mark.parametrize(
    ("at", "to", "expected"),
    [
        (5, 2, [2, 4, 2, 4, 6]),  # to a step that is saved: what training goes on from is the last one at once
        (5, 1, [2, 4, 2, 4, 6]),
        (4, 0, [2, 2, 4, 6]),  # in the batch that would have been saved
        (3, 2, [2, 4, 6]),  # to the very one that was saved last
    ],
)
def test_after_a_rollback_the_same_steps_are_saved_again(tmp_path, at, to, expected):
    assert fit(tmp_path, RollBack(at, to), LatestCheckpoint(every_n_steps=2), steps=6) == step_names(*expected)
    assert names(tmp_path / "checkpoints") == ["last.ckpt", *step_names(4, 6)]


def test_checkpoints_from_before_a_rollback_are_removed_when_the_next_one_is_written(tmp_path):
    seen: list[list[str]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            seen.append(names(tmp_path / "checkpoints") if task.batches > 1 else [])

    fit(tmp_path, Look(), RollBack(5, 1), LatestCheckpoint(every_n_steps=2, keep=3), steps=6)
    assert seen[5] == ["last.ckpt", *step_names(2, 4)]  # rolled back to 1; nothing newer stands yet
    assert seen[6] == ["last.ckpt", *step_names(2)]
    assert names(tmp_path / "checkpoints") == ["last.ckpt", *step_names(2, 4, 6)]


def test_a_resumed_run_keeps_other_files_in_its_folder(tmp_path):
    folder = tmp_path / "checkpoints"
    fit(tmp_path, LatestCheckpoint(every_n_steps=2), steps=4)
    others = ["best.ckpt", "epoch=3-step=1.ckpt", "step-1.ckpt", "step-00000001.ckpt.bak", "my-step-00000001.ckpt"]
    for name in others:
        (folder / name).write_text("another's")
    written = fit(tmp_path, LatestCheckpoint(every_n_steps=2), steps=7, ckpt_path=folder / "last.ckpt")
    assert written == step_names(6, 7)
    assert set(names(folder)) == {*others, "last.ckpt", *step_names(6, 7)}
    assert all((folder / name).read_text() == "another's" for name in others)


def test_a_run_of_an_older_version_resumes_and_its_last_becomes_a_link(tmp_path):
    folder = tmp_path / "checkpoints"
    fit(tmp_path, LatestCheckpoint(every_n_steps=2), steps=2)
    (folder / "step-00000002.ckpt").rename(folder / "last.ckpt")
    fit(tmp_path, LatestCheckpoint(every_n_steps=2), steps=4, ckpt_path=folder / "last.ckpt")
    assert names(folder) == ["last.ckpt", *step_names(4)]
    assert os.readlink(folder / "last.ckpt") == "step-00000004.ckpt"


@pytest.mark.parametrize("held", ["last.ckpt", "step-00000002.ckpt", "best.ckpt"])
def test_a_folder_with_checkpoints_of_another_run_is_refused(tmp_path, held):
    folder = tmp_path / "checkpoints"
    fit(tmp_path / "other", LatestCheckpoint(every_n_steps=2), steps=2)
    folder.mkdir()
    for name in (held, ".step-00000004-abcd1234.ckpt"):  # the latter may be in the making
        (folder / name).write_text("another's")
    other = tmp_path / "other" / "checkpoints" / "last.ckpt"
    for ckpt_path in (None, other):
        with pytest.raises(UserError) as error:
            fit(tmp_path, LatestCheckpoint(every_n_steps=2), steps=4, ckpt_path=ckpt_path)
        assert str(error.value) == (
            f"Expected a new run's folder, got one with {folder / held}; resume it by --ckpt_path {folder / held} "
            "or --resume auto, or name another by --trainer.logger.init_args.name."
        )
    assert names(folder) == sorted([held, ".step-00000004-abcd1234.ckpt"])
    callbacks = [LatestCheckpoint(every_n_steps=1), BestCheckpoint()]
    assert fit(tmp_path, *callbacks, task=Task(scores=[20]), steps=2, fast_dev_run=True) == []
    assert names(folder) == sorted([held, ".step-00000004-abcd1234.ckpt"])
    # From another run's checkpoint into a folder of its own.
    assert fit(tmp_path / "new", LatestCheckpoint(every_n_steps=2), steps=4, ckpt_path=other) == step_names(4)


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    fit(tmp_path, LatestCheckpoint(every_n_steps=2), steps=2)
    kept = [".gitignore", ".notes-abcd1234.ckpt", ".last-abcd1234.txt", ".best-of-all.ckpt"]
    (folder / ".last-0123abcd.ckpt").symlink_to("absent.ckpt")
    with files.replacing(folder / "best.ckpt") as written:  # by a process that is alive
        for name in [".step-00000004-abcd_234.ckpt", ".best-abcd1234.ckpt", *kept]:
            (folder / name).touch()
        fit(tmp_path, LatestCheckpoint(every_n_steps=2), steps=3, ckpt_path=folder / "last.ckpt")
        assert names(folder) == sorted([*kept, written.name, "last.ckpt", *step_names(2, 3)])


def stub(folder, step, ckpt_path=None):
    """A trainer for the callback's eyes, on one rank."""

    def save(path):
        checkpoint = {"state_dict": {"weights": torch.full((1000,), trainer.global_step)}}
        checkpoints.AtomicCheckpointIO().save_checkpoint({**checkpoint, "global_step": trainer.global_step}, path)

    trainer = SimpleNamespace(
        global_step=step,
        ckpt_path=ckpt_path,
        default_root_dir=folder,
        loggers=[],
        is_global_zero=True,
        fast_dev_run=False,
        strategy=SimpleNamespace(broadcast=lambda value: value, barrier=lambda name: None),
        save_checkpoint=save,
    )
    return trainer


def begun(trainer, **arguments):
    callback = LatestCheckpoint(**arguments)
    callback.setup(trainer, None, "fit")
    callback.on_fit_start(trainer, None)
    return callback


class Killed(BaseException):
    pass


def die_at(monkeypatch, moment):
    """From the `moment`-th call that changes the disk on, each fails: nothing cleans up after a kill."""
    calls = itertools.count()

    def dying(function):
        def call(*args, **kwargs):
            if next(calls) >= moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    for module, name in [(os, "fsync"), (os, "replace"), (os, "symlink"), (os, "unlink"), (torch, "save")]:
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    return calls


def test_a_kill_between_any_two_changes_leaves_an_intact_last_checkpoint(tmp_path, monkeypatch):
    seen = set()
    for moment in itertools.count():
        folder = tmp_path / str(moment) / "checkpoints"
        trainer = stub(folder.parent, 1)
        callback = begun(trainer, every_n_steps=1, keep=2)
        for step in (1, 2, 3):
            trainer.global_step = step
            callback.save(trainer)
        trainer.global_step = 4
        with monkeypatch.context() as patch:
            die_at(patch, moment)
            try:
                callback.save(trainer)
                killed = False
            except Killed:
                killed = True
        assert (folder / "last.ckpt").is_symlink()
        checkpoints.check(folder / "last.ckpt")
        reports: list[str] = []
        newest = checkpoints.newest(folder, reports.append)
        assert reports == []
        last, most = step_of(folder / "last.ckpt"), step_of(newest)
        assert (last, most) in [(3, 3), (3, 4), (4, 4)]
        assert len(checkpoints.history(folder)) >= 2
        seen.add((last, most))

        resumed = stub(folder.parent, 0, ckpt_path=newest)
        callback = begun(resumed, every_n_steps=1, keep=2)
        assert not [name for name in names(folder) if name.startswith(".")]
        for resumed.global_step in range(most + 1, 7):
            callback.save(resumed)
        assert names(folder) == ["last.ckpt", *step_names(5, 6)]
        if not killed:
            break
    assert moment > 6  # write, flush, move, flush, link, move, flush, remove
    assert seen == {(3, 3), (3, 4), (4, 4)}


def test_save_writes_a_step_once(tmp_path):
    trainer = stub(tmp_path, 0)
    callback = begun(trainer)
    callback.save(trainer)
    assert not (tmp_path / "checkpoints").exists()  # no step, nothing to save
    trainer.global_step = 5
    callback.save(trainer)
    written = (tmp_path / "checkpoints" / "step-00000005.ckpt").stat()
    callback.save(trainer)
    callback.on_train_end(trainer, None)
    assert (tmp_path / "checkpoints" / "step-00000005.ckpt").stat() == written
    assert names(tmp_path / "checkpoints") == ["last.ckpt", *step_names(5)]


def test_only_rank_zero_touches_the_folder_and_all_save_together(tmp_path):
    trainer, saved = stub(tmp_path, 4), []
    trainer.is_global_zero = False
    trainer.save_checkpoint = saved.append
    callback = begun(trainer)
    callback.save(trainer)
    assert saved == [tmp_path / "checkpoints" / "step-00000004.ckpt"]
    assert not (tmp_path / "checkpoints").exists()
    trainer.strategy.broadcast = lambda _: Path("rank zero's")
    callback.setup(trainer, None, "fit")
    assert callback.dirpath == Path("rank zero's")


def test_a_full_disk_ends_training_and_keeps_intact_checkpoints(tmp_path, limit_file_size):
    class Fill(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            if trainer.global_step == 3:
                limit_file_size((tmp_path / "checkpoints" / "last.ckpt").stat().st_size // 2)

    with pytest.raises(UserError) as error:
        fit(tmp_path, Fill(), LatestCheckpoint(every_n_steps=2), steps=6)
    limit_file_size()
    folder = tmp_path / "checkpoints"
    assert str(error.value) == (
        f"Expected room to write {folder / 'step-00000004.ckpt'}, got 'File too large'; "
        f"{folder / 'step-00000002.ckpt'} is intact. Free space and continue with --resume auto."
    )
    assert names(folder) == ["last.ckpt", *step_names(2)]
    written = fit(tmp_path, LatestCheckpoint(every_n_steps=2), steps=6, ckpt_path=checkpoints.newest(folder))
    assert written == step_names(4, 6)


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"keep": 0}])
def test_numbers_that_cannot_work_are_refused(arguments):
    with pytest.raises(UserError, match="Expected every_n_steps and keep to be 1 or more, got"):
        LatestCheckpoint(**arguments)


# Where.


@pytest.mark.parametrize("dirpath", [None, "elsewhere/checkpoints"])
@pytest.mark.parametrize(
    "logger",
    [
        lambda: False,
        lambda: CSVLogger("runs", name="a"),
        lambda: TensorBoardLogger("runs", name="b", version=""),
        lambda: TensorBoardLogger("runs", name=None, version=3),
    ],
)
def test_the_folder_is_that_of_lightnings_callback(tmp_path, monkeypatch, logger, dirpath):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(logger=logger(), enable_checkpointing=False, accelerator="cpu")
    reference = ModelCheckpoint(dirpath=dirpath)
    latest, best = LatestCheckpoint(dirpath=dirpath), BestCheckpoint(dirpath=dirpath)
    asked_before = latest.folder(trainer)
    for callback in (reference, latest, best):
        callback.setup(trainer, None, "fit")
    assert latest.dirpath == Path(best.dirpath) == Path(reference.dirpath) == asked_before


# The best.


def validated(folder, scores, **arguments):
    """Train with these scores after steps 2, 4, 6, … → the step of best.ckpt."""
    callbacks = [BestCheckpoint(**arguments.pop("best", {})), *arguments.pop("callbacks", [])]
    steps = arguments.pop("steps", 2 * len(scores))
    fit(folder, *callbacks, task=Task(scores=scores), steps=steps, **arguments)
    path = folder / "checkpoints" / "best.ckpt"
    return step_of(path) if path.exists() else None


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("mode", "scores", "expected"),
    [
        ("max", [20, 30, 25], 4),
        ("max", [30, NAN, 25], 2),
        ("max", [NAN, 20, NAN], 4),
        ("max", [NAN, NAN], None),
        ("max", [-INF, 20], 4),
        ("max", [20, 20], 2),
        ("min", [30, 20, 25], 4),
        ("min", [NAN, 20, NAN], 4),
        ("min", [INF, NAN], None),
    ],
)
def test_the_best_is_the_best_number(tmp_path, mode, scores, expected):
    assert validated(tmp_path, scores, best={"mode": mode}) == expected


def interrupted(tmp_path, score):
    """A run whose best is of step 4, validated with `score`, and whose newest other checkpoint is of step 3."""
    latest = LatestCheckpoint(every_n_steps=3)
    assert validated(tmp_path, [20, score], callbacks=[latest], steps=4) == 4
    folder = tmp_path / "checkpoints"
    (folder / "step-00000004.ckpt").unlink()
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").symlink_to("step-00000003.ckpt")
    return folder


@pytest.mark.parametrize(("score", "expected"), [(25, 4), (35, 6)])
def test_a_run_that_resumes_from_before_the_best_does_not_replace_it_by_a_worse_one(tmp_path, score, expected):
    folder = interrupted(tmp_path, 30)
    last = folder / "last.ckpt"
    state = checkpoints.read(last)["callbacks"]
    assert {float(value["best_model_score"]) for value in state.values() if value["monitor"] == "val/psnr"} == {20}
    assert validated(tmp_path, [1, score], ckpt_path=last, steps=7) == expected


def test_the_best_is_known_in_a_folder_that_was_moved_and_is_not_that_of_another_run(tmp_path):
    folder = interrupted(tmp_path / "first", 30)
    (tmp_path / "first").rename(tmp_path / "moved")
    last = tmp_path / "moved" / "checkpoints" / "last.ckpt"
    assert validated(tmp_path / "moved", [1, 25], ckpt_path=last, steps=7) == 4
    assert validated(tmp_path / "new", [1, 25], ckpt_path=last, steps=7) == 6
    assert not folder.exists()


def test_a_damaged_best_is_named_and_replaced(tmp_path):
    folder = interrupted(tmp_path, 30)
    content = bytearray((folder / "best.ckpt").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / "best.ckpt").write_bytes(content)
    with pytest.warns(UserWarning, match=r"the next validation replaces best\.ckpt: .*best\.ckpt: it is damaged"):
        assert validated(tmp_path, [1, 2], ckpt_path=folder / "last.ckpt", steps=7) == 6
    checkpoints.check(folder / "best.ckpt")


def test_after_a_rollback_a_step_can_become_the_best_again(tmp_path):
    scores = [20, 30, 40]  # at steps 2, 4 and, after the rollback, 4 again
    assert validated(tmp_path, scores, callbacks=[RollBack(5, 3)], steps=5) == 4
    state = checkpoints.read(tmp_path / "checkpoints" / "best.ckpt")["callbacks"]
    assert [float(value["best_model_score"]) for value in state.values()] == [40]
