"""Pictures: reading files, a network's preprocessing recipe, colour maps, overlays."""

from __future__ import annotations

import functools
import io
import json
import math
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from gradcampp_ext import checks

if TYPE_CHECKING:
    import os

    import torch

Pixels: TypeAlias = npt.NDArray[np.uint8]
Box: TypeAlias = tuple[float, float, float, float]
Resize: TypeAlias = Literal["cover", "fit", "stretch", "crop"]
Source: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | Pixels"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WHITE = (255, 255, 255)


class ImageError(ValueError):
    """A picture that cannot be read; the text is the reason, without the path."""


def read(source: Source) -> Image.Image:
    """Read one picture as 8-bit RGB, upright.

    EXIF orientation is applied; transparency is laid over white; greyscale, palette, CMYK and
    YCbCr become RGB; 16-bit greyscale is scaled by 65535; of an animation the first frame is read.

    Args:
        source: a path, the bytes of a file, a PIL image, or uint8 pixels [H, W], [H, W, 3] or
            [H, W, 4].

    Raises:
        ImageError: the reason why it cannot be read: missing, empty, truncated, no image,
            or more pixels than PIL.Image.MAX_IMAGE_PIXELS allows twice over.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return _rgb(_open(source))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image, or in a format that Pillow cannot read") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(f"more than {limit} pixels: refused as a decompression bomb") from None
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    except Exception as error:  # decoders raise anything on damaged data
        raise ImageError(f"damaged image data ({type(error).__name__}: {error})") from error


def _open(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8:
            raise ImageError(f"an array of pixels must be uint8, got {source.dtype}")
        return Image.fromarray(source)
    if not isinstance(source, bytes):
        try:
            source = Path(source).read_bytes()
        except ValueError as error:  # a zero byte, or a surrogate that stands for no byte
            raise ImageError(f"no file can have this name: {error}") from error
    if not source:
        raise ImageError("empty file (0 bytes)")
    return Image.open(io.BytesIO(source), formats=_formats())


@functools.cache
def _formats() -> list[str]:
    """All of Pillow's but EPS, which would run Ghostscript on the file."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"integer pixels from {values.min()} to {values.max()}: only 8 and 16 bits are read"
            )
        return Image.fromarray(
            ((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)
        ).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ImageError(
                f"floating-point pixels from {values.min():g} to {values.max():g}; "
                "only the range 0 to 1 is read"
            )
        return Image.fromarray((values * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (*WHITE, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Recipe:
    """How a picture becomes the input of a network.

    Attributes:
        size: height and width of the input, in pixels.
        resize: what happens before the normalisation, always centred:
            "cover", aspect ratio kept, scaled until it just covers `resize_to`, then cut to `size`;
            "fit", aspect ratio kept, scaled to lie inside `resize_to`, then padded to `size` with
            the mean colour;
            "stretch", scaled to `resize_to` whatever the aspect ratio, then cut to `size`;
            "crop", cut first (`size / resize_to` of the shorter side), then scaled to `size`.
        resize_to: height and width, in pixels, that `resize` speaks of.
        interpolation: a filter of PIL.Image.Resampling, in lower case; all but "nearest" average
            over the pixels they shrink.
        mean: per RGB channel, in units of the full range: input = (pixel / 255 - mean) / std.
        std: likewise.
    """

    size: tuple[int, int] = (224, 224)
    resize: Resize = "cover"
    resize_to: tuple[int, int] = (256, 256)
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.interpolation.upper() not in Image.Resampling.__members__:
            names = ", ".join(name.lower() for name in Image.Resampling.__members__)
            raise ValueError(f"interpolation must be one of {names}; got {self.interpolation!r}")
        if self.resize not in ("cover", "fit", "stretch", "crop"):
            raise ValueError(f"resize must be cover, fit, stretch or crop; got {self.resize!r}")
        smaller = any(to < side for to, side in zip(self.resize_to, self.size, strict=True))
        if min(self.size) < 1 or (self.resize != "fit" and smaller):
            raise ValueError(
                f"resize_to must be at least size, both positive; "
                f"got resize_to={self.resize_to}, size={self.size}"
            )

    def view(self, width: int, height: int) -> Box:
        """The part of a `width` x `height` picture that the network sees.

        Returns: left, top, right, bottom in pixels of the upright picture; with "fit" the padding
            lies outside it (left or top below 0).
        """
        if self.resize == "crop":
            return self._central(width, height)
        across, down = self._resized(width, height)
        left, top = self._corner(across, down)
        x, y = width / across, height / down
        return left * x, top * y, (left + self.size[1]) * x, (top + self.size[0]) * y

    def picture(self, image: Image.Image) -> Pixels:
        """What the network sees of an upright RGB picture: uint8 [*size, 3]."""
        if self.resize == "crop":
            part = image.crop(self._central(*image.size))
            return np.asarray(part.resize(self.size[::-1], self._filter))
        across, down = self._resized(*image.size)
        if across * down > 64 * self.size[0] * self.size[1]:  # a sliver: scale only what is kept
            return self.display(image, self.size)
        left, top = self._corner(across, down)
        resized = image.resize((across, down), self._filter)
        if self.resize == "fit":
            canvas = Image.new("RGB", self.size[::-1], self._fill)
            canvas.paste(resized, (-left, -top))
            return np.asarray(canvas)
        return np.asarray(resized.crop((left, top, left + self.size[1], top + self.size[0])))

    def display(self, image: Image.Image, size: tuple[int, int]) -> Pixels:
        """The same view at another size, straight from the picture's own pixels.

        Args:
            image: upright RGB.
            size: height and width.

        Returns: uint8 [*size, 3].
        """
        left, top, right, bottom = self.view(*image.size)
        inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
        x, y = size[1] / (right - left), size[0] / (bottom - top)
        corner = round((inside[0] - left) * x), round((inside[1] - top) * y)
        across = max(1, round((inside[2] - left) * x) - corner[0])
        down = max(1, round((inside[3] - top) * y) - corner[1])
        part = image.resize((across, down), self._filter, box=inside)
        if part.size == (size[1], size[0]):
            return np.asarray(part)
        canvas = Image.new("RGB", (size[1], size[0]), self._fill)
        canvas.paste(part, corner)
        return np.asarray(canvas)

    def normalize(self, pictures: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Pictures to the network's input.

        Args:
            pictures: uint8 [N, H, W, 3].
            dtype: of the input; default float32.

        Returns: [N, 3, H, W] in channels-last memory, on the same device.
        """
        import torch

        mean = torch.tensor(self.mean, device=pictures.device)
        std = torch.tensor(self.std, device=pictures.device)
        values = (pictures.to(torch.float32) - 255 * mean) / (255 * std)
        return values.to(dtype or torch.float32).permute(0, 3, 1, 2)

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    @property
    def _fill(self) -> tuple[int, ...]:
        return tuple(round(255 * value) for value in self.mean)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after scaling, rounded as torchvision and timm round them."""
        down, across = self.resize_to
        if self.resize == "stretch":
            return across, down
        if self.resize == "cover" and down == across:
            if width <= height:
                return across, int(down * height / width)
            return int(across * width / height), down
        ratios = across / width, down / height
        ratio = min(ratios) if self.resize == "fit" else max(ratios)
        return max(1, round(width * ratio)), max(1, round(height * ratio))

    def _corner(self, across: int, down: int) -> tuple[int, int]:
        """Left and top of the central `size` in the scaled picture; negative where it is padded."""
        left, top = across - self.size[1], down - self.size[0]
        return (
            round(left / 2) if left > 0 else -(-left // 2),
            round(top / 2) if top > 0 else -(-top // 2),
        )

    def _central(self, width: int, height: int) -> tuple[int, int, int, int]:
        scale = min(width / self.resize_to[1], height / self.resize_to[0])
        across, down = max(1, int(self.size[1] * scale)), max(1, int(self.size[0] * scale))
        left, top = (width - across + 1) // 2, (height - down + 1) // 2
        return left, top, left + across, top + down


ARTICLE = Recipe(resize_to=(224, 224), interpolation="lanczos")
ARTICLE_FIT = Recipe(resize="fit", resize_to=(224, 224), interpolation="lanczos")


@functools.cache
def _tables() -> dict[str, str]:
    data = resources.files("gradcampp_ext").joinpath("data/colormaps.json")
    tables: dict[str, str] = json.loads(data.read_text(encoding="utf-8"))["tables"]
    return tables


def colormap(name: str) -> Pixels:
    """The 256 colours of a colour map: uint8 [256, 3], for 0 to 1.

    Args:
        name: as in Matplotlib; "_r" at its end reverses it. The common ones need no Matplotlib,
            any other is taken from it where it is installed.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    return _table(name).copy()


@functools.cache
def _table(name: str) -> Pixels:
    base = name.removesuffix("_r") if isinstance(name, str) else ""
    if base in _tables():
        table = np.frombuffer(bytes.fromhex(_tables()[base]), np.uint8).reshape(256, 3)
        return table[::-1] if name != base else table
    try:
        import matplotlib

        colours = matplotlib.colormaps[name](np.linspace(0, 1, 256))
    except (ImportError, KeyError):
        raise ValueError(
            f"colormap must be one of {', '.join(_tables())} (with _r: reversed), or any other of "
            f"Matplotlib's where that is installed; got {name!r}"
        ) from None
    return np.asarray((255 * colours[:, :3]).round(), dtype=np.uint8)


def check_weights(image_weight: float, heatmap_weight: float) -> None:
    """ValueError unless an overlay can have these weights."""
    if not all(
        math.isfinite(checks.as_number(weight)) for weight in (image_weight, heatmap_weight)
    ):
        raise ValueError(
            f"the weights of image and colours must be finite, got {image_weight!r} and "
            f"{heatmap_weight!r}"
        )


def tensor(images: Any, device: torch.device) -> torch.Tensor:
    """Images as a tensor there; TypeError for what cannot become one."""
    import torch

    try:
        return torch.as_tensor(images, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"images must be a tensor or an array: {error}") from error


_OVERSHOOT = 0.25  # bicubic interpolation goes 1/9 beyond an edge, 0.235 beyond a corner


def overlay(
    images: torch.Tensor | npt.NDArray[Any],
    maps: torch.Tensor,
    *,
    colormap: str = "turbo",
    alpha: float = 0.5,
    image_weight: float | None = None,
) -> torch.Tensor:
    """Lay maps as colours over images: image_weight * image + alpha * colour, clipped.

    Args:
        images: [N, H, W, 3] or [N, 3, H, W]; uint8, or floats in [0, 1]. On a CPU, floats that are
            outside by more than 1/4 are an error; bicubic resizing overshoots by less.
        maps: [N, H, W] in [0, 1], of the images' size.
        colormap: see `colormap`.
        alpha: weight of the colours.
        image_weight: weight of the image; default 1 - alpha.

    Returns: uint8 [N, H, W, 3] on the device of `maps`.

    Raises:
        TypeError: `maps` is no tensor, `images` nothing that could become one.
        ValueError: shapes, dtype, range, colour map or weights do not fit.
    """
    import torch

    from gradcampp_ext import ops  # noqa: F401 - defines the operators

    if not isinstance(maps, torch.Tensor):
        raise TypeError(f"maps must be a torch.Tensor, got {type(maps).__name__}")
    if maps.ndim != 3:
        raise ValueError(
            f"maps must be [N, H, W], got {list(maps.shape)}; an explanation's are "
            "explanation.maps[:, 0], or explanation.overlay(images) draws them all"
        )
    pictures = given = tensor(images, maps.device)
    check_weights(alpha if image_weight is None else image_weight, alpha)
    weight = 1 - alpha if image_weight is None else image_weight
    if pictures.shape == (len(maps), 3, *maps.shape[1:]):
        pictures = pictures.permute(0, 2, 3, 1)
    if pictures.shape != (*maps.shape, 3):
        raise ValueError(
            f"images must be [N, H, W, 3] or [N, 3, H, W] with the N, H, W of maps, "
            f"{tuple(maps.shape)}; got {tuple(pictures.shape)}; was size given to the explainer?"
        )
    if pictures.dtype != torch.uint8:
        if not pictures.is_floating_point():
            raise ValueError(f"images must be uint8 or floats in [0, 1], got {pictures.dtype}")
        if pictures.is_cpu and pictures.numel():  # a GPU would have to be waited for
            low, high = map(float, given.aminmax())  # in the order of memory, or it is slow
            if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
                raise ValueError(
                    f"images must be floats in [0, 1], or uint8; got floats from {low:g} to "
                    f"{high:g}; are they from 0 to 255, or normalized for the model?"
                )
        pictures = pictures.float()
    table = torch.from_numpy(_table(colormap).copy()).to(maps.device)
    blend: torch.Tensor = torch.ops.gradcampp_ext.overlay(
        pictures.detach(), maps.detach().float(), table, weight, alpha
    )
    return blend
