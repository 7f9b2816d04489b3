"""Parity of every family and format: patches, tiles, convolutions, bytes, programs that are evaluated."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.asking import subjects
from evals.parity import parity_run, parity_table
from evals.parity.parity_results import Candidate, ParityResults
from evals.parity.parity_run import Settings
from evals.tasks.question import Question, Task
from tests.checkpoints import FAMILIES

FAST = Settings(max_tokens=4, threads=1)


def _picture(seed: int, rows: int, columns: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (rows, columns, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


SIZES = ((40, 70), (64, 64), (130, 90))
TASK = Task(
    "sizes",
    "lmms-jsonl",
    "test",
    "made here",
    tuple(
        Question(str(i), str(i), "what color?", "what color?", (_picture(i, *size),), ("red",))
        for i, size in enumerate(SIZES)
    ),
    "exact",
)


def hold(checkpoint: Path, bundle: Path, out: Path) -> tuple[Candidate, ParityResults]:
    models = subjects.describe_all([checkpoint, bundle])
    found = parity_run.run(models[0], models[1:], TASK, out / "parity.json", settings=FAST)
    one = found.candidates[0]
    assert one.error is None and one.preprocessing is not None and one.same_source
    assert one.preprocessing.prompts_equal == one.preprocessing.image_tokens_equal == len(SIZES)
    return one, found


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"smolvlm"}))
def test_every_family_s_float_bundle_is_its_checkpoint(family: str, tmp_path: Path) -> None:
    from export import export_checkpoint

    checkpoint = FAMILIES[family](tmp_path / family)
    one, _ = hold(checkpoint, export_checkpoint(checkpoint, tmp_path / "bundle"), tmp_path)
    assert one.preprocessing is not None and one.preprocessing.images_equal == len(SIZES)
    for forced in ("reference-greedy", "label"):
        figures = one.on(forced)
        assert figures is not None and figures.kl_mean.value < 1e-6
        assert figures.top1_differ == figures.near_ties


@pytest.mark.slow
@pytest.mark.parametrize(("family", "compared"), [("internvl", True), ("qwen3_vl", False)])
def test_gguf_is_compared_in_bytes_where_its_pixels_lie_in_rows(
    family: str, compared: bool, tmp_path: Path
) -> None:
    """Tiles of a picture are; patches are not, and the file says so."""
    pytest.importorskip("llama_cpp")
    from export import export_checkpoint
    from tests import gguf_checkpoints

    checkpoint = gguf_checkpoints.write(family, tmp_path / family)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", to="gguf", precision="f32")
    one, found = hold(checkpoint, bundle, tmp_path)
    seen, figures = one.preprocessing, one.on("reference-greedy")
    assert seen is not None and figures is not None
    assert seen.pixel_unit == "byte" and (seen.images_compared > 0) == compared
    assert (seen.why_not_compared is None) == compared
    assert any("pixels of some pictures" in gap.what for gap in found.missing) != compared
    if compared:
        assert seen.images_equal == len(SIZES)
    assert figures.kl_mean.value < 1e-3  # flash attention, float16 cache and convolution


@pytest.mark.slow
def test_a_core_ml_bundle_is_told_to_be_evaluated(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    from export import export_checkpoint
    from runtime import coreml_engine

    if not coreml_engine.unavailable():
        pytest.skip("Core ML itself runs it here")
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", to="coreml", precision="fp16")
    one, found = hold(tiny_checkpoint, bundle, tmp_path)
    assert one.emulated and "numerics only" in one.emulated_reason and "evaluator" in one.backend
    assert any("numerics only" in line for line in parity_table.lines(found))
    figures = one.on("reference-greedy")
    assert figures is not None and figures.kl_mean.value < 1e-3


def test_another_resize_filter_is_told(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """The classic fault of a port: the picture is resized by another filter."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    for row in manifest["image"]["operations"]:
        if row["op"].startswith("resize_longest_edge@"):
            row["filter"] = "bicubic"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    models = subjects.describe_all([tiny_checkpoint, copy])
    some = replace(TASK, questions=TASK.questions[:1])
    found = parity_run.run(models[0], models[1:], some, tmp_path / "parity.json", settings=FAST)
    one = found.candidates[0]
    assert one.error is None and one.preprocessing is not None and one.same_inputs is not None
    assert one.preprocessing.images_equal == 0 and 0 < (one.preprocessing.pixel_share or 0) <= 1
    assert one.same_inputs.kl_mean.value < 1e-6
