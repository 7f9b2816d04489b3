"""The demo on a tiny recipe: real stages, real processes, killed at several points."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from distill.demo import demo_bundles, demo_recipe, demo_run
from runtime.errors import StateError
from runtime.files import Ledger
from tests.distill.demo_driver import tiny

ROOT = Path(__file__).parents[2]
STAGES = ["data", "teacher", "curve", "pool", "train", "test", "export", "answer", "measure"]


def start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distill.demo_driver", str(out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "whole"
    process = start(out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    return out


def kill_when(out: Path, reached: Callable[[], bool]) -> None:
    """Start the demo and kill -9 its first process when `reached`; no worker may outlive it."""
    process = start(out)
    deadline = time.monotonic() + 120
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "finished before it could be killed"
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_every_stage_is_in_the_ledger_and_every_name_on_disk(finished: Path) -> None:
    assert [entry["stage"] for entry in Ledger(finished / "ledger.jsonl").entries()] == STAGES
    for name in ("teacher", "student", "student-sft", "student-kd", "bundles/student-onnx-fp32"):
        assert (finished / name).is_dir()
    results = json.loads((finished / "report" / "results.json").read_text())
    assert {row["method"] for row in results["methods"]} == {"warmup", "sft", "kd", "masters"}
    shares = next(curve for curve in results["training"] if curve["method"] == "masters")
    assert any(share is not None for share in shares["grad_share_rl"])
    bundle = results["bundles"][0]
    assert bundle["agreement"]["same"] + bundle["agreement"]["near_ties"] >= bundle["agreement"]["n"]
    assert "<html" in (finished / "report" / "index.html").read_text()
    of_llama_cpp = [bundle for bundle in results["bundles"] if bundle["format"] == "gguf"]
    missing = {row["what"]: row["why"] for row in results["missing"]}
    if demo_bundles.no_gguf():
        assert not of_llama_cpp and "pip install" in missing["GGUF bundles"]
    else:
        assert [bundle["precision"] for bundle in of_llama_cpp] == ["q8_0"] and "GGUF bundles" not in missing
        assert of_llama_cpp[0]["test"]["n"] == 12 and of_llama_cpp[0]["latency"]

    of_coreml = [bundle for bundle in results["bundles"] if bundle["format"] == "coreml"]
    if demo_bundles.no_coreml():
        assert not of_coreml and "pip install" in missing["Core ML bundles"]
    else:
        assert [bundle["precision"] for bundle in of_coreml] == ["fp16"] and "Core ML bundles" not in missing
        assert of_coreml[0]["test"]["n"] == 12 and not of_coreml[0]["latency"]
        assert "numerics only" in missing["Speed of Core ML bundles"]


def test_without_llama_cpp_the_demo_has_one_line_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> object:
        """gguf is there, llama_cpp and coremltools are not, whatever this environment has."""
        return None if name in ("llama_cpp", "coremltools") else object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert demo_bundles.no_gguf() == "llama-cpp-python is not installed; run: pip install 'pocketvlm[gguf]'"
    assert demo_bundles.no_coreml() == "coremltools is not installed; run: pip install 'pocketvlm[coreml]'"
    exported = [job.name for job in demo_run._export_jobs(Path("out"), tiny(), print)]
    assert exported == ["export student to onnx"]


def test_checkpoints_load_with_no_code_of_ours(finished: Path, tmp_path: Path) -> None:
    """Teacher and student answer through plain transformers, in a process that cannot import this project."""
    script = """
import sys
from pathlib import Path
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
for directory in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    picture = {"type": "image", "image": Image.new("RGB", (64, 64), "white")}
    content = [picture, {"type": "text", "text": "what?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    print(len(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0]) > inputs["input_ids"].shape[1])
assert not {"distill", "runtime", "export", "evals"} & set(sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-I", "-c", script, str(finished / "teacher"), str(finished / "student")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert run.stdout.split() == ["True", "True"]


@pytest.mark.slow
def test_killed_anywhere_the_student_is_the_same(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    work = out / "work"
    kill_when(out, lambda: (work / "teacher.work" / "initial" / "model.safetensors").exists())
    kill_when(out, lambda: any((work / "pool").glob("*/*.jsonl")))
    teacher = (out / "teacher" / "model.safetensors").stat().st_mtime_ns
    kill_when(out, lambda: any((work / "arms").glob("student-masters*.work/responses-1/*.jsonl")))
    kill_when(out, lambda: any((out / "bundles").glob(".tmp-*")))
    process = start(out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    assert "finished before" in errors.decode()
    assert (out / "teacher" / "model.safetensors").stat().st_mtime_ns == teacher, (
        "the teacher was trained again"
    )
    for name in ("teacher", "student", "student-kd", "student-sft"):
        weights = [(path / name / "model.safetensors").read_bytes() for path in (out, finished)]
        assert weights[0] == weights[1], name
    assert not list(out.rglob(".tmp-*"))


def test_another_recipe_is_refused_with_the_difference(finished: Path) -> None:
    plan = tiny()
    changed = plan.model_copy(update={"seed": 5})
    with pytest.raises(StateError, match=r"seed: there 0, now 5"):
        demo_recipe.claim(finished, changed)
    demo_recipe.claim(finished, plan)


def test_no_test_question_is_seen_before_the_test(finished: Path) -> None:
    """What training and choosing read is the training split; answered questions are the test split's."""
    asked = demo_bundles.asked(tiny())
    assert all(item.image_path.parts[-3] == "test" for item in asked)
    drawn = [
        json.loads(line)
        for path in (finished / "work" / "pool").glob("full-*/*.jsonl")
        for line in path.open()
    ]
    assert len([row for row in drawn if isinstance(row, list)]) > 100
