"""Drawing the response pool into sealed shards, resumable at every point (METHOD 3).

In: an engine, samples. Out: sealed shards under a directory; `responses.load` reads them.
Not here: who answers (engines.py), what responses mean (responses.py).

Questions `indices[k * shard_size : (k + 1) * shard_size]` are shard k, whatever the number of processes;
process `rank` of `world` draws shards rank, rank + world, ... A shard is written once, sealed by a hash.
A model of this process draws an interrupted shard again, the same. A server's responses are kept one by
one as they arrive (partial.py), and none is asked for twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from distill.answers.engines import Drawn, Engine, mixed
from distill.answers.partial import Partial, Reserve, room_for
from distill.forward.sampling import Sampling
from distill.inputs.data import Sample, SampleError, Skips
from runtime import files
from runtime.errors import InputError, StateError

FORMAT = 1
POOL = "pool.json"
RESERVE_BYTES = 4 << 20
MU_DECIMALS = 6
Progress = Callable[[int, int], None]
"""Called with (questions done, questions of this process)."""


class Samples(Protocol):
    """What is drawn for: `data.Dataset`, or one that looks at its samples first."""

    name: str

    def __getitem__(self, index: int) -> Sample:
        """Raises SampleError for a sample that cannot be used."""
        ...


def draw(
    engine: Engine,
    dataset: Samples,
    indices: Sequence[int],
    count: int,
    source: str,
    directory: Path,
    *,
    sampling: Sampling,
    seed: int,
    shard_size: int = 64,
    rank: int = 0,
    world: int = 1,
    skips: Skips | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw `count` responses to the samples `indices` and seal them under `directory`; `source` is `teacher`
    or `student`. Sealed shards are left as they are. Returns the paths of this process's shards.

    Order `indices` by image: questions about one image share its forward only within a shard.
    A sample that cannot be read or asked goes to `skips` and is named in its shard; without `skips` it
    raises SampleError. Raises StateError when `directory` holds another pool, and on a full disk, with
    everything kept that had arrived; ServerError when a server stays broken, the same.
    """
    shards = -(-len(indices) // shard_size)
    facts = {
        "format": FORMAT,
        "source": source,
        "count": count,
        "questions": len(indices),
        "shards": shards,
        "shard_size": shard_size,
        "seed": seed,
        "sampling": asdict(sampling),
        "data": files.sha256_json([dataset.name, *map(int, indices)]),
    }
    _claim(directory, facts)
    own = [
        _Shard(directory, number, tuple(indices[number * shard_size : (number + 1) * shard_size]), facts)
        for number in range(rank, shards, world)
    ]
    run = _Run(engine, dataset, own, count, sampling, seed, skips, progress)
    run.tell()
    if engine.repeatable:
        run.by_shard()
    else:
        run.as_they_come(Reserve(directory / f".reserve-{rank}", _reserve_bytes(engine, count, sampling)))
    return [shard.path for shard in own]


@dataclass
class _Shard:
    """One shard: the samples of `indices`, and what is known of each place (slot) so far."""

    directory: Path
    number: int
    indices: tuple[int, ...]
    facts: Mapping[str, Any]
    samples: dict[int, Sample] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    done: bool = False

    def __post_init__(self) -> None:
        self.done = self.path.exists()

    @property
    def path(self) -> Path:
        return self.directory / f"{self.number:05d}.jsonl"

    @property
    def partial_path(self) -> Path:
        return self.directory / f"{self.number:05d}.partial"

    def seal(self, drawn: Mapping[int, Sequence[Drawn]]) -> None:
        """Write the shard, then drop what was kept for it. Raises StateError on a full disk."""
        header = {key: self.facts[key] for key in ("format", "source", "count", "seed")}
        rows: list[Any] = [{**header, "shard": self.number}]
        for slot, index in enumerate(self.indices):
            if slot in self.skipped:
                rows.append({"skipped": index, "why": self.skipped[slot]})
            else:
                rows += _rows(self.samples[slot].id, drawn[slot])
        with room_for(self.path):
            files.write_shard(self.path, rows)
        self.partial_path.unlink(missing_ok=True)
        self.done = True
        self.samples.clear()


@dataclass
class _Run:
    """One call of `draw`."""

    engine: Engine
    dataset: Samples
    shards: Sequence[_Shard]
    count: int
    sampling: Sampling
    seed: int
    skips: Skips | None
    progress: Progress | None

    def tell(self) -> None:
        """Report sealed questions, and forget what a kill left between a seal and its clean-up."""
        for shard in self.shards:
            if shard.done:
                shard.partial_path.unlink(missing_ok=True)
        if self.progress is not None:
            done = sum(len(shard.indices) for shard in self.shards if shard.done)
            self.progress(done, sum(len(shard.indices) for shard in self.shards))

    def by_shard(self) -> None:
        for shard in self.shards:
            if shard.done:
                continue
            slots = list(self.read(shard))
            drawn = self.engine.draw(
                [shard.samples[slot] for slot in slots],
                self.count,
                self.sampling,
                mixed(self.seed, shard.number),
                refuse=lambda place, error, shard=shard, slots=slots: self.skip(shard, slots[place], error),  # type: ignore[misc]
            )
            shard.seal(dict(zip(slots, drawn, strict=True)))
            self.tell()

    def as_they_come(self, reserve: Reserve) -> None:
        """Ask for all missing responses in one go, so that a server never waits for the end of a shard."""
        arrivals = _Arrivals(self, reserve)
        try:
            self.engine.draw(
                arrivals.samples(),
                self.count,
                self.sampling,
                self.seed,
                kept=arrivals.kept,
                keep=arrivals.keep,
                refuse=arrivals.refuse,
            )
        finally:
            reserve.release()
        if arrivals.failed is not None:
            lost = f" ({arrivals.lost} responses could not be kept)" if arrivals.lost else ""
            raise StateError(f"{arrivals.failed}{lost}") from arrivals.failed

    def read(self, shard: _Shard) -> Iterator[int]:
        """Read a shard's samples; yields the slots of those that can be asked."""
        for slot, index in enumerate(shard.indices):
            try:
                shard.samples[slot] = self.dataset[index]
            except SampleError as error:
                self.skip(shard, slot, error)
            else:
                yield slot

    def skip(self, shard: _Shard, slot: int, error: InputError) -> None:
        if not isinstance(error, SampleError):
            sample = shard.samples[slot]
            error = SampleError(sample.source or sample.id, sample.index, error)
        if self.skips is None:
            raise error
        self.skips.add(error)
        shard.skipped[slot] = str(error)


class _Arrivals:
    """Puts a server's responses into the shards they belong to, and seals a shard with its last one."""

    def __init__(self, run: _Run, reserve: Reserve) -> None:
        self.run, self.reserve = run, reserve
        self.kept: dict[int, set[int]] = {}
        self.failed: StateError | None = None
        self.lost = 0
        self._where: dict[int, tuple[_Shard, int]] = {}
        self._partials: dict[int, Partial] = {}
        self._open: dict[int, set[int]] = {}  # shard -> slots that miss responses
        self._next = 0

    def samples(self) -> Iterator[Sample]:
        """Samples that miss responses, until the disk is full."""
        for shard in self.run.shards:
            if shard.done:
                continue
            partial = self._partials[shard.number] = Partial(shard.partial_path)
            slots = list(self.run.read(shard))
            missing = [slot for slot in slots if len(partial.drawn.get(slot, {})) < self.run.count]
            self._open[shard.number] = set(missing)
            self._seal_if_whole(shard)
            for slot in missing:
                if self.failed is not None:
                    return
                self.kept[self._next] = set(partial.drawn.get(slot, {}))
                self._where[self._next] = shard, slot
                self._next += 1
                yield shard.samples[slot]

    def keep(self, place: int, first: int, drawn: Sequence[Drawn]) -> None:
        shard, slot = self._where[place]
        partial = self._partials[shard.number]
        try:
            partial.add(slot, first, drawn)
        except StateError as error:
            self.failed = self.failed or error
            self.reserve.release()  # room for what is still under way
            try:
                partial.add(slot, first, drawn)
            except StateError:
                self.lost += len(drawn)
                return
        if len(partial.drawn[slot]) == self.run.count:
            self._finish(place, shard, slot)

    def refuse(self, place: int, error: InputError) -> None:
        shard, slot = self._where[place]
        self.run.skip(shard, slot, error)
        self._finish(place, shard, slot)

    def _finish(self, place: int, shard: _Shard, slot: int) -> None:
        self.kept.pop(place, None)
        self._open[shard.number].discard(slot)
        self._seal_if_whole(shard)

    def _seal_if_whole(self, shard: _Shard) -> None:
        if self._open[shard.number] or shard.done:
            return
        drawn = self._partials[shard.number].drawn
        try:
            shard.seal({slot: [some[n] for n in sorted(some)] for slot, some in drawn.items()})
        except StateError as error:  # what it would hold is kept: sealed at the next start
            self.failed = self.failed or error
            return
        del self._partials[shard.number]
        self.run.tell()


def _rows(sample: str, drawn: Sequence[Drawn]) -> list[list[Any]]:
    """One row a distinct response: sample, ids, times drawn, mu, finished, retokenised."""
    times = Counter(one.ids for one in drawn)
    first: dict[tuple[int, ...], Drawn] = {}
    for one in drawn:
        if one.ids not in first or first[one.ids].log_probs is None:
            first[one.ids] = one
    return [
        [sample, list(ids), number, _rounded(one.log_probs), one.finished, one.retokenised]
        for ids, number in times.items()
        for one in [first[ids]]
    ]


def _rounded(log_probs: Sequence[float] | None) -> list[float] | None:
    return None if log_probs is None else [round(value, MU_DECIMALS) for value in log_probs]


def _reserve_bytes(engine: Engine, count: int, sampling: Sampling) -> int:
    """What the requests under way may still bring: at most about 24 bytes a token."""
    return RESERVE_BYTES + getattr(engine, "in_flight", 1) * count * sampling.max_new_tokens * 24


def _claim(directory: Path, facts: Mapping[str, Any]) -> None:
    path = directory / POOL
    if path.exists():
        found = files.read_json(path)
        differing = sorted(key for key in {*facts, *found} if facts.get(key) != found.get(key))
        if differing:
            told = "; ".join(f"{key}: there {found.get(key)}, now {facts.get(key)}" for key in differing)
            raise StateError(
                f"{directory}: holds a pool that was drawn otherwise ({told}); run with the same settings, "
                "or choose another directory"
            )
        return
    with room_for(path):
        files.write_json(path, dict(facts))
