"""What is explained: classes, callables, parts of what a model returns."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch

from gradcampp_ext.targets import (
    Contrast,
    LabelSum,
    LogProbability,
    Region,
    resolve,
    select,
)

OUTPUT = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 0.0]])


def test_prediction() -> None:
    scores = resolve(OUTPUT, None, batch=2)
    assert scores.targets.tolist() == [[1], [0]]
    assert scores.values.tolist() == [[3.0], [5.0]]
    assert scores.predicted.tolist() == [1, 0]
    torch.testing.assert_close(
        scores.probabilities, OUTPUT.softmax(1).gather(1, torch.tensor([[1], [0]]))
    )


@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        (2, [[2], [2]]),
        (torch.tensor(2), [[2], [2]]),
        (np.int64(2), [[2], [2]]),
        ([2, 0], [[2], [0]]),
        ((2, 0), [[2], [0]]),
        (np.array([2, 0]), [[2], [0]]),
        (torch.tensor([2, 0], dtype=torch.int32), [[2], [0]]),
        ([[2, 0, 1], [0, 0, 1]], [[2, 0, 1], [0, 0, 1]]),
    ],
    ids=str,
)
def test_classes(targets, classes) -> None:
    scores = resolve(OUTPUT, targets, batch=2)
    assert scores.targets.tolist() == classes
    assert scores.values.tolist() == [
        [row[k] for k in chosen] for row, chosen in zip(OUTPUT.tolist(), classes, strict=True)
    ]


def test_topk() -> None:
    scores = resolve(OUTPUT, None, batch=2, topk=2)
    assert scores.targets.tolist() == [[1, 2], [0, 2]]
    assert scores.values.tolist() == [[3.0, 2.0], [5.0, 0.0]]


def test_probabilities_of_labels() -> None:
    scores = resolve(OUTPUT, [[1, 2], [1, 2]], batch=2, activation="sigmoid")
    torch.testing.assert_close(scores.probabilities, OUTPUT[:, 1:].sigmoid())


def test_one_output_a_sample() -> None:
    scores = resolve(torch.tensor([0.5, -2.0]), None, batch=2)
    assert scores.values.tolist() == [[0.5], [-2.0]]


def test_half_precision_outputs_keep_their_probabilities() -> None:
    scores = resolve(OUTPUT.bfloat16(), None, batch=2)
    assert scores.probabilities.dtype == torch.float32


def test_callables() -> None:
    first = resolve(OUTPUT, lambda output: output[:, 0] * 2, batch=2)
    assert first.values.tolist() == [[2.0], [10.0]]
    assert first.probabilities is None
    assert first.predicted.tolist() == [1, 0]
    several = resolve(OUTPUT, [lambda output: output.sum(1), LogProbability(1)], batch=2)
    assert several.values[:, 0].tolist() == [6.0, 4.0]
    torch.testing.assert_close(several.values[:, 1], OUTPUT.log_softmax(1)[:, 1])
    assert several.targets[1] == LogProbability(1)
    assert isinstance(several.targets, tuple)  # not the caller's list, which may change


def test_callable_on_an_output_that_is_no_table() -> None:
    boxes = {"scores": torch.tensor([0.5, 0.75])}
    scores = resolve(boxes, lambda output: output["scores"], batch=2)
    assert scores.values.tolist() == [[0.5], [0.75]]
    assert scores.predicted is None


def test_log_probability_of_labels() -> None:
    torch.testing.assert_close(
        LogProbability(1, multilabel=True)(OUTPUT), OUTPUT[:, 1].sigmoid().log()
    )


def test_contrast() -> None:
    assert Contrast(1, 0)(OUTPUT).tolist() == [2.0, -6.0]
    assert Contrast(1, (0, 2), weight=0.5)(OUTPUT).tolist() == [2.25, -2.25]


def test_label_sum() -> None:
    assert LabelSum((0, 2))(OUTPUT).tolist() == [3.0, 5.0]


def test_region() -> None:
    dense = torch.tensor(
        [[[[1.0, 9.0]], [[2.0, 4.0]]], [[[8.0, 8.0]], [[6.0, 7.0]]]]
    )  # 2 x 2 x 1 x 2
    assert Region(1)(dense).tolist() == [2.0, 6.5]  # predicted at one position, and nowhere
    assert Region(1, torch.tensor([[False, True]]))(dense).tolist() == [4.0, 7.0]
    assert Region(1, torch.tensor([[1.0, 3.0]]))(dense).tolist() == [3.5, 6.75]
    per_sample = torch.tensor([[[True, True]], [[True, False]]])
    assert Region(1, per_sample)(dense).tolist() == [3.0, 6.0]
    assert Region(1, per_sample.numpy())(dense).tolist() == [3.0, 6.0]
    with pytest.raises(ValueError, match=r"mask must be \(1, 2\) or \(2, 1, 2\).*got \(4, 4\)"):
        Region(1, torch.ones(4, 4))(dense)
    with pytest.raises(ValueError, match="zero everywhere, but is so for sample 0"):
        Region(1, torch.zeros(1, 2))(dense)
    with pytest.raises(ValueError, match="zero everywhere, but is so for sample 1"):
        Region(1, torch.tensor([[[True, True]], [[False, False]]]))(dense)


@pytest.mark.parametrize(
    "target",
    [LogProbability(3), Contrast(3, 1), Contrast(1, (0, 3)), LabelSum((0, 3)), Region(3)],
    ids=str,
)
def test_targets_of_other_outputs(target) -> None:
    output = OUTPUT.reshape(2, 3, 1, 1) if isinstance(target, Region) else OUTPUT
    with pytest.raises(ValueError, match="classes from 0 to 2, as the output has 3, got 3"):
        target(output)
    shape = r"\[N, classes, \*S\]" if isinstance(target, Region) else r"\[N, classes\]"
    with pytest.raises(ValueError, match=rf"an output {shape}, got a tensor \[2\]; choose"):
        target(OUTPUT[:, 0])
    with pytest.raises(ValueError, match=r"got dict with keys 'a'"):
        target({"a": output})


def test_the_last_class_is_not_minus_one() -> None:
    with pytest.raises(ValueError, match="classes from 0 to 2, as the output has 3, got -1"):
        LogProbability(-1)(OUTPUT)


@pytest.mark.parametrize("others", [1, (), (0, 1)])
def test_contrast_needs_others(others) -> None:
    with pytest.raises(ValueError, match="others must be at least one class, without the index 1"):
        Contrast(1, others)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_one_hot_labels_are_no_classes(dtype) -> None:
    labels = torch.tensor([[0, 1, 0], [0, 0, 1]], dtype=dtype)
    with pytest.raises(ValueError, match=r"one-hot\? give targets.argmax\(1\), or LabelSum"):
        resolve(OUTPUT, labels, batch=2)
    assert resolve(OUTPUT[:, :2], labels[:, :2], batch=2).targets.tolist() == [[0, 1], [0, 0]]
    assert resolve(OUTPUT[:0], labels[:0], batch=0).targets.shape == (0, 3)


@pytest.mark.parametrize(
    ("targets", "topk", "error", "message"),
    [
        ([1], None, ValueError, r"\[2\] or \[2, K\] for this batch of 2, got \[1\]"),
        ([1, 0, 2], None, ValueError, r"batch of 2, got \[3\]"),
        ([[1, 0]], None, ValueError, r"batch of 2, got \[1, 2\]"),
        ([[[1]], [[0]]], None, ValueError, r"got \[2, 1, 1\]"),
        ([[], []], None, TypeError, "targets must be class indices"),
        (torch.empty(2, 0, dtype=torch.long), None, ValueError, "at least one class a sample"),
        (3, None, ValueError, "classes from 0 to 2, as the output has 3, got 3"),
        ([0, -1], None, ValueError, "got -1"),
        (1.0, None, TypeError, "class indices .*got 1.0"),
        ("cat", None, TypeError, "class indices .*got 'cat'"),
        (True, None, TypeError, "class indices .*got True"),
        ([[1], [1, 2]], None, TypeError, "class indices"),
        ([LabelSum((0,)), 1], None, TypeError, "all callables or all classes, got 1 too"),
        (None, 0, ValueError, "topk must be from 1 to the 3 classes of the output, got 0"),
        (None, 4, ValueError, "topk must be from 1 to the 3 classes of the output, got 4"),
        (None, 2.0, TypeError, "topk must be an integer, got 2.0"),
        (None, "3", TypeError, "topk must be an integer, got '3'"),
        (1, 2, ValueError, "targets and topk exclude each other"),
        (LabelSum((0,)), 2, ValueError, "targets and topk exclude each other"),
        (
            lambda o: o,
            None,
            ValueError,
            r"one score a sample, a tensor \[2\], got a tensor \[2, 3\]",
        ),
        (
            lambda o: o.sum(),
            None,
            ValueError,
            r"one score a sample, a tensor \[2\], got a tensor \[\]",
        ),
        (lambda o: 1.0, None, ValueError, r"one score a sample, a tensor \[2\], got float"),
    ],
)
def test_errors(targets, topk, error, message) -> None:
    with pytest.raises(error, match=message):
        resolve(OUTPUT, targets, batch=2, topk=topk)


@pytest.mark.parametrize(
    ("output", "described"),
    [
        (torch.zeros(2, 3, 4, 4), r"a tensor \[2, 3, 4, 4\]"),
        (torch.zeros(5, 3), r"a tensor \[5, 3\]"),
        ({"a": 1}, "dict with keys 'a'"),
    ],
)
def test_classes_need_a_table(output, described) -> None:
    with pytest.raises(ValueError, match=rf"output of shape \[2, classes\], got {described}"):
        resolve(output, 0, batch=2)


class Outputs(NamedTuple):
    loss: None
    scores: torch.Tensor


@dataclass
class Record:
    logits: torch.Tensor
    hidden: torch.Tensor


@pytest.mark.parametrize(
    ("returned", "output"),
    [
        (OUTPUT, None),
        ({"logits": OUTPUT, "hidden": OUTPUT + 1}, None),
        (Record(OUTPUT, OUTPUT + 1), None),
        (types.SimpleNamespace(logits=OUTPUT, hidden=OUTPUT + 1), None),
        ({"out": OUTPUT, "names": ["a"]}, None),
        ((None, OUTPUT), None),
        (Outputs(None, OUTPUT), None),
        ({"a": OUTPUT, "b": OUTPUT + 1}, "a"),
        ((OUTPUT + 1, OUTPUT), 1),
        (Outputs(None, OUTPUT), "scores"),
        (Record(OUTPUT + 1, OUTPUT), "hidden"),
        ({"a": (OUTPUT + 1, OUTPUT)}, lambda returned: returned["a"][1]),
    ],
)
def test_select(returned, output) -> None:
    assert select(returned, output) is OUTPUT


@pytest.mark.parametrize(
    ("returned", "output", "message"),
    [
        ((OUTPUT, OUTPUT), None, "the model returned tuple of 2; say by output= which"),
        ({"a": OUTPUT, "b": OUTPUT}, None, "dict with keys 'a', 'b'; say by output="),
        (Outputs(OUTPUT, OUTPUT), None, "Outputs with fields loss, scores; say by output="),
        (None, None, "the model returned NoneType; say by output="),
        ({"a": OUTPUT}, "b", "output='b' is no part of .*dict with keys 'a'"),
        ((OUTPUT,), 1, "output=1 is no part of .*tuple of 1"),
        (Record(OUTPUT, OUTPUT), "scores", "no part of .*Record with attributes logits, hidden"),
        (Record(OUTPUT, OUTPUT), 0, "output=0 is no part of .*Record"),
    ],
)
def test_select_errors(returned, output, message) -> None:
    with pytest.raises(ValueError, match=message):
        select(returned, output)
