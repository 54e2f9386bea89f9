"""gradcampp evaluate: shared passes, exact numbers, resuming, errors."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from gradcampp_ext import Explainer, batch, evaluation, imaging, metrics
from gradcampp_ext.batch import SourceError
from gradcampp_ext.batch.engine import by_picture
from gradcampp_ext.cli import app
from gradcampp_ext.evaluation.boxes import Annotation, read_boxes, seen
from gradcampp_ext.evaluation.contenders import parse
from gradcampp_ext.evaluation.summary import bootstrap
from gradcampp_ext.metrics import perturbation
from gradcampp_ext.models import Classes, LoadedModel

CLASSES = Classes(("cat", "dog", "kite"), ("n1", "n2", "n3"))
RECIPE = imaging.Recipe((24, 24), "stretch", (24, 24))


class Net(nn.Module):
    """Counts the images that pass, batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 2, 1)
        self.second = nn.Conv2d(6, 8, 3, 2, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 3)
        self.passes: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes.append(len(images))
        hidden = self.second(self.first(images).relu()).relu()
        return self.head(self.pool(hidden).flatten(1))


def make_model() -> LoadedModel:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net = Net().eval()
        with torch.no_grad():
            net.head.weight *= 20  # so that masks matter
    return LoadedModel(net, RECIPE, CLASSES, spec="tests:make_model")


def loud() -> LoadedModel:
    """For the command line: test_evaluation:loud."""
    return make_model()


@pytest.fixture
def model() -> LoadedModel:
    return make_model()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(7):
        small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((60, 48)).save(folder / f"{seed}.png")
    return folder


def run(pictures, model, out, *, boxes=None, stop=None, images=False, **options):
    options = {"batch_size": 4, "workers": 0, "methods": ("gradcampp", "gradcam")} | options
    return evaluation.run(
        batch.Files([pictures]),
        model,
        out,
        evaluation.Options(**options),
        boxes,
        pictures=images,
        stop=stop,
    )


def inputs(pictures: Path) -> torch.Tensor:
    read = [RECIPE.picture(imaging.read(path)) for path in sorted(pictures.iterdir())]
    return RECIPE.normalize(torch.from_numpy(np.stack(read)))


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def means(result: dict, measure: str) -> dict[tuple[str, str], float]:
    return {
        (entry["layer"], entry["method"]): entry["mean"]
        for entry in result["summary"]
        if entry["measure"] == measure
    }


def test_three_methods_cost_one_capture_and_three_forwards_an_image(pictures, model, tmp_path):
    methods = ("gradcampp", "gradcam", "layercam")
    run(pictures, model, tmp_path / "named", methods=methods, layers=("second",))
    # batches of 4 and 3 pictures: a capture each, and 12 and 9 masked images in batches of 4
    assert model.model.passes == [4, 4, 4, 4, 3, 4, 4, 1]
    assert sum(model.model.passes) == 7 * (1 + 3)
    model.model.passes.clear()
    run(pictures, model, tmp_path / "found", methods=methods)
    # the first batch passes once more, to find the layer
    assert model.model.passes == [4, 4, 4, 4, 4, 3, 4, 4, 1]


def test_layers_share_a_capture_and_coherency_shares_the_pass(pictures, model, tmp_path):
    layers = ("first", "second")
    run(pictures, model, tmp_path / "out", layers=layers, metrics=("drop", "coherency"))
    assert sum(model.model.passes) == 7 * (1 + 2 * 2)
    assert [(row["layer"], row["method"]) for row in by_picture(rows(tmp_path / "out"))[0]] == [
        ("first", "gradcampp"), ("first", "gradcam"),
        ("second", "gradcampp"), ("second", "gradcam"),
    ]  # fmt: skip


@pytest.mark.parametrize("space", ["input", "pixels"])
def test_numbers_are_those_of_the_explainer_and_the_formulas(pictures, model, tmp_path, space):
    methods = ("gradcampp", "gradcampp:rectify=false", "gradcam")
    found = run(pictures, model, tmp_path / "out", methods=methods, layers=("second",), space=space)
    images, net = inputs(pictures), make_model().model
    full = net(images).softmax(1).amax(1)
    wins = metrics.WinRate(3)
    behind = []
    for method, rectify in (("gradcampp", None), ("gradcampp", False), ("gradcam", None)):
        explanation = Explainer(net, "second", method, rectify=rectify)(images)
        maps = explanation.maps[:, 0, None]
        if space == "input":
            masked = maps * images
        else:
            mean = torch.tensor(RECIPE.mean)[:, None, None]
            std = torch.tensor(RECIPE.std)[:, None, None]
            masked = ((images * std + mean) * maps - mean) / std
        again = net(masked).softmax(1).gather(1, explanation.targets)[:, 0]
        behind.append(again.detach())
    wins.update(torch.stack(behind, 1))
    for method, own in zip(methods, behind, strict=True):
        drop, increase = metrics.AverageDrop(), metrics.IncreaseInConfidence()
        drop.update(full, own)
        increase.update(full, own)
        key = ("second", method)
        assert means(found.result, "drop")[key] == pytest.approx(float(drop.compute()), rel=1e-3)
        assert means(found.result, "increase")[key] == pytest.approx(float(increase.compute()))
    expected = wins.compute().tolist()
    table = found.result["wins"][0]["percent"]
    for a in range(3):
        assert table[a][a] is None
        for b in {0, 1, 2} - {a}:
            assert table[a][b] == pytest.approx(expected[a][b], rel=1e-5)
    drops = means(found.result, "drop").values()
    assert max(drops) > 1
    assert found.result["settings"]["space"] == space


def test_curves_are_those_of_torchcam(pictures, model, tmp_path):
    """From zeros to the image and back, explaining the probability, which it differentiates."""
    peers = pytest.importorskip("torchcam.metrics")
    from torchcam.methods import GradCAM

    net, images = make_model().model, inputs(pictures)
    with GradCAM(net, target_layer=net.second) as extractor:
        peer = peers.DeletionInsertionMetric(extractor, None, steps=8)
        peer.update(images)
        logits = peer.summary()
    with torch.no_grad():
        top = net(images).argmax(1)
    maps = Explainer(net, "second", "gradcam")(images).maps[:, 0]
    points = perturbation.schedule(24 * 24, 8)
    for name, before, after in (
        ("deletion", images, torch.zeros_like(images)),
        ("insertion", torch.zeros_like(images), images),
    ):
        curve = []
        for count in points:
            counts = torch.full((7,), count)
            changed = perturbation.changed(before, after, perturbation.ranks(maps), counts)
            with torch.no_grad():
                curve.append(net(changed).gather(1, top[:, None])[:, 0])
        area = perturbation.area(torch.stack(curve, 1), points).mean()
        # maps equal in value may be ranked otherwise where theirs differ by rounding
        assert float(area) == pytest.approx(logits[f"{name}_auc"], rel=2e-2), name


def test_road_is_that_of_pytorch_grad_cam(pictures, model, tmp_path):
    """Its thresholds are percentiles, and its noise is another each time."""
    peers = pytest.importorskip("pytorch_grad_cam.metrics.road")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    options = {"methods": ("gradcam:relu=false",), "layers": ("second",), "metrics": ("road",)}
    found = run(pictures, model, tmp_path / "out", **options)
    images, net = inputs(pictures), make_model().model
    explanation = Explainer(net, "second", "gradcam", relu=False)(images)
    maps = explanation.maps[:, 0].numpy()
    assert all(np.unique(one).size > 450 for one in maps)  # few pixels are equal
    targets = [ClassifierOutputSoftmaxTarget(int(one)) for one in explanation.targets[:, 0]]
    theirs = peers.ROADCombined()(images, maps, targets, net)
    ours = [row["road"] for row in rows(tmp_path / "out")]
    assert np.abs(ours).max() > 0.02
    np.testing.assert_allclose(ours, theirs, atol=0.004)
    assert means(found.result, "road")["second", "gradcam:relu=false"] == pytest.approx(
        float(theirs.mean()), abs=0.002
    )


def test_insertion_deletion_and_road_in_shared_batches(pictures, model, tmp_path):
    out = tmp_path / "out"
    found = run(
        pictures, model, out, layers=("second",), metrics=("drop", "insertion", "deletion", "road"),
        steps=5, road_shares=(0.25, 0.75),
    )  # fmt: skip
    # capture, behind, 4 inner points twice, two baselines, 2 shares in 2 orders
    assert sum(model.model.passes) == 7 * (1 + 2 * (1 + 2 * 4 + 2 * 2) + 2)
    images, net = inputs(pictures), make_model().model
    explanation = Explainer(net, "second")(images)
    maps, classes = explanation.maps[:, 0], explanation.targets
    points = perturbation.schedule(576, 5)
    blurred = perturbation.blurred(images)
    with torch.no_grad():
        curve = torch.cat(
            [
                net(
                    perturbation.changed(
                        blurred, images, perturbation.ranks(maps), torch.full((7,), count)
                    )
                ).softmax(1).gather(1, classes)
                for count in points
            ],
            1,
        )  # fmt: skip
    recorded = [first for first, _ in by_picture(rows(out))]
    torch.testing.assert_close(
        torch.tensor([each["curves"]["insertion"] for each in recorded]), curve, atol=2e-3, rtol=0
    )
    for each in recorded:
        deletion = each["curves"]["deletion"]
        assert deletion[0] == each["probability"]
        area = perturbation.area(torch.tensor(deletion), points)
        assert each["deletion"] == pytest.approx(float(area), rel=1e-5)
        curves = each["curves"]
        gaps = np.array(curves["road_lerf"]) - np.array(curves["road_morf"])
        assert each["road"] == pytest.approx(gaps.mean() / 2, abs=1e-6)
        assert {type(v) for v in curves["road_morf_accuracy"]} == {bool}
    kinds = {curve["curve"] for curve in found.result["curves"]}
    assert {"insertion", "deletion", "road_morf", "road_lerf"} <= kinds


def test_sensitivity_and_randomisation(pictures, model, tmp_path):
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    found = run(
        pictures, model, tmp_path / "out", methods=("gradcampp", "random", "center"),
        layers=("second",), metrics=("sensitivity", "randomization"),
        samples=3, radius=0.1,
    )  # fmt: skip
    assert sum(model.model.passes[:1]) == 4
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert found.result["stages"] == ["head", "second", "first"]
    sensitivity = means(found.result, "sensitivity")
    assert sensitivity["second", "gradcampp"] > 0
    assert sensitivity["second", "random"] == sensitivity["second", "center"] == 0
    correlation = means(found.result, "randomization")
    assert correlation["second", "random"] == pytest.approx(1)
    assert abs(correlation["second", "gradcampp"]) < 0.95
    stages = [c for c in found.result["curves"] if c["curve"] == "randomization"]
    assert [len(curve["mean"]) for curve in stages] == [3, 3, 3]


def test_a_run_that_was_stopped_goes_on_and_ends_alike(pictures, tmp_path):
    options = {"metrics": ("drop", "insertion"), "steps": 3}
    whole = run(pictures, make_model(), tmp_path / "whole", **options)

    class Stop(threading.Event):
        """Is set after the first batch."""

        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked > 1

    stopped = run(pictures, make_model(), tmp_path / "parts", stop=Stop(), **options)
    assert (stopped.run.interrupted, stopped.run.explained, stopped.result) == (True, 4, None)
    assert not (tmp_path / "parts" / "evaluation.json").exists()
    with (tmp_path / "parts" / "results.jsonl").open("ab") as file:
        file.write(b'{"path": "killed here')
    resumed = run(pictures, make_model(), tmp_path / "parts", **options)
    assert (resumed.run.resumed, resumed.run.explained) == (4, 3)
    for name in ("results.jsonl", "evaluation.json", "evaluation.csv", "run.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    last = make_model()
    again = run(pictures, last, tmp_path / "parts", **options)
    assert again.result == whole.result
    assert last.model.passes == []
    with pytest.raises(batch.RecordError, match="steps was 3 and is now 4"):
        run(pictures, make_model(), tmp_path / "parts", metrics=("drop", "insertion"), steps=4)


def test_a_folder_with_a_row_a_picture_is_refused(pictures, tmp_path):
    """Which is how evaluations were recorded before they had reports."""
    out = tmp_path / "out"
    run(pictures, make_model(), out)
    record = json.loads((out / "run.json").read_text())
    assert record["settings"].pop("report") is False
    (out / "run.json").write_text(json.dumps(record))
    old = [
        {"path": first["path"], "name": first["name"], "rank": 1, "layer": "second", "maps": []}
        for first, *_ in by_picture(rows(out))
    ]
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    with pytest.raises(batch.RecordError, match="report was None and is now False"):
        run(pictures, make_model(), out)
    assert rows(out) == old
    with pytest.raises(ValueError, match=r"these results lack the report's pictures.*evaluate"):
        evaluation.report.build(out)


def test_overwriting_leaves_nothing_of_another_evaluation(pictures, tmp_path, command):
    out = tmp_path / "out"
    command(pictures, "--out", out, "--metrics", "drop,deletion", "--steps", 2)
    assert (out / "curves.png").exists()
    command(pictures, "--out", out, "--metrics", "deletion", "--steps", 2, "--methods", "gradcam",
            "--overwrite", "--numbers-only")  # fmt: skip
    assert {path.name for path in out.rglob("*") if path.is_file()} == {
        "results.jsonl", "run.json", "evaluation.json", "evaluation.csv",
    }  # fmt: skip
    (out / "bars.png").touch()
    (out / "evaluation.json").unlink()
    command(pictures, "--out", out, "--methods", "gradcam", "--overwrite", "--numbers-only")
    assert (out / "bars.png").exists()  # not known to be an evaluation's


# Boxes


def test_boxes_as_the_network_sees_them(tmp_path):
    view = (10.0, 0.0, 50.0, 40.0)
    objects = [
        Annotation((20, 10, 30, 20), None),
        Annotation((0, 0, 15, 10), 2),
        Annotation((0, 0, 5, 40), None),
    ]
    assert seen(objects, 2, view, (80, 80)) == [(20, 20, 40, 40), (0, 0, 10, 20)]
    assert seen(objects, 1, view, (80, 80)) == [(20, 20, 40, 40)]
    (tmp_path / "boxes.csv").write_text(
        "path,xmin,ymin,xmax,ymax,class_name\na.png,1,2,3,4,dog\na.png,5,6,7,8,\n"
    )
    (found,) = read_boxes(tmp_path / "boxes.csv", CLASSES).values()
    assert found == [Annotation((1, 2, 3, 4), 1), Annotation((5, 6, 7, 8), None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,left,top,right,bottom\na.png,5,2,3,4\n", "line 2: a box needs left < right"),
        ("path,left,top\na.png,5,2\n", "columns left, top, right, bottom"),
        ("path,left,top,right,bottom\na.png,x,2,3,4\n", "with numbers are needed"),
        ("left,top,right,bottom\n1,2,3,4\n", "one of the columns path"),
        ("path,left,top,right,bottom,label\na.png,1,2,3,4,cow\n", "no class is called 'cow'"),
        ("path,left,top,right,bottom\n", "has no rows"),
    ],
)
def test_bad_boxes_say_where(tmp_path, text, message):
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_boxes(tmp_path / "boxes.csv", CLASSES)


def test_paths_of_boxes_are_text_as_in_lists(tmp_path):
    box = {"path": 3, "left": 1, "top": 2, "right": 3, "bottom": 4}
    (tmp_path / "boxes.jsonl").write_text(json.dumps(box))
    with pytest.raises(SourceError, match="line 1: the path must be text, got 3"):
        read_boxes(tmp_path / "boxes.jsonl", CLASSES)


def test_localisation_counts_pictures_with_boxes(pictures, model, tmp_path):
    (tmp_path / "boxes.jsonl").write_text(
        "".join(
            json.dumps({"path": str(pictures / f"{n}.png"), "left": 0, "top": 0,
                        "right": 30, "bottom": 48}) + "\n"
            for n in range(3)
        )
    )  # fmt: skip
    boxes = read_boxes(tmp_path / "boxes.jsonl", CLASSES)
    found = run(
        pictures, model, tmp_path / "out", boxes=boxes, methods=("gradcampp", "center"),
        layers=("second",), metrics=("localization",), tolerance=0,
    )  # fmt: skip
    assert sum(model.model.passes) == 7
    entries = {(entry["method"], entry["measure"]): entry for entry in found.result["summary"]}
    assert entries["center", "energy"]["mean"] == pytest.approx(0.5, abs=1e-4)
    assert {e["images"] for key, e in entries.items() if key[1] != "complexity"} == {3}
    maps = Explainer(make_model().model, "second")(inputs(pictures)).maps[:3, 0]
    share = maps[..., :12].sum((1, 2)) / maps.sum((1, 2))
    assert entries["gradcampp", "energy"]["mean"] == pytest.approx(float(share.mean()), rel=1e-3)
    with pytest.raises(ValueError, match="localization needs boxes"):
        run(pictures, model, tmp_path / "none", metrics=("localization",))


# Options and summaries


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ()}, "methods must name at least one"),
        ({"methods": ("gradcam", "gradcam")}, "methods must be different, got gradcam twice"),
        ({"methods": ("gradcam3",)}, "method must be one of gradcampp, .*random, center; got"),
        ({"methods": ("gradcampp:rectify=maybe",)}, "options of a method are rectify=true"),
        ({"methods": ("layercam:eps=1",)}, "has no epsilon"),
        ({"methods": ("random:eps=1",)}, "takes no options"),
        ({"metrics": ("drops",)}, "metrics must be of drop, .*; got drops"),
        ({"layers": ("nowhere",)}, "'nowhere' is not the name of a module"),
        ({"space": "hsv"}, "space must be one of input, pixels; got 'hsv'"),
        ({"target": "3"}, "target must be one of predicted, label"),
        ({"deletion_to": "white"}, "deletion_to must be one of zero, black, mean, blur"),
        ({"road_shares": (0.5, 1.0)}, "road_shares must be above 0 and below 1"),
        ({"steps": 0}, "steps, samples, stages and batch_size must be at least 1"),
        ({"steps": 600, "metrics": ("deletion",)}, "steps must be from 1 to the 576 pixels"),
        ({"radius": 0}, "radius above 0"),
        ({"stages": 0}, "stages and batch_size must be at least 1 .* got 32, 10, 0, "),
    ],
)  # fmt: skip
def test_bad_options_say_why(pictures, model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(pictures, model, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_options_of_methods():
    made = parse("gradcampp:rectify=false:eps=1e-6")
    assert (made.method, made.options) == ("gradcampp", {"rectify": False, "eps": 1e-6})
    ones = torch.ones(2, 1, 4, 6)
    center = parse("center").maps(ones, ones, [1, 2], (8, 12))
    assert center.shape == (2, 8, 12)
    torch.testing.assert_close(center, center.flip((1, 2)))
    random = parse("random")
    first, second = random.maps(ones, ones, [1, 2], None)
    torch.testing.assert_close(random.maps(ones[:1], ones[:1], [2], None)[0], second)
    assert not torch.equal(first, second)


def test_intervals_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).gamma(1, 2, (80, 2))
    low, high = bootstrap(values, resamples=4000)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", axis=0, rng=1
    ).confidence_interval
    np.testing.assert_allclose(low, expected.low, rtol=0.03)
    np.testing.assert_allclose(high, expected.high, rtol=0.03)
    holes = values.copy()
    holes[40:, 1] = np.nan
    low, high = bootstrap(holes, resamples=1000)
    assert low[1] < values[:40, 1].mean() < high[1]


def test_a_model_that_is_no_classifier_says_so(pictures, model, tmp_path):
    model.model.pool, model.model.head = nn.Identity(), nn.Identity()
    model.model.forward = lambda images: model.model.second(model.model.first(images))
    with pytest.raises((ValueError, batch.EngineError), match="classes"):
        run(pictures, model, tmp_path / "out", layers=("second",))


# The command


@pytest.fixture
def command(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def call(*arguments: object, code: int = 0):
        words = ["evaluate", "--model", "test_evaluation:loud", "--workers", "0", *arguments]
        result = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result

    return call


def test_the_command_prints_a_table_and_writes_everything(pictures, tmp_path, command):
    (tmp_path / "labels.csv").write_text(
        "".join(["path,label\n", *(f"{pictures / f'{n}.png'},cat\n" for n in range(7))])
    )
    out = tmp_path / "out"
    shown = command(
        pictures, "--labels", tmp_path / "labels.csv", "--target", "label", "--out", out,
        "--methods", "gradcampp,gradcam,random", "--metrics", "all", "--steps", 4, "--road", "50",
        "--samples", 1, "--stages", 2, "--layers", "first,second",
    )  # fmt: skip
    assert "Average Drop % ↓" in " ".join(shown.stdout.split())
    assert "Win % ↑ over" in shown.stdout
    assert {path.name for path in out.iterdir()} == {
        "results.jsonl", "run.json", "evaluation.json", "evaluation.csv", "bars.png", "wins.png",
        "curves.png", "randomization.png", "disagreements.jpg", "report",
    }  # fmt: skip
    for name in ("bars.png", "wins.png", "curves.png", "randomization.png", "disagreements.jpg"):
        pixels = np.asarray(Image.open(out / name).convert("L"))
        assert pixels.std() > 5, name
    assert {row["target"] for row in rows(out)} == {0}
    result = json.loads((out / "evaluation.json").read_text())
    assert (result["images"], result["labelled"]) == (7, 7)
    with (out / "evaluation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(result["summary"])
    assert float(table[0]["mean"]) == result["summary"][0]["mean"]
    text = evaluation.markdown(result)
    entry = result["summary"][0]
    assert f"| Average Drop % ↓ | {entry['mean']:.1f} [" in text
    assert str(tmp_path) not in json.dumps(result)


def test_pictures_without_label_are_skipped(pictures, tmp_path, command):
    (tmp_path / "labels.csv").write_text(f"path,label\n{pictures / '0.png'},cat\n")
    shown = command(
        pictures, "--labels", tmp_path / "labels.csv", "--target", "label",
        "--out", tmp_path / "out", code=1,
    )  # fmt: skip
    assert "6 skipped, the reasons are in" in shown.stderr
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["images"] == 1


def test_boxes_of_other_pictures_are_refused(pictures, tmp_path, command):
    (tmp_path / "boxes.csv").write_text("path,left,top,right,bottom\n0.png,1,1,9,9\n")
    shown = command(pictures, "--boxes", tmp_path / "boxes.csv", "--out", tmp_path / "out", code=2)
    assert "boxes.csv speaks of none of these pictures" in shown.stderr
    (tmp_path / "boxes.csv").write_text(
        f"path,left,top,right,bottom\n{pictures / '0.png'},1,1,9,9\n"
    )
    command(pictures, "--boxes", tmp_path / "boxes.csv", "--out", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    images = {entry["measure"]: entry["images"] for entry in result["summary"]}
    assert (images["energy"], images["drop"]) == (1, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gradcam3"], "method must be one of"),
        (["--metrics", "drops"], "metrics must be of"),
        (["--metrics", "localization"], "localization needs boxes (--boxes FILE)"),
        (["--boxes", "none.csv"], "none.csv cannot be read"),
        (["--road", "ten"], "--road must be percentages"),
        (["--road", "0"], "road_shares must be above 0"),
        (["--layers", "nowhere"], "'nowhere' is not the name of a module"),
        (["--space", "hsv"], "'hsv'"),
    ],
)
def test_wrong_arguments_exit_with_2(pictures, tmp_path, command, arguments, message):
    shown = command(pictures, "--out", tmp_path / "out", *arguments, code=2)
    assert message in " ".join(shown.stderr.replace("│", " ").split())
    assert "Traceback" not in shown.output
