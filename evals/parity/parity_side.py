"""One case seen by two sessions: what the reference did is kept in a file, a candidate is held against it.

In: sessions and a question. Out: `Kept` files of the reference, a `Row` (plain JSON) per case and candidate.
Not here: pixels (`parity_pixels.py`), summing up (`parity_figures.py`), which cases and in which
order (`evals/parity/parity_run.py`).

The reference's greedy answer is forced on the candidate, then the label as the checkpoint's chat template
writes it. Every side uses its own pixels, ids and features, as in use.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.parity.parity import NEAR_TIE, forced_logits, log_softmax
from evals.parity.parity_pixels import Pixels, diff, pixels_of, with_pixels
from evals.tasks.question import Question, given, image_hashes
from runtime import files
from runtime.answer import Turn
from runtime.errors import InputError, StateError

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """What the reference did with a question: prompt ids, image tokens of each picture, and for each kind of
    forced text its ids (n,) and the logits (n, vocab) that they were to be predicted from."""

    prompt: TokenIds
    image_tokens: TokenIds
    pictures: tuple[str, ...]
    forced: dict[str, TokenIds]
    logits: dict[str, Floats]
    failed: str = ""

    @classmethod
    def refused(cls, why: str) -> Kept:
        """Of a question that the reference cannot be asked."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, (), {}, {}, why)

    def write(self, path: Path) -> None:
        """As one .npz, whole or not at all. Equal forced texts are stored once."""
        arrays: dict[str, Any] = {
            "prompt": self.prompt,
            "image_tokens": self.image_tokens,
            "pictures": np.array(self.pictures, dtype="U64"),
            "failed": np.array(self.failed),
        }
        for name, ids in self.forced.items():
            arrays[f"forced:{name}"] = ids
            if name == "label" and self.repeats_greedy:
                continue
            arrays[f"logits:{name}"] = self.logits[name]
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files.write_bytes(path, buffer.getvalue())

    @property
    def repeats_greedy(self) -> bool:
        """Whether the label is the reference's own answer."""
        label = self.forced.get("label")
        return label is not None and label.tolist() == self.forced["reference-greedy"].tolist()

    @classmethod
    def read(cls, path: Path) -> Kept:
        """Raises StateError when the file is damaged."""
        try:
            return cls._read(path)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise StateError(f"{path}: cannot be read ({error}); delete it and run again") from error

    @classmethod
    def _read(cls, path: Path) -> Kept:
        with np.load(path, allow_pickle=False) as found:
            forced = {key[7:]: found[key] for key in found.files if key.startswith("forced:")}
            logits = {name: found.get(f"logits:{name}") for name in forced}
            pictures = tuple(str(one) for one in found["pictures"])
            prompt, image_tokens, failed = found["prompt"], found["image_tokens"], str(found["failed"])
        if failed:
            return cls.refused(failed)
        own = logits["reference-greedy"]
        known = {name: own if rows is None else rows for name, rows in logits.items()}
        return cls(prompt, image_tokens, pictures, forced, known)


class Seen:
    """Pictures of a session, prepared and encoded once for consecutive questions about them."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self._prepared: dict[str, Any] = {}
        self._features: dict[str, Any] = {}

    def look(self, question: Question) -> tuple[list[str], list[Any]]:
        """The hashes of its pictures, and what the session's `prepare` makes of them."""
        keys = image_hashes(question)
        if not set(keys) <= set(self._prepared):
            pairs = zip(keys, question.images, strict=True)
            self._prepared = {key: self.session.prepare(given(one)) for key, one in pairs}
            self._features = {}
        return keys, [self._prepared[key] for key in keys]

    def features(self, keys: Sequence[str]) -> list[Any]:
        """Features of pictures that were looked at last."""
        for key in keys:
            if key not in self._features:
                self._features[key] = self.session.encode_image(self._prepared[key])
        return [self._features[key] for key in keys]


def keep(seen: Seen, question: Question, pictures: Path, *, most: int, label: bool) -> Kept:
    """Ask the reference. Its pixels go to `pictures`, one file for each picture."""
    session = seen.session
    keys, prepared = seen.look(question)
    for key, one in zip(keys, prepared, strict=True):
        if not (path := pictures / f"{key}.npz").exists():
            pixels_of(one, session).write(path)
    prompt = np.asarray(session.prompt_ids(question.prompt, prepared), np.int64)
    images = seen.features(keys)
    answer, rows = greedy(session, prompt, images, most)
    forced, logits = {"reference-greedy": answer}, {"reference-greedy": rows}
    if label and question.references:
        ids = label_ids(session, question.prompt, prepared, prompt, question.references[0])[:most]
        forced["label"] = ids
        same = ids.tolist() == answer.tolist()
        logits["label"] = rows if same else forced_logits(session, prompt, images, ids[:-1].tolist())
    tokens = np.array([one.tokens for one in prepared], np.int64)
    return Kept(prompt, tokens, tuple(keys), forced, logits)


def greedy(session: Any, prompt: TokenIds, images: Sequence[Any], most: int) -> tuple[TokenIds, Floats]:
    """The likeliest tokens (n,) up to and with a stop id, and the logits (n, vocab) they were chosen from."""
    rows = [session.prefill(prompt, images)]
    tokens = [int(np.argmax(rows[-1]))]
    while tokens[-1] not in session.stop_ids and len(tokens) < most and session.room() != 0:
        rows.append(session.decode(tokens[-1]))
        tokens.append(int(np.argmax(rows[-1])))
    return np.array(tokens, np.int64), np.stack(rows)


def label_ids(session: Any, question: str, images: Sequence[Any], prompt: TokenIds, label: str) -> TokenIds:
    """Ids of a label as it follows this prompt in the chat template, its end included.

    Where the template does not simply go on from the prompt, the text is tokenised alone and the first stop
    id put behind.
    """
    try:
        longer = session.prompt_ids("", [], [Turn(question, label, tuple(images))]).tolist()
    except InputError:
        longer = []
    session.prompt_ids(question, images)  # a reference session remembers its last prompt
    rest = longer[len(prompt) :] if longer[: len(prompt)] == prompt.tolist() else []
    end = next((place for place, token in enumerate(rest) if token in session.stop_ids), None)
    if end is not None:
        return np.array(rest[: end + 1], np.int64)
    alone = session.tokenizer.encode(label, add_special_tokens=False).ids
    return np.array([*alone, *session.stop_ids[:1]], np.int64)


def hold(seen: Seen, question: Question, kept: Kept, pictures: Path) -> Row:
    """A candidate on the question: its preprocessing and its logits, against what the reference kept."""
    session = seen.session
    keys, prepared = seen.look(question)
    wanted = [Pixels.read(pictures / f"{key}.npz") for key in kept.pictures]
    ids = np.asarray(session.prompt_ids(question.prompt, prepared), np.int64)
    images = seen.features(keys)
    differences = [diff(ours, theirs) for ours, theirs in zip(wanted, prepared, strict=True)]
    row: Row = {
        "id": question.id,
        "group": question.group,
        "pictures": differences,
        "image_tokens_equal": [
            int(ours) == theirs.tokens for ours, theirs in zip(kept.image_tokens, prepared, strict=True)
        ],
        "ids": _first_id(kept.prompt, ids, session.tokenizer),
        "forced": {},
    }
    logits: Floats | None = None
    for name, tokens in kept.forced.items():
        if logits is None or not kept.repeats_greedy:
            logits = forced_logits(session, ids, images, tokens[:-1].tolist())
        row["forced"][name] = positions(kept.logits[name], logits, tokens, session.tokenizer)
    if any(one.get("max") for one in differences):
        swapped = [with_pixels(one, theirs) for one, theirs in zip(prepared, wanted, strict=True)]
        if all(one is not None for one in swapped):
            tokens = kept.forced["reference-greedy"]
            features = [session.encode_image(one) for one in swapped]
            logits = forced_logits(session, ids, features, tokens[:-1].tolist())
            same = positions(kept.logits["reference-greedy"], logits, tokens, session.tokenizer)
            row["same_inputs"] = same
    return row


def positions(reference_tv: Floats, candidate_tv: Floats, forced_t: TokenIds, tokenizer: Any) -> Row:
    """Figures of each position as lists of length T, and the position that differs most with its tokens.

    Raises InputError when the vocabularies differ in size. A position with a logit that is no number is
    left out (`not_finite` counts them) but for the agreement, where it counts as another token.
    """
    if reference_tv.shape != candidate_tv.shape:
        raise InputError(
            f"parity: a vocabulary of {candidate_tv.shape[-1]} tokens, the reference's has "
            f"{reference_tv.shape[-1]}; only models of one vocabulary can be compared"
        )
    usable = np.asarray(np.isfinite(candidate_tv).all(axis=1) & np.isfinite(reference_tv).all(axis=1))
    clean = np.where(usable[:, None], candidate_tv, 0.0)
    p, q = log_softmax(reference_tv.astype(np.float64)), log_softmax(clean.astype(np.float64))
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)
    own, other = reference_tv.argmax(axis=1), clean.argmax(axis=1)
    best = np.sort(reference_tv, axis=1)[:, -2:]
    agree = usable & (own == other)
    at = np.arange(len(forced_t))
    worst = int(np.where(usable, kl, -1.0).argmax())
    return {
        "kl": [float(value) if fine else None for value, fine in zip(kl, usable, strict=True)],
        "agree": agree.tolist(),
        "near_tie": (~agree & (best[:, 1] - best[:, 0] < NEAR_TIE)).tolist(),
        "nll_reference": (-p[at, forced_t]).tolist(),
        "nll": (-q[at, forced_t]).tolist(),
        "worst": {
            "position": worst,
            "before": tokenizer.decode(forced_t[:worst].tolist(), skip_special_tokens=True),
            "reference_token": _text(tokenizer, own[worst]),
            "reference_probability": float(np.exp(p[worst, own[worst]])),
            "candidate_token": _text(tokenizer, other[worst]),
            "candidate_probability": float(np.exp(q[worst, other[worst]])),
        },
    }


def _text(tokenizer: Any, token: Any) -> str:
    return str(tokenizer.decode([int(token)], skip_special_tokens=False))


def _first_id(reference: TokenIds, candidate: TokenIds, tokenizer: Any) -> str | None:
    """Where two prompts differ first; None when they are the same."""
    if reference.tolist() == candidate.tolist():
        return None
    pairs = zip(reference.tolist(), candidate.tolist(), strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(reference), len(candidate)))
    sides = []
    for ids in (reference, candidate):
        told = f"{ids[place]} {_text(tokenizer, ids[place])!r}" if place < len(ids) else "the end"
        sides.append(f"{told} ({len(ids)} ids)")
    return f"place {place}: {sides[0]} against {sides[1]}"
