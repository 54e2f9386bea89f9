"""Peers' classes swapped and brought back; scripts run as python would run them."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import gradcampp_ext as gx
from gradcampp_ext.compat import pytorch_grad_cam, torchcam

peer = pytest.importorskip("pytorch_grad_cam")
peer_of_torchcam = pytest.importorskip("torchcam.methods")
EARLY = peer.GradCAMPlusPlus  # imported by name before anything is accelerated

MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
IMAGES = torch.randn(2, 3, 12, 14, generator=torch.Generator().manual_seed(0))


def target(output: torch.Tensor) -> torch.Tensor:
    return output[1]


def everything() -> dict[str, Any]:
    """What the peers' modules refer to, and the defaults of what they define."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("pytorch_grad_cam", "torchcam"):
            for key, value in vars(module).items():
                found[f"{name}.{key}"] = value
                for part, function in vars(value).items() if isinstance(value, type) else ():
                    defaults = getattr(function, "__defaults__", None)
                    named = getattr(function, "__kwdefaults__", None)
                    found[f"{name}.{key}.{part}"] = (function, defaults, dict(named or {}))
    return found


def test_classes_are_swapped_everywhere_and_brought_back() -> None:
    before = everything()
    with gx.accelerate():
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.grad_cam import GradCAM as Inner
        from torchcam.methods import GradCAMpp

        assert GradCAM is Inner is peer.sess.GradCAM is not before["pytorch_grad_cam.GradCAM"]
        assert issubclass(GradCAM, pytorch_grad_cam.GradCAM)
        assert issubclass(GradCAM, before["pytorch_grad_cam.GradCAM"])
        assert issubclass(GradCAMpp, torchcam.GradCAMpp)
        assert issubclass(GradCAMpp, before["torchcam.methods.GradCAMpp"])
        assert issubclass(GradCAMpp, before["torchcam.methods.core._CAM"])
        assert isinstance(GradCAM(MODEL, [MODEL[0]]), peer.base_cam.BaseCAM)
        assert peer.EigenCAM is before["pytorch_grad_cam.EigenCAM"]
    assert everything() == before


def test_maps_are_the_peers() -> None:
    expected = EARLY(MODEL, [MODEL[0]])(IMAGES, [target] * 2)
    with gx.accelerate("pytorch_grad_cam"):
        cam = peer.GradCAMPlusPlus(MODEL, [MODEL[0]])
        early = EARLY(MODEL, [MODEL[0]])
        assert not MODEL[0]._forward_hooks
        assert type(early) is type(cam)
        assert isinstance(early, EARLY)
    for each in (cam, early):  # what was made meanwhile stays as it is
        assert abs(each(IMAGES, [target] * 2) - expected).max() < 1e-4
    assert type(EARLY(MODEL, [MODEL[0]])) is EARLY


def test_classes_derived_earlier_still_work() -> None:
    class Mine(EARLY):
        def get_cam_weights(self, *arguments: Any) -> Any:
            return super().get_cam_weights(*arguments) * 2

    expected = Mine(MODEL, [MODEL[0]])(IMAGES, [target] * 2)
    with gx.accelerate("pytorch_grad_cam"):
        made = Mine(MODEL, [MODEL[0]])
        assert not isinstance(made, pytorch_grad_cam.BaseCAM)
        assert abs(made(IMAGES, [target] * 2) - expected).max() == 0

        class Later(peer.GradCAMPlusPlus):
            get_cam_weights = Mine.__dict__["get_cam_weights"]

        assert issubclass(Later, pytorch_grad_cam.BaseCAM)


@pytest.mark.parametrize("name", ["FinerCAM", "RefineCAM", "SESS"])
def test_meta_methods_use_the_swapped_classes(name: str) -> None:
    options = {"num_scales": 2, "smooth": False} if name == "SESS" else {}
    expected = getattr(peer, name)(MODEL, [MODEL[0]], **options)(IMAGES, [target] * 2)
    with gx.accelerate("pytorch_grad_cam"):
        cam = getattr(peer, name)(MODEL, [MODEL[0]], **options)
        base = cam.base_cam_per_layer[0] if name == "RefineCAM" else cam.base_cam
        assert isinstance(base, pytorch_grad_cam.BaseCAM)
        assert abs(cam(IMAGES, [target] * 2) - expected).max() < 1e-4


def test_torchcams_wrappers_and_explain_take_the_swapped_classes() -> None:
    explain = importlib.import_module("torchcam.explain")
    with gx.accelerate("torchcam"):
        for options in ({}, {"base_method": peer_of_torchcam.GradCAM}):
            with peer_of_torchcam.FinerCAM(MODEL, "0", **options) as extractor:
                scores = MODEL(IMAGES)
                assert len(extractor([1, 2], scores)) == 1
        for options in ({}, {"method": peer_of_torchcam.LayerCAM}):
            found = explain.explain(MODEL, IMAGES[:1], target_layer="0", **options)
            assert list(found.target_layers) == ["0"]


def test_nested_and_repeated() -> None:
    original = peer.GradCAM
    outer = gx.accelerate()
    swapped = peer.GradCAM
    with gx.accelerate("pytorch_grad_cam"), gx.accelerate():
        assert peer.GradCAM is swapped
    assert peer.GradCAM is swapped
    outer.stop()
    outer.stop()  # nothing is left to stop
    assert peer.GradCAM is original
    with gx.accelerate("pytorch_grad_cam"), pytest.raises(ZeroDivisionError), gx.accelerate():
        1 / 0  # noqa: B018
    assert peer.GradCAM is original
    first, second = gx.accelerate("torchcam"), gx.accelerate("pytorch_grad_cam")
    first.stop()
    assert peer.GradCAM is not original
    second.stop()
    assert peer.GradCAM is original


def test_nothing_is_left_of_a_start_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("gradcampp_ext.accelerate")
    before, init = everything(), peer.GradCAM.__init__
    functions, calls = module._functions, itertools.count()

    def broken(of: ModuleType) -> Iterator[FunctionType]:
        if next(calls) == 3:  # some modules are swapped
            raise MemoryError
        return functions(of)

    monkeypatch.setattr(module, "_functions", broken)
    with pytest.raises(MemoryError):
        gx.accelerate("pytorch_grad_cam")
    assert everything() == before
    assert peer.GradCAM.__init__ is init
    assert module._active == {}


def test_from_many_threads() -> None:
    before = everything()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                with gx.accelerate("pytorch_grad_cam"):
                    assert issubclass(peer.GradCAM, pytorch_grad_cam.GradCAM)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert everything() == before


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pytorch_grad_cam, torchcam; got 'captum'"):
        gx.accelerate("captum")
    module = importlib.import_module("gradcampp_ext.accelerate")
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="no package torchcam to accelerate; install it"):
        gx.accelerate("torchcam")
    with pytest.raises(ImportError, match="no package pytorch_grad_cam and no torchcam"):
        gx.accelerate()


def test_the_module_is_the_function() -> None:
    import gradcampp_ext.accelerate

    original = peer.GradCAM
    with gradcampp_ext.accelerate("pytorch_grad_cam"):
        assert peer.GradCAM is not original


SCRIPT = '''\
"""A script's docstring."""
import __main__, sys, threading
from pytorch_grad_cam import GradCAM

if __name__ == "__main__":
    ours = any(c.__module__.startswith("gradcampp_ext") for c in GradCAM.__mro__)
    print("ours" if ours else "theirs", file=sys.stderr)
    print(sys.argv, __file__, sys.path[0], __main__.__dict__ is globals(), __doc__, __spec__)
    print(threading.Thread.__module__, "annotations" in globals(), __package__)
    import neighbour
    how = sys.argv[1]
    if how == "hook":
        sys.excepthook = lambda kind, error, trace: print(kind, trace.tb_frame.f_code.co_name)
    if how in ("raise", "hook"):
        neighbour.fail()
    if how == "exit":
        sys.exit("a message")
    if how == "interrupt":
        raise KeyboardInterrupt
'''
NEIGHBOUR = "def fail():\n    raise RuntimeError('on purpose')\n"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--help", "raise", "hook", "exit", "interrupt", "syntax"])
def test_scripts_run_as_python_runs_them(how: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('never'\n" if how == "syntax" else SCRIPT)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    module = importlib.import_module("gradcampp_ext.accelerate")
    package = tmp_path / "pytorch_grad_cam.py"  # in place of the peer, whose import takes seconds
    _, names = module.PEERS["pytorch_grad_cam"]
    package.write_text("".join(f"class {each}: pass\n" for each in names))
    cli = "import sys; from gradcampp_ext.cli import main; sys.argv[0] = 'gradcampp'; main()"
    way = ["-m", "gradcampp_ext.accelerate"]  # starting takes its time: each way in some cases
    start = way if how in ("raise", "interrupt") else ["-c", cli, "--accelerate"]
    ran = [
        subprocess.run(
            [sys.executable, *way, "script.py", how, "-x", "--model=1"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        for way in ([], start)
    ]
    plain, accelerated = ran
    assert accelerated.stdout == plain.stdout
    assert accelerated.stderr.replace("ours\n", "theirs\n") == plain.stderr
    assert accelerated.returncode == plain.returncode
    assert ("ours\n" in accelerated.stderr) == (how != "syntax")


def test_a_script_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module("gradcampp_ext.accelerate")
    with pytest.raises(SystemExit) as stopped:
        module.run("nowhere.py")
    assert stopped.value.code == 2
    assert "can't open file" in capsys.readouterr().err
