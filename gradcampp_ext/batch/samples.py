"""Explanations of a torch data set, one after the other, in a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from torch import Tensor

    from gradcampp_ext.explainer import Explainer, Size


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of a data set and its explanation; tensors on the CPU.

    Attributes:
        index: its place in the order in which the data gave it.
        image: [C, *S] as the model got it.
        label: what the data set gave beside the image; None if nothing.
        maps: [K, *size], as of `Explanation`.
        targets: classes [K].
        scores: [K].
        probabilities: [K].
        predicted: class of the largest output.
    """

    index: int
    image: Tensor
    label: Any
    maps: Tensor
    targets: Tensor
    scores: Tensor
    probabilities: Tensor
    predicted: int


def explain_dataset(
    explainer: Explainer,
    data: Any,
    *,
    targets: int | Literal["label"] | None = None,
    topk: int | None = None,
    size: Size = None,
    batch_size: int = 32,
    workers: int = 0,
) -> Iterator[Sample]:
    """Explains every sample, batch by batch, where the model is; holds one batch at a time.

    Unlike `run` it takes images as the model takes them, writes nothing, and stops at what the
    data set raises.

    Args:
        explainer: of a classifier.
        data: a torch Dataset or IterableDataset, or a sequence, of images [C, *S] or of tuples
            that begin with image and label; or a DataLoader of batches of them, whose own batch
            size, order and workers then hold.
        targets: None for the predicted class, "label" for the label, or a class.
        topk: explain the K classes of the largest outputs.
        size: of the maps; None is that of the images, "feature" that of the layer.
        batch_size, workers: of the DataLoader that is made if `data` is none.

    Raises:
        TypeError: the data gives something else, such as mappings.
        ValueError: targets are labels and the data gives none; or as the explainer raises it, as
            for images of integers.
    """
    tensor = next(explainer.model.parameters(), torch.empty(0))
    loader = data
    if not isinstance(data, DataLoader):
        loader = DataLoader(
            data, batch_size=batch_size, num_workers=workers, pin_memory=tensor.is_cuda
        )
    index = 0
    for batch in loader:
        pair = isinstance(batch, tuple | list)
        images, labels = (batch[0], batch[1] if len(batch) > 1 else None) if pair else (batch, None)
        if targets == "label" and labels is None:
            raise ValueError("targets are labels, but the data gives images alone")
        if not isinstance(images, torch.Tensor):
            raise TypeError(
                "data must give tensors [C, *S], or tuples that begin with image and label, got "
                f"batches of {type(images).__name__}; take them apart by a DataLoader's collate_fn="
            )
        dtype = tensor.dtype if images.is_floating_point() else None  # the explainer refuses others
        explanation = explainer(
            images.to(tensor.device, dtype, non_blocking=True),
            torch.as_tensor(labels) if targets == "label" else targets,
            topk=topk,
            size=size,
        )
        if explanation.probabilities is None or explanation.predicted is None:
            raise ValueError("the model gives no [N, classes]; explain_dataset needs a classifier")
        parts = (
            explanation.maps,
            torch.as_tensor(explanation.targets),
            explanation.scores,
            explanation.probabilities,
            explanation.predicted,
        )
        maps, classes, scores, probabilities, predicted = (part.cpu() for part in parts)
        for n, image in enumerate(images.cpu()):
            yield Sample(
                index=index,
                image=image,
                label=None if labels is None else _plain(labels[n]),
                maps=maps[n],
                targets=classes[n],
                scores=scores[n],
                probabilities=probabilities[n],
                predicted=int(predicted[n]),
            )
            index += 1


def _plain(label: Any) -> Any:
    """A number for a tensor that holds one."""
    return label.item() if isinstance(label, torch.Tensor) and label.ndim == 0 else label
