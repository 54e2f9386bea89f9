"""Explain the photographs that scikit-image bundles: python -m gradcampp_ext.demo [FOLDER]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import skimage.data
from PIL import Image, ImageDraw, ImageFont

from gradcampp_ext import batch, imaging, models
from gradcampp_ext.batch.record import RESULTS

SIZE = 336  # pixels a side, of the overlays
_GAP, _CAPTION = 12, 30


def photographs(folder: Path) -> None:
    """Write the photographs as PNG files; none of them is downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    bundled: Any = skimage.data  # has no type hints
    pictures = {
        "cat": bundled.chelsea(),
        "coffee": bundled.coffee(),
        "rocket": bundled.rocket(),
        "motorcycle": bundled.stereo_motorcycle()[0],
        "astronaut": bundled.astronaut(),
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")


def explain(folder: Path) -> batch.Summary:
    """Photographs, overlays, maps and results in a folder, and overview.png, which shows all."""
    photographs(folder / "photographs")
    model = models.load("demo")
    summary = batch.run(
        batch.Files([folder / "photographs"]),
        model,
        folder,
        [batch.Overlays("png"), batch.Maps()],
        batch.Options(size=(SIZE, SIZE)),
        overwrite=True,
        progress=batch.Lines(),
    )
    overview(folder, model.recipe).save(folder / "overview.png")
    return summary


def overview(folder: Path, recipe: imaging.Recipe) -> Image.Image:
    """What the network saw above what it looked at, a column a photograph."""
    lines = (folder / RESULTS).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    step = SIZE + _GAP
    sheet = Image.new("RGB", (_GAP + len(rows) * step, _GAP + 2 * step + _CAPTION), imaging.WHITE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for column, row in enumerate(rows):
        left = _GAP + column * step
        seen = recipe.display(imaging.read(row["path"]), (SIZE, SIZE))
        sheet.paste(Image.fromarray(seen), (left, _GAP))
        sheet.paste(imaging.read(folder / row["files"]["overlay"]), (left, _GAP + step))
        caption = f"{row['target_name']}  {100 * row['probability']:.0f} %"
        middle = (left + SIZE // 2, _GAP + 2 * step + _CAPTION // 3)
        draw.text(middle, caption, fill="black", font=font, anchor="mm")
    return sheet


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    explain(target)
    print(f"look at {target / 'overview.png'} and {target / 'overlays'}")
