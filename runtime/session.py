"""A loaded bundle: answers questions about pictures.

In: a bundle directory. Out: `Session`, whose steps (`prepare`, `encode_image`, `prompt_ids`, `prefill`,
`decode`) are public so that evaluation can look between them, and `stream` / `ask` / `chat` / `ask_batch`.
Not here: how a format runs (`runtime/onnx_session.py`), what a picture goes through (`runtime/image.py`), the
loop over tokens (`runtime/answering.py`).

A session holds one sequence at a time and is not for several threads at once. A prompt that begins as the
sequence does (a later turn, another question about the same picture) runs only what is new in it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime import batch, bundle, choices, image, prompt
from runtime.answer import (
    Answer,
    Cancel,
    ChoiceScores,
    GenerationStats,
    History,
    Sources,
    Turn,
    sources_of,
)
from runtime.answering import Answering, Run, ms_since
from runtime.backend import Backend
from runtime.errors import InputError
from runtime.feature_memory import FeatureMemory, freeze, picture_key
from runtime.generation import GenerationOptions
from runtime.image import ImageFeatures, ImageInput, PreparedImage
from runtime.manifest import Manifest
from runtime.providers import EVALUATOR, ProviderReport, RunSettings
from runtime.sequence import RunningSequence, positions_of

__all__ = ["Answer", "GenerationStats", "Session", "Sources", "open_bundle", "sources_of"]

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]

DEFAULT_CONTEXT = 4096  # tokens, unless a picture needs more
TEXT_ROOM = 1024  # tokens of text that always fit beside the largest picture
FEATURE_BYTES = 64 << 20  # of pictures remembered
BATCH_ROWS = 8


class Session(Answering):
    """The pipeline over one bundle. Use it as a context manager or call `close`."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        max_context: int | None = None,
        reuse: bool = True,
    ) -> None:
        super().__init__()
        self.manifest = manifest
        self.max_context = context_of(manifest, max_context)
        self.load_ms = 0.0
        self._backend: Backend | None = backend
        self._tokenizer = tokenizer
        self._reuse = reuse
        self._memory = FeatureMemory(FEATURE_BYTES)
        self._sequence = RunningSequence(manifest, backend)

    @classmethod
    def from_manifest(
        cls,
        directory: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        inter_threads: int = 1,
        spin: bool | None = None,
        providers: Sequence[str] | None = None,
        max_context: int | None = None,
        reuse: bool = True,
    ) -> Session:
        """Open the parts of `directory` by a manifest that need not be on disk yet; no hash is checked."""
        start = time.perf_counter()
        wanted = tuple(manifest.providers if providers is None else providers)
        settings = RunSettings(threads, inter_threads, spin, wanted)
        context = context_of(manifest, max_context)
        image.load_decoders()
        tokenizer = prompt.load_tokenizer(bundle.locate(directory, manifest.tokenizer.file.path))
        backend = _backend(directory, manifest, settings, context)
        session = cls(manifest, backend, tokenizer, max_context=context, reuse=reuse)
        session.load_ms = ms_since(start)
        return session

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return self._tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.manifest.tokenizer.stop_ids

    @property
    def backend(self) -> Backend:
        """What runs the parts, for evaluation that looks inside. Raises InputError on a closed session."""
        return self._open()

    @property
    def providers(self) -> tuple[ProviderReport, ...]:
        """What became of each execution provider that was asked for."""
        return self._open().providers

    @property
    def emulated(self) -> str:
        """Why times and memory are not those of the device that the bundle is for; empty where they are."""
        return next((report.reason for report in self.providers if report.name == EVALUATOR), "")

    @property
    def kv_bytes(self) -> int:
        """Bytes of the state when `max_context` tokens are in it."""
        return self._open().state_bytes

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

    def prompt_ids(
        self, question: str, images: Sequence[PreparedImage], history: Sequence[Turn] = ()
    ) -> TokenIds:
        """Ids (prompt,) as the checkpoint's chat template gives them, the opening of the answer included.

        `history`: the turns before this question, each with its own pictures.
        """
        spec, limit = self.manifest.prompt, self.manifest.limits.images
        turns = [*history, Turn(question, (), tuple(images))]
        if (number := sum(len(turn.images) for turn in turns)) > limit:
            raise InputError(f"question: has {number} images, this bundle takes {limit} at most")
        pieces = [prompt.render(spec, self._tokenizer, turns[0].question, turns[0].images)]
        for before, turn in itertools.pairwise(turns):
            answer = self._answer_ids(before.answer)
            last = int(answer[-1]) if len(answer) else None
            pieces += [
                answer,
                prompt.render_later(spec, self._tokenizer, turn.question, turn.images, last),
            ]
        return np.concatenate(pieces)

    def positions(self, ids: TokenIds, images: Sequence[PreparedImage]) -> TokenIds:
        """Position ids (rows, prompt) of a sequence that begins with these ids."""
        return positions_of(self.manifest, ids, [view.grid for each in images for view in each.views])[0]

    def prefill(self, ids: TokenIds, images: Sequence[ImageFeatures] = (), *, reuse: bool = False) -> Floats:
        """Logits (vocab,) float32 of the last position of a new sequence; InputError when it is too long.

        With `reuse` it goes on from what the running sequence has in common with it; the logits are the same
        but for the order of summation (and, in integer parts, the scale of rounded activations).
        """
        self.check_length(ids)
        self._open()
        return self._sequence.begin(ids, images, reuse=reuse)

    def decode(self, token_id: int) -> Floats:
        """Logits (vocab,) float32 after one more token of the sequence that `prefill` started."""
        self._open()
        if self._sequence.length and self.room() == 0:
            raise InputError(
                f"decode: needs {self._sequence.length + 1} tokens, {self.max_context} are available"
                + self._larger_context()
            )
        return self._sequence.append(token_id)

    def fork(self) -> int:
        """The present length, to `go_back` to."""
        return self._sequence.fork()

    def go_back(self, length: int) -> None:
        """Forget the tokens after the first `length`."""
        self._sequence.go_back(length)

    def room(self) -> int:
        """How many tokens the running sequence still takes."""
        return self.max_context - self._sequence.length

    def check_length(self, ids: TokenIds, new_tokens: int = 0) -> None:
        """Raise InputError when a prompt and so many tokens after it are more than the context holds."""
        needed = len(ids) + new_tokens
        if needed <= self.max_context:
            return
        pictures = int(np.count_nonzero(ids == self.manifest.merge.token))
        of_images = f" ({pictures} of them of images)" if pictures else ""
        raise InputError(
            f"prompt: needs {needed} tokens{of_images}, {self.max_context} are available; "
            f"ask a shorter question{' or give fewer images' if pictures else ''}" + self._larger_context()
        )

    # --- answers ------------------------------------------------------

    def ask(
        self,
        source: Sources,
        question: str,
        options: GenerationOptions | None = None,
        *,
        history: History = (),
        cancel: Cancel = None,
        choices: Sequence[str] | None = None,
    ) -> Answer:
        """The whole answer to a question about a picture, several or none; arguments as `stream`.

        `choices`: the answer is one of these texts, the likeliest (above temperature 0 one drawn by its
        probability); `scores` of the answer then has the probability of each. Raises InputError when a choice
        is empty or twice there.
        """
        if choices is None:
            return super().ask(source, question, options, history=history, cancel=cancel)
        if isinstance(choices, str):  # its letters would be the choices
            raise InputError(f"choices: got the text {choices!r}, expected a list of texts")
        return self._keep(self._choose(Run(options, cancel), source, question, history, tuple(choices)))

    def ask_batch(
        self,
        questions: Sequence[tuple[Sources, str]],
        options: GenerationOptions | None = None,
        *,
        cancel: Cancel = None,
        rows: int = BATCH_ROWS,
    ) -> list[Answer]:
        """Answers to several questions, up to `rows` side by side, each as it would be alone.

        They run one by one where the bundle cannot do otherwise; `stats.one_by_one` then says why.
        A cancelled batch gives what each row has so far.
        """
        found: list[Answer] = []
        for first in range(0, len(questions), max(rows, 1)):
            found += self._side_by_side(questions[first : first + max(rows, 1)], options, cancel)
        return found

    def close(self) -> None:
        """Free the models; the session cannot be used afterwards."""
        if self._backend is not None:
            self._backend.close()
        self._backend = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside -------------------------------------------------------

    def _open(self) -> Backend:
        if self._backend is None:
            raise InputError("session: is closed; open the bundle again")
        return self._backend

    def _larger_context(self) -> str:
        most = self.manifest.limits.context
        return f", or open the bundle with max_context up to {most}" if self.max_context < most else ""

    def _answer_ids(self, answer: str | tuple[int, ...]) -> TokenIds:
        """Ids of an earlier answer, as it follows its opening."""
        if isinstance(answer, str):
            later = self.manifest.prompt.later
            answer = tuple(prompt.encode(self._tokenizer, (later.answer_before if later else "") + answer))
        return np.array(answer, dtype=np.int64)

    def _features(self, prepared: PreparedImage) -> tuple[ImageFeatures, bool]:
        if not self._reuse:
            return self.encode_image(prepared), True
        key = picture_key(prepared)
        if (known := self._memory.get(key)) is not None:
            return known, False
        found = freeze(self.encode_image(prepared))
        self._memory.put(key, found)
        return found, True

    def _begin(self, ids: TokenIds, images: Sequence[ImageFeatures], run: Run) -> Floats:
        logits = self.prefill(ids, images, reuse=self._reuse)
        run.stats.reused_tokens = self._sequence.reused
        return logits

    def _choose(
        self, run: Run, source: Sources, question: str, history: History, names: tuple[str, ...]
    ) -> Answer:
        """The likeliest of the choices."""
        spellings = choices.spellings(self.manifest.prompt, self._tokenizer, names)
        trees = [choices.tree(ids, names) for ids in spellings]
        longest = max(len(ids) for spelling in spellings for ids in spelling)
        opened = self._prompt(run, source, question, history, longest)
        if opened is None or run.cancelled():
            return run.answer()
        logits = self._prefilled(*opened, run)
        which = choices.likelier(spellings, logits)
        values = choices.score(self, trees[which], len(names), logits, self.stop_ids, run.cancelled)
        run.first_text()
        if values is None:
            return run.answer()
        best = choices.draw(values, run.options.temperature, run.options.seed)
        ids = list(spellings[which][best])
        run.stats.new_tokens = len(ids)
        return Answer(names[best], ids, "stop", run.stats, ChoiceScores(names, values))

    def _side_by_side(
        self,
        questions: Sequence[tuple[Sources, str]],
        options: GenerationOptions | None,
        cancel: Cancel,
    ) -> list[Answer]:
        backend, runs, rows = self._open(), [], []
        for source, question in questions:
            run = Run(options, cancel)
            runs.append(run)
            if (opened := self._prompt(run, source, question, ())) is not None:
                ids, images = opened
                grids = [grid for each in images for grid in each.grids]
                positions, following = positions_of(self.manifest, ids, grids)
                rows.append(batch.Row(run, ids, images, positions, following))
        reason = backend.no_rows or batch.refusal(rows, self.manifest.merge.token)
        cancelled = runs[0].cancelled if runs else bool
        if not reason and not cancelled():
            state = backend.rows(len(rows), batch.most_tokens(rows, self.max_context))
            batch.generate(state, rows, self.max_context, self._tokenizer, self.stop_ids, cancelled)
        elif not cancelled():
            for row in rows:
                row.run.stats.one_by_one = reason
                self._collect(self._kept(self._generate(row.ids, row.images, row.run), row.run))
        return [self._keep(run.answer()) for run in runs]


def context_of(manifest: Manifest, asked: int | None) -> int:
    """How many tokens a session holds: what was asked for, else a few thousand and the largest picture.

    Raises InputError when the model has no such context.
    """
    most = manifest.limits.context
    if asked is None:
        return usual_context(most, manifest.image.max_tokens)
    if not 1 <= asked <= most:
        raise InputError(f"max_context: got {asked}, this bundle takes 1 to {most} tokens")
    return asked


def usual_context(most: int, image_tokens: int) -> int:
    """Tokens of a session of a model that takes `most`, when nobody says how many."""
    return min(most, max(DEFAULT_CONTEXT, image_tokens + TEXT_ROOM))


def open_bundle(
    path: Path | str,
    *,
    threads: int | None = None,
    inter_threads: int = 1,
    verify: bool = True,
    spin: bool | None = None,
    providers: Sequence[str] | None = None,
    max_context: int | None = None,
    reuse: bool = True,
) -> Session:
    """Open a bundle directory, every file's hash checked unless `verify` is off.

    `threads`: physical cores by default; `inter_threads`: for independent nodes. `spin=False`: idle threads
    sleep, for busy machines and batteries; by default they spin in onnxruntime and sleep in llama.cpp (which
    reads it once, at the first bundle of a process). `providers`: execution providers by preference, the
    bundle's own by default; `Session.providers` tells what became of them. `max_context`: tokens that a
    sequence may have, whose buffers are allocated now. `reuse=False`: every answer encodes and prefills all
    of its prompt.
    Raises BundleError, InputError or MissingExtra.
    """
    start = time.perf_counter()
    directory = Path(path)
    session = Session.from_manifest(
        directory,
        bundle.read(directory, verify=verify),
        threads=threads,
        inter_threads=inter_threads,
        spin=spin,
        providers=providers,
        max_context=max_context,
        reuse=reuse,
    )
    session.load_ms = ms_since(start)
    return session


def _backend(directory: Path, manifest: Manifest, settings: RunSettings, context: int) -> Backend:
    if manifest.static is not None:
        from runtime.static_session import StaticBackend

        return StaticBackend(directory, manifest, settings)
    if manifest.format == "gguf":
        from runtime.gguf_session import GgufBackend

        return GgufBackend(directory, manifest, settings, context)
    if manifest.format == "coreml":
        from runtime.coreml_session import CoremlBackend

        return CoremlBackend(directory, manifest, settings)
    from runtime.onnx_session import OnnxBackend

    return OnnxBackend(directory, manifest, settings, context)
