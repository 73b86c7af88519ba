"""Two processes share a sweep, or one continues it when another was killed: the numbers are those of one."""

import json
import signal
from pathlib import Path

import forked
import pytest
import sweeping
import torch
import two_rank_sweep
from sweeping import Coded, Interruption, NumberedData, checkpoint, contents, sweep

from vidtwin.benchmark import analysis_plots, plots, report
from vidtwin.benchmark.sweep import Entry


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`one`: a sweep of one process; `two` of two; `resumed`: begun by one and ended by two."""
    folder = tmp_path_factory.mktemp("sweeps")
    two_rank_sweep.prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        for module in (plots, analysis_plots):
            patch.setattr(module, "write", lambda folder: [])
        patch.setattr(report, "write", lambda folder: Path(folder) / "report.html")
        patch.setattr(Interruption, "after", 9)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the two processes: other numbers of threads round otherwise
        with pytest.raises(KeyboardInterrupt):
            two_rank_sweep.run(folder, "resumed")
        patch.setattr(Interruption, "after", None)
        assert two_rank_sweep.run(folder, "one") == 1
        assert two_rank_sweep.run_curves(folder, "curves_one") == 0
        torch.set_num_threads(threads)
    forked.run_ranks(two_rank_sweep.main, folder, stderr=folder / "stderr")
    return folder


def test_two_processes_give_the_files_of_one(folder):
    one, two = contents(folder / "one"), contents(folder / "two")
    assert len(one) > 10
    assert two == one
    assert {"rows/good/analysis.json", "rows/picky/analysis.json", "content.csv"} <= set(one)


def test_two_processes_give_the_curves_of_one_and_a_clip_that_a_model_can_not_encode_is_left_out_of_the_fit(folder):
    one, two = contents(folder / "curves_one"), contents(folder / "curves_two")
    assert two == one
    for name in ("good", "picky"):
        levels = [(folder / f"curves_{each}/rows/{name}/levels.csv").read_text() for each in ("one", "two")]
        assert levels[0] == levels[1]
        assert "noise,0.5" in levels[0]
    assert (
        "picky: its coder is fitted without v0.avi, v0.avi: RuntimeError: this clip breaks"
        in (folder / "stderr").read_text()
    )


def test_two_processes_resume_a_sweep_of_one(folder):
    assert contents(folder / "resumed") == contents(folder / "one")


def test_a_model_that_fails_on_all_clips_of_one_process_is_not_failed(folder):
    """Clips 0, 1 are the first process's only chunk at first; 2 is of the second."""
    row = json.loads((folder / "two" / "rows" / "picky" / "results.json").read_text())
    assert row["kind"] == "trained"
    assert [(clip["name"], clip["start_frame"]) for clip in row["failed_clips"]] == [
        ("v0.avi", 0),
        ("v0.avi", 10),
        ("v1.avi", 0),
    ]
    assert row["metrics"]["rfvd"]["num_clips"] == row["num_clips"] == 7


def test_a_clip_that_can_not_be_read_and_models_that_fail_are_logged_by_either_process(folder):
    logged = (folder / "stderr").read_text()
    assert "picky fails on v0.avi at frame 0: RuntimeError: this clip breaks the encoder" in logged
    assert "codes fails on v3.avi at frame 10: " in logged
    assert "broken failed: RuntimeError: this clip breaks the encoder" in logged
    assert "skipped v2.avi: cut off" in logged


def test_a_video_that_one_process_cannot_read_is_skipped_in_each_row_and_logged_once_a_sweep(folder):
    for name in ("good", "picky", "codes"):
        row = json.loads((folder / "two" / "rows" / name / "results.json").read_text())
        assert row["skipped"] == {"v2.avi": "cut off"}
    # Sweep "resumed" has its chunk from the process that was ended, but for the models after it.
    assert (folder / "stderr").read_text().count("skipped v2.avi: cut off") == 2


def test_codes_are_counted_over_the_clips_of_both_processes(folder):
    clips = NumberedData(11, num_frames=10).dataset("test")
    codes = {}
    for index in (0, 1, 2, 3, 5, 6, 8, 9, 10):  # clip 4 can't be read, the model fails on 7
        clip = torch.from_numpy(clips.clip(0, index)["clip"]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        codes[index] = Coded().encode(clip)["grid"].codes.flatten()
    found = json.loads((folder / "two" / "rows" / "codes" / "results.json").read_text())["codebooks"]["grid"]
    assert found["perplexity"] == pytest.approx(perplexity(list(codes.values())), rel=1e-12)
    first = [each for index, each in codes.items() if index // 2 % 2 == 0]
    assert found["perplexity"] != pytest.approx(perplexity(first), rel=1e-6)


def perplexity(codes: list[torch.Tensor]) -> float:
    shares = torch.cat(codes).bincount(minlength=2).double()
    return float(torch.special.entr(shares / shares.sum()).sum().exp())


def test_both_processes_have_the_exit_code_and_the_refusal(folder):
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["two"] == rank["resumed"] == 1
        assert "they differ in" in rank["refused"]


def test_parts_are_kept_only_of_chunks_on_which_a_model_did_not_fail_and_of_rows_that_lack_clips(folder):
    """The next run tries the clips that failed again, and joins them with the others."""
    kept = {
        name: sorted(int(path.stem) for path in (folder / "two" / "rows" / name / "parts").glob("[0-9]*.json"))
        for name in ("good", "picky", "codes", "broken")
    }
    # Chunk 2 holds the clip that can't be read; picky fails on clips 0 to 2, codes on clip 7.
    assert kept["good"] == kept["broken"] == []
    assert set(kept["picky"]) == {2, 3, 4, 5}
    assert set(kept["codes"]) == {0, 1, 2, 4, 5}


def test_a_killed_sweep_is_resumed_by_the_next_process(tmp_path, monkeypatch):
    """SIGKILL between two chunks; `benchmarks/kill_sweep.py` does it at random moments."""
    code = (
        "import os, signal, sys\n"
        "from sweeping import *\n"
        "class Kill(BaseException):\n"
        "    def __init__(self): os.kill(os.getpid(), signal.SIGKILL)\n"
        "Interruption.after, Interruption.error = 4, Kill\n"
        "folder = Path(sys.argv[1])\n"
        "entries = [Entry(name, checkpoint=str(folder / f'{name}.ckpt')) for name in 'ab']\n"
        "sweep(folder / 'r', entries).run()\n"
    )
    monkeypatch.setattr(plots, "write", lambda folder: [])
    monkeypatch.setattr(report, "write", lambda folder: Path(folder) / "report.html")
    entries = [Entry(name, checkpoint=checkpoint(tmp_path / f"{name}.ckpt", s)) for name, s in (("a", 0.9), ("b", 0.7))]
    stderr = tmp_path / "stderr"
    assert forked.run_code(code, [str(tmp_path)], stderr) == -signal.SIGKILL, stderr.read_text()
    sweeping.calls.clear()
    assert sweep(tmp_path / "r", entries).run() == 0
    # Of b; a's row was there, and b's first chunk unless the kill came before the thread that writes had ended it.
    assert sweeping.calls in ([[2, 3], [4, 5]], [[0, 1], [2, 3], [4, 5]])
    assert sweep(tmp_path / "whole", entries).run() == 0
    assert contents(tmp_path / "r") == contents(tmp_path / "whole")


def test_a_rank_that_fails_ends_the_wait_for_the_other_one(tmp_path):
    with pytest.raises(AssertionError, match="the second rank fails"):
        forked.run_ranks(two_rank_sweep.fail_alone, tmp_path, stderr=tmp_path / "stderr")
    assert not (tmp_path / "waited").exists()
