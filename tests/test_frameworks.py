"""Explanations inside other people's loops: torch.utils.data and Lightning."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_batch import Net
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from gradcampp_ext import Explainer
from gradcampp_ext.batch import explain_dataset


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.mark.parametrize("workers", [0, 2])
def test_explain_dataset(net, workers):
    data = TensorDataset(images(7), torch.arange(7) % 5)
    found = list(explain_dataset(Explainer(net), data, topk=2, batch_size=3, workers=workers))
    expected = Explainer(net)(images(7), topk=2)
    assert [sample.index for sample in found] == list(range(7))
    assert [sample.label for sample in found] == [0, 1, 2, 3, 4, 0, 1]
    assert [sample.predicted for sample in found] == expected.predicted.tolist()
    for n, sample in enumerate(found):
        torch.testing.assert_close(sample.image, images(7)[n])
        torch.testing.assert_close(sample.maps, expected.maps[n], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sample.targets, expected.targets[n])
        torch.testing.assert_close(sample.scores, expected.scores[n])
        torch.testing.assert_close(sample.probabilities, expected.probabilities[n])


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield images(1)[0]


class Odd(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return images(4)[index], f"class {index}"


def test_any_data_will_do(net):
    explainer = Explainer(net)
    endless = explain_dataset(explainer, Endless(), batch_size=2)
    assert [next(endless).index for _ in range(5)] == [0, 1, 2, 3, 4]
    assert [sample.label for sample in explain_dataset(explainer, Odd())] == [
        f"class {index}" for index in range(4)
    ]
    loader = DataLoader(TensorDataset(images(5), torch.tensor([4, 3, 2, 1, 0])), batch_size=2)
    found = list(explain_dataset(explainer, loader, targets="label", size="feature"))
    assert [sample.targets.tolist() for sample in found] == [[4], [3], [2], [1], [0]]
    assert found[0].maps.shape == (1, 8, 8)
    torch.testing.assert_close(found[0].maps, explainer(images(5), 4, size="feature").maps[0])
    assert next(iter(explain_dataset(explainer, list(images(2))))).label is None
    with pytest.raises(ValueError, match="the data gives images alone"):
        next(explain_dataset(explainer, Endless(), targets="label"))


def test_data_that_cannot_be_explained(net):
    pixels = [torch.zeros(3, 32, 32, dtype=torch.uint8)]
    with pytest.raises(ValueError, match="images must hold a floating-point tensor"):
        next(explain_dataset(Explainer(net), pixels))
    mappings = [{"image": image, "label": 0} for image in images(2)]
    with pytest.raises(TypeError, match=r"data must give tensors \[C, \*S\].*batches of dict"):
        next(explain_dataset(Explainer(net), mappings))


def test_a_model_in_another_dtype(net):
    (sample,) = explain_dataset(Explainer(net.to(torch.bfloat16)), list(images(1)))
    assert sample.maps.shape == (1, 32, 32)


# Lightning


def callback_at_a_batch(callback, batch, *loggers) -> None:
    """Calls it as a trainer would after a validation batch, without training."""
    trainer = SimpleNamespace(
        current_epoch=0, global_step=1, sanity_checking=False, is_global_zero=True, loggers=loggers
    )
    callback.on_validation_epoch_start(trainer, Net())
    callback.on_validation_batch_end(trainer, Net(), None, batch, 0)


def fit(package: str, folder, *, callback=None, epochs: int = 1, loaders: int = 1, net=None):
    """Trains the small network for a moment; gives it and the logged images by tag and step."""
    lightning = pytest.importorskip(package)
    loggers = pytest.importorskip(f"{package}.loggers")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net or Net()

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return self.net(pictures)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, _, dataloader_idx=0):
            assert not self.training
            self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    data = DataLoader(TensorDataset(images(6), torch.arange(6) % 5), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=loggers.TensorBoardLogger(folder),
        callbacks=[callback],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
    )
    module = Module()
    trainer.fit(module, data, [data] * loaders)
    return module, logged(folder)


def logged(folder) -> dict[str, dict[int, np.ndarray]]:
    import io

    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = EventAccumulator(str(next(folder.rglob("version_0"))), {"images": 0})
    files.Reload()
    return {
        tag: {
            event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
            for event in files.Images(tag)
        }
        for tag in files.Tags()["images"]
    }


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request) -> str:
    pytest.importorskip("tensorboard")
    pytest.importorskip(request.param)
    return request.param


def test_overlays_of_validation_images(tmp_path, package):
    from gradcampp_ext.batch.lightning import LogOverlays

    callback = LogOverlays(images=5, targets=("predicted", "label"), mean=0, std=1)
    module, shown = fit(package, tmp_path, callback=callback, epochs=2)
    assert sorted(shown) == [f"gradcampp/{n}" for n in range(5)]
    # two steps an epoch; the sanity check logs nothing
    assert all(sorted(steps) == [2, 4] for steps in shown.values())
    explainer = Explainer(module.eval())
    pictures = (images(5) * 255).round().to(torch.uint8)
    predicted = explainer(images(5)).overlay(pictures)[:, 0]
    label = explainer(images(5), torch.arange(5) % 5).overlay(pictures)[:, 0]
    for n in range(5):
        drawn = shown[f"gradcampp/{n}"][4]
        assert drawn.shape == (32, 96, 3)
        expected = torch.cat([pictures[n].permute(1, 2, 0), predicted[n], label[n]], 1).numpy()
        assert np.abs(drawn.astype(int) - expected).max() <= 2
    assert np.abs(shown["gradcampp/0"][2].astype(int) - shown["gradcampp/0"][4]).max() > 0
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_epochs_loaders_and_layers(tmp_path, package):
    from gradcampp_ext.batch.lightning import LogOverlays

    callback = LogOverlays(
        ["net.features.0", "net.pool:input"], images=1, every_n_epochs=2, tag="why"
    )
    _, shown = fit(package, tmp_path, callback=callback, epochs=3, loaders=2)
    assert sorted(shown) == ["why/0", "why/1/0"]
    assert sorted(shown["why/0"]) == [2, 6]
    assert shown["why/0"][2].shape == (32, 96, 3)


def test_lightning_arguments():
    pytest.importorskip("lightning")
    from gradcampp_ext.batch.lightning import LogOverlays

    with pytest.raises(ValueError, match="targets must be"):
        LogOverlays(targets="best")
    with pytest.raises(ValueError, match="at least 1"):
        LogOverlays(images=0)


class TensorBoardLogger:
    experiment = None


@pytest.mark.parametrize(
    ("batch", "loggers", "why"),
    [
        ({"image": images(2)}, (TensorBoardLogger(),), "batches must be images.*got dict"),
        ((images(2),), (TensorBoardLogger(),), "labels, but the batches have images alone"),
        ((images(2), torch.zeros(2)), (SimpleNamespace(),), "it has SimpleNamespace"),
        ((images(2), torch.zeros(2)), (), "it has none"),
    ],
)
def test_what_cannot_be_shown_is_told_once(batch, loggers, why):
    pytest.importorskip("lightning")
    from gradcampp_ext.batch.lightning import LogOverlays

    callback = LogOverlays(targets="label")
    with pytest.warns(UserWarning, match=rf"LogOverlays shows nothing: .*{why}"):
        callback_at_a_batch(callback, batch, *loggers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback_at_a_batch(callback, batch, *loggers)


def test_training_is_not_changed(tmp_path):
    package = "lightning.pytorch"
    pytest.importorskip(package)
    from gradcampp_ext.batch.lightning import LogOverlays

    lightning = pytest.importorskip(package)
    trained = []
    for name, callback in (("with", LogOverlays()), ("without", lightning.Callback())):
        torch.manual_seed(1)
        (tmp_path / name).mkdir()
        module, _ = fit(package, tmp_path / name, callback=callback, epochs=2)
        trained.append(torch.cat([each.detach().flatten() for each in module.parameters()]))
    assert torch.equal(*trained)


def test_lightning_is_not_imported_unasked():
    code = "import sys, gradcampp_ext.batch; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
