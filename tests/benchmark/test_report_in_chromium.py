"""The page in a browser: opened from disk it sorts, shows a clip at a click, plays in step, and asks for nothing."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark.fixture_results import FAILED, FRAMES, HOSTILE_CLIP, HOSTILE_MODEL, write_results

from vidtwin.benchmark import report, rows

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install -e '.[dev]')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on the PATH")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(write_results(tmp_path_factory.mktemp("page") / "results"))


class Opened:
    """A page with its messages and requests."""

    def __init__(self, browser: Any, file: Path, width: int = 1400, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def names(self, table: str = "quality") -> list[str]:
        return self.page.locator(f"#{table} tbody th").all_inner_texts()

    def wait(self, condition: str) -> None:
        """Wait until a condition holds; the page's policy forbids Playwright's own way, which is `eval`."""
        for _ in range(200):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(20)
        pytest.fail(f"not within four seconds: {condition}")

    def players(self) -> None:
        self.wait("screens.length === 9 && screens.every((each) => each.ready)")

    def frames(self) -> list[int]:
        """Read from its grey which frame each player shows."""
        greys = self.page.evaluate(
            """[...document.querySelectorAll("#views canvas")].map((each) => {
              const pen = new OffscreenCanvas(1, 1).getContext("2d");
              pen.drawImage(each, 0, 0);
              return pen.getImageData(0, 0, 1, 1).data[0];
            })"""
        )
        return [round((grey - 20) / 40) for grey in greys]


@pytest.fixture
def opened(browser, file) -> Iterator[Opened]:
    opened = Opened(browser, file)
    yield opened
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [file.as_uri()]
    opened.page.close()


def head(opened: Opened, name: str) -> Any:
    return opened.page.locator("#quality thead th", has_text=name)


def test_a_click_on_a_header_sorts_and_another_one_turns_it_round(opened):
    trained = [HOSTILE_MODEL, "VidTwin", "MAGVIT-v2"]
    rest = ["CMD", "temporal_mean", "mean_colour", FAILED]
    assert opened.names() == [*trained, *rest]
    assert head(opened, "PSNR").get_attribute("aria-sort") == "descending"
    head(opened, "Rate").locator("button").click()
    assert opened.names() == ["VidTwin", "MAGVIT-v2", HOSTILE_MODEL, "CMD", "mean_colour", "temporal_mean", FAILED]
    assert head(opened, "Rate").get_attribute("aria-sort") == "ascending"
    assert head(opened, "PSNR").get_attribute("aria-sort") == "none"
    head(opened, "Rate").locator("button").press("Enter")
    assert opened.names()[:3] == [HOSTILE_MODEL, "MAGVIT-v2", "VidTwin"]
    assert head(opened, "Rate").get_attribute("aria-sort") == "descending"


def test_rows_without_a_number_come_last_in_both_directions(opened):
    for first in ("ascending", "descending"):
        head(opened, "Bits").locator("button").click()
        assert head(opened, "Bits").get_attribute("aria-sort") == first
        assert opened.names()[0] == "MAGVIT-v2"  # the only one with codebooks
        assert opened.names()[-1] == FAILED


def test_a_click_on_a_point_shows_its_clip_and_its_numbers(opened, file):
    page = opened.page
    at = page.evaluate(
        "(() => { const i = points.clip.findIndex((clip) => clip === 4); return [points.x[i], points.y[i]] })()"
    )
    page.locator("#clips").click(position={"x": at[0], "y": at[1]})
    assert page.locator("#clip-name").inner_text() == "v_Archery_g00004_c01.avi"
    numbers = page.locator("#clip-numbers tbody tr").all_inner_texts()
    clips = (file.parent / "rows" / "VidTwin" / "clips.csv").read_text().splitlines()
    (psnr,) = [line.split(",")[5] for line in clips if "g00004" in line]
    (line,) = [line for line in numbers if line.startswith("VidTwin")]
    assert line.split()[1] == f"{float(psnr):.2f}"
    assert page.locator("#players").is_hidden()
    assert "keeps the pictures of a few clips only" in page.locator("#no-players").inner_text()


def test_keys_go_from_clip_to_clip_and_a_clip_with_markup_in_its_name_is_text(opened):
    page = opened.page
    page.locator("#clips-order").select_option(label="mean_colour")
    seen = set()
    page.locator("#clips").press("Home")
    for _ in range(7):
        seen.add(page.locator("#clip-name").inner_text())
        page.locator("#clips").press("ArrowRight")
    assert len(seen) == 7
    assert HOSTILE_CLIP in seen


def test_clips_are_ordered_by_what_is_in_them_if_that_was_measured(browser, tmp_path):
    folder = write_results(tmp_path / "results")
    digest = rows.read(folder).protocol_hash
    lines = [f"v_Archery_g{place:05d}_c01.avi,12,{(3 * place) % 7},1,2.5,0,{digest}" for place in range(6)]
    text = "\n".join(["name,start_frame,motion,change,texture,cuts,protocol_hash", *lines]) + "\n"
    (folder / "content.csv").write_text(text)
    opened = Opened(browser, report.write(folder))
    opened.page.locator("#clips-order").select_option(label="Motion (px a frame) of the clip, rising")
    assert [opened.page.evaluate(f"order[{place}]") for place in range(6)] == [0, 5, 3, 1, 4, 2]
    opened.page.locator("#clips").press("Home")
    opened.page.locator("#clips").press("ArrowRight")
    assert opened.page.locator("#clip-name").inner_text() == "v_Archery_g00005_c01.avi"
    assert "Motion (px a frame): 1. Change (steps of 255): 1." in opened.page.locator("#clip-facts").inner_text()
    assert opened.said == []


def test_players_advance_in_step(opened):
    page = opened.page
    opened.players()
    assert opened.frames() == [0] * 9
    page.locator("#forth").click()
    assert opened.frames() == [1] * 9
    page.locator("#players").locator("#back").click()
    page.locator("#back").click()
    assert opened.frames() == [FRAMES - 1] * 9
    page.locator("#frame").fill("3")
    assert opened.frames() == [3] * 9
    page.locator("#forth").press("ArrowLeft")
    assert opened.frames() == [2] * 9
    page.locator("#play").click()
    opened.wait("clock.frame === 4")
    assert len(set(opened.frames())) == 1
    page.locator("#play").click()
    kept = opened.frames()
    assert len(set(kept)) == 1
    page.wait_for_timeout(200)  # more than a frame of the clip
    assert opened.frames() == kept
    page.locator("#kept button", has_text="median: v_Archery_g00001_c01.avi, frame 12").click()
    assert page.locator("#clip-name").inner_text() == "v_Archery_g00001_c01.avi"
    opened.players()
    assert opened.frames() == [0] * 9


def test_the_plots_follow_the_axis_and_hide_the_references_and_their_squeezing(opened):
    page = opened.page
    points = page.locator(".drawing g.trained:has(use):visible")
    references = page.locator(".drawing g.reference:has(use):visible")
    assert (points.count(), references.count()) == (3 * 3 + 1, 0)  # rFVD has one row
    page.locator("#references").check()
    assert references.count() == 2 * 3
    page.locator("#plots").select_option("tokens of the latents in a DiT")
    assert references.count() == 0  # they are no tokens
    (shown,) = page.locator(".drawing svg:visible").all()
    assert "tokens of the latents in a DiT" in shown.text_content()


def test_plots_have_the_colours_of_the_scheme(browser, file):
    found = []
    for scheme in ("light", "dark"):
        opened = Opened(browser, file, color_scheme=scheme)
        colours = "(each) => [getComputedStyle(each).fill, getComputedStyle(each.querySelector('path')).fill]"
        found.append(opened.page.locator(".drawing svg:visible").evaluate(colours))
        opened.page.close()
    assert found == [["rgb(22, 25, 29)", "rgb(255, 255, 255)"], ["rgb(232, 235, 238)", "rgb(20, 23, 26)"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_on_a_narrow_screen(browser, file, scheme):
    opened = Opened(browser, file, width=360, color_scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 360
    opened.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 360
    assert opened.said == []
    opened.page.close()


@pytest.mark.parametrize("models", [{}, {"alone": ("untrained", 0.1, 20.0)}], ids=["failed alone", "one row"])
def test_a_page_with_little_in_it_says_so_without_errors(browser, tmp_path, models):
    opened = Opened(browser, report.write(write_results(tmp_path, models, players=False, rfvd=False)))
    assert opened.names() == [*models, FAILED]
    assert opened.page.locator("#clip").is_visible() == bool(models)
    assert opened.page.locator(".drawing:visible").count() == len(models)
    assert opened.said == []
    opened.page.close()


def test_the_policy_stops_scripts_and_requests_that_are_not_the_pages_own(browser, file):
    opened = Opened(browser, file)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        opened.page.evaluate(
            """(address) => {
              const picture = document.createElement("img");
              picture.src = `${address}/pixel.png`;
              const script = document.createElement("script");
              script.textContent = "document.title = 'taken over'";
              document.body.append(picture, script);
              fetch(address).catch(() => { document.body.dataset.refused = "yes"; });
            }""",
            f"http://127.0.0.1:{server.getsockname()[1]}",
        )
        opened.wait("document.images[0].complete && document.body.dataset.refused === 'yes'")
        with pytest.raises(BlockingIOError):  # no one has come
            server.accept()
    assert opened.page.title() == "Video autoencoders on UCF101"
    assert sum("Content Security Policy" in text for text in opened.said) >= 3
    opened.page.close()
