"""The chunked head against whole tensors: values, gradients, memory, and what it may be given."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.losses import heads
from distill.losses.divergence import KINDS
from distill.losses.heads import token_terms
from distill.losses.objective import Objective, TokenTerms, dense_terms, masters
from distill.losses.signal import DenseSignal, Head, LiveSignal, Mixture
from runtime.errors import TrainingError
from tests.distill.loss_cases import case
from tests.distill.peak import Peak

T, H, V = 13, 5, 11
CHUNKS = pytest.mark.parametrize("chunk", [4, 99, 100], ids=["chunks", "one chunk", "small"], indirect=True)


@pytest.fixture
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens a chunk: several chunks, one that keeps its log-probs, or one small enough for autograd."""
    if request.param != 100:
        monkeypatch.setattr(heads, "SMALL_ELEMENTS", 0)
    return int(request.param)


class Wrapped(nn.Module):
    """A head that must be called: a low-rank update beside a linear layer, as LoRA has it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)
        self.out_features = base.out_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


class Setting:
    """Hidden states and heads of student, teacher and reference; float64 unless told."""

    def __init__(self, *, bias: bool = True, wider: int = 0, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.student = nn.Linear(H, V, bias=bias, dtype=dtype)
        self.teacher = nn.Linear(H, V + wider, dtype=dtype)
        self.reference = nn.Linear(H, V, dtype=dtype)
        self.hidden = torch.randn(T, H, dtype=dtype, requires_grad=True)
        self.theirs = torch.randn(T, H, dtype=dtype)
        self.target = torch.randint(0, V, (T,))
        self.weights = torch.randn(3, T, dtype=torch.float64)

    def chunked(self, head: Head | nn.Module, kind: str, chunk: int, alpha: float = 0.3) -> TokenTerms:
        return token_terms(
            self.hidden, head, self.target, LiveSignal(self.theirs, self.teacher),
            LiveSignal(self.theirs, self.reference), kind, alpha, chunk_tokens=chunk,
        )  # fmt: skip

    def plain(self, head: Head, kind: Any, vocab: int = V) -> TokenTerms:
        logits = head.finish(head.module(self.hidden).to(torch.float64))[:, :vocab]
        teacher, reference = (
            one(self.theirs).double()[:, :vocab].log_softmax(-1).detach()
            for one in (self.teacher, self.reference)
        )
        switches = Objective(divergence_kind=kind, alpha=0.3)
        return dense_terms(logits.log_softmax(-1), self.target % vocab, teacher, reference, switches)

    def loss(self, terms: TokenTerms) -> torch.Tensor:
        assert terms.divergence_t is not None and terms.reference_kl_t is not None
        values = torch.stack([terms.log_prob_t, terms.divergence_t, terms.reference_kl_t])
        return (self.weights * values).sum()


def check_equal(it: Setting, head: Head, found: TokenTerms, expected: TokenTerms, **tolerance: float) -> None:
    for name in ("log_prob_t", "divergence_t", "reference_kl_t", "teacher_log_prob_t"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **tolerance)
    leaves = [it.hidden, *head.module.parameters()]
    mine = torch.autograd.grad(it.loss(found), leaves)
    theirs = torch.autograd.grad(it.loss(expected), leaves)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@CHUNKS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.7, 2.0)])
def test_equal_to_whole_tensors(kind: str, bias: bool, scale: float, cap: float | None, chunk: int) -> None:
    it = Setting(bias=bias)
    head = Head(it.student, scale, cap)
    check_equal(it, head, it.chunked(head, kind, chunk), it.plain(head, kind))


@CHUNKS
@pytest.mark.parametrize("kind", ["jsd", "forward_kl"])
def test_a_head_that_must_be_called(kind: str, chunk: int) -> None:
    it = Setting()
    head = Head(Wrapped(it.student), 1.3, 4.0)
    assert head.linear is None
    check_equal(it, head, it.chunked(head, kind, chunk), it.plain(head, kind))


def test_a_head_with_a_hook_is_called() -> None:
    it = Setting()
    calls: list[int] = []
    it.student.register_forward_hook(lambda *_: calls.append(1))
    check_equal(it, Head(it.student), it.chunked(it.student, "jsd", 4), it.plain(Head(it.student), "jsd"))
    assert len(calls) == 4 + 4 + 1, "four chunks, each once more for the gradient, and the plain one"


def test_fp32_tolerance() -> None:
    it = Setting(dtype=torch.float32)
    head = Head(it.student)
    found = it.chunked(head, "jsd", 4)
    assert found.divergence_t is not None and found.divergence_t.dtype == torch.float32
    expected = it.plain(head, "jsd")
    for name in ("log_prob_t", "divergence_t", "reference_kl_t"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(expected, name), atol=1e-6, rtol=1e-5
        )


@CHUNKS
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, chunk: int) -> None:
    it = Setting()

    def run(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[Any, ...]:
        it.hidden = hidden
        with torch.no_grad():
            head = nn.Linear(H, V, dtype=torch.float64)
        del head.weight, head.bias
        head.weight, head.bias = weight, bias  # type: ignore[assignment]
        terms = it.chunked(head, kind, chunk)
        return terms.log_prob_t, terms.divergence_t, terms.reference_kl_t

    weight, bias = (p.detach().clone().requires_grad_() for p in it.student.parameters())
    assert torch.autograd.gradcheck(run, (it.hidden, weight, bias), fast_mode=True)


@CHUNKS
@pytest.mark.parametrize("called", [False, True], ids=["linear", "module"])
def test_vocabularies_padded_differently(chunk: int, called: bool) -> None:
    """A teacher's extra rows, or the student's, are cut off before the softmax, not after it."""
    it = Setting(wider=3)
    head = Head(Wrapped(it.student) if called else it.student)
    check_equal(it, head, it.chunked(head, "jsd", chunk), it.plain(head, "jsd"))
    it.teacher = nn.Linear(H, V - 2, dtype=torch.float64)
    it.target = it.target % (V - 2)
    found, expected = it.chunked(head, "jsd", chunk), it.plain(head, "jsd", V - 2)
    check_equal(it, head, found, expected)
    if not called:
        (grad,) = torch.autograd.grad(it.loss(it.chunked(head, "jsd", chunk)), [it.student.weight])
        assert (grad[V - 2 :] == 0).all() and (grad[: V - 2] != 0).all()


@CHUNKS
def test_a_tied_head_and_frozen_parts(chunk: int) -> None:
    """The gradient of an embedding that is also the head is the sum of both; what is frozen gets none."""
    it = Setting(bias=False)
    embedding = nn.Embedding(V, H, dtype=torch.float64)
    it.student.weight = embedding.weight
    ids = torch.randint(0, V, (T,))
    gradients = []
    for how in (lambda: it.chunked(it.student, "jsd", chunk), lambda: it.plain(Head(it.student), "jsd")):
        it.hidden = embedding(ids) * 2
        gradients.append(torch.autograd.grad(it.loss(how()), embedding.weight)[0])
    torch.testing.assert_close(*gradients)
    it.hidden = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    it.student.weight.requires_grad_(False)
    it.loss(it.chunked(it.student, "jsd", chunk)).backward()
    assert it.student.weight.grad is None and it.hidden.grad is not None


@CHUNKS
def test_each_terms_gradient_can_be_asked_for(chunk: int) -> None:
    """As the log of gradient-norm shares does: one graph, several backward passes."""
    it = Setting()
    terms = it.chunked(it.student, "jsd", chunk)
    whole = torch.autograd.grad(it.loss(terms), it.hidden, retain_graph=True)[0]
    parts = [
        torch.autograd.grad((w * v).sum(), it.hidden, retain_graph=True)[0]
        for w, v in zip(it.weights, (terms.log_prob_t, terms.divergence_t, terms.reference_kl_t), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)


@CHUNKS
def test_bf16_autocast(chunk: int) -> None:
    """Matrix products in bf16, distributions in fp32: in range, equal to fp32 within bf16's 2^-8."""
    it = Setting(dtype=torch.float32)
    plain = torch.autograd.grad(it.loss(it.chunked(it.student, "jsd", chunk)), [it.hidden, it.student.weight])
    with torch.autocast("cpu", torch.bfloat16):
        terms = it.chunked(it.student, "jsd", chunk)
    assert terms.divergence_t is not None and terms.log_prob_t.dtype == torch.float32
    assert (terms.divergence_t > -1e-6).all() and (terms.divergence_t < 0.6932).all()
    found = torch.autograd.grad(it.loss(terms), [it.hidden, it.student.weight])
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def test_bf16_weights_sum_their_gradient_in_fp32() -> None:
    it = Setting(dtype=torch.bfloat16)
    wide = Setting(dtype=torch.float32)
    for name in ("student", "teacher", "reference"):
        getattr(wide, name).load_state_dict(getattr(it, name).state_dict())
    wide.hidden = it.hidden.detach().float().requires_grad_()
    wide.theirs, wide.target, wide.weights = it.theirs.float(), it.target, it.weights
    found, expected = (
        torch.autograd.grad(one.loss(one.chunked(one.student, "jsd", 2)), one.student.weight)[0]
        for one in (it, wide)
    )
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_several_teachers_sum_their_divergences() -> None:
    it = Setting()
    other = nn.Linear(H, V, dtype=torch.float64)
    weight = torch.rand(T, dtype=torch.float64)
    signals = (LiveSignal(it.theirs, it.teacher), LiveSignal(it.theirs, other))
    mixture = Mixture(signals, torch.stack([weight, 1 - weight]))
    one, two = (
        token_terms(it.hidden, it.student, it.target, signal, chunk_tokens=4).divergence_t
        for signal in signals
    )
    for chunk in (4, 100):
        found = token_terms(it.hidden, it.student, it.target, mixture, chunk_tokens=chunk)
        assert one is not None and two is not None and found.divergence_t is not None
        expected = weight * one + (1 - weight) * two
        torch.testing.assert_close(found.divergence_t, expected)
        grads = [
            torch.autograd.grad((v * it.weights[0]).sum(), it.student.weight, retain_graph=True)[0]
            for v in (found.divergence_t, expected)
        ]
        torch.testing.assert_close(*grads)
        drawn = mixture.chunk(0, T).gather(1, it.target[:, None])[:, 0]
        torch.testing.assert_close(found.teacher_log_prob_t, drawn)


def test_the_loss_through_the_chunks() -> None:
    """`masters` on chunked terms is `masters` on whole tensors, gradient and all."""
    it = case(3, groups=4)
    expected_loss, expected = it.gradient(Objective())
    head = nn.Linear(7, 7, bias=False, dtype=torch.float64)
    nn.init.eye_(head.weight)
    leaf = it.logits.clone().requires_grad_()
    terms = token_terms(
        leaf,
        head,
        it.batch.target_t,
        DenseSignal(it.teacher_tv),
        DenseSignal(it.reference_tv),
        chunk_tokens=5,
    )
    loss = masters(terms, it.batch, Objective()).total
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, abs=1e-12)
    torch.testing.assert_close(leaf.grad, expected)


def test_without_teacher_without_gradient_without_tokens() -> None:
    it = Setting()
    terms = token_terms(it.hidden, it.student, it.target, None, chunk_tokens=4)
    assert terms.divergence_t is None and terms.reference_kl_t is None and terms.teacher_log_prob_t is None
    with torch.no_grad():
        again = it.chunked(it.student, "jsd", 4)
    assert not again.log_prob_t.requires_grad
    torch.testing.assert_close(again.log_prob_t, terms.log_prob_t)
    for head in (it.student, Wrapped(it.student)):
        empty = token_terms(it.hidden[:0], head, it.target[:0], DenseSignal(torch.zeros(0, V)))
        assert empty.log_prob_t.shape == (0,)
        empty.log_prob_t.sum().backward()


def test_a_signal_of_other_tokens() -> None:
    it = Setting()
    with pytest.raises(TrainingError, match="3 places, the student has 13"):
        token_terms(it.hidden, it.student, it.target, LiveSignal(it.theirs[:3], it.teacher))


# --- memory and work, counted on tensors without memory ---------------


@functools.cache
def count(tokens: int, how: str, *, reference: bool = False, vocab: int = 151_936, chunk: int = 1024) -> Peak:
    """A loss and its backward pass at Qwen's vocabulary, student 2,048 wide, teacher 5,120."""
    with FakeTensorMode():
        student = nn.Linear(2048, vocab, bias=False)
        student.weight.grad = torch.zeros_like(student.weight)
        teacher = nn.Linear(5120, vocab, bias=False)
        hidden = torch.randn(tokens, 2048, requires_grad=True)
        theirs, target = torch.randn(tokens, 5120), torch.zeros(tokens, dtype=torch.long)
        with Peak() as peak:
            if how == "plain":
                log_q = student(hidden).log_softmax(-1)
                with torch.no_grad():
                    log_p = teacher(theirs).log_softmax(-1)
                terms = dense_terms(log_q, target, log_p, log_p if reference else None)
                del log_q, log_p
            else:
                head = Wrapped(student, 1) if how == "module" else student
                signal = LiveSignal(theirs, teacher)
                terms = token_terms(
                    hidden, head, target, signal, signal if reference else None, chunk_tokens=chunk
                )
            loss = terms.log_prob_t.sum()
            for value in (terms.divergence_t, terms.reference_kl_t):
                loss = loss if value is None else loss + value.sum()
            loss.backward()
    return peak


def test_memory_at_scale() -> None:
    """8,192 tokens at V = 151,936: at most a tenth of the plain loss, the head's gradient included."""
    plain, chunked = count(8192, "plain"), count(8192, "linear")
    assert plain.peak > 8 * 8192 * 151_936 * 4
    assert chunked.peak < plain.peak / 10
    assert count(8192, "linear", reference=True).peak < count(8192, "plain", reference=True).peak / 10
    assert count(8192, "module", chunk=512).peak < plain.peak / 6


def test_memory_does_not_grow_with_tokens() -> None:
    """Beyond one chunk only hidden states and their gradients grow: never a [tokens, vocabulary] pair."""
    small, large = count(2048, "linear"), count(8192, "linear")
    assert large.peak - small.peak < 8192 * 2048 * 4 * 3


@pytest.mark.parametrize(("chunk", "products"), [(1024, 6), (4096, 4)])
def test_work(chunk: int, products: int) -> None:
    """Student and teacher head twice each and two products of the gradient; one chunk: nothing twice."""
    assert count(4096, "linear", chunk=chunk).products == products * (4096 // chunk)
