"""The page: strict HTML, nothing from outside, texts that stay texts, files that are there."""

from __future__ import annotations

import base64
import csv
import hashlib
import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import html5lib
import numpy as np
import pytest
from PIL import Image

from probmoe_ext.report.write import PAGE, Report, write_report
from tests.report.synthetic import HOSTILE, ROUTERS, TITLE, write_comparison

HTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return report.page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(text: str) -> ElementTree.Element:
    """The document; any error of HTML fails here."""
    return html5lib.HTMLParser(strict=True).parse(text)


def content(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def test_nothing_comes_from_outside(tree: ElementTree.Element) -> None:
    for element in tree.iter():
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("src", "href", "srcset", "action", "data", "poster"):
                assert re.match(r"#|data:|figures/[a-z-]+\.(svg|png|csv)$", value), (element.tag, name, value)
            assert "url(" not in value or re.findall(r"url\(([^)]*)", value)[0].startswith("#"), value
        if element.tag == f"{HTML}style":
            assert "url(" not in content(element) and "@import" not in content(element)
    assert not list(tree.iter(f"{HTML}iframe")) and not list(tree.iter(f"{SVG}script"))


def test_the_policy_lets_only_its_own_script_run(tree: ElementTree.Element) -> None:
    policy = next(
        one.get("content", "") for one in tree.iter(f"{HTML}meta") if one.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    scripts = [one for one in tree.iter(f"{HTML}script") if one.get("type") != "application/json"]
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(content(scripts[0]).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_texts_stay_texts(text: str, tree: ElementTree.Element) -> None:
    assert "<script>document.title" not in text
    assert not [one for one in tree.iter(f"{HTML}b") if content(one) != "Reference answer"]
    assert any("</script><script>document.title" in content(one) for one in tree.iter(f"{HTML}td"))
    data = next(one for one in tree.iter(f"{HTML}script") if one.get("type") == "application/json")
    problem = json.loads(content(data))["runs"][0]["problems"][0]
    assert problem["output"] == HOSTILE and HOSTILE in problem["tokens"]


def test_structure_can_be_navigated(tree: ElementTree.Element) -> None:
    ids = [one.get("id") for one in tree.iter() if one.get("id")]
    assert len(ids) == len(set(ids))
    for element in tree.iter():
        for name in ("aria-labelledby", "href", "{http://www.w3.org/1999/xlink}href"):
            target = element.get(name, "")
            if name == "aria-labelledby" and target:
                assert target in ids
            elif target.startswith("#"):
                assert target[1:] in ids, target
        for target in re.findall(r"url\(#([^)]*)\)", " ".join(element.attrib.values())):
            assert target in ids
    levels = [int(one.tag[-1]) for one in tree.iter() if re.fullmatch(re.escape(HTML) + "h[1-6]", str(one.tag))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for name in ("header", "nav", "main", "footer"):
        assert len(list(tree.iter(HTML + name))) == 1
    first = next(one for one in tree.iter(f"{HTML}a"))
    assert first.get("href") == "#main"


def test_every_figure_has_a_caption_and_a_table(tree: ElementTree.Element) -> None:
    articles = [one for one in tree.iter(f"{HTML}article") if one.find(f"{HTML}figure") is not None]
    assert len(articles) == 11
    for article in articles:
        figure = article.find(f"{HTML}figure")
        assert figure is not None
        drawing = next(figure.iter(f"{SVG}svg"))
        assert drawing.get("role") == "img" and drawing.get("aria-label")
        caption = content(next(figure.iter(f"{HTML}figcaption"))).strip()
        assert re.search(r"[.)]\s", caption + " ")
        tables = list(article.iter(f"{HTML}table"))
        assert tables
        for table in tables:
            width = len(next(table.iter(f"{HTML}thead"))[0])
            assert all(len(row) == width and row[0].get("scope") == "row" for row in next(table.iter(f"{HTML}tbody")))


def test_inline_figures_take_the_colours_of_the_page(text: str, tree: ElementTree.Element) -> None:
    drawings = [one for one in tree.iter(f"{SVG}svg")]
    styles = {value for one in drawings for element in one.iter() for value in (element.get("style", ""),)}
    assert any("var(--ink)" in style for style in styles) and any("var(--series-1)" in style for style in styles)
    assert not any("#1b1f24" in style or "DejaVu" in style for style in styles)
    assert not [element for one in drawings for element in one.iter() if element.tag == f"{SVG}style"]
    roles = set(re.findall(r"var\(--([a-z0-9-]+)", text))
    assert roles <= set(re.findall(r"--([a-z0-9-]+):", text)) | {"share"}


def test_every_file_is_there_and_not_blank(report: Report, tree: ElementTree.Element) -> None:
    named = {one.get("href", "") for one in tree.iter(f"{HTML}a") if one.get("href", "").startswith("figures/")}
    assert {report.page.parent / name for name in named} <= set(report.figures)
    assert len(report.figures) == 3 * 11 + 1
    for path in report.figures:
        if path.suffix == ".png":
            pixels = np.asarray(Image.open(path).convert("L"))
            assert min(pixels.shape) > 200
            assert 0.002 < (pixels < 128).mean() < 0.9
        elif path.suffix == ".svg":
            root = ElementTree.parse(path).getroot()
            assert len(list(root.iter(f"{SVG}path"))) > 20
        else:
            rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
            assert len(rows) > 3 and len({len(row) for row in rows}) == 1


@pytest.fixture
def little(tmp_path: Path) -> Path:
    """Two runs, for what takes several reports."""
    return write_comparison(tmp_path / "c", ROUTERS[:2], seeds=(1,), layers=2, problems=10, steps=8, decisions=1)


def test_the_same_runs_give_the_same_page(little: Path, tmp_path: Path) -> None:
    first, second = (write_report([little], tmp_path / name, formats=()) for name in ("first", "second"))
    assert first.page.read_bytes() == second.page.read_bytes()


def test_titles_are_texts_too(little: Path, tmp_path: Path) -> None:
    folder = little
    path = folder / "compare.json"
    path.write_text(path.read_text().replace('"top-k"', json.dumps(HOSTILE)).replace(TITLE, "\\ud800 $\\\\frac$ <i>"))
    for config in folder.glob("runs/*/*/train_config.json"):
        config.write_text(config.read_text().replace('"synthetic"', json.dumps(HOSTILE)))
    written = write_report([folder], tmp_path / "report", formats=())
    tree = html5lib.HTMLParser(strict=True).parse(written.page.read_text(encoding="utf-8"))
    assert content(next(tree.iter(f"{HTML}h1"))) == "� $\\frac$ <i>"
    assert not list(tree.iter(f"{HTML}i"))
    assert not (tmp_path / "report" / "figures").exists()


def test_a_full_disk_leaves_the_old_page(little: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "report"
    output.mkdir()
    (output / PAGE).write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report([little], output, formats=(), decisions=0)
    assert [one.name for one in output.iterdir()] == [PAGE]
    assert (output / PAGE).read_text() == "old"
