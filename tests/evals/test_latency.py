from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evals import device, latency
from evals.accuracy import compare_answers, evaluate, split_margins
from evals.easy_vqa import Question, load
from evals.gather import bundle_record
from evals.records import Latency
from evals.results import Bundle
from runtime.errors import PocketError


@pytest.fixture(scope="module")
def question() -> Question:
    return load("test")[0]


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from export import export_checkpoint

    out = tmp_path_factory.mktemp("bundles")
    shutil.copytree(tiny_bundle, out / "fp32")
    return [out / "fp32", export_checkpoint(tiny_checkpoint, out / "int8", precision="int8")]


@pytest.fixture(scope="module")
def measured(bundles: list[Path], question: Question) -> list[latency.Measured]:
    seen: list[str] = []
    found = latency.measure_all(
        bundles, question.image_path, question.question, rounds=2, warmup=1, repeats=3, threads=1,
        decode_tokens=4, progress=seen.append,
    )  # fmt: skip
    assert seen == ["fp32, round 1 of 2", "int8, round 1 of 2", "fp32, round 2 of 2", "int8, round 2 of 2"]
    return found


def test_every_stage_is_measured_in_fresh_processes(
    measured: list[latency.Measured], bundles: list[Path]
) -> None:
    first = measured[0].latency
    assert (first.threads, first.rounds, first.warmup, first.repeats, first.decode_tokens) == (1, 2, 1, 3, 4)
    counts = {name: getattr(first, name).n for name in Latency.model_fields if name.endswith("_ms")}
    assert counts == {
        "load_cold_ms": 2, "load_warm_ms": 6, "preprocess_ms": 6, "encode_ms": 6, "prefill_ms": 6,
        "ttft_ms": 6, "decode_ms": 24, "end_to_end_ms": 6,
    }  # fmt: skip
    assert first.image_tokens == 16 and first.prompt_tokens > 16
    assert first.prefill_tok_s == pytest.approx(1000 * first.prompt_tokens / first.prefill_ms.p50)
    assert first.decode_tok_s == pytest.approx(1000 / first.decode_ms.p50)
    assert 10 < first.base_rss_mib < first.peak_rss_mib < 1000
    assert first.disk_bytes == sum(f.stat().st_size for f in bundles[0].rglob("*") if f.is_file())
    assert first.page_cache == "warm" and first.device.packages["onnxruntime"]


def test_ratios_are_to_the_first_bundle(measured: list[latency.Measured]) -> None:
    assert measured[0].ratios == []
    assert [ratio.metric for ratio in measured[1].ratios] == list(latency.RATIOS)
    for ratio in measured[1].ratios:
        before, after = (getattr(one.latency, ratio.metric).p50 for one in measured)
        assert ratio.reference == "fp32" and ratio.low <= ratio.high
        assert ratio.ratio == pytest.approx(after / before)


def test_the_measuring_process_loads_no_torch(bundles: list[Path], question: Question) -> None:
    code = (
        "import sys; from pathlib import Path; from evals.latency import Plan, sample; "
        f"sample(Path({str(bundles[0])!r}), Path({str(question.image_path)!r}), 'what?', "
        "Plan(threads=1, warmup=0, repeats=1, decode_tokens=1)); "
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'jinja2') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


def test_a_dropped_page_cache_is_said(bundles: list[Path], question: Question) -> None:
    found = latency.measure(
        bundles[0], question.image_path, question.question, warmup=0, repeats=1, threads=1, decode_tokens=1,
        drop_cache=True,
    )  # fmt: skip
    assert found.page_cache == "dropped"


def test_the_childs_error_is_the_users_error(tmp_path: Path, question: Question) -> None:
    with pytest.raises(PocketError, match=r"measuring process failed: .*no manifest\.json") as caught:
        latency.measure(tmp_path, question.image_path, "what?", repeats=1)
    assert "\n" not in str(caught.value)


def test_nothing_to_measure_is_refused(question: Question) -> None:
    with pytest.raises(ValueError, match="0 bundles, 3 rounds"):
        latency.measure_all([], question.image_path, "what?")
    with pytest.raises(ValueError, match="repeats"):
        latency.measure_all([Path("none")], question.image_path, "what?", repeats=0)


def test_a_bundle_becomes_a_record(bundles: list[Path], measured: list[latency.Measured]) -> None:
    record = bundle_record(bundles[1], student="S", method="masters", measured=measured[1])
    assert Bundle.model_validate(record.model_dump()) == record
    assert (record.name, record.precision, record.format) == ("int8", "int8", "onnx")
    assert record.bytes == measured[1].latency.disk_bytes and record.ratios == measured[1].ratios
    assert record.parity is not None and record.parity.passed and record.parity.positions > 0
    bits = {part.name: part.bits for part in record.parts}
    assert 8 <= bits["decoder"] < 16 and set(bits) == {"vision_encoder", "embed_tokens", "decoder"}


def test_the_exported_bundle_answers_as_its_checkpoint(bundles: list[Path], tiny_checkpoint: Path) -> None:
    import runtime
    from evals.torch_session import TorchSession
    from runtime import GenerationOptions

    items, short = load("test")[:8], GenerationOptions(max_new_tokens=6)
    with TorchSession(tiny_checkpoint) as reference:
        expected = evaluate(reference, items, options=short)
        results = []
        for path in bundles:
            with runtime.open_bundle(path, threads=1) as session:
                results.append(evaluate(session, items, options=short))
        margins = split_margins(reference, items, expected, results[1])
    agreement = compare_answers(expected, results[0])
    assert agreement.same == agreement.n == 8
    rough = compare_answers(expected, results[1], margins=margins)
    assert set(margins) <= {flip.id for flip in rough.differing}
    assert all(margin >= 0 for margin in margins.values())


def test_the_device_sheet_reads_what_linux_offers(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel\t\t: 33\nmodel name\t: Chip 5\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal:  2048 kB\n")
    (tmp_path / "proc/self/status").write_text("VmPeak:\t 9 kB\nVmHWM:\t  51200 kB\n")
    governor = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    governor.parent.mkdir(parents=True)
    governor.write_text("powersave\n")
    found = device.describe(["numpy", "no-such-package"], tmp_path / "proc", tmp_path / "sys")
    assert (found.cpu, found.memory_mib, found.governor) == ("Chip 5", 2.0, "powersave")
    assert list(found.packages) == ["numpy"] and found.cores >= 1
    assert device.peak_rss_mib(tmp_path / "proc") == 50.0
    bare = device.describe([], tmp_path, tmp_path)
    assert bare.memory_mib is None and bare.governor is None and bare.cpu
    assert 1 < device.peak_rss_mib(tmp_path) < 100_000
