"""Scores against scikit-learn, and the interval against Wilson's formula written out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from epsanet.tasks.scores import Score, accuracy_interval, probabilities


def scored(classes: int, images: int, batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Score]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    logits = random.normal(size=(images, classes)) * 3
    logits[np.arange(images), labels] += 2
    score = Score(classes)
    for start in range(0, images, batch):
        score.update(
            torch.tensor(logits[start : start + batch], dtype=torch.float32),
            torch.tensor(labels[start : start + batch]),
        )
    return logits, labels, score


@pytest.mark.parametrize(("classes", "images", "batch"), [(12, 103, 16), (12, 103, 103), (3, 50, 7), (2, 31, 1)])
def test_scores_are_those_of_scikit_learn(classes: int, images: int, batch: int) -> None:
    logits, labels, score = scored(classes, images, batch)
    names = [f"class {number}" for number in range(classes)]
    result = score.result(names)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    guesses = logits.argmax(axis=1)
    every = np.arange(classes)
    assert result.images == images
    assert result.top1 == pytest.approx(100 * accuracy_score(labels, guesses), abs=1e-9)
    assert result.loss == pytest.approx(log_loss(labels, chances, labels=every), rel=1e-5)
    assert np.array_equal(result.confusion, confusion_matrix(labels, guesses, labels=every))
    assert result.correct == (guesses == labels).sum()
    among = 100.0 if classes <= 5 else 100 * top_k_accuracy_score(labels, logits, k=5, labels=every)
    assert result.top5 == pytest.approx(among, abs=1e-4)
    for number, name in enumerate(names):
        mine = labels == number
        assert result.per_class[name] == (
            mine.sum(),
            pytest.approx(100 * (guesses[mine] == number).mean(), abs=1e-9),
        )
    low, high = result.interval
    assert (low, high) == pytest.approx(wilson(result.correct, images))


def test_a_class_without_images_has_no_accuracy() -> None:
    score = Score(3)
    score.update(torch.tensor([[9.0, 0, 0], [0, 0, 9.0]]), torch.tensor([0, 0]))
    assert score.result(["a", "b", "c"]).per_class == {"a": (2, 50.0)}


def test_scores_start_anew_after_a_reset() -> None:
    _, _, score = scored(4, 20, 8)
    score.reset()
    score.update(torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([0]))
    result = score.result(list("abcd"))
    assert (result.images, result.top1) == (1, 100.0)
    assert result.loss == pytest.approx(math.log(1 + 3 * math.exp(-9)), rel=1e-3)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """E. B. Wilson, 1927, with the 97.5 % quantile of the normal distribution."""
    z = 1.959963984540054
    share = correct / total
    middle = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return tuple(100 * (middle + sign * half) / (1 + z**2 / total) for sign in (-1, 1))


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (351, 360), (1, 1), (7_749, 10_000)])
def test_the_interval_is_wilsons(correct: int, total: int) -> None:
    assert accuracy_interval(correct, total) == pytest.approx(wilson(correct, total), abs=1e-6)


def test_the_interval_of_nothing_is_everything() -> None:
    assert accuracy_interval(0, 0) == (0.0, 100.0)


def test_probabilities_are_a_softmax_in_float32_whatever_the_logits_are() -> None:
    logits = torch.tensor([[10.25, 9.75, -3.0]])
    wanted = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum()
    for dtype in (torch.float32, torch.bfloat16):
        found = probabilities(logits.to(dtype))
        assert found.dtype == torch.float32
        assert found.numpy() == pytest.approx(wanted, abs=1e-6)


def test_the_result_as_json_and_in_words_says_the_same() -> None:
    score = Score(2)
    score.update(torch.tensor([[9.0, 0], [9.0, 0], [0, 9.0]]), torch.tensor([0, 1, 1]))
    result = score.result(["a", "b"])
    content = json.loads(json.dumps(result.as_dict()))
    low, high = wilson(2, 3)
    assert content == {
        "images": 3,
        "correct": 2,
        "top1": pytest.approx(200 / 3),
        "top1_interval": pytest.approx([low, high]),
        "top5": 100.0,
        "loss": pytest.approx((2 * math.log1p(math.exp(-9)) + math.log1p(math.exp(9))) / 3, rel=1e-5),
        "per_class": {"a": {"images": 1, "top1": 100.0}, "b": {"images": 2, "top1": 50.0}},
    }
    assert str(result) == f"66.67 % top-1 (2 of 3; 95 % interval {low:.2f} to {high:.2f})"
