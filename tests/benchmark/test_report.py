"""The page of a results folder as a browser reads it: its content, order and notes."""

import base64
import csv
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from benchmark.fixture_results import (
    FAILED,
    HOSTILE_CLIP,
    HOSTILE_MODEL,
    MODELS,
    WHY_NO_LPIPS,
    write_players,
    write_results,
)

from vidtwin.benchmark import plots, published, report, rows, summary
from vidtwin.cli import commands
from vidtwin.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Elements by name, the text of each id, and the rows of each table by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.by_id: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[tuple[str, str | None]] = []
        self._table = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "table":
            self._table = found.get("id") or f"table{len(self.tables)}"
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        if tag not in ("meta", "link", "input"):  # those are never closed
            self._open.append((tag, found.get("id")))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tags = {tag for tag, _ in self._open}
        if not tags & {"script", "style"}:
            self.text += data
        if tags & {"td", "th"}:
            self.tables[self._table][-1][-1] += data
        for _, name in self._open:
            if name:
                self.by_id[name] = self.by_id.get(name, "") + data


def page_of(folder: Path) -> Page:
    return Page(report.write(folder).read_text(encoding="utf-8"))


def data_of(page: Page) -> dict:
    return json.loads(page.by_id["data"], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def names(page: Page, table: str = "quality") -> list[str]:
    return [line[0].strip() for line in page.tables[table][1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("report") / "results")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return page_of(folder)


def test_names_with_markup_stay_text(page):
    assert HOSTILE_MODEL in names(page)
    assert HOSTILE_CLIP in page.text
    assert HOSTILE_CLIP in data_of(page)["clips"]["names"]
    kinds = [found.get("type") for tag, found in page.elements if tag == "script"]
    assert kinds == ["text/plain"] * (len(kinds) - 2) + ["application/json", None]
    assert not [name for _, found in page.elements for name in found if name.startswith("on") or name == "style"]


def test_nothing_may_be_asked_of_the_network_and_only_the_pages_own_script_runs(folder, page):
    (policy,) = [
        found["content"] for tag, found in page.elements if found.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    text = (folder / "report.html").read_text(encoding="utf-8")
    for kind, rule in (("style", "style-src"), ("script", "script-src")):
        inside = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in inside]
        assert [rules[rule]] == [f"'sha256-{digest}'" for digest in digests]
    for _, found in page.elements:
        assert (found.get("src") or "data:,").startswith("data:")
        assert (found.get("href") or "data:,") == "data:,"


def test_trained_models_come_first_and_the_others_are_never_ranked(folder, page):
    by_psnr = sorted((name for name in MODELS if MODELS[name][0] == "trained"), key=lambda name: -MODELS[name][2])
    assert names(page) == [*by_psnr, "CMD", "temporal_mean", "mean_colour", FAILED]
    groups = [int(found["data-group"] or 0) for tag, found in page.elements if tag == "tr" and "data-group" in found]
    assert groups[:7] == [0, 0, 0, 1, 2, 2, 3]
    quality = summary.quality_table(rows.read(folder))
    best = {line.name for line in quality.lines for cell in line.cells if cell.mark == summary.BEST}
    assert best == {by_psnr[0]}  # untrained CMD has a higher PSNR


def test_a_cell_is_the_mean_over_the_common_clips_and_not_the_rows_own(folder, page):
    head = [re.sub(r"\s+", " ", cell.strip()) for cell in page.tables["quality"][0]]
    place = next(index for index, cell in enumerate(head) if cell.startswith("PSNR"))
    assert page.text.count("Means over the 6 clips") == 1
    for line in page.tables["quality"][1:]:
        if line[0].strip() == FAILED:
            continue
        with (folder / "rows" / line[0].strip() / "clips.csv").open(newline="") as file:
            values = [float(clip["psnr"]) for clip in csv.DictReader(file) if clip["name"] != HOSTILE_CLIP]
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
        assert line[place].strip() == f"{mean:.2f}± {spread:.2f}"


@pytest.mark.parametrize(
    "note",
    [
        "VidTwin lacks 1 clip that others have",
        f"LPIPS (vgg) is unavailable: {WHY_NO_LPIPS}.",
        "A rate of 0.15 % is claimed for VidTwin; its latents have 0.2046 %.",
        "rFVD: not ranked below 401 clips.",
        "N = 6; not ranked",
        "untrained weights: not ranked",
        "reference: not ranked",
        "in 2 windows of 3 frames",
        "Expected a checkpoint of iVideoGPT, got one of <CMD>; give its own.",
        "structure: 0.1535 %, 4 x 8 x 4 x 4 = 512 numbers",
        "18,914,304",
        "12,610,560",
        "out of memory",
        "301.5",
        "no frame decodes",
        "decode gave NaN",
        "data.clips_sha256",
        "vidtwin report RESULTS",
        "6 frames of 8 x 8 at 8 fps",
    ],
)
def test_it_says(page, note):
    assert note in re.sub(r"\s+", " ", page.text)


def test_its_columns_hold_each_clips_value_at_the_clips_place(folder, page):
    clips, models = data_of(page)["clips"], data_of(page)["models"]
    results = rows.read(folder)
    for model, column in zip(models, clips["values"]["ssim"], strict=True):
        found = {name: clip for name, clip in zip(clips["names"], column, strict=True) if clip is not None}
        assert found == pytest.approx({clip["name"]: clip["ssim"] for clip in results.clips[model["name"]]}, rel=1e-5)
    assert [clips["names"][index] for index in clips["partial"]] == [HOSTILE_CLIP]
    assert "lpips" not in clips["values"]


def test_strips_are_the_files_and_each_view_names_its_own(folder, page):
    listed = json.loads((folder / "players" / "players.json").read_text())
    for kept, clip in zip(listed["clips"], data_of(page)["players"]["clips"], strict=True):
        assert data_of(page)["clips"]["names"][clip["clip"]] == kept["name"]
        for view, shown in zip(kept["views"], clip["views"], strict=True):
            assert base64.b64decode(page.by_id[f"strip-{shown['strip']}"]) == (folder / view["file"]).read_bytes()


def test_numbers_that_are_not_finite_are_words_in_the_json(tmp_path):
    assert [report._number(value) for value in (math.nan, math.inf, -math.inf, None, 1 / 3)] == [
        "NaN",
        "Infinity",
        "-Infinity",
        None,
        0.333333,
    ]
    folder = write_results(tmp_path, {"a": ("trained", 0.1, 20.0)}, failed=False, players=False)
    path = folder / "rows" / "a" / "clips.csv"
    path.write_text(re.sub(r"(?m)^(a,v_Archery_g00000.*?,12,6,[^,]*),[^,]*", r"\1,nan", path.read_text()))
    page = page_of(folder)
    assert data_of(page)["clips"]["values"]["psnr"][0][0] == "NaN"
    assert "not a number" in page.tables["quality"][1][3]


@pytest.mark.parametrize(
    "models",
    [
        {"alone": ("trained", 0.1, 20.0)},
        {"fresh": ("untrained", 0.1, 20.0), "mean_colour": ("reference", 0.01, 10.0)},
        {},
    ],
    ids=["one row", "no trained row", "failed alone"],
)
def test_a_folder_with_little_in_it_has_a_page_too(tmp_path, models):
    folder = write_results(tmp_path, models, players=False, rfvd=False)
    page = page_of(folder)
    assert names(page) == [*models, FAILED]
    assert data_of(page)["players"] is None
    assert "<strong" not in (folder / "report.html").read_text()


def test_published_numbers_say_whether_the_protocol_is_theirs(folder, monkeypatch):
    numbers = {"psnr": 28.14, "ssim": 0.8044, "lpips": 0.2414, "rfvd": 389.0, "claimed_rate": 0.002, "rate": None}
    paper = {"method": "VidTwin", "source": "main table", "dataset": "MCL-JCV", "lpips_net": "vgg", **numbers}
    known = [
        paper | {"matches": False, "differs": ["fps 25 for 8", "resolution 224 for 8"], "unknown": ["posterior"]},
        paper | {"matches": True, "differs": [], "unknown": []},
        paper | {"matches": False, "differs": [], "unknown": ["tail"]},
    ]
    monkeypatch.setattr(published, "beside", lambda protocol, methods: known)
    monkeypatch.setattr(plots, "drawings", lambda results: [])
    page = Page(report.render(rows.read(folder)))
    assert [re.sub(r"\s+", " ", line[-1]).strip() for line in page.tables["published"][1:]] == [
        "differsfps 25 for 8, resolution 224 for 8; not stated: posterior",
        "matches",
        "not statednot stated: tail",
    ]
    assert page.tables["published"][1][2].strip() == "0.2"


def test_the_page_shows_the_written_plots_in_its_own_colours(folder, page):
    plots.write(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg role=.*?</svg>", text, re.DOTALL)]
    shown = [[each.text for each in svg.iter(f"{SVG}text")] for svg in drawn]
    for name in ("rate_quality", "per_clip"):
        written = ElementTree.parse(folder / "plots" / f"{name}.svg").getroot()
        words = [each.text for each in written.iter(f"{SVG}text")]
        assert any(set(words) <= set(found) for found in shown)
    assert not [each.attrib for svg in drawn for each in svg.iter() if re.search("#[0-9a-f]{6}", str(each.attrib))]
    ids = [{each.get("id") for each in svg.iter() if each.get("id")} for svg in drawn]
    assert len(set.union(*ids)) == sum(map(len, ids))


def test_the_plots_axes_are_all_costs_with_and_without_the_references(page):
    labels = [found["aria-label"] for _, found in page.elements if found.get("class") == "drawing scroll"]
    costs = ["compression rate in numbers (%)", "bits per pixel, continuous latents as fp16", "parameters"]
    assert labels == [
        *costs,
        "FLOPs to encode and decode a clip",
        "tokens of the latents in a DiT",
        "PSNR of the clips",
    ]
    kinds = [found["class"] for tag, found in page.elements if tag == "div" and found.get("class") in ("all", "models")]
    assert kinds == ["all", "models"] * 4  # references have a rate, bits, parameters and clips


@pytest.mark.parametrize(
    ("file", "message"),
    [("../../secret.webp", "Expected a name that stays inside"), ("players/0/view0.txt", "Expected a WebP picture in")],
)
def test_players_are_pictures_of_the_results_folder(tmp_path, file, message):
    folder = write_results(tmp_path / "results", players=False)
    write_players(folder, ["VidTwin"], ["v_Archery_g00000_c01.avi"] * 2)
    path = folder / "players" / "players.json"
    path.write_text(path.read_text().replace("players/0/view0.webp", file))
    with pytest.raises(UserError, match=message):
        report.write(folder)


def test_the_command_makes_everything_again_from_the_files_of_the_sweep(tmp_path, capsys, monkeypatch):
    folder = write_results(tmp_path / "results", {"a": ("trained", 0.1, 20.0), "b": ("trained", 0.2, 21.0)})
    before = {path for path in folder.rglob("*") if path.is_file()}
    assert commands.run("report", [str(folder)]) == 0
    printed = capsys.readouterr().out
    made = {path for path in folder.rglob("*") if path.is_file()} - before
    named = {folder / name for name in ("comparison.json", "table.csv", "table.md", "table.tex", "report.html")}
    assert named <= made
    assert any(path.parent.name == "plots" for path in made)
    assert all(f"{path}\n" in printed for path in made)
    first = {path: path.read_bytes() for path in made}
    monkeypatch.setattr("vidtwin.benchmark.plots.write", lambda folder: [])  # test_plots.py has them
    assert commands.run("report", [str(folder)]) == 0
    assert {path: path.read_bytes() for path in made} == first


def test_a_mistake_is_one_line_that_names_the_file(tmp_path):
    def message(arguments: list[str]) -> str:
        with pytest.raises(UserError) as error:
            commands.run("report", arguments)
        return str(error.value)

    assert "vidtwin report --help" in message([])
    assert "which does not exist" in message([str(tmp_path / "absent")])
    assert "Expected rows/<name>/results.json" in message([str(tmp_path)])
    folder = write_results(tmp_path / "results", {"a": ("trained", 0.1, 20.0), "b": ("trained", 0.2, 21.0)})
    path = folder / "rows" / "a" / "results.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert str(path) in message([str(folder)])
    assert "run the sweep again" in message([str(folder)])
    path.write_text(whole.replace(json.loads(whole)["protocol_hash"], "0" * 16))
    assert "others: a" in message([str(folder)])


def test_help_says_what_is_read_and_written(capsys):
    assert commands.run("report", ["--help"]) == 0
    assert {"RESULTS", "report.html", "comparison.json"} <= set(re.findall(r"[\w.]+", capsys.readouterr().out))
