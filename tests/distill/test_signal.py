"""Signals: exact ones against the model, top-k ones against their bound, several teachers at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distill.losses import signal
from distill.losses.divergence import divergence_t, jsd_t
from distill.losses.lm_head import log_softmax_
from distill.losses.signal import Approximation, DenseSignal, LiveSignal, Mixture, TopKSignal, approximation
from runtime.errors import TrainingError
from tests.distill.loss_cases import log_probs

SEEDS = st.integers(0, 2**31 - 1)


def drawn(seed: int, tokens: int = 6, vocab: int = 40, scale: float = 3.0) -> torch.Tensor:
    return log_probs(torch.Generator().manual_seed(seed), tokens, vocab, scale).float()


def test_live_signal_is_the_head() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(4, 9), torch.randn(5, 4)
    live = LiveSignal(hidden, head)
    expected = head(hidden).log_softmax(-1)
    assert (live.tokens, live.vocab) == (5, 9)
    torch.testing.assert_close(live.chunk(1, 4), expected[1:4])
    torch.testing.assert_close(live.chunk(0, 5, 6), head(hidden)[:, :6].log_softmax(-1))
    assert not live.chunk(0, 5).requires_grad


def test_log_softmax_leaves_a_view_alone() -> None:
    whole = torch.randn(3, 6)
    copy = whole.clone()
    found = log_softmax_(whole[:, :4])
    torch.testing.assert_close(found, copy[:, :4].log_softmax(-1))
    assert torch.equal(whole, copy)


def test_dense_signal_is_cut_before_the_softmax() -> None:
    whole = drawn(0)
    torch.testing.assert_close(DenseSignal(whole).chunk(2, 4, 30), whole[2:4, :30].log_softmax(-1))
    assert torch.equal(DenseSignal(whole).chunk(2, 4), whole[2:4])


# --- top-k and tail ---------------------------------------------------


def test_top_k_by_hand() -> None:
    """p = (0.5, 0.3, 0.15, 0.05), k = 2: the tail's 0.2 lies evenly, 0.1 each."""
    exact = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    kept = TopKSignal.of(exact, 2)
    found = kept.chunk(0, 1).exp()[0].tolist()
    assert found == pytest.approx([0.1, 0.5, 0.1, 0.3], abs=3e-4)  # fp16 log-probs
    error = approximation(exact, kept.chunk(0, 1), 2)
    assert error.tail_mass == pytest.approx(0.2, abs=1e-6)
    assert error.variation == pytest.approx(0.05, abs=3e-4)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 40), st.floats(0.1, 8))
def test_top_k_is_a_distribution(seed: int, k: int, scale: float) -> None:
    exact = drawn(seed, scale=scale)
    kept = TopKSignal.of(exact, k)
    found = kept.chunk(0, 6)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(6))
    top = exact.topk(k, -1).indices
    torch.testing.assert_close(found.gather(1, top).exp(), exact.gather(1, top).exp(), atol=2e-3, rtol=2e-2)
    assert torch.equal(found[2:4], kept.chunk(2, 4))
    torch.testing.assert_close(kept.chunk(0, 6, 33), found[:, :33].log_softmax(-1))


def test_more_than_all() -> None:
    exact = drawn(1, vocab=8)
    torch.testing.assert_close(TopKSignal.of(exact, 99).chunk(0, 6), exact, atol=2e-2, rtol=2e-3)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 30), st.floats(0.2, 6), st.floats(0.0, 1.0))
def test_the_bound_holds_for_any_student(seed: int, k: int, scale: float, nearness: float) -> None:
    """Of every token, and of their mean: also for a student that equals the teacher, or what was kept."""
    exact = drawn(seed, scale=scale)
    kept = TopKSignal.of(exact, k).chunk(0, 6)
    student = (nearness * exact + (1 - nearness) * drawn(seed + 1, scale=4.0)).log_softmax(-1)
    for one in (student, exact, kept):
        true, measured = jsd_t(one, exact), jsd_t(one, kept)
        whole = approximation(exact, kept, k)
        assert abs(true.mean() - measured.mean()) <= whole.bound(measured.mean().item()) + 1e-5
        for t in range(6):
            error = approximation(exact[t : t + 1], kept[t : t + 1], k)
            assert abs(true[t] - measured[t]) <= error.bound(measured[t].item()) + 1e-5


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 30))
def test_variation_bounds_the_forward_kls_gradient(seed: int, k: int) -> None:
    exact = drawn(seed).double()
    kept = TopKSignal.of(exact, k).chunk(0, 6).double()
    gradients = []
    for teacher in (exact, kept):
        logits = torch.zeros(6, 40, dtype=torch.float64, requires_grad=True)
        divergence_t(logits.log_softmax(-1), teacher, "forward_kl").sum().backward()
        gradients.append(logits.grad)
    off = (gradients[0] - gradients[1]).abs().sum()
    assert off.item() == pytest.approx(2 * approximation(exact, kept, k).variation, abs=1e-5)


def test_more_k_is_closer() -> None:
    exact = drawn(3, tokens=50)
    found = [approximation(exact, TopKSignal.of(exact, k).chunk(0, 50), k) for k in (2, 8, 32)]
    assert found[0].jsd > found[1].jsd > found[2].jsd
    assert found[0].bound(0.1) > found[1].bound(0.1) > found[2].bound(0.1)


def test_approximations_add_up() -> None:
    exact = drawn(4, tokens=8)
    kept = TopKSignal.of(exact, 5).chunk(0, 8)
    whole = approximation(exact, kept, 5)
    joined = sum((approximation(exact[a:b], kept[a:b], 5) for a, b in ((0, 3), (3, 8))), Approximation())
    assert joined.means == pytest.approx(whole.means, rel=1e-5) and joined.tokens == 8
    assert approximation(exact[:0], kept[:0], 5) == Approximation()
    assert Approximation().bound(0.3) == 0.0


# --- several teachers -------------------------------------------------


def test_a_mixture_mixes_probabilities() -> None:
    one, two = drawn(5), drawn(6)
    mixed = Mixture((DenseSignal(one), DenseSignal(two)), signal.even_weights([3.0, 1.0], 6))
    torch.testing.assert_close(mixed.chunk(1, 5).exp(), (0.75 * one.exp() + 0.25 * two.exp())[1:5])
    left_out = Mixture((DenseSignal(one), DenseSignal(two)), signal.even_weights([1.0, 0.0], 6))
    torch.testing.assert_close(left_out.chunk(0, 6), one)


def test_weights() -> None:
    assert signal.even_weights([0.9, 0.6], 3).tolist() == [[pytest.approx(0.6)] * 3, [pytest.approx(0.4)] * 3]
    for wrong in ([], [0.0, 0.0], [-1.0, 2.0]):
        with pytest.raises(TrainingError, match="weights"):
            signal.even_weights(wrong, 1)


def test_dropped_teachers() -> None:
    """The same step drops the same teachers; the sum stays; each is dropped as often as asked for."""
    weights = [0.5, 0.3, 0.2]
    found = [signal.kept_teachers(weights, 0.4, (7, step)) for step in range(2000)]
    assert found[3] == signal.kept_teachers(weights, 0.4, (7, 3)) != found[4]
    for kept in found:
        assert sum(kept) == pytest.approx(1.0) and any(kept)
    for teacher in range(3):
        gone = sum(kept[teacher] == 0 for kept in found) / len(found)
        assert gone == pytest.approx(0.4 - 0.4**3 * 1 / 3, abs=0.04)  # of no teachers at all, one comes back
    assert signal.kept_teachers(weights, 0.0, (1,)) == pytest.approx(weights)
    assert signal.kept_teachers([1.0, 0.0], 0.9, (1,)) == [1.0, 0.0]
    with pytest.raises(TrainingError, match=r"drop 1\.0"):
        signal.kept_teachers(weights, 1.0, (1,))


def test_bound_at_its_largest() -> None:
    assert Approximation(tokens=2, jsd=0.02).bound(math.log(2)) == pytest.approx(
        2 * math.sqrt(math.log(2) * 0.01) + 0.01
    )
