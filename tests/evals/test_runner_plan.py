"""What a native runner is told, and what is made of what it prints. No runner runs here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.bench import bench_grid
from evals.remote import runner_output, runner_plan
from evals.remote.runner_output import Said, Timed
from evals.remote.runner_plan import Case, Policy
from runtime import bundle, open_bundle
from runtime.errors import InputError
from runtime.generation import GenerationOptions
from runtime.manifest import Manifest

POLICY = Policy(warmup=1, repeats=2, decode_tokens=4, threads=1)


@pytest.fixture(scope="module")
def case(tiny_bundle: Path) -> Case:
    image, question = bench_grid.subject(tiny_bundle, None, None)
    return runner_plan.make(tiny_bundle, image, question, POLICY)


def lines_of(case: Case, key: str) -> list[list[str]]:
    return [line.split()[1:] for line in case.plan.splitlines() if line.split()[0] == key]


# --- the plan -------------------------------------------------------------


def test_the_plan_holds_what_the_session_feeds(case: Case, tiny_bundle: Path) -> None:
    image, question = bench_grid.subject(tiny_bundle, None, None)
    with open_bundle(tiny_bundle) as session:
        picture = session.prepare(image)
        ids = session.prompt_ids(question, [picture])
        positions = session.positions(ids, [picture])
        context = session.max_context
    ((count, ids_file),) = lines_of(case, "ids")
    assert int(count) == len(ids) == case.prompt_tokens
    assert case.files[ids_file] == ids.astype("<i8").tobytes()
    ((rows, _, positions_file),) = lines_of(case, "positions")
    assert int(rows) == len(positions) and case.files[positions_file] == positions.astype("<i8").tobytes()
    assert lines_of(case, "next_position") == [[str(len(ids))]]
    ((name, dtype, *sizes, pixels_file),) = lines_of(case, "input")
    pixels = picture.views[0].inputs[name]
    assert (dtype, sizes) == ("float32", ["4", *map(str, pixels.shape)])
    assert case.files[pixels_file] == pixels.astype("<f4").tobytes()
    assert lines_of(case, "context") == [[str(context)]]
    assert lines_of(case, "tokens") == [["5"]]


def test_the_plan_names_parts_and_states(case: Case, tiny_bundle: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    parts = dict(lines_of(case, "part"))
    assert parts == {part.role: f"bundle/{part.path}" for part in manifest.parts}
    assert set(case.parts) == set(parts.values())
    states = lines_of(case, "state")
    assert [(one[0], one[1]) for one in states] == [(one.input, one.output) for one in manifest.state]
    assert states[0][4:] == ["4", *map(str, manifest.state[0].sizes(case.max_context))]


def test_the_case_holds_the_sessions_answer(case: Case, tiny_bundle: Path) -> None:
    image, question = bench_grid.subject(tiny_bundle, None, None)
    options = GenerationOptions(max_new_tokens=5, ignore_stop=True)
    with open_bundle(tiny_bundle) as session:
        assert case.tokens == tuple(session.ask(image, question, options).token_ids)
    assert int(np.argmax(case.logits)) == case.tokens[0]


def test_an_answer_that_does_not_fit(tiny_bundle: Path) -> None:
    image, question = bench_grid.subject(tiny_bundle, None, None)
    with pytest.raises(InputError, match="tokens"):
        runner_plan.make(tiny_bundle, image, question, replace(POLICY, decode_tokens=100_000))


def changed(manifest: Manifest, role: str, kind: str, name: str, **change: object) -> Manifest:
    """With one tensor of a part changed."""
    part = manifest.part(role)
    specs = tuple(one.model_copy(update=change) if one.name == name else one for one in getattr(part, kind))
    parts = tuple(part.model_copy(update={kind: specs}) if one is part else one for one in manifest.parts)
    return manifest.model_copy(update={"parts": parts})


def test_what_no_runner_runs(tiny_bundle: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    assert runner_plan.refusal(manifest) == ""
    swapped = manifest.state[0].model_copy(update={"in_place": False})
    decoder = manifest.part("decoder")
    no_keep = decoder.model_copy(
        update={"inputs": tuple(one for one in decoder.inputs if one.name != "num_logits_to_keep")}
    )
    for found, words in (
        (
            manifest.model_copy(update={"format": "coreml"}),
            "is coreml; a phone behind adb runs onnx and gguf",
        ),
        (manifest.model_copy(update={"static": object()}), "graphs of fixed shapes"),
        (manifest.model_copy(update={"state": (swapped,)}), "cannot lie in place"),
        (
            manifest.model_copy(
                update={"parts": tuple(no_keep if one is decoder else one for one in manifest.parts)}
            ),
            "logits of all tokens",
        ),
        (changed(manifest, "embed_tokens", "outputs", "inputs_embeds", dtype="float16"), "inputs_embeds"),
        (changed(manifest, "decoder", "inputs", "attention_mask", dtype="int32"), "attention_mask"),
        (changed(manifest, "decoder", "outputs", "logits", dtype="float16"), "logits"),
    ):
        assert words in runner_plan.refusal(found)


# --- what it prints -------------------------------------------------------

SAID = """\
program gguf-runner
load_ms 26.75
load_peak_kib 20480
logits 7 3.5 9 -3.25
answer encode_ms 4.5 prefill_ms 6.25 first_ms 11 total_ms 13.5
decode_ms 1.25 1.5
tokens 7 9 7
peak_kib 30720
done
"""


def test_output() -> None:
    assert runner_output.read(SAID) == Said(
        program="gguf-runner",
        load_ms=26.75,
        load_peak_kib=20480,
        peak_kib=30720,
        logits={7: 3.5, 9: -3.25},
        answers=(Timed(4.5, 6.25, 11.0, 13.5, (1.25, 1.5), (7, 9, 7)),),
    )
    found = runner_output.hello(
        "WARNING: linker: ...\npocketvlm-runner 1 llama.cpp llama-cpp-python 0.3.36\n"
    )
    assert found == (1, "llama.cpp", "llama-cpp-python 0.3.36")


@pytest.mark.parametrize("end", range(0, len(SAID) - 5, 7))
def test_output_that_ends_early_is_none(end: int) -> None:
    assert runner_output.read(SAID[:end]) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [("load_ms 26.75", "load_ms soon"), ("9 -3.25", "9"), ("tokens 7 9 7", "tokens 7 x 7"), ("program", "p")],
)
def test_output_of_another_kind_is_none(old: str, new: str) -> None:
    assert runner_output.read(SAID.replace(old, new)) is None


@given(
    st.lists(
        st.sampled_from([*SAID.splitlines(), "decode_ms nan", "logits", "load_ms -1", "logits 7", "done "])
        | st.text(max_size=20)
    )
)
def test_no_output_breaks_the_reader(lines: list[str]) -> None:
    found = runner_output.read("\n".join(lines))
    assert found is None or (found.answers and found.logits and found.load_ms >= 0)
    runner_output.hello("\n".join(lines))


def test_agreement(case: Case) -> None:
    said = runner_output.read(SAID)
    assert said is not None
    logits = {i: float(case.logits[i]) for i in (1, 2)}
    answer = replace(said.answers[0], tokens=case.tokens)
    same = replace(said, logits=logits, answers=(answer, answer))
    assert runner_output.agreement(case, [same]).startswith("answers: 2 of 2 have the 5 tokens")
    other = replace(answer, tokens=(*case.tokens[:3], case.tokens[3] + 1, case.tokens[4]))
    text = runner_output.agreement(case, [replace(same, answers=(answer, other))])
    assert text.startswith("answers: 1 of 2 have the 5 tokens") and "leaves them at token 4; " in text
    assert "within" in text
    far = replace(same, logits={1: logits[1] + 2 * case.logit_tolerance})
    strange = replace(same, logits={len(case.logits): 0.0})
    nothing = replace(same, logits={1: float("nan")})
    for odd in (far, strange, nothing):
        assert "more than the" in runner_output.agreement(case, [odd])
