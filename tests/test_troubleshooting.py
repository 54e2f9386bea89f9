"""docs/troubleshooting.md has a row for every message that the package raises, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
VALUE = "…"  # stands for what a message puts in


def shown(node: ast.expr | None) -> str | None:
    """A literal message with … for its values; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
        return re.sub(f"{VALUE}+", VALUE, "".join(map(str, parts)))
    return None


def message(node: ast.expr, module: ast.Module) -> str | None:
    """The message that an exception is made with, here or by the name or function given to it."""
    text = shown(node)
    if text is None and isinstance(node, ast.Name):
        for each in ast.walk(module):
            if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == node.id:
                text = text or shown(each.value)
    if text is None and isinstance(node, ast.Call):
        for each in module.body:
            if isinstance(each, ast.FunctionDef) and each.name == ast.unparse(node.func):
                returned = [one.value for one in ast.walk(each) if isinstance(one, ast.Return)]
                text = next(filter(None, map(shown, returned)), None)
    return text


def raised() -> Iterator[tuple[str, str]]:
    """Where exceptions are made, and their messages as far as they are literal."""
    for file in sorted((ROOT / "gradcampp_ext").rglob("*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        for call in ast.walk(module):
            if isinstance(call, ast.Call) and call.args:
                name = ast.unparse(call.func).rpartition(".")[2]
                if name.endswith(("Error", "BadParameter")) and name[0].isupper():
                    text = message(call.args[0], module)
                    if text is not None and re.search(r"\w", text):  # not another library's alone
                        yield f"{file.relative_to(ROOT)}:{call.lineno}", text


def documented() -> list[str]:
    """What the rows of the page say that messages begin with."""
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [row.removesuffix(VALUE) for row in rows]


def test_every_raised_message_is_explained() -> None:
    rows = documented()
    missing = [f"{where}: {text}" for where, text in raised() if not text.startswith(tuple(rows))]
    assert not missing, "\n".join(["docs/troubleshooting.md lacks rows that begin:", *missing])


def test_rows_are_recognisable_and_of_messages_that_exist() -> None:
    strings, sources = set(), ""
    for file in [
        *ROOT.glob("*.py"),
        *ROOT.glob("_build_backend/*"),
        *ROOT.glob("gradcampp_ext/**/*.py"),
    ]:
        if file.suffix == ".py":
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            strings |= {text for node in nodes if (text := shown(node))}  # type: ignore[arg-type]
    for file in (ROOT / "csrc").rglob("*"):
        if file.is_file():
            sources += re.sub(r'"\s*"', "", file.read_text(encoding="utf-8"))
    rows = documented()
    assert sorted(set(rows)) == sorted(rows), "a row stands twice"
    for row in rows:
        assert len(row.replace(VALUE, "").strip()) >= 10, f"{row} could be anything"
        known = any(text.startswith(row) for text in strings) or row.split(VALUE)[0] in sources
        assert known, f"no message begins {row!r}"
