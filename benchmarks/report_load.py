"""Measure how long the report's page takes to load in headless Chromium, by the number of per-clip rows.

    python benchmarks/report_load.py

The results are generated, without players. Prints the times of five loads from a file in milliseconds, until the page
reports that it is ready and until the end of the browser's load event.
"""

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from vidtwin.benchmark import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "benchmark"))
from fixture_results import write_results

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
TIMES = """() => [
  performance.getEntriesByName("report-ready")[0].startTime,
  performance.getEntriesByType("navigation")[0].loadEventEnd,
]"""


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        print(f"Chromium {browser.version}")
        for models, clips in ((5, 2_000), (1, 10_000), (5, 10_000)):
            place = Path(folder) / f"{models}-{clips}"
            entries = {f"model {i}": ("trained", 0.002 * (i + 1), 25.0 + i) for i in range(models)}
            write_results(place, entries, num_clips=clips, failed=False, players=False, lpips=True)
            page_file = report.write(place)
            times = []
            for _ in range(5):
                page = browser.new_page(viewport={"width": 1400, "height": 900})
                page.goto(page_file.as_uri(), wait_until="load")
                page.wait_for_timeout(100)
                times.append(page.evaluate(TIMES))
                page.close()
            ready, loaded = ([round(each[i]) for each in times] for i in (0, 1))
            size = page_file.stat().st_size / 2**20
            print(
                f"{models} x {clips:,} rows ({size:.1f} MB): ready {statistics.median(ready):.0f} ms "
                f"({min(ready)}-{max(ready)}), loaded {statistics.median(loaded):.0f} ms ({min(loaded)}-{max(loaded)})"
            )
        browser.close()


if __name__ == "__main__":
    main()
