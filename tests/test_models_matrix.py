"""Families of models with random weights, end to end: the layer that is found, and its maps.

Of each model: the layer chosen without being named, maps that are not empty, gradients equal to
plain autograd's at that layer, zero maps of a constant score, nothing left on the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcampp_ext import Explainer, reference
from gradcampp_ext import layers as gx_layers

torchvision = pytest.importorskip("torchvision")


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=7, **options)


def vision_transformer() -> nn.Module:
    model = torchvision.models.VisionTransformer(96, 32, 3, 2, 32, 48, num_classes=7)
    nn.init.normal_(model.heads.head.weight)  # zero before training
    return model


# Of large families a small one: drawing tens of millions of weights takes longer than a test.
def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=7)


def convnext() -> nn.Module:
    widths = (16, 32, 48, 64)
    settings = [
        torchvision.models.convnext.CNBlockConfig(width, following, 1)
        for width, following in zip(widths, (*widths[1:], None), strict=True)
    ]
    return torchvision.models.ConvNeXt(settings, num_classes=7)


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        [4, 4], 16, [1, 1, 2, 1], [1, 2, 2, 4], [2, 2], num_classes=7
    )


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm = pytest.importorskip("timm")
        return timm.create_model(name, pretrained=False, num_classes=7, **options)

    return build


def hugging_face(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        made = getattr(transformers, f"{name}Config")(num_labels=7, **config)
        return getattr(transformers, f"{name}ForImageClassification")(made)

    return build


SMALL_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 64,
    "patch_size": 16,
}

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def text_and_image(name: str) -> Callable[[], nn.Module]:
    """The vision half of a CLIP-like model, as a classifier."""
    return hugging_face(name, vision_config=SMALL_VIT, text_config=TEXT)


# name: model, size of images, layer found, size of its maps
MODELS = {
    "resnet18": (vision("resnet18"), (64, 96), "avgpool:input", (2, 3)),
    "vgg11": (vision("vgg11"), (64, 96), "avgpool:input", (2, 3)),
    "densenet": (densenet, (64, 96), "features", (2, 3)),
    "mobilenet_v2": (vision("mobilenet_v2"), (64, 96), "features", (2, 3)),
    "mobilenet_v3": (vision("mobilenet_v3_small"), (64, 96), "avgpool:input", (2, 3)),
    "efficientnet_b0": (vision("efficientnet_b0"), (64, 96), "avgpool:input", (2, 3)),
    "convnext": (convnext, (64, 96), "avgpool:input", (2, 3)),
    "shufflenet": (vision("shufflenet_v2_x0_5"), (64, 96), "conv5", (2, 3)),
    "squeezenet": (vision("squeezenet1_1"), (64, 96), "classifier.0", (3, 5)),
    "vit": (vision_transformer, (96, 96), "encoder.layers.encoder_layer_2.ln_1", (3, 3)),
    "swin": (swin, (64, 96), "avgpool:input", (2, 3)),
    "r3d_18": (vision("r3d_18"), (4, 32, 48), "avgpool:input", (1, 2, 3)),
    "timm resnet": (timm_model("resnet10t"), (64, 96), "global_pool:input", (2, 3)),
    "timm convnext": (timm_model("convnext_atto"), (64, 96), "head.global_pool:input", (2, 3)),
    "timm efficientnet_lite0": (
        timm_model("efficientnet_lite0"),
        (64, 96),
        "global_pool:input",
        (2, 3),
    ),
    "timm vit": (
        timm_model("vit_tiny_patch16_224", img_size=(64, 96), depth=3),
        (64, 96),
        "blocks.2.norm1",
        (4, 6),
    ),
    "timm deit distilled": (
        timm_model("deit_tiny_distilled_patch16_224", img_size=64, depth=3),
        (64, 64),
        "blocks.2.norm1",
        (4, 4),
    ),
    "timm dinov2 registers": (
        timm_model("vit_small_patch14_reg4_dinov2", img_size=(56, 84), depth=3),
        (56, 84),
        "blocks.2.norm1",
        (4, 6),
    ),
    "timm vit averaged": (
        timm_model("vit_tiny_patch16_224", img_size=64, depth=3, global_pool="avg"),
        (64, 64),
        "norm",
        (4, 4),
    ),
    "timm swin": (
        timm_model(
            "swin_tiny_patch4_window7_224",
            img_size=(64, 96),
            window_size=2,
            embed_dim=24,
            depths=(1, 1, 2, 1),
        ),
        (64, 96),
        "head.global_pool:input",
        (2, 3),
    ),
    "hf vit": (hugging_face("ViT", **SMALL_VIT), (64, 64), "vit.layers.2.layernorm_before", (4, 4)),
    "hf deit": (
        hugging_face("DeiT", **SMALL_VIT), (64, 64), "deit.layers.2.layernorm_before", (4, 4),
    ),
    "hf clip vision": (
        text_and_image("CLIP"), (64, 64), "vision_model.encoder.layers.2", (4, 4),
    ),
    "hf siglip vision": (
        text_and_image("Siglip"), (64, 64), "vision_model.post_layernorm", (4, 4),
    ),
    "hf convnext": (
        hugging_face("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        (64, 96),
        "convnext.encoder.stages.1",
        (8, 12),
    ),
    "hf dinov2 registers": (
        hugging_face("Dinov2WithRegisters", **SMALL_VIT),
        (64, 64),
        "dinov2_with_registers.layernorm",
        (4, 4),
    ),
    "hf swin": (
        hugging_face(
            "Swin", image_size=64, patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[2, 4],
            window_size=4,
        ),
        (64, 64),
        "swin.layernorm",
        (8, 8),
    ),
    "hf resnet": (
        hugging_face("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        (64, 96),
        "resnet.pooler:input",
        (8, 12),
    ),
}  # fmt: skip


def plain_autograd(
    model: nn.Module, layer: str, x: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    kept: list[Tensor] = []
    name, _, side = layer.partition(":")
    module = model.get_submodule(name)

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(args[0])
        return (args[0].clone(), *args[1:])

    def after(_: nn.Module, __: object, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handle = (
        module.register_forward_pre_hook(before) if side else module.register_forward_hook(after)
    )
    with handle:
        output = model(x)
    logits = output if isinstance(output, Tensor) else output.logits
    [gradients] = torch.autograd.grad(logits.gather(1, classes).sum(), kept)
    return kept[0].detach(), gradients


@pytest.mark.parametrize("name", MODELS)
def test_family(name: str) -> None:
    build, size, layer, map_size = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within the peers
        model = build().eval()
    x = torch.randn(2, 3, *size)
    explainer = Explainer(model)
    explanation = explainer(x, topk=2)
    assert explanation.layer == layer
    assert explanation.maps.shape == (2, 2, *size)
    assert explanation.maps.isfinite().all()
    assert explanation.maps.flatten(2).amax(2).gt(0).all()

    activations, gradients = plain_autograd(model, layer, x, explanation.targets[:, 1:])
    site = gx_layers.find(model, layer)
    layout = gx_layers.layout(model, site, activations.shape, (x,), {})
    a, g = layout(activations), layout(gradients)
    assert a.shape[2:] == map_size
    expected = reference.cam(a, g, size=size)
    torch.testing.assert_close(explanation.maps[:, 1].double(), expected, rtol=0, atol=2e-4)

    assert not explainer(x, lambda output: output.sum(1) * 0).maps.any()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_clip_with_text_targets() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=SMALL_VIT, projection_dim=16)
    model = transformers.CLIPModel(config)
    inputs = {
        "input_ids": torch.randint(3, 50, (5, 9)),
        "pixel_values": torch.randn(2, 3, 64, 64),
        "attention_mask": torch.ones(5, 9, dtype=torch.long),
    }
    explanation = Explainer(model, output="logits_per_image")(inputs, [[0, 4], [2, 3]])
    assert explanation.layer == "vision_model.encoder.layers.2.layer_norm1"
    assert explanation.maps.shape == (2, 2, 64, 64)
    assert explanation.maps.flatten(2).amax(2).gt(0).all()
    assert not torch.equal(explanation.maps[:, 0], explanation.maps[:, 1])


def test_class_token_alone_is_explained() -> None:
    model = timm_model("vit_tiny_patch16_224", img_size=64, depth=3)().eval()
    message = r"patches of layer 'blocks.2' is zero.*class token counts.*target_layer=None"
    with pytest.raises(RuntimeError, match=message):
        Explainer(model, "blocks.2")(torch.randn(1, 3, 64, 64))
    assert Explainer(model, "blocks.1")(torch.randn(1, 3, 64, 64)).maps.any()


def test_segmentation() -> None:
    from gradcampp_ext.targets import Region

    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    )
    x = torch.randn(2, 3, 64, 96)
    mask = torch.zeros(64, 96)
    mask[10:30, 40:80] = 1
    explanation = Explainer(model, "backbone.16")(x, [Region(1, mask), Region(2, mask)])
    assert explanation.maps.shape == (2, 2, 64, 96)
    assert explanation.maps.flatten(2).amax(2).gt(0).all()
    assert explanation.predicted is None
    torch.testing.assert_close(
        explanation.scores[:, 0], model.eval()(x)["out"][:, 1][:, mask.bool()].mean(1)
    )


def test_detection_by_callable() -> None:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    x = torch.rand(1, 3, 96, 96)

    def best(detections: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([each["scores"][:5].sum() for each in detections])

    explanation = Explainer(model, "backbone.features.1", output=lambda found: found)(x, best)
    assert explanation.maps.shape == (1, 1, 96, 96)
    assert explanation.scores.shape == (1, 1)


@pytest.mark.filterwarnings("ignore")
def test_video_of_frames_first() -> None:
    """[N, T, C, H, W] and tokens over time and space: maps lie over [T, H, W]."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(num_labels=7, num_frames=6, tubelet_size=2, **SMALL_VIT)
    model = transformers.VideoMAEForVideoClassification(config).eval()
    x = torch.randn(2, 6, 3, 64, 64)
    explainer = Explainer(model)
    explanation = explainer(x, topk=2)
    assert explanation.layer == "videomae.encoder.layer.2"
    assert explanation.maps.shape == (2, 2, 6, 64, 64)
    small = explainer(x, topk=2, size="feature").maps
    assert small.shape == (2, 2, 3, 4, 4)
    expected = nn.functional.interpolate(small, (6, 64, 64), mode="trilinear")
    torch.testing.assert_close(explanation.maps, expected, rtol=0, atol=1e-5)
    activations, gradients = plain_autograd(model, explanation.layer, x, explanation.targets[:, :1])
    a, g = (t.movedim(-1, 1).unflatten(2, (3, 4, 4)) for t in (activations, gradients))
    torch.testing.assert_close(small[:, 0].double(), reference.cam(a, g), rtol=0, atol=2e-4)


def test_audio() -> None:
    class Audio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 6, 9, stride=4)
            self.pool, self.head = nn.AdaptiveAvgPool1d(1), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(self.conv(x).relu()).flatten(1))

    explanation = Explainer(Audio())(torch.randn(3, 2, 200), topk=2)
    assert explanation.layer == "pool:input"
    assert explanation.maps.shape == (3, 2, 200)


def test_time_series_of_tokens() -> None:
    class Series(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv1d(2, 8, 5, stride=5)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.embed(x).transpose(1, 2)).square().mean(1))

    x = torch.randn(3, 2, 100)
    assert Explainer(Series(), "norm")(x, 1, size="feature").maps.shape == (3, 1, 20)
