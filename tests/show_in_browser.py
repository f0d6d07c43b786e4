"""Opens a run's show.html in a real headless Chromium, uses its filters, and takes a picture.

    python tests/show_in_browser.py RUN [PICTURE.png]        by hand: it is no part of the tests

Needs `pip install playwright` and a Chromium: that of the system (CHROMIUM=/path/to/it, by default
what is called chromium or google-chrome), or `playwright install chromium`. It ends with an error
when the page or its console has one, when a filter shows other groups than the rollouts have, when
no group was solved only with a hint, or when a filter met no group that it should leave out.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))

import show

FILTERS = {"hinted": "only_with_hint", "format": "format_failed", "cut": "truncated"}
SIZE = {"width": 1000, "height": 620}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def groups_of(page_text: str) -> list[dict]:
    """The groups in the page's own data."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page_text, re.DOTALL)[1])["groups"]


def titles(page: Page) -> list[str]:
    """Headings of the groups that are seen, which must be as many as the page says."""
    seen = page.locator("#groups h3").all_inner_texts()
    assert page.locator("#count").inner_text() == f"groups: {len(seen)}"
    return seen


def try_filters(page: Page, groups: list[dict]) -> list[str]:
    """Every filter at every step against the rollouts; the steps with a group solved by a hint."""
    with_hint, n_left_out = [], dict.fromkeys(FILTERS, 0)
    for step in sorted({group["step"] for group in groups}):
        page.locator("#step").select_option(str(step))
        of_step = [group for group in groups if group["step"] == step]
        assert len(titles(page)) == len(of_step)
        for box, key in FILTERS.items():
            wanted = [f"problem {g['id']}: {g['outcome']}" for g in of_step if g[key]]
            page.locator(f"#{box}").check()
            assert titles(page) == wanted, f"step {step}, filter {box}"
            page.locator(f"#{box}").uncheck()
            n_left_out[box] += len(of_step) - len(wanted)
            print(f"step {step}, {box}: {len(wanted)} of {len(of_step)} groups")
            if box == "hinted" and wanted:
                with_hint.append(str(step))
    assert all(n_left_out.values()), f"left out: {n_left_out}"
    return with_hint


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    path = run / "show.html"
    path.write_text(show.page(run), encoding="utf-8")
    program = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    errors = []
    with sync_playwright() as playwright:
        # program None: the one that playwright installed
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        page = browser.new_page(viewport=SIZE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
        page.goto(path.resolve().as_uri())
        with_hint = try_filters(page, groups_of(path.read_text(encoding="utf-8")))
        assert with_hint, "no group of this run was solved only with a hint"
        page.locator("#step").select_option(with_hint[-1])
        page.locator("#hinted").check()
        picture = sys.argv[2] if len(sys.argv) == 3 else run / "show.png"
        page.screenshot(path=picture)
        print(f"Chromium {browser.version}: {picture}")
        browser.close()
    assert not errors, errors


if __name__ == "__main__":
    main()
