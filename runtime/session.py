"""A loaded bundle: answers questions about pictures.

In: a bundle directory. Out: `Session`, whose steps (`prepare`, `encode_image`, `prompt_ids`, `prefill`,
`decode`) are public so that evaluation can look between them, and `stream` / `ask` that do it all.
Not here: how a format runs (`runtime/onnx_session.py`), what a picture goes through (`runtime/image.py`),
sampling (`runtime/generation.py`).

A session holds one sequence at a time and is not for several threads at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime import bundle, image, prompt
from runtime.errors import InputError
from runtime.generation import Detokenizer, FinishReason, GenerationOptions, Sampler
from runtime.image import ImageFeatures, ImageInput, PreparedImage, View
from runtime.manifest import Manifest
from runtime.positions import position_ids
from runtime.threads import default_threads

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]
Sources = ImageInput | Sequence[ImageInput] | None
"""The pictures of a question: one, several in their order, or none."""


class Backend(Protocol):
    """What a format offers; one sequence at a time."""

    def encode_view(self, view: View) -> ImageFeatures:
        """What the vision part makes of one view."""

    def start(self, capacity: int) -> None:
        """Forget the sequence; a new one of about `capacity` tokens begins."""

    def extend(self, ids: TokenIds, positions: TokenIds, images: Sequence[ImageFeatures]) -> Floats:
        """Append ids (S,) at positions (rows, S), with features for image tokens; the last's logits."""

    def close(self) -> None:
        """Free the models."""


@dataclass
class GenerationStats:
    """What an answer cost. `ttft_ms` is one measurement, from the picture's bytes to the first text."""

    prepare_ms: float = 0.0
    encode_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)  # per token after the first
    prompt_tokens: int = 0
    image_tokens: int = 0
    new_tokens: int = 0

    @property
    def prefill_tok_s(self) -> float:
        return self.prompt_tokens / self.prefill_ms * 1e3 if self.prefill_ms else 0.0

    @property
    def decode_tok_s(self) -> float:
        total = sum(self.decode_ms)
        return len(self.decode_ms) / total * 1e3 if total else 0.0


@dataclass(frozen=True)
class Answer:
    """`token_ids` are those that were generated, a stop id included, as `generate` returns them."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: GenerationStats


class Session:
    """The pipeline over one bundle. Use it as a context manager or call `close`."""

    def __init__(self, manifest: Manifest, backend: Backend, tokenizer: Tokenizer) -> None:
        self.manifest = manifest
        self.load_ms = 0.0
        self.last_stats = GenerationStats()
        self.last_answer: Answer | None = None
        self._backend: Backend | None = backend
        self._tokenizer = tokenizer
        self._length = 0  # tokens in the running sequence
        self._position = 0  # of its next token

    @classmethod
    def from_manifest(
        cls, directory: Path, manifest: Manifest, *, threads: int | None = None, spin: bool = True
    ) -> Session:
        """Open the parts of `directory` by a manifest that need not be on disk yet; no hash is checked."""
        from runtime.onnx_session import OnnxBackend  # the only format so far

        start = time.perf_counter()
        if threads is not None and threads < 1:
            raise InputError(f"threads: got {threads}, expected 1 or more")
        image.load_decoders()
        tokenizer = prompt.load_tokenizer(bundle.locate(directory, manifest.tokenizer.file.path))
        backend = OnnxBackend(directory, manifest, threads=threads or default_threads(), spin=spin)
        session = cls(manifest, backend, tokenizer)
        session.load_ms = _ms_since(start)
        return session

    # --- steps --------------------------------------------------------

    def prepare(self, source: ImageInput) -> PreparedImage:
        """The views of a path, a file's bytes or a PIL image. Raises InputError when it is no picture."""
        return image.prepare(source, self.manifest.image, self.manifest.limits.source_pixels)

    def encode_image(self, prepared: PreparedImage) -> ImageFeatures:
        """Features of all views, joined."""
        backend, found = self._open(), []
        for view in prepared.views:
            found.append(backend.encode_view(view))
            if len(found[-1]) != view.tokens:
                raise InputError(
                    f"image: gave {len(found[-1])} features, the manifest says {view.tokens}; re-export"
                )
        return image.join_features(found)

    def prompt_ids(self, question: str, images: Sequence[PreparedImage]) -> TokenIds:
        """Ids (prompt,) as the checkpoint's chat template gives them, the opening of the answer included."""
        if len(images) > self.manifest.limits.images:
            raise InputError(
                f"question: has {len(images)} images, this bundle takes {self.manifest.limits.images} at most"
            )
        return prompt.render(self.manifest.prompt, self._tokenizer, question, images)

    def positions(self, ids: TokenIds, images: Sequence[PreparedImage]) -> TokenIds:
        """Position ids (rows, prompt) of a sequence that begins with these ids."""
        grids = [view.grid for each in images for view in each.views]
        return position_ids(self.manifest.positions, ids == self.manifest.merge.token, grids, 0)[0]

    def prefill(self, ids: TokenIds, images: Sequence[ImageFeatures] = ()) -> Floats:
        """Start a new sequence; logits (vocab,) float32 of its last position. InputError when too long."""
        context = self.manifest.limits.context
        if len(ids) > context:
            raise InputError(
                f"prompt: needs {len(ids)} tokens, {context} are available; ask a shorter question"
            )
        slots, given = int(np.count_nonzero(ids == self.manifest.merge.token)), sum(map(len, images))
        if slots != given:
            raise InputError(f"prompt: has {slots} image tokens, got {given} image features")
        self._open().start(len(ids))
        self._length, self._position = 0, 0
        return self._extend(ids, images)

    def decode(self, token_id: int) -> Floats:
        """Logits (vocab,) float32 after one more token of the sequence that `prefill` started."""
        context = self.manifest.limits.context
        if self._length == 0:
            raise InputError("decode: no sequence is running; call prefill first")
        if self._length >= context:
            raise InputError(f"decode: needs {self._length + 1} tokens, {context} are available")
        return self._extend(np.array([token_id], dtype=np.int64), ())

    def _extend(self, ids: TokenIds, images: Sequence[ImageFeatures]) -> Floats:
        grids = [grid for features in images for grid in features.grids]
        positions, self._position = position_ids(
            self.manifest.positions, ids == self.manifest.merge.token, grids, self._position
        )
        logits = self._open().extend(ids, positions, images)
        self._length += len(ids)
        return logits

    # --- answers ------------------------------------------------------

    def stream(
        self, source: Sources, question: str, options: GenerationOptions | None = None
    ) -> Iterator[str]:
        """Text pieces of the answer as they come; afterwards `last_stats` and `last_answer` are set."""
        start = time.perf_counter()
        stats = GenerationStats()
        prepared = [self.prepare(each) for each in sources_of(source)]
        stats.prepare_ms = _ms_since(start)
        ids = self.prompt_ids(
            question, prepared
        )  # before the costly step: a question that cannot be asked fails
        mark = time.perf_counter()
        features = [self.encode_image(each) for each in prepared]
        stats.encode_ms = _ms_since(mark) if prepared else 0.0
        yield from self._generate(ids, features, options or GenerationOptions(), stats, start)

    def ask(self, source: Sources, question: str, options: GenerationOptions | None = None) -> Answer:
        """The whole answer to a question about a picture, several or none."""
        return self._collect(self.stream(source, question, options))

    def complete(
        self, ids: TokenIds, images: Sequence[ImageFeatures] = (), options: GenerationOptions | None = None
    ) -> Answer:
        """The answer to a prompt whose pictures are encoded already; its stats have no prepare and encode."""
        start = time.perf_counter()
        return self._collect(
            self._generate(ids, images, options or GenerationOptions(), GenerationStats(), start)
        )

    def close(self) -> None:
        """Free the models; the session cannot be used afterwards."""
        if self._backend is not None:
            self._backend.close()
        self._backend = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Backend:
        if self._backend is None:
            raise InputError("session: is closed; open the bundle again")
        return self._backend

    def _collect(self, pieces: Iterator[str]) -> Answer:
        for _ in pieces:
            pass
        assert self.last_answer is not None
        return self.last_answer

    def _generate(
        self,
        ids: TokenIds,
        images: Sequence[ImageFeatures],
        options: GenerationOptions,
        stats: GenerationStats,
        start: float,
    ) -> Iterator[str]:
        """Pieces of text; `start` is when the question came in, for the time to the first text."""
        stats.prompt_tokens = len(ids)
        stats.image_tokens = sum(map(len, images))
        detokenizer, sampler = Detokenizer(self._tokenizer), Sampler(options, ids)
        tokens: list[int] = []
        text: list[str] = []
        reason: FinishReason = "length"
        mark = time.perf_counter()
        logits = self.prefill(ids, images)
        stats.prefill_ms = _ms_since(mark)
        while True:
            tokens.append(sampler.pick(logits))
            stats.new_tokens = len(tokens)
            if tokens[-1] in self.manifest.tokenizer.stop_ids:
                reason = "stop"
                break
            if piece := detokenizer.push(tokens[-1]):
                stats.ttft_ms = stats.ttft_ms or _ms_since(start)
                text.append(piece)
                yield piece
            if len(tokens) == options.max_new_tokens:
                break
            if self._length == self.manifest.limits.context:
                reason = "context"
                break
            mark = time.perf_counter()
            logits = self.decode(tokens[-1])
            stats.decode_ms.append(_ms_since(mark))
        stats.ttft_ms = stats.ttft_ms or _ms_since(start)  # an answer without text: when that was known
        if piece := detokenizer.flush():
            text.append(piece)
            yield piece
        self.last_stats = stats
        self.last_answer = Answer("".join(text), tokens, reason, stats)


def sources_of(given: Sources) -> list[ImageInput]:
    """As a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]  # type: ignore[list-item]


def open_bundle(
    path: Path | str, *, threads: int | None = None, verify: bool = True, spin: bool = True
) -> Session:
    """Open a bundle directory, every file's hash checked unless `verify` is off.

    `threads`: physical cores by default. `spin=False`: idle threads sleep, for busy machines and batteries.
    Raises BundleError or MissingExtra.
    """
    start = time.perf_counter()
    directory = Path(path)
    manifest = bundle.read(directory, verify=verify)
    session = Session.from_manifest(directory, manifest, threads=threads, spin=spin)
    session.load_ms = _ms_since(start)
    return session


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
