"""Divergences: values by hand, properties, and slopes against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses.divergence import KINDS, check_kind, divergence_t, flow_tv, jsd_t, kl_t, most_nats
from tests.distill.loss_cases import log_probs

LN2 = math.log(2)
SEEDS = st.integers(0, 2**31 - 1)
ALPHAS = st.floats(0.05, 0.95)


def test_jsd_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): m = (3/8, 5/8)."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    kl_p = 0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)
    kl_q = 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    assert jsd_t(p, q).item() == pytest.approx((kl_p + kl_q) / 2, abs=1e-7)


def test_jsd_of_disjoint_distributions_is_ln_2() -> None:
    one, other = torch.tensor([[60.0, -60.0]]).log_softmax(-1), torch.tensor([[-60.0, 60.0]]).log_softmax(-1)
    assert jsd_t(one, other).item() == pytest.approx(LN2, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.01, 40))
def test_jsd_is_bounded_symmetric_and_zero_only_at_equality(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (log_probs(generator, 5, 9, scale) for _ in range(2))
    for first, second in ((p, q), (p.float(), q.float())):
        found = jsd_t(first, second)
        assert (found > -1e-6).all() and (found < LN2 + 1e-6).all()
        torch.testing.assert_close(found, jsd_t(second, first))
        assert jsd_t(first, first).abs().max() < 1e-6
    assert (jsd_t(p, q) > 0).all()


def test_jsd_pulls_nowhere_at_equality() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    jsd_t(logits.log_softmax(-1), logits.detach().log_softmax(-1)).sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12


def test_kl_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    exact = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert kl_t(p, q).item() == pytest.approx(exact, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_kl_is_never_negative(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (log_probs(generator, 5, 9) for _ in range(2))
    assert (kl_t(p, q) > 0).all() and kl_t(p, p).abs().max() < 1e-12


def slow(p: list[float], q: list[float], kind: str, a: float) -> float:
    """The table of `distill/losses/divergence.py` in plain Python; p is the teacher."""

    def kl(x: list[float], y: list[float]) -> float:
        return sum(i * math.log(i / j) for i, j in zip(x, y, strict=True) if i > 0)

    def mix(share: float) -> list[float]:
        return [share * i + (1 - share) * j for i, j in zip(p, q, strict=True)]

    return {
        "jsd": lambda: (kl(p, mix(0.5)) + kl(q, mix(0.5))) / 2,
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_kl": lambda: kl(p, mix(a)),
        "skew_rkl": lambda: kl(q, mix(1 - a)),
        "gjsd": lambda: a * kl(p, mix(a)) + (1 - a) * kl(q, mix(a)),
    }[kind]()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, alpha=ALPHAS)
def test_every_kind_is_its_formula(kind: str, seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (log_probs(generator, 3, 6) for _ in range(2))
    found = divergence_t(student, teacher, kind, alpha)
    for t in range(3):
        expected = slow(teacher[t].exp().tolist(), student[t].exp().tolist(), kind, alpha)
        assert found[t].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, alpha=ALPHAS, scale=st.floats(0.1, 30))
def test_no_kind_leaves_its_range(kind: str, seed: int, alpha: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (log_probs(generator, 4, 8, scale).float() for _ in range(2))
    found = divergence_t(student, teacher, kind, alpha)
    assert (found > -1e-5).all() and (found < most_nats(kind, alpha) + 1e-5).all()
    assert divergence_t(student, student, kind, alpha).abs().max() < 1e-5


def test_the_largest_values_are_reached_by_disjoint_distributions() -> None:
    one = torch.tensor([[60.0, -60.0]], dtype=torch.float64).log_softmax(-1)
    for kind in ("jsd", "skew_kl", "skew_rkl", "gjsd"):
        assert divergence_t(one, one.flip(-1), kind, 0.3).item() == pytest.approx(
            most_nats(kind, 0.3), abs=1e-9
        )


def test_kinds_that_meet() -> None:
    """GKD at 1/2 is the JSD; skew KL tends to the KL as alpha does to 0."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (log_probs(generator, 4, 8) for _ in range(2))
    torch.testing.assert_close(divergence_t(student, teacher, "gjsd", 0.5), jsd_t(student, teacher))
    for skew, plain in (("skew_kl", "forward_kl"), ("skew_rkl", "reverse_kl")):
        close = divergence_t(student, teacher, skew, 1e-9)
        torch.testing.assert_close(close, divergence_t(student, teacher, plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, alpha=ALPHAS)
def test_slopes_are_the_gradient(kind: str, seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = log_probs(generator, 4, 9)
    student = logits.log_softmax(-1)
    divergence_t(student, teacher, kind, alpha).sum().backward()
    with torch.no_grad():
        flow = flow_tv(student, teacher, kind, alpha)
        found = flow - student.exp() * flow.sum(-1, keepdim=True)
    torch.testing.assert_close(found, logits.grad)


def test_unknown_kinds_and_alphas() -> None:
    with pytest.raises(ValueError, match="'jds' is unknown; known: jsd, forward_kl"):
        check_kind("jds", 0.1)
    with pytest.raises(ValueError, match="alpha 1"):
        check_kind("skew_kl", 1.0)
    check_kind("jsd", 1.0)  # it has no alpha
