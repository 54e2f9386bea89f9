"""Which commit files are of, and what runs them. Imports nothing, since the build asks too."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def of_checkout(root: Path, *paths: str) -> str | None:
    """The commit of a checkout, with a + where its tracked files differ, or those of `paths`.

    None if the folder is none (around it there may be somebody else's), or if git is not here or
    does not read it.
    """
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
