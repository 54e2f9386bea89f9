"""The report, as a reader meets it: in a browser, from the disk, offline."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import Markup
from PIL import Image
from test_batch import RECIPE, Net, run, tree, write_pictures
from torch import nn
from typer.testing import CliRunner

from gradcampp_ext import batch, evaluation, imaging
from gradcampp_ext.batch import report
from gradcampp_ext.batch.sources import label_key
from gradcampp_ext.cli import app
from gradcampp_ext.evaluation.boxes import Annotation
from gradcampp_ext.models import Classes, LoadedModel

sync_api = pytest.importorskip("playwright.sync_api")

HOSTILE = (
    "<img src=x onerror=hacked()>",
    "</script><script>hacked()</script>",
    '"\'><b onclick="hacked()">&amp;',
    "right \u202eto left\u2028line",
    "{{ 7 * 7 }} ${hacked()} `",
)


class Deeper(Net):
    """Two layers to explain, four cells and eight cells wide."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 2, 2), nn.ReLU()
        )


def make_model(names: tuple[str, ...] = ("cat", "dog", "kite", "crane", "emu")) -> LoadedModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return LoadedModel(Deeper().eval(), RECIPE, Classes(names), spec="tests:make_model")


SINKS = [batch.Maps(), *report.sinks()]
LAYERS = ("features.1", "features.3")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = shutil.which("chromium") or shutil.which("google-chrome")
        executable = own if Path(own).exists() else found
        if executable is None:
            pytest.skip("no browser: neither Playwright's Chromium nor chromium in the path")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


class Reader:
    """A page on which nothing may fail, and which may read files of the report alone."""

    def __init__(self, context: Any) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(10_000)
        self.requests: list[str] = []
        self.failures: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.failures.append(request.url))
        self.page.on("pageerror", lambda error: self.failures.append(str(error)))
        self.page.on("console", lambda message: self.failures.append(message.text))
        self.page.on("dialog", lambda dialog: self.failures.append(dialog.message))
        self.site = ""

    def open(self, index: Path, address: str = "") -> Any:
        self.site = index.parent.resolve().as_uri()
        self.page.goto(f"{self.site}/index.html{address}")
        self.page.wait_for_function("() => !document.getElementById('lens').hidden")
        return self.page

    def check(self) -> None:
        assert self.failures == []
        allowed = (f"{self.site}/", "data:")
        assert [url for url in self.requests if not url.startswith(allowed)] == []


@pytest.fixture
def reader(browser: Any) -> Iterator[Reader]:
    with browser.new_context(
        viewport={"width": 1200, "height": 900}, offline=True, reduced_motion="reduce"
    ) as context:
        reader = Reader(context)
        yield reader
        reader.check()


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures, labelled, with maps of two classes at two layers each; and a broken one."""
    folder = tmp_path_factory.mktemp("explained")
    paths = write_pictures(folder / "in", 10)
    paths[4].write_bytes(b"broken <b>file</b>")
    lines = [f"in/{path.name},{index % 5}" for index, path in enumerate(paths)]
    (folder / "labels.csv").write_text("\n".join(["path,class_index", *lines]) + "\n")
    out = folder / "out"
    run([folder / "labels.csv"], make_model(), out, SINKS, topk=2, target_layer=LAYERS)
    report.build(out)
    return out


def rows_of(out: Path) -> list[list[dict]]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [rows[start : start + 4] for start in range(0, len(rows), 4)]


def synthetic(out: Path, count: int, **more: Any) -> list[dict]:
    """Results of `count` pictures that share four thumbnails and maps."""
    out.mkdir(parents=True)
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    for number in range(4):
        (out / f"report/images/{number}.jpg").parent.mkdir(parents=True, exist_ok=True)
        (out / f"report/maps/{number}.jpg").parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (32, 32), (60 * number, 200, 100))
        picture.save(out / f"report/images/{number}.jpg")
        Image.fromarray(np.rot90(np.tile(ramp, (32, 1)), number).copy()).save(
            out / f"report/maps/{number}.jpg"
        )
    generator = np.random.default_rng(3)
    rows = []
    with (out / "results.jsonl").open("w") as file:
        for index in range(count):
            predicted, label = map(int, generator.integers(0, 40, 2))
            label = predicted if index % 3 else label
            confidence = round(float(generator.random()), 6)
            row = {
                "path": f"folder/{index}.jpg", "name": str(index), "predicted": predicted,
                "predicted_name": f"class {predicted}", "predicted_probability": confidence,
                "label": label, "label_name": f"class {label}", "right": label == predicted,
                "rank": 1, "target": predicted, "target_name": f"class {predicted}",
                "probability": confidence, "score": 3.5, "width": 32, "height": 32,
                "view": [0, 0, 32, 32], "peak": [8, 24], "central_mass": 0.5, "entropy": None,
                "files": {"thumbnail": f"report/images/{index % 4}.jpg",
                          "grey": f"report/maps/{index % 4}.jpg"},
            } | {name: value(index) for name, value in more.items()}  # fmt: skip
            rows.append(row)
            file.write(json.dumps(row) + "\n")
    return rows


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("many") / "out"
    rows = synthetic(out, 10_000, focus=lambda index: (index * 7919) % 10_007)
    return report.build(out), rows


def shown(page: Any) -> list[str]:
    """File names of the cards."""
    return [
        Path(alt).name
        for alt in page.eval_on_selector_all(".card .photo", "all => all.map(one => one.alt)")
    ]


def settled(page: Any, expected: list[str]) -> None:
    """The gallery comes to show these files."""
    page.wait_for_function(
        """expected => JSON.stringify([...document.querySelectorAll(".card .photo")]
            .map(one => one.alt.split("/").pop())) === JSON.stringify(expected)""",
        arg=expected,
    )


def names(rows: list[dict]) -> list[str]:
    return [Path(row["path"]).name for row in rows[:60]]


def pixels(page: Any, selector: str) -> np.ndarray:
    shot = Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")
    return np.asarray(shot, dtype=np.float64)


# What a run leaves


def test_pictures_of_the_report_are_those_of_the_run(explained):
    for rows in rows_of(explained):
        assert len({row["files"]["thumbnail"] for row in rows}) == 1
        picture = RECIPE.picture(imaging.read(rows[0]["path"]))
        thumbnail = np.asarray(imaging.read(explained / rows[0]["files"]["thumbnail"]))
        assert np.abs(thumbnail.astype(int) - picture).mean() < 8  # JPEG
        for row in rows:
            grey = np.asarray(Image.open(explained / row["files"]["grey"])) / 255
            saved = np.load(explained / row["files"]["map"])
            assert np.abs(grey - saved).max() < 0.03


def test_large_pictures_are_reduced(tmp_path):
    paths = write_pictures(tmp_path / "in", 1)
    run(paths, make_model(), tmp_path / "out", report.sinks(), size=(300, 600))
    (row,) = [json.loads(line) for line in (tmp_path / "out/results.jsonl").open()]
    assert Image.open(tmp_path / "out" / row["files"]["thumbnail"]).size == (384, 192)
    assert Image.open(tmp_path / "out" / row["files"]["grey"]).size == (224, 112)


RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_report import SINKS, batch, make_model, report, run

class Slow(batch.Progress):
    def explained(self, rows):
        print("recorded", flush=True)
        time.sleep(0.3)

run([{source!r}], make_model(), Path({out!r}), SINKS, batch_size=2, progress=Slow())
"""


def test_killed_and_taken_up_again(tmp_path):
    source, out, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"
    write_pictures(source, 12)
    run([source], make_model(), whole, SINKS, batch_size=2)
    report.build(whole)
    tests = str(Path(__file__).parent)
    code = RUN.format(tests=tests, source=str(source), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "recorded\n"
    assert process.stdout.readline() == "recorded\n"
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    assert 0 < (out / "results.jsonl").read_bytes().count(b"\n") < 12
    report.build(out)  # of what there is so far
    summary = run([source], make_model(), out, SINKS, batch_size=2)
    assert 0 < summary.explained < 12
    report.build(out)
    assert tree(out) == tree(whole)


def test_a_build_that_was_killed_leaves_nothing_half_done(tmp_path, monkeypatch):
    out = tmp_path / "out"
    synthetic(out, 300)
    index = report.build(out)
    whole = tree(out)
    moved = []
    replace = Path.replace

    class Killed(BaseException):
        pass

    def killed(path: Path, target: Path) -> Path:
        if moved:
            raise Killed
        moved.append(path)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        report.build(out)
    assert not index.exists()  # rather than one that does not fit its data
    monkeypatch.undo()
    (out / "report/.partial/data").mkdir(parents=True)
    (out / "report/.partial/data/7.js").write_text("half")
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'{"path": "torn')
    report.build(out)
    (out / "results.jsonl").write_bytes(whole["results.jsonl"])
    assert tree(out) == whole


def test_results_that_cannot_be_shown(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results\.jsonl"):
        report.build(tmp_path)
    run(write_pictures(tmp_path / "in", 1), make_model(), tmp_path / "out", [batch.Maps()])
    with pytest.raises(ValueError, match="explain with --report"):
        report.build(tmp_path / "out")
    assert not (tmp_path / "out/report/.partial").exists()


def test_other_results_do_not_keep_an_old_report(tmp_path):
    paths = write_pictures(tmp_path / "in", 2)
    out = tmp_path / "out"
    run(paths, make_model(), out, SINKS)
    report.build(out)
    run(paths, make_model(), out, [batch.Maps()], overwrite=True)
    assert [file for file in tree(out) if file.startswith("report/")] == []


def test_command_line(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", 2)
    (tmp_path / "shown.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_report import make_model as net\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    common = ["explain", "in", "--model", "shown:net", "--workers", "0", "--out", "out"]
    result = CliRunner().invoke(app, [*common, "--report"])
    assert result.exit_code == 0, result.output
    assert "look at out/report/index.html" in result.stderr
    first = tree(Path("out"))
    result = CliRunner().invoke(app, ["report", "out"])
    assert (result.exit_code, result.stdout) == (0, "out/report/index.html\n")
    assert tree(Path("out")) == first
    CliRunner().invoke(app, ["report", "out", "--title", "Two <b>"])
    assert "<title>Two &lt;b&gt;</title>" in Path("out/report/index.html").read_text()
    result = CliRunner().invoke(app, ["report", "nowhere"])
    assert result.exit_code == 2
    assert "nowhere holds no results.jsonl" in result.stderr
    assert not Path("nowhere").exists()


# What a reader sees


def test_gallery(explained, reader):
    page = reader.open(explained / "report/index.html")
    pictures = rows_of(explained)
    settled(page, [Path(rows[0]["path"]).name for rows in pictures])
    for card, rows in zip(page.locator(".card").all(), pictures, strict=True):
        text = card.inner_text()
        assert rows[0]["predicted_name"] in text
        assert ("✓ right" if rows[0]["right"] else f"✗ is {rows[0]['label_name']}") in text
    page.wait_for_function(
        "() => [...document.images].every(one => one.complete && one.naturalWidth)"
    )
    assert page.title() == "tests:make_model · gradcampp"


def test_heat_map_has_the_colours_of_the_map(explained, reader):
    rows = rows_of(explained)[2]
    page = reader.open(explained / "report/index.html", "#view=image&id=2&rank=2&layer=1")
    row = next(row for row in rows if (row["rank"], row["layer"]) == (2, LAYERS[1]))
    page.locator("#stage .heat").evaluate("one => one.decode()")
    size = page.locator("#stage").bounding_box()
    side = round(size["width"])
    saved = torch.from_numpy(np.load(explained / row["files"]["map"]))[None, None]
    enlarged = nn.functional.interpolate(saved, (side, side), mode="bilinear")[0, 0].numpy()
    photo = imaging.read(explained / row["files"]["thumbnail"])
    picture = np.asarray(photo.resize((side, side), Image.Resampling.BILINEAR), np.float64)
    inside = (slice(side // 8, -side // 8),) * 2  # the corners are round

    def opacity(percent: int) -> np.ndarray:
        page.locator("#opacity").fill(str(percent))
        assert page.locator("#opacity-value").inner_text() == f"{percent} %"
        return pixels(page, "#stage")[:side, :side][inside]

    for colours in ("turbo", "viridis"):
        page.locator("#colours").select_option(colours)
        table = imaging.colormap(colours).astype(np.float64)
        heat = table[(enlarged * 255).round().astype(int)][inside]
        assert np.abs(opacity(100) - heat).mean() < 6
        assert np.abs(opacity(50) - (heat + picture[inside]) / 2).mean() < 6
    assert np.abs(opacity(0) - picture[inside]).mean() < 4
    page.locator("#colours").select_option("spotlight")
    assert np.abs(opacity(100) - picture[inside] * enlarged[inside][..., None]).mean() < 6


def test_switches_of_class_and_layer(explained, reader):
    page = reader.open(explained / "report/index.html")
    pictures = rows_of(explained)

    def grey(rank: int, layer: str) -> list[str]:
        return [
            row["files"]["grey"].removeprefix("report/")
            for rows in pictures
            for row in rows
            if (row["rank"], row["layer"]) == (rank, layer)
        ]

    def expect(sources: list[str]) -> None:
        page.wait_for_function(
            """expected => JSON.stringify([...document.querySelectorAll(".card .heat")]
                .map(one => one.getAttribute("src"))) === JSON.stringify(expected)""",
            arg=sources,
        )

    expect(grey(1, LAYERS[0]))
    page.locator("#rank").select_option("2nd")
    expect(grey(2, LAYERS[0]))
    page.locator("#layer").select_option(LAYERS[1])
    expect(grey(2, LAYERS[1]))
    assert f"map: {pictures[0][2]['target_name']}" in page.locator(".card").first.inner_text()
    page.locator("body").press("c")
    expect(grey(1, LAYERS[1]))
    page.keyboard.press("l")
    expect(grey(1, LAYERS[0]))


def test_image_page(explained, reader):
    page = reader.open(explained / "report/index.html")
    pictures = rows_of(explained)
    page.locator(".card").nth(3).click()
    page.wait_for_selector("#image:not([hidden]) #stage img")
    rows = pictures[3]
    assert page.evaluate("document.activeElement.id") == "image-title"
    assert page.locator("#image-title").inner_text() == rows[0]["predicted_name"]
    assert Path(rows[0]["path"]).name in page.title()
    facts = page.locator("#facts").inner_text()
    assert rows[0]["path"] in facts
    assert f"{rows[0]['width']} \u00d7 {rows[0]['height']} pixels" in facts
    figures = page.locator("#figures tbody tr").all()
    assert [figure.locator("td").last.inner_text() for figure in figures] == [
        f"{row['entropy']:#.4g}" for row in rows
    ]
    assert page.locator("#maps .map").count() == 4
    page.locator("#maps .map").nth(3).click()
    page.wait_for_function("() => document.querySelectorAll('.map')[3].ariaPressed === 'true'")
    source = page.locator("#stage .heat").get_attribute("src")
    assert f"report/{source}" == rows[3]["files"]["grey"]
    assert (
        f"{rows[3]['target_name']} (class {rows[3]['target']})"
        in page.locator("#facts").inner_text()
    )

    page.locator("#mark").check()
    box, peak = page.locator("#stage").bounding_box(), page.locator(".peak").bounding_box()
    left, top, right, bottom = rows[3]["view"]
    x, y = rows[3]["peak"]
    assert peak["x"] + peak["width"] / 2 - box["x"] == pytest.approx(
        box["width"] * (x - left) / (right - left), abs=2
    )
    assert peak["y"] + peak["height"] / 2 - box["y"] == pytest.approx(
        box["height"] * (y - top) / (bottom - top), abs=2
    )
    # an address of its own, which a reload or another window finds again
    address = page.url
    page.reload()
    page.wait_for_selector("#stage img")
    assert page.locator("#stage .heat").get_attribute("src") == source
    page.keyboard.press("Escape")
    page.wait_for_selector("#gallery:not([hidden]) .card")
    assert page.url != address


def test_filters_sort_and_search(many, reader):
    index, rows = many
    page = reader.open(index)
    status = page.locator("#status")

    def expect(wanted: list[dict]) -> None:
        settled(page, names(wanted))
        assert f"of {len(wanted):,} images" in status.inner_text()

    expect(rows)
    page.get_by_text("Wrong", exact=True).click()
    wrong = [row for row in rows if not row["right"]]
    expect(wrong)
    page.locator("#sort").select_option("-confidence")
    wrong.sort(key=lambda row: -row["predicted_probability"])
    expect(wrong)
    page.locator("#low").fill("20")
    page.locator("#high").fill("60")
    wrong = [row for row in wrong if 0.2 <= row["predicted_probability"] <= 0.6]
    expect(wrong)
    page.locator("#predicted").select_option("7")
    wrong = [row for row in wrong if row["predicted"] == 7]
    expect(wrong)
    assert 0 < len(wrong) < 60
    label = wrong[0]["label"]
    page.locator("#label").select_option(str(label))
    expect([row for row in wrong if row["label"] == label])
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    expect([row for row in wrong if row["label"] == label])
    assert page.locator("#low").input_value() == "20"
    page.get_by_role("button", name="Clear").click()
    expect(rows)

    page.locator("#search").fill("CLASS 12 folder/99")
    text = "{path} {predicted_name} {label_name}"
    words = ("class", "12", "folder/99")
    found = [row for row in rows if all(word in text.format(**row) for word in words)]
    assert 0 < len(found) < 60
    settled(page, names(found))
    page.locator("#search").fill("nothing is called like this")
    page.wait_for_function(
        "() => document.getElementById('status').textContent.startsWith('No image')"
    )
    page.locator("#search").fill("")
    page.locator("#sort").select_option("-focus")
    expect(sorted(rows, key=lambda row: -row["focus"]))
    page.locator("#sort").select_option("path")
    expect(rows)  # 2 before 10


def test_ten_thousand_images_are_paged_and_loaded_as_needed(many, reader):
    index, rows = many
    page = reader.open(index)
    settled(page, names(rows))

    def loaded() -> set[str]:
        return set(re.findall(r"data/(\d+)\.js", " ".join(reader.requests)))

    assert loaded() == {"0"}
    assert page.locator("#pages").inner_text() == "167"
    page.locator("#page").fill("167")
    page.locator("#page").press("Enter")
    settled(page, names(rows[9960:]))
    assert loaded() == {"0", "39"}
    assert page.get_by_role("button", name="Next").is_disabled()
    page.get_by_role("button", name="Previous").click()
    settled(page, names(rows[9900:9960]))
    page.evaluate("location.hash = '#page=999'")
    settled(page, names(rows[9960:]))
    page.evaluate("location.hash = '#view=image&id=5000'")
    page.wait_for_selector("#stage img")
    assert "folder/5000.jpg" in page.locator("#facts").inner_text()
    assert page.locator("#position").inner_text() == "5,001 of 10,000"
    assert loaded() == {"0", "39", "20", "19"}  # and its neighbours'
    # a picture of all is not held: one page of cards
    assert page.locator("img").count() < 200


def test_memory_of_building_is_flat(tmp_path):
    peaks = []
    for count in (500, 2_000):
        synthetic(tmp_path / str(count), count)
        tracemalloc.start()
        report.build(tmp_path / str(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_keyboard(many, reader):
    index, rows = many
    page = reader.open(index)
    settled(page, names(rows))

    def focus() -> int:
        return page.evaluate(
            "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
        )

    keys = page.keyboard
    keys.press("ArrowRight")  # from nowhere to the first card
    columns = len({one.bounding_box()["x"] for one in page.locator(".card").all()})
    assert columns > 2
    positions = [focus()]
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "End", "Home"):
        keys.press(key)
        positions.append(focus())
    assert positions[0] in (0, 1)
    first = positions[0]
    assert positions[1:] == [first + 1, first + 1 + columns, first + columns, first, 59, 0]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    # one stop of the tabulator for all cards
    keys.press("End")
    keys.press("Tab")
    assert page.evaluate("document.activeElement.closest('#pager') !== null")
    keys.press("Shift+Tab")
    assert focus() == 59
    keys.press("ArrowRight")  # over the edge
    settled(page, names(rows[60:120]))
    page.wait_for_function("() => document.activeElement === document.querySelector('.card')")
    keys.press("PageDown")
    settled(page, names(rows[120:180]))
    keys.press("PageUp")
    settled(page, names(rows[60:120]))
    keys.press("ArrowRight")
    keys.press("Enter")
    page.wait_for_selector("#image:not([hidden])")
    at = page.locator("#position")
    sync_api.expect(at).to_have_text("62 of 10,000")
    keys.press("ArrowRight")
    sync_api.expect(at).to_have_text("63 of 10,000")
    keys.press("ArrowLeft")
    keys.press("ArrowLeft")
    sync_api.expect(at).to_have_text("61 of 10,000")
    keys.press("h")
    assert page.locator("#opacity").input_value() == "0"
    keys.press("h")
    keys.press("]")
    assert page.locator("#opacity").input_value() == "60"
    heat = page.locator("#stage .heat")
    assert heat.evaluate("one => getComputedStyle(one).opacity") == "0.6"
    page.locator("#opacity").focus()
    keys.press("ArrowLeft")  # the slider's own
    assert page.locator("#opacity").input_value() == "59"
    sync_api.expect(at).to_have_text("61 of 10,000")
    keys.press("Escape")
    settled(page, names(rows[60:120]))
    assert focus() == 0
    keys.press("?")
    assert page.locator("#keys").is_visible()
    keys.press("Escape")
    assert not page.locator("#keys").is_visible()
    keys.press("s")
    page.wait_for_selector("#summary:not([hidden])")
    keys.press("/")
    page.wait_for_function("() => document.activeElement.id === 'search'")
    keys.type("folder/17.jpg s?t")  # letters are text here
    page.wait_for_function(
        "() => document.getElementById('status').textContent.startsWith('No image')"
    )


def test_next_and_previous_follow_filters_and_order(many, reader):
    index, rows = many
    page = reader.open(index, "#right=wrong&sort=confidence")
    wrong = sorted(
        (row for row in rows if not row["right"]), key=lambda row: row["predicted_probability"]
    )
    settled(page, names(wrong))
    page.locator(".card").nth(1).click()
    page.wait_for_selector("#image:not([hidden])")
    facts = page.locator("#facts")
    sync_api.expect(facts).to_contain_text(wrong[1]["path"])
    page.locator("#next").click()
    sync_api.expect(facts).to_contain_text(wrong[2]["path"])
    page.locator("#previous").click()
    page.locator("#previous").click()
    sync_api.expect(facts).to_contain_text(wrong[0]["path"])
    assert page.locator("#previous").get_attribute("href") is None
    page.locator("#back").click()
    settled(page, names(wrong))


def test_controls_have_names(explained, reader):
    for view in ("", "#view=image&id=1", "#view=summary"):
        page = reader.open(explained / "report/index.html", view)
        unnamed = page.evaluate(
            """[...document.querySelectorAll("button, input, select, a, [role=group]")]
                .filter(one => !(one.ariaLabel || one.textContent.trim() || one.labels?.length
                  || one.hasAttribute("aria-labelledby"))).map(one => one.outerHTML)"""
        )
        assert unnamed == []
        assert page.locator("img:not([alt])").count() == 0


@pytest.mark.parametrize("width", [340, 800, 1800])
def test_no_view_is_wider_than_the_window(explained, reader, width):
    reader.page.set_viewport_size({"width": width, "height": 700})
    for view in ("", "#view=image&id=1", "#view=summary"):
        page = reader.open(explained / "report/index.html", view)
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_light_and_dark(explained, reader):
    page = reader.page
    page.emulate_media(color_scheme="dark")
    reader.open(explained / "report/index.html")

    def brightness() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert brightness() < 200
    page.locator("#theme").click()
    assert brightness() > 600
    page.reload()  # the choice is kept
    page.wait_for_selector(".card")
    assert brightness() > 600


# The summary


def test_summary(many, reader):
    index, rows = many
    page = reader.open(index, "#view=summary")
    text = page.locator("#summary").inner_text()
    right = sum(row["right"] for row in rows)
    assert f"{right / 100:.1f} %" in text
    bins = [[row for row in rows if int(20 * row["predicted_probability"]) == b] for b in range(20)]
    error = sum(
        abs(sum(row["right"] - row["predicted_probability"] for row in rows)) for rows in bins
    )
    assert f"calibration error\n{error / 100:.1f} %" in text
    titles = page.locator("svg[aria-label='Histogram of confidence'] a title").all_text_contents()
    assert titles == [
        f"{5 * b} % to {5 * b + 5} %: {len(own)} images, {sum(row['right'] for row in own)} right"
        for b, own in enumerate(bins)
    ]
    # of the four ramps that take turns, 255 to the right, top, left and bottom, nothing remains
    pixels = page.locator(".means img").first.evaluate(
        """one => { const c = document.createElement("canvas"); c.width = c.height = 16;
            const d = c.getContext("2d"); d.drawImage(one, 0, 0);
            return [...d.getImageData(0, 0, 16, 16).data]; }"""
    )
    mean = np.array(pixels).reshape(16, 16, 4)[..., 0]
    assert np.abs(mean - 127.5).max() < 6
    counts = page.locator(".means small").all_text_contents()
    expected = sorted((sum(row["predicted"] == c for row in rows) for c in range(40)), reverse=True)
    assert counts == [f"{count:,} images" for count in (10_000, *expected)]

    page.locator(".means a").nth(1).click()
    page.wait_for_selector("#gallery:not([hidden]) .card")
    most = page.locator(".card b").first.inner_text()
    settled(page, names([row for row in rows if row["predicted_name"] == most]))
    page.go_back()
    page.locator("svg[aria-label='Histogram of confidence'] a").nth(3).click()
    settled(page, names([row for row in rows if 0.15 <= row["predicted_probability"] <= 0.2]))


def test_agreement_of_maps(tmp_path, reader):
    out = tmp_path / "out"
    rows = synthetic(out, 2)
    with (out / "results.jsonl").open("w") as file:
        for row in rows:
            # to the right, to the left, and upwards: r = -1 and 0
            for number, layer in ((0, "one"), (2, "two"), (1, "three")):
                files = row["files"] | {"grey": f"report/maps/{number}.jpg"}
                file.write(json.dumps(row | {"layer": layer, "files": files}) + "\n")
    page = reader.open(report.build(out), "#view=summary")
    cells = [
        [float(cell or "nan") for cell in row.locator("td").all_inner_texts()]
        for row in page.locator(".matrix tr").all()[1:]
    ]
    np.testing.assert_allclose(
        cells, [[np.nan, -1, 0], [-1, np.nan, 0], [0, 0, np.nan]], atol=0.011
    )
    assert page.locator(".means li").first.locator("img").count() == 3


def test_sections_and_columns_of_ones_own(tmp_path, reader):
    synthetic(tmp_path / "out", 3, average_drop=lambda index: [0.5, 0.125, None][index],
              method=lambda index: "gradcam")  # fmt: skip
    sections = {"Scores <i>": "plain <i>text</i>", "Table": Markup("<table><td>cell</td></table>")}
    index = report.build(tmp_path / "out", title="Mine & yours", sections=sections)
    page = reader.open(index, "#view=summary")
    assert page.title() == "Mine & yours"
    assert page.get_by_text("plain <i>text</i>").is_visible()
    assert page.get_by_role("heading", name="Scores <i>").is_visible()
    assert page.locator("td", has_text="cell").is_visible()
    page = reader.open(index, "#sort=average_drop")
    settled(page, ["1.jpg", "0.jpg", "2.jpg"])
    page = reader.open(index, "#sort=-average_drop")
    settled(page, ["0.jpg", "1.jpg", "2.jpg"])
    page.locator(".card").nth(1).click()
    sync_api.expect(page.locator("#facts")).to_contain_text("0.1250")
    assert "gradcam" in page.locator("#facts").inner_text()


# An evaluation


EVALUATED = {"methods": ("gradcampp", "layercam", "center"), "layers": LAYERS}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, evaluation.Evaluation]:
    """Ten pictures, all but the first two with a box; three methods at two layers."""
    folder = tmp_path_factory.mktemp("evaluated")
    paths = write_pictures(folder / "in", 10)
    boxes = {label_key(str(path)): [Annotation((8, 8, 30, 40), None)] for path in paths[2:]}
    found = evaluation.run(
        batch.Files([folder / "in"]),
        make_model(HOSTILE),
        folder / "out",
        evaluation.Options(
            metrics=("drop", "deletion", "localization"), steps=4, batch_size=4, workers=0,
            **EVALUATED,
        ),
        boxes,
    )  # fmt: skip
    return folder / "out", found


def of_map(out: Path, layer: str, method: str) -> list[dict]:
    rows = [json.loads(line) for line in (out / "results.jsonl").open()]
    return [row for row in rows if (row["layer"], row["method"]) == (layer, method)]


def test_evaluation_has_a_switch_of_method_and_orders_by_its_scores(evaluated, reader):
    out, found = evaluated
    page = reader.open(found.report)
    assert page.title() == "tests:make_model · evaluate"
    assert page.locator("#layer option").all_inner_texts() == list(LAYERS)
    assert page.locator("#method option").all_inner_texts() == list(EVALUATED["methods"])
    page.locator("#sort").select_option("-drop")
    orders = []
    for layer, method in ((LAYERS[0], "gradcampp"), (LAYERS[1], "center"), (LAYERS[1], "layercam")):
        page.locator("#layer").select_option(layer)
        page.locator("#method").select_option(method)
        rows = sorted(of_map(out, layer, method), key=lambda row: -row["drop"])
        settled(page, names(rows))
        orders.append(names(rows))
        shown = page.locator(".card .heat").evaluate_all("all => all.map(one => one.src)")
        assert [Path(source).name for source in shown] == [
            Path(row["files"]["grey"]).name for row in rows
        ]
        for card, row in zip(page.locator(".card").all(), rows, strict=True):
            told = re.search(r"drop (\S+)", card.inner_text())
            assert float(told[1]) == pytest.approx(row["drop"], rel=1e-3)
    assert orders[0] != orders[1] != orders[2]
    page.locator("body").press("m")
    settled(page, names(sorted(of_map(out, LAYERS[1], "center"), key=lambda row: -row["drop"])))
    # pictures without a box have no such figure, and come last in their order
    page.locator("#sort").select_option("energy")
    rows = of_map(out, LAYERS[1], "center")
    assert "energy" not in rows[0]
    rows.sort(key=lambda row: row.get("energy", 2.0))
    settled(page, names(rows))


def test_evaluation_shows_the_scores_of_all_maps_of_an_image(evaluated, reader):
    out, found = evaluated
    page = reader.open(found.report, "#view=image&id=3&method=1")
    heads = page.locator("#figures thead th").all_inner_texts()
    rows = [json.loads(line) for line in (out / "results.jsonl").open()][18:24]
    lines = page.locator("#figures tbody tr").all()
    for line, row in zip(lines, rows, strict=True):
        assert line.locator("th").inner_text() == f"{row['layer']} · {row['method']}"
        cells = dict(zip(heads, line.locator("td").all_inner_texts(), strict=True))
        for name in ("drop", "increase", "behind", "deletion", "complexity", "energy", "loc_0.25"):
            assert float(cells[name.replace("_", " ")]) == pytest.approx(row[name], rel=1e-3)
    assert page.locator("#figures .shown th").inner_text() == f"{LAYERS[0]} · layercam"
    page.locator("#maps .map").nth(5).click()
    sync_api.expect(page.locator("#figures .shown th")).to_have_text(f"{LAYERS[1]} · center")
    assert page.locator("#stage .heat").get_attribute("src") in rows[5]["files"]["grey"]
    page = reader.open(found.report, "#view=image&id=0")
    lacking = page.locator("#figures tbody tr").first.locator("td").all_inner_texts()
    assert dict(zip(heads, lacking, strict=True))["energy"] == "none"


def test_evaluation_has_tables_and_plots_in_the_summary(evaluated, reader):
    out, found = evaluated
    page = reader.open(found.report, "#view=summary")
    tables = page.locator(".scores").all()
    assert len(tables) == 4  # scores and wins of two layers
    for entry in found.result["summary"]:
        definition = found.result["definitions"][entry["measure"]]
        cell = "{mean:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(
            **entry, d=1 if definition["unit"] else 3
        )
        own = tables[2 * LAYERS.index(entry["layer"])]
        cells = own.locator("tr", has_text=definition["title"]).locator("td").all_inner_texts()
        assert cells[EVALUATED["methods"].index(entry["method"])] == cell
    won = found.result["wins"][0]["percent"][2][0]
    assert tables[1].locator("tbody tr").nth(2).locator("td").first.inner_text() == f"{won:.1f}"
    page.wait_for_function(
        "() => [...document.images].every(one => one.complete && one.naturalWidth)"
    )
    assert page.locator("section.panel > img").count() == 3  # bars, curves, disagreements
    assert page.locator(".matrix th[scope=row]").count() == 6
    whole = tree(out)
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    assert tree(out) == whole


@pytest.mark.parametrize("width", [340, 1200])
def test_no_view_of_an_evaluation_is_wider_than_the_window(evaluated, reader, width):
    reader.page.set_viewport_size({"width": width, "height": 700})
    for view in ("", "#view=image&id=1", "#view=summary"):
        page = reader.open(evaluated[1].report, view)
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_to_show(tmp_path, reader):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.jsonl").touch()
    (tmp_path / "out/errors.jsonl").write_text('{"path": "<b>.jpg", "reason": "empty <i>"}\n')
    page = reader.open(report.build(tmp_path / "out"))
    assert page.locator("#status").inner_text() == "No images."
    page.keyboard.press("ArrowRight")
    page.keyboard.press("s")
    page.wait_for_selector("#summary:not([hidden])")
    assert page.get_by_text("<b>.jpg").is_visible()
    assert page.get_by_text("empty <i>").is_visible()


# Names that would do harm


def test_hostile_names_are_text(tmp_path, reader):
    source = tmp_path / "in"
    (first,) = write_pictures(source, 1)
    files = [f"{name.replace('/', chr(0x2215))}#1?%41.png" for name in HOSTILE]
    files += [os.fsdecode(b"not-utf8-\xff.png"), "new\nline\\.png"]
    for file in files:
        (source / file).write_bytes(first.read_bytes())
    first.unlink()
    (source / "broken <script>hacked()</script>".replace("/", "\u2215")).with_suffix(".png").touch()
    out = tmp_path / "out"
    run([source], make_model(HOSTILE), out, SINKS, topk=5)
    index = report.build(out, title="<script>hacked()</script>")
    for file in (index, *(out / "report/data").iterdir()):
        text = file.read_text(encoding="utf-8")
        assert "<script>hacked" not in text
        assert not re.search("[\u2028\u202e]", text)
    page = reader.open(index)
    # void: Playwright would call a function that it gets
    page.evaluate("void (window.hacked = () => { window.wasHacked = true; })")
    page.wait_for_selector(".card")
    assert page.locator(".card").count() == len(files)
    text = page.locator("#cards").inner_text()
    rows = [json.loads(line) for line in (out / "results.jsonl").open()]
    for row in rows[::5]:
        assert report.printable(row["predicted_name"]) in text
        assert report.printable(row["path"]).split("\\")[-1].split("/")[-1] in text
    page.wait_for_function(
        "() => [...document.images].every(one => one.complete && one.naturalWidth)"
    )
    for number in range(len(files)):
        page.evaluate(f"location.hash = '#view=image&id={number}'")
        sync_api.expect(page.locator("#facts")).to_contain_text(
            report.printable(rows[5 * number]["path"])
        )
        maps = page.locator("#maps").inner_text()
        assert all(report.printable(name) in maps for name in HOSTILE)
        page.locator("#stage .heat").evaluate("one => one.decode()")
    page.evaluate("location.hash = '#view=summary'")
    page.wait_for_selector("#summary:not([hidden])")
    summary = page.locator("#summary").inner_text()
    assert report.printable(rows[0]["target_name"]) in summary
    assert "broken <script>hacked()" in summary
    page.evaluate(
        "location.hash = '#q=<img src=x onerror=hacked()>&sort=__proto__&right=constructor'"
    )
    page.wait_for_selector("#gallery:not([hidden])")
    options = page.locator("#predicted option").all_inner_texts()
    assert any(report.printable(HOSTILE[1]) in option for option in options) or len(options) > 1
    assert page.evaluate("window.wasHacked") is None
    assert page.evaluate("document.querySelectorAll('b[onclick], img[onerror]').length") == 0
