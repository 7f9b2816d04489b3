"""Who answers: a model of this process, or a server. Both draw responses to samples as token ids.

In: samples, how many responses, how they are drawn, a seed. Out: `Drawn` responses per sample.
Not here: keeping them (responses.py), drawing from logits (sampling.py), starting a server (server.py).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from distill.answers.probe import scorable
from distill.forward import sampling as sampler
from distill.forward import tree
from distill.forward.features import encode_images
from distill.forward.sampling import Sampling
from distill.inputs.data import Sample, SampleError
from distill.inputs.encoding import Encoder, Prompt
from evals import chats
from evals.client import Ask, Choice, Client, Messages, RequestRefused
from runtime.errors import InputError

QUESTIONS_PER_ROW = 8


@dataclass(frozen=True)
class Drawn:
    """One response. `ids` with the end token where generation ended by it; `log_probs` raw at T = 1 (nats,
    one an id), None where the server gives none: the learner then computes them itself. `retokenised`: the
    server gave text, so the ids are the tokenizer's for that text, perhaps not those that were generated."""

    ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None
    finished: bool
    retokenised: bool = False


Keep = Callable[[int, int, Sequence[Drawn]], None]
"""Called as answers arrive: (place of the sample, number of the first draw, draws)."""
Refuse = Callable[[int, InputError], None]
"""Called with (place of the sample, why) for a sample that cannot be asked; without it that is raised."""


class Engine(Protocol):
    """Draws `count` responses to every sample, [] for a refused one.

    `repeatable`: the same call gives the same responses, so what was interrupted may be drawn again.
    Otherwise responses are worth money: `keep` gets each as it arrives, and `kept` (place of a sample ->
    numbers of draws that are there already) says what not to draw again; those are not in the result.
    """

    repeatable: bool

    def draw(
        self,
        samples: Iterable[Sample],
        count: int,
        sampling: Sampling,
        seed: int,
        *,
        kept: Mapping[int, Collection[int]] | None = None,
        keep: Keep | None = None,
        refuse: Refuse | None = None,
    ) -> list[list[Drawn]]: ...

    def close(self) -> None: ...


class HfEngine:
    """A model of this process: images and prompt run once for all responses to all questions about them.

    Samples with the same images share a row; `rows_per_batch` rows run at a time. A call's responses depend
    on (seed, samples, count, sampling), on the hardware, and on nothing before it. A sample's distribution
    depends on its own prompt only, its draws on the batch that it is in.
    """

    repeatable = True

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        *,
        rows_per_batch: int = 8,
        sharing: str = tree.TREE,
        questions_per_row: int = QUESTIONS_PER_ROW,
    ) -> None:
        self.model, self.encoder, self.sharing = model, encoder, sharing
        self.rows_per_batch, self.questions_per_row = rows_per_batch, questions_per_row

    def draw(
        self,
        samples: Iterable[Sample],
        count: int,
        sampling: Sampling,
        seed: int,
        *,
        kept: Mapping[int, Collection[int]] | None = None,
        keep: Keep | None = None,
        refuse: Refuse | None = None,
    ) -> list[list[Drawn]]:
        """All `count` responses to every sample; `kept` is for engines that are not repeatable. Raises
        InputError for a sample that cannot be encoded, unless `refuse` takes it."""
        if kept:
            raise ValueError("a repeatable engine draws whole shards; got responses that were kept")
        prompts = _encoded(self.encoder, samples, refuse)
        found: list[list[Drawn]] = [[] for _ in prompts]
        rows = self._rows(prompts)
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(rows), self.rows_per_batch):
                batch = rows[start : start + self.rows_per_batch]
                drawn = self._draw_batch(batch, prompts, count, sampling, mixed(seed, start))
                for place, responses in zip((p for row in batch for p in row), drawn, strict=True):
                    found[place] = responses
                    if keep is not None:
                        keep(place, 0, responses)
        finally:
            self.model.train(training)
        return found

    def close(self) -> None:
        """Nothing to end: the model belongs to the caller."""

    def _rows(self, prompts: Sequence[Prompt | None]) -> list[list[int]]:
        """Places of the samples, those that may share a row together; rows of similar length side by side."""
        groups: dict[object, list[int]] = {}
        for place, prompt in enumerate(prompts):
            if prompt is not None:
                groups.setdefault(tree.row_key(self.model, prompt), []).append(place)
        size = self.questions_per_row
        rows = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
        return sorted(rows, key=lambda row: max(len(prompts[p].ids) for p in row))  # type: ignore[union-attr]

    @torch.no_grad()
    def _draw_batch(
        self,
        batch: Sequence[Sequence[int]],
        prompts: Sequence[Prompt | None],
        count: int,
        sampling: Sampling,
        seed: int,
    ) -> list[list[Drawn]]:
        rows = [[tree.Group(prompt) for p in row if (prompt := prompts[p]) is not None] for row in batch]
        generator = torch.Generator(self.model.device).manual_seed(seed)
        drawn = sampler.sample(
            self.model,
            rows,
            encode_images(self.model, [row[0].prompt for row in rows]),
            count,
            sampling,
            generator,
            pad_id=self.encoder.pad_id,
            eos_ids=self.encoder.eos_ids,
            sharing=self.sharing,
        )
        return [[Drawn(one.ids, one.log_probs, one.finished) for one in some] for some in drawn]


class OpenAIEngine:
    """A server behind a `Client`. Responses arrive in any order and are not repeatable: `keep` them.

    Every draw has a seed of its own from (seed, sample id, number of the draw), honoured where the server
    has seeds per request (vLLM). Log-probs are taken as raw T = 1 ones, which is vLLM's default
    (`--logprobs-mode raw_logprobs`); for a server that scales them set `keep_log_probs=False`.
    The server builds the prompt with its own processor, from images of at most the encoder's `max_pixels`.
    A response is cut before an image placeholder: what holds one could not be scored again.
    """

    repeatable = False

    def __init__(self, client: Client, encoder: Encoder, *, keep_log_probs: bool = True) -> None:
        self.client, self.encoder, self.keep_log_probs = client, encoder, keep_log_probs
        self._single = False

    @property
    def single(self) -> bool:
        """Whether the server is known to give one answer a request, whatever is asked."""
        return self._single

    @property
    def in_flight(self) -> int:
        """Requests that may be under way at once."""
        return self.client.concurrency

    def draw(
        self,
        samples: Iterable[Sample],
        count: int,
        sampling: Sampling,
        seed: int,
        *,
        kept: Mapping[int, Collection[int]] | None = None,
        keep: Keep | None = None,
        refuse: Refuse | None = None,
    ) -> list[list[Drawn]]:
        """`samples` are taken one by one as the server has room; with `keep` the result holds no responses.

        Raises ServerError after what was under way has been kept.
        """
        work = _Work(self, samples, count, sampling, seed, {} if kept is None else kept, refuse)
        while True:
            for number, choices in self.client.stream(work.requests(), refused=work.refused_by_server):
                place, sample, numbers = work.asked.pop(number)
                drawn = [self._drawn(choice) for choice in choices[: len(numbers)]]
                if sampling.greedy:
                    drawn = drawn[:1] * len(numbers)
                if len(drawn) < len(numbers):
                    self._single = True
                    rest = list(numbers)[len(drawn) :]
                    work.again.extend((place, sample, run) for run in _runs(rest, single=True))
                if keep is None:
                    work.found[place] += drawn
                else:
                    keep(place, numbers.start, drawn)
            if not work.again:
                return work.found

    def close(self) -> None:
        self.client.close()

    def _drawn(self, choice: Choice) -> Drawn:
        ids, log_probs = choice.token_ids, choice.log_probs if self.keep_log_probs else None
        if ids is None:
            ids, log_probs = self._tokenised(choice.text), None
        cut = scorable(self.encoder.processor, ids)
        if 0 < cut < len(ids):
            log_probs = None if log_probs is None else log_probs[:cut]
            return Drawn(ids[:cut], log_probs, False, choice.token_ids is None)
        if cut == 0:
            ids, log_probs = (), None
        ended = bool(ids) and ids[-1] in self.encoder.eos_ids
        if (choice.finish == "stop" and not ended) or not ids:  # the end token was generated but not told
            ids, log_probs = (*ids, self.encoder.response_ids("", end=True)[-1]), None
        elif log_probs is not None and len(log_probs) != len(ids):
            log_probs = None
        return Drawn(ids, log_probs, ended or choice.finish == "stop", choice.token_ids is None)

    def _tokenised(self, text: str) -> tuple[int, ...]:
        """Ids of a response's raw text, in which the name of a special token is plain text."""
        ids = self.encoder.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return tuple(ids)


class _Work:
    """The requests of one `OpenAIEngine.draw`, made when the client has room for them."""

    def __init__(
        self,
        engine: OpenAIEngine,
        samples: Iterable[Sample],
        count: int,
        sampling: Sampling,
        seed: int,
        kept: Mapping[int, Collection[int]],
        refuse: Refuse | None,
    ) -> None:
        self.engine, self.count, self.sampling, self.seed = engine, count, sampling, seed
        self.kept, self.refuse = kept, refuse
        self.found: list[list[Drawn]] = []
        self.again: deque[tuple[int, Sample, range]] = deque()  # (place, sample, numbers of its draws)
        self.asked: dict[int, tuple[int, Sample, range]] = {}  # the same by number of the request
        self._source = enumerate(samples)

    def requests(self) -> Iterator[tuple[Messages, Ask]]:
        """Chats and what is asked of them."""
        number = 0
        while (task := self._next()) is not None:
            place, sample, numbers = task
            try:
                images = [self.engine.encoder._fit(image) for image in sample.open_images()]
                messages = chats.with_images(sample.messages, images)
            except InputError as error:
                self._refused(place, error)
                continue
            self.asked[number] = task
            number += 1
            yield messages, self._ask(sample, numbers)

    def _next(self) -> tuple[int, Sample, range] | None:
        while not self.again:
            taken = next(self._source, None)
            if taken is None:
                return None
            place, sample = taken
            self.found.append([])
            there = self.kept.get(place, ())
            missing = [number for number in range(self.count) if number not in there]
            single = self.engine.single and not self.sampling.greedy
            self.again.extend((place, sample, run) for run in _runs(missing, single=single))
        return self.again.popleft()

    def _ask(self, sample: Sample, numbers: range) -> Ask:
        how = self.sampling
        return Ask(
            max_new_tokens=how.max_new_tokens,
            greedy=how.greedy,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            repetition_penalty=how.repetition_penalty,
            count=len(numbers),
            seed=mixed(self.seed, sample.id, numbers.start),
            tokens=True,
        )

    def refused_by_server(self, number: int, error: RequestRefused) -> None:
        place, sample, _ = self.asked.pop(number)
        self._refused(place, SampleError(sample.source or sample.id, sample.index, error))

    def _refused(self, place: int, error: InputError) -> None:
        if self.refuse is None:
            raise error
        self.refuse(place, error)


def _runs(numbers: Sequence[int], *, single: bool) -> list[range]:
    """Ascending numbers as ranges without gaps; with `single` one range a number."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number and not single:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _encoded(encoder: Encoder, samples: Iterable[Sample], refuse: Refuse | None) -> list[Prompt | None]:
    prompts: list[Prompt | None] = []
    for place, sample in enumerate(samples):
        try:
            prompts.append(encoder.encode(sample))
        except InputError as error:
            if refuse is None:
                raise
            refuse(place, error)
            prompts.append(None)
    return prompts


def mixed(*parts: object) -> int:
    """A seed of 31 bits (what servers take) from several numbers and names."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
