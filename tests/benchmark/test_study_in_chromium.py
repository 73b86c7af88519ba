"""A rater in a browser: clicks and keys, a reload on the way, a file of answers. A changed page does not count."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark.fixture_results import write_results
from benchmark.test_report_in_chromium import ARGUMENTS, CHROMIUM, sync_api

from vidtwin.benchmark.study import page
from vidtwin.benchmark.study.answers import read_answers, read_key
from vidtwin.benchmark.study.opinions import score
from vidtwin.errors import UserError

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on the PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chromium")
    results = write_results(folder / "results", {"VidTwin": ("trained", 0.002, 28.0), "b": ("trained", 0.01, 26.0)})
    kept = results / "players" / "players.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"fps": 60.0}))  # a rater need not wait for a second
    page.write(results, folder / "study", raters=3, checks=1)
    return folder / "study"


class Rater:
    """A page with its messages and requests."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def begin(self, number: int) -> None:
        self.page.locator("#rater").fill(str(number))
        self.page.keyboard.press("Enter")

    def wait_until_seen(self) -> None:
        """Wait until the clip has been played once; the page's policy forbids Playwright's own way, `eval`."""
        for _ in range(200):
            if self.page.evaluate("clock.watched"):
                return
            self.page.wait_for_timeout(20)
        pytest.fail("the clip was not played within four seconds")

    def shown(self) -> str:
        return str(self.page.evaluate("item().id"))

    def save(self, folder: Path, press: str = "") -> Path:
        with self.page.expect_download() as started:
            if press:
                self.page.keyboard.press(press)
            else:
                self.page.locator("#save").click()
        path = folder / started.value.suggested_filename
        started.value.save_as(path)
        return path


def scores_of(kind: str, place: int) -> list[int]:
    return {"identical": [5, 5, 5], "destroyed": [1, 1, 2]}.get(kind, [1 + place % 5, 3, 4])


def test_a_rater_clicks_and_types_through_the_page_with_a_reload_and_the_file_is_scored(browser, study, tmp_path):
    key = read_key(study / "key.json")
    rater = Rater(browser, study / "page.html")
    rater.begin(2)
    given: dict[str, list[int]] = {}
    for place in range(6):
        id = rater.shown()
        given[id] = scores_of(key["items"][id]["kind"], place)
        assert rater.page.locator("h2").inner_text() == f"Clip {place + 1} of 6"
        assert rater.page.locator("figcaption").all_inner_texts() == ["Source", "Reconstruction"]
        if place % 2:  # by keys alone
            for value in given[id]:
                rater.page.keyboard.press(str(value))
            rater.wait_until_seen()
            rater.page.keyboard.press("Enter")
        else:
            rater.page.locator('input[name="semantic"]').nth(given[id][0] - 1).check()
            assert rater.page.locator("#next").is_disabled()
            for name, value in zip(("temporal", "detail"), given[id][1:], strict=True):
                rater.page.locator(f'input[name="{name}"]').nth(value - 1).check()
            rater.wait_until_seen()
            rater.page.locator("#next").click()
        if place == 3:
            rater.page.reload()
            assert rater.page.locator("#progress").inner_text() == "Rater 2: 4 of 6 rated"
            assert rater.page.locator("h2").inner_text() == "Clip 5 of 6"
            rater.page.keyboard.press("Backspace")
            checked = rater.page.locator("input:checked").evaluate_all("(all) => all.map((each) => Number(each.value))")
            assert (rater.shown(), checked) == (id, given[id])
            rater.page.keyboard.press("ArrowDown")  # to the second question, which gets another score
            given[id][1] = 5 if key["items"][id]["kind"] == "identical" else 2
            rater.page.keyboard.press(str(given[id][1]))
            rater.page.keyboard.press("Enter")
    assert rater.page.locator("h2").inner_text() == "All clips are rated. Thank you."
    (answers,) = read_answers([rater.save(tmp_path)], key)
    assert answers.rater == 2
    assert {id: list(scores.values()) for id, scores in answers.scores.items()} == given
    held = json.loads(answers.path.read_text())["answers"]
    order = json.loads(rater.page.locator("#data").text_content())
    assert [each["id"] for each in held["items"]] == [order["items"][place]["id"] for place in order["orders"][1]]
    assert all(each["milliseconds"] > 0 for each in held["items"])
    result = score(key, [answers])
    assert (result.raters, result.left_out, result.partial) == (["rater 2"], {}, {})
    assert rater.said == []
    assert [url for url in set(rater.asked) if not url.startswith(("data:", "blob:"))] == [
        (study / "page.html").as_uri()
    ]
    rater.page.locator("#other").click()
    assert rater.page.locator("#rater").is_visible()
    rater.page.close()


def test_a_partial_file_and_a_page_that_was_changed(browser, study, tmp_path):
    """A text of the page's data is changed by hand: all works, but the answers name another page."""
    key = read_key(study / "key.json")
    changed = tmp_path / "page.html"
    changed.write_text((study / "page.html").read_text().replace("Are textures", "Are most textures"))
    found = []
    for number, file in ((1, study / "page.html"), (3, changed)):
        rater = Rater(browser, file)
        rater.begin(number)
        for value in "543":
            rater.page.keyboard.press(value)
        found.append(rater.save(tmp_path, press="s"))
        assert rater.page.locator("#message").inner_text().startswith("Saved 1 of 6 clips.")
        assert rater.said == []
        rater.page.close()
    (answers,) = read_answers(found[:1], key)
    assert [list(scores.values()) for scores in answers.scores.values()] == [[5, 4, 3]]
    with pytest.raises(UserError, match=f"got {found[1]} by a page that was changed"):
        read_answers(found, key)
    edited = tmp_path / "edited.json"
    edited.write_text(found[0].read_text().replace('"detail": 3', '"detail": 5'))
    with pytest.raises(UserError, match=f"got {edited}, which was edited; ask rater 1"):
        read_answers([edited], key)


def test_a_phone_shows_both_clips_beside_one_another_with_targets_for_a_finger(browser, study):
    """Space pauses both views, and nothing is cut off."""
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}
    rater = Rater(browser, study / "page.html", **phone)
    assert rater.page.evaluate("document.documentElement.scrollWidth") == 390
    rater.page.locator("#rater").fill("4")  # there are three
    rater.page.keyboard.press("Enter")
    assert rater.page.locator("#rater").is_visible()
    rater.begin(3)
    rater.wait_until_seen()
    rater.page.keyboard.press("Space")
    assert rater.page.locator("#play").inner_text() == "Play"
    first = rater.page.evaluate("clock.frame")
    rater.page.wait_for_timeout(100)  # six frames
    assert rater.page.evaluate("clock.frame") == first
    assert rater.page.locator("#next").is_disabled()
    assert rater.page.evaluate("document.documentElement.scrollWidth") == 390
    source, made = (each.bounding_box() for each in rater.page.locator("canvas").all())
    assert source["y"] == made["y"]
    assert made["x"] >= source["x"] + source["width"]
    targets = [each.bounding_box() for each in rater.page.locator("fieldset label, .controls button").all()]
    assert len(targets) == 19
    assert all(box["width"] >= 32 and box["height"] >= 44 for box in targets)
    assert not rater.page.locator(".keys").is_visible()
    rater.page.locator("fieldset label").nth(2).tap()
    assert rater.page.locator('input[name="semantic"]:checked').input_value() == "3"
    assert rater.said == []
    rater.page.close()
