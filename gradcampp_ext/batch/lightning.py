"""A Lightning callback that shows, in TensorBoard, what the model looks at while it learns."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradcampp_ext import overlay
from gradcampp_ext.explainer import Explainer
from gradcampp_ext.imaging import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torch import Tensor


def _callbacks() -> tuple[type, ...]:
    """The Callback of lightning and that of pytorch_lightning, whichever are installed."""
    found = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(package).Callback)
    if not found:
        raise ImportError(
            "gradcampp_ext.batch.lightning needs lightning or pytorch_lightning: "
            "pip install 'gradcampp_ext[lightning]'"
        )
    return tuple(dict.fromkeys(found))


class LogOverlays(*_callbacks()):  # type: ignore[misc]
    """Logs overlays of the first validation images to every TensorBoard logger of the trainer.

    Batches are images [N, 3, H, W], or tuples that begin with images and labels, as the module
    takes them; of others, and without such a logger, it warns once and shows nothing. The module's
    `forward` gives logits. Nothing is logged in the sanity check, and only by the first process.
    The module is left as it was: no hook, gradient or flag stays.

    Args:
        target_layer, method: as of `Explainer`, of the module.
        images: how many of each validation run.
        every_n_epochs: in which validation runs.
        targets: "predicted", "label", or both of them side by side.
        mean, std: of the normalisation, a number a channel, which is undone to show the images.
            Where images are in [0, 1] as they are, mean 0 and std 1.
        colormap, alpha: of `overlay`.
        tag: in TensorBoard; further data loaders have their number after it.
        output: which part of what `forward` gives is explained, as of `Explainer`.
    """

    def __init__(
        self,
        target_layer: str | Sequence[str] | None = None,
        *,
        method: str = "gradcampp",
        images: int = 8,
        every_n_epochs: int = 1,
        targets: Sequence[str] | str = "predicted",
        mean: Sequence[float] | float = IMAGENET_MEAN,
        std: Sequence[float] | float = IMAGENET_STD,
        colormap: str = "turbo",
        alpha: float = 0.5,
        tag: str = "gradcampp",
        output: Any = None,
    ) -> None:
        super().__init__()
        self._targets = (targets,) if isinstance(targets, str) else tuple(targets)
        if not set(self._targets) <= {"predicted", "label"} or not self._targets:
            raise ValueError(f"targets must be 'predicted' or 'label' or both, got {targets!r}")
        if images < 1 or every_n_epochs < 1:
            raise ValueError(
                f"images and every_n_epochs must be at least 1, got {images}, {every_n_epochs}"
            )
        self._layer, self._method, self._output = target_layer, method, output
        self._images, self._every, self._tag = images, every_n_epochs, tag
        self._mean, self._std = torch.as_tensor(mean), torch.as_tensor(std)
        self._draw: Callable[[Tensor, Tensor], Tensor] = lambda pictures, maps: overlay(
            pictures, maps, colormap=colormap, alpha=alpha
        )
        self._left: dict[int, int] = {}
        self._warned = False

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._left.clear()

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        left = self._left.get(dataloader_idx, self._images)
        due = trainer.current_epoch % self._every == 0 and not trainer.sanity_checking
        if not (left and due and trainer.is_global_zero):
            return
        boards = [logger.experiment for logger in trainer.loggers if _is_tensorboard(logger)]
        several = isinstance(batch, tuple | list)
        images = batch[0] if several else batch
        labels = batch[1][:left] if several and len(batch) > 1 else None
        why = ""  # nothing can be shown
        if not boards:
            names = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
            why = f"the trainer needs a TensorBoardLogger, it has {names}"
        elif not isinstance(images, torch.Tensor):
            kind = type(images).__name__
            why = f"batches must be images, or tuples that begin with them, got {kind}"
        elif labels is None and "label" in self._targets:
            why = "targets are labels, but the batches have images alone"
        if why:
            self._warn(why)
            return
        images = images[:left]
        columns = [self._pictures(images)]
        for target in self._targets:
            columns += self._overlays(pl_module, images, labels if target == "label" else None)
        rows = torch.cat(columns, 2)  # side by side
        tag = f"{self._tag}/{dataloader_idx}" if dataloader_idx else self._tag
        for board in boards:
            for n, row in enumerate(rows, self._images - left):
                board.add_image(f"{tag}/{n}", row, trainer.global_step, dataformats="HWC")
        self._left[dataloader_idx] = left - len(images)

    def _warn(self, why: str) -> None:
        """Says once why nothing is shown; a training run does not end for it."""
        if not self._warned:
            warnings.warn(f"LogOverlays shows nothing: {why}", stacklevel=2)
        self._warned = True

    def _overlays(self, module: Any, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        """A column a layer, uint8 [N, H, W, 3] each."""
        explain = Explainer(module, self._layer, self._method, output=self._output)
        maps = explain(images, labels).maps.flatten(1, -3)
        pictures = self._pictures(images)
        return [self._draw(pictures, each).cpu() for each in maps.unbind(1)]

    def _pictures(self, images: Tensor) -> Tensor:
        """Images as seen, uint8 [N, H, W, 3] on the CPU."""
        shape = (-1, 1, 1) if self._mean.ndim else ()
        mean, std = self._mean.reshape(shape), self._std.reshape(shape if self._std.ndim else ())
        seen = (images.detach().float().cpu() * std + mean).clamp(0, 1)
        return (seen * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _is_tensorboard(logger: Any) -> bool:
    """Of either package; others have other ways to take an image."""
    return any(kind.__name__ == "TensorBoardLogger" for kind in type(logger).__mro__)
