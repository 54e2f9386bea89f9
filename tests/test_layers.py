"""Finding layers, and reading what they give as maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

import gradcampp_ext as gx
from gradcampp_ext import layers
from gradcampp_ext.capture import Capture, CaptureError, Site
from gradcampp_ext.layers import Layout


def image(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size)


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


def vision_transformer() -> VisionTransformer:
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model


def swin() -> SwinTransformer:
    return SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=5)


def test_find() -> None:
    model = nn.Sequential(pooled(), nn.ReLU())
    assert layers.find(model, "0.1") == Site("0.1", model[0][1])
    assert layers.find(model, model[0][1]) == Site("0.1", model[0][1])
    assert layers.find(model, "0.2:input") == Site("0.2:input", model[0][2], reads_input=True)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("layer44", "'layer44' is not the name of a module of the model; did you mean 'layer4'"),
        ("xyz", "'xyz' is not the name .*candidates, or gradcampp layers MODEL, lists them"),
        ("layer4:output", "may end in ':input' and nothing else, got 'layer4:output'"),
        (nn.ReLU(), "this ReLU is none of its modules"),
    ],
)
def test_find_errors(layer, message) -> None:
    model = nn.ModuleDict({"layer3": nn.ReLU(), "layer4": nn.ReLU()})
    with pytest.raises(ValueError, match=message):
        layers.find(model, layer)


def test_names_of_a_wrapped_model() -> None:
    model = nn.Sequential(pooled(), nn.ReLU())
    for name in ("module.0.1", "_orig_mod.0.1", "module._orig_mod.0.1:input"):
        site = layers.find(model, name)
        assert (site.module, site.reads_input) == (model[0][1], name.endswith("input"))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_layers() -> None:
    model = pooled()
    model[1] = torch.jit.script(model[1])
    with pytest.raises(ValueError, match=r"'1' is scripted or traced and calls no hooks; name a"):
        layers.find(model, "1")
    assert [layer.name for layer in layers.candidates(model, image(9, 9))] == ["0", "2:input"]


def test_candidates() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2)
            self.act = nn.ReLU()
            self.squeeze = nn.AdaptiveAvgPool2d(1)  # in the middle: not the pooling of the head
            self.last = nn.Conv2d(4, 6, 1)
            self.head = nn.Linear(6, 5)
            self.idle = nn.Conv2d(6, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.act(self.conv(x))
            x = self.act(self.last(x * self.squeeze(x)))
            return self.head(x.mean((2, 3)))

    model = Model().train()
    x = image(9, 13)
    assert layers.candidates(model, x) == [
        layers.Candidate("conv", "Conv2d", (2, 4, 4, 6)),
        layers.Candidate("last", "Conv2d", (2, 6, 4, 6)),
    ]
    assert layers.candidates(pooled(), x)[-1] == layers.Candidate(
        "2:input", "AdaptiveAvgPool2d", (2, 4, 7, 11)
    )
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())


class MeanOfTokens(nn.Module):
    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)
        self.extra = nn.Parameter(torch.randn(1, prefix, 8))
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
        return self.head(self.block(x).mean(1))


class Functional(nn.Module):
    """The last convolution's output is pooled, but no module does it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class ChannelsLast(nn.Module):
    """Maps [N, *S, C] without a layer normalization: their proportions alone tell."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x).movedim(1, -1)).mean((1, 2)))


def fully_convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(2)


class HeadsBehind(nn.Module):
    """Attention whose [N, heads, T, d] looks like maps at first sight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key, self.head = nn.Conv2d(3, 8, 8, 8), nn.Identity(), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        heads = self.key(x.flatten(2).unflatten(1, (2, 4)).transpose(2, 3))
        return self.head((x.flatten(2) + heads.transpose(2, 3).flatten(1, 2)).mean(2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.drop = nn.Linear(8, 8), nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.heads(x).unflatten(2, (2, 4)).transpose(1, 2)  # [N, 2, T, 4]
        weights = self.drop((heads @ heads.transpose(2, 3)).softmax(-1))  # [N, 2, T, T]
        return (weights @ heads).transpose(1, 2).flatten(2)


class UnknownGrid(nn.Module):
    """Tokens of patches that no convolution made, and attention, whose weights are no maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(48, 8), Attention(), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
        return self.head(self.attention(self.embed(patches.flatten(1, 2))).mean(1))


class ImageAndText(MeanOfTokens):
    """As CLIP: the texts' layers come last, and their four tokens would make a grid of 2 x 2."""

    def __init__(self) -> None:
        super().__init__(1)
        self.word, self.text = nn.Embedding(9, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ self.text(self.word(text)).mean(1).T


class UnusedPooler(MeanOfTokens):
    """One token, made by attention pooling, that the score does not use."""

    def __init__(self) -> None:
        super().__init__(0)
        self.pooler, self.idle = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.embed(x).flatten(2).transpose(1, 2))
        self.pooler(self.idle(x).mean(1, keepdim=True))
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("build", "size", "name"),
    [
        (pooled, (8, 10), "2:input"),
        (Functional, (8, 10), "features"),
        (fully_convolutional, (8, 10), "1"),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(2), Mean()), (8, 10), "0"),
        (lambda: MeanOfTokens(1), (16, 24), "block"),
        (UnusedPooler, (16, 24), "block"),
        (vision_transformer, (32, 32), "encoder.layers.encoder_layer_1.ln_1"),
        (swin, (32, 48), "avgpool:input"),
        (HeadsBehind, (32, 48), "embed"),
        (ChannelsLast, (16, 24), "block"),
    ],
)
def test_default(build, size, name) -> None:
    model = build()
    site = layers.default(model, (image(*size),), {}, lambda output: output.amax(1, keepdim=True))
    assert site.name == name
    module, _, side = name.partition(":")
    assert (site.module, site.reads_input) == (model.get_submodule(module), bool(side))


def test_default_errors() -> None:
    def score(output: torch.Tensor) -> torch.Tensor:
        return output.amax(1, keepdim=True)

    with pytest.raises(CaptureError, match="found no layer with maps in this model"):
        layers.default(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), (image(4, 4),), {}, score)
    untrained = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    with pytest.raises(CaptureError, match="are the weights of the head zero"):
        layers.default(untrained, (image(32, 32),), {}, score)


def test_default_is_a_layer_of_the_image() -> None:
    def score(output: torch.Tensor) -> torch.Tensor:
        return output.amax(1, keepdim=True)

    for texts in (1, 2, 3):
        text = torch.randint(9, (texts, 4))
        assert layers.default(ImageAndText(), (image(16, 16), text), {}, score).name == "block"
        kwargs = {"text": text, "x": image(16, 16)}
        assert layers.default(ImageAndText(), (), kwargs, score).name == "block"


def test_default_takes_no_attention_for_maps() -> None:
    def score(output: torch.Tensor) -> torch.Tensor:
        return output.amax(1, keepdim=True)

    model, x = UnknownGrid().eval(), image(16, 24)
    assert "attention.drop" not in {each.name for each in layers.candidates(model, x)}
    with pytest.raises(CaptureError, match=r"with tokens=\(prefix, height, width\)"):
        layers.default(model, (x,), {}, score)
    assert layers.default(model, (x,), {}, score, (0, 4, 6)).name == "attention"
    with pytest.raises(CaptureError, match="found no layer with maps in this model"):
        layers.default(model, (x,), {}, score, (0, 4, 5))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.LSTM(7, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inside(x)[0].mean(1))


def turned() -> nn.Module:
    return nn.Sequential(Turn(), nn.Conv1d(7, 7, 3, stride=2), nn.ReLU(), Mean())


class Turn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize(("build", "layer"), [(Recurrent, "inside"), (turned, "2")])
def test_sequences_have_a_map_over_time(build, layer) -> None:
    model, x = build().eval(), torch.randn(2, 50, 7)
    maps = gx.Explainer(model, layer)(x, 1).maps
    assert maps.shape == (2, 1, 50)
    with Capture([layers.find(model, layer)]) as capture:
        scores = model(x)[:, 1:2]
    (a,), (g,) = capture.activations, capture.gradients(scores)
    if build is Recurrent:
        a, g = a.transpose(1, 2), g.transpose(2, 3)
    torch.testing.assert_close(maps, gx.cam(a, g, size=(50,)))


class Spectrogram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        window = torch.hann_window(16)
        found = torch.stft(x[:, 0], 16, window=window, return_complex=True).abs()
        return self.head(self.body(found[:, None]).mean((2, 3)))


def test_spectrograms_that_a_model_makes() -> None:
    explainer, x = gx.Explainer(Spectrogram().eval(), "body"), torch.randn(2, 1, 64)
    assert explainer(x, 1, size="feature").maps.shape == (2, 1, 7, 15)
    assert explainer(x, 1, size=(9, 17)).maps.shape == (2, 1, 9, 17)
    message = r"size=None is that of the images, \[64\], but layer 'body' gives \[2, 4, 7, 15\]"
    with pytest.raises(ValueError, match=message):
        explainer(x, 1)


@pytest.mark.parametrize("size", [50, 7])
def test_signals_keep_channels_first(size) -> None:
    model = nn.Sequential(nn.Conv1d(7, 7, 5, stride=2), nn.ReLU(), nn.Conv1d(7, 7, 1), Mean())
    x = torch.randn(2, 7, size)
    explained = gx.Explainer(model.eval(), "1")(x, 1, size="feature")
    assert explained.maps.shape == (2, 1, (size - 5) // 2 + 1)
    assert gx.Explainer(model, "1")(x, 1).maps.shape == (2, 1, size)


@pytest.mark.parametrize("leading", [(2,), (2, 3)])
def test_layouts_are_views(leading) -> None:
    tokens = torch.randn(*leading, 2 + 12, 5)
    maps = Layout((3, 4), 2)(tokens)
    assert maps.shape == (*leading, 5, 3, 4)
    assert maps.data_ptr() == tokens[..., 2:, :].data_ptr()
    assert torch.equal(maps[..., 1, 2], tokens[..., 2 + 4 + 2, :])
    swin_like = torch.randn(*leading, 3, 4, 5)
    maps = Layout((3, 4))(swin_like)
    assert maps.data_ptr() == swin_like.data_ptr()
    assert torch.equal(maps[..., 1, 2], swin_like[..., 1, 2, :])
    assert Layout()(swin_like) is swin_like


def layout_of(model, name, x, tokens=None) -> Layout:
    site = layers.find(model, name)
    shape = next(c.shape for c in layers.candidates(model, x) if c.name == name)
    return layers.layout(model, site, shape, (x,), {}, tokens=tokens)


@pytest.mark.parametrize(
    ("build", "name", "size", "expected"),
    [
        (vision_transformer, "encoder.layers.encoder_layer_0", (32, 32), Layout((4, 4), 1)),
        (lambda: MeanOfTokens(0), "block", (16, 24), Layout((4, 6), 0)),
        (lambda: MeanOfTokens(5), "block", (16, 24), Layout((4, 6), 5)),
        (lambda: MeanOfTokens(8), "block", (16, 24), Layout((4, 6), 8)),
        (swin, "features.1", (32, 48), Layout((8, 12))),
        (swin, "features.3", (32, 48), Layout((4, 6))),
        (swin, "features.1", (32, 32), Layout((8, 8))),  # [N, 8, 8, 8]
        (ChannelsLast, "block", (16, 24), Layout((4, 6))),
        (swin, "avgpool:input", (32, 48), Layout()),
        (pooled, "0", (6, 6), Layout()),  # [N, 4, 4, 4]
        (pooled, "2:input", (6, 17), Layout()),
    ],
)
def test_layout_is_found(build, name, size, expected) -> None:
    assert layout_of(build(), name, image(*size)) == expected


def test_image_size() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.transpose(1, 2))

    video = torch.randn(2, 6, 3, 9, 8)  # [N, T, C, H, W]
    assert layers.image_size(Turned(), (video,), {}) == [6, 9, 8]
    assert layers.image_size(nn.Conv3d(6, 4, 2), (video,), {}) == [3, 9, 8]
    assert layers.image_size(pooled(), (), {"x": image(9, 8)}) == [9, 8]


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_layout_after_patch_merging(factor) -> None:
    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.merge = nn.Conv2d(3, 2, 4, stride=4), nn.Linear(2 * factor**2, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.pixel_unshuffle(self.embed(x), factor)
            return self.merge(x.flatten(2).transpose(1, 2)).mean(1)

    x = image(8 * factor, 12 * factor)
    assert layout_of(Merging(), "merge", x) == Layout((2, 3), 0)


def test_layout_is_told() -> None:
    x = image(16, 24)
    assert layout_of(MeanOfTokens(3), "block", x, tokens=(3, 6, 4)) == Layout((6, 4), 3)
    assert layout_of(swin(), "features.1", image(32, 48), tokens=[0, 8, 12]) == Layout((8, 12))
    with pytest.raises(ValueError, match=r"tokens=\(1, 6, 4\) does not fit layer 'block'.*27, 8\]"):
        layout_of(MeanOfTokens(3), "block", x, tokens=(1, 6, 4))


@pytest.mark.parametrize("shape", [(4, 4, 3, 3), (2, 50, 8), (2, 24 + 9, 8), (2, 8)])
def test_layout_errors(shape) -> None:
    model = MeanOfTokens(0)
    x = image(16, 24)
    message = r"layer 'block' gives \[.*\] for images \[2, 3, 16, 24\].*tokens=\(prefix"
    with pytest.raises(CaptureError, match=message):
        layers.layout(model, layers.find(model, "block"), shape, (x,), {})


def test_patches_without_gradient() -> None:
    site, layout = Site("norm", nn.Identity()), Layout((2, 2), 1)
    gradients = torch.zeros(2, 1, 5, 3)
    layers.check_patches(site, layout, gradients)  # a constant score: its maps are zero
    gradients[:, :, 0] = 1
    with pytest.raises(CaptureError, match=r"at the patches of layer 'norm' is zero.*class token"):
        layers.check_patches(site, layout, gradients)
    gradients[0, 0, 3, 1] = 1
    layers.check_patches(site, layout, gradients)


def test_unwrap() -> None:
    model = pooled()
    assert layers.unwrap(model) is model
    assert layers.unwrap(nn.DataParallel(torch.compile(model))) is model


def test_image_of() -> None:
    x = image(4, 4)
    assert layers.image_of((), {"input_ids": torch.ones(2, 3, 4, dtype=torch.long), "x": x}) is x
    message = r"images must hold a floating-point tensor .* got torch.float32 \[2, 3\], torch.uint8"
    with pytest.raises(ValueError, match=message):
        layers.image_of((torch.ones(2, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), {})
    with pytest.raises(ValueError, match="got no tensor"):
        layers.image_of(([image(4, 4)],), {})
