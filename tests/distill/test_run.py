"""Runs from recipe to checkpoint: what comes out, in every family and with every setting of a recipe."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from distill import run
from distill.answers import pool_statistics, pooling
from distill.recipe import Recipe
from evals import judge_audit
from runtime.errors import CheckpointError, InputError, StateError, TrainingError
from tests.checkpoints import FAMILIES
from tests.distill import runs
from tests.distill.runs import Result, World

slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def judges() -> Iterator[None]:
    with runs.quick_judges():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return runs.make(tmp_path_factory.mktemp("world"), teachers=2)


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, runs.go(runs.plan(world), out)


# --- what comes out -----------------------------------------------------


def test_the_student_is_a_checkpoint(world: World, whole: tuple[Path, Result]) -> None:
    out, _ = whole
    model = AutoModelForImageTextToText.from_pretrained(out / run.STUDENT)
    begun = AutoModelForImageTextToText.from_pretrained(world.student)
    assert AutoProcessor.from_pretrained(out / run.STUDENT).tokenizer.vocab_size > 0
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), begun.parameters(), strict=True)]
    assert all(moved)
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "ledger.jsonl", "metrics.json", "recipe.json", "student", "work",
    ]  # fmt: skip
    assert not list((out / "work" / "train").glob("state-*"))


def test_export_reads_the_student(whole: tuple[Path, Result], tmp_path: Path) -> None:
    from export import export_checkpoint

    assert (export_checkpoint(whole[0] / run.STUDENT, tmp_path / "bundle") / "manifest.json").exists()


def test_the_metrics_tell_everything(whole: tuple[Path, Result]) -> None:
    _, result = whole
    told = result.metrics
    assert [phase["ratio"] for phase in told["phases"]] == [0.05, 0.0]
    assert [len(told["log"]), [entry["phase"] for entry in told["log"]]] == [4, [0, 0, 1, 1]]
    assert [point[0] for point in told["gates"][0]["curve"]] == [0, 0.05]
    assert told["gates"][0]["curve"][1][2] == pytest.approx(0.05, abs=0.01), "zeros that were measured"
    assert told["gates"][0]["curve"][0][1] == 1.0, "the labels are the full teacher's own answers"
    assert [(line["source"], line["responses"]) for line in told["pool"]] == [
        ("teacher", 16), ("student", 16), ("teacher", 16), ("student", 16),
    ]  # fmt: skip
    stages = {stage["stage"]: stage for stage in told["stages"]}
    assert list(stages) == ["gate", "pool", "student 1", "student 2", "train"]
    assert stages["pool"]["tokens"] == told["generated"]["teacher"] > 0
    assert stages["pool"]["bytes"] > 0 and stages["train"]["tokens"] == told["tokens"] > 0
    assert told["generated"]["student"] == stages["student 1"]["tokens"] + stages["student 2"]["tokens"]
    assert 0 < sum(entry["r_acc"] for entry in told["log"]) < 4, "some are right, some wrong"
    assert told["validation"]["all"][-1][0] == 3


def test_the_table_fits(whole: tuple[Path, Result]) -> None:
    """In 100 columns, with large counts, votes and texts that were tokenised again."""
    large = {
        "part": "2 Qwen3-VL-235B-A22B-Instruct r 0.1",
        "questions": 1_500_000,
        "responses": 6_000_000,
        "accuracy_pseudo": 0.5,
        "retokenised_share": 1.0,
    }
    lines = [replace(line, **large) for line in pooling.statistics(whole[0])]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(pool_statistics.table(lines))
    text = console.export_text()
    heads = [
        "phase",
        "mask",
        "by",
        "asked",
        "drawn",
        "distinct",
        "tokens",
        "p95",
        "ended",
        "re-tok.",
        "right",
    ]
    assert all(head in text for head in heads) and "1.50 M" in text and "(50.0%)" in text
    assert text.count("…") == len(lines), "the phases' long names alone are cut"


def test_the_same_again(world: World, whole: tuple[Path, Result], tmp_path: Path) -> None:
    """Twice the same, and when it is there nothing is done."""
    torch.manual_seed(77)
    out = tmp_path / "out"
    assert runs.go(runs.plan(world), out).equals(whole[1])
    before = (out / run.METRICS).stat().st_mtime_ns
    assert run.run(runs.plan(world), out) == out / run.STUDENT
    assert (out / run.METRICS).stat().st_mtime_ns == before


def test_another_seed_differs(world: World, whole: tuple[Path, Result], tmp_path: Path) -> None:
    """These comparisons can fail."""
    assert not runs.go(runs.plan(world, "seed=1"), tmp_path / "out").equals(whole[1])


@pytest.mark.parametrize("family", [pytest.param(name, marks=slow) for name in FAMILIES if name != "smolvlm"])
def test_every_family(family: str, tmp_path: Path) -> None:
    world = runs.make(tmp_path, family)
    out = tmp_path / "out"
    result = runs.go(runs.plan(world), out)
    assert len(result.log) == 4 and all(math.isfinite(entry["loss"]) for entry in result.log)
    model = AutoModelForImageTextToText.from_pretrained(out / run.STUDENT)
    assert AutoProcessor.from_pretrained(out / run.STUDENT) is not None
    assert type(model).__name__ == type(AutoModelForImageTextToText.from_pretrained(world.student)).__name__


# --- refused ------------------------------------------------------------


def test_another_recipe_in_the_same_directory(world: World, tmp_path: Path) -> None:
    run.run(runs.plan(world), tmp_path / "out", until="pool")
    with pytest.raises(StateError, match=r"train\.lr.*0\.001.*0\.002"):
        run.run(runs.plan(world, "train.lr=0.002"), tmp_path / "out")
    with pytest.raises(StateError, match=r"pool\.teacher_responses"):
        run.run(runs.plan(world, "pool.teacher_responses=3"), tmp_path / "out")
    with pytest.raises(StateError, match="limit"):
        run.run(runs.plan(world), tmp_path / "out", limit=8)
    assert runs.go(runs.plan(world, "train.save_every=3"), tmp_path / "out").log


def test_limit(world: World, tmp_path: Path) -> None:
    result = runs.go(runs.plan(world), tmp_path / "out", limit=6)
    assert [phase["questions"] for phase in result.metrics["phases"]] == [3, 3]


def test_a_quantised_student(world: World, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(world.student, tmp_path / "student")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised"):
        run.run(runs.plan(world, student={"checkpoint": str(copy)}), tmp_path / "out")


def test_accuracy_weights_want_validation(world: World, tmp_path: Path) -> None:
    settings = several(world, "accuracy", data={"train": [world.source("data")]})
    with pytest.raises(InputError, match=r"data\.validation"):
        run.run(settings, tmp_path / "out")


# --- settings of a recipe ----------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        ["train.passes=2"],
        ["pool.student_refresh=never"],
        ["pool.student_responses=0", "pool.teacher_responses=4"],
        ["pool.teacher_responses=0", "pool.student_responses=4"],
        ["data.together=1"],
        ["data.together=4", "train.tokens_per_device=64"],
        ["train.gradient_checkpointing=true"],
        ["train.sharing=naive"],
        ["objective.preset=paper"],
        ["objective.preset=advdistill"],
        ["train.patience=1", "train.validate_every=1", "train.lr=1.0e-9"],
    ],
    ids=" ".join,
)
def test_settings(world: World, tmp_path: Path, changes: list[str]) -> None:
    if changes[0].endswith("advdistill"):
        changes = [*changes, "teachers.0.mask=null"]
    result = runs.go(runs.plan(world, *changes), tmp_path / "out")
    log = result.log
    assert all(math.isfinite(entry["loss"]) for entry in log)
    steps = {"train.passes=2": 8, "train.patience=1": 2}
    assert len(log) == steps.get(changes[0], 4)
    sources = {line["source"] for line in result.metrics["pool"]}
    assert sources == {"teacher", "student"} - {
        source for source in ("teacher", "student") if f"pool.{source}_responses=0" in changes
    }


def test_never_refreshed_answers_are_the_first_students(world: World, tmp_path: Path) -> None:
    """What the student answers in the second phase depends on whether it has learned by then."""
    fast = "train.lr=0.03"
    shards = {}
    for refresh in ("never", "stage"):
        out = tmp_path / refresh
        runs.go(runs.plan(world, f"pool.student_refresh={refresh}", fast), out)
        shards[refresh] = runs.files_below(out / "work" / "student")
    assert shards["never"]["phase-1/00000.jsonl"] == shards["stage"]["phase-1/00000.jsonl"]
    assert shards["never"]["phase-2/00000.jsonl"] != shards["stage"]["phase-2/00000.jsonl"]


def test_frozen_vision(world: World, tmp_path: Path) -> None:
    result = runs.go(runs.plan(world, "train.freeze=[vision]"), tmp_path / "out")
    begun = runs.load_file(Path(world.student) / "model.safetensors")
    for name, value in result.weights.items():
        still = "vision" in name or "connector" in name
        assert torch.equal(value, begun[name]) == still, name
    assert not (tmp_path / "out" / "work" / "features").exists()


@pytest.mark.parametrize("frozen", ["[]", "[vision]"])
def test_lora(world: World, tmp_path: Path, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second model for the reference; the merged checkpoint loads; adapters begin alike in every run."""
    from distill import models

    loaded: list[str] = []
    load = models.load

    def spy(settings: Any, dtype: str | None = None) -> Any:
        loaded.append(settings.checkpoint)
        return load(settings, dtype)

    monkeypatch.setattr(models, "load", spy)
    settings = runs.plan(world, "train.lora={rank: 4, alpha: 8}", f"train.freeze={frozen}", "train.lr=0.01")
    torch.manual_seed(1)
    first = runs.go(settings, tmp_path / "one")
    assert loaded.count(world.student) == 1
    torch.manual_seed(2)
    assert runs.go(settings, tmp_path / "two").equals(first)
    begun = runs.load_file(Path(world.student) / "model.safetensors")
    moved = {name for name, value in first.weights.items() if not torch.allclose(value, begun[name])}
    assert moved and any("vision" in name for name in moved) == (frozen == "[]")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "one" / run.STUDENT)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert all(math.isfinite(entry["loss_reference"]) for entry in first.log)
    assert first.log[0]["loss_reference"] == pytest.approx(0, abs=1e-6)


# --- data ---------------------------------------------------------------


def test_labels_that_the_teacher_votes(world: World, tmp_path: Path) -> None:
    """Without labels the reference is the full teacher's majority answer, told apart in the figures."""
    source = world.source("data")
    data = {"train": [{**source, "labels": 4}], "validation": [world.held_out]}
    result = runs.go(runs.plan(world, data=data), tmp_path / "out")
    lines = result.metrics["pool"]
    assert all(line["accuracy_pseudo"] is not None for line in lines)
    full = [line for line in lines if line["ratio"] == 0 and line["source"] == "teacher"]
    assert full[0]["accuracy_pseudo"] >= 0.5, "it mostly agrees with itself"
    names = [path.name.rsplit("-", 1)[0] for path in (tmp_path / "out" / "work" / "pool").iterdir()]
    assert sorted(names) == ["1-0-0", "1-0-0.05", "2-0-0"], "the full teacher votes in the masked phase, too"


@pytest.mark.parametrize("responses", ["pool.shard=4", "pool.teacher_responses=0"])
def test_an_image_is_missing(world: World, tmp_path: Path, responses: str) -> None:
    """Skipped and reported up to the limit, an error beyond it; then with a higher limit it goes on."""
    rows = world.rows
    rows[3]["images"], rows[9]["images"] = ["gone.png"], ["gone-too.png"]
    data = {"train": [world.data(f"gaps-{responses[5]}", rows)], "validation": [world.held_out]}
    settings = runs.plan(world, responses, "data.skip_limit=1", data=data)
    with pytest.raises(TrainingError, match=r"2 samples cannot be used.*skip_limit is 1.*gone"):
        run.run(settings, tmp_path / "strict")
    settings = runs.plan(world, responses, "data.skip_limit=2", data=data)
    result = runs.go(settings, tmp_path / "out")
    told = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [one["index"] for one in told] == [3, 9] and "gone.png" in told[0]["why"]
    assert sum(phase["questions"] for phase in result.metrics["phases"]) == 14
    assert result.metrics["skipped"].keys() == {"3", "9"}


def test_a_broken_picture_in_the_validation(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(world.held_out["path"]).read_text().splitlines()]
    rows[1]["images"] = ["gone.png"]
    data = {"train": [world.source("data")], "validation": [world.data("broken", rows)]}
    result = runs.go(runs.plan(world, data=data), tmp_path / "out")
    assert result.metrics["gates"][0]["curve"][0][1] == 1.0, "of those that can be asked"
    with pytest.raises(TrainingError, match="skip_limit is 0"):
        run.run(runs.plan(world, "data.skip_limit=0", data=data), tmp_path / "strict")


def test_a_prompt_that_is_too_long(world: World, tmp_path: Path) -> None:
    rows = world.rows
    rows[0]["messages"][0]["content"][1]["text"] = "yes " * 200
    data = {"train": [world.data("long", rows)], "max_prompt_tokens": 100}
    settings = runs.plan(world, "teachers.0.mask.gate=null", "teachers.0.mask.r_max=0.1", data=data)
    result = runs.go(settings, tmp_path / "out")
    assert list(result.metrics["skipped"]) == ["0"] and "tokens" in result.metrics["skipped"]["0"]


def test_text_alone_and_several_images(world: World, tmp_path: Path) -> None:
    rows = world.rows
    rows[0] = runs.row([{"type": "text", "text": "yes or no?"}], [], "yes")
    rows[5] = runs.row([{"type": "text", "text": "black or blue?"}], [], "blue")
    two = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "is the shape blue?"}]
    rows[8] = runs.row(two, ["0.png", "1.png"], "no")
    rows[9] = runs.row(two, ["1.png", "0.png"], "no")
    data = {"train": [world.data("mixed", rows)], "validation": [world.held_out]}
    result = runs.go(runs.plan(world, data=data), tmp_path / "out")
    assert not result.metrics["skipped"] and len(result.log) == 4


def test_only_text(world: World, tmp_path: Path) -> None:
    rows = [
        runs.row([{"type": "text", "text": f"{word} or no?"}], [], word) for word in runs.QUESTIONS[0].split()
    ]
    data = {"train": [world.data("text", rows)], "validation": [world.held_out]}
    assert runs.go(runs.plan(world, data=data), tmp_path / "out").log


# --- judges -------------------------------------------------------------


@pytest.mark.parametrize("by", ["teacher", "generator"])
def test_a_model_judges(world: World, tmp_path: Path, by: str) -> None:
    """It knows nothing: what counts is that every response has a verdict, kept and audited."""
    settings = runs.plan(world, judge={"kind": "model", "by": by})
    out = tmp_path / "out"
    result = runs.go(settings, out)
    verdicts = [
        line for path in (out / "work" / "verdicts").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    assert verdicts and len({json.loads(line)["key"] for line in verdicts}) == len(verdicts)
    rows = judge_audit.read(out / "judge-audit.jsonl")
    responses = sum(line["distinct_per_question"] * line["questions"] for line in result.metrics["pool"])
    assert 0 < len(rows) <= round(responses) and {row.source for row in rows} == {"teacher", "student"}
    assert judge_audit.audit(rows).rows == len(rows)
    assert {"judge 1", "judge 2"} <= {stage["stage"] for stage in result.metrics["stages"]}


# --- several teachers ---------------------------------------------------


def several(world: World, how: str, *changes: str, **sections: Any) -> Recipe:
    listed = [{"checkpoint": world.teacher(n), "mask": None, "weight": n + 1} for n in range(2)]
    return runs.plan(world, *changes, f"objective.teachers={how}", **{"teachers": listed, **sections})


def test_teachers_that_grow(world: World, tmp_path: Path) -> None:
    listed = [
        {"checkpoint": world.teacher(1), "mask": None, "share": 1},
        {"checkpoint": world.teacher(0), "mask": runs.mask(), "share": 3},
    ]
    result = runs.go(runs.plan(world, teachers=listed), tmp_path / "out")
    told = [(p["teacher"], p["ratio"], p["questions"]) for p in result.metrics["phases"]]
    assert told == [(0, 0.0, 4), (1, 0.05, 6), (1, 0.0, 6)]


@slow
def test_teachers_at_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed weights, weights by accuracy on held-out questions, and random drop differ as they should."""
    from distill.training import parts

    used: list[tuple[float, ...]] = []
    original = parts.PoolPart.__init__

    def spy(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        used.append(tuple(self.weights))

    monkeypatch.setattr(parts.PoolPart, "__init__", spy)
    runs.go(several(world, "fixed"), tmp_path / "fixed")
    assert set(used) == {(1.0, 2.0)}
    used.clear()
    rows = world.rows[:6]
    for row, (answer, _) in list(zip(rows, runs.answers(world, rows, 1), strict=True))[:4]:
        row["messages"][-1] = runs.said(answer)
    data = {"train": [world.source("data")], "validation": [world.data("mixed-labels", rows)]}
    result = runs.go(several(world, "accuracy", data=data), tmp_path / "accuracy")
    right = [gate["curve"][0][1] for gate in result.metrics["gates"]]
    assert right[0] != right[1]
    assert set(used) == {(right[0], 2 * right[1])}
    used.clear()
    first = runs.go(several(world, "drop", "objective.drop=0.5", "train.passes=3"), tmp_path / "drop")
    assert {(3.0, 0.0), (0.0, 3.0)} & set(used) and len(set(used)) > 1
    assert runs.go(several(world, "drop", "objective.drop=0.5", "train.passes=3"), tmp_path / "again").equals(
        first
    )


# --- kept signal ----------------------------------------------------------


@pytest.mark.parametrize(("kind", "near"), [("hidden", 1e-4), ("topk", 0.2)])
def test_kept_signal(
    world: World, whole: tuple[Path, Result], tmp_path: Path, kind: str, near: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No teacher runs in a step; hidden states give what the live teacher gives, top-k nearly, within its
    bound; the second pass reads what the first one did."""
    from distill.training import learner, loop

    stepping: list[bool] = [False]
    one, signal = loop._Run._one, learner.FrozenModel.signal

    def step(self: Any, number: int) -> None:
        stepping[0] = True
        one(self, number)
        stepping[0] = False

    def live(self: Any, *args: Any) -> Any:
        assert not stepping[0] or self.encoder is None, "a teacher runs in a step"
        return signal(self, *args)

    changes = ("train.passes=2",)
    wanted = runs.go(runs.plan(world, *changes), tmp_path / "live")
    monkeypatch.setattr(loop._Run, "_one", step)
    monkeypatch.setattr(learner.FrozenModel, "signal", live)
    with pytest.raises(AssertionError, match="a teacher runs"):
        runs.go(runs.plan(world), tmp_path / "no")
    stepping[0] = False
    result = runs.go(runs.plan(world, *changes, f"signal.kind={kind}", "signal.k=32"), tmp_path / "out")
    for mine, other in zip(result.log, wanted.log, strict=True):
        assert mine["divergence"] == pytest.approx(other["divergence"], rel=near)
    reports = result.metrics["signal"]
    assert {report["ratio"] for report in reports} == {0.05, 0.0}
    for report in reports:
        steps = [e["divergence"] for e in result.log if e["mask_ratio"] == report["ratio"]]
        exact = [e["divergence"] for e in wanted.log[:2] if e["mask_ratio"] == report["ratio"]]
        if kind == "topk" and exact:
            assert abs(steps[0] - exact[0]) <= report["largest_error_nats"]
        assert report["tokens"] > 0 and (report["tail_mass"] > 0) == (kind == "topk")
    assert not (tmp_path / "out" / "work" / "signal").exists()


# --- bf16, in a process of its own: Accelerate keeps one precision a process -----


@slow
def test_bf16(world: World, whole: tuple[Path, Result], tmp_path: Path) -> None:
    """fp32 master weights under bf16 autocast: near the fp32 run, and not it."""
    result = runs.done(runs.plan(world, "train.precision=bf16"), tmp_path / "out")
    assert all(value.dtype == torch.float32 for value in result.weights.values())
    for mine, other in zip(result.log[:1], whole[1].log[:1], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.05)
        assert mine["loss"] != other["loss"]
