"""A rating study: a page that names no model, answers that can't be edited, scores against values by hand."""

import base64
import io
import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark.fixture_results import FRAMES, HOSTILE_CLIP, HOSTILE_MODEL, SIDE, write_results
from PIL import Image

from vidtwin.benchmark import rows
from vidtwin.benchmark.study import page
from vidtwin.benchmark.study.answers import Answers, read_answers, read_key
from vidtwin.benchmark.study.criteria import seal
from vidtwin.benchmark.study.items import choose_items, order_items
from vidtwin.benchmark.study.opinions import bootstrap, krippendorff_alpha, score
from vidtwin.cli import main
from vidtwin.errors import UserError


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_results(tmp_path_factory.mktemp("study") / "results")
    for number, path in enumerate(sorted((folder / "players").rglob("*.webp"))):  # no two pictures are alike
        with Image.open(path) as image:
            pixels = np.asarray(image) + np.uint8(number)
        Image.fromarray(pixels).save(path, lossless=True)
    return folder


@pytest.fixture
def study(results: Path, tmp_path: Path) -> Path:
    page.write(results, tmp_path / "study", raters=3)
    return tmp_path / "study"


def data_of(folder: Path) -> dict[str, Any]:
    text = (folder / "page.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(data)


def strips_of(folder: Path) -> list[str]:
    return re.findall(r'<script type="text/plain" class="strip">(.*?)</script>', (folder / "page.html").read_text())


def frames_of(strip: str) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(strip))).convert("RGB"))
    return image.reshape(FRAMES, -1, image.shape[1], 3).astype(float)


def test_the_page_names_no_model_and_the_key_names_each_items(study, results):
    text, key = (study / "page.html").read_text(), json.loads((study / "key.json").read_text())
    assert key["models"] == [HOSTILE_MODEL, "MAGVIT-v2", "VidTwin"]
    for word in ("VidTwin", "MAGVIT", "alert(1)", "structure", "UCF", "Archery", "protocol"):
        assert word not in text.replace("vidtwin", ""), word
    data = data_of(study)
    assert {item["id"] for item in data["items"]} == set(key["items"])
    assert len(key["items"]) == 2 * 3 + 2 * 2
    kept = json.loads((results / "players" / "players.json").read_text())["clips"]
    strips = strips_of(study)
    for item in data["items"]:
        entry = key["items"][item["id"]]
        (clip,) = (clip for clip in kept if clip["name"] == entry["video"])
        source = base64.b64encode((results / clip["views"][0]["file"]).read_bytes()).decode()
        assert strips[item["source"]] == source
        if entry["kind"] == "model":
            (view,) = (v for v in clip["views"] if (v["model"], v["kind"]) == (entry["model"], "reconstruction"))
            assert strips[item["shown"]] == base64.b64encode((results / view["file"]).read_bytes()).decode()
        elif entry["kind"] == "identical":
            assert item["shown"] == item["source"]
        else:
            difference = np.abs(frames_of(strips[item["shown"]]) - frames_of(source)).mean()
            assert frames_of(strips[item["shown"]]).shape == (FRAMES, SIDE, SIDE, 3)
            assert difference > 30


def test_each_rater_has_an_order_of_its_own_that_begins_with_a_reconstruction(study, results):
    data, key = data_of(study), json.loads((study / "key.json").read_text())
    assert [sorted(order) for order in data["orders"]] == [list(range(10))] * 3
    assert len({tuple(order) for order in data["orders"]}) == 3
    assert {key["items"][data["items"][order[0]]["id"]]["kind"] for order in data["orders"]} == {"model"}
    found = rows.read(results)
    items = choose_items(found, ["VidTwin", "MAGVIT-v2"], 1, 1, seed=3)
    assert {item.video for item in items} <= {clip["name"] for clip in found.players["clips"]}
    assert len({item.video for item in items}) == 1
    assert len(items) == 2 + 2
    many = choose_items(found, ["VidTwin", "MAGVIT-v2", HOSTILE_MODEL], None, 2, seed=3)
    assert order_items(many, 1, 7) == order_items(many, 1, 7) != order_items(many, 1, 8)
    videos = [many[place].video for place in order_items(many, 1, 7)]
    assert sum(a == b for a, b in pairwise(videos)) <= 2  # two clips, ten items


def test_clips_that_were_drawn_at_random_are_taken_if_there_are_any_and_others_are_logged(results, tmp_path, caplog):
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    kept = folder / "players" / "players.json"
    content = json.loads(kept.read_text())
    content["clips"][1]["why"] = "median, random"
    kept.write_text(json.dumps(content))
    page.write(folder, tmp_path / "study")
    key = json.loads((tmp_path / "study" / "key.json").read_text())
    assert {item["video"] for item in key["items"].values()} == {content["clips"][1]["name"]}
    assert not caplog.text
    page.write(results, tmp_path / "worst")
    assert "keeps no clips drawn at random, so the study has the worst and the median ones" in caplog.text


def test_alone_there_is_no_source_in_the_page_but_as_a_check(results, tmp_path):
    page.write(results, tmp_path, alone=True, checks=1, models=["VidTwin"])
    data, key = data_of(tmp_path), json.loads((tmp_path / "key.json").read_text())
    assert {item["source"] for item in data["items"]} == {None}
    assert sorted(item["kind"] for item in key["items"].values()) == ["destroyed", "identical", "model", "model"]
    assert len(strips_of(tmp_path)) == 4
    assert "the source" not in " ".join(each["question"] for each in data["criteria"])


def save(folder: Path, rater: int, scores: dict[str, tuple[int, int, int]], changed: Any = ()) -> Path:
    """Write answers as the page does."""
    key = json.loads((folder / "key.json").read_text())
    items = [
        {"id": id, "semantic": given[0], "temporal": given[1], "detail": given[2], "milliseconds": 1234}
        for id, given in scores.items()
    ]
    answers = {
        "format": "vidtwin study answers",
        "format_version": 1,
        "study": key["study"],
        "page": key["page"],
        "rater": rater,
        "started": "2026-01-01T00:00:00.000Z",
        "saved": "2026-01-01T00:10:00.000Z",
        "items": items,
    } | dict(changed)
    path = folder / f"answers{rater}.json"
    path.write_text(json.dumps({"answers": answers, "seal": seal(key["seal"], answers)}, indent=1))
    return path


def good(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Scores that pass the checks: by the model's name, in turn."""
    key = json.loads((folder / "key.json").read_text())
    given = {"identical": (5, 5, 5), "destroyed": (1, 2, 1)}
    models = {"VidTwin": (5, 4, 3), "MAGVIT-v2": (3, 3, 2), HOSTILE_MODEL: (2, 1, 1)}
    return {id: given.get(item["kind"]) or models[item["model"]] for id, item in key["items"].items()}


def swap(text: str) -> str:
    return text.replace('"detail": 3', '"detail": 5', 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, r"as the page has saved them, got \S+answers1\.json, which was edited; ask rater 1 for the file again"),
        (lambda text: text.replace('"rater": 1', '"rater": 2'), "answers1.json, which was edited"),
        (lambda text: text.replace('"seal": "', '"seal": "0'), "answers1.json, which was edited"),
        (lambda text: text.replace('"seal"', '"sael"'), "Expected answers of a study in .*answers1.json"),
        (lambda text: text[:-9], r"answers1.json, got no JSON .*; it was cut off or edited"),
        (lambda text: "[]", "answers1.json, got a list"),
        (lambda text: text.replace('"vidtwin study answers"', '"else"'), "got another file"),
    ],
)
def test_edited_answers_are_refused_by_name(study, change, message):
    path = save(study, 1, good(study))
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message) as refused:
        read_answers([path], read_key(study / "key.json"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"study": "00"}, "got those of '00'"),
        ({"page": "00"}, r"got \S+answers1\.json by a page that was changed"),
        ({"rater": 4}, "a rater from 1 to 3 in .*, got 4"),
        ({"rater": True}, "a rater from 1 to 3 in .*, got True"),
        ({"items": 3}, "scores of 1 to 5"),
        ({"items": [{"id": "ID", "semantic": True, "temporal": 1, "detail": 1}]}, "scores of 1 to 5"),
        ({"items": [{"id": "00", "semantic": 1, "temporal": 1, "detail": 1}]}, "of the study's items"),
        ({"items": [{"id": "ID", "semantic": 6, "temporal": 1, "detail": 1}]}, "scores of 1 to 5"),
        ({"items": [{"id": "ID", "semantic": 1, "temporal": 1}]}, "scores of 1 to 5"),
        ({"items": [{"id": ["ID"]}]}, "scores of 1 to 5"),
        ({"items": ["ID"]}, "scores of 1 to 5"),
    ],
)
def test_answers_that_are_not_the_studys_are_refused_though_sealed(study, changed, message):
    key = read_key(study / "key.json")
    text = json.dumps(changed).replace("ID", next(iter(key["items"])))
    path = save(study, 1, good(study), json.loads(text))
    with pytest.raises(UserError, match=message):
        read_answers([path], key)


def test_two_files_of_one_rater_are_refused_and_a_reformatted_one_is_not(study, tmp_path):
    path = save(study, 1, good(study))
    again = tmp_path / "again.json"
    again.write_text(json.dumps(json.loads(path.read_text())))  # as a program that stores JSON may
    key = read_key(study / "key.json")
    assert read_answers([again], key)[0].scores == read_answers([path], key)[0].scores
    with pytest.raises(UserError, match=r"got \S+ and \S+ of rater 1; leave one out"):
        read_answers([path, again], key)


def test_a_changed_page_or_key_is_refused_by_name(study):
    key = json.loads((study / "key.json").read_text())
    shown = study / "page.html"
    shown.write_text(shown.read_text().replace("Rating study", "Rating studies"))
    with pytest.raises(UserError, match=r"page\.html as `vidtwin study make` wrote it, got a changed file"):
        read_key(study / "key.json")
    shown.unlink()  # it need not be there
    assert read_key(study / "key.json") == key
    for change, message in (
        ({"format": "x"}, "the key of a study"),
        ({"raters": "3"}, "raters in"),
        ({"seal": "zz"}, "seal in"),
        ({"items": {"a": {"kind": "model", "model": "other"}}}, "items of"),
        ({"items": {"a": {"kind": "model", "model": "VidTwin"}}}, "items of"),
        ({"models": [1], "items": {"a": {"kind": "model", "model": 1, "video": "v"}}}, "items of"),
        ({"protocol_hash": None}, "protocol_hash in"),
    ):
        (study / "key.json").write_text(json.dumps(key | change))
        with pytest.raises(UserError, match=message):
            read_key(study / "key.json")


KEY = {
    "alone": False,
    "models": ["a", "b"],
    "items": {
        f"{model}{clip}": {"kind": "model", "model": model, "video": f"v{clip}"} for model in "ab" for clip in (1, 2)
    }
    | {
        "same": {"kind": "identical", "model": "", "video": "v1"},
        "bad": {"kind": "destroyed", "model": "", "video": "v1"},
    },
}
CHECKS = {"same": 5, "bad": 1}


def given(rater: int, **scores: int) -> Answers:
    every = {id: {"semantic": value, "temporal": value, "detail": 6 - value} for id, value in scores.items()}
    for id in {"same", "bad"} & set(every):
        every[id]["detail"] = scores[id]
    return Answers(Path(f"{rater}.json"), rater, every)


def test_means_are_those_by_hand_and_raters_who_fail_a_check_are_left_out_by_name():
    answers = [
        given(1, a1=5, a2=4, b1=2, b2=1, **CHECKS),
        given(2, a1=4, a2=4, b1=3, **CHECKS),
        given(3, a1=1, a2=1, b1=5, b2=5, same=4, bad=3),
        given(4, a1=3),
    ]
    result = score(KEY, answers)
    found = {(each.model, each.criterion): each for each in result.opinions}
    assert found["a", "semantic"].mean == pytest.approx((5 + 4 + 4 + 4) / 4)
    assert found["a", "detail"].mean == pytest.approx((1 + 2 + 2 + 2) / 4)
    assert found["b", "temporal"].mean == pytest.approx((2 + 1 + 3) / 3)
    assert (found["b", "semantic"].scores, found["b", "semantic"].raters, found["b", "semantic"].sources) == (3, 2, 2)
    assert result.raters == ["rater 1", "rater 2"]
    assert result.left_out == {
        "rater 3": "failed 2 of 2 attention checks: 4 for the source itself (at least 5); 3 for a destroyed clip "
        "(at most 2)",
        "rater 4": "answered no attention check",
    }
    assert result.partial == {"rater 2": (5, 6)}
    nearly = [given(1, a1=5, same=4, bad=2)]
    assert score(KEY, nearly).raters == []
    assert score(KEY | {"alone": True}, nearly).raters == ["rater 1"]
    assert score(KEY, answers, identical_at_least=4, destroyed_at_most=3).raters == ["rater 1", "rater 2", "rater 3"]


def test_intervals_draw_raters_and_videos():
    """Of two raters and two videos each lone score is the mean of one draw in sixteen, more than 2.5%."""
    answers = [given(1, a1=5, a2=3, b1=1, b2=1, **CHECKS), given(2, a1=3, a2=1, b1=1, b2=1, **CHECKS)]
    (opinion, *_) = score(KEY, answers).opinions
    assert (opinion.mean, opinion.interval) == (3, (1, 5))
    # Four raters who agree on three videos: 27 draws, of which 1, 1, 1 has 8 and 7, 7, 7 one.
    assert bootstrap(np.array([[1.0, 1, 7]] * 4), np.ones((4, 3)), 0) == (1, 7)
    # Five raters of whom one is strict, on videos that are alike: no draw has more than he gives.
    low, high = bootstrap(np.array([[1.0] * 3] + [[4.0] * 3] * 4), np.ones((5, 3)), 0)
    assert (low, high) == (pytest.approx(4 - 3 * 3 / 5), 4)  # he is drawn thrice in 5.8%, four times in 0.7%
    items = {
        id: item | {"video": f"Archery/v_Archery_g01_c0{item['video'][1]}.avi"} for id, item in KEY["items"].items()
    }
    assert score(KEY | {"items": items}, answers).opinions[0].interval is None  # two clips of one recording
    lone = score(KEY, answers[:1]).opinions[0]
    assert (lone.mean, lone.interval) == (4, None)


def test_intervals_hold_the_true_mean_nearly_as_often_as_they_say():
    """Simulated studies with effects of raters and videos, 20 of each; an interval over scores alone is too narrow."""
    draw = np.random.default_rng(0)
    held = [0, 0]
    for _ in range(60):
        effects = 0.5 * draw.standard_normal(20)[:, None] + 0.5 * draw.standard_normal(20)
        values = effects + 0.5 * draw.standard_normal((20, 20))
        low, high = bootstrap(values, np.ones((20, 20)), 0)
        held[0] += low <= 0 <= high
        held[1] += abs(values.mean()) <= 1.96 * values.std() / math.sqrt(values.size)
    assert held[0] >= 52
    assert held[1] < 40


def test_alpha_is_krippendorffs_of_his_own_example():
    """Table of four observers and twelve units in his paper of 2011: ordinal alpha 0.815."""
    units = [
        (1, 1, None, 1), (2, 2, 3, 2), (3, 3, 3, 3), (3, 3, 3, 3), (2, 2, 2, 2), (1, 2, 3, 4),
        (4, 4, 4, 4), (1, 1, 2, 1), (2, 2, 2, 2), (None, 5, 5, 5), (None, None, 1, 1), (None, None, 3, None),
    ]  # fmt: skip
    assert krippendorff_alpha(list(zip(*units, strict=True))) == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha([[1, 5, 3], [1, 5, 3]]) == 1
    assert krippendorff_alpha([[3, 3], [3, 3]]) is None
    assert krippendorff_alpha([[1, None], [None, 2]]) is None
    assert krippendorff_alpha([]) is None


def test_the_commands_make_a_study_and_score_its_answers(results, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    both = ["--models", "VidTwin", HOSTILE_MODEL]
    assert (
        main(["study", "make", "--results", str(results), "--out", "study", "--raters", "3", "--checks", "1", *both])
        == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "study/page.html",
        "study/key.json",
        "Give page.html and a number from 1 to 3 to each rater; keep key.json.",
    ]
    paths = [str(save(Path("study"), rater, good(Path("study")))) for rater in (1, 2)]
    assert main(["study", "score", *paths, "--key", "study/key.json", "--out", "scores"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\| VidTwin +\| 5\.00 \[5\.00, 5\.00\] \| 4\.00 \[4\.00, 4\.00\] \|", text)
    assert "\\<img" in text
    assert (Path("scores") / "scores.md").read_text() in text
    lines = (Path("scores") / "scores.csv").read_text().splitlines()
    assert lines[0] == "model,criterion,mean,low,high,scores,raters,sources"
    assert "VidTwin,detail,3.0,3.0,3.0,4,2,2" in lines
    assert Image.open("scores/scores.png").width > 500
    assert "&lt;img" in (Path("scores") / "scores.svg").read_text()
    inattentive = dict.fromkeys(good(Path("study")), (3, 3, 3))
    lone = str(save(Path("study"), 3, inattentive))
    assert main(["study", "score", lone, "--key", "study/key.json", "--out", "none"]) == 1
    assert "Left out: rater 3 failed 2 of 2 attention checks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("make --results absent --out x", "Expected a results folder, got absent"),
        ("make --results {} --out x --models VidTwn", "got 'VidTwn'; did you mean 'VidTwin'?"),
        ("make --results {} --out x --clips 3", "clips from 1 to 2"),
        ("make --results {} --out x --raters 0", "raters of at least 1"),
        ("score a.json --key absent.json --out x", "the key.json of `vidtwin study make` at absent.json, got no such"),
        ("score", "key"),
    ],
)
def test_a_mistake_is_one_line(results, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words.format(results).split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("x").exists()


def test_a_damaged_picture_is_one_line(results, tmp_path):
    shutil.copytree(results, tmp_path / "results")
    for path in (tmp_path / "results" / "players").rglob("view0.webp"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="pictures of 6 frames in players/, got a damaged one"):
        page.write(tmp_path / "results", tmp_path / "study")


def test_a_folder_without_players_or_with_a_study_is_refused(tmp_path, study, results):
    bare = write_results(tmp_path / "bare", players=False)
    with pytest.raises(UserError, match="got none; `vidtwin test --random_players 8`"):
        page.write(bare, tmp_path / "other")
    with pytest.raises(UserError, match=r"Expected a folder without a study, got .*study with key\.json"):
        page.write(results, study)
    with pytest.raises(UserError, match="Expected files of answers, got none"):
        read_answers([], read_key(study / "key.json"))
    assert HOSTILE_CLIP not in (study / "page.html").read_text()
