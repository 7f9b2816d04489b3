"""Whole benches of the tiny bundle, in processes of their own; what resumes, what fails, what is imported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.bench import (
    bench_facts,
    bench_grid,
    bench_import,
    bench_process,
    bench_results,
    bench_run,
    emulation,
)
from evals.bench.bench_process import Kept
from evals.bench.bench_results import BenchResults, Policy
from evals.bench.bench_task import Outcome, Task
from runtime import bundle as bundles
from runtime import conformance
from runtime.errors import BundleError, InputError, PocketError
from tests.cli import call
from tests.evals import bench_data

POLICY = Policy(rounds=2, warmup=1, repeats=3, decode_tokens=4, threads=1)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("pair")
    first, second = (Path(shutil.copytree(tiny_bundle, out / name)) for name in ("one", "two"))
    return first, second


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[..., bench_run.Request]:
    def make(paths: tuple[Path, ...], lengths: tuple[int, ...] = (), **changed: Any) -> bench_run.Request:
        image, question = bench_grid.subject(paths[0], None, None)
        grid = bench_grid.grid(paths[0], image, question, [(32, 24)], lengths, tmp_path / "pictures")
        facts = {"policy": POLICY, "bandwidth_s": 0.0, "meter_reason": "no meter in tests", **changed}
        return bench_run.Request(paths, tuple(grid), **facts)

    return make


Make = Callable[..., bench_run.Request]


def test_a_bench_of_two_bundles(pair: tuple[Path, Path], request_of: Make) -> None:
    steps: list[str] = []
    found = bench_run.run(request_of(pair, sustained_s=0.2, energy_s=1.0), progress=steps.append)
    assert [step for step in steps if "round" in step] == [
        "one, round 1 of 2", "two, round 1 of 2", "two, round 2 of 2", "one, round 2 of 2",
    ]  # fmt: skip
    assert [run.order for run in found.bundles[0].points[0].runs] == [0, 3]
    assert found.bandwidth is None and "memory bandwidth" in {reason.what for reason in found.missing}
    (point,) = found.bundles[1].points
    times, memory = point.runs[1].times, point.runs[1].memory
    assert [len(values) for values in (times.preprocess_ms, times.encode_ms, times.ttft_ms)] == [3, 3, 3]
    assert [len(values) for values in times.decode_ms] == [4, 4, 4]
    for first, prepare, encode, prefill, whole in zip(
        times.ttft_ms,
        times.preprocess_ms,
        times.encode_ms,
        times.prefill_ms,
        times.end_to_end_ms,
        strict=True,
    ):
        assert prepare + encode + prefill <= first <= whole  # one pass: the parts are inside the whole
    for decode, first, whole in zip(times.decode_ms, times.ttft_ms, times.end_to_end_ms, strict=True):
        assert sum(decode) < whole and first < whole
    assert point.image_tokens == 16 and point.prompt_tokens > 16
    assert memory is not None and memory.base_rss_mib is not None and memory.peak_rss_mib is not None
    assert memory.load_peak_rss_mib is not None and memory.meter
    assert 10 < memory.base_rss_mib < memory.load_peak_rss_mib <= memory.peak_rss_mib < 1000
    assert point.sustained is not None and (point.sustained.answers or 0) > 1
    assert point.energy is not None and point.energy.why_not == "no meter in tests"
    assert point.runs[0].harness_share is not None and point.runs[0].harness_share < 0.02
    assert {part.role: part.unit for part in found.bundles[0].parts} == dict.fromkeys(
        ("vision_encoder", "embed_tokens", "decoder"), "CPUExecutionProvider"
    )
    assert BenchResults.model_validate_json(bench_results.dumps(found)) == found
    assert {reason.what for reason in found.missing} >= {"energy", "load from cold storage"}


@pytest.mark.slow
def test_memory_is_read_in_a_process_of_its_own() -> None:
    found = bench_process.run(Task(kind="bandwidth", threads=1, seconds=0.01)).bandwidth
    assert found is not None and found.threads == 1 and found.buffer_bytes > 1 << 20


def test_an_answer_that_ends_at_once_is_as_long_as_any(
    tiny_bundle: Path, tmp_path: Path, request_of: Make
) -> None:
    """The bundle's first token is made its stop token; equal work is measured all the same."""
    import runtime

    image, question = bench_grid.subject(tiny_bundle, None, None)
    with runtime.open_bundle(tiny_bundle, threads=1) as session:
        first = session.ask(image, question).token_ids[0]
    short = Path(shutil.copytree(tiny_bundle, tmp_path / "short"))
    manifest = json.loads((short / "manifest.json").read_text())
    manifest["tokenizer"]["stop_ids"] = [first]
    (short / "manifest.json").write_text(json.dumps(manifest))
    with runtime.open_bundle(short, threads=1) as session:
        assert len(session.ask(image, question).token_ids) == 1
    policy = POLICY.model_copy(update={"rounds": 1, "warmup": 0, "repeats": 1})
    found = bench_run.run(request_of((short,), policy=policy))
    assert [len(values) for values in found.bundles[0].points[0].runs[0].times.decode_ms] == [4]


def test_the_measuring_process_loads_no_torch(tiny_bundle: Path) -> None:
    image, question = bench_grid.subject(tiny_bundle, None, None)
    task = Task(kind="latency", bundle=str(tiny_bundle), image=str(image), question=question, threads=1)
    code = (
        "import sys; from evals.bench import bench_child; from evals.bench.bench_task import Task; "
        f"bench_child.run(Task.model_validate_json({task.model_dump_json()!r})); "
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_reach_the_session_and_an_emulated_run_claims_no_speed(
    tiny_bundle: Path, request_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(
        rounds=1,
        warmup=0,
        repeats=1,
        decode_tokens=1,
        threads=1,
        max_context=128,
        providers=("QNNExecutionProvider",),
    )
    monkeypatch.setattr(emulation, "emulated_why", lambda: "qemu-aarch64 runs it")
    found = bench_run.run(request_of((tiny_bundle,), policy=policy, sustained_s=60.0))
    (bundle,) = found.bundles
    assert bundle.max_context == 128 and bundle.state_bytes
    assert {part.unit for part in bundle.parts} == {"CPUExecutionProvider"}
    assert "QNNExecutionProvider: not in this build" in str(bundle.parts[0].unit_note)
    assert found.emulated and found.emulated_why == "qemu-aarch64 runs it"
    assert bundle.points[0].sustained is None and bundle.points[0].roofline is not None
    assert bundle.points[0].roofline.share is None
    assert {reason.what for reason in found.missing} >= {"speed of the device", "sustained run", "energy"}


class Counting:
    """The real process, counted; stops everything at call `stop_at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.calls, self.stop_at, self._run = 0, stop_at, bench_process.run
        monkeypatch.setattr(bench_process, "run", self)

    def __call__(self, task: Task, *arguments: Any) -> Outcome:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return self._run(task, *arguments)


def test_an_interrupted_bench_goes_on(
    pair: tuple[Path, Path], request_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, request = tmp_path / "kept", request_of(pair)
    stopped = Counting(monkeypatch, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        bench_run.run(request, kept)
    monkeypatch.undo()
    shards = sorted(kept.iterdir())
    assert len(shards) == 2 and stopped.calls == 3
    before = {shard: shard.read_text() for shard in shards}
    shards[0].write_text("half a sha")  # a damaged one is measured again
    rest = Counting(monkeypatch)
    found = bench_run.run(request, kept)
    assert rest.calls == 3
    intact = json.loads(before[shards[1]].splitlines()[0])["times"]["ttft_ms"]
    runs = [run for bundle in found.bundles for run in bundle.points[0].runs]
    assert intact in [list(run.times.ttft_ms) for run in runs]


def test_another_question_or_bundle_takes_nothing_from_an_interrupted_bench(
    pair: tuple[Path, Path], request_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    policy = POLICY.model_copy(update={"rounds": 1, "warmup": 0, "repeats": 1})
    with pytest.raises(KeyboardInterrupt):
        Counting(monkeypatch, stop_at=2)
        bench_run.run(request_of(pair, policy=policy), kept)
    monkeypatch.undo()
    counting = Counting(monkeypatch)
    bench_run.run(request_of(pair[:1], (4,), policy=policy), kept)
    assert counting.calls == 1


def test_a_point_that_is_too_long_is_missing_and_the_others_are_measured(
    tiny_bundle: Path, request_of: Make
) -> None:
    policy = POLICY.model_copy(update={"rounds": 2, "warmup": 0, "repeats": 1})
    found = bench_run.run(request_of((tiny_bundle,), (4, 500), policy=policy))
    (bundle,) = found.bundles
    assert [point.point for point in bundle.points] == ["32x24, 4-tokens"]
    (reason,) = bundle.missing
    assert reason.what == "32x24, 500-tokens" and "256 are available" in reason.why
    with pytest.raises(PocketError, match="256 are available"):
        bench_run.run(request_of((tiny_bundle,), (500,), policy=policy))


def test_a_killed_or_endless_process_is_told(tiny_bundle: Path) -> None:
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, stderr="")
    assert bench_process._reason(killed) == "killed by SIGKILL; the system may have run out of memory"
    assert bench_process._reason(subprocess.CompletedProcess([], 3, stderr="")) == "exit code 3"
    task = Task(kind="latency", bundle=str(tiny_bundle), threads=1)
    with pytest.raises(PocketError, match="took more than 0 s"):
        bench_process.run(task, longest_s=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_killed_bench_takes_its_process_with_it(tiny_bundle: Path) -> None:
    image, question = bench_grid.subject(tiny_bundle, None, None)
    task = Task(
        kind="sustained", bundle=str(tiny_bundle), image=str(image), question=question, threads=1, seconds=300
    )
    code = (
        "import subprocess; from evals.bench import bench_process; from evals.bench.bench_task import Task; "
        "start = subprocess.Popen.__init__\n"
        "def told(self, *a, **k):\n    start(self, *a, **k); print(self.pid, flush=True)\n"
        "subprocess.Popen.__init__ = told\n"
        f"bench_process.run(Task.model_validate_json({task.model_dump_json()!r}))"
    )
    bench = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert bench.stdout is not None
    child = Path(f"/proc/{int(bench.stdout.readline())}")
    while not _answers(child):
        time.sleep(0.05)
    bench.kill()
    bench.wait()
    for _ in range(200):
        if not child.exists() or (child / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
            return
        time.sleep(0.05)
    pytest.fail("the measuring process goes on")


def _answers(process: Path) -> bool:
    """Whether it has come as far as opening a bundle: onnxruntime is loaded."""
    return "onnxruntime" in (process / "maps").read_text()


def test_what_is_no_task_is_told_by_the_process(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text('{"kind": "sleep"}')
    for arguments in ([], ["task.json", "out.json"]):
        done = subprocess.run(
            [sys.executable, "-m", "evals.bench.bench_child", *arguments],
            capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "out.json").exists()


def test_kept_without_a_directory_keeps_nothing() -> None:
    kept = Kept(None)
    kept.put("key", Outcome())
    assert kept.get("key") is None


# --- facts and grid -----------------------------------------------------------


def test_facts_of_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    (facts,) = bench_facts.read([copy])
    found = facts.result()
    (copy / "notes.txt").write_text("not needed for answering")
    manifest = bundles.read(copy)
    needed = [copy / "manifest.json", copy / manifest.tokenizer.file.path]
    for part in manifest.parts:
        needed += [copy / part.path, *(copy / ref.path for ref in part.data)]
    assert found.download_bytes == sum(path.stat().st_size for path in needed)
    assert found.disk_bytes is not None and found.download_bytes < found.disk_bytes
    assert {part.role: part.bits for part in found.parts} == dict.fromkeys(
        ("vision_encoder", "embed_tokens", "decoder"), 32
    )
    decoder = next(part for part in manifest.parts if part.role == "decoder")
    weights = sum(each.parameters for each in decoder.bits) * 4
    line = facts.roofline(10, state_bytes=2560, max_context=256, last_cache_bytes=1 << 30)
    assert (line.bytes_per_token, line.fits_cache) == (weights + 100, True)
    assert facts.roofline(10, None, None, 100).bytes_per_token == weights
    assert facts.roofline(10, None, None, 100).fits_cache is False


def test_bundles_of_one_name_are_told_apart(tiny_bundle: Path, tmp_path: Path) -> None:
    paths = [Path(shutil.copytree(tiny_bundle, tmp_path / name / "b")) for name in ("old", "new")]
    assert [facts.name for facts in bench_facts.read(paths)] == ["old/b", "new/b"]
    with pytest.raises(InputError, match="called alike"):
        bench_facts.read([paths[0], paths[0]])
    with pytest.raises(InputError, match="got no bundle"):
        bench_facts.read([])
    with pytest.raises(BundleError, match="no manifest"):
        bench_facts.read([tmp_path])


def test_the_grid_is_every_size_with_every_length(tiny_bundle: Path, tmp_path: Path) -> None:
    image, question = bench_grid.subject(tiny_bundle, None, "what is the color of this?")
    found = bench_grid.grid(tiny_bundle, image, question, [(20, 10), (30, 30)], [3, 9], tmp_path)
    assert [asked.point.id for asked in found] == [
        "20x10, 3-tokens", "20x10, 9-tokens", "30x30, 3-tokens", "30x30, 9-tokens",
    ]  # fmt: skip
    tokenizer = bench_grid._tokenizer(tiny_bundle)
    assert [len(tokenizer.encode(asked.point.question).ids) for asked in found] == [3, 9, 3, 9]
    assert found[0].point.question_tokens == 3 and found[0].point.scaled
    assert found[0].image is not None and found[0].image.name.endswith("20x10.png")
    (whole,) = bench_grid.grid(tiny_bundle, image, question, [], [], tmp_path)
    assert whole.image == image and not whole.point.scaled and whole.point.question == question
    with pytest.raises(InputError, match="no token to repeat"):
        bench_grid.question_of(tokenizer, " ", 3)
    again = bench_grid.grid(tiny_bundle, image, question, [(20, 10)], [], tmp_path)
    assert again[0].point.image_sha256 == found[0].point.image_sha256


def test_a_scaled_jpeg_stays_one(tiny_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.jpg")
    (asked,) = bench_grid.grid(tiny_bundle, tmp_path / "photo.jpg", "?", [(20, 20)], [], tmp_path / "out")
    assert asked.image is not None and asked.image.suffix == ".jpg"
    with Image.open(asked.image) as picture:
        assert (picture.format, picture.size) == ("JPEG", (20, 20))


# --- results of other devices ---------------------------------------------------


def stored(path: Path, **changed: Any) -> Path:
    """A file as a phone's harness writes it, without summaries."""
    found = json.loads(bench_results.dumps(bench_data.results((12.5,), source="swift")))
    found["ratios"], found["notes"] = [], []
    found["bundles"][0]["points"][0]["summary"] = None
    found["bundles"][0].update(changed)
    path.write_text(json.dumps(found))
    return path


def test_results_of_a_phone_are_completed_and_joined(tiny_bundle: Path, tmp_path: Path) -> None:
    (facts,) = bench_facts.read([tiny_bundle])
    parts = [{"role": "decoder", "bytes": 0, "unit": "neural engine", "unit_note": "98 % of operations"}]
    path = stored(tmp_path / "phone.json", sha256=facts.sha256, name="on the phone", parts=parts)
    found = bench_import.read(path, [tiny_bundle])
    (bundle,) = found.bundles
    assert bundle.name == tiny_bundle.name and bundle.disk_bytes and bundle.download_bytes and bundle.ceilings
    assert {part.role: part.unit for part in bundle.parts} == {
        "vision_encoder": None, "embed_tokens": None, "decoder": "neural engine",
    }  # fmt: skip
    assert bundle.points[0].summary is not None and bundle.points[0].summary.decode_tok_s == 500
    alone = bench_import.read(path)
    assert alone.bundles[0].name == "on the phone" and alone.bundles[0].points[0].summary is not None


def test_two_phones_of_one_model_get_two_names(tmp_path: Path) -> None:
    """By the verb: the report's own advice for two devices of one name is --device-name."""
    path, out = stored(tmp_path / "phone.json"), tmp_path / "named.json"
    call("bench", "--import", path, "--device-name", "Anna's", "--out", out)
    assert bench_results.read(out).device.name == "Anna's"
    assert bench_import.read(path).device.name != "Anna's"


def test_results_of_another_bundle_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    path = stored(tmp_path / "phone.json", sha256="0" * 64)
    with pytest.raises(InputError, match="holds b0 \\(00000000\\)"):
        bench_import.read(path, [tiny_bundle])
    by_name = stored(tmp_path / "named.json", name=tiny_bundle.name)
    assert bench_import.read(by_name, [tiny_bundle]).bundles[0].sha256 is not None


def test_the_conformance_case_is_the_default_subject(tiny_bundle: Path) -> None:
    case = conformance.read(tiny_bundle)[0]
    assert bench_grid.subject(tiny_bundle, None, None)[1] == case.question
