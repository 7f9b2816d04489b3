"""The training loop: steps that can be cut anywhere and continue to the same weights.

In: a model, steps that give the micro-batches of step i, a directory. Out: trained weights, a log of every
step, and states from which an interrupted run continues: bit for bit on a CPU with as many processes.
Not here: what the loss is (`distill/training/learner.py`), what a step learns (`distill/training/steps.py`).
All randomness of a step comes from (seed, step, process), so nothing random is carried between steps.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from distill.training import checkpoints, optim, processes, warnings
from distill.training.bar import Bar
from distill.training.learner import Learner
from distill.training.optim import Optimizing
from distill.training.throughput import Meter, peak_flops
from runtime.errors import TrainingError

BEST = "best"
WATCH_EVERY = 20
"""Steps between two looks at the log for signs of failure (METHOD 8)."""
Log = list[dict[str, float]]
Figures = dict[str, Any]
Progress = Callable[[int, int, dict[str, float]], None]
Validate = Callable[[PreTrainedModel, int], float]


class Part(Protocol):
    """A micro-batch: its share of the step's loss, so that the parts of all processes add up."""

    terms: tuple[str, ...]

    def __call__(self, student: PreTrainedModel, only: str | None = None) -> tuple[torch.Tensor, Figures]:
        """Loss (nats) and figures that add up over parts; with `only`, that term of the loss alone."""
        ...


class Steps(Protocol):
    """What to learn: step i has the same parts for the same weights, whenever it is run."""

    steps: int

    def is_boundary(self, step: int) -> bool:
        """Whether `prepare` draws from the weights here: the state is saved first."""
        ...

    def prepare(self, student: PreTrainedModel, step: int) -> None:
        """Called where a run starts or goes on, and at boundaries, with whole weights, in every process.
        What it makes is kept on disk, or is the same when made again."""
        ...

    def parts(self, step: int) -> Sequence[Part]:
        """This process's micro-batches of a step, as many in every process."""
        ...

    def figures(self, step: int) -> dict[str, float]:
        """What to log beside the parts' own figures, equal in every process."""
        ...


class Plan(Protocol):
    """Steps of one part each, in one process: the demo's."""

    steps: int

    def is_boundary(self, step: int) -> bool: ...

    def prepare(self, model: PreTrainedModel, step: int) -> None: ...

    def loss(self, model: PreTrainedModel, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss (nats) of one step, and figures to log. `tokens` counts predicted response tokens."""
        ...


class _Whole:
    """A plan as steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.steps = plan, plan.steps
        self.is_boundary, self.prepare = plan.is_boundary, plan.prepare

    def parts(self, step: int) -> Sequence[Part]:
        def part(student: PreTrainedModel, only: str | None = None) -> tuple[torch.Tensor, Figures]:
            return self.plan.loss(student, step)

        cast(Any, part).terms = ()
        return [cast(Part, part)]

    def figures(self, step: int) -> dict[str, float]:
        return {}


def fit(
    model: PreTrainedModel,
    steps: Steps | Plan,
    settings: Optimizing,
    directory: Path,
    *,
    accelerator: Accelerator | None = None,
    save_every: int = 200,
    validate: Validate | None = None,
    validate_every: int = 200,
    patience: int | None = None,
    out: Path | None = None,
    processor: ProcessorMixin | None = None,
    norms_every: int = 0,
    seed: int = 0,
    console: Console | None = None,
    progress: Progress | None = None,
    warn: Callable[[warnings.Sign], None] | None = None,
) -> Log:
    """Train in place and return the log, one entry a step. Continues from `directory` if cut there before.

    Every process of an Accelerate launch calls this alike. After it, `model` is trained in place: whole, or
    this process's shards of it under FSDP2. `out`: where the final model goes as a Hugging Face checkpoint,
    with the `processor` (or call `checkpoints.write_model(out, accelerator, model, processor)`).

    `validate(student, step)` is called by every process after each `validate_every` steps and at the end,
    with whole weights; it returns the same value everywhere, higher is better. The best student so far is
    kept as a checkpoint in `directory/best`. After `patience` validations without a better one training
    ends. Every `norms_every` steps the log holds each term's share of the sum of the terms' gradient norms
    on the first micro-batches (0: never; not under DeepSpeed, which keeps its gradients to itself).
    With a `console` the main process shows a bar, rates and warnings there. `progress` and the
    accelerator's trackers also get tokens/s per device and MFU, which no log holds: a
    log is the same whenever a run is repeated. `warn` gets signs of failure; without it and a console they
    are Python warnings.

    Raises TrainingError when the loss is no longer finite, or when memory does not suffice.
    """
    run = _Run(model, steps, settings, directory, accelerator or processes.accelerator(), seed)
    run.norms_every, run.processor, run.patience = norms_every, processor, patience
    if validate is not None:
        run.validate, run.validate_every = validate, validate_every
    run.progress, run.warn = progress, warn or warnings.emit
    with contextlib.ExitStack() as stack:
        if console is not None and run.accelerator.is_main_process:
            bar = stack.enter_context(Bar(console))
            run.warn = warn or bar.warn
            run.progress = bar.progress if progress is None else _both(bar.progress, progress)
        log = run.train(save_every)
    if out is not None:
        checkpoints.write_model(out, run.accelerator, run.learner, processor)
    return log


def _both(first: Progress, second: Progress) -> Progress:
    def progress(done: int, total: int, figures: dict[str, float]) -> None:
        first(done, total, figures)
        second(done, total, figures)

    return progress


class _Run:
    """What one call of `fit` holds."""

    norms_every = 0
    validate_every = 0
    patience: int | None = None
    validate: Validate | None = None
    processor: ProcessorMixin | None = None
    progress: Progress | None = None
    warn: Callable[[warnings.Sign], None]

    def __init__(
        self,
        model: PreTrainedModel,
        steps: Steps | Plan,
        settings: Optimizing,
        directory: Path,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.steps: Steps = cast(Steps, steps) if hasattr(steps, "parts") else _Whole(steps)
        self.settings, self.directory, self.accelerator, self.seed = settings, directory, accelerator, seed
        self.model = model
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.deepspeed:  # it clips by itself
            accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = settings.clip
        self.learner: nn.Module
        self.learner, self.optimizer = accelerator.prepare(Learner(model), optim.build(model, settings))
        self.meter = Meter(
            accelerator.num_processes, peak_flops(accelerator.device, accelerator.mixed_precision)
        )
        self.log: Log = []
        self.watch = warnings.Watch()

    def train(self, save_every: int) -> Log:
        start, self.log = checkpoints.restore(self.directory, self.accelerator, self.learner, self.optimizer)
        saved = start
        self.learner.train()
        for step in range(start, self.steps.steps):
            if self._is_over():
                break
            boundary = self.steps.is_boundary(step)
            if step > start and (step % save_every == 0 or boundary):
                self._save(step)
                saved = step
            if step == start or boundary:
                self._prepare(step)
            self._one(step)
        if self.log and len(self.log) != saved:
            self._save(len(self.log))
        self.learner.eval()
        self.accelerator.wait_for_everyone()
        return self.log

    def _save(self, step: int) -> None:
        checkpoints.save(self.directory, self.accelerator, self.learner, self.optimizer, step, self.log)

    def _prepare(self, step: int) -> None:
        self.learner.eval()
        processes.whole(self.accelerator, self.learner, lambda student: self.steps.prepare(student, step))
        self.accelerator.wait_for_everyone()
        self.learner.train()

    def _one(self, step: int) -> None:
        started = time.monotonic()
        seeded = np.random.SeedSequence([self.seed, 7, step, self.accelerator.process_index])
        torch.manual_seed(int(seeded.generate_state(1)[0]))
        optim.scale(self.optimizer, optim.rate(step, self.steps.steps, self.settings))
        with _explained(step):
            parts = self.steps.parts(step)
            shares = self._shares(parts[0]) if self.norms_every and step % self.norms_every == 0 else {}
            figures = self._backward(parts)
        if not math.isfinite(figures["loss"]):
            raise TrainingError(
                f"{self.directory}: loss is {figures['loss']} at step {step}; lower the learning rate"
            )
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        operations = figures.pop("flops", 0.0)
        entry = {"step": step, "loss": figures.pop("loss"), "grad_norm": norm, **figures, **shares}
        self.log.append({**entry, **self.steps.figures(step)})
        tokens = figures.get("input_tokens", figures.get("tokens", 0.0))
        self.meter.add(tokens, operations, time.monotonic() - started)
        self._after(step)

    def _backward(self, parts: Sequence[Part]) -> dict[str, float]:
        """Add up gradients of all parts of all processes; sum of their figures."""
        total: dict[str, float] = {}
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with self._sync(last):
                loss, figures = self.learner(part)
                self._accumulate(loss, last)
            for name, value in {"loss": loss.detach(), **figures}.items():
                total[name] = total.get(name, 0.0) + float(value)
        return processes.sums(self.accelerator, total)

    def _accumulate(self, loss: torch.Tensor, last: bool) -> None:
        """Backward of a part. DDP, FSDP2 and DeepSpeed average over processes; our parts are to add up."""
        if self.deepspeed:
            self.accelerator.gradient_state._set_sync_gradients(last)
        count = self.accelerator.num_processes
        self.accelerator.backward(loss * count if count > 1 else loss)

    @contextlib.contextmanager
    def _sync(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged once a step, in the last backward pass."""
        if last or self.deepspeed:
            yield
            return
        with self.accelerator.no_sync(self.learner):
            yield

    def _clip(self) -> float:
        """Clip and return the norm of the step's gradient before it."""
        limit = self.settings.clip or math.inf
        norm: Any = self.accelerator.clip_grad_norm_(self.learner.parameters(), limit)
        if norm is None:
            return math.nan
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _shares(self, part: Part) -> dict[str, float]:
        """Each term's share of the sum of the terms' gradient norms, on the processes' first parts together:
        a backward pass a term, exchanged as any other, then thrown away."""
        norms = {}
        for term in () if self.deepspeed else part.terms:
            loss, _ = self.learner(lambda student, term=term: part(student, only=term))
            norms[term] = 0.0
            if loss.requires_grad:
                self._accumulate(loss, last=True)
                gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
                norm: Any = torch.nn.utils.get_total_norm(gradients)
                norms[term] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
                self.optimizer.zero_grad()
        total = sum(norms.values()) or 1.0
        return {f"grad_share_{term}": norm / total for term, norm in norms.items()}

    def _after(self, step: int) -> None:
        """Validation, trackers, progress, warnings."""
        done, total = step + 1, self.steps.steps
        if self.validate is not None and (done % self.validate_every == 0 or done == total):
            self._validate(step)
        entry = self.log[-1]
        shown = {**entry, **self.meter.figures()}
        self.accelerator.log({name: value for name, value in shown.items() if name != "step"}, step=step)
        if self.accelerator.is_main_process:
            if done % WATCH_EVERY == 0 or done == total:
                for sign in self.watch.new(self.log):
                    self.warn(sign)
            if self.progress is not None:
                self.progress(done, total, shown)

    def _validate(self, step: int) -> None:
        before = [value for _, value in checkpoints.validations(self.log)]
        self.learner.eval()
        check = self.validate
        assert check is not None
        value = processes.whole(self.accelerator, self.learner, lambda student: check(student, step))
        self.learner.train()
        if not before or value > max(before):
            checkpoints.write_model(self.directory / BEST, self.accelerator, self.learner, self.processor)
        self.log[-1]["validation"] = float(value)

    def _is_over(self) -> bool:
        """Whether the last `patience` validations brought nothing better."""
        values = [value for _, value in checkpoints.validations(self.log)]
        if self.patience is None or len(values) <= self.patience:
            return False
        return max(values[-self.patience :]) <= max(values[: -self.patience])


@contextlib.contextmanager
def _explained(step: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"step {step}: out of memory ({str(error).splitlines()[0]}); lower `train.tokens_per_device` or "
            "`train.chunk_tokens`, set `train.gradient_checkpointing`, or launch with FSDP2; then run again: "
            "it continues from the last state"
        ) from error
