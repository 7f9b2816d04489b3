"""The session over a real exported bundle: answers, limits, stats, errors."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime import conformance
from runtime.errors import BundleError, InputError, MissingExtra
from runtime.generation import GenerationOptions
from runtime.manifest import Manifest
from runtime.session import Session, open_bundle

QUESTION = "what color is the circle?"
SHORT = GenerationOptions(max_new_tokens=12)


def png(seed: int = 0, size: tuple[int, int] = (64, 64)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).eval()
    return AutoProcessor.from_pretrained(tiny_checkpoint), model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("question", [QUESTION, "is there a red shape?\n"])
def test_answers_as_generate_does(session: Session, reference: Any, seed: int, question: str) -> None:
    processor, model = reference
    image = Image.open(io.BytesIO(png(seed, (100, 60))))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    expected = out[0, inputs["input_ids"].shape[1] :].tolist()
    answer = session.ask(image, question, SHORT)
    assert answer.token_ids == expected
    assert answer.text == processor.decode(expected, skip_special_tokens=True)


def test_three_lines(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png())
    s = runtime.open_bundle(str(tiny_bundle))
    assert s.ask(str(tmp_path / "photo.png"), QUESTION).text


def test_stream_is_the_answer_in_pieces(session: Session) -> None:
    pieces = list(session.stream(png(), QUESTION, SHORT))
    answer = session.ask(png(), QUESTION, SHORT)
    assert len(pieces) > 1
    assert "".join(pieces) == answer.text


def test_stats(session: Session) -> None:
    answer = session.ask(png(), QUESTION, SHORT)
    stats = answer.stats
    assert stats is session.last_stats
    assert stats.image_tokens == session.manifest.image.max_tokens
    assert stats.prompt_tokens == len(session.prompt_ids(QUESTION, [session.prepare(png())]))
    assert stats.new_tokens == len(answer.token_ids) == len(stats.decode_ms) + 1
    assert stats.ttft_ms >= stats.prepare_ms + stats.encode_ms + stats.prefill_ms > 0
    assert stats.decode_tok_s == pytest.approx(len(stats.decode_ms) / sum(stats.decode_ms) * 1e3)
    assert session.load_ms > 0


def test_steps_make_the_answer(session: Session) -> None:
    prepared = session.prepare(png())
    features, ids = session.encode_image(prepared), session.prompt_ids(QUESTION, [prepared])
    tokens = [int(session.prefill(ids, [features]).argmax())]
    while len(tokens) < 12 and tokens[-1] not in session.manifest.tokenizer.stop_ids:
        tokens.append(int(session.decode(tokens[-1]).argmax()))
    assert tokens == session.ask(png(), QUESTION, SHORT).token_ids
    assert tokens == session.complete(ids, [features], SHORT).token_ids


def test_prefill_equals_prefill_and_decode(session: Session) -> None:
    """One graph serves both: the last logits must not depend on how the tokens came."""
    prepared = session.prepare(png())
    features, ids = session.encode_image(prepared), session.prompt_ids(QUESTION, [prepared])
    whole = session.prefill(ids, [features])
    start = len(ids) - 5
    session.prefill(ids[:start], [features])
    for token in ids[start:]:
        logits = session.decode(int(token))
    np.testing.assert_allclose(logits, whole, atol=1e-4)  # float32, another order of summation


def test_logits_do_not_change_after_the_next_step(session: Session) -> None:
    first = session.prefill(session.prompt_ids(QUESTION, []))
    kept = first.copy()
    session.decode(7)
    assert np.array_equal(first, kept)


def test_too_many_pictures_are_refused(session: Session) -> None:
    prepared, most = session.prepare(png()), session.manifest.limits.images
    with pytest.raises(InputError, match=f"has {most + 1} images, this bundle takes {most} at most"):
        session.prompt_ids(QUESTION, [prepared] * (most + 1))


def test_the_picture_matters(session: Session) -> None:
    logits = []
    for seed in (1, 2):
        prepared = session.prepare(png(seed))
        ids = session.prompt_ids(QUESTION, [prepared])
        logits.append(session.prefill(ids, [session.encode_image(prepared)]))
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def with_state(session: Session, directory: Path, in_place: bool) -> Session:
    states = tuple(state.model_copy(update={"in_place": in_place}) for state in session.manifest.state)
    changed: Manifest = session.manifest.model_copy(update={"state": states})
    return Session.from_manifest(directory, changed, threads=1)


def test_state_in_place_equals_state_handed_over(session: Session, tiny_bundle: Path) -> None:
    """Bit for bit, also in a second sequence over the used buffer."""
    random = np.random.default_rng(0)
    with with_state(session, tiny_bundle, True) as here, with_state(session, tiny_bundle, False) as handed:
        for length in (9, 30, 5):
            ids = random.integers(6, 200, length)
            assert np.array_equal(here.prefill(ids), handed.prefill(ids))
            for token in random.integers(6, 200, 40).tolist():
                assert np.array_equal(here.decode(token), handed.decode(token))


# --- ends and limits --------------------------------------------------


def test_finish_reasons(session: Session, tiny_bundle: Path) -> None:
    greedy = session.ask(png(), QUESTION, GenerationOptions(max_new_tokens=6)).token_ids
    assert session.ask(png(), QUESTION, GenerationOptions(max_new_tokens=3)).finish_reason == "length"
    tokenizer = session.manifest.tokenizer.model_copy(update={"stop_ids": (greedy[2],)})
    changed = session.manifest.model_copy(update={"tokenizer": tokenizer})
    with Session.from_manifest(tiny_bundle, changed, threads=1) as stopping:
        answer = stopping.ask(png(), QUESTION, SHORT)
    stop = greedy.index(greedy[2])
    assert (answer.finish_reason, answer.token_ids) == ("stop", greedy[: stop + 1])


def test_the_answer_ends_where_the_context_does(session: Session, tiny_bundle: Path) -> None:
    ids = session.prompt_ids(QUESTION, [])
    limits = session.manifest.limits.model_copy(update={"context": len(ids) + 3})
    tokenizer = session.manifest.tokenizer.model_copy(update={"stop_ids": (10**6,)})
    changed = session.manifest.model_copy(update={"limits": limits, "tokenizer": tokenizer})
    with Session.from_manifest(tiny_bundle, changed, threads=1) as small:
        answer = small.complete(ids)
        assert (answer.finish_reason, len(answer.token_ids)) == ("context", 4)
        with pytest.raises(InputError, match=f"needs {len(ids) + 4} tokens, {len(ids) + 3} are available"):
            small.decode(7)


def test_a_prompt_that_is_too_long(session: Session) -> None:
    context = session.manifest.limits.context
    with pytest.raises(InputError, match=rf"prompt: needs \d+ tokens \(16 of .* images\), {context} are"):
        session.ask(png(), "why? " * context)


def test_sampling_repeats_with_its_seed(session: Session) -> None:
    def ask(seed: int) -> list[int]:
        options = GenerationOptions(max_new_tokens=16, temperature=1.5, seed=seed)
        return session.ask(png(), QUESTION, options).token_ids

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


# --- misuse -----------------------------------------------------------


def test_an_image_is_needed_where_the_manifest_says_so(session: Session, tiny_bundle: Path) -> None:
    prompt = session.manifest.prompt.model_copy(update={"user_without_image": None})
    changed = session.manifest.model_copy(update={"prompt": prompt})
    with (
        Session.from_manifest(tiny_bundle, changed, threads=1) as strict,
        pytest.raises(InputError, match="add an image"),
    ):
        strict.ask(None, QUESTION)


def test_features_must_fit_the_prompt(session: Session) -> None:
    ids = session.prompt_ids(QUESTION, [session.prepare(png())])
    with pytest.raises(InputError, match=r"has 16 image tokens, got 0"):
        session.prefill(ids)


def test_decode_before_prefill(tiny_bundle: Path) -> None:
    with open_bundle(tiny_bundle, threads=1) as fresh, pytest.raises(InputError, match="call prefill first"):
        fresh.decode(7)


def test_a_closed_session(tiny_bundle: Path) -> None:
    closed = open_bundle(tiny_bundle, threads=1)
    closed.close()
    closed.close()
    with pytest.raises(InputError, match="is closed"):
        closed.ask(png(), QUESTION)


def test_no_threads(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="threads: got 0"):
        open_bundle(tiny_bundle, threads=0)


def test_missing_onnxruntime_names_the_command(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pocketvlm\[onnx\]'"):
        open_bundle(tiny_bundle)


def test_a_part_that_is_no_graph(bundle_copy: Path) -> None:
    (bundle_copy / "onnx" / "vision_encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"tiny/onnx/vision_encoder\.onnx: onnxruntime .* cannot open it"):
        open_bundle(bundle_copy, verify=False)


@pytest.mark.parametrize(("here", "opens"), [("1.26.0", False), ("1.27.0+cu126", True), ("2.0", True)])
def test_a_part_for_a_newer_onnxruntime(
    session: Session, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, here: str, opens: bool
) -> None:
    """An int8 cache fails in the first step there, or with a word on a graph's inputs: neither says why."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "__version__", here)
    parts = list(session.manifest.parts)
    facts = parts[-1].onnx.model_copy(update={"min_onnxruntime": "1.27"})
    parts[-1] = parts[-1].model_copy(update={"onnx": facts})
    changed = session.manifest.model_copy(update={"parts": tuple(parts)})
    if opens:
        Session.from_manifest(tiny_bundle, changed).close()
        return
    with pytest.raises(BundleError, match=r"wanted onnxruntime 1\.27 or newer, here is 1\.26\.0; update it"):
        Session.from_manifest(tiny_bundle, changed)


def test_a_graph_that_is_not_the_manifests(session: Session, tiny_bundle: Path) -> None:
    parts = list(session.manifest.parts)
    inputs = tuple(spec.model_copy(update={"dtype": "float16"}) for spec in parts[0].inputs)
    parts[0] = parts[0].model_copy(update={"inputs": inputs})
    changed = session.manifest.model_copy(update={"parts": tuple(parts)})
    with pytest.raises(BundleError, match=r"inputs are .* the manifest says"):
        Session.from_manifest(tiny_bundle, changed, threads=1)


# --- conformance ------------------------------------------------------


def test_the_bundle_conforms(session: Session, tiny_bundle: Path) -> None:
    assert conformance.check(session, tiny_bundle) == []


def test_a_reader_that_is_wrong_is_told_so(session: Session, bundle_copy: Path) -> None:
    vector = conformance.record(session, "a", png(), QUESTION)
    moved = (vector.pixels[0] + np.float32(0.5),)
    wrong = dataclasses.replace(vector, pixels=moved, logits=vector.logits + np.float32(0.1))
    shorter = dataclasses.replace(vector, name="b", question="what?")
    conformance.write(bundle_copy, [wrong, shorter], pixels_tolerance=0.1, logit_tolerance=0.01)
    lines = conformance.check(session, bundle_copy)
    assert lines[0].startswith("a: pixels differ by 0.5")
    assert sum("a: logit of id" in line for line in lines) == 5
    assert lines[-1].startswith("b: prompt ids differ")


def test_a_changed_vector_is_refused(session: Session, bundle_copy: Path) -> None:
    picture = sorted((bundle_copy / "conformance").glob("*.png"))[0]
    picture.write_bytes(picture.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="differs from its hash"):
        conformance.check(session, bundle_copy)
