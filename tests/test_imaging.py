from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gradcampp_ext import imaging
from gradcampp_ext.imaging import ARTICLE, ARTICLE_FIT, ImageError, Recipe


def noise(width: int, height: int, *, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:  # noqa: A002
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [
        ("RGB", "PNG", {}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGB", "PPM", {}),
        ("RGB", "TGA", {}),
        ("L", "PNG", {}),
        ("L", "PPM", {}),
        ("P", "PNG", {}),
        ("P", "GIF", {}),
        ("1", "PNG", {}),
        ("CMYK", "TIFF", {}),
        ("RGB", "JPEG", {"quality": 98, "subsampling": 0}),
        ("L", "JPEG", {"quality": 98}),
        ("CMYK", "JPEG", {"quality": 98, "subsampling": 0}),
    ],
)
def test_modes_and_formats_become_rgb(tmp_path, mode, format, options):  # noqa: A002
    left, right = (200, 30, 60), (20, 160, 220)
    if mode in ("L", "1"):
        left, right = (0, 0, 0), (255, 255, 255)
    upright = Image.new("RGB", (40, 24), left)
    upright.paste(right, (20, 0, 40, 24))
    path = tmp_path / f"picture.{format.lower()}"
    upright.convert(mode, palette=Image.Palette.ADAPTIVE).save(path, format, **options)

    image = imaging.read(path)

    assert (image.mode, image.size) == ("RGB", (40, 24))
    lossy = 6 if format == "JPEG" else 0
    assert np.abs(np.subtract(image.getpixel((5, 12)), left)).max() <= lossy
    assert np.abs(np.subtract(image.getpixel((35, 12)), right)).max() <= lossy


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation, upright, format):  # noqa: A002
    stored = noise(5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(stored, format, exif=exif, **options)
    np.testing.assert_array_equal(np.asarray(imaging.read(data)), upright(np.asarray(stored)))


def test_transparency_is_laid_over_white():
    half = Image.new("RGBA", (2, 1), (0, 100, 200, 128))
    half.putpixel((1, 0), (9, 9, 9, 0))
    image = imaging.read(encoded(half, "PNG"))
    # 128/255 of the colour and the rest white
    assert image.getpixel((0, 0)) == pytest.approx((127, 177, 227), abs=1)
    assert image.getpixel((1, 0)) == (255, 255, 255)


def test_transparency_of_grey_palette_and_colour_key():
    grey = Image.new("LA", (1, 1), (0, 0))
    assert imaging.read(encoded(grey, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image = imaging.read(encoded(palette, "PNG", transparency=0))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (7, 8, 9))
    image = imaging.read(encoded(keyed, "PNG", transparency=(1, 2, 3)))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (7, 8, 9)]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_cut(format):  # noqa: A002
    values = np.array([[0, 257, 12345, 32768, 65535]], dtype=np.uint16)
    image = imaging.read(encoded(Image.fromarray(values), format))
    grey = [0, 1, 48, 128, 255]  # v / 257, rounded
    np.testing.assert_array_equal(np.asarray(image), np.repeat([grey], 3).reshape(1, 5, 3))


def test_float_pixels_are_read_from_0_to_1_only():
    fine = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [imaging.read(fine).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    with pytest.raises(ImageError, match="from 0 to 300"):
        imaging.read(Image.fromarray(np.array([[0.0, 300.0]], dtype=np.float32)))
    with pytest.raises(ImageError, match="nan"):
        imaging.read(Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)))


def test_wide_integers_are_refused():
    wide = Image.fromarray(np.array([[0, 1 << 20]], dtype=np.int32))
    with pytest.raises(ImageError, match="only 8 and 16 bits"):
        imaging.read(encoded(wide, "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(format):  # noqa: A002
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert imaging.read(data).getpixel((4, 4)) == (255, 0, 0)


def test_arrays_images_and_bytes_are_sources(tmp_path):
    image = noise(6, 4)
    pixels = np.asarray(image)
    for source in (image, pixels, encoded(image, "PNG")):
        np.testing.assert_array_equal(np.asarray(imaging.read(source)), pixels)
    with pytest.raises(ImageError, match="uint8, got float64"):
        imaging.read(pixels / 255)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files_are_errors(format, kept):  # noqa: A002
    data = encoded(noise(64, 64), format)
    with pytest.raises(ImageError):
        imaging.read(data[: int(kept * len(data))])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"not a picture", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an image|damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    ],
)
def test_other_files_are_errors(tmp_path, content, reason):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        imaging.read(path)


def test_missing_files_and_folders_are_errors(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        imaging.read(tmp_path / "none.png")
    with pytest.raises(ImageError, match="directory"):
        imaging.read(tmp_path)


def test_decompression_bombs_are_refused_and_large_pictures_are_not(monkeypatch):
    data = encoded(Image.new("L", (30, 10)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert imaging.read(data).size == (30, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="more than 200 pixels"):
        imaging.read(data)


SIZES = [(400, 300), (300, 400), (333, 250), (256, 256), (224, 224), (97, 61), (1000, 311)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["ResNet18_Weights", "ConvNeXt_Tiny_Weights", "ViT_B_16_Weights"])
def test_recipe_equals_torchvision(size, name):
    torchvision = pytest.importorskip("torchvision")
    preset = getattr(torchvision.models, name).DEFAULT.transforms()
    recipe = Recipe(
        size=(preset.crop_size[0],) * 2,
        resize_to=(preset.resize_size[0],) * 2,
        interpolation=preset.interpolation.value,
    )
    image = noise(*size)
    ours = recipe.normalize(torch.from_numpy(recipe.picture(image)[None].copy()))[0]
    torch.testing.assert_close(ours, preset(image), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("mode", "resize"), [("center", "cover"), ("squash", "stretch"), ("border", "fit")]
)
@pytest.mark.parametrize("target", [(224, 224), (160, 224)], ids=str)
@pytest.mark.parametrize("fraction", [0.875, 0.95, 1.0])
def test_recipe_equals_timm(size, mode, resize, target, fraction):
    data = pytest.importorskip("timm.data")
    transform = data.create_transform(
        (3, *target), crop_pct=fraction, crop_mode=mode, interpolation="bicubic"
    )
    scaled = tuple(int(side / fraction) for side in target)
    recipe = Recipe(target, resize, scaled, "bicubic")
    image = noise(*size)
    ours = recipe.normalize(torch.from_numpy(recipe.picture(image)[None].copy()))[0]
    torch.testing.assert_close(ours, transform(image), rtol=0, atol=2e-6)


def test_fit_may_leave_a_border_on_all_sides():
    recipe = Recipe((6, 8), "fit", (4, 4), "nearest")
    picture = recipe.picture(Image.new("RGB", (2, 2), (9, 9, 9)))
    expected = np.empty((6, 8, 3), np.uint8)
    expected[:] = recipe._fill
    expected[1:5, 2:6] = 9
    np.testing.assert_array_equal(picture, expected)


def test_article_recipes():
    image = noise(448, 672)
    # shorter side to 224 by LANCZOS: 224 x 336, the central 224 rows of it
    expected = image.resize((224, 336), Image.Resampling.LANCZOS).crop((0, 56, 224, 280))
    np.testing.assert_array_equal(ARTICLE.picture(image), np.asarray(expected))
    assert ARTICLE.view(*image.size) == pytest.approx((0, 112, 448, 560))
    # longer side to 224: 149 x 224 (round(149.33)), padded by 37 on the left
    fitted = ARTICLE_FIT.picture(image)
    expected = image.resize((149, 224), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(fitted[:, 37:186], np.asarray(expected))
    assert (fitted[:, :37] == (124, 116, 104)).all()  # the mean colour
    assert (fitted[:, 186:] == (124, 116, 104)).all()


def test_crop_recipe():
    recipe = Recipe(resize="crop", interpolation="bicubic")
    image = noise(400, 300)
    # 224/256 of 300 is 262.5: 262 pixels, (400 - 262 + 1) // 2 from the left
    assert recipe.view(400, 300) == (69, 19, 331, 281)
    expected = image.crop((69, 19, 331, 281)).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(recipe.picture(image), np.asarray(expected))


RECIPES = [ARTICLE, ARTICLE_FIT, Recipe(), Recipe(resize="stretch"), Recipe(resize="crop")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.resize)
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (20000, 3), (2, 2)], ids=str)
def test_slivers_and_dots(recipe, size):
    assert recipe.picture(noise(*size)).shape == (224, 224, 3)
    assert recipe.display(noise(*size), (100, 140)).shape == (100, 140, 3)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.resize)
@pytest.mark.parametrize("size", [(640, 480), (300, 500), (225, 224)], ids=str)
def test_view_and_display_agree_with_the_picture(recipe, size):
    width, height = size
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    ramp = np.stack([across * 255 / width, down * 255 / height, 0 * down], -1).astype(np.uint8)
    image = Image.fromarray(ramp)
    picture = recipe.picture(image).astype(int)
    left, top, right, bottom = recipe.view(width, height)
    # each pixel's colour says where in the picture it came from
    for column, row in [(60, 112), (112, 60), (112, 112), (170, 112), (112, 170)]:
        x = left + (column + 0.5) * (right - left) / 224
        y = top + (row + 0.5) * (bottom - top) / 224
        assert picture[row, column, 0] == pytest.approx(x * 255 / width, abs=2)
        assert picture[row, column, 1] == pytest.approx(y * 255 / height, abs=2)
    same = recipe.display(image, (224, 224)).astype(int)
    assert np.abs(same - picture)[3:-3, 3:-3].max() <= 2
    large = recipe.display(image, (448, 448)).astype(int)
    assert np.abs(large[1::2, 1::2] - picture)[40:-40, 40:-40].max() <= 3


def test_recipe_arguments():
    with pytest.raises(ValueError, match=r"interpolation must be one of nearest, .*got 'cubic'"):
        Recipe(interpolation="cubic")
    with pytest.raises(ValueError, match="resize_to must be at least size"):
        Recipe(size=(300, 300))
    with pytest.raises(ValueError, match="resize must be"):
        Recipe(resize="shrink")


def test_normalize_layout_and_dtype():
    recipe = Recipe(mean=(0.5, 0.25, 0), std=(0.5, 0.25, 1))
    pictures = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
    pictures[1] = 255
    values = recipe.normalize(pictures, torch.bfloat16)
    assert values.dtype == torch.bfloat16
    assert values.shape == (2, 3, 4, 6)
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert values[:, :, 0, 0].tolist() == [[-1, -1, 0], [1, 3, 1]]


def test_colormaps_equal_matplotlib():
    matplotlib = pytest.importorskip("matplotlib")
    for name in (*imaging._tables(), "viridis_r", "PiYG"):
        expected = 255 * matplotlib.colormaps[name](np.arange(256))[:, :3]
        np.testing.assert_allclose(imaging.colormap(name), expected, rtol=0, atol=0.501)


def test_colormaps_without_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from gradcampp_ext import imaging\n"
        "print(imaging.colormap('turbo')[0], imaging.colormap('viridis')[-1])\n"
        "try: imaging.colormap('PiYG')\n"
        "except ValueError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, message, torch_loaded = out.stdout.splitlines()
    assert first == "[48 18 59] [253 231  37]"  # as published
    assert "turbo, jet, viridis" in message
    assert "got 'PiYG'" in message
    assert torch_loaded == "False"


def test_colormap_is_the_callers_own():
    imaging.colormap("gray")[:] = 0
    np.testing.assert_array_equal(imaging.colormap("gray")[:, 0], np.arange(256))


def test_overlay_by_hand():
    images = torch.full((1, 1, 3, 3), 100, dtype=torch.uint8)
    maps = torch.tensor([[[0.0, 0.5, 1.0]]])
    result = imaging.overlay(images, maps, colormap="gray", alpha=0.25)
    # 0.75 * 100 + 0.25 * (0, 128, 255)
    assert result[0, 0, :, 0].tolist() == [75, 107, 139]
    result = imaging.overlay(images, maps, colormap="gray", alpha=1.0, image_weight=1.0)
    assert result[0, 0, :, 0].tolist() == [100, 228, 255]
    floats = images.permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(imaging.overlay(floats, maps), imaging.overlay(images, maps))


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.full((1, 3, 8, 8), 200.0), "from 200 to 200; are they from 0 to 255, or normalized"),
        (torch.linspace(-2.1, 2.6, 192).view(1, 8, 8, 3), "from -2.1 to 2.6"),
        (torch.full((1, 3, 8, 8), float("nan")).half(), "from nan to nan"),
    ],
)
def test_overlay_needs_pictures_as_seen(images, got):
    with pytest.raises(ValueError, match=rf"images must be floats in \[0, 1\].*{got}"):
        imaging.overlay(images, torch.zeros(1, 8, 8))


def test_overlay_clips_what_interpolation_overshoots():
    corner = torch.zeros(1, 3, 8, 8)
    corner[..., 4:, 4:] = 1
    images = torch.nn.functional.interpolate(corner, (64, 64), mode="bicubic")
    assert images.max() > 1.2
    drawn = imaging.overlay(images, torch.zeros(1, 64, 64), alpha=0)
    assert torch.equal(drawn, imaging.overlay(images.clamp(0, 1), torch.zeros(1, 64, 64), alpha=0))
    assert imaging.overlay(torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8)).shape == (0, 8, 8, 3)


def test_overlay_needs_the_maps_size():
    with pytest.raises(ValueError, match=r"\(1, 7, 7\).*got \(1, 8, 8, 3\)"):
        imaging.overlay(torch.zeros(1, 8, 8, 3), torch.zeros(1, 7, 7))


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (torch.zeros(1, 1, 8, 8), {}, r"maps must be \[N, H, W\], got \[1, 1, 8, 8\]; an explan"),
        (torch.zeros(8, 8), {}, r"maps must be \[N, H, W\], got \[8, 8\]"),
        (torch.zeros(1, 8, 8), {"colormap": None}, "colormap must be one of .*got None"),
        (torch.zeros(1, 8, 8), {"alpha": "x"}, "weights .* must be finite, got 'x' and 'x'"),
    ],
)
def test_overlay_arguments(maps, options, message):
    with pytest.raises(ValueError, match=message):
        imaging.overlay(torch.zeros(1, 8, 8, 3), maps, **options)
