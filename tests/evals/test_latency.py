from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evals.accuracy import compare_answers, evaluate, split_margins
from evals.bench import latency
from evals.easy_vqa import Question, load
from evals.gather import bundle_record, part_bytes
from evals.records import Latency
from evals.results import Bundle
from runtime import bundle
from runtime.errors import PocketError
from runtime.manifest import FileRef


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
    assert seen == ["fp32, round 1 of 2", "int8, round 1 of 2", "int8, round 2 of 2", "fp32, round 2 of 2"]
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
        assert ratio.reference == "fp32" and ratio.low <= ratio.ratio <= ratio.high


def test_the_childs_error_is_the_users_error(bundles: list[Path], tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_text("no picture")
    with pytest.raises(PocketError, match=r"measuring process failed: .*not an image") as caught:
        latency.measure_all([bundles[0]], picture, "what?", rounds=1, repeats=1, threads=1)
    assert "\n" not in str(caught.value)


def test_one_round_has_no_ratios_and_a_dropped_page_cache_is_said(
    bundles: list[Path], question: Question
) -> None:
    found = latency.measure_all(
        bundles, question.image_path, question.question, rounds=1, warmup=0, repeats=1, threads=1,
        decode_tokens=1, drop_cache=True,
    )  # fmt: skip
    assert [one.ratios for one in found] == [[], []]
    assert found[0].latency.page_cache == "dropped"


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


def test_a_part_has_the_bytes_of_its_data_files_and_shared_ones_count_once(tiny_bundle: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    refs = [FileRef(path=f"onnx/{name}", sha256="0" * 64, bytes=size) for name, size in (("a", 5), ("b", 7))]
    vision, embed, decoder = manifest.parts
    parts = (
        vision.model_copy(update={"data": (refs[0],)}),
        embed.model_copy(update={"data": tuple(refs)}),
        decoder,
    )
    found = part_bytes(manifest.model_copy(update={"parts": parts}))
    assert found == [vision.bytes + 5, embed.bytes + 7, decoder.bytes]


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
