"""Bundles inside lmms-eval: its requests in our terms, and the real harness on a local task.

The harness is no dependency of ours. The last test runs where it is installed beside pocketvlm, or in the
environment whose interpreter `LMMS_EVAL_PYTHON` names:

    python -m venv .venv-lmms && .venv-lmms/bin/pip install -e '.[onnx]' lmms-eval
    LMMS_EVAL_PYTHON=.venv-lmms/bin/python python -m pytest tests/evals/test_lmms_eval.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evals.asking.lmms_eval_requests import generation_options, pictures_of, turns
from evals.parity.parity import forced_logits, log_softmax
from runtime.errors import InputError
from runtime.generation import GenerationOptions
from runtime.session import open_bundle

ROOT = Path(__file__).parent.parent.parent


def message(role: str, *parts: Any) -> dict[str, Any]:
    """Texts, and anything else as a picture."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}
        for part in parts
    ]
    return {"role": role, "content": content}


def test_messages_become_turns() -> None:
    told: list[str] = []
    found = turns([message("user", 1, 2, "what ", "is it?")], told.append)
    assert found == ([1, 2], "what is it?", []) and told == []
    few_shot = [
        message("user", 1, "what?"), message("assistant", "a cat"), {"role": "user", "content": "and now?"},
    ]  # fmt: skip
    assert turns(few_shot, told.append) == ([], "and now?", [([1], "what?", "a cat")]) and told == []
    assert turns([message("user", "before", 1, "behind")], told.append)[1] == "beforebehind"
    assert len(told) == 1 and "pictures come first" in told[0]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "without a question"),
        ([message("system", "be brief"), message("user", "what?")], "a system turn"),
        ([message("user", "what?"), message("user", "what?")], "a user turn"),
        ([message("assistant", "a cat")], "an? assistant turn"),
        ([message("user", "what?"), message("assistant", "a cat")], "without a question"),
        (
            [message("user", "what?"), message("assistant", 1, "a cat"), message("user", "?")],
            "assistant turn",
        ),
        ([{"role": "user", "content": [{"type": "video", "url": "x"}]}], "hold a video"),
    ],
)
def test_what_a_bundle_cannot_be_asked_is_refused(messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        turns(messages, lambda _: None)


def test_generation_arguments() -> None:
    told: list[str] = []
    usual = {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\n\n"], "top_p": None}
    assert generation_options(usual, 99, told.append) == GenerationOptions(max_new_tokens=16, stop=("\n\n",))
    assert generation_options({}, 99, told.append) == GenerationOptions(max_new_tokens=99)
    assert generation_options({"until": "end"}, 9, told.append).stop == ("end",)
    sampled = generation_options({"do_sample": True, "top_p": 0.9, "top_k": 5}, 9, told.append)
    assert (sampled.temperature, sampled.top_p, sampled.top_k) == (1.0, 0.9, 5)
    assert generation_options({"do_sample": False, "temperature": 0.7}, 9, told.append).temperature == 0
    assert told == []
    generation_options({"num_beams": 3, "length_penalty": 2, "use_cache": True}, 9, told.append)
    assert len(told) == 2 and "num_beams 3" in told[0] and "'length_penalty'" in told[1]


def test_pictures_are_flattened() -> None:
    assert pictures_of(None) == [] and pictures_of(1) == [1] and pictures_of([1, [2, (3,)], []]) == [1, 2, 3]


# --- the real harness -------------------------------------------------

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_visual: !function local.pictures
doc_to_text: !function local.text
doc_to_target: answer
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
GENERATION = "generation_kwargs: {max_new_tokens: 6, temperature: 0, do_sample: false}"
FUNCTIONS = """from PIL import Image


def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


HARNESS = os.environ.get("LMMS_EVAL_PYTHON") or (
    sys.executable if importlib.util.find_spec("lmms_eval") else None
)


@pytest.fixture
def local_tasks(tmp_path: Path) -> Path:
    """Two tasks over three pictures: free answers, and the losses of given ones."""
    rows = []
    for seed in range(3):
        values = np.random.default_rng(seed).integers(0, 255, (40, 70, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{seed}.png")
        rows.append({"image": str(tmp_path / f"{seed}.png"), "question": "what color?", "answer": "red"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.py").write_text(FUNCTIONS)
    for name, kind, more, metric in (
        ("pocket_free", "generate_until", GENERATION, "exact_match"),
        ("pocket_given", "multiple_choice", 'doc_to_choice: ["red", "blue"]', "acc"),
    ):
        data = tmp_path / "data.jsonl"
        (tmp_path / f"{name}.yaml").write_text(
            TASK.format(name=name, kind=kind, more=more, metric=metric, data=data)
        )
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(HARNESS is None, reason="lmms-eval is not installed, LMMS_EVAL_PYTHON is not set")
def test_the_real_harness_gets_the_bundle_s_own_answers(tiny_bundle: Path, local_tasks: Path) -> None:
    assert HARNESS is not None
    rows = [json.loads(line) for line in (local_tasks / "data.jsonl").read_text().splitlines()]
    for task, more in (("pocket_free", []), ("pocket_given", ["--force_simple"])):
        out = local_tasks / f"out-{task}"
        done = subprocess.run(
            [
                HARNESS, "-m", "evals.asking.lmms_eval_model", "--model", "pocketvlm",
                "--model_args", f"bundle={tiny_bundle},threads=1", "--include_path", str(local_tasks),
                "--tasks", task, "--batch_size", "1", "--log_samples", "--output_path", str(out), *more,
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(local_tasks / "hf")},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (samples,) = out.rglob(f"*samples_{task}.jsonl")
        found = [json.loads(line) for line in samples.read_text().splitlines()]
        with open_bundle(tiny_bundle, threads=1, reuse=False) as session:
            for row, sample in zip(rows, found, strict=True):
                # the harness opens the file itself and gives pixels
                picture = Image.open(row["image"]).convert("RGB")
                if task == "pocket_free":
                    answer = session.ask(picture, row["question"], GenerationOptions(max_new_tokens=6))
                    # left out where stripping changes nothing
                    assert sample.get("resps", sample["filtered_resps"]) == answer.text
                    assert sample["token_counts"] == [
                        {"input_tokens": answer.stats.prompt_tokens, "output_tokens": answer.stats.new_tokens}
                    ]
                else:
                    losses = [float(pair[0]) for pair in sample["filtered_resps"]]
                    wanted = [
                        _loss(session, picture, row["question"], f" {text}") for text in ("red", "blue")
                    ]
                    assert losses == pytest.approx(wanted, rel=1e-5)
                    assert sample["acc"] == float(wanted[0] < wanted[1])


def _loss(session: Any, picture: Image.Image, question: str, answer: str) -> float:
    prepared = session.prepare(picture)
    ids = session.prompt_ids(question, [prepared])
    tokens = session.tokenizer.encode(answer, add_special_tokens=False).ids
    logits = forced_logits(session, ids, [session.encode_image(prepared)], tokens[:-1])
    return -float(np.mean(log_softmax(logits.astype(np.float64))[np.arange(len(tokens)), tokens]))
