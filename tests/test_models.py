from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from torch import nn

from gradcampp_ext import models
from gradcampp_ext.imaging import ARTICLE, Recipe
from gradcampp_ext.models import Classes, ModelError


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `factories` on sys.path, gone afterwards."""
    (tmp_path / "factories.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        from gradcampp_ext.imaging import Recipe
        from gradcampp_ext.models import Classes, LoadedModel

        def plain():
            return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(1), nn.LazyLinear(2))

        def net():
            return nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def full():
            return LoadedModel(net(), Recipe((32, 32), "stretch", (32, 32)), Classes(("a", "b")))

        def wrong():
            return 3

        instance = net()
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "factories"
    sys.modules.pop("factories", None)


def test_demo_is_the_real_network():
    loaded = models.load("demo")
    assert not loaded.model.training
    assert loaded.recipe.mean == pytest.approx((127 / 255,) * 3)
    assert loaded.classes.name(281) == "tabby"
    assert loaded.classes.ids[281] == "n02123045"
    assert loaded.target_layer == "_avg_pooling:input"
    assert models.load("demo").weights_sha256 == loaded.weights_sha256
    random = models.load("demo", weights="none")
    assert random.weights_sha256 != loaded.weights_sha256
    assert random.weights_sha256 == models.load("demo", weights="none").weights_sha256


def test_imagenet_classes_equal_those_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    names = models.imagenet_classes().names
    assert list(names) == torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    assert len(set(models.imagenet_classes().ids)) == 1000


@pytest.mark.parametrize(
    ("label", "index"),
    [
        ("281", 281),
        ("tabby", 281),
        ("Tabby", 281),
        ("n02123045", 281),
        ("electric_ray", 5),
        ("cardigan", 474),
        ("Cardigan", 264),
    ],
)
def test_labels_by_index_name_and_wordnet_id(label, index):
    assert models.imagenet_classes().index(label) == index


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("1000", "only 0 to 999"),
        ("CARDIGAN", r"\[264, 474\]; give the index"),
        ("tabbi", "did you mean tabby"),
        ("-1", "no class is called"),
        ("²", "no class is called"),
    ],
)
def test_other_labels_are_errors(label, message):
    with pytest.raises(ValueError, match=message):
        models.imagenet_classes().index(label)
    with pytest.raises(ValueError, match="are not known"):
        Classes().index("tabby")


def test_known_names_are_no_indices():
    classes = models.imagenet_classes()
    assert classes.known("tabby")
    assert classes.known("n02123045")
    assert not classes.known("281")
    assert not classes.known("CARDIGAN")
    assert not classes.known("holidays")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "a model is demo, torchvision:NAME"),
        ("", "a model is demo"),
        ("torchvision:resnet51", "did you mean torchvision:resnet50"),
        ("torchvision:fcn_resnet50", "torchvision:fcn_resnet50 is no classifier of pictures"),
        ("torchvision:", "a model is demo"),
        ("timm:resnet51", "there is no model timm:resnet51"),
        ("no.such.package:factory", "No module named 'no'"),
        ("../x:factory", "a model is demo"),
        ("factories:absent", "has no attribute 'absent'"),
        ("factories:wrong", "must give a torch.nn.Module .*got int"),
        ("hf:/no/such/folder", "cannot be fetched"),
    ],
)
def test_specs_that_cannot_be_loaded(spec, message, module, monkeypatch):
    for package in ("torchvision", "timm", "transformers"):
        if spec.startswith(package) or (spec.startswith("hf:") and package == "transformers"):
            pytest.importorskip(package)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=message):
        models.load(spec)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'timm'"):
        models.load("timm:resnet18")


def test_factories(module):
    loaded = models.load("factories:full")
    assert (loaded.recipe.size, loaded.classes.names) == ((32, 32), ("a", "b"))
    assert loaded.spec == "factories:full"
    assert not loaded.model.training
    for spec in ("factories:net", "factories:instance"):
        assert models.load(spec).recipe is ARTICLE
    # random weights are always the same, and the caller's generator is left alone
    state = torch.get_rng_state()
    hashes = {models.load("factories:net").weights_sha256 for _ in range(2)}
    assert len(hashes) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_factory_with_weights(module, tmp_path):
    loaded = models.load("factories:net")
    state = {key: tensor + 1 for key, tensor in loaded.model.state_dict().items()}
    torch.save(state, tmp_path / "net.pth")
    filled = models.load("factories:net", weights=tmp_path / "net.pth")
    torch.testing.assert_close(filled.model.state_dict(), state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".pth", ""),
        (".pth", "state_dict"),
        (".pth", "model"),
        (".pth", "model_state_dict"),
        (".safetensors", ""),
    ],
)
def test_weights_files(tmp_path, wrap, prefix, suffix):
    model = small()
    state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({wrap: state, "epoch": 3} if wrap else state, file)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, file)
    filled = small()
    models._fill(filled, models.read_weights(file), file)
    torch.testing.assert_close(filled.state_dict(), model.state_dict())


def test_weights_that_do_not_fit(tmp_path):
    file = tmp_path / "weights.pth"
    state = small().state_dict()
    state["4.bias"] = torch.zeros(7)
    state["extra"] = torch.zeros(1)
    del state["0.weight"]
    torch.save(state, file)
    with pytest.raises(ModelError) as caught:
        models._fill(small(), models.read_weights(file), file)
    text = str(caught.value)
    assert "1 missing in the file (0.weight)" in text
    assert "1 unknown to the model (extra)" in text
    assert "1 of another shape (4.bias [7] instead of [3])" in text


class Payload:
    """Would run code when unpickled without weights_only."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "none.pth", "does not exist"),
        (b"rubbish", "a.pth", "cannot be read|damaged"),
        (b"rubbish", "a.safetensors", "cannot be read as safetensors"),
        (b"", "a.pth", "cannot be read"),
        ({"weights": Payload()}, "a.pth", "could run code"),
        ([1, 2], "a.pth", "holds no state dict"),
        ({"epoch": 3}, "a.pth", "holds no state dict"),
    ],
)
def test_weights_files_that_cannot_be_read(tmp_path, content, name, message):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ModelError, match=message):
        models.read_weights(file)


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_class_names_files(tmp_path, suffix):
    file = tmp_path / f"names{suffix}"
    file.write_text('{"1": "b", "0": "a"}' if suffix == ".json" else "a\nb\n", encoding="utf-8")
    assert models.read_classes(file).names == ("a", "b")
    file.write_text('["a", "b"]' if suffix == ".json" else "a\nb", encoding="utf-8")
    assert models.read_classes(file).names == ("a", "b")
    with pytest.raises(ModelError, match="cannot be read"):
        models.read_classes(tmp_path / "none.txt")


def test_torchvision_without_weights_and_with_a_file(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    loaded = models.load("torchvision:resnet18", weights="none")
    # ResNet18_Weights.DEFAULT.transforms(): shorter side to 256, 224 of it, bilinear
    assert loaded.recipe == Recipe((224, 224), "cover", (256, 256), "bilinear")
    assert loaded.classes.name(5) == "electric ray"
    model = torchvision.models.resnet18(num_classes=10)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    mine = models.load("torchvision:resnet18", weights=tmp_path / "mine.pth")
    assert mine.model.fc.out_features == 10
    assert mine.classes == Classes()
    torch.testing.assert_close(mine.model.state_dict(), model.state_dict())


def test_torchvision_takes_the_recipe_of_the_published_file(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    weights = torchvision.models.ResNet50_Weights
    model = torchvision.models.resnet50()
    sizes = {}
    for entry in (weights.IMAGENET1K_V1, weights.IMAGENET1K_V2):
        file = tmp_path / entry.url.rsplit("/", 1)[1]
        torch.save(model.state_dict(), file)
        loaded = models.load("torchvision:resnet50", weights=file)
        sizes[entry.name] = loaded.recipe.resize_to
    assert sizes == {"IMAGENET1K_V1": (256, 256), "IMAGENET1K_V2": (232, 232)}


def test_published_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(ModelError, match=r"(?s)not known.*--weights FILE, or --weights none"):
        models.load("torchvision:resnet18")


def test_timm_recipe_and_classes(tmp_path):
    timm = pytest.importorskip("timm")
    loaded = models.load("timm:resnet18.a1_in1k", weights="none")
    config = timm.data.resolve_model_data_config(loaded.model)
    transform = timm.data.create_transform(**config)
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    ours = loaded.recipe.normalize(torch.from_numpy(loaded.recipe.picture(image)[None].copy()))
    torch.testing.assert_close(ours[0], transform(image), rtol=0, atol=2e-6)
    assert loaded.classes.name(5) == "electric ray"
    model = timm.create_model("resnet18", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    mine = models.load("timm:resnet18", weights=tmp_path / "mine.pth")
    assert mine.model.num_classes == 7
    assert mine.classes == Classes()


def test_timm_with_more_classes_than_imagenet_1k():
    pytest.importorskip("timm")
    loaded = models.load("timm:mobilenetv3_small_050", weights="none")
    assert len(loaded.classes.names) == 1000
    loaded = models.load("timm:mixer_b16_224.goog_in21k", weights="none")
    assert len(loaded.classes.names) == loaded.model.num_classes == 21843


@pytest.mark.parametrize(
    ("processor", "options"),
    [
        ("ViTImageProcessor", {}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
        ("CLIPImageProcessor", {}),
        ("DeiTImageProcessor", {}),  # stretched, then cropped
        ("EfficientNetImageProcessor", {}),  # normalised twice
        ("LevitImageProcessor", {}),  # resized to 256 / 224 of its size
        ("PoolFormerImageProcessor", {}),
    ],
)
def test_hugging_face_folder(tmp_path, processor, options):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label={0: "cat", 1: "dog"}
    )
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path)
    prepare = getattr(transformers, processor)(**options)
    prepare.save_pretrained(tmp_path)

    loaded = models.load(f"hf:{tmp_path}")

    assert loaded.classes.names == ("cat", "dog")
    torch.testing.assert_close(loaded.model.state_dict(), model.state_dict())
    image = Image.effect_noise((501, 330), 80).convert("RGB")
    ours = loaded.recipe.normalize(torch.from_numpy(loaded.recipe.picture(image)[None].copy()))
    theirs = prepare(image, return_tensors="pt")["pixel_values"]
    # the processor resizes tensors, which rounds differently from Pillow
    levels = (ours - theirs).abs() * 255 * torch.tensor(loaded.recipe.std)[:, None, None]
    assert levels.mean() < 0.02


@pytest.mark.parametrize(
    ("processor", "options", "message"),
    [
        ("MobileViTImageProcessor", {}, "no recipe has .MobileViT"),  # BGR
        ("MobileViTImageProcessor", {"do_normalize": False}, "without resizing or normalising"),
        ("PerceiverImageProcessor", {}, "no recipe has .Perceiver.*resize_to must be at least"),
        ("ViTImageProcessor", {"rescale_factor": 1 / 127.5}, "no recipe has .ViT"),
        ("ViTImageProcessor", {"size": {"longest_edge": 64}}, "no recipe has .ViT.*KeyError"),
        ("BitImageProcessor", {"do_center_crop": False}, "of different sizes"),
    ],
)
def test_hugging_face_processors_that_no_recipe_follows(tmp_path, processor, options, message):
    transformers = pytest.importorskip("transformers")
    transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]).save_pretrained(
        tmp_path
    )
    getattr(transformers, processor)(**options).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        models.load(f"hf:{tmp_path}", weights="none")


def test_hugging_face_crops_with_an_odd_margin():
    transformers = pytest.importorskip("transformers")
    # it may lie a pixel aside
    for crop in (30, 31):
        processor = transformers.BitImageProcessor(size={"shortest_edge": 38}, crop_size=crop)
        recipe = models._hf_recipe("hf:x", processor)
        assert (recipe.size, recipe.resize_to) == ((crop, crop), (38, 38))


def test_timm_models_on_the_hub_are_named_as_such(tmp_path):
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    config = timm.create_model("resnet18").pretrained_cfg
    transformers.TimmWrapperConfig(
        architecture="resnet18", pretrained_cfg=config, model_args={}
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"TimmWrapper.*timm's models are timm:hf-hub:NAME"):
        models.load(f"hf:{tmp_path}", weights="none")


def test_timm_models_that_see_a_frame_are_refused(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    framed = {"crop_pct": 1.15}  # as of volo_d5_448
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: create(*a, **k, pretrained_cfg_overlay=framed)
    )
    with pytest.raises(ModelError, match=r"into a black frame .crop_pct 1\.15"):
        models.load("timm:resnet18", weights="none")


def test_hash_is_of_names_types_shapes_and_values():
    base = small()
    digest = models._sha256(base)
    assert len(digest) == len(hashlib.sha256().hexdigest())
    other = small()
    other.load_state_dict(base.state_dict())
    assert models._sha256(other) == digest
    with torch.no_grad():
        other[0].bias[0] += 1
    assert models._sha256(other) != digest
    assert models._sha256(base.to(torch.bfloat16)) != digest


def test_demo_needs_no_other_model_library():
    code = (
        "import sys\n"
        "for name in ('torchvision', 'timm', 'transformers'): sys.modules[name] = None\n"
        "from gradcampp_ext import models; print(models.load('demo').classes.name(0))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "tench\n"
