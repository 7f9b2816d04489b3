"""The verbs `distill`, `plan` and `ablate`.

In: arguments. Out: a checkpoint, a plan, a report. Not here: any work: a verb imports its modules when
it runs, so that `--help` is instant and a missing extra is named only by who needs it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evals.command import Progress, is_main, require
from runtime.errors import InputError, PocketError

if TYPE_CHECKING:
    from distill.recipe import Recipe

app = typer.Typer()


DISTILL_NEEDS = ("torch", "torchvision", "transformers", "accelerate", "psutil", "yaml")
RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a recipe that ships.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key: train.lr=1e-6; may be repeated."),
]


@app.command(
    epilog="""Examples:

    pocketvlm distill easy-vqa --limit 200

    pocketvlm distill recipe.yaml --set train.lr=2e-6 --set teachers.0.mask.r_max=0.4 --out runs/a

    accelerate launch --num_processes 8 -m pocketvlm distill recipe.yaml
"""
)
def distill(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="Where everything goes; the same directory resumes. Default: the recipe's name."),
    ] = None,
    settings: SetOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions: a dry run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Distil teachers into a student by a recipe; the checkpoint's path goes to stdout. Resumes."""
    require("distill", DISTILL_NEEDS)
    plan = _recipe(recipe, settings)
    from rich.console import Console

    from distill import run

    target = out or Path("runs") / (plan.name if limit is None else f"{plan.name}-{limit}")
    found = run.run(plan, target, console=Console(stderr=True, quiet=not is_main()), limit=limit)
    if is_main():
        typer.echo(json.dumps({"checkpoint": str(found), "out": str(target)}) if as_json else found)


@app.command(
    epilog="""Examples:

    pocketvlm plan qwen3-vl

    pocketvlm plan recipe.yaml --processes 8 --strategy fsdp --set train.gradient_checkpointing=true --json
"""
)
def plan(
    recipe: RecipeArgument,
    settings: SetOption = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes, one a device; default: throughput.devices.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="ddp: whole models; fsdp: FSDP2 shards.")] = "ddp",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what a recipe will take, before anything runs: parameters, memory, disk, tokens, time."""
    if strategy not in ("ddp", "fsdp"):
        raise InputError(f"--strategy: got {strategy}, expected ddp or fsdp")
    require("distill", DISTILL_NEEDS)
    found = _recipe(recipe, settings)
    from distill.planning import plan_tables
    from distill.planning.plan import plan as reckon

    with Progress("plan") as progress:
        result = reckon(found, processes=processes, strategy=strategy, progress=progress)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for table in plan_tables.tables(result):
        console.print(table)
    for note in result.notes:
        console.print(f"- {note}", soft_wrap=True)


@app.command(
    epilog="""Examples:

    pocketvlm ablate digits --out runs/ablation

    pocketvlm ablate digits --experiment masking --experiment rewards --seeds 3 --json
"""
)
def ablate(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option(help="Where runs and report go; the same directory resumes.")
    ] = None,
    settings: SetOption = None,
    experiment: Annotated[
        list[str] | None, typer.Option(help="Only this experiment; may be repeated. Default: all.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Of the main comparisons; default: the recipe's (8).")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs side by side; default: cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Run the method's first experiments from one recipe, over seeds; the report's path goes to stdout."""
    require("distill", DISTILL_NEEDS)
    plan = _recipe(recipe, settings)
    from rich.console import Console

    from distill.ablation import ablate as experiments

    wanted = tuple(experiment or experiments.EXPERIMENTS)
    for name in wanted:
        if name not in experiments.EXPERIMENTS:
            raise InputError(f"--experiment {name}: expected {', '.join(experiments.EXPERIMENTS)}")
    target = out or Path("runs") / f"{plan.name}-ablation"
    console = Console(stderr=True)
    found = experiments.run(plan, target, console=console, experiments=wanted, seeds=seeds, workers=workers)
    typer.echo(json.dumps({"report": str(found), "out": str(target)}) if as_json else found)


def _recipe(path: Path, settings: Sequence[str] | None) -> Recipe:
    """The recipe with its overrides. Under a launcher every process reads it, and one of them complains."""
    from distill.recipe import read

    try:
        return read(path, settings or ())
    except PocketError:
        if is_main():
            raise
        raise typer.Exit(2) from None
