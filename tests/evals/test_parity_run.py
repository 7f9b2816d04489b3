"""Parity over a task: an equal bundle is equal, a wrong one is named by what is wrong, runs resume."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.asking import subjects
from evals.parity import parity_results, parity_run, parity_table
from evals.parity.parity_results import ParityResults
from evals.parity.parity_run import Settings
from evals.parity.parity_side import Kept, label_ids
from evals.tasks.question import Question, Task
from evals.torch_session import TorchSession
from runtime import bundle as bundles
from runtime.errors import InputError, StateError
from runtime.generation import GenerationOptions

ROOT = Path(__file__).parent.parent.parent
FAST = Settings(max_tokens=6, threads=1)


def _picture(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (40 + seed, 70, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def task() -> Task:
    asked = ("what color is the shape?", "is there a red circle?")
    questions = [
        Question(f"{seed}-{n}", str(seed), text, text, (_picture(seed),), ("red",))
        for seed in range(3)
        for n, text in enumerate(asked)
    ]
    return Task("tiny", "lmms-jsonl", "test", "made here", tuple(questions), "exact")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer."""
    from tests.checkpoints import write_smolvlm

    return write_smolvlm(tmp_path_factory.mktemp("other") / "other", seed=1)


@pytest.fixture(scope="module")
def found(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    other: Path,
    task: Task,
    tmp_path_factory: pytest.TempPathFactory,
) -> ParityResults:
    """The checkpoint against its float32 bundle and against another model."""
    reference, *candidates = (subjects.describe(path) for path in (tiny_checkpoint, tiny_bundle, other))
    candidates = [replace(one, name=name) for one, name in zip(candidates, ("fp32", "other"), strict=True)]
    out = tmp_path_factory.mktemp("parity") / "parity.json"
    done = parity_run.run(reference, candidates, task, out, settings=FAST)
    assert parity_results.read(out) == done
    return done


def test_a_float_bundle_equals_its_checkpoint(found: ParityResults) -> None:
    one = found.candidate("fp32")
    assert one is not None and one.same_source and one.error is None and not one.emulated
    assert one.preprocessing is not None and one.greedy is not None
    assert one.preprocessing.images_equal == one.preprocessing.images == 6
    assert one.preprocessing.prompts_equal == one.preprocessing.prompts == 6
    assert one.preprocessing.first_pixels is one.preprocessing.first_ids is one.same_inputs is None
    for forced in ("reference-greedy", "label"):
        figures = one.on(forced)
        assert figures is not None and 0 <= figures.kl_mean.value < 1e-6, figures
        assert figures.top1_differ == figures.near_ties
        assert figures.perplexity == pytest.approx(figures.perplexity_reference, rel=1e-4)
    assert one.greedy.whole_equal.value == 1.0 and one.worst == []


def test_another_model_is_far_away_and_its_worst_positions_are_shown(found: ParityResults) -> None:
    one = found.candidate("other")
    assert one is not None and not one.same_source and one.kind == "checkpoint"
    assert one.preprocessing is not None and one.preprocessing.images_equal == 6
    figures = one.on("reference-greedy")
    assert figures is not None and figures.kl_mean.value > 0.1
    assert figures.kl_mean.low <= figures.kl_mean.value <= figures.kl_mean.high
    assert figures.kl_median <= figures.kl_p90 <= figures.kl_p99 <= figures.kl_max
    assert one.worst and one.worst[0].kl == max(place.kl for place in one.worst)
    assert "was not made from" in "\n".join(parity_table.lines(found))


def test_a_greedy_prefix_is_what_both_would_write(
    found: ParityResults, tiny_checkpoint: Path, other: Path, task: Task
) -> None:
    """The forced pass says how far free answers agree; here both are really generated."""
    lengths = []
    for question in task.questions:
        texts = [
            TorchSession(path).generate(question.images[0], question.prompt, FAST.max_tokens)
            for path in (tiny_checkpoint, other)
        ]
        pairs = zip(*texts, strict=False)
        lengths.append(next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, texts))))
    one = found.candidate("other")
    assert one is not None and one.greedy is not None
    assert one.greedy.prefix_mean.value == pytest.approx(float(np.mean(lengths)))


def _changed(bundle: Path, out: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a bundle with another manifest."""
    copy = Path(shutil.copytree(bundle, out))
    path = copy / bundles.MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return copy


def _darker(manifest: dict) -> None:
    row = next(one for one in manifest["image"]["operations"] if one["op"].startswith("normalise@"))
    row["subtract"] = [value + 20 for value in row["subtract"]]


def test_wrong_pixels_are_told_from_wrong_weights(
    tiny_checkpoint: Path, tiny_bundle: Path, task: Task, tmp_path: Path
) -> None:
    wrong = _changed(tiny_bundle, tmp_path / "darker", _darker)
    reference, candidate = subjects.describe_all([tiny_checkpoint, wrong])
    done = parity_run.run(reference, [candidate], task.limited(2), tmp_path / "parity.json", settings=FAST)
    one = done.candidates[0]
    assert one.preprocessing is not None and one.same_inputs is not None
    assert one.preprocessing.images_equal == 0 and one.preprocessing.pixel_share == 1.0
    assert one.preprocessing.prompts_equal == 2
    figures = one.on("reference-greedy")
    assert figures is not None and figures.kl_mean.value > 1e-4
    assert one.same_inputs.kl_mean.value < 1e-6
    assert "pixels differ (0-0: up to" in "\n".join(parity_table.lines(done))


def test_a_wrong_prompt_is_shown_where_it_begins(
    tiny_checkpoint: Path, tiny_bundle: Path, task: Task, tmp_path: Path
) -> None:
    wrong = _changed(tiny_bundle, tmp_path / "longer", _another_system_text)
    reference, candidate = subjects.describe_all([tiny_checkpoint, wrong])
    done = parity_run.run(reference, [candidate], task.limited(1), tmp_path / "parity.json", settings=FAST)
    one = done.candidates[0]
    assert one.preprocessing is not None and one.preprocessing.prompts_equal == 0
    assert one.preprocessing.images_equal == 1
    assert one.preprocessing.first_ids is not None
    assert one.preprocessing.first_ids.startswith("0-0: place 1: ")


def _another_system_text(manifest: dict) -> None:
    manifest["prompt"]["system"] += [7]


class _Stop(Exception):
    pass


def test_a_run_that_was_killed_asks_nothing_twice(
    tiny_checkpoint: Path, tiny_bundle: Path, task: Task, tmp_path: Path
) -> None:
    models = subjects.describe_all([tiny_checkpoint, tiny_bundle])
    out = tmp_path / "parity.json"
    told: list[tuple[str, int]] = []

    def run(stop_at: int | None = None) -> ParityResults:
        told.clear()

        def progress(what: str, done: int, total: int) -> None:
            told.append((what, done))
            if len(told) == stop_at:
                raise _Stop

        return parity_run.run(models[0], models[1:], task, out, settings=FAST, progress=progress)

    with pytest.raises(_Stop):
        run(stop_at=4)  # inside the reference
    with pytest.raises(_Stop):
        run(stop_at=4)  # two more of the reference, two of the bundle
    assert not out.exists()
    (torn,) = (tmp_path / "parity.work").rglob("000001.jsonl")
    done = run()
    assert [what for what, _ in told] == [f"parity: {models[1].name}"] * 4
    assert done == run().model_copy(update={"created": done.created}) and told == []
    torn.write_text(torn.read_text()[:-20])
    assert "seal" in (run().candidates[0].error or "")
    torn.unlink()
    assert run().candidates == done.candidates and len(told) == 2  # the reference, then the bundle


def test_a_candidate_that_cannot_be_asked_does_not_stop_the_others(
    tiny_checkpoint: Path, tiny_bundle: Path, task: Task, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(tiny_bundle, tmp_path / "broken"))
    next(broken.rglob("decoder*.onnx")).write_bytes(b"")
    models = subjects.describe_all([tiny_checkpoint, broken, tiny_bundle])
    done = parity_run.run(models[0], models[1:], task.limited(1), tmp_path / "out.json", settings=FAST)
    assert "decoder" in (done.candidates[0].error or "") and done.candidates[1].error is None
    assert done.missing[0].what == "broken"
    assert any("not measured" in line for line in parity_table.lines(done))
    assert [column.header for column in parity_table.table(done).columns][1:] == [models[2].name]


def test_questions_without_a_picture_and_with_two(
    tiny_checkpoint: Path, tiny_bundle: Path, task: Task, tmp_path: Path
) -> None:
    first, *_, last = task.questions
    asked = (
        replace(first, id="none", group="none", images=()),
        replace(first, id="two", group="two", images=(*first.images, *last.images), references=()),
    )
    models = subjects.describe_all([tiny_checkpoint, tiny_bundle])
    some = replace(task, questions=asked)
    done = parity_run.run(models[0], models[1:], some, tmp_path / "parity.json", settings=FAST)
    one = done.candidates[0]
    assert one.error is None and one.preprocessing is not None
    assert one.preprocessing.images == one.preprocessing.images_equal == 2
    figures, label = one.on("reference-greedy"), one.on("label")
    assert figures is not None and figures.cases == 2 and figures.kl_mean.value < 1e-6
    assert label is not None and label.cases == 1  # a question without a label has no such text

    bare = replace(some, questions=asked[:1])
    settings = replace(FAST, labels=False)
    done = parity_run.run(models[0], models[1:], bare, tmp_path / "bare.json", settings=settings)
    assert done.candidates[0].on("label") is None
    assert done.missing[-1].what == "perplexity of the labels"
    (cell,) = list(parity_table.table(done).columns[1].cells)[:1]
    assert cell == "no picture"


@pytest.mark.slow
def test_kill_9_costs_one_question(
    tiny_checkpoint: Path, tiny_bundle: Path, task: Task, tmp_path: Path
) -> None:
    """A process of its own is killed in the middle, again and again, until it is through."""
    script = tmp_path / "run.py"
    script.write_text(
        "import pickle, sys\n"
        "from pathlib import Path\n"
        "from evals.asking import subjects\nfrom evals.parity import parity_run\n"
        "models = subjects.describe_all([Path(one) for one in sys.argv[2:4]])\n"
        "task = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "out, settings = Path(sys.argv[4]), parity_run.Settings(max_tokens=6, threads=1)\n"
        "parity_run.run(models[0], models[1:], task, out, settings=settings)\n"
    )
    (tmp_path / "task").write_bytes(pickle.dumps(task))
    out, work = tmp_path / "out.json", tmp_path / "out.work"
    command = [sys.executable, script, tmp_path / "task", tiny_checkpoint, tiny_bundle, out]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for wanted in (2, 8):  # files made before the kill: inside the reference, inside the bundle
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and _made(work) < wanted:
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert not out.exists() and _made(work) >= 8
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*.jsonl")}
    subprocess.run(command, env=environment, check=True)
    models = subjects.describe_all([tiny_checkpoint, tiny_bundle])
    whole = parity_run.run(models[0], models[1:], task, tmp_path / "whole.json", settings=FAST)
    assert parity_results.read(out).candidates == whole.candidates
    assert kept and all(path.stat().st_mtime_ns == made for path, made in kept.items())
    assert not list(work.rglob(".tmp-*")) and not list(work.rglob("*.npz"))


def _made(work: Path) -> int:
    return sum(
        path.name[0].isdigit()
        for pattern in ("*.npz", "*.jsonl")
        for path in work.rglob(pattern)
        if len(path.stem) == 6
    )


def test_a_question_that_cannot_be_asked_is_left_out_and_counted(
    tiny_checkpoint: Path, tiny_bundle: Path, task: Task, tmp_path: Path
) -> None:
    long, refused = "what color? " * 200, "what is <image> there?"
    questions = [task.questions[0]] + [
        replace(task.questions[1], id=name, question=text, prompt=text)
        for name, text in (("long", long), ("refused", refused))
    ]
    some = replace(task, questions=tuple(questions))
    models = subjects.describe_all([tiny_checkpoint, tiny_bundle])
    done = parity_run.run(models[0], models[1:], some, tmp_path / "parity.json", settings=FAST)
    one = done.candidates[0]
    assert one.error is None and one.failed == 2
    figures = one.on("reference-greedy")
    assert figures is not None and figures.cases == 1
    assert done.missing[-1].what.endswith(": 2 questions")
    assert any("2 questions: could not be asked" in line for line in parity_table.lines(done))
    none = replace(task, questions=tuple(questions[2:]))
    done = parity_run.run(models[0], models[1:], none, tmp_path / "none.json", settings=FAST)
    assert (done.candidates[0].error or "").startswith("question refused: the reference cannot be asked: ")


def test_what_a_backend_raises_is_the_model_s_error(
    tiny_checkpoint: Path, tiny_bundle: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.session import Session

    class Fail(Exception):
        """As onnxruntime's, of no class that could be known here."""

    def decode(self: Session, token_id: int) -> None:
        raise Fail("[ONNXRuntimeError] : 1 : FAIL\nmore lines")

    monkeypatch.setattr(Session, "decode", decode)
    models = subjects.describe_all([tiny_checkpoint, tiny_bundle])
    done = parity_run.run(models[0], models[1:], task.limited(1), tmp_path / "parity.json", settings=FAST)
    assert done.candidates[0].error == "question 0-0: Fail: [ONNXRuntimeError] : 1 : FAIL"


def test_a_damaged_file_of_the_reference_is_named(tmp_path: Path) -> None:
    for content in (b"", b"PK", b"nonsense" * 9):
        (tmp_path / "000000.npz").write_bytes(content)
        with pytest.raises(StateError, match=r"000000\.npz: cannot be read .*; delete it"):
            Kept.read(tmp_path / "000000.npz")


def test_a_label_is_tokenised_as_the_template_has_it(tiny_checkpoint: Path, task: Task) -> None:
    with TorchSession(tiny_checkpoint) as session:
        prepared = [session.prepare(task.questions[0].images[0])]
        prompt = session.prompt_ids("what color?", prepared)
        ids = label_ids(session, "what color?", prepared, prompt, "red")
        assert session.tokenizer.decode(ids.tolist()).strip() == "red" and ids[-1] in session.stop_ids
        text = session.processor.apply_chat_template(
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ]
        )
        whole = session.processor(text=text, images=[Image.open(io.BytesIO(_picture(0)))])["input_ids"][0]
        assert [*prompt.tolist(), *ids.tolist()] == list(whole)[: len(prompt) + len(ids)]
        # the session can go on as if nothing had been asked in between
        options = GenerationOptions(max_new_tokens=3)
        answer = session.complete(prompt, [session.encode_image(prepared[0])], options)
        assert answer.token_ids == session.generate(task.questions[0].images[0], "what color?", 3)


def test_what_cannot_be_compared_is_refused(tiny_checkpoint: Path, task: Task, tmp_path: Path) -> None:
    model = subjects.describe(tiny_checkpoint)
    with pytest.raises(InputError, match="name a bundle"):
        parity_run.run(model, [model], task, tmp_path / "parity.json")
    with pytest.raises(InputError, match="no questions"):
        parity_run.run(model, [], replace(task, questions=()), tmp_path / "parity.json")
    with pytest.raises(InputError, match=r"no manifest\.json and no config\.json"):
        subjects.describe(tmp_path)
    with pytest.raises(InputError, match="given twice"):
        subjects.describe_all([tiny_checkpoint, tiny_checkpoint])


def test_few_questions_are_spread_over_images(task: Task) -> None:
    assert [one.id for one in parity_run.spread(task, 2).questions] == ["0-0", "1-0"]
    assert [one.id for one in parity_run.spread(task, 4).questions] == ["0-0", "0-1", "1-0", "2-0"]
    assert parity_run.spread(task, 99).questions == task.questions


def test_the_schema_is_published() -> None:
    published = (ROOT / "docs" / "parity.schema.json").read_text()
    assert published == parity_results.json_schema(), (
        "run: python -m evals.parity.parity_results > docs/parity.schema.json"
    )


def test_a_file_of_another_kind_is_refused(found: ParityResults, tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    with pytest.raises(StateError, match="run `pocketvlm eval --parity` again"):
        parity_results.read(path)
    value = json.loads(found.model_dump_json(by_alias=True))
    path.write_text(json.dumps({**value, "schema": "pocketvlm.eval@1"}))
    with pytest.raises(StateError, match=r"parity@1"):
        parity_results.read(path)
    path.write_text(json.dumps({**value, "candidates": value["candidates"] * 2}))
    with pytest.raises(StateError, match="there twice"):
        parity_results.read(path)


@pytest.mark.slow
def test_the_verb_prints_parity_and_losses(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    from tests.cli import call

    (tmp_path / "p.png").write_bytes(_picture(1))
    rows = [{"question": f"what is {i}?", "image": "p.png", "answer": "yes"} for i in range(2)]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    arguments = (
        "eval",
        tiny_checkpoint,
        tiny_bundle,
        "--task",
        tmp_path / "tiny.jsonl",
        "--parity",
        "--out",
        out,
    )
    done = call(*arguments, "--variants", "noise-1,wording", "--max-new-tokens", "3", "--threads", "1")
    assert done.stdout.splitlines() == [str(out / "eval.json"), str(out / "parity.json")]
    for text in ("score under each variant", "wording-2", "mean of all", "same prompt ids", "only 1 images"):
        assert text in done.stderr, text
    told = json.loads(
        call(*arguments, "--variants", "noise-1,wording", "--max-new-tokens", "3", "--json").stdout
    )
    assert [one["variant"] for one in told["losses"][:4]] == [
        "wording-1",
        "wording-2",
        "noise-1",
        "mean of all",
    ]
    assert told["parity"][0]["preprocessing"]["images_equal"] == 2
