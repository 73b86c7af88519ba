"""A resumed training continues with the very next batch; ranks have equally many; workers outlive a SIGTERM."""

import multiprocessing
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tiny import tiny_task
from tiny import trainer as video_trainer

from vidtwin.datamodules.data_module import ClipDataModule
from vidtwin.datamodules.loader import WorkerLoader
from vidtwin.datamodules.sampler import ClipSampler
from vidtwin.datamodules.ucf101 import UCF101

Make = Callable[..., ClipDataModule]
Step = tuple[list[str], list[int], list[int]]


@pytest.fixture(scope="module")
def make(small_ucf: Path) -> Make:
    """8 training clips: 4 batches of 2 are an epoch, or 2 batches of 3."""
    small: dict[str, Any] = {"num_frames": 4, "resolution": 16, "batch_size": 2, "num_workers": 0}
    return lambda **kwargs: UCF101(str(small_ucf), **(small | kwargs))


class Model(LightningModule):
    """One number that learns nothing. Like AutoencoderTask it steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.manual_backward(self.weight.sum())
        self.optimizers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None: ...

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Diary(Callback):
    """Names, start frames and sums of the clips of each batch that was trained on."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        sums = batch["clip"].double().sum((1, 2, 3, 4)).mul(1000).long().tolist()
        self.steps.append((batch["name"], batch["start_frame"].tolist(), sums))


class SaveAtEveryMoment(Diary):
    """Checkpoints of all moments at which one could be saved, by moment and number of batches until then."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.saved: dict[tuple[str, int], Path] = {}

    def save(self, trainer, moment):
        if not trainer.sanity_checking:
            path = self.folder / f"{moment}-{len(self.steps)}.ckpt"
            trainer.save_checkpoint(path)
            self.saved[moment, len(self.steps)] = path

    def on_train_epoch_start(self, trainer, model):
        self.save(trainer, "epoch start")

    def on_train_batch_start(self, trainer, model, *arguments):
        self.save(trainer, "batch start")

    def on_train_batch_end(self, trainer, model, *arguments):
        super().on_train_batch_end(trainer, model, *arguments)
        self.save(trainer, "batch end")

    def on_validation_end(self, trainer, model):
        self.save(trainer, "validation end")

    def on_train_epoch_end(self, trainer, model):
        self.save(trainer, "epoch end")

    def on_train_end(self, trainer, model):
        self.save(trainer, "train end")


def trainer(folder: Path, **arguments: Any) -> Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    defaults |= {"enable_model_summary": False, "use_distributed_sampler": False, "num_sanity_val_steps": 1}
    return Trainer(**(defaults | {"devices": 1, "default_root_dir": folder} | arguments))


def train(
    folder: Path,
    data: ClipDataModule,
    ckpt_path: Path | None = None,
    diary: Diary | None = None,
    model: LightningModule | None = None,
    **arguments: Any,
) -> list[Step]:
    diary = diary or Diary()
    trainer(folder, callbacks=[diary], **arguments).fit(model or Model(), datamodule=data, ckpt_path=ckpt_path)
    return diary.steps


# By steps as in configs/, with validations in the middle of epochs and at their ends; by epochs.
MODES: dict[str, dict[str, Any]] = {
    "steps": {"max_steps": 9, "check_val_every_n_epoch": None, "val_check_interval": 2},
    "steps and epochs": {"max_steps": 9},
    "epochs": {"max_epochs": 3, "val_check_interval": 2},
}


@pytest.fixture(scope="module")
def undisturbed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> SaveAtEveryMoment:
    """9 steps of two clips: two epochs and a quarter."""
    saver = SaveAtEveryMoment(tmp_path_factory.mktemp("undisturbed"))
    train(saver.folder, make(), diary=saver, **MODES["steps"])
    return saver


@pytest.mark.parametrize(
    ("mode", "batch_size"),
    [
        ("steps", 2),
        ("epochs", 3),
        pytest.param("steps", 3, marks=pytest.mark.slow),
        pytest.param("steps and epochs", 2, marks=pytest.mark.slow),
    ],
)
def test_from_every_checkpoint_the_very_next_batch_follows(make, tmp_path, mode, batch_size):
    saver = SaveAtEveryMoment(tmp_path)
    whole = train(tmp_path, make(batch_size=batch_size), diary=saver, **MODES[mode])
    assert len({str(step) for step in whole}) == len(whole)
    moments = {moment for moment, _ in saver.saved}
    assert {"batch end", "validation end", "epoch end", "train end"} < moments
    for (moment, steps), path in saver.saved.items():
        if (mode, moment) == ("epochs", "epoch start"):
            continue  # the right batches, but Lightning trains an epoch less
        rest = train(tmp_path, make(batch_size=batch_size), path, **MODES[mode])
        assert rest == whole[steps:], f"{moment} after {steps} batches"


def test_a_run_that_max_steps_ended_within_an_epoch_resumes_there(make, tmp_path, undisturbed):
    for steps in range(1, 9):
        saver = SaveAtEveryMoment(tmp_path)
        first = train(tmp_path, make(), diary=saver, **(MODES["steps"] | {"max_steps": steps}))
        rest = train(tmp_path, make(), saver.saved["train end", steps], **MODES["steps"])
        assert first + rest == undisturbed.steps


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_may_be_interrupted_again_and_again(make, tmp_path, undisturbed, workers):
    path, steps = None, []
    for end in (1, 2, 4, 7, 8, 9) if workers == 0 else (1, 4, 9):
        saver = SaveAtEveryMoment(tmp_path)
        steps += train(tmp_path, make(num_workers=workers), path, saver, **(MODES["steps"] | {"max_steps": end}))
        # In turn as training left it, and as a job that was killed left it.
        path = saver.saved["train end" if end % 2 else "batch end", end - len(steps) + len(saver.steps)]
    assert steps == undisturbed.steps


@pytest.mark.parametrize("workers", [0, 2])
def test_our_trainer_and_task_resume_so_too(make, tmp_path, workers):
    def run(path: Path | None = None, diary: Diary | None = None) -> list[Step]:
        diary = diary or Diary()
        arguments = MODES["steps"] | {"max_steps": 7, "callbacks": [diary], "enable_checkpointing": False}
        data = make(num_workers=workers, resolution=32)
        video_trainer(tmp_path, **arguments).fit(tiny_task(), datamodule=data, ckpt_path=path)
        return diary.steps

    saver = SaveAtEveryMoment(tmp_path)
    whole = run(diary=saver)
    moments = [("batch end", 4), ("validation end", 4), ("batch end", 1), ("validation end", 6)]
    for moment, steps in moments if workers == 0 else moments[:2]:
        assert run(saver.saved[moment, steps]) == whole[steps:]


@pytest.mark.parametrize(
    "arguments", [{"limit_train_batches": 3}, {"reload_dataloaders_every_n_epochs": 1}, {"limit_val_batches": 0}]
)
def test_lightnings_epochs_do_not_move_the_data(make, tmp_path, undisturbed, arguments):
    saver = SaveAtEveryMoment(tmp_path)
    assert train(tmp_path, make(), diary=saver, **(MODES["steps"] | arguments)) == undisturbed.steps
    rest = train(tmp_path, make(), saver.saved["batch end", 5], **(MODES["steps"] | arguments))
    assert rest == undisturbed.steps[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_may_ask_for_the_number_of_steps(make, tmp_path, undisturbed, workers):
    class Asking(Model):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 9  # starts the workers, before the count is restored
            return super().configure_optimizers()

    path = undisturbed.saved["batch end", 6]
    rest = train(tmp_path, make(num_workers=workers), path, model=Asking(), max_epochs=3, **MODES["steps"])
    assert rest == undisturbed.steps[6:]


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_another_batch_size_resumes_with_the_next_clips(make, tmp_path, undisturbed, batch_size):
    path = undisturbed.saved["batch end", 5]  # the first two clips of epoch 1
    data = make(batch_size=batch_size)
    rest = [name for names, *_ in train(tmp_path, data, path, **MODES["steps"]) for name in names]
    videos = data.videos("train")
    epochs = [[videos[index].name for index in np.random.default_rng((0, epoch)).permutation(8)] for epoch in (1, 2, 3)]
    left, whole = (count // batch_size * batch_size for count in (6, 8))
    expected = epochs[0][2:][:left] + epochs[1][:whole] + epochs[2][:whole]
    assert rest == expected[: 4 * batch_size]


def test_a_checkpoint_without_a_place_restarts_its_epoch(make, tmp_path, undisturbed):
    checkpoint = torch.load(undisturbed.saved["batch end", 6], weights_only=True)
    assert checkpoint.pop("UCF101") == {"epoch": 1, "clips": 4, "batches": 6}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        rest = train(tmp_path, make(), tmp_path / "old.ckpt", **MODES["steps"])
    assert rest == undisturbed.steps[4:7]


def test_earlier_runs_of_a_data_module_move_no_training(make, tmp_path, undisturbed):
    data, path = make(), undisturbed.saved["batch end", 5]
    run = trainer(tmp_path, **MODES["steps"])
    run.test(Model(), datamodule=data, ckpt_path=path, verbose=False)
    assert data.state_dict() == {}
    for _ in range(2):
        assert train(tmp_path, data, **MODES["steps"]) == undisturbed.steps
        assert data.state_dict() == {"epoch": 2, "clips": 2, "batches": 9}
        assert train(tmp_path, data, path, **MODES["steps"]) == undisturbed.steps[5:]


def test_no_warning_says_that_the_data_can_not_be_resumed(make, tmp_path, undisturbed):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(tmp_path, make(), undisturbed.saved["batch end", 5], **MODES["steps"])
    assert not [warning for warning in seen if "not resumable" in str(warning.message)]


GRID = [
    (clips, batch_size, ranks) for clips in range(1, 14) for batch_size in (1, 2, 3, 5) for ranks in (1, 2, 3, 4)
    if clips >= ranks
]  # fmt: skip


def share_of(rank: int, clips: int, batch_size: int, ranks: int, place: tuple[int, int]) -> list[tuple[int, int]]:
    sampler = ClipSampler(clips, True, 7, rank, ranks, batch_size)
    sampler.start = lambda: place
    keys = list(sampler)
    assert len(keys) == len(sampler)
    return keys


def test_ranks_have_equally_many_batches_and_share_the_order_from_any_place():
    for clips, batch_size, ranks in GRID:
        size = min(batch_size, clips // ranks)
        whole = clips // ranks // size  # batches of an epoch: full ones, or the only one that can't be filled
        for place in range(clips + 2):  # also beyond the end, as of a checkpoint from a larger data set
            shares = [share_of(rank, clips, batch_size, ranks, (3, place)) for rank in range(ranks)]
            assert [len(share) for share in shares] == [whole * size] * ranks
            # Interleaved, the shares are the shuffled epoch from the place on, then the next from its beginning.
            order = [key for keys in zip(*shares, strict=True) for key in keys]
            left = max(0, clips - place) // (ranks * size) * ranks * size
            here, following = ([(e, int(i)) for i in shuffled(clips, e)] for e in (3, 4))
            assert order == (here[place : place + left] + following)[: len(order)]


def shuffled(clips: int, epoch: int) -> Any:
    return np.random.default_rng((7, epoch)).permutation(clips)


def test_every_step_of_every_layout_resumes_where_it_was():
    for clips, batch_size, ranks in GRID:
        sampler = ClipSampler(clips, True, 7, 0, ranks, batch_size)
        size = min(batch_size, clips // ranks)
        for rank in (0, ranks - 1):
            epochs = [share_of(rank, clips, batch_size, ranks, (epoch, 0)) for epoch in range(3)]
            whole = [key for keys in epochs for key in keys]
            for step in range(2 * sampler.steps_per_epoch):
                rest = share_of(rank, clips, batch_size, ranks, sampler.after((0, 0), step))
                assert rest == whole[step * size :][: len(rest)]


def on_rank(rank: int, ranks: int, data: ClipDataModule, batches: int) -> ClipDataModule:
    """The data as one of several processes sees them, each of which has trained so many batches."""
    counted = SimpleNamespace(total=SimpleNamespace(processed=batches))
    loop = SimpleNamespace(
        epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)),
        epoch_loop=SimpleNamespace(batch_progress=counted),
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=ranks, num_devices=ranks, strategy=strategy, fit_loop=loop,
        state=SimpleNamespace(fn="fit"),
    )  # fmt: skip
    return data


def names_of(data: ClipDataModule, batches: int) -> list[str]:
    return [name for batch in islice(data.train_dataloader(), batches) for name in batch["name"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_resume_and_so_does_one_in_their_place(make, workers):
    small = {"batch_size": 1, "num_workers": workers}
    both = [on_rank(rank, 2, make(**small), 0) for rank in (0, 1)]
    whole = [names_of(data, 4) for data in both]
    order = [name for pair in zip(*whole, strict=True) for name in pair]
    for data in both:
        data.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 3  # type: ignore[union-attr]
    states = [data.state_dict() for data in both]
    assert states == [{"epoch": 0, "clips": 6, "batches": 3}] * 2
    for rank in (0, 1):
        data = on_rank(rank, 2, make(**small), 3)
        data.load_state_dict(states[0])
        assert names_of(data, 1) == whole[rank][3:]
    alone = on_rank(0, 1, make(**small), 3)
    alone.load_state_dict(states[0])
    assert names_of(alone, 2) == order[6:]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterator_draws_nothing_from_the_global_generator(make, workers):
    data = make(num_workers=workers)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        before = torch.get_rng_state()
        next(iter(loader))
        assert torch.equal(torch.get_rng_state(), before)


def test_workers_outlive_a_schedulers_sigterm_and_end_with_the_main_process(make):
    loader = make(num_workers=2, batch_size=1).train_dataloader()
    may_start, init = multiprocessing.Event(), loader.worker_init_fn
    loader.worker_init_fn = lambda worker: (may_start.wait(60), init(worker))
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    send = f"import os; [os.kill(pid, 15) for pid in {[worker.pid for worker in workers]}]"
    subprocess.run([sys.executable, "-c", send], check=True)  # to workers that have not begun
    may_start.set()
    next(batches)
    subprocess.run([sys.executable, "-c", send], check=True)
    assert len(list(batches)) == 7
    assert len(workers) == 2
    for worker in workers:  # what Python does at its exit, without a limit of time
        worker.terminate()
        worker.join(10)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # the main process still gets it


def test_a_worker_of_a_fork_server_ends_with_the_main_process_which_is_not_its_parent():
    loader = WorkerLoader([1, 2, 3], batch_size=1, num_workers=1, multiprocessing_context="forkserver")
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    (worker,) = set(multiprocessing.active_children()) - others
    next(batches)
    subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, 15)"], check=True)  # a scheduler's
    assert len(list(batches)) == 2
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
