"""A model card: what is known of a checkpoint, no more, and the text of others stays text."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark.fixture_results import HOSTILE_CLIP, write_results
from huggingface_hub import ModelCard
from sweeping import Pool, checkpoint
from tiny import tiny_model

from vidtwin import cards
from vidtwin.benchmark import card, rows, statistics
from vidtwin.benchmark.loaded_model import AVERAGE, LAST, fingerprint
from vidtwin.cli import main
from vidtwin.errors import UserError

HOSTILE = "</details><script>alert(1)</script> | *b* [x](y) `c`"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint in a run's folder with a metrics.csv."""
    run = tmp_path_factory.mktemp("run")
    path = checkpoint(run / "checkpoints" / "last.ckpt", model=tiny_model())
    lines = ["epoch,step,train/psnr,val/psnr", "0,10,12.5,", "0,20,15.0,14.25", "1,30,,"]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, weights: str) -> Path:
    """Results with a row of these weights and the two references, one of which is better by PSNR."""
    models = {"mine": ("trained", 0.002, 25.0), "temporal_mean": ("reference", 0.06, 29.0)}
    models["mean_colour"] = ("reference", 1e-6, 13.0)
    folder = write_results(tmp_path_factory.mktemp("measured") / "results", models, failed=False, players=False)
    path = folder / "rows" / "mine" / "results.json"
    row = json.loads(path.read_text()) | {"fingerprint": fingerprint(weights), "weights": LAST}
    row["failed_clips"] = [{"name": HOSTILE_CLIP, "start_frame": 12, "reason": "decode gave NaN"}]
    row["unavailable"] = {"lpips": HOSTILE}
    path.write_text(json.dumps(row))
    return folder


def write_card(out: Path, *words: str) -> str:
    assert main(["card", "--out", str(out), *words]) == 0
    return out.read_text()


def test_a_card_has_the_numbers_of_the_folder_with_intervals_and_the_hubs_header(weights, measured, tmp_path, capsys):
    out = tmp_path / "new" / "README.md"
    text = write_card(out, "--ckpt_path", weights, "--results", str(measured), "--license", "mit", "--repo", "me/it")
    assert capsys.readouterr().out.splitlines() == [str(out), str(out.with_name("training_curves.png"))]
    results = rows.read(measured)
    (row,) = (row for row in results.rows if row["name"] == "mine")
    psnr = [clip["psnr"] for clip in results.clips["mine"]]
    ends = statistics.describe(results)["rows"]["mine"]["psnr"]  # all of its clips are the common ones
    assert f"| PSNR (dB) | higher | {np.mean(psnr):.2f} [{ends['low']:.2f}, {ends['high']:.2f}] | " in text
    assert "Reconstructions of 6 clips of 6 videos (6 sources) of UCF101 (6 frames of 8 x 8 at 8 fps), protocol" in text
    assert f"PSNR of single clips is {min(psnr):.2f} to {max(psnr):.2f} dB" in text
    (worse,) = re.findall(r"It is worse than a reference without weights in (.*)\.", text)
    assert {name for name in worse.split(", ") if name[:4] in ("PSNR", "SSIM")} == {
        "PSNR (temporal\\_mean)",
        "SSIM (temporal\\_mean)",
    }
    assert "Clips that it failed on: 1, such as `</script><script>alert(2)</script>.avi`: decode gave NaN." in text
    assert "rFVD of 6 clips: not ranked below 401 clips." in text
    assert f"`{results.protocol['data']['clips_sha256']}`" in text
    assert "Last values: train/psnr 15 at step 20, val/psnr 14.25 at step 20." in text
    assert "![Training curves](training_curves.png)" in text
    assert "`vidtwin reconstruct VIDEO --ckpt_path hf://me/it` does" in text
    assert "`mit` (weights)." in text
    header = ModelCard(text).data
    assert (header.license, header.library_name, header.model_name) == ("mit", "vidtwin", "mine")
    found = {each.metric_type: each for each in header.eval_results}
    assert found["psnr"].metric_value == round(float(np.mean(psnr)), 2)
    assert found["rfvd"].metric_value == row["metrics"]["rfvd"]["value"]
    assert found["psnr"].dataset_name == "UCF101"


def test_the_text_of_others_stays_text(weights, measured, tmp_path):
    text = write_card(tmp_path / "README.md", "--ckpt_path", weights, "--results", str(measured))
    body = text.split("---\n", 2)[2]
    assert '\n\n# After vidtwin convert "last.ckpt" "pretrained"\nmodel = VideoAutoencoder.from_pretrained("pre' in body
    outside_code = "".join(body.split("`")[::2])
    assert "<script" not in outside_code
    assert "&lt;/details&gt;&lt;script&gt;alert(1)" in body
    assert r"\| \*b\* \[x\](y) \`c\`" in body
    assert body.count("<details>") == body.replace("&lt;/details&gt;", "").count("</details>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b", "`a b`"),
        ("`", "`` ` ``"),
        ("a``b", "```a``b```"),
        ("a\n\n# b", "`a # b`"),
        ("", "`  `"),
        ("a|<b>", "`a|<b>`"),
    ],
)
def test_code_holds_any_text_on_one_line(text, expected):
    """CommonMark: a span ends at as many backticks as it begins with, and one space is stripped from both ends."""
    assert cards.code(text) == expected
    assert cards.code(text, cell=True) == expected.replace("|", "\\|")


def test_without_results_logs_or_a_licence_the_card_says_so(tmp_path):
    path = checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", model=tiny_model())
    text = write_card(tmp_path / "README.md", "--ckpt_path", path)
    assert "Not measured: `vidtwin test` does" in text
    assert "Limits" not in text
    assert "curves" not in text
    assert "No licence is stated for these weights." in text
    assert "license" not in ModelCard(text).data.to_dict()
    assert "| `global_step` | `1` |" in text
    assert not (tmp_path / "training_curves.png").exists()


def test_the_row_is_that_of_the_weights(weights, measured, tmp_path):
    results = rows.read(measured)
    mark = fingerprint(weights)
    assert card.find_row(results, mark, None, LAST)["name"] == "mine"
    with pytest.raises(UserError, match="got none; measure it by `vidtwin test --ckpt_path`"):
        card.find_row(results, "00", None, LAST)
    with pytest.raises(UserError, match="got 'mean_colour'; its rows are mine"):
        card.find_row(results, mark, "mean_colour", LAST)
    with pytest.raises(UserError, match=r"weights \(running average\) in .*, got mine \(of the last step\)"):
        card.find_row(results, mark, None, AVERAGE)
    twice = tmp_path / "twice"
    shutil.copytree(measured, twice)
    shutil.copytree(twice / "rows" / "mine", twice / "rows" / "other")
    path = twice / "rows" / "other" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "other"}))
    with pytest.raises(UserError, match="got mine, other; name one by --row"):
        card.find_row(rows.read(twice), mark, None, LAST)
    assert card.find_row(rows.read(twice), mark, "other", LAST)["name"] == "other"
    row = json.loads(path.read_text()) | {"name": "other", "weights": AVERAGE}
    path.write_text(json.dumps(row))
    assert card.find_row(rows.read(twice), mark, None, AVERAGE)["name"] == "other"


def test_codecs_are_no_references_of_a_card(weights, measured, tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(measured, folder)
    shutil.copytree(folder / "rows" / "temporal_mean", folder / "rows" / "x264 26")
    path = folder / "rows" / "x264 26" / "results.json"
    coding = {"curve": "x264 medium", "settings": "CRF 26", "numbers": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "x264 26", "coding": coding}))
    text = write_card(tmp_path / "README.md", "--ckpt_path", weights, "--results", str(folder))
    assert "temporal\\_mean" in text
    assert "x264" not in text


def test_curves_of_tensorboard_are_read(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="", version="")
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0 / (step + 1), "other": 5.0}, step)
    logger.finalize("")
    ((tag, (steps, values)),) = card.read_curves(tmp_path).items()
    assert (tag, steps, values) == ("train/loss", [0, 1, 2], pytest.approx([1, 0.5, 1 / 3]))
    assert card.read_curves(tmp_path / "checkpoints") == {}
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("step,train/psnr\nx,1\n")
    with pytest.raises(UserError, match="Lightning's metrics at"):
        card.read_curves(tmp_path / "csv")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt_path", "absent.ckpt"], "got none at absent.ckpt"),
        (["--ckpt_path", "W", "--license", "My Licence"], "the Hub's name of a licence"),
        (["--ckpt_path", "W", "--row", "a"], "Expected --results with --row a"),
        (["--ckpt_path", "W", "--results", "absent"], "Expected a results folder, got absent"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(weights, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["card", "--out", "README.md", *(weights if word == "W" else word for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_an_existing_card_is_replaced_only_on_request(weights, tmp_path, capsys):
    out = tmp_path / "README.md"
    out.write_text("mine")
    assert main(["card", "--out", str(out), "--ckpt_path", weights]) == 2
    assert "give --overwrite to replace it" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert "# VidTwin" in write_card(out, "--ckpt_path", weights, "--overwrite")
    assert main(["card", "--out", str(tmp_path), "--ckpt_path", weights]) == 2
    assert "README.md" in capsys.readouterr().err


def test_a_pretrained_folder_has_a_card_with_its_record(tmp_path):
    model: Any = Pool()
    model.training_record = {"data": {"fps": 8.0}, "checkpoint": HOSTILE}
    model.save_pretrained(tmp_path / "pool")
    text = write_card(tmp_path / "card.md", "--ckpt_path", str(tmp_path / "pool"), "--trust_module", "sweeping")
    assert "| `data.fps` | `8.0` |" in text
    assert "`` </details><script>alert(1)</script> \\| *b* [x](y) `c` ``" in text
