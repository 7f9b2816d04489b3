"""Benchmarks that people quote must keep computing the same thing in every arm."""

from __future__ import annotations

import functools

from benchmarks import interleaved, sharing


def test_every_arm_of_the_sharing_benchmark_does_the_same() -> None:
    work = sharing.Work(sharing.Shape(rows=2, responses=3))
    training = {"tree": work.train_tree, "image once": work.train_image_once, "naive": work.train_naive}
    making = {
        "tree": work.generate_tree, "image once": work.generate_image_once,
        "naive": work.generate_naive, "generate": work.generate_generate,
    }  # fmt: skip
    same = sharing.agreement(work, training, making)
    assert min(same["gradient_cosine"].values()) > 0.99999
    assert max(same["loss_difference"].values()) < 1e-4
    assert set(same["greedy_tokens_equal"].values()) == {1.0}
    assert same["distinct_greedy_responses"] > 3


def test_bounds_by_hand() -> None:
    """P 32, R 7, G 8, 3 questions: 24 sequences of 38 fed tokens; a tree of 22 + 3 x 10 + 24 x 6."""
    found = sharing.bounds(sharing.Work(sharing.Shape(rows=1)))
    assert found["question"] == (32 + 7) * 8 / (32 + 7 * 8)
    assert found["text"] == 24 * 38 / (22 + 30 + 144)
    assert found["layers"] == (24 * 38 * 2 + 24 * 64 * 3) / (196 * 2 + 64 * 3)


def test_ratios_compare_within_a_round() -> None:
    calls: list[str] = []
    arms = {name: functools.partial(calls.append, name) for name in ("a", "b")}
    found = interleaved.measure(arms, 3, "test")
    assert calls == ["a", "b"] * 4
    assert found["a"].wall_ratio == (1.0, 1.0, 1.0)
    assert all(low <= middle <= high for low, middle, high in vars(found["b"]).values())
    assert interleaved.table(found)[0].startswith("| arm | CPU ms | wall ms | CPU, times a |")
