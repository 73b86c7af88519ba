"""The running average of the weights."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import Clips, tiny_model, tiny_task, trainer
from torch import nn

from vidtwin.apply.options import SessionOptions
from vidtwin.apply.session import Session
from vidtwin.errors import UserError
from vidtwin.metrics.frames import psnr
from vidtwin.storage import checkpoints
from vidtwin.training.callbacks.checkpoint import LatestCheckpoint
from vidtwin.training.callbacks.ema import WeightAverage


def test_the_average_is_the_formula() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])
    average, expected = WeightAverage(model, 0.4), torch.tensor([[1.0, 2.0]])
    for step in range(1, 7):
        model.weight.data = torch.randn(1, 2, generator=torch.Generator().manual_seed(step))
        decay = min(0.4, (1 + step) / (10 + step))  # the warm-up ends in between
        expected = decay * expected + (1 - decay) * model.weight.data
        average.update(model)
        torch.testing.assert_close(average.values["weight"], expected)


def test_an_exchange_gives_the_model_the_average_and_a_second_one_its_own() -> None:
    model = nn.Linear(2, 1)
    average = WeightAverage(model, 0.9)
    own = {name: p.detach().clone() + 1 for name, p in model.named_parameters()}
    mean = {name: value.clone() for name, value in average.values.items()}
    model.load_state_dict(own)
    average.exchange(model)
    torch.testing.assert_close(dict(model.state_dict()), mean, rtol=0, atol=0)
    average.exchange(model)
    torch.testing.assert_close(dict(model.state_dict()), own, rtol=0, atol=0)
    torch.testing.assert_close(average.values, mean, rtol=0, atol=0)


def test_only_trained_parameters_are_averaged() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    model[0].requires_grad_(False)
    assert set(WeightAverage(model, 0.9).values) == {"1.weight", "1.bias"}


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_a_decay_that_cannot_work_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=r"model\.ema_decay between 0 and 1"):
        WeightAverage(nn.Linear(1, 1), decay)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights after each of 5 steps, the logged validation, and the checkpoint."""

    class Weights(Callback):
        history: list[dict[str, torch.Tensor]]

        def on_train_start(self, trainer, task):
            self.history = [self._copy(task)]

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            self.history.append(self._copy(task))

        def _copy(self, task):
            return {name: p.detach().clone() for name, p in task.autoencoder.named_parameters()}

    folder = tmp_path_factory.mktemp("ema")
    weights = Weights()
    saved = LatestCheckpoint(every_n_steps=100, dirpath=str(folder))
    run = trainer(folder, 5, callbacks=[weights, saved], val_check_interval=5, check_val_every_n_epoch=None)
    run.fit(tiny_task(ema_decay=0.9, use_ema=True, lr=1e-2), datamodule=Clips())
    return weights.history, run, folder / "last.ckpt"


def expected_average(history):
    average = history[0]
    for step, weights in enumerate(history[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in weights.items()}
    return average


def test_training_averages_once_a_step_and_saves_it(trained):
    history, _, path = trained
    checkpoint = checkpoints.read(path)
    assert checkpoint["ema"]["updates"] == 5
    torch.testing.assert_close(checkpoint["ema"]["values"], expected_average(history))
    torch.testing.assert_close(
        {name: checkpoints.autoencoder_weights(checkpoint)[name] for name in history[-1]}, history[-1], rtol=0, atol=0
    )


def test_a_checkpoint_of_weights_alone_has_the_average_too(trained, tmp_path):
    history, run, _ = trained
    path = tmp_path / "weights.ckpt"
    run.save_checkpoint(path, weights_only=True)
    assert "optimizer_states" not in checkpoints.read(path)
    for ema, wanted in ((True, expected_average(history)), (False, history[-1])):
        model = checkpoints.load_autoencoder(path, ema=ema)
        torch.testing.assert_close(dict(model.named_parameters()), wanted)


def test_validation_measures_the_average(trained):
    history, run, _ = trained
    model = tiny_model().eval()
    data = Clips()
    clip = torch.stack([data.dataset("val")[i]["clip"] for i in range(6)])
    clip = data.on_after_batch_transfer({"clip": clip}, 0)["clip"]
    with torch.no_grad():
        model.load_state_dict(expected_average(history), strict=False)
        averaged = psnr(model(clip).clip, clip).mean()
        model.load_state_dict(history[-1], strict=False)
        last = psnr(model(clip).clip, clip).mean()
    assert float(run.callback_metrics["val/psnr"]) == pytest.approx(float(averaged), abs=1e-4)
    assert abs(float(averaged) - float(last)) > 1e-2  # so that the test can tell them apart


def test_evaluation_takes_the_average_by_option(trained, tmp_path):
    history, _, path = trained
    for use_ema, wanted in ((True, expected_average(history)), (False, history[-1])):
        task = tiny_task(use_ema=use_ema)
        trainer(tmp_path).validate(task, datamodule=Clips(), ckpt_path=path, verbose=False)
        torch.testing.assert_close(dict(task.autoencoder.named_parameters()), wanted)
    model = checkpoints.load_autoencoder(path, ema=True)
    torch.testing.assert_close(dict(model.named_parameters()), expected_average(history))


def test_a_session_takes_the_average_by_option(trained):
    history, _, path = trained
    for use_ema, wanted in ((True, expected_average(history)), (False, history[-1])):
        session = Session(SessionOptions(str(path), use_ema=use_ema, accelerator="cpu"))
        torch.testing.assert_close(dict(session.model.named_parameters()), wanted)


def test_validation_after_training_in_one_process_uses_the_average_too(tmp_path):
    task, run = (
        tiny_task(ema_decay=0.9, use_ema=True, lr=1e-2),
        trainer(tmp_path, 5, val_check_interval=5, check_val_every_n_epoch=None),
    )
    run.fit(task, datamodule=Clips())
    validated = float(run.callback_metrics["val/psnr"])
    own = {name: p.clone() for name, p in task.autoencoder.named_parameters()}
    (means,) = run.validate(task, datamodule=Clips(), verbose=False)
    assert means["val/psnr"] == pytest.approx(validated, abs=1e-4)
    torch.testing.assert_close(dict(task.autoencoder.named_parameters()), own, rtol=0, atol=0)


def test_a_checkpoint_of_a_validation_that_failed_has_both_in_their_places(tmp_path):
    class Fail(Callback):
        def on_validation_batch_end(self, *arguments):
            raise ZeroDivisionError

    class Keep(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            self.own = {name: p.detach().clone() for name, p in task.autoencoder.named_parameters()}

    keep = Keep()
    run = trainer(tmp_path, 5, callbacks=[keep, Fail()], num_sanity_val_steps=0)
    with pytest.raises(ZeroDivisionError):
        run.fit(tiny_task(ema_decay=0.9, use_ema=True, lr=1e-2), datamodule=Clips())
    run.save_checkpoint(tmp_path / "after.ckpt")
    checkpoint = checkpoints.read(tmp_path / "after.ckpt")
    held = checkpoints.autoencoder_weights(checkpoint)
    assert all(torch.equal(held[name], value) for name, value in keep.own.items())
    assert not all(torch.equal(checkpoint["ema"]["values"][name], value) for name, value in keep.own.items())


def test_a_checkpoint_without_an_average_is_refused_if_use_ema_is_set(tmp_path):
    saved = LatestCheckpoint(every_n_steps=100, dirpath=str(tmp_path))
    trainer(tmp_path, 3, callbacks=[saved]).fit(tiny_task(), datamodule=Clips())
    with pytest.raises(UserError, match=r"without model\.ema_decay"):
        trainer(tmp_path).validate(tiny_task(use_ema=True), datamodule=Clips(), ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"model\.ema_decay \(such as 0\.999"):
        trainer(tmp_path / "new", 3).fit(tiny_task(use_ema=True), datamodule=Clips())
