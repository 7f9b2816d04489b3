"""Answers in the layouts that users of VLMEvalKit and lmms-eval read.

In: `EvalResults` and its task. Out: files beside eval.json. Not here: the contract (`eval_results.py`).

    vlmevalkit/SUBJECT/SUBJECT_TASK.tsv    the task's columns without pictures, and `prediction`: what
                                           `run.py --mode eval` reads with PRED_FORMAT=tsv; .xlsx too where
                                           openpyxl is installed (VLMEvalKit's default)
    lmms-eval/SUBJECT/DATE_samples_TASK.jsonl    doc_id, target, filtered_resps, doc_hash, input and the score

Only answers to the questions as the task has them are written; variants are eval.json's. A second run of a
task replaces its files.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.asking.eval_results import ORIGINAL, EvalResults, Given, Subject
from evals.tasks.question import Question, Task
from runtime import files

DROPPED = ("image", "image_path")
METRIC = "score"


def write(results: EvalResults, task: Task, out: Path) -> list[Path]:
    """Every subject's files; the paths that were written."""
    date = re.sub(r"\D", "", results.created)[:14]
    stamp = f"{date[:8]}_{date[8:]}"
    found = []
    for subject in results.subjects:
        name = _safe(subject.name)
        stem = f"{name}_{_safe(task.name)}"
        rows = list(_vlmevalkit_rows(subject, task))
        found.append(_write_tsv(rows, out / "vlmevalkit" / name / f"{stem}.tsv"))
        found += _write_xlsx(rows, out / "vlmevalkit" / name / f"{stem}.xlsx")
        path = out / "lmms-eval" / name / f"{stamp}_samples_{_safe(task.name)}.jsonl"
        for older in path.parent.glob(f"*_samples_{_safe(task.name)}.jsonl"):
            older.unlink()
        lines = [json.dumps(row, ensure_ascii=False) for row in _lmms_rows(subject, task)]
        files.write_text(path, "".join(f"{line}\n" for line in lines))
        found.append(path)
    return found


def _answered(subject: Subject, task: Task) -> Iterator[tuple[int, Question, Given]]:
    given = {one.id: one for one in subject.answers if one.variant == ORIGINAL}
    return ((place, one, given[one.id]) for place, one in enumerate(task.questions) if one.id in given)


def _vlmevalkit_rows(subject: Subject, task: Task) -> Iterator[dict[str, str]]:
    """The columns of the TSV, or index, question, options and answer of another format, and `prediction`."""
    for _, one, given in _answered(subject, task):
        row = {key: str(value) for key, value in one.row.items() if key not in DROPPED}
        if task.format != "vlmevalkit-tsv":
            answer = one.references[0] if len(one.references) == 1 else str(list(one.references))
            row = {"index": one.id, "question": one.question, "answer": answer}
            row |= dict(zip(one.letters, one.options, strict=False))
            row |= {"category": one.category} if one.category else {}
        yield {**row, "prediction": given.answer}


def _columns(rows: list[dict[str, str]]) -> list[str]:
    """In order of first appearance, the prediction last."""
    found = list(dict.fromkeys(key for row in rows for key in row))
    return [*(key for key in found if key != "prediction"), "prediction"]


def _write_tsv(rows: list[dict[str, str]], path: Path) -> Path:
    """Quoted as VLMEvalKit's own `dump` does."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(
        buffer, _columns(rows), "", delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, buffer.getvalue())
    return path


def _write_xlsx(rows: list[dict[str, str]], path: Path) -> list[Path]:
    """The same as a workbook; nothing without openpyxl."""
    try:
        from openpyxl import Workbook
    except ImportError:
        return []
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    columns = _columns(rows)
    for values in (columns, *([row.get(key, "") for key in columns] for row in rows)):
        sheet.append([_cell(value) for value in values])
    buffer = io.BytesIO()
    book.save(buffer)
    files.write_bytes(path, buffer.getvalue())
    return [path]


_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def _cell(value: str) -> str:
    """Text that a workbook can hold: no control characters, at most 32,767 characters."""
    return _FORBIDDEN.sub("", value)[:32767]


def _lmms_rows(subject: Subject, task: Task) -> Iterator[dict[str, Any]]:
    """As lmms-eval's `save_results_samples` writes them; `doc_hash` is of the document's own fields."""
    for place, one, given in _answered(subject, task):
        target = one.references[0] if len(one.references) == 1 else str(list(one.references))
        row: dict[str, Any] = {
            "doc_id": place,
            "target": target,
            "filtered_resps": given.read if given.read is not None else given.answer,
            "doc_hash": files.sha256_json({"id": one.id, "question": one.question, "target": target}),
            METRIC: given.score,
            "input": one.prompt,
        }
        if row["filtered_resps"] != given.answer:
            row["resps"] = [given.answer]
        yield row


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
