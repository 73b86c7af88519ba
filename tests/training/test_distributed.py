"""Two ranks train as one does with the same clips, skip together, end together and never wait for ever."""

import json
from pathlib import Path

import forked
import pytest
import torch
import two_ranks
from broken_tree import BAD, write_tree
from tiny import BASELINES

from vidtwin.storage import checkpoints

# With one codebook, with two, and with latents of images too; the slow tests train all.
QUICK = ("magvit2", "ivideogpt", "opensora")


@pytest.fixture(scope="module")
def chosen(request):
    """Names of the baselines whose tests run."""
    test = test_two_ranks_train_a_baseline_as_one_does.__name__
    names = {item.name for item in request.session.items}
    return [name for name in BASELINES if f"{test}[{name}]" in names]


@pytest.fixture(scope="module")
def outcomes(chosen, tmp_path_factory):
    """Outcomes that each of two ranks wrote; a hang would be a failure after eight minutes."""
    folder = tmp_path_factory.mktemp("ranks")
    write_tree(folder / "videos")
    two_ranks.write_teacher(folder)
    forked.run_script(Path(two_ranks.__file__), [str(folder), *chosen], folder / "stderr")
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_ranks_gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    two_ranks.write_teacher(folder)
    return folder / "one", two_ranks.gradients(folder / "one")


@pytest.fixture(scope="module")
def one_ranks_baselines(chosen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, two_ranks.baselines(folder, chosen)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = checkpoints.read(folder / "checkpoints" / "last.ckpt")
    return checkpoint["state_dict"] | {f"ema.{name}": value for name, value in checkpoint["ema"]["values"].items()}


@pytest.mark.parametrize("parts", ["whole", "parts"])
def test_two_ranks_take_the_steps_of_one_with_the_same_clips(outcomes, one_ranks_gradients, parts):
    folder, ranks = outcomes
    alone, one = one_ranks_gradients
    for ours, first, second in zip(one["clips"], *(rank["gradients"]["clips"] for rank in ranks), strict=True):
        assert sorted(ours) == sorted(first + second)
    # SGD at rate 1: what the weights have moved by is the gradient, clipped, of generator and discriminator.
    torch.testing.assert_close(
        weights_of(folder / "gradients" / parts), weights_of(alone / parts), rtol=1e-3, atol=5e-5
    )
    if parts == "parts":  # the last that was run
        assert ranks[0]["gradients"]["adaptive_weight"] == pytest.approx(ranks[1]["gradients"]["adaptive_weight"])
        assert ranks[0]["gradients"]["psnr"] == pytest.approx(one["psnr"], abs=1e-4)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BASELINES]
)
def test_two_ranks_train_a_baseline_as_one_does(outcomes, one_ranks_baselines, name):
    folder, ranks = outcomes
    alone, psnr = one_ranks_baselines
    torch.testing.assert_close(weights_of(folder / "baselines" / name), weights_of(alone / name), rtol=1e-3, atol=1e-4)
    assert ranks[0]["baselines"][name] == ranks[1]["baselines"][name] == pytest.approx(psnr[name], abs=1e-3)


def test_ddp_sends_the_autoencoders_gradients_once_a_step_and_the_discriminators_not_at_all(outcomes):
    for rank in outcomes[1]:
        assert rank["gradients"]["sent"] == dict.fromkeys(("whole", "parts"), 3 * rank["gradients"]["parameters"])


def test_ddp_searches_for_parameters_without_a_gradient_only_in_models_that_may_have_some(outcomes):
    for rank in outcomes[1]:
        assert rank["gradients"]["searched"] == [False, False]
        assert rank["baselines"]["searched"] == [False] * len(BASELINES)
        assert rank["skipping"]["searched"]["searched"] == [True]
    first, second = (rank["skipping"] for rank in outcomes[1])
    assert first["searched"]["error"] == ""
    assert first["searched"]["moved"]
    assert first["searched"]["weights"] == second["searched"]["weights"]


@pytest.mark.parametrize(
    ("case", "names"), [("never", "autoencoder.extra.weight; set"), ("in part", "some parameters of")]
)
def test_a_parameter_that_ddp_waits_for_in_vain_is_one_line_on_all_ranks(outcomes, case, names):
    for rank in outcomes[1]:
        assert f"in each step on several devices, got none of {names}" in rank["skipping"][case]["error"]


def test_a_step_of_two_ranks_waits_for_the_device_three_times_at_most(outcomes):
    # Without those of the test, and the numbers of the host by which DDP divides gradients.
    others = ("two_ranks.py", "lightning/pytorch/core/module.py")
    for rank in outcomes[1]:
        lines = [line for line in rank["gradients"]["waits"] if not any(file in line for file in others)]
        assert 1 <= len(lines) <= 3, "\n".join(lines)


def test_gradients_travel_with_the_last_part_of_a_batch_only(outcomes):
    for rank in outcomes[1]:
        assert rank["gradients"]["without_sync"] == [1, 2, 3]  # the first of two parts in each batch


def test_an_odd_tail_gives_every_rank_as_many_batches_and_every_clip_one_validation(outcomes):
    _, ranks = outcomes
    first, second = (rank["odd_tail"] for rank in ranks)
    assert [len(clips) for clips in first["clips"]] == [len(clips) for clips in second["clips"]]
    validated = first["validated"] + second["validated"]  # in every validation
    counts = {name: validated.count(name) for name in validated}
    assert set(counts) == {"clip0.avi", "clip1.avi", "clip2.avi"}
    assert len(set(counts.values())) == 1


def test_the_ranks_have_the_same_running_statistics(outcomes):
    first, second = (rank["odd_tail"]["statistics"] for rank in outcomes[1])
    assert first == second
    assert any(any(values) for values in first if isinstance(values, list))


def test_fewer_clips_than_ranks_is_an_error_on_all(outcomes):
    for rank in outcomes[1]:
        assert "at least one clip of the val split for each of 2 ranks, got 1" in rank["too_few"]["error"]


def test_a_step_that_breaks_on_one_rank_is_skipped_and_undone_on_both(outcomes):
    first, second = (rank["poisoned"] for rank in outcomes[1])
    poisoned = [["clip3.avi" in names for names in rank["poisoned"]["clips"]] for rank in outcomes[1]]
    assert any(a != b for a, b in zip(*poisoned, strict=True))
    for rank, own in zip((first, second), poisoned, strict=True):
        for reason, here, a, b in zip(rank["rejected"], own, *poisoned, strict=True):
            if a or b:
                assert bool(reason) == here  # told where it broke
                assert reason is not None  # skipped on both
            else:
                assert reason is None
    assert first["step"] == second["step"] == 6
    assert first["weights"] == second["weights"]


def test_sigterm_to_one_rank_ends_both_and_the_rest_follows_bit_for_bit(outcomes):
    folder, ranks = outcomes
    for rank in ranks:
        assert "after step 3, saved in" in rank["resumed"]["ended"]
        assert rank["resumed"]["parts"] == rank["resumed"]["whole"]
    whole, parts = (weights_of(folder / "resumed" / name) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_two_ranks_train_one_diffusion_model_and_resume_it_bit_for_bit(outcomes):
    folder, ranks = outcomes
    first, second = (rank["diffusion"] for rank in ranks)
    assert first["weights"] == second["weights"]
    assert first["scale"] == second["scale"] != [1.0] * len(first["scale"])
    for ours, theirs in zip(first["whole"][0], second["whole"][0], strict=True):
        assert not set(ours) & set(theirs)
    assert first["whole"][1] != second["whole"][1]  # each rank draws its own noise
    for rank in (first, second):
        assert "after step 2, saved in" in rank["ended"]
        assert rank["parts"] == rank["whole"]
    whole, parts = (weights_of(folder / "diffusion" / name) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_ranks_skip_the_same_videos_and_have_equally_many_batches(outcomes):
    folder, ranks = outcomes
    first, second = (rank["broken_videos"] for rank in ranks)
    assert first["usable"] == second["usable"]
    assert [len(names) for names in first["clips"]] == [len(names) for names in second["clips"]] == [1] * 8
    seen = {name for rank in (first, second) for names in rank["clips"] for name in names}
    validated = first["validated"] + second["validated"]
    assert (seen | set(validated)).isdisjoint(BAD)
    assert len(set(map(validated.count, validated))) == 1
    told = [line.split()[2] for line in (folder / "stderr").read_text().splitlines() if "vidtwin: skipped " in line]
    for name in BAD:
        assert told.count(f"{name}:") == 1  # by one of the ranks
    assert first["skipped"] == second["skipped"]
