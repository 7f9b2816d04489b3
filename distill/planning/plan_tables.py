"""A plan as tables for people.

In: a `Plan`. Out: rich tables. Not here: any reckoning (`distill/planning/plan.py`).
"""

from __future__ import annotations

from rich.table import Table

from distill.planning.plan import Amount, Plan


def tables(plan: Plan) -> list[Table]:
    """Models, memory of each phase, disk, tokens and time."""
    return [_models(plan), *_memory(plan), _disk(plan), _work(plan)]


def size(count: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _models(plan: Plan) -> Table:
    shown = Table("model", "checkpoint", title=f"{plan.recipe}: models", title_justify="left")
    for name in ("parameters", "trained"):
        shown.add_column(name, justify="right")
    shown.add_column("type")
    for each in plan.models:
        shown.add_row(each.role, each.name, f"{each.parameters:,}", f"{each.trainable:,}", each.dtype)
    return shown


def _memory(plan: Plan) -> list[Table]:
    one = "one process" if plan.processes == 1 else f"each of {plan.processes} processes, {plan.strategy}"
    found = []
    for phase in plan.memory:
        shown = _amounts(f"memory, {phase.phase}, {one}", phase.parts)
        shown.add_section()
        shown.add_row("total", size(phase.total))
        found.append(shown)
    return found


def _amounts(title: str, parts: tuple[Amount, ...]) -> Table:
    shown = Table("what", title=title, title_justify="left")
    shown.add_column("size", justify="right")
    for part in parts:
        shown.add_row(part.what, size(part.bytes))
    return shown


def _disk(plan: Plan) -> Table:
    shown = _amounts("disk", plan.disk)
    shown.add_section()
    shown.add_row("total", size(sum(part.bytes for part in plan.disk)))
    return shown


def _work(plan: Plan) -> Table:
    known = "" if plan.questions_known else " (stated)"
    title = (
        f"tokens and time: {plan.questions:,} questions{known}, prompts of up to {plan.prompt_tokens}, "
        f"responses of {plan.response_tokens} tokens"
    )
    shown = Table("stage", title=title, title_justify="left")
    shown.add_column("tokens", justify="right")
    shown.add_column("time at the stated rates", justify="right")
    for row in plan.work:
        shown.add_row(row.what, f"{row.tokens:,}", duration(row.seconds))
    shown.add_section()
    total = sum(row.tokens for row in plan.work)
    shown.add_row("total", f"{total:,}", duration(sum(row.seconds for row in plan.work)))
    return shown
