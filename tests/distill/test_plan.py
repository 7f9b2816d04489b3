"""The plan against what runs: memory measured in a process of its own, parameters, tokens."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from distill.masks.masking import Masker
from distill.planning import plan, plan_tables, symbolic
from distill.recipe import Recipe
from tests.checkpoints import FAMILIES
from tests.distill.planning import Case

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.15
"""What the plan promises. It sees every operation but what one allocates inside itself (1-2 % here)."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Student and teacher of two families, wide enough that weights and activations make the memory."""
    root = tmp_path_factory.mktemp("plan")
    found = {}
    for family in ("qwen3_vl", "smolvlm"):
        student, teacher = root / family / "student", root / family / "teacher"
        FAMILIES[family](student, hidden=160, layers=2, heads=4, kv_heads=2)
        FAMILIES[family](teacher, hidden=224, layers=3, heads=4, kv_heads=2)
        found[family] = (str(student), str(teacher))
    return found


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32, masked": ("qwen3_vl", {"train": {"precision": "float32"}, "r_max": 0.4}),
    "bf16, bf16 teacher, checkpointing": (
        "qwen3_vl",
        {"train": {"precision": "bf16", "gradient_checkpointing": True}, "teacher_dtype": "bfloat16"},
    ),
    "LoRA": ("smolvlm", {"train": {"precision": "float32", "lora": {"rank": 4, "alpha": 8.0}}}),
    "muon, one chunk": (
        "smolvlm",
        {"train": {"precision": "float32", "optimizer": "muon", "chunk_tokens": 4096}},
    ),
}  # fmt: skip


def test_memory_is_within_the_promise_of_a_measured_run(
    models: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    """The peak of the allocator's own count over two real steps, in a process of its own."""
    cases = [
        Case(*models[family], **{**settings, "train": {"chunk_tokens": 64, **settings["train"]}})
        for family, settings in CASES.values()
    ]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([asdict(case) for case in cases]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.distill.plan_measure", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"allocated"')]
    measured = [line["allocated"] for line in lines]
    planned = [plan.plan(case.recipe(tmp_path)).memory[0].total for case in cases]
    ratios = {name: a / b for name, a, b in zip(CASES, planned, measured, strict=True)}
    print(ratios)
    assert all(abs(ratio - 1) < TOLERANCE for ratio in ratios.values()), ratios


def small(models: dict[str, tuple[str, str]], tmp_path: Path, **changes: Any) -> Recipe:
    case = Case(*models["smolvlm"], train={"precision": "float32"}, rows=2, r_max=0.4)
    raw = case.recipe(tmp_path).model_dump(mode="json")
    for path, value in changes.items():
        *keys, last = path.split("__")
        inner = raw
        for key in keys:
            inner = inner[key]
        inner[last] = value
    return Recipe.model_validate(raw)


def part(found: plan.Plan, name: str) -> int:
    return next((each.bytes for each in found.memory[0].parts if each.what.startswith(name)), 0)


def test_parameters_and_kept_values_are_those_of_real_models(
    models: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    found = plan.plan(small(models, tmp_path))
    assert [each.role for each in found.models] == ["student", "teacher", "reference"]
    for each in found.models:
        real = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(each.name))
        assert each.parameters == sum(p.numel() for p in real.parameters())
        if each.role == "teacher":
            assert part(found, "masked weights kept") == Masker(real, 0.4).kept_bytes
    assert found.models[0].trainable == found.models[0].parameters and found.models[1].trainable == 0


def test_lora_has_no_reference_and_few_states(models: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    found = plan.plan(small(models, tmp_path, train__lora={"rank": 4, "alpha": 8.0}))
    assert [each.role for each in found.models] == ["student", "teacher"]
    assert 0 < found.models[0].trainable < found.models[0].parameters / 10
    assert part(found, "optimizer states") == 8 * found.models[0].trainable


def test_checkpointing_and_smaller_batches_take_less(
    models: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    whole = plan.plan(small(models, tmp_path))
    again = plan.plan(small(models, tmp_path, train__gradient_checkpointing=True))
    half = plan.plan(small(models, tmp_path, train__tokens_per_device=1))
    assert part(again, "activations") < part(whole, "activations") / 2
    assert part(half, "activations") == pytest.approx(part(whole, "activations") / 2, rel=0.02)
    assert any("a micro-batch holds one row" in note for note in half.notes)


def test_questions_about_one_image_share_it(models: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """Four questions in two rows of two: fewer tokens than in four rows, and still a batch that packs."""
    case = {"train__questions_per_step": 4, "train__tokens_per_device": 4096}
    apart = plan.plan(small(models, tmp_path, **case))
    shared = plan.plan(small(models, tmp_path, **case, data__together=2))
    assert 0 < part(shared, "activations") < part(apart, "activations")


def test_processes_share_what_fsdp_shards(models: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    recipe = small(models, tmp_path)
    alone, ddp = plan.plan(recipe), plan.plan(recipe, processes=2)
    fsdp = plan.plan(recipe, processes=2, strategy="fsdp")
    for name in ("student, fp32", "gradients", "optimizer states"):
        assert part(ddp, name) == part(alone, name) and part(fsdp, name) == part(alone, name) // 2
    assert part(ddp, "gradients in DDP") == part(alone, "gradients")
    assert part(fsdp, "student's gathered blocks") > 0


def test_tokens_disk_and_time_follow_the_recipe(models: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    changes = {"throughput__questions": 500, "pool__student_responses": 2, "train__passes": 2}
    found = plan.plan(small(models, tmp_path, **changes))
    work = {row.what: row for row in found.work}
    assert found.questions == 500 and not found.questions_known
    assert work["pool: teachers answer"].tokens == 500 * 4 * 24
    assert work["pool: the student answers"].tokens == 500 * 2 * 24 * 2
    assert work["pool: teachers answer"].seconds == work["pool: teachers answer"].tokens / 1000
    assert {each.what for each in found.disk} == {"pool", "training states", "checkpoints, best and last"}
    topk = plan.plan(small(models, tmp_path, **changes, signal={"kind": "topk", "k": 8}))
    assert any(each.what == "teacher signal" for each in topk.disk) and part(topk, "teacher, weights") == 0


def test_the_data_is_looked_at_where_it_is_there(models: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    data = {"train": [{"format": "easy-vqa", "split": "test", "limit": 40, "labels": 10}]}
    found = plan.plan(small(models, tmp_path, data=data))
    assert found.questions == 40 and found.questions_known
    assert any(row.what.startswith("pool: pseudo labels") and row.tokens == 30 * 4 * 24 for row in found.work)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_without_values(family: str, tmp_path: Path) -> None:
    directory = FAMILIES[family](tmp_path / family)
    case = Case(str(directory), str(directory), train={"precision": "bf16"}, rows=1, responses=2)
    found = plan.plan(case.recipe(tmp_path))
    assert part(found, "activations") > 0
    assert not any("not counted" in note for note in found.notes)


def test_nothing_is_allocated(models: dict[str, tuple[str, str]]) -> None:
    config = AutoConfig.from_pretrained(models["qwen3_vl"][1])
    config.text_config.num_hidden_layers = 4
    config.text_config.hidden_size = config.text_config.intermediate_size = 65536
    with torch.profiler.profile(profile_memory=True) as profile:
        model = symbolic.empty_model(config)
    assert symbolic.weight_bytes(model) > 100 * 2**30
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    assert sum(max(0, e.nbytes()) for e in events if e.name() == "[memory]") < 2**20


def test_tables_say_everything(models: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    from rich.console import Console

    found = plan.plan(small(models, tmp_path))
    console = Console(width=200, record=True, file=io.StringIO())
    for table in plan_tables.tables(found):
        console.print(table)
    text = console.export_text()
    for each in (*found.memory[0].parts, *found.disk):
        assert each.what in text and plan_tables.size(each.bytes) in text
    assert plan.Plan.model_validate_json(found.model_dump_json()) == found
