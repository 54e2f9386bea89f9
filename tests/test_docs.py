"""Every block of code in README and docs runs; every number there is the committed JSON's."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from PIL import Image
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.markdown.skip import SkipParser

from gradcampp_ext.cli import app

ROOT = Path(__file__).resolve().parents[1]
TRANSLATIONS = sorted(ROOT.glob("README.*.md"))
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])


class Commands(CodeBlockParser):
    """Lines of shell blocks that call gradcampp; what installs or builds is not run here."""

    def evaluate(self, example: Example) -> None:
        for line in example.parsed.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["gradcampp"]:
                code = app(words[1:], standalone_mode=False)
                assert not code, f"{line!r} ended with {code}"


def blocks(page: Path) -> list[Example]:
    parsers = [PythonCodeBlockParser(), Commands("sh"), SkipParser()]
    return list(Document.parse(str(page), *parsers).examples())


def without_comments(page: Path) -> list[str]:
    """The code of a page, line by line."""
    lines = "\n".join(re.findall(r"^```(?:python|sh)\n(.*?)^```", page.read_text(), re.M | re.S))
    return [line.partition("#")[0].rstrip() for line in lines.splitlines()]


def test_translations_have_the_same_code() -> None:
    for page in TRANSLATIONS:
        assert without_comments(page) == without_comments(ROOT / "README.md"), page.name


@pytest.mark.parametrize(
    "page", sorted({*PAGES} - {*TRANSLATIONS}), ids=lambda page: str(page.relative_to(ROOT))
)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("chelsea", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / "photos" / f"{name}.jpg")
    (tmp_path / "cat.jpg").write_bytes((tmp_path / "photos" / "chelsea.jpg").read_bytes())
    names: dict[str, Any] = {
        "model": torchvision.models.resnet18(weights=None).eval(),
        "images": torch.rand(2, 3, 64, 64),
        "photos": torch.rand(2, 64, 64, 3),
        "activations": torch.rand(2, 64, 7, 7),
        "gradients": torch.randn(2, 64, 7, 7),
        "torch": torch,
    }
    for example in blocks(page):
        example.namespace.update({k: v for k, v in names.items() if k not in example.namespace})
        example.evaluate()


def plot() -> Any:
    file = ROOT / "benchmarks" / "plot.py"
    specification = importlib.util.spec_from_file_location("plot", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["plot"] = module
    specification.loader.exec_module(module)
    return module


def test_numbers_are_those_of_the_committed_results() -> None:
    assert plot().differences() == []


def test_a_number_typed_by_hand_is_found(tmp_path: Path) -> None:
    made = plot()
    text = "<!-- begin: accuracy -->\n| 1 |\n<!-- end: accuracy -->"
    assert made.rewritten(text) != text
    assert made.rewritten(made.rewritten(text)) == made.rewritten(text)


def test_links_lead_somewhere() -> None:
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    ]
    assert [
        f"{page.relative_to(ROOT)}: {target}"
        for page, target in links
        if "://" not in target and not (page.parent / target).exists()
    ] == []
