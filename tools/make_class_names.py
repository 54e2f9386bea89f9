"""Write gradcampp_ext/data/imagenet1k.csv: python tools/make_class_names.py

One line per class, in the order of the network's outputs: WordNet id (from timm) and the short
name that torchvision ships with its weights.
"""

from __future__ import annotations

import csv
from pathlib import Path

from timm.data import ImageNetInfo
from torchvision.models import ResNet50_Weights

names = ResNet50_Weights.DEFAULT.meta["categories"]
wordnet_ids = ImageNetInfo("imagenet-1k").label_names()
target = Path(__file__).parent.parent / "gradcampp_ext" / "data" / "imagenet1k.csv"
with target.open("w", encoding="utf-8", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["wordnet_id", "name"])
    writer.writerows(zip(wordnet_ids, names, strict=True))
