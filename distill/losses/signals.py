"""The teacher signal of a run's phases on disk: which stores, filled when a phase begins (METHOD 5).

In: a recipe, models, a phase's questions. Out: `KeptTeachers` for the phase; a report with error bounds.
Not here: what is stored (`losses/signal_store.py`), how it is computed (`losses/kept_signal.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distill import checks
from distill.account import Account, size
from distill.losses import kept_signal
from distill.losses.kept_signal import KeptTeachers
from distill.losses.signal_store import Key, SignalStore
from distill.models import Models
from distill.recipe import Recipe
from distill.training.batches import Question
from distill.training.learner import FrozenModel


class Signals:
    """Stores below `directory`, one a teacher and ratio: phases that share both share the store."""

    def __init__(
        self,
        plan: Recipe,
        models: Models,
        accelerator: Accelerator,
        account: Account,
        directory: Path,
        bar: Callable[[str], Callable[[int, int], None]],
    ) -> None:
        self.plan, self.models, self.accelerator = plan, models, accelerator
        self.account, self.directory, self.bar = account, directory, bar

    def of(
        self, phase: int, taught: Sequence[tuple[int, float]], questions: Sequence[Question]
    ) -> KeptTeachers:
        """The signal of a phase's teachers (number, ratio) on its questions. What is not there is computed,
        then the teacher is let go. Every process calls this."""
        stores = []
        for teacher, ratio in taught:
            store = self._store(teacher, ratio)
            title = f"signal of teacher {teacher} at r {ratio:g}"
            with self.account.stage(f"signal {phase + 1}", lambda store=store: self._made(store)):  # type: ignore[misc]
                kept_signal.complete(
                    store,
                    questions,
                    lambda teacher=teacher, ratio=ratio: self._model(teacher, ratio),  # type: ignore[misc]
                    self.models.encoder,
                    tokens=self.plan.train.tokens_per_device,
                    accelerator=self.accelerator,
                    progress=self.bar(title),
                )
            self.models.release()
            stores.append(store)
        weights = tuple(self.plan.teachers[teacher].weight for teacher, _ in taught)
        return KeptTeachers(tuple(stores), weights)

    def _model(self, teacher: int, ratio: float) -> FrozenModel:
        return self.models.frozen(teacher, ratio)

    def _store(self, teacher: int, ratio: float) -> SignalStore:
        settings, mask = self.plan.signal, self.plan.teachers[teacher].mask
        assert settings.kind != "live"
        key = Key(
            self.models.identity(teacher),
            ratio,
            settings.kind,
            self._vocabulary(teacher),
            settings.k if settings.kind == "topk" else 0,
            facts={
                "tensors": mask.touches if ratio and mask else [],
                "limits": [self.plan.data.max_pixels, self.plan.data.max_prompt_tokens],
            },
        )
        return SignalStore(self.directory, key, rank=self.accelerator.process_index)

    def _vocabulary(self, teacher: int) -> int:
        """Width of the part of the heads that both models have."""
        found = (checks.inspect(model) for model in (self.plan.student, self.plan.teachers[teacher]))
        return min(each.vocabulary for each in found)

    @staticmethod
    def _made(store: SignalStore) -> dict[str, float]:
        return {"tokens": store.report()["tokens"], "bytes": size(store.directory)}

    def report(self, log: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
        """A line a store: tokens, MiB, and how far the kept signal is from the teacher's. `error_nats` bounds
        the error of the mean divergence (JSD) that training has measured."""
        if self.plan.signal.kind == "live":
            return []
        found = []
        for key in sorted(self.directory.glob("*/key.json")):
            store = _opened(key)
            steps = [e["divergence"] for e in log if e["mask_ratio"] == store.key.ratio and "divergence" in e]
            measured = sum(steps) / len(steps) if steps else 0.0
            found.append({"store": key.parent.name, "ratio": store.key.ratio, **store.report(measured)})
        return found


def _opened(path: Path) -> SignalStore:
    from runtime import files

    return SignalStore(path.parent.parent, Key(**files.read_json(path)))
