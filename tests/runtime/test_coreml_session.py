"""Core ML bundles in a session, over packages written by hand: no coremltools, no macOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime import bundle, coreml_engine
from runtime.coreml_session import CoremlBackend
from runtime.errors import BundleError
from runtime.generation import GenerationOptions
from runtime.image import ImageFeatures
from runtime.manifest import CoremlFacts, Manifest
from runtime.providers import RunSettings
from runtime.session import open_bundle
from tests.cli import call, refusal
from tests.runtime import coreml_bundle as by_hand
from tests.runtime.coreml_bundle import CHUNK, CONTEXT, HIDDEN

Array = NDArray[Any]
VOCABULARY = 310
COREML_LACKS = coreml_engine.unavailable()
IMAGE = 3  # the id of image tokens in the tiny checkpoint


@pytest.fixture(scope="module")
def directory(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_hand.write_bundle(tiny_bundle, tmp_path_factory.mktemp("coreml") / "by-hand")


@pytest.fixture(scope="module")
def conv_directory(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_hand.write_bundle(tiny_bundle, tmp_path_factory.mktemp("coreml") / "conv", conv=True)


@pytest.fixture(scope="module")
def stack_directory(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_hand.write_bundle(tiny_bundle, tmp_path_factory.mktemp("coreml") / "stack", layers=2)


def backend_of(path: Path, providers: tuple[str, ...] = ("evaluator",)) -> CoremlBackend:
    return CoremlBackend(path, bundle.read(path), RunSettings(providers=providers))


@pytest.fixture(scope="module")
def backend(directory: Path) -> CoremlBackend:
    return backend_of(directory)


@pytest.fixture(scope="module")
def conv(conv_directory: Path) -> CoremlBackend:
    return backend_of(conv_directory)


def logits_of(total: Array) -> Array:
    return (by_hand.head(VOCABULARY).astype(np.float32) @ total).astype(np.float32)


def text(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(4, VOCABULARY, count)


def places(first: int, count: int) -> Array:
    return np.arange(first, first + count)[None]


def wanted(ids: Array, positions: Array | None = None) -> Array:
    where = np.arange(len(ids)) if positions is None else positions
    return logits_of(by_hand.expected(by_hand.table(VOCABULARY)[ids].astype(np.float32), where))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 2 * CHUNK + 1), min_size=1, max_size=6), st.integers(0, 50))
def test_any_split_gives_the_whole(backend: CoremlBackend, sizes: list[int], seed: int) -> None:
    while sum(sizes) > CONTEXT:
        sizes.pop()
    ids = text(sum(sizes), seed)
    backend.rewind(0)
    found, first = np.zeros(0), 0
    for size in sizes:
        found = backend.extend(ids[first : first + size], places(first, size), ())
        first += size
    np.testing.assert_array_equal(found, wanted(ids))


def test_the_whole_context_can_be_filled(backend: CoremlBackend) -> None:
    ids = text(CONTEXT)
    backend.rewind(0)
    assert list(backend._sizes(CONTEXT))[-3:] == [CHUNK, 1, 1], "a padded chunk would reach beyond"
    positions = places(0, CONTEXT) % 7  # float16 would not hold larger sums exactly
    np.testing.assert_array_equal(backend.extend(ids, positions, ()), wanted(ids, positions[0]))


def test_what_was_forgotten_leaves_no_trace(backend: CoremlBackend) -> None:
    first, second = text(11, 1), text(6, 2)
    backend.rewind(0)
    backend.extend(first, places(0, 11), ())
    assert backend.rewind(20) == 11 and backend.rewind(5) == 5
    found = backend.extend(second, places(5, 6), ())
    np.testing.assert_array_equal(found, wanted(np.concatenate([first[:5], second])))
    assert backend.rewindable and backend.rewind(0) == 0


def test_positions_are_those_given(backend: CoremlBackend) -> None:
    ids = text(6)
    backend.rewind(0)
    positions = np.array([[3, 3, 7, 1, 0, 9]])
    np.testing.assert_array_equal(backend.extend(ids, positions, ()), wanted(ids, positions[0]))


def test_image_features_stand_at_image_tokens(stack_directory: Path) -> None:
    backend = backend_of(stack_directory)
    ids = text(CHUNK * 3)
    spots = [1, 2, 5, 9, 10]
    ids[spots] = IMAGE
    random = np.random.default_rng(5)
    features = random.integers(-2, 3, (5, HIDDEN)).astype(np.float32)
    stack = random.integers(-2, 3, (2, 5, HIDDEN)).astype(np.float32)
    pictures = [
        ImageFeatures(features[:3], ((1, 3),), stack[:, :3]),
        ImageFeatures(features[3:], ((1, 2),), stack[:, 3:]),
    ]
    embeds = by_hand.table(VOCABULARY)[ids].astype(np.float32)
    embeds[spots] = features
    dense = np.zeros((2, len(ids), HIDDEN), np.float32)
    dense[:, spots] = stack
    positions = places(0, len(ids))
    total = by_hand.expected(embeds + dense.sum(axis=0), positions[0])
    np.testing.assert_array_equal(backend.extend(ids, positions, pictures), logits_of(total))


def test_an_image_token_that_was_generated_is_text(backend: CoremlBackend) -> None:
    ids = np.array([IMAGE])
    backend.rewind(0)
    np.testing.assert_array_equal(backend.extend(ids, places(0, 1), ()), wanted(ids))


# --- a state that cannot go back --------------------------------------


def conv_wanted(ids: Array) -> Array:
    embeds = by_hand.table(VOCABULARY)[ids].astype(np.float32)
    return logits_of(by_hand.expected(embeds, np.arange(len(ids))) + len(ids))


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_a_convolution_sees_no_padding(conv: CoremlBackend, count: int) -> None:
    ids = text(count)
    conv.rewind(0)
    np.testing.assert_array_equal(conv.extend(ids, places(0, count), ()), conv_wanted(ids))


def test_a_convolution_takes_the_end_of_a_prompt_as_one_chunk(conv: CoremlBackend) -> None:
    """Token by token, a prompt's last half chunk would cost as many runs as it has tokens."""
    conv.rewind(0)
    assert list(conv._sizes(2 * CHUNK - 1)) == [CHUNK, CHUNK - 1]
    ids = text(CHUNK + 5)
    conv.extend(ids[: CHUNK - 1], places(0, CHUNK - 1), ())  # padded, and more behind it
    found = conv.extend(ids[CHUNK - 1 :], places(CHUNK - 1, 6), ())
    np.testing.assert_array_equal(found, conv_wanted(ids))


def test_a_convolution_goes_back_to_marks(conv: CoremlBackend) -> None:
    ids = text(12)
    assert not conv.rewindable
    conv.rewind(0)
    conv.mark()  # nothing to keep at the start
    conv.extend(ids[:5], places(0, 5), ())
    conv.mark()
    conv.extend(ids[5:9], places(5, 4), ())
    conv.mark()
    conv.extend(ids[9:], places(9, 3), ())
    assert conv.rewind(8) == 5
    np.testing.assert_array_equal(conv.extend(ids[5:7], places(5, 2), ()), conv_wanted(ids[:7]))
    assert conv.rewind(6) == 5 and conv.rewind(4) == 0
    np.testing.assert_array_equal(conv.extend(ids[:2], places(0, 2), ()), conv_wanted(ids[:2]))


# --- the whole session ------------------------------------------------


def test_a_session_says_that_it_is_evaluated(directory: Path) -> None:
    with open_bundle(directory, providers=("ALL",) if COREML_LACKS else ("evaluator",)) as session:
        reports = {report.name: report for report in session.providers}
        assert session.emulated == "evaluated with numpy: numerics only, not device speed"
        assert session.kv_bytes == CONTEXT * HIDDEN * 2
    if COREML_LACKS:
        assert reports["ALL"].reason == COREML_LACKS
    assert reports["evaluator"].roles == ("vision_encoder", "embed_tokens", "decoder")


def test_providers_are_compute_units(directory: Path) -> None:
    asked = ("evaluator", "CUDAExecutionProvider", "CPU_AND_NE")
    reports = {report.name: report for report in backend_of(directory, providers=asked).providers}
    assert "is no compute unit; there are ALL, CPU_AND_NE" in reports["CUDAExecutionProvider"].reason
    assert reports["evaluator"].used and not reports["CPU_AND_NE"].used


def test_it_answers_about_a_picture(directory: Path) -> None:
    picture = next((directory / "conformance").glob("*.png"))
    found = json.loads(
        call("run", directory, "--image", picture, "--providers", "evaluator", "--json", "a").stdout
    )
    assert found["emulated"].endswith("numerics only, not device speed")
    with open_bundle(directory, providers=("evaluator",)) as session:
        prepared = session.prepare(picture)
        features = session.encode_image(prepared)
        assert features.tokens.shape == (16, HIDDEN)
        assert set(np.unique(features.tokens)) <= {0.0, 1.0}
        pixels = prepared.views[0].inputs["pixel_values"].reshape(16, -1)[:, :HIDDEN]
        np.testing.assert_array_equal(features.tokens, (pixels.astype(np.float16) > 0).astype(np.float32))


@pytest.mark.skipif(not COREML_LACKS, reason="Core ML runs it here")
def test_doctor_names_what_does_not_conform(directory: Path) -> None:
    """The vectors are another model's: pixels and ids agree, logits cannot."""
    result = call("doctor", directory, "--json", code=2)
    differences = json.loads(result.stdout)["bundle"]["differences"]
    assert differences and all("logit" in line or "top" in line for line in differences)


def test_rows_are_refused(backend: CoremlBackend) -> None:
    with pytest.raises(BundleError, match="the state of an ML program holds one sequence; ask one by one"):
        backend.rows(2, 10)


def test_a_batch_runs_one_by_one(directory: Path) -> None:
    picture, options = next((directory / "conformance").glob("*.png")), GenerationOptions(max_new_tokens=2)
    with open_bundle(directory, providers=("evaluator",)) as session:
        answers = session.ask_batch([(picture, "a"), (picture, "b")], options)
        alone = session.ask(picture, "b", options)
    assert {answer.stats.one_by_one for answer in answers} == {CoremlBackend.no_rows}
    assert answers[1].token_ids == alone.token_ids


# --- what is wrong ----------------------------------------------------


def changed(directory: Path, **change: Any) -> Manifest:
    return Manifest.model_validate({**bundle.read(directory).model_dump(), **change})


def test_a_decoder_input_that_nobody_fills_is_refused(stack_directory: Path) -> None:
    raw = bundle.read(stack_directory).model_dump()
    raw["deepstack"] = None
    raw["requires"] = [name for name in raw["requires"] if name != "deepstack.add@1"]
    manifest = Manifest.model_validate(raw)
    with pytest.raises(BundleError, match="prefill takes deepstack_embeds, which this runtime does not fill"):
        CoremlBackend(stack_directory, manifest, RunSettings())


def test_inputs_that_the_manifest_lacks_are_refused(directory: Path) -> None:
    raw = bundle.read(directory).model_dump()
    raw["parts"][2]["inputs"] = raw["parts"][2]["inputs"][:2]
    with pytest.raises(
        BundleError, match=r"decoder.mlpackage: prefill takes last, start, which the manifest"
    ):
        CoremlBackend(directory, Manifest.model_validate(raw), RunSettings())


def test_a_function_that_is_not_there_is_refused(directory: Path) -> None:
    raw = bundle.read(directory).model_dump()
    raw["coreml"]["functions"]["vision_encoder"] = ["encode"]
    with pytest.raises(BundleError, match=r"vision_encoder.mlpackage: has no function encode, only main"):
        CoremlBackend(directory, Manifest.model_validate(raw), RunSettings())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coreml": None}, "format 'coreml' and coreml do not go together"),
        ({"format": "onnx"}, "format 'onnx' and coreml do not go together"),
        ({"state": []}, "needs states as long as limits.context"),
        ({"parts": []}, "parts must be one each of"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    directory: Path, change: dict[str, Any], words: str
) -> None:
    raw = {**bundle.read(directory).model_dump(), **change}
    if "coreml" in change:
        raw["requires"] = [name for name in raw["requires"] if name != "cache.stateful@1"]
    with pytest.raises(ValueError, match=words):
        Manifest.model_validate(raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"functions": {"embed_tokens": ("decode", "prefill"), "decoder": ("decode",)}},
            "decoder lacks prefill",
        ),
        (
            {"functions": {"embed_tokens": ("decode", "prefill"), "decoder": ("decode", "prefill")}},
            "needs one",
        ),
        ({"chunk": CONTEXT + 1}, "is longer than the context"),
    ],
)
def test_facts_that_cannot_be_are_refused(directory: Path, change: dict[str, Any], words: str) -> None:
    facts = bundle.read(directory).coreml
    assert facts is not None
    with pytest.raises(ValueError, match=words):
        CoremlFacts.model_validate({**facts.model_dump(), **change})


def test_a_bench_of_it_beside_others_is_refused(directory: Path, tiny_bundle: Path) -> None:
    if not COREML_LACKS:
        pytest.skip("Core ML runs it here")
    assert "the times of the evaluator say nothing beside those of others" in refusal(
        "bench", tiny_bundle, directory
    )


@pytest.mark.skipif(not COREML_LACKS, reason="Core ML runs it here")
def test_a_bench_of_it_says_that_its_times_are_no_devices(directory: Path) -> None:
    few = (
        "--rounds",
        "1",
        "--warmup",
        "0",
        "--repeats",
        "1",
        "--tokens",
        "2",
        "--energy",
        "0",
        "--bandwidth",
        "0",
    )
    found = json.loads(call("bench", directory, *few, "--json").stdout)
    assert found["emulated"] is True
    assert found["emulated_why"] == "numpy evaluates the ML programs of by-hand"
    assert {part["unit"] for part in found["bundles"][0]["parts"]} == {"evaluator"}
    assert any("numerics only" in note for note in found["notes"])
