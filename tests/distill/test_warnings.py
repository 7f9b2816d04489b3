"""Signs of failure in made-up logs, each beside a healthy one that must show none."""

from __future__ import annotations

import random
from typing import Any

import pytest

from distill.training import warnings
from distill.training.warnings import WINDOW, Sign


def log(steps: int, **columns: Any) -> list[dict[str, float]]:
    """Columns are numbers or functions of the step."""
    healthy = {
        "loss": lambda i: 1.0 - 0.001 * i,
        "divergence": lambda i: 0.5 * 0.99**i + 0.01 * random.Random(i).random(),
        "r_acc": 0.5,
        "r_distill": 0.5,
        "zero_variance": 0.3,
        "mask_ratio": 0.2,
        "phase": 0.0,
    }
    made = []
    for step in range(steps):
        entry = {"step": float(step)}
        for name, value in {**healthy, **columns}.items():
            entry[name] = value(step) if callable(value) else value
        if step % 10 == 0:
            entry["grad_share_rl"] = columns.get("share", 0.5)
        made.append(entry)
    return made


def names(found: list[dict[str, float]]) -> list[str]:
    return [sign.name for sign in warnings.signs(found)]


@pytest.mark.parametrize("steps", [1, 5, WINDOW, 2 * WINDOW, 10 * WINDOW])
def test_a_healthy_run_shows_no_sign(steps: int) -> None:
    assert names(log(steps)) == []


def test_noise_is_no_oscillation() -> None:
    """Twenty per cent of noise around a level that does not fall."""
    noise = [0.3 * (1 + 0.2 * random.Random(i).uniform(-1, 1)) for i in range(200)]
    assert names(log(200, divergence=lambda i: noise[i])) == []


def test_oscillation() -> None:
    found = log(100, divergence=lambda i: 0.3 + 0.2 * (-1) ** i)
    assert names(found) == ["oscillation"]
    sign = warnings.oscillation(found)
    assert sign is not None and sign.step == 99
    assert "train.lr" in sign.advice and "distill_weight" in sign.advice and "0.3 nats" in sign.seen


def test_a_swing_that_falls_is_learning() -> None:
    assert names(log(100, divergence=lambda i: (0.3 + 0.2 * (-1) ** i) * 0.97**i)) == []


def rising(step: int) -> float:
    return 0.1 if step < 100 else 0.4


def test_collapse() -> None:
    found = log(100 + WINDOW, divergence=rising, r_acc=lambda i: 0.5 if i < 100 else 0.4)
    assert names(found) == ["collapse"]
    assert "0.1 to 0.4 nats" in warnings.signs(found)[0].seen


def test_reward_gaming() -> None:
    found = log(100 + WINDOW, divergence=rising, r_acc=lambda i: 0.5 if i < 100 else 0.7)
    assert names(found) == ["reward gaming"]
    assert "judge-audit" in warnings.signs(found)[0].advice


def test_another_mask_may_raise_the_divergence() -> None:
    found = log(100 + WINDOW, divergence=rising, mask_ratio=lambda i: 0.2 if i < 100 else 0.1)
    assert names(found) == []


def test_no_variance() -> None:
    found = log(50, zero_variance=0.95)
    assert names(found) == ["no variance"]
    assert "95%" in warnings.signs(found)[0].seen


def test_sparse_reward() -> None:
    found = log(50, r_acc=0.005, zero_variance=0.95)
    assert names(found) == ["sparse reward"]


def test_labels_have_no_rewards() -> None:
    made = [{"step": float(i), "loss": 1.0, "tokens": 30.0} for i in range(300)]
    assert names(made) == []


def test_plain_distillation() -> None:
    found = log(100, share=0.01)
    assert names(found) == ["plain distillation"]
    assert "1.0%" in warnings.signs(found)[0].seen
    assert names(log(100, share=0.2)) == []


def test_switched_off_is_no_surprise() -> None:
    """A recipe without RL is warned of none of RL's faults."""
    assert names(log(100, share=0.0, zero_variance=0.95, rl_weight=0.0)) == []
    assert names(log(100, share=0.0, rl_weight=1.0)) == ["plain distillation"]


def test_the_watch_repeats_itself_seldom() -> None:
    watch, found = warnings.Watch(quiet=100), log(400, zero_variance=0.95)
    steps = [s.step for end in range(50, 401, 10) for s in watch.new(found[:end])]
    assert steps == [49, 149, 249, 349]


def test_as_a_python_warning() -> None:
    with pytest.warns(warnings.TrainingWarning, match=r"step 7: seen; advice"):
        warnings.emit(Sign("name", 7, "seen", "advice"))
