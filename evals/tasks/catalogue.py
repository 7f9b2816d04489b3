"""Which questions a name or a file means, and by whose rules they are asked and scored.

In: `easy-vqa`, `digits`, or a file (.tsv, .jsonl, .json, .parquet, a saved data set). Out: a `Task`.
Not here: what a record says (`formats.py`), the rules (`scoring.py`), the wordings (`prompts.py`).

A file's kind is told by its name (`MMBench_DEV_EN.tsv`, `mmmu_val.parquet`), or given with `kind`. Nothing is
downloaded: VLMEvalKit's TSVs and lmms-eval's data sets are files that the user has.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evals.tasks import builtin, formats, scoring
from evals.tasks.question import Task
from evals.tasks.readers import Tsv, open_store
from runtime.errors import InputError


@dataclass(frozen=True)
class Kind:
    """How questions of a data set are asked and scored. `words`: a file is of this kind when its name holds
    one of them, case ignored."""

    name: str
    words: tuple[str, ...]
    scorer: str
    prompt: str
    max_new_tokens: int = 16
    circular: bool = False


VLMEVALKIT = (
    Kind("MMBench", ("mmbench", "ccbench", "mmcr"), "vlmevalkit.mcq", "vlmevalkit.mcq", circular=True),
    Kind("BLINK_circular", ("circular",), "vlmevalkit.mcq", "vlmevalkit.mcq", circular=True),
    Kind("MathVista", ("mathvista",), "vlmevalkit.mathvista", "raw", 512),
    Kind("MMMU", ("mmmu",), "vlmevalkit.mcq", "vlmevalkit.mcq", 128),
    Kind("AI2D", ("ai2d",), "vlmevalkit.mcq", "vlmevalkit.mcq"),
    Kind("MMStar", ("mmstar",), "vlmevalkit.mcq", "vlmevalkit.mcq"),
    Kind("BLINK", ("blink",), "vlmevalkit.mcq", "vlmevalkit.mcq"),
    Kind("SEEDBench", ("seedbench", "seed_bench"), "vlmevalkit.mcq", "vlmevalkit.mcq"),
    Kind("RealWorldQA", ("realworldqa",), "vlmevalkit.mcq", "vlmevalkit.mcq"),
    Kind("TextVQA", ("textvqa",), "vlmevalkit.vqa_score", "vlmevalkit.vqa"),
    Kind("ChartQA", ("chartqa",), "vlmevalkit.relaxed", "vlmevalkit.vqa"),
    Kind("OCRVQA", ("ocrvqa", "gqa"), "vlmevalkit.accuracy", "vlmevalkit.vqa"),
    Kind("DocVQA", ("docvqa", "infovqa"), "vlmevalkit.anls", "vlmevalkit.vqa", 32),
    Kind("MCQ", (), "vlmevalkit.mcq", "vlmevalkit.mcq"),
    Kind("VQA", (), "vlmevalkit.vqa_match", "vlmevalkit.vqa"),
)
"""VLMEvalKit's TSVs, first match first; the last two are for other names, with options and without."""

LMMS = (
    Kind("mmbench", ("mmbench",), "lmms.mmbench", "lmms.mmbench", 64, circular=True),
    Kind("mathvista", ("mathvista",), "lmms.mathvista", "lmms.mathvista", 64),
    Kind("mmmu", ("mmmu",), "lmms.mmmu", "lmms.mmmu", 128),
    Kind("ai2d", ("ai2d",), "lmms.ai2d", "lmms.ai2d"),
    Kind("mmstar", ("mmstar",), "lmms.mmstar", "lmms.mmstar"),
    Kind("blink", ("blink",), "lmms.blink", "lmms.blink", 64),
    Kind("seedbench", ("seedbench", "seed-bench", "seed_bench"), "lmms.seedbench", "lmms.seedbench"),
    Kind("realworldqa", ("realworldqa",), "lmms.realworldqa", "lmms.realworldqa"),
    Kind("chartqa", ("chartqa",), "lmms.chartqa", "lmms.chartqa"),
    Kind("docvqa", ("docvqa", "infovqa", "infographicvqa"), "lmms.anls", "lmms.phrase", 32),
    Kind("textvqa", ("textvqa",), "lmms.textvqa", "lmms.textvqa"),
    Kind("vqav2", ("vqav2",), "lmms.vqav2", "lmms.phrase"),
    Kind("options", (), "choice", "options"),
    Kind("plain", (), "exact", "raw", 32),
)
"""Documents of lmms-eval's data sets; the last two are our own rules, with options and without."""


def open_task(
    name: str,
    *,
    split: str | None = None,
    kind: str | None = None,
    limit: int | None = None,
    scorer: str | None = None,
    max_new_tokens: int | None = None,
    images: Path | None = None,
) -> Task:
    """The questions of a built-in task or a file, at most `limit` units of them.

    `split`: of a built-in task (default test), a saved data set, or a TSV's column of that name. `scorer` is
    any name of `evals.tasks.scoring.RULES`, or `judge`. `images`: where a file's relative paths begin
    (default: beside it). Raises InputError naming the file and the row, MissingExtra.
    """
    if scorer is not None:
        scoring.check(scorer)
    if name in builtin.TASKS:
        if kind is not None:
            raise InputError(f"--kind {kind}: is for files; {name} is built in")
        task = builtin.load(name, split or "test")
    else:
        task = _of_file(_existing(name), split, kind, limit, images)
    task = replace(task, scorer=scorer or task.scorer, max_new_tokens=max_new_tokens or task.max_new_tokens)
    return task.limited(limit)


def _existing(name: str) -> Path:
    path = Path(name)
    if path.exists():
        return path
    near = difflib.get_close_matches(name.lower(), builtin.TASKS, 1)
    hint = f"did you mean {near[0]}?" if near else f"wanted {', '.join(builtin.TASKS)}, or a data file"
    raise InputError(f"--task {name}: no such task and no such file; {hint}")


def _of_file(path: Path, split: str | None, kind: str | None, limit: int | None, images: Path | None) -> Task:
    is_tsv = path.suffix == ".tsv"
    store = open_store(path, None if is_tsv else split)
    if not len(store):
        raise InputError(f"{path}: has no questions")
    folder = images or (path if path.is_dir() else path.parent)
    kinds = VLMEVALKIT if is_tsv else LMMS
    if is_tsv:
        assert isinstance(store, Tsv)
        found = _kind(path, kinds, kind, has_options="A" in store.columns)
        read = formats.vlmevalkit
    else:
        found = _kind(path, kinds, kind, has_options=bool(formats.options(store[0])))
        read = formats.documents
    early = None if found.circular else limit
    questions = read(
        store, folder, found.name, found.prompt, circular=found.circular, split=split, limit=early
    )
    if not questions:
        raise InputError(f"{path}: has no questions{f' of split {split}' if split else ''} with a picture")
    id_, times = Counter(one.id for one in questions).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path}: the id {id_!r} is there {times} times; give every question its own")
    return Task(
        name=path.stem,
        format="vlmevalkit-tsv" if is_tsv else "lmms-jsonl",
        split=split or "all",
        source=path.name,
        questions=tuple(questions),
        scorer=found.scorer,
        prompt=found.prompt,
        max_new_tokens=found.max_new_tokens,
        circular=found.circular and len({one.unit for one in questions}) < len(questions),
        available=len(questions) if early is None else len(store),
    )


def _kind(path: Path, kinds: Sequence[Kind], given: str | None, *, has_options: bool) -> Kind:
    """The kind that was asked for, or that the file's name tells, or the plain one."""
    if given is not None:
        named = {kind.name.lower(): kind for kind in kinds}
        if given.lower() not in named:
            raise InputError(
                f"--kind {given}: wanted one of {', '.join(kind.name for kind in kinds)} for {path.name}"
            )
        return named[given.lower()]
    called = path.name.lower()
    for kind in kinds:
        if any(word in called for word in kind.words):
            return kind
    return kinds[-2] if has_options else kinds[-1]
