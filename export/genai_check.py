"""Runs the graphs of `genai.py` with onnxruntime as onnxruntime-genai chains them, against the parts.

In: a bundle with these files and its draft manifest, prompts. Out: nothing, or a ParityError.
Not here: onnxruntime-genai itself, which export does not need (tests/export/test_genai_reader.py runs it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.parity.parity import ParityCase
from export import genai
from export.gate_limits import rel_diff
from runtime import files
from runtime.errors import ParityError
from runtime.image import PreparedImage
from runtime.manifest import Manifest
from runtime.providers import CPU, import_onnxruntime
from runtime.session import Session

STEPS = 2
"""Tokens after the prompt."""

MOST, MOST_ROUNDED = 1e-5, 1e-2
"""Of the largest logit: the same nodes over the same weights, optimised as other graphs. Where activations
are rounded, a sum in another order can move one to the next step; equal logits were seen there too."""

_FAULT = "this is a fault of the exporter, report it"


@dataclass(frozen=True)
class _Prompt:
    """ids (S,), positions (rows, S + forced), and the parts' logits (1 + forced, vocab)."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    pictures: Sequence[PreparedImage]
    forced: Sequence[int]
    logits: NDArray[np.float32]


def check(bundle: Path, draft: Manifest, cases: Sequence[ParityCase], *, exact: bool = True) -> float:
    """Largest difference of logits over the largest logit, on a prompt for each number of pictures.

    Every view goes through the vision graph alone, tiles too (which its image processor does not cut).
    Raises ParityError above `MOST` (or `MOST_ROUNDED`, unless `exact`), or when a graph does not run.
    """
    most = MOST if exact else MOST_ROUNDED
    chosen = {len(case.images): case for case in reversed(cases)}
    one = draft.model_copy(update={"parts": tuple(p for p in draft.parts if p.role != "decoder_prefill")})
    with Session.from_manifest(bundle, one, threads=1) as session:
        prompts = [_asked(session, case) for case in chosen.values()]
    try:  # after the session is closed: both hold the weights
        chain = _Chain(bundle, one)
        worst = max(rel_diff(prompt.logits, chain.run(prompt)) for prompt in prompts)
    except Exception as error:  # onnxruntime has a class for each status
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ParityError(
            f"{bundle.name}: onnxruntime-genai's graphs do not run ({first}); {_FAULT}"
        ) from error
    if not worst <= most:
        raise ParityError(
            f"{bundle.name}: onnxruntime-genai's graphs give logits {worst:.2g} of the largest away from the "
            f"parts', at most {most:.0e} expected; {_FAULT}"
        )
    return worst


def _asked(session: Session, case: ParityCase) -> _Prompt:
    pictures = [session.prepare(each) for each in case.images]
    ids, forced = session.prompt_ids(case.question, pictures), case.forced[:STEPS]
    logits = [session.prefill(ids, [session.encode_image(each) for each in pictures])]
    logits += [session.decode(token) for token in forced]
    positions = session.positions(np.concatenate([ids, np.array(forced, np.int64)]), pictures)
    return _Prompt(ids, positions, pictures, forced, np.stack(logits))


class _Chain:
    """The three graphs that the configuration names, one sequence."""

    def __init__(self, bundle: Path, draft: Manifest) -> None:
        ort, model = import_onnxruntime(), files.read_json(bundle / genai.CONFIG)["model"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._vision, self._embed, self._decoder = (
            ort.InferenceSession(str(bundle / model[name]["filename"]), options, providers=[CPU])
            for name in ("vision", "embedding", "decoder")
        )
        self._draft, self._width = draft, int(model["decoder"]["hidden_size"])

    def run(self, prompt: _Prompt) -> NDArray[np.float32]:
        """Logits (1 + forced, vocab)."""
        forced = [np.array([token], np.int64) for token in prompt.forced]
        state = {each.input: _empty(each.shape, each.dtype) for each in self._draft.state}
        features, begin, found = self._features(prompt.pictures), 0, []
        for step in (prompt.ids, *forced):
            end = begin + len(step)
            place = prompt.positions[:, None, begin:end]
            rows = {"input_ids": step[None], "image_features": features}
            feeds = {
                "inputs_embeds": self._embed.run(None, rows)[0],
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": place[0] if len(place) == 1 else place,
                **state,
            }
            taken = {each.name: feeds[each.name] for each in self._decoder.get_inputs()}
            names = [each.name for each in self._decoder.get_outputs()]
            out = dict(zip(names, self._decoder.run(names, taken), strict=True))
            state = {each.input: out[each.output] for each in self._draft.state}
            found.append(out["logits"][0, -1].astype(np.float32))
            features, begin = features[:0], end
        return np.stack(found)

    def _features(self, pictures: Sequence[PreparedImage]) -> NDArray[Any]:
        """(tokens, width) of all pictures; of none, no rows in the type that the embedding graph takes."""
        found = []
        for view in (view for picture in pictures for view in picture.views):
            feeds = {
                each.name: view.inputs[each.name].astype(_type(each.type), copy=False)
                for each in self._vision.get_inputs()
            }
            found.append(self._vision.run(["image_features"], feeds)[0])
        if found:
            return np.concatenate(found)
        rows = next(each for each in self._embed.get_inputs() if each.name == "image_features")
        return np.zeros((0, self._width), _type(rows.type))


def _type(name: str) -> Any:
    """`tensor(float16)` -> float16."""
    inner = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32"}.get(inner, inner))


def _empty(shape: Sequence[int | str], dtype: str) -> NDArray[Any]:
    """A state at the start of one sequence: named dimensions are 1, that of the tokens 0."""
    sizes = [size if isinstance(size, int) else 0 if "sequence" in size else 1 for size in shape]
    return np.zeros(sizes, dtype)
