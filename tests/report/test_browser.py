"""The page in a browser: no request, no error, light and dark, narrow and wide, and all of it by keyboard.

Needs Chromium or Chrome; Debian's ``apt-get install chromium`` is enough. ``PROBMOE_BROWSER`` names another program.
Without one the tests are skipped, or fail where ``PROBMOE_REQUIRE_BROWSER=1`` says there must be one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from probmoe_ext.report.write import Report
from tests.report.synthetic import HOSTILE, TITLE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = os.environ.get("PROBMOE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        message = f"none of {', '.join(NAMES)} is installed: apt-get install chromium, or set PROBMOE_BROWSER"
        if os.environ.get("PROBMOE_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    driver = pytest.importorskip("playwright.sync_api")
    with driver.sync_playwright() as playwright:
        # As root, which containers run as, the sandbox does not start.
        started = playwright.chromium.launch(executable_path=program, chromium_sandbox=False)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, report: Report, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page; whatever it logs, throws or asks for beyond its own file fails the test."""
    settings = getattr(request, "param", {})
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda one: said.append(one.url))
    page.goto(report.page.as_uri())
    yield page
    assert said == [report.page.as_uri()]
    context.close()


@pytest.mark.parametrize(
    "opened",
    [
        {"color_scheme": scheme, "viewport": {"width": width, "height": 900}}
        for scheme in ("light", "dark")
        for width in WIDTHS
    ],
    indirect=True,
)
def test_nothing_is_wider_than_the_page(opened: Any) -> None:
    assert opened.title() == TITLE
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = opened.evaluate(
        """[...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll, svg, .hidden, .skip, script")
        && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert wide == []


def colour(page: Any, selector: str, name: str) -> list[int]:
    value = page.evaluate("([one, name]) => getComputedStyle(document.querySelector(one))[name]", [selector, name])
    return [int(part) for part in value.removeprefix("rgba(").removeprefix("rgb(").rstrip(")").split(",")[:3]]


@pytest.mark.parametrize("opened", [{"color_scheme": scheme} for scheme in ("light", "dark")], indirect=True)
def test_page_and_figures_follow_the_scheme(opened: Any, request: pytest.FixtureRequest) -> None:
    dark = request.node.callspec.params["opened"]["color_scheme"] == "dark"
    assert (sum(colour(opened, "body", "backgroundColor")) < 150) is dark
    assert (sum(colour(opened, "body", "color")) > 600) is dark
    assert (sum(colour(opened, "#accuracy svg text", "fill")) > 400) is dark
    opened.emulate_media(media="print")
    assert sum(colour(opened, "body", "color")) < 150


def test_decisions_by_keyboard(opened: Any) -> None:
    focus = "document.activeElement.id"
    opened.focus("#run")
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("ArrowDown")
    assert opened.eval_on_selector("#run", "one => one.selectedOptions[0].textContent") == "ProbMoE exact, seed 42"
    for name in ("problem", "layer", "shade", "tokens"):
        opened.keyboard.press("Tab")
        assert opened.evaluate(focus) == name
    assert opened.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    chosen = "document.querySelector('#tokens [aria-selected=true]').id"
    assert opened.evaluate(chosen) == "t0"
    for key, expected in (
        ("ArrowRight", "t1"),
        ("End", "t89"),
        ("ArrowRight", "t89"),
        ("Home", "t0"),
        ("ArrowLeft", "t0"),
    ):
        opened.keyboard.press(key)
        assert opened.evaluate(chosen) == expected
        assert opened.get_attribute("#tokens", "aria-activedescendant") == expected
    opened.keyboard.press("ArrowDown")
    # In one look, since the page may be scrolling.
    lines_down = """(() => { const [a, b] = ["t0", document.querySelector("#tokens [aria-selected=true]").id]
        .map((id) => document.getElementById(id).getClientRects()[0]); return (b.top - a.top) / a.height; })()"""
    assert opened.evaluate(lines_down) > 0.5
    opened.keyboard.press("ArrowUp")
    assert abs(opened.evaluate(lines_down)) < 0.5


def test_decisions_are_those_of_the_file(opened: Any) -> None:
    runs = opened.evaluate("JSON.parse(document.getElementById('document').textContent)")
    run = runs["runs"][2]
    layer = run["problems"][1]["layers"][2]
    opened.select_option("#run", "2")
    opened.select_option("#problem", "1")
    opened.select_option("#layer", "2")
    opened.click("#t60")
    assert opened.text_content("#t60") == HOSTILE
    ranked = sorted(zip(layer["i"][60], layer["w"][60], strict=True), key=lambda pair: -pair[1])
    expected = [[f"expert {expert}", f"{weight / runs['scale']:.3f}"] for expert, weight in ranked]
    rows = opened.eval_on_selector_all(
        "#chosen tr", "all => all.map((row) => [...row.cells].slice(0, 2).map((one) => one.textContent))"
    )
    assert rows == expected
    assert opened.eval_on_selector_all("#map rect.back", "all => all.length") == 3
    opened.click("#all summary")
    opened.wait_for_selector("#all tbody tr")
    cells = opened.eval_on_selector_all("#all tbody tr", "all => all.map((row) => row.cells[2].textContent)")
    assert cells == [str(len(one)) for one in layer["i"]]
    first = ranked[0][0]
    opened.select_option("#shade", str(2 + first))
    shares = opened.eval_on_selector_all(
        "#tokens > span", "all => all.map((one) => +one.style.getPropertyValue('--share'))"
    )
    assert [share > 0 for share in shares] == [first in one for one in layer["i"]]


def test_skip_link_is_first(opened: Any) -> None:
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.className") == "skip"
    assert opened.evaluate("document.activeElement.getBoundingClientRect().left >= 0")
    opened.keyboard.press("Enter")
    assert opened.evaluate("document.activeElement.id") == "main"


def test_paper_has_the_tables(opened: Any) -> None:
    assert len(opened.pdf()) > 50_000
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.evaluate("[...document.querySelectorAll('details:not(#all)')].every((one) => one.open)")
    opened.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.evaluate("[...document.querySelectorAll('details')].every((one) => !one.open)")


@pytest.mark.parametrize("opened", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_all_but_the_decisions_is_there(opened: Any) -> None:
    assert opened.is_visible("#accuracy svg") and opened.is_visible("#result table")
    assert not opened.is_visible("#browser")
    assert "needs JavaScript" in opened.inner_text("#decisions")
