"""Whole runs on tiny checkpoints: the data, the recipe, and processes that are killed on the way.

The labels are what the unmasked teacher answers greedily, so that some responses are right and some wrong.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from distill import recipe, run, strict
from distill.answers import judging
from distill.answers.engines import HfEngine
from distill.forward import sharing, tree
from distill.forward.sampling import Sampling
from distill.inputs.data import ImageSource, Sample
from distill.inputs.encoding import Encoder
from distill.recipe import Recipe
from evals import judge, scorers
from runtime import files
from tests.checkpoints import FAMILIES
from tests.distill.worker import DDP

QUESTIONS = ("what color is the shape?", "is there a red circle in the image?")
TOKENS = 4


@dataclass(frozen=True)
class World:
    """Checkpoints and a data set below one directory."""

    root: Path

    @property
    def student(self) -> str:
        return str(self.root / "student")

    def teacher(self, number: int = 0) -> str:
        return str(self.root / f"teacher-{number}")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "data.jsonl").read_text().splitlines()]

    @property
    def held_out(self) -> dict[str, Any]:
        """Questions that the first teacher answers right."""
        return self.source("held-out")

    def source(self, name: str) -> dict[str, Any]:
        path, images = self.root / f"{name}.jsonl", self.root / "images"
        return {"format": "conversations", "path": str(path), "images": str(images)}

    def data(self, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A source of a recipe with these rows."""
        path = self.root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.source(name)


def make(root: Path, family: str = "smolvlm", *, images: int = 8, teachers: int = 1) -> World:
    """A student, teachers and `images` pictures with two questions each."""
    world = World(root)
    FAMILIES[family](root / "student", seed=1)
    for number in range(teachers):
        FAMILIES[family](root / f"teacher-{number}", seed=10 * number)
    (root / "images").mkdir()
    rows = []
    for i in range(images):
        picture = Image.new("RGB", (64, 64), (i * 20, 255 - i * 20, 128))
        ImageDraw.Draw(picture).ellipse((5 + i, 5, 30 + i, 40), fill=(0, i * 20, 90))
        picture.save(root / "images" / f"{i}.png")
        for text in QUESTIONS:
            rows.append(row([{"type": "image"}, {"type": "text", "text": text}], [f"{i}.png"]))
    right = []
    for one, (answer, scored) in zip(rows, answers(world, rows), strict=True):
        one["messages"].append(said(answer))
        right += [one] if scored else []
    world.data("data", rows)
    world.data("held-out", right[:4])
    return world


def row(content: list[dict[str, Any]], images: list[str], answer: str | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages + ([said(answer)] if answer else []), "images": images}


def said(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def answers(world: World, rows: Sequence[Mapping[str, Any]], teacher: int = 0) -> list[tuple[str, float]]:
    """A teacher's greedy answers, and whether its response counts as right where they are the labels (one
    that repeats itself does not)."""
    model = AutoModelForImageTextToText.from_pretrained(world.teacher(teacher)).eval()
    encoder = Encoder.load(world.teacher(teacher))
    samples = [
        Sample(
            str(i),
            tuple(one["messages"][:1]),
            tuple(ImageSource(path=world.root / "images" / name) for name in one["images"]),
        )
        for i, one in enumerate(rows)
    ]
    mode, _ = sharing.choose(model, encoder, [tree.Group(encoder.encode(samples[0]))], gradients=False)
    how = Sampling(max_new_tokens=TOKENS, greedy=True)
    drawn = HfEngine(model, encoder, sharing=mode).draw(samples, 1, how, 0)
    said = [encoder.text(some[0].ids) for some in drawn]
    labels = [scorers.last_word(text) or "none" for text in said]
    scored = [scorers.score("exact", text, label) for text, label in zip(said, labels, strict=True)]
    return list(zip(labels, scored, strict=True))


def plan(world: World, *changes: str, **sections: Any) -> Recipe:
    """The tiny recipe: a gate at r 0 and 0.05, two phases of two steps; `changes` as `--set`, `sections`
    replace whole ones."""
    source = world.source("data")
    raw: dict[str, Any] = {
        "name": "tiny",
        "student": {"checkpoint": world.student},
        "teachers": [{"checkpoint": world.teacher(), "mask": mask()}],
        "data": {"train": [source], "validation": [world.held_out], "together": 2},
        "pool": {
            "teacher_responses": 2,
            "student_responses": 2,
            "shard": 4,
            "sampling": {"max_new_tokens": TOKENS, "temperature": 0.5, "top_k": 4},
        },
        "train": {
            "questions_per_step": 4,
            "precision": "float32",
            "lr": 1.0e-3,
            "validate_every": 2,
            "save_every": 1,
        },
    }
    raw |= sections
    return strict.validate(Recipe, strict.override(raw, list(changes)), "tiny")


def mask(**more: Any) -> dict[str, Any]:
    """A mask of two stages whose gate allows anything: the teachers know nothing."""
    return {"stages": 2, "gate": {"ratios": [0, 0.05], "samples": 4, "most_lost": 0.999}, **more}


@dataclass(frozen=True)
class Result:
    """What a run has left: weights, log, metrics."""

    weights: dict[str, torch.Tensor]
    metrics: dict[str, Any]

    @classmethod
    def of(cls, out: Path) -> Result:
        weights = load_file(out / run.STUDENT / "model.safetensors")
        return cls(weights, files.read_json(out / run.METRICS))

    @property
    def log(self) -> list[dict[str, float]]:
        return self.metrics["log"]

    def equals(self, other: Result) -> bool:
        """Bit for bit: weights and everything that was logged."""
        same = self.weights.keys() == other.weights.keys()
        return same and self.log == other.log and all(
            torch.equal(value, other.weights[name]) for name, value in self.weights.items()
        )  # fmt: skip

    def apart(self, other: Result, start: str) -> float:
        """Norm of the difference of the weights, relative to the way from where both began."""
        begun = load_file(Path(start) / "model.safetensors")
        way = torch.cat([(value - begun[name]).flatten() for name, value in self.weights.items()])
        gap = torch.cat([(value - other.weights[name]).flatten() for name, value in self.weights.items()])
        return float(gap.norm() / way.norm())


def go(settings: Recipe, out: Path, **options: Any) -> Result:
    """A whole run in this process."""
    run.run(settings, out, **options)
    return Result.of(out)


# --- cut ---------------------------------------------------------------


class Cut(Exception):
    """The plug is pulled."""


@contextlib.contextmanager
def cut_at_file(number: int, *, after: bool, act: Callable[[], None]) -> Iterator[list[str]]:
    """`act` before or after file or directory `number` (from 0) takes its name; yields the names so far."""
    original, names = Path.replace, []

    def replace(path: Path, target: Any) -> Path:
        here = len(names) == number
        names.append(Path(target).name)
        if here and not after:
            act()
        found = original(path, target)
        if here and after:
            act()
        return found

    Path.replace = replace  # type: ignore[method-assign]
    try:
        yield names
    finally:
        Path.replace = original  # type: ignore[method-assign]


def pull() -> None:
    raise Cut


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(owner: str, name: str, call: int) -> None:
    """SIGKILL when `owner.name` (a module's class or a module) is called for the time `call` (from 0)."""
    module, _, kind = owner.partition(":")
    import importlib

    place: Any = importlib.import_module(module)
    place = getattr(place, kind) if kind else place
    original, seen = getattr(place, name), []

    def replaced(*args: Any, **options: Any) -> Any:
        seen.append(name)
        if len(seen) > call:
            kill()
        return original(*args, **options)

    setattr(place, name, replaced)


@contextlib.contextmanager
def quick_judges() -> Iterator[None]:
    """The tiny judges know nothing; they shall at least be quick, and find some responses right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(judging.in_process.__kwdefaults__, "max_new_tokens", 4)
        patch.setattr(judge, "parse_score", lambda text: len(text) % 2)
        yield


# --- processes ----------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")  # a fresh process that has imported everything already
FORKS.set_forkserver_preload(["tests.distill.runs"])


def _process(environment: Mapping[str, str], settings: str, out: Path, arguments: Mapping[str, Any]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank = environment.get("RANK", "0")
    stream = out.with_name(f"{out.name}.{rank}.log").open("a")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    read = recipe.Recipe.model_validate_json(settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quick_judges())
        if "kill_in" in arguments and rank == str(arguments.get("rank", 0)):
            kill_in(*arguments["kill_in"])
        if "kill_file" in arguments and rank == str(arguments.get("rank", 0)):
            number, after = arguments["kill_file"]
            stack.enter_context(cut_at_file(number, after=after, act=kill))
        run.run(read, out, **arguments.get("options", {}))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(
    settings: Recipe,
    out: Path,
    *,
    world: int = 1,
    way: Mapping[str, str] = DDP,
    seconds: float = 300,
    **more: Any,
) -> list[int | None]:
    """A run in processes of its own, as `accelerate launch --cpu` starts them; their exit codes. When one of
    them is killed the launcher kills the others."""
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if world > 1:
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), **way}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        arguments = ({**environment, **own}, settings.model_dump_json(), out, more)
        running.append(FORKS.Process(target=_process, args=arguments))
        running[-1].start()
    first = multiprocessing.connection.wait([each.sentinel for each in running], seconds)
    if any(each.exitcode for each in running):
        for each in running:
            each.kill()
    for each in running:
        each.join(seconds if first else 0)
        each.kill()
    return [each.exitcode for each in running]


def done(settings: Recipe, out: Path, **options: Any) -> Result:
    """A run in processes of its own that comes to its end."""
    codes = launch(settings, out, **options)
    said = "\n".join(path.read_text()[-3000:] for path in sorted(out.parent.glob(f"{out.name}.*.log")))
    assert codes == [0] * len(codes), f"{codes}\n{said}"
    return Result.of(out)


def files_below(out: Path) -> dict[str, bytes]:
    """Sealed shards below a directory, by their path."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("0*.jsonl"))}
