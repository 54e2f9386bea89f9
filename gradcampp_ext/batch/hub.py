"""Data sets of the library datasets (Hugging Face): in memory, on disk, from the hub, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradcampp_ext import imaging
from gradcampp_ext.batch.items import LABEL_COLUMNS, Item, SourceError
from gradcampp_ext.batch.parquet import cell_image, class_labels
from gradcampp_ext.imaging import ImageError

if TYPE_CHECKING:
    from PIL import Image

    from gradcampp_ext.models import Classes

SCHEMES = ("hf:", "hf-stream:")


class HuggingFace:
    """A `datasets.Dataset`, read in the worker processes, or a `datasets.IterableDataset`.

    Args:
        dataset: with a column of pictures.
        image: that column; None for the first of the type Image.
        label: the column of true classes; None for the first of the type ClassLabel, or else one
            called class_index, label, class_name or wordnet_id.
        name: the pictures are called NAME/0, NAME/1, ... in the results.
        classes: the model's: where they are not as many as the data set's, labels are matched by
            name; see `class_labels`.

    Raises:
        SourceError: there is no such column.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        image: str | None = None,
        label: str | None = None,
        name: str = "dataset",
        classes: Classes | None = None,
    ) -> None:
        import datasets

        features = dataset.features or {}
        image = image or _first(features, datasets.Image)
        if image is None or image not in features:
            raise SourceError(
                f"the data set has no column of pictures {image or ''}; "
                f"its columns are {', '.join(features) or 'not known'}"
            )
        label = label or _first(features, datasets.ClassLabel) or _first_called(features)
        if label is not None and label not in features:
            raise SourceError(f"the data set has no column {label}, only {', '.join(features)}")
        names = getattr(features.get(label), "names", None)
        self._known = None if names is None else class_labels(names, classes)
        self._image, self._label, self._name = image, label, name
        self._stream = isinstance(dataset, datasets.IterableDataset)
        columns = [image] if label is None else [image, label]
        self._dataset = dataset.select_columns(columns)
        if isinstance(features[image], datasets.Image):  # workers decode, and say what is broken
            self._dataset = self._dataset.cast_column(image, datasets.Image(decode=False))

    def __iter__(self) -> Iterator[Item]:
        for index, (image, label) in enumerate(self._rows()):
            called = f"{self._name}/{index}"
            if self._known is not None and label is not None:
                label = self._known[label] if 0 <= label < len(self._known) else None
            yield Item(called, called, index if image is None else image, label)

    def __len__(self) -> int:
        if self._stream:
            raise TypeError("the length of a stream is not known")
        return len(self._dataset)

    @property
    def read(self) -> Callable[[Item], Image.Image]:
        return _read if self._stream else _Reader(self._dataset, self._image)

    def _rows(self) -> Iterator[tuple[Any, Any]]:
        """Pictures, if they can only be read in order, and labels."""
        if self._stream:
            rows: Iterable[Any] = self._dataset
            for row in rows:
                yield row[self._image], None if self._label is None else row[self._label]
        elif self._label is None:
            yield from ((None, None) for _ in range(len(self)))
        else:
            for row in self._dataset.select_columns([self._label]):
                yield None, row[self._label]


def load(spec: str, classes: Classes | None = None) -> HuggingFace:
    """A data set by hf:NAME[:CONFIG][@SPLIT], or hf-stream:... to read it without storing it.

    NAME is a folder (written by save_to_disk; of pictures in a folder a class; or whatever else
    load_dataset takes) or a name on the hub. SPLIT may be left out where there is one only.

    Raises:
        SourceError: it cannot be loaded.
    """
    scheme, _, rest = spec.partition(":")
    splits = "@" in rest and not Path(rest).exists()  # else it belongs to the folder's name
    name, at, split = rest.rpartition("@") if splits else (rest, "", "")
    config: str | None = None
    if not Path(name).exists():
        name, _, config = name.partition(":")
    try:
        import datasets

        if any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config or None, streaming=scheme == "hf-stream")
    except ImportError as error:
        raise SourceError(
            f"{spec} needs {error.name}: pip install 'gradcampp_ext[datasets]'"
        ) from error
    except Exception as error:  # the library raises anything, from its own and other packages
        raise SourceError(f"{spec} cannot be loaded ({type(error).__name__}): {error}") from error
    if isinstance(found, dict):
        if not at and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            raise SourceError(f"{spec}: choose a split by @SPLIT, one of {', '.join(found)}")
        found = found[split]
    elif at and str(found.split) != split:
        raise SourceError(f"{spec}: there is no split {split}, only {found.split}")
    if scheme == "hf-stream" and isinstance(found, datasets.Dataset):
        found = found.to_iterable_dataset()
    called = Path(name).name or "dataset"
    return HuggingFace(found, name=f"{called}/{split}" if at else called, classes=classes)


class _Reader:
    """Reads a row of a data set, in a worker process."""

    def __init__(self, dataset: Any, image: str) -> None:
        self._dataset, self._image = dataset, image

    def __call__(self, item: Item) -> Image.Image:
        try:
            value = self._dataset[item.image][self._image]
        except Exception as error:  # one bad row does not end the run
            raise ImageError(f"the data set fails ({type(error).__name__}: {error})") from error
        return _opened(value)


def _read(item: Item) -> Image.Image:
    return _opened(item.image)


def _opened(value: Any) -> Image.Image:
    if isinstance(value, dict | bytes | None):
        value = cell_image(value, Path())
    return imaging.read(value)


def _first(features: Any, kind: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)


def _first_called(features: Any) -> str | None:
    return next((name for name in LABEL_COLUMNS if name in features), None)
