"""Answers from a list, stopped by a text, cancelled, side by side; and how a bundle is run."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import choices, providers
from runtime.errors import BundleError, InputError
from runtime.generation import GenerationOptions
from runtime.manifest import Manifest
from runtime.session import Session, open_bundle
from tests.runtime.test_session import QUESTION, png

SHORT = GenerationOptions(max_new_tokens=8)
COLOURS = ["red", "red circle", "blue", "green shape"]


@pytest.fixture(scope="module")
def ours(tiny_bundle: Path) -> Iterator[Session]:
    with open_bundle(tiny_bundle, threads=1, verify=False) as opened:
        yield opened


# --- choices ----------------------------------------------------------


def teacher_forced(session: Session, tokens: list[int]) -> float:
    """Logarithm of the probability of `tokens` and an end, every prefix in a sequence of its own."""
    prepared = session.prepare(png())
    ids, features = session.prompt_ids(QUESTION, [prepared]), session.encode_image(prepared)
    total = 0.0
    for n in range(len(tokens) + 1):
        logits = session.prefill(np.array([*ids, *tokens[:n]]), [features]).astype(np.float64)
        logs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        total += np.logaddexp.reduce(logs[list(session.stop_ids)]) if n == len(tokens) else logs[tokens[n]]
    return total


def test_scores_are_the_probabilities_of_whole_answers(ours: Session) -> None:
    later = ours.manifest.prompt.later
    assert later is not None
    answer = ours.ask(png(), QUESTION, choices=COLOURS)
    scores = answer.scores
    assert scores is not None
    assert scores.choices == tuple(COLOURS)
    for name, got in zip(COLOURS, scores.log_probabilities, strict=True):
        tokens = ours.tokenizer.encode(later.answer_before + name, add_special_tokens=False).ids
        assert got == pytest.approx(teacher_forced(ours, tokens), abs=1e-4)
    best = int(np.argmax(scores.log_probabilities))
    assert (answer.text, answer.finish_reason) == (COLOURS[best], "stop")
    weights = np.exp(scores.log_probabilities)
    np.testing.assert_allclose(scores.probabilities, weights / weights.sum(), rtol=1e-9)


def test_choices_are_drawn_above_temperature_zero(ours: Session) -> None:
    def pick(seed: int) -> str:
        options = GenerationOptions(temperature=50.0, seed=seed)
        return ours.ask(png(), QUESTION, options, choices=COLOURS).text

    assert len({pick(seed) for seed in range(12)}) > 1
    assert pick(3) == pick(3)
    counts = Counter(choices.draw(np.log([0.5, 0.3, 0.2]), 1.0, seed) for seed in range(2000))
    np.testing.assert_allclose([counts[i] / 2000 for i in range(3)], [0.5, 0.3, 0.2], atol=0.05)


def test_without_a_known_spelling_the_model_decides(session: Session, tiny_bundle: Path) -> None:
    spec = session.manifest.prompt.model_copy(update={"later": None})
    changed = session.manifest.model_copy(update={"prompt": spec})
    with Session.from_manifest(tiny_bundle, changed, threads=1) as single:
        answer = single.ask(png(), QUESTION, choices=COLOURS)
        bare, blank = (
            [single.tokenizer.encode(lead + name, add_special_tokens=False).ids for name in COLOURS]
            for lead in ("", " ")
        )
        logits = single.prefill(
            single.prompt_ids(QUESTION, [prepared := single.prepare(png())]), [single.encode_image(prepared)]
        ).astype(np.float64)
        mass = [np.exp(logits[sorted({ids[0] for ids in each})]).sum() for each in (bare, blank)]
        wanted = bare if mass[0] >= mass[1] else blank
        assert answer.token_ids == wanted[COLOURS.index(answer.text)]


def test_a_choice_is_tokenised_with_the_opening_it_follows(ours: Session) -> None:
    tokenizer = ours.tokenizer
    opening = tokenizer.encode("Assistant:", add_special_tokens=False).ids
    whole = tokenizer.encode("Assistant: red", add_special_tokens=False).ids
    assert choices.spelled(tokenizer, opening, " red") == whole[len(opening) :]
    merging = [
        (head, text[cut:])
        for text in ("circle", "shape", "yellow", "image")
        for cut in range(1, len(text))
        if ids_of(ours, text)[: len(head := ids_of(ours, text[:cut]))] != head
    ]
    assert merging
    for head, rest in merging:  # the opening's ids are fixed: what would merge with them stands alone
        assert choices.spelled(tokenizer, head, rest) == ids_of(ours, rest)


def ids_of(session: Session, text: str) -> list[int]:
    return list(session.tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "choices: got none"),
        (["red", ""], "choices: '' is empty"),
        (["red", " "], "choices: ' ' is empty"),
        (["red", "blue", "red"], "choices: 'red' and 'red' are the same answer"),
        ("red", "choices: got the text 'red', expected a list"),
        (["red", 3], "choices: got 3, expected texts"),
    ],
)
def test_wrong_choices(ours: Session, given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ours.ask(png(), QUESTION, choices=given)


def test_choices_must_fit_the_context(tiny_bundle: Path, ours: Session) -> None:
    needed = len(ours.prompt_ids(QUESTION, [ours.prepare(png())]))
    with (
        open_bundle(tiny_bundle, threads=1, verify=False, max_context=needed + 1) as small,
        pytest.raises(InputError, match=f"{needed + 1} are available"),
    ):
        small.ask(png(), QUESTION, choices=["a very long choice"])


def test_a_choice_is_part_of_a_conversation(ours: Session) -> None:
    chat = ours.chat(png())
    first = chat.ask(QUESTION, choices=COLOURS)
    chat.ask("and now?", SHORT)
    assert chat.turns[0].answer == tuple(first.token_ids)


# --- stop strings -----------------------------------------------------


def test_nothing_of_a_stop_string_is_streamed(ours: Session) -> None:
    whole = ours.ask(png(), QUESTION, GenerationOptions(max_new_tokens=24))
    text = whole.text
    for first, last in ((3, 5), (5, 11), (1, 2), (8, 16)):
        stop = text[first:last]
        options = GenerationOptions(max_new_tokens=24, stop=(stop, "never there"))
        pieces = list(ours.stream(png(), QUESTION, options))
        answer = ours.last_answer
        assert answer is not None
        assert "".join(pieces) == answer.text == text[: text.index(stop)]
        assert answer.finish_reason == "stop"
        assert whole.token_ids[: len(answer.token_ids)] == answer.token_ids
    same = ours.ask(png(), QUESTION, GenerationOptions(max_new_tokens=24, stop=(text + "more",)))
    assert (same.text, same.finish_reason) == (text, whole.finish_reason)


# --- cancelling -------------------------------------------------------


def after(calls: int) -> Callable[[], bool]:
    """False so often, then true."""
    left = iter([False] * calls)
    return lambda: next(left, True)


def test_an_event_ends_an_answer_between_tokens(ours: Session) -> None:
    event, pieces = threading.Event(), []
    whole = ours.ask(png(), QUESTION, GenerationOptions(max_new_tokens=20))
    for piece in ours.stream(png(), QUESTION, GenerationOptions(max_new_tokens=20), cancel=event):
        pieces.append(piece)
        if len(pieces) == 2:
            event.set()
    answer = ours.last_answer
    assert answer is not None
    assert answer.finish_reason == "cancelled"
    assert answer.text == "".join(pieces)
    assert len(answer.token_ids) < len(whole.token_ids)
    assert whole.token_ids[: len(answer.token_ids)] == answer.token_ids
    assert ours.ask(png(), QUESTION, GenerationOptions(max_new_tokens=20)).token_ids == whole.token_ids


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_it_is_looked_at_before_every_stage(tiny_bundle: Path, calls: int) -> None:
    """Before the picture is prepared, before it is encoded, before the prefill."""
    with open_bundle(tiny_bundle, threads=1, verify=False) as fresh:
        answer = fresh.ask(png(), QUESTION, SHORT, cancel=after(calls))
        assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [], "cancelled")
        assert answer.stats.encoded_images == (calls == 2)
        assert (answer.stats.prepare_ms > 0) == (calls > 0)
        assert answer.stats.prefill_ms == 0
        assert fresh.ask(png(), QUESTION, SHORT).finish_reason != "cancelled"


def test_choices_and_batches_can_be_cancelled(ours: Session) -> None:
    for calls in (0, 3, 4):
        answer = ours.ask(png(), QUESTION, choices=COLOURS, cancel=after(calls))
        assert (answer.finish_reason, answer.scores) == ("cancelled", None)
    found = ours.ask_batch([(png(), QUESTION), (png(1), QUESTION)], SHORT, cancel=lambda: True)
    assert [answer.finish_reason for answer in found] == ["cancelled"] * 2


def test_a_closed_iterator_is_a_cancelled_answer(ours: Session) -> None:
    pieces = ours.stream(png(), QUESTION, GenerationOptions(max_new_tokens=20))
    text = next(pieces)
    pieces.close()
    answer = ours.last_answer
    assert answer is not None
    assert (answer.text, answer.finish_reason) == (text, "cancelled")


# --- batches ----------------------------------------------------------


def test_rows_answer_as_they_do_alone(ours: Session) -> None:
    """Unequal lengths, different pictures, none; more questions than rows; rows that end at other times."""
    questions: list[Any] = [
        (png(1), QUESTION),
        (png(2), "is there a red shape in this very large picture, and if so where is it?"),
        (None, "what?"),
        ([png(3)], "no"),
        (png(1), "is it?"),
    ]
    for options in (SHORT, GenerationOptions(max_new_tokens=12, temperature=1.2, top_k=20, seed=4)):
        alone = [ours.ask(source, question, options) for source, question in questions]
        for rows in (2, 3, 8):
            found = ours.ask_batch(questions, options, rows=rows)
            assert [each.token_ids for each in found] == [each.token_ids for each in alone]
            assert [each.text for each in found] == [each.text for each in alone]
            assert [each.finish_reason for each in found] == [each.finish_reason for each in alone]
        assert [each.stats.batch_rows for each in ours.ask_batch(questions, options, rows=3)] == [
            3,
            3,
            3,
            2,
            2,
        ]
    assert not any(each.stats.one_by_one for each in found)


def test_rows_end_where_each_does(session: Session, tiny_bundle: Path) -> None:
    """One by a stop id, one by its context, while others go on."""
    greedy = session.ask(png(1), QUESTION, SHORT).token_ids
    ended = session.manifest.tokenizer.model_copy(update={"stop_ids": (greedy[1],)})
    changed = session.manifest.model_copy(update={"tokenizer": ended})
    long = "is it red " * 3
    with Session.from_manifest(tiny_bundle, changed, threads=1, max_context=60) as small:
        questions: list[Any] = [(png(1), QUESTION), (png(2), long), (png(3), "a")]
        options = GenerationOptions(max_new_tokens=40)
        alone = [small.ask(*each, options) for each in questions]
        found = small.ask_batch(questions, options)
        assert [each.token_ids for each in found] == [each.token_ids for each in alone]
        assert [each.finish_reason for each in found] == [each.finish_reason for each in alone]
        assert found[0].finish_reason == "stop"
        assert len({len(each.token_ids) for each in found}) > 1


def test_a_batch_leaves_the_running_sequence(ours: Session) -> None:
    ours.ask(png(), QUESTION, SHORT)
    held = ours._sequence.length
    ours.ask_batch([(png(1), QUESTION), (png(2), "why?")], SHORT)
    assert ours._sequence.length == held
    assert ours.ask_batch([], SHORT) == []
    one = ours.ask_batch([(png(), QUESTION)], SHORT)
    assert one[0].stats.one_by_one == "it is one question"
    with pytest.raises(InputError, match="256 are available"):
        ours.ask_batch([(png(), QUESTION), (png(), "why? " * 300)], SHORT)


# --- parts, providers, calls ------------------------------------------


def with_prefill(bundle: Path, manifest: Manifest) -> Manifest:
    """The manifest with a copy of the decoder as the part for prompts."""
    decoder = manifest.part("decoder")
    shutil.copyfile(bundle / decoder.path, bundle / "onnx" / "prefill.onnx")
    part = decoder.model_copy(update={"role": "decoder_prefill", "path": "onnx/prefill.onnx"})
    return Manifest.model_validate({**manifest.model_dump(), "parts": (*manifest.parts, part)})


def test_a_prefill_part_runs_what_has_several_tokens(bundle_copy: Path, session: Session) -> None:
    manifest = with_prefill(bundle_copy, session.manifest)
    with Session.from_manifest(bundle_copy, manifest, threads=1) as two:
        calls = counted(two)
        answer = two.ask(png(), QUESTION, SHORT)
        assert answer.token_ids == session.ask(png(), QUESTION, SHORT).token_ids
        assert calls["decoder_prefill run"] == 1
        assert calls["decoder run"] == len(answer.token_ids) - 1
        chat = two.chat(png())
        assert chat.ask(QUESTION, SHORT).token_ids == answer.token_ids
        chat.ask("and now?", SHORT)
        assert calls["decoder_prefill run"] >= 2


def test_a_prefill_part_must_fit_the_decoder(bundle_copy: Path, session: Session) -> None:
    manifest = with_prefill(bundle_copy, session.manifest)
    parts = list(manifest.parts)
    parts[-1] = parts[-1].model_copy(update={"outputs": parts[-1].outputs[:-1]})
    name = manifest.part("decoder").outputs[-1].name
    with pytest.raises(ValueError, match=f"decoder_prefill has other outputs than decoder: {name}"):
        Manifest.model_validate({**manifest.model_dump(), "parts": tuple(parts)})


def counted(session: Session) -> Counter[str]:
    """What a session's decoder calls from now on: bindings made, values bound, runs."""
    decoder, calls = session._backend._decoder, Counter[str]()  # type: ignore[union-attr]

    class Binding:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            calls[name] += name.startswith("bind")
            return getattr(self.inner, name)

    class Run:
        def __init__(self, role: str, inner: Any) -> None:
            self.role, self.inner = role, inner

        def io_binding(self) -> Any:
            calls["io_binding"] += 1
            return Binding(self.inner.io_binding())

        def run_with_iobinding(self, binding: Any) -> None:
            calls[f"{self.role} run"] += 1
            self.inner.run_with_iobinding(binding.inner)

    decoder._runs = {role: Run(role, inner) for role, inner in decoder._runs.items()}
    decoder._bindings.clear()
    return calls


def test_a_step_binds_its_mask_and_nothing_else(tiny_bundle: Path) -> None:
    with open_bundle(tiny_bundle, threads=1, verify=False) as fresh:
        calls = counted(fresh)
        fresh.prefill(fresh.prompt_ids("what?", []))
        fresh.decode(7)
        before = Counter(calls)
        for token in range(10):
            fresh.decode(token)
        assert calls - before == Counter({"decoder run": 10, "bind_cpu_input": 10})


def test_a_skipped_provider_has_a_reason(tiny_bundle: Path, session: Session) -> None:
    wanted = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    with open_bundle(tiny_bundle, threads=1, verify=False, providers=wanted) as opened:
        *skipped, cpu = opened.providers
        assert [report.name for report in opened.providers] == wanted
        assert cpu.roles == ("vision_encoder", "embed_tokens", "decoder")
        for report in skipped:
            assert not report.used
            assert report.line().startswith(f"{report.name}: skipped (not in this build of onnxruntime 1.")
        assert opened.ask(png(), QUESTION, SHORT).token_ids == session.ask(png(), QUESTION, SHORT).token_ids


def test_a_misspelt_provider_is_told_its_name(tiny_bundle: Path) -> None:
    asked = ["cuda", "QNNExecutionProvidr", "mine"]
    with open_bundle(tiny_bundle, threads=1, verify=False, providers=asked) as opened:
        cuda, qnn, mine, _ = [report.line() for report in opened.providers]
    assert "knows no provider of this name; did you mean CUDAExecutionProvider?)" in cuda
    assert "did you mean QNNExecutionProvider?)" in qnn
    assert mine.endswith("knows no provider of this name)")


def test_a_provider_that_fails_names_the_first_line(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    real = onnxruntime.InferenceSession

    def refusing(path: str, options: Any, providers: list[str], **more: Any) -> Any:
        if "CUDAExecutionProvider" in providers:
            raise RuntimeError("CUDAExecutionProvider: no driver\nsecond line")
        return real(path, options, providers=providers, **more)

    available = onnxruntime.get_available_providers()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *available])
    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)
    with open_bundle(tiny_bundle, threads=1, verify=False, providers=["CUDAExecutionProvider"]) as opened:
        cuda, cpu = opened.providers
        assert not cuda.used
        assert "vision_encoder: CUDAExecutionProvider: no driver" in cuda.reason
        assert "second line" not in cuda.reason
        assert len(cpu.roles) == 3


def test_the_bundles_own_providers_are_the_default(session: Session, tiny_bundle: Path) -> None:
    changed = session.manifest.model_copy(update={"providers": ("CUDAExecutionProvider",)})
    with Session.from_manifest(tiny_bundle, changed, threads=1) as opened:
        assert [report.name for report in opened.providers] == ["CUDAExecutionProvider", providers.CPU]
    with Session.from_manifest(tiny_bundle, changed, threads=1, providers=[]) as opened:
        assert [report.name for report in opened.providers] == [providers.CPU]


def test_thread_settings(tiny_bundle: Path) -> None:
    with open_bundle(tiny_bundle, threads=1, inter_threads=2, spin=False, verify=False) as opened:
        found = opened._backend._embed.get_session_options()  # type: ignore[union-attr]
        assert (found.intra_op_num_threads, found.inter_op_num_threads) == (1, 2)
        for scope in ("intra", "inter"):
            assert found.get_session_config_entry(f"session.{scope}_op.allow_spinning") == "0"
        assert opened.ask(png(), QUESTION, SHORT).text
    with pytest.raises(InputError, match="inter_threads: got 0"):
        open_bundle(tiny_bundle, inter_threads=0, verify=False)


def test_an_input_that_nobody_fills_is_refused(session: Session, tiny_bundle: Path) -> None:
    parts = list(session.manifest.parts)
    place = next(i for i, part in enumerate(parts) if part.role == "decoder")
    odd = parts[place].inputs[0].model_copy(update={"name": "odd"})
    parts[place] = parts[place].model_copy(update={"inputs": (*parts[place].inputs, odd)})
    changed = session.manifest.model_copy(update={"parts": tuple(parts)})
    with pytest.raises(BundleError, match="has inputs odd, which this runtime does not fill"):
        Session.from_manifest(tiny_bundle, changed, threads=1)
