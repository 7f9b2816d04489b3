"""The signal store: what is read back, kills, several writers, damage, a full disk; a second epoch of the
loss without the teacher."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.losses import signal_store
from distill.losses.heads import token_terms
from distill.losses.lm_head import Head
from distill.losses.objective import Objective, masters
from distill.losses.signal import DenseSignal, LiveSignal, TopKSignal, approximation
from distill.losses.signal_store import Key, SignalStore, entry_key
from runtime import files
from runtime.errors import StateError
from tests.distill.loss_cases import case

VOCAB, HIDDEN = 40, 6
TOPK = Key("a" * 64, 0.2, "topk", VOCAB, 8)
HIDDENS = Key("a" * 64, 0.2, "hidden", VOCAB)
LENGTHS = [3, 1, 4, 2]
KEYS = [entry_key("question 1", [number, 5]) for number in range(4)]


def teacher(seed: int = 0, tokens: int = 10, *, bias: bool = False) -> LiveSignal:
    torch.manual_seed(seed)
    return LiveSignal(torch.randn(tokens, HIDDEN) * 3, Head(nn.Linear(HIDDEN, VOCAB, bias=bias), 0.8, 9.0))


def test_top_k_is_read_back_in_any_order(tmp_path: Path) -> None:
    live = teacher()
    store = SignalStore(tmp_path, TOPK)
    store.add(KEYS, LENGTHS, live)
    assert KEYS[0] in store and store.missing(KEYS) == KEYS, "pending, not sealed"
    store.seal()
    assert store.missing([*KEYS, "0" * 32, "0" * 32]) == ["0" * 32]
    again = SignalStore(tmp_path, TOPK)
    assert len(again) == 4 and KEYS[2] in again and "0" * 32 not in again
    exact = live.chunk(0, 10)
    expected = TopKSignal.of(exact, 8).chunk(0, 10)
    found = again.signal([KEYS[2], KEYS[0]])
    assert found.tokens == 7 and found.vocab == VOCAB
    assert torch.equal(found.chunk(0, 7), torch.cat([expected[4:8], expected[0:3]]))
    assert again.signal([]).tokens == 0
    error = approximation(exact, expected, 8)
    report = again.report(0.1)
    assert report["tokens"] == 10 and report["responses"] == 4 and report["mib"] > 0
    assert report["jsd_nats"] == pytest.approx(error.means["jsd_nats"], rel=1e-4)
    assert report["error_nats"] == pytest.approx(error.bound(0.1), rel=1e-4)
    assert again.error.largest_tail_mass == pytest.approx(error.largest_tail_mass, rel=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_exact(tmp_path: Path, bias: bool, dtype: torch.dtype) -> None:
    """With the head, its scale and its soft cap, and nothing of the teacher left."""
    live = teacher(bias=bias)
    live = LiveSignal(live.hidden_th.to(dtype), replace(live.head, module=live.head.module.to(dtype)))
    store = SignalStore(tmp_path, HIDDENS)
    store.add(KEYS, LENGTHS, live)
    store.seal()
    expected = live.chunk(0, 10)
    del live
    found = SignalStore(tmp_path, HIDDENS).signal(KEYS)
    assert torch.equal(found.chunk(0, 10), expected)
    assert SignalStore(tmp_path, HIDDENS).report()["error_nats"] == 0.0
    assert SignalStore(tmp_path, HIDDENS).signal([]).tokens == 0


def test_hidden_states_of_what_has_none(tmp_path: Path) -> None:
    store = SignalStore(tmp_path, HIDDENS)
    with pytest.raises(StateError, match="of a live signal only"):
        store.add(KEYS[:1], [2], DenseSignal(torch.zeros(2, VOCAB)))
    wrapped = LiveSignal(torch.zeros(2, HIDDEN), nn.Sequential(nn.Linear(HIDDEN, VOCAB)))
    wrapped.head.module.out_features = VOCAB  # type: ignore[assignment]
    with pytest.raises(StateError, match=r"signal\.kind: topk"):
        store.add(KEYS[:1], [2], wrapped)


@pytest.mark.parametrize("key", [TOPK, HIDDENS], ids=["topk", "hidden"])
def test_a_second_epoch_needs_no_teacher(tmp_path: Path, key: Key) -> None:
    """Loss and gradient of the objective from the store: equal with hidden states, and with top-k the
    divergence is off by no more than the store's bound."""
    it = case(3, groups=4, vocabulary=VOCAB)
    lengths = it.batch.length_r.tolist()
    live = teacher(tokens=sum(lengths))
    head = nn.Linear(VOCAB, VOCAB, bias=False)
    nn.init.eye_(head.weight)

    def epoch(signal: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
        leaf = it.logits.float().requires_grad_()
        terms = token_terms(leaf, head, it.batch.target_t, signal, chunk_tokens=7)
        loss = masters(terms, it.batch, Objective(kl_beta=0.0))
        loss.total.backward()
        assert leaf.grad is not None and terms.divergence_t is not None
        return terms.divergence_t.detach(), leaf.grad, loss.figures["divergence"]

    first = epoch(live)
    store = SignalStore(tmp_path, key)
    keys = [entry_key("image", [number]) for number in range(len(lengths))]
    store.add(keys, lengths, live)
    store.seal()
    second = epoch(store.signal(keys))
    if key.kind == "hidden":
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    else:
        off = (first[0] - second[0]).abs()
        assert 0 < off.mean() <= store.error.bound(second[0].mean().item())


def test_a_kill_loses_only_what_was_not_sealed(tmp_path: Path) -> None:
    live = teacher()
    store = SignalStore(tmp_path, TOPK)
    store.add(KEYS[:2], LENGTHS[:2], DenseSignal(live.chunk(0, 4)))
    store.seal()
    store.add(KEYS[2:3], LENGTHS[2:3], DenseSignal(live.chunk(4, 8)))
    del store  # killed
    (tmp_path / TOPK.name / "00-00001.safetensors").write_bytes(b"half a shard")  # its seal was never written
    again = SignalStore(tmp_path, TOPK)
    assert again.missing(KEYS) == KEYS[2:]
    again.add(KEYS, LENGTHS, live)
    again.seal()
    assert sorted(path.name for path in (tmp_path / TOPK.name).glob("*.safetensors")) == [
        "00-00000.safetensors", "00-00001.safetensors",
    ]  # fmt: skip
    assert again.report()["tokens"] == 10, "nothing twice"
    expected = TopKSignal.of(live.chunk(0, 10), 8).chunk(0, 10)
    assert torch.equal(SignalStore(tmp_path, TOPK).signal(KEYS).chunk(0, 10), expected)


def test_shards_are_cut_by_size(tmp_path: Path) -> None:
    store = SignalStore(tmp_path, TOPK, shard_mib=0.0001)
    store.add(KEYS, LENGTHS, teacher())
    store.seal()
    assert len(list((tmp_path / TOPK.name).glob("*.safetensors"))) == 3
    signal_store_open = SignalStore(tmp_path, TOPK)
    assert signal_store_open.signal(KEYS).tokens == 10


def test_few_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_store, "OPEN_SHARDS", 1)
    store = SignalStore(tmp_path, TOPK, shard_mib=0.0)
    store.add(KEYS, LENGTHS, teacher())
    assert store.signal(KEYS + KEYS).tokens == 20 and len(store._open) == 1


def test_two_writers(tmp_path: Path) -> None:
    live = teacher()
    stores = [SignalStore(tmp_path, TOPK, rank=rank) for rank in (0, 1)]
    stores[0].add(KEYS[:2], LENGTHS[:2], DenseSignal(live.chunk(0, 4)))
    stores[1].add(KEYS[2:], LENGTHS[2:], DenseSignal(live.chunk(4, 10)))
    for store in stores:
        store.seal()
    assert stores[0].missing(KEYS) == KEYS[2:]
    stores[0].refresh()
    expected = TopKSignal.of(live.chunk(0, 10), 8).chunk(0, 10)
    for store in (stores[0], SignalStore(tmp_path, TOPK)):
        assert torch.equal(store.signal(KEYS).chunk(0, 10), expected)
        assert store.report()["tokens"] == 10


def test_another_teacher_ratio_or_prompt_is_another_directory(tmp_path: Path) -> None:
    SignalStore(tmp_path, TOPK).add(KEYS, LENGTHS, teacher())
    SignalStore(tmp_path, replace(TOPK, facts={"masked": ("vision", "language")}))
    SignalStore(tmp_path, replace(TOPK, facts={"masked": ("vision", "language")}))
    others = [
        replace(TOPK, teacher="b" * 64), replace(TOPK, ratio=0.25), replace(TOPK, k=9), HIDDENS,
        replace(TOPK, facts={"masked": ["vision"]}),
    ]  # fmt: skip
    assert len({key.name for key in [TOPK, *others]}) == 6
    for key in others:
        assert KEYS[0] not in SignalStore(tmp_path, key)
    path = tmp_path / TOPK.name / "key.json"
    files.write_json(path, {**files.read_json(path), "ratio": 0.3})
    with pytest.raises(StateError, match="delete this directory"):
        SignalStore(tmp_path, TOPK)


def test_damage_is_named(tmp_path: Path) -> None:
    store = SignalStore(tmp_path, TOPK)
    store.add(KEYS, LENGTHS, teacher())
    store.seal()
    path = tmp_path / TOPK.name / "00-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StateError, match=r"00-00000\.safetensors: sha256 .* delete the file and the \.json"):
        SignalStore(tmp_path, TOPK).signal(KEYS)
    path.unlink()
    with pytest.raises(StateError, match="sha256 none"):
        SignalStore(tmp_path, TOPK).signal(KEYS)


def test_what_was_never_kept(tmp_path: Path) -> None:
    store = SignalStore(tmp_path, TOPK)
    with pytest.raises(StateError, match="no signal for response"):
        store.signal([KEYS[0]])
    with pytest.raises(StateError, match="10 tokens for responses of 4"):
        store.add(KEYS[:2], [3, 1], teacher())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to do; what is pending is still there when there is room again."""
    store = SignalStore(tmp_path, TOPK)
    store.add(KEYS, LENGTHS, teacher())

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_bytes", full)
        with pytest.raises(StateError, match=r"No space left on device.*MiB are free"):
            store.seal()
    store.seal()
    assert SignalStore(tmp_path, TOPK).signal(KEYS).tokens == 10


def test_keys_tell_samples_and_tokens_apart() -> None:
    assert (
        len({entry_key("a", [1, 2]), entry_key("a", [12]), entry_key("a 1", [2]), entry_key("b", [1, 2])})
        == 4
    )
