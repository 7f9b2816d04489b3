"""The response pool: sealed shards, resuming with nothing lost and nothing asked twice, merging, figures."""

from __future__ import annotations

import json
import math
import resource
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from distill.answers import partial, pool_statistics, responses, shards
from distill.answers.engines import Engine, HfEngine, OpenAIEngine
from distill.answers.partial import Partial
from distill.answers.pool_statistics import Part
from distill.answers.responses import Pool, Response
from distill.forward.sampling import Sampling
from distill.inputs.data import Dataset, Sample, SampleError, Skips
from distill.inputs.encoding import Encoder
from evals.client import Client, ServerError
from runtime.errors import StateError, TrainingError
from tests.distill import test_engines
from tests.faults import FaultServer, completion

SAMPLING = Sampling(max_new_tokens=5, top_k=3)


class Few:
    """Records of a data set in memory: ten questions, two about each picture; number 4 cannot be read when
    `broken`."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 10

    def sample(self, index: int) -> Sample:
        if self.broken and index == 4:
            raise ValueError("no such column")
        return test_engines.sample(index, index // 2, ("what color?", "is it red?")[index % 2])


def dataset(broken: bool = False) -> Dataset:
    from distill.inputs.data import Part as Source

    source: Any = SimpleNamespace(scorer=None, start=0, limit=None, labels="all")
    return Dataset("few", [Source("few", Few(broken), source, 0)])


@pytest.fixture(scope="session")
def encoder(processor: Any) -> Encoder:
    return Encoder(processor)


@pytest.fixture
def hf(tiny_model: Any, encoder: Encoder) -> HfEngine:
    return HfEngine(tiny_model, encoder)


def draw(engine: Engine, directory: Path, **options: Any) -> list[Path]:
    settings: dict[str, Any] = {"sampling": SAMPLING, "seed": 3, "shard_size": 4, **options}
    data, indices = settings.pop("data", dataset()), settings.pop("indices", range(10))
    return responses.draw(engine, data, indices, settings.pop("count", 4), "teacher", directory, **settings)


def total(pool: Pool) -> Counter[str]:
    return Counter({key: sum(r.count for r in some) for key, some in pool.items()})


# --- a model of this process ------------------------------------------


def test_every_question_is_answered_as_often_as_asked(hf: HfEngine, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    paths = draw(hf, tmp_path, progress=lambda *done: told.append(done))
    assert [path.name for path in paths] == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    assert told == [(0, 10), (4, 10), (8, 10), (10, 10)]
    pool = responses.load(tmp_path)
    assert total(pool) == {f"few:{i}": 4 for i in range(10)}
    for some in pool.values():
        assert len({r.ids for r in some}) == len(some), "duplicates are merged"
        assert all(
            set(r.counts) == {"teacher"} and r.mu is not None and len(r.mu) == len(r.ids) for r in some
        )
    assert any(len(some) < 4 for some in pool.values()), "the case needs duplicates"
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(p.name for p in paths), "pool.json"]


def test_processes_share_the_shards(hf: HfEngine, tmp_path: Path) -> None:
    """Two processes, or one, or two that go on where three were: the same pool, byte for byte."""
    whole = {path.name: path.read_bytes() for path in draw(hf, tmp_path / "one")}
    assert [path.name for path in draw(hf, tmp_path / "two", rank=0, world=2)] == [
        "00000.jsonl",
        "00002.jsonl",
    ]
    with pytest.raises(StateError, match=r"1 of 3 shards are missing \(00001\.jsonl\)"):
        responses.load(tmp_path / "two")
    draw(hf, tmp_path / "two", rank=1, world=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").glob("0*")} == whole
    draw(hf, tmp_path / "three", rank=2, world=3)
    for rank in range(2):
        draw(hf, tmp_path / "three", rank=rank, world=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "three").glob("0*")} == whole


@pytest.mark.parametrize("lost", ["00000.jsonl", "00002.jsonl"])
def test_a_lost_shard_is_drawn_again_the_same(hf: HfEngine, tmp_path: Path, lost: str) -> None:
    draw(hf, tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("0*") if path.name != lost}
    body = (tmp_path / lost).read_bytes()
    (tmp_path / lost).unlink()
    draw(hf, tmp_path)
    assert (tmp_path / lost).read_bytes() == body
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "the others are left alone"


def test_a_damaged_shard_is_refused(hf: HfEngine, tmp_path: Path) -> None:
    draw(hf, tmp_path)
    shard = tmp_path / "00001.jsonl"
    shard.write_text(shard.read_text().replace(",", ";", 1))
    with pytest.raises(StateError, match=r"00001\.jsonl: the shard's seal .* delete this file and run"):
        responses.load(tmp_path)


@pytest.mark.parametrize(
    "change", [{"count": 2}, {"seed": 4}, {"shard_size": 5}, {"indices": range(9)}, {"sampling": Sampling(4)}]
)
def test_another_pool_in_the_directory_is_refused(hf: HfEngine, tmp_path: Path, change: Any) -> None:
    draw(hf, tmp_path)
    with pytest.raises(
        StateError, match=f"drawn otherwise .*{'data' if 'indices' in change else next(iter(change))}"
    ):
        draw(hf, tmp_path, **change)


def test_a_sample_that_cannot_be_read(hf: HfEngine, tmp_path: Path) -> None:
    """Reported, named in its shard, up to a limit."""
    with pytest.raises(SampleError, match=r"few\[4\]"):
        draw(hf, tmp_path / "a", data=dataset(broken=True))
    skips = Skips(1)
    draw(hf, tmp_path / "b", data=dataset(broken=True), skips=skips)
    assert list(skips.errors) == [("few", 4)]
    assert set(responses.load(tmp_path / "b")) == {f"few:{i}" for i in range(10) if i != 4}
    assert list(responses.skipped(tmp_path / "b")) == [4] and "column" in responses.skipped(tmp_path / "b")[4]
    with pytest.raises(TrainingError, match=r"data\.skip_limit is 0"):
        draw(hf, tmp_path / "c", data=dataset(broken=True), skips=Skips(0))


def test_a_prompt_that_is_too_long_is_skipped(tiny_model: Any, processor: Any, tmp_path: Path) -> None:
    long = len(Encoder(processor).encode(dataset()[0]).ids)
    short = len(Encoder(processor).encode(dataset()[1]).ids)
    assert short != long
    skips = Skips(5)
    engine = HfEngine(tiny_model, Encoder(processor, max_prompt_tokens=min(short, long)))
    draw(engine, tmp_path, skips=skips)
    assert len(responses.load(tmp_path)) == 5 == len(skips.errors)
    assert all("max_prompt_tokens" in str(error) for error in skips.errors.values())


# --- a server ---------------------------------------------------------


def numbered(body: dict[str, Any]) -> dict[str, Any]:
    """Answers that no two requests share: the seed and the number in it."""
    return completion([f"{body['seed']}.{i}" for i in range(body["n"])])


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(numbered) as running:
        yield running


@pytest.fixture
def remote(server: FaultServer, encoder: Encoder) -> Iterator[OpenAIEngine]:
    options: dict[str, Any] = {"retries": 2, "pause_seconds": 0.01, "timeout_seconds": 10, "concurrency": 3}
    engine = OpenAIEngine(Client(server.url, "m", **options), encoder)
    yield engine
    engine.close()


def test_a_pool_of_a_server(server: FaultServer, remote: OpenAIEngine, tmp_path: Path) -> None:
    server.plan.extend(["500", "", "half", "429", "", "reset"])
    draw(remote, tmp_path)
    pool = responses.load(tmp_path)
    assert total(pool) == {f"few:{i}": 4 for i in range(10)}
    assert all(r.retokenised and r.mu is None and r.finished for some in pool.values() for r in some)
    assert len(server.bodies) == 10 and server.most_running <= 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0000{i}.jsonl" for i in range(3)] + [
        "pool.json"
    ]


def test_what_a_server_gave_is_never_asked_for_again(
    server: FaultServer, remote: OpenAIEngine, tmp_path: Path
) -> None:
    """It dies in the middle of a shard. The next run asks for the rest only, and the whole is the same."""
    whole = draw(remote, tmp_path / "whole")
    server.bodies.clear()
    server.plan.extend(["", "", "", "", "", "", "dead"])
    with pytest.raises(ServerError, match="no usable answer in 3 tries"):
        draw(remote, tmp_path / "cut")
    arrived = len(server.bodies)
    assert 0 < arrived < 10
    there = sum(
        len(some) for path in (tmp_path / "cut").glob("*.partial") for some in Partial(path).drawn.values()
    )
    sealed = 16 * len(list((tmp_path / "cut").glob("*.jsonl")))
    assert there + sealed == 4 * arrived, "all that was answered is kept"
    server.plan.clear()
    draw(remote, tmp_path / "cut")
    assert len(server.bodies) == 10, "each sample was answered once"
    cut = sorted((tmp_path / "cut").glob("0*.jsonl"))
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in cut]
    assert not list((tmp_path / "cut").glob("*.partial"))


def test_half_answered_samples_are_completed(
    server: FaultServer, remote: OpenAIEngine, tmp_path: Path
) -> None:
    """A server that gives one answer a request dies when a sample has some of its four."""
    server.answer = lambda body: completion([str(body["seed"])])
    server.plan.extend([""] * 9 + ["dead"])
    with pytest.raises(ServerError):
        draw(remote, tmp_path)
    there = [len(some) for some in Partial(tmp_path / "00000.partial").drawn.values()]
    assert sum(there) == len(server.bodies) and any(0 < number < 4 for number in there)
    server.plan.clear()
    draw(remote, tmp_path)
    seeds = [body["seed"] for body in server.bodies]
    assert len(seeds) == len(set(seeds)) == 40
    assert total(responses.load(tmp_path)) == {f"few:{i}": 4 for i in range(10)}


def test_a_line_that_a_kill_cut_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "00000.partial"
    drawn = test_engines.Drawn((5, 2), (-0.5, -0.25), True)
    kept = Partial(path)
    kept.add(0, 0, [drawn, replace(drawn, ids=(7,), log_probs=None)])
    kept.add(3, 1, [drawn])
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        again = Partial(path)
        assert again.drawn == {0: kept.drawn[0]}
        again.add(3, 1, [drawn])
        assert path.read_bytes() == whole and Partial(path).drawn == kept.drawn


def test_a_kill_between_seal_and_clean_up(server: FaultServer, remote: OpenAIEngine, tmp_path: Path) -> None:
    draw(remote, tmp_path)
    left = tmp_path / "00001.partial"
    left.write_text("[0,0,[]]\n")
    server.bodies.clear()
    draw(remote, tmp_path)
    assert not left.exists() and server.bodies == []


def test_a_whole_partial_is_sealed_without_asking(
    server: FaultServer, remote: OpenAIEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill came when everything was there but the seal."""
    original = shards._Shard.seal

    def killed(self: Any, drawn: Any) -> None:
        if self.number == 1:
            raise KeyboardInterrupt
        original(self, drawn)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards._Shard, "seal", killed)
        draw(remote, tmp_path)
    assert len(Partial(tmp_path / "00001.partial").drawn) == 4
    server.bodies.clear()
    draw(remote, tmp_path)
    assert total(responses.load(tmp_path)).total() == 40
    assert len(server.bodies) <= remote.in_flight, "no more than what was under way"


def test_a_sample_that_the_server_refuses(server: FaultServer, remote: OpenAIEngine, tmp_path: Path) -> None:
    remote.client.generate([[{"role": "user", "content": "x"}]], seed=1)
    server.plan.extend(["", "400"])
    skips = Skips(3)
    draw(remote, tmp_path, skips=skips)
    assert len(responses.load(tmp_path)) == 9
    assert ["refuses the request" in str(error) for error in skips.errors.values()] == [True]


# --- a full disk ------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 KiB."""
    where = tmp_path / "disk"
    where.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(where)], capture_output=True
    )
    if made.returncode:
        pytest.skip("this process may not mount a file system")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_disk_that_fills_up(
    server: FaultServer, remote: OpenAIEngine, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way when it is full goes into the reserve; the rest is asked for when there is room."""
    monkeypatch.setattr(shards, "RESERVE_BYTES", 16 << 10)
    server.answer = lambda body: completion(
        [f"{body['seed']}.{i} " + "red circle " * 60 for i in range(body["n"])]
    )
    with pytest.raises(
        StateError, match=r"cannot be written \(No space left on device; free there"
    ) as caught:
        draw(remote, small_disk)
    assert "run the same command again" in str(caught.value) and "could not be kept" not in str(caught.value)
    arrived = len(server.bodies)
    assert 0 < arrived < 10
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    draw(remote, small_disk)
    assert len(server.bodies) == 10 and total(responses.load(small_disk)).total() == 40
    assert not list(small_disk.glob("*.partial")) and not list(small_disk.glob(".*"))


def test_a_disk_that_is_full_from_the_start(
    server: FaultServer, remote: OpenAIEngine, small_disk: Path
) -> None:
    with pytest.raises(StateError, match="No space left on device"):
        draw(remote, small_disk)
    assert server.bodies == [], "nothing is asked that could not be kept"


def test_a_limit_on_the_size_of_files(hf: HfEngine, tmp_path: Path) -> None:
    """A shard that cannot be written is absent, not half there; the run goes on when it can be."""
    expected = [path.read_bytes() for path in draw(hf, tmp_path / "whole")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(expected[0]) - 1, hard))
    try:
        with pytest.raises(StateError, match=r"00000\.jsonl: cannot be written \(File too large"):
            draw(hf, tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["pool.json"]
    assert [path.read_bytes() for path in draw(hf, tmp_path / "cut")] == expected


def test_other_errors_of_the_disk_are_not_called_full(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), partial.room_for(tmp_path):
        tmp_path.write_text("x")


# --- merging ----------------------------------------------------------


def response(ids: Sequence[int], mu: Sequence[float] | None = None, **counts: int) -> Response:
    return Response(tuple(ids), counts, None if mu is None else tuple(mu))


def test_merge() -> None:
    """Counts add up by source; what both drew has the count-weighted mean probability, token by token."""
    teacher = [
        response((1, 2), (math.log(0.5), math.log(0.9)), teacher=3),
        response((3,), (-1.0,), teacher=1),
    ]
    student = [
        response((1, 2), (math.log(0.1), math.log(0.5)), student=1),
        response((4,), (-2.0,), student=3),
    ]
    both, *others = responses.merge(teacher, student)
    assert both.ids == (1, 2) and both.counts == {"teacher": 3, "student": 1} and both.count == 4
    expected = (math.log(0.75 * 0.5 + 0.25 * 0.1), math.log(0.75 * 0.9 + 0.25 * 0.5))
    assert both.mu == pytest.approx(expected)
    assert others == [teacher[1], student[1]]
    assert teacher[0].counts == {"teacher": 3}, "the inputs stay as they are"


def test_merge_without_log_probs() -> None:
    """A server gave none: the mixture is not known, the learner recomputes it."""
    known, unknown = response((1,), (-1.0,), student=2), replace(response((1,), teacher=1), retokenised=True)
    (both,) = responses.merge([known], [unknown])
    assert both.mu is None and both.count == 3 and not both.retokenised


def test_merge_of_pools_keeps_an_order() -> None:
    first = {"a": [response((1,), teacher=1)], "b": [response((2,), teacher=1)]}
    second = {"c": [response((3,), student=1)], "b": [response((2,), student=2)]}
    merged = responses.merge_pools(first, second)
    assert list(merged) == ["a", "b", "c"] and merged["b"][0].counts == {"teacher": 1, "student": 2}


def test_a_sample_that_was_asked_twice_is_merged(hf: HfEngine, tmp_path: Path) -> None:
    draw(hf, tmp_path, indices=[0, 0, 1])
    assert total(responses.load(tmp_path)) == {"few:0": 8, "few:1": 4}


TEXTS = {(1,): "red circle: yes", (2,): "blue circle: no", (3,): "No.", (4,): "", (5,): "(B) no", (6,): "b"}


def said(ids: Sequence[int]) -> str:
    return TEXTS[tuple(ids)]


def test_majority() -> None:
    """Two wordings of `no` outvote one of `yes`, each as often as it was drawn; silence is no vote."""

    def vote(*counts: tuple[int, int], **how: Any) -> responses.Reference:
        return responses.majority([response((ids,), teacher=n) for ids, n in counts], said, **how)

    assert vote((1, 3), (2, 2), (3, 2)) == responses.Reference("no", True, 4 / 7)
    assert vote((1, 3), (2, 1), (3, 1)).text == "yes"
    assert vote((4, 5), (2, 1)) == responses.Reference("no", True, 1.0)
    assert vote((4, 5)) == responses.Reference("", True, 0.0)
    assert vote((5, 1), (6, 1), scorer="choice", choices=("yes", "no")).share == 1.0


def test_a_label_is_no_pseudo_reference() -> None:
    sample = replace(dataset()[0], answer="red")
    some = [response((1,), teacher=4)]
    assert responses.reference(sample, some, said) == responses.Reference("red", False, 1.0)
    assert responses.reference(replace(sample, answer=None), some, said).pseudo


# --- figures ----------------------------------------------------------


def parts() -> list[Part]:
    pool = {
        "a": [
            Response((1, 2, 3), {"teacher": 3, "student": 1}, (-1.0,) * 3),
            Response((4,), {"teacher": 1}, None, finished=False, retokenised=True),
        ],
        "b": [Response((5, 6), {"teacher": 2}, (-1.0,) * 2)],
        "c": [Response((7,), {"student": 1}, (-1.0,))],
    }
    correct = {"a": [1.0, 0.0], "b": [0.0], "c": [1.0]}
    return [Part("big", 0.2, pool, correct, pseudo={"b"}), Part("big", 0.0, {"a": pool["a"]})]


def test_statistics_weigh_by_count() -> None:
    teacher, student, full, _ = pool_statistics.statistics(parts())
    assert (teacher.part, teacher.ratio, teacher.source) == ("big", 0.2, "teacher")
    assert (teacher.questions, teacher.responses, teacher.distinct_per_question) == (2, 6, 1.5)
    assert (teacher.tokens, teacher.tokens_mean) == (3 * 3 + 1 + 2 * 2, pytest.approx(14 / 6))
    assert teacher.finished_share == teacher.mu_share == pytest.approx(5 / 6)
    assert teacher.retokenised_share == pytest.approx(1 / 6)
    assert (teacher.accuracy, teacher.accuracy_pseudo) == (0.75, 0.0), "votes are told apart from labels"
    assert (student.questions, student.responses, student.accuracy, student.accuracy_pseudo) == (
        2,
        2,
        1.0,
        None,
    )
    assert full.accuracy is None


def test_statistics_as_json_and_table(tmp_path: Path) -> None:
    lines = pool_statistics.statistics(parts())
    pool_statistics.write(tmp_path / "pool.json", lines)
    assert json.loads((tmp_path / "pool.json").read_text())[0]["distinct_per_question"] == 1.5
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    console.print(pool_statistics.table(lines))
    text = console.export_text()
    assert "75.0% (0.0%)" in text and "not judged" in text and "0.20" in text
