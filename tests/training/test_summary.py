"""The summary at the start of a training."""

import logging

import pytest
from lightning.pytorch.callbacks import ModelSummary
from tiny import Clips, tiny_task, trainer


@pytest.mark.parametrize("freeze", [[], ["encoder"]])
def test_parts_and_trained_parameters_are_shown_once_without_flops(tmp_path, caplog, freeze):
    task = tiny_task(freeze=freeze)
    with caplog.at_level(logging.INFO, logger=ModelSummary.__module__):
        run = trainer(tmp_path, 3, enable_model_summary=True)
        run.fit(task, datamodule=Clips())
    (text,) = [record.getMessage() for record in caplog.records if "Params" in record.getMessage()]
    assert "FLOPs" not in text
    assert "Flops" not in text
    own = task.autoencoder
    count = sum(p.numel() for p in own.parameters())
    frozen = sum(p.numel() for p in own.encoder.parameters()) if freeze else 0
    assert f"{count - frozen:,} of {count:,} parameters are trained" in text
    header, rule, *rows = text.strip().splitlines()
    assert [row.split("|")[1].strip() for row in rows[:-1]] == ["autoencoder", "loss", "metrics"]
    assert set(rule) == {"-"}
    assert max(map(len, [header, *rows[:-1]])) <= len(rule)


def test_a_summary_of_the_users_own_replaces_it(tmp_path):
    own = ModelSummary(max_depth=2)
    run = trainer(tmp_path, 1, enable_model_summary=True, callbacks=[own])
    assert [callback for callback in run.callbacks if isinstance(callback, ModelSummary)] == [own]
    assert not any(isinstance(c, ModelSummary) for c in trainer(tmp_path, 1).callbacks)
