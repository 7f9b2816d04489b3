"""The method's first experiments (METHOD 8) from one recipe, over seeds: which part of it earns its place.

In: a recipe, settings (what to vary, how many seeds, the test questions). Out, below one directory:

    models/            models made here, where the settings make any (`distill/ablation/made.py`)
    seed-N/ARM/        each arm's run (`distill/run.py`) and `result.json`: its accuracy on the test questions
    rates/             the learning rates that were tried, on a seed of their own
    report/            index.html, results.json, ablation.md

An arm is a list of overrides of the recipe (`ablation/ablate_arms.py`); arms of one seed share models, data
order and teachers' pools. Everything resumes: a job whose result is there is not run again, a run goes on
where it was. Not here: one run, the statistics (`evals/paired.py`), the report (`ablation/ablate_report.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distill import strict
from distill.ablation.ablate_arms import (
    CONTROL,
    EXPERIMENTS,
    LABELS,
    MASTERS,
    Family,
    Needed,
    Settings,
    arms,
    needed,
    settings_for,
)
from distill.ablation.ablate_jobs import (
    DRAWN,
    RESULT,
    Place,
    draw_pools,
    make_model,
    measure,
    run_arm,
    write_processor,
)
from distill.jobs import Job, Tick, Workers
from distill.recipe import Recipe
from runtime import files


def run(
    plan: Recipe,
    out: Path,
    *,
    console: Console,
    settings: Settings | None = None,
    experiments: Sequence[str] = tuple(EXPERIMENTS),
    seeds: int | None = None,
    workers: int | None = None,
) -> Path:
    """Run every arm that has no result yet; the report's path. Resumes after any interruption.

    `seeds` overrides the settings' number for the main comparisons. More seeds or experiments may be asked
    for later in the same directory: what was run stays.
    """
    from distill.ablation import ablate_report

    settings = settings or settings_for(plan)
    place = Place(out, plan, settings)
    wanted = needed(plan, settings, experiments, seeds or settings.seeds)
    with files.lock(out):
        settled = {"recipe": plan.model_dump(mode="json"), "settings": settings.model_dump(mode="json")}
        strict.claim(out, settled, ("settings.seeds", "settings.exploratory_seeds"))
        _remove_stale(out)
        pool = Workers(workers)
        try:
            rates = _Batch(place, wanted, pool, console).all()
        except BaseException:
            pool.close(kill=True)
            raise
        pool.close()
        return ablate_report.write(place, wanted, rates)


def _remove_stale(out: Path) -> None:
    """What a killed writer left; a run's own directory it clears itself."""
    for directory in (out, out / "models", out / "rates", out / "baselines"):
        for stale in directory.glob(f"{files.TEMP_PREFIX}*") if directory.exists() else ():
            files.remove_stale(stale) if stale.is_dir() else stale.unlink(missing_ok=True)


class _Batch:
    """The jobs of an ablation in their order: models, learning rates, pools, arms."""

    def __init__(self, place: Place, wanted: Needed, pool: Workers, console: Console) -> None:
        self.place, self.wanted, self.pool, self.console = place, wanted, pool, console

    def all(self) -> dict[str, float]:
        """Run what is missing; the learning rate of every family."""
        settings, plan = self.place.settings, self.place.plan
        every = settings.numbers(max(self.wanted.seeds.values()))
        tried = {family: rates for family, rates in settings.rates.items() if len(rates) > 1}
        self.models([*([settings.rate_seed] if tried else []), *every])
        rates: dict[str, float] = dict.fromkeys((MASTERS, CONTROL, LABELS), plan.train.lr)
        if settings.labels_only is not None:
            rates[LABELS] = settings.labels_only.lr
        rates.update({family: found[0] for family, found in settings.rates.items()})
        rates.update(self.rates(tried))
        known = arms(plan, settings)
        family = {name: arm.family for name, arm in known.items()} | {LABELS: LABELS}
        asked = [
            (seed, name)
            for seed in every
            for name, n in self.wanted.seeds.items()
            if seed in settings.numbers(n)
        ]
        self.pools([(seed, [n for s, n in asked if s == seed and n != LABELS]) for seed in every])
        self.run(
            "arms",
            [
                self.arm(name, seed, rates[family[name]], self.place.out / f"seed-{seed}" / name)
                for seed, name in asked
            ],
        )
        return rates

    def models(self, seeds: Sequence[int]) -> None:
        """Made models of these seeds, and what they and the recipe's own checkpoints reach on the test."""
        place, made = self.place, self.place.settings.made
        if made is None:
            own = {"student": place.plan.student.checkpoint}
            own |= {f"teacher-{i + 1}": t.checkpoint for i, t in enumerate(place.plan.teachers)}
            self.run(
                "baselines",
                [
                    Job(name, measure, {"place": place, "checkpoint": at, "target": target})
                    for name, at in own.items()
                    if not (target := place.out / "baselines" / f"{name}.json").exists()
                ],
            )
            return
        self.run("processor", [Job("processor", write_processor, {"place": place})])
        wanted = {place.models(seed)[name]: (name, seed) for seed in seeds for name in made.models}
        self.run(
            "models",
            [
                Job(path.name, make_model, {"place": place, "name": name, "seed": seed})
                for path, (name, seed) in wanted.items()
                if not (path.parent / f"{path.name}.json").exists()
            ],
        )

    def rates(self, tried: dict[Family, tuple[float, ...]]) -> dict[str, float]:
        """The best of each family on validation; of equals the smaller one."""
        place, seed = self.place, self.place.settings.rate_seed
        families = [f for f in tried if f in self.wanted.seeds]
        if any(f != LABELS for f in families):
            self.pools([(seed, [f for f in families if f != LABELS])])
        where = {(f, rate): place.out / "rates" / f"{f}-{rate:g}" for f in families for rate in tried[f]}
        self.run("rates", [self.arm(f, seed, rate, path) for (f, rate), path in where.items()])
        score = {key: files.read_json(path / RESULT)["validation"] for key, path in where.items()}
        return {f: max(sorted(tried[f]), key=lambda rate: score[f, rate]) for f in families}

    def pools(self, asked: Sequence[tuple[int, Sequence[str]]]) -> None:
        """Teachers' pools, seed by seed, for arms that are not finished."""
        self.run(
            "pools",
            [
                Job(
                    f"pools of seed {seed}", draw_pools, {"place": self.place, "names": missing, "seed": seed}
                )
                for seed, names in asked
                if (missing := [n for n in names if not self._has_pool(seed, n)])
            ],
        )

    def _has_pool(self, seed: int, name: str) -> bool:
        directory = self.place.out / f"seed-{seed}"
        return (directory / name / RESULT).exists() or (directory / "pools" / name / DRAWN).exists()

    def arm(self, name: str, seed: int, rate: float, directory: Path) -> Job | None:
        if (directory / RESULT).exists():
            return None
        arguments = {"name": name, "seed": seed, "rate": rate, "directory": directory}
        return Job(f"{name}, seed {seed}, lr {rate:g}", run_arm, {"place": self.place, **arguments})

    def run(self, title: str, found: Sequence[Job | None]) -> None:
        """Run jobs side by side, a line for each when it ends."""
        todo = [job for job in found if job is not None]
        if not todo:
            return
        started, ended = time.monotonic(), 0

        def on_tick(tick: Tick) -> None:
            nonlocal ended
            if tick.done < tick.total:
                return
            ended += 1
            value = f"  {100 * tick.figures['accuracy']:.1f} %" if "accuracy" in tick.figures else ""
            minutes = (time.monotonic() - started) / 60
            line = f"{title:9} {ended}/{len(todo)}  {tick.job}{value}  [{minutes:.1f} min]"
            self.console.print(line, highlight=False, markup=False)

        self.pool.run(todo, on_tick, lambda mib: None)
