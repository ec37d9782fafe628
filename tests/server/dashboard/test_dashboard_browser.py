"""The page in a real browser: it changes by itself, fits a phone, runs no device's script, asks nobody else."""

from __future__ import annotations

import io

import httpx
from chromium import Browser
from PIL import Image
from run_story import Story

from fedloom.server.dashboard.serving import Dashboard, serve

LIVE = "document.getElementById('link').dataset.link === 'on'"
FITS = "document.documentElement.scrollWidth <= innerWidth"


def test_it_changes_by_itself_and_comes_back(browser: Browser, story: Story) -> None:
    story.recipe().begin().whole_round(0)
    dashboard = serve(story.out, "127.0.0.1", 0)
    port = httpx.URL(dashboard.url).port or 0
    browser.show(dashboard.url)
    browser.until(LIVE)
    browser.run("document.querySelector('details').open = true")
    story.whole_round(1).ask(2)
    browser.until("document.querySelector('.pill').textContent === 'Training, round 2 of 4'")
    browser.until("document.querySelectorAll('#rounds tbody tr').length === 2")
    assert browser.run("document.querySelector('details').open") is True  # what was opened stays open
    assert browser.run("document.title") == "Training, round 2 of 4 · kitchen · Fedloom"
    assert browser.run("document.getElementById('announcement').textContent") == "Training, round 2 of 4"
    assert browser.until("document.querySelector('#devices time').textContent.match(/just now|s ago/)?.[0]")
    dashboard.stop()
    browser.until(f"!({LIVE}) && document.getElementById('link-text').textContent.startsWith('Not live')")
    story.answer(2, "clinic")
    with serve(story.out, "127.0.0.1", port):
        browser.until(f"{LIVE} && document.querySelector('#state').textContent.includes('1 of 3 answers')")
        assert set(browser.requests()) == {
            dashboard.url + path for path in ("", "events", "dashboard.css", "dashboard.js", "icon.svg")
        }


def test_it_looks_right_wide_and_narrow_light_and_dark(browser: Browser, dashboard: Dashboard, story: Story) -> None:
    story.devices += ["an-unreasonably-long-name-" * 6, "日本の端末"]
    story.recipe().begin().whole_round(0).whole_round(1).whole_round(2).ask(3)
    story.answer(3, "clinic", refused="x" * 400)
    story.log.rested(device="clinic", until=4, reason="it kept failing")
    corners = {}
    for width in (1280, 390):
        for dark in (False, True):
            browser.show(dashboard.url, width=width, dark=dark)
            browser.until(f"{LIVE} && document.querySelectorAll('figure svg .stroke').length > 3")
            assert browser.run(FITS), "nothing is wider than the screen"
            picture = Image.open(io.BytesIO(browser.picture())).convert("RGB")
            assert picture.width == width
            assert len(picture.getcolors(2**24) or []) > 50  # letters and lines, not an empty sheet
            corners[width, dark] = sum(picture.getpixel((2, 2)))
    assert corners[1280, False] == corners[390, False] > 700
    assert corners[1280, True] == corners[390, True] < 100
    small = (
        "Math.min(...[...document.querySelectorAll('main *')].filter(e => e.textContent.trim() && e.clientWidth > 1)"
    )
    assert browser.run(f"{small}.map(e => parseFloat(getComputedStyle(e).fontSize))) >= 12")
    assert browser.complaints() == []


def test_hostile_names_run_nothing(browser: Browser, dashboard: Dashboard, story: Story) -> None:
    story.devices = [
        "<script>window.hit=1</script>",
        "<img src=x onerror='window.hit=1'>",
        "</td></table><h1>mine</h1>",
    ]
    story.recipe(about="<svg onload='window.hit=1'>").begin().whole_round(0)
    browser.show(dashboard.url)
    browser.until(LIVE)
    story.ask(1).answer(1, story.devices[1], refused="<iframe srcdoc='<script>parent.hit=1</script>'></iframe>")
    browser.until("document.querySelector('#refusals').textContent.includes('iframe')")
    names = browser.run("[...document.querySelectorAll('#devices bdi')].map(e => e.textContent)")
    assert sorted(names) == sorted(story.devices)
    assert browser.run("window.hit === undefined && document.querySelectorAll('h1').length") == 1
    assert browser.run("document.querySelectorAll('main script, main img, main iframe, [onload]').length") == 0
    assert browser.complaints() == []


def test_a_page_without_scripts_is_whole(dashboard: Dashboard, story: Story) -> None:
    """Everything is in the document itself, which then loads itself again."""
    story.recipe().begin().whole_round(0)
    page = httpx.get(dashboard.url).text
    assert '<noscript><meta http-equiv="refresh" content="10"></noscript>' in page
