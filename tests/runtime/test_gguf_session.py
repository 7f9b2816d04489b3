"""Sessions on llama.cpp: choices, cancelling, closing, silence, sleeping threads; the verbs on a bundle."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from export import export_checkpoint
from runtime.choices import log_softmax, spellings
from runtime.errors import BundleError, InputError, MissingExtra
from runtime.generation import GenerationOptions
from runtime.gguf_library import load
from runtime.session import Session, open_bundle
from tests import gguf_checkpoints
from tests.cli import ROOT, call, refusal

TOLERANCE = 0.1
"""Nats over a few tokens: keys and values are float16, and one row is summed in another order than many."""

CHOICES = ("red", "blue", "a red circle", "a red square", "no")


@pytest.fixture(scope="module", params=["smolvlm", "qwen3_vl", "lfm2_vl", "gemma3"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Positions of one row, of several, a state that cannot be cut, windows and a picture read both ways."""
    out = tmp_path_factory.mktemp("gguf-session")
    checkpoint = gguf_checkpoints.write(request.param, out / request.param)
    return export_checkpoint(checkpoint, out / "bundle", to="gguf", precision="f32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle for what does not depend on the family."""
    out = tmp_path_factory.mktemp("gguf-plain")
    return export_checkpoint(
        gguf_checkpoints.write("smolvlm", out / "tiny"), out / "bundle", to="gguf", precision="q8_0"
    )


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with open_bundle(bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 255, (72, 96, 3), dtype=np.uint8))


# --- choices ----------------------------------------------------------


def test_choices_have_the_probability_that_a_fresh_prefill_gives(
    session: Session, picture: Image.Image
) -> None:
    answer = session.ask(picture, "what is it?", choices=CHOICES)
    assert answer.text in CHOICES and answer.finish_reason == "stop" and answer.scores is not None
    prepared = session.prepare(picture)
    ids, features = session.prompt_ids("what is it?", [prepared]), [session.encode_image(prepared)]
    for name, found in zip(CHOICES, answer.scores.log_probabilities, strict=True):
        wanted = by_prefill(session, ids, features, name)
        assert any(math.isclose(found, each, abs_tol=TOLERANCE) for each in wanted), (name, found, wanted)
    best = int(np.argmax(answer.scores.log_probabilities))
    assert answer.text == CHOICES[best]


def by_prefill(session: Session, ids: np.ndarray, features: list, name: str) -> list[float]:
    """Log-probabilities of the choice in both spellings, each token behind a prefill of its own."""
    found = []
    for spelling in spellings(session.manifest.prompt, session.tokenizer, [name]):
        total = 0.0
        for count in range(len(spelling[0]) + 1):
            logits = session.prefill(np.concatenate([ids, np.array(spelling[0][:count], np.int64)]), features)
            logs = log_softmax(logits)
            ends = np.logaddexp.reduce(logs[list(session.stop_ids)])
            total += float(logs[spelling[0][count]] if count < len(spelling[0]) else ends)
        found.append(total)
    return found


def test_an_answer_after_choices_is_as_before_them(session: Session, picture: Image.Image) -> None:
    """The tree leaves the sequence at one of the choices; what comes next does not see it."""
    options = GenerationOptions(max_new_tokens=6)
    before = session.ask(picture, "what is it?", options)
    session.ask(picture, "what is it?", choices=CHOICES)
    assert session.ask(picture, "what is it?", options).token_ids == before.token_ids


# --- cancelling, closing ----------------------------------------------


def test_cancelled(session: Session, picture: Image.Image) -> None:
    event = threading.Event()
    event.set()
    assert session.ask(picture, "what?", cancel=event).finish_reason == "cancelled"
    asked = []

    def soon() -> bool:
        asked.append(1)
        return len(asked) > 6

    answer = session.ask(picture, "what?", cancel=soon)
    assert answer.finish_reason in ("cancelled", "stop") and len(answer.token_ids) <= 6
    assert session.ask(picture, "what?", choices=CHOICES, cancel=event).finish_reason == "cancelled"


def test_closed_twice(plain: Path, picture: Image.Image) -> None:
    opened = open_bundle(plain, threads=1)
    backend = opened._backend
    opened.close()
    opened.close()
    assert backend is not None
    backend.close()  # its own, too
    with pytest.raises(InputError, match="closed"):
        opened.ask(picture, "what?")


def test_a_damaged_file_is_told(plain: Path, tmp_path: Path) -> None:
    from runtime.gguf_library import SPEED, TextModel

    damaged = tmp_path / "damaged.gguf"
    source = next(plain.glob("*Q8_0.gguf"))
    damaged.write_bytes(source.read_bytes()[:4096])
    with pytest.raises(BundleError, match=r"damaged\.gguf: llama\.cpp cannot open it"):
        TextModel(damaged, context=64, threads=1, settings=SPEED, spin=False)


def test_a_batch_says_why_it_is_none(plain: Path, picture: Image.Image) -> None:
    with open_bundle(plain, threads=1) as opened:
        alone = opened.ask(picture, "what?", GenerationOptions(max_new_tokens=4))
        found = opened.ask_batch([(picture, "what?"), (picture, "why?")], GenerationOptions(max_new_tokens=4))
    assert found[0].token_ids == alone.token_ids
    assert "one sequence" in found[0].stats.one_by_one


# --- a process of its own ---------------------------------------------

CHILD = """
import os, sys
import runtime
with runtime.open_bundle(sys.argv[1], threads=1, spin={spin}) as session:
    session.ask(sys.argv[2], "what?", choices=["red", "blue"])
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(("spin", "policy"), [(None, "passive 0"), (False, "passive 0"), (True, "None None")])
def test_nothing_is_logged_and_idle_threads_sleep(plain: Path, spin: bool | None, policy: str) -> None:
    picture = next((plain / "conformance").glob("*.png"))
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(spin=spin), plain, picture],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{policy} False\n"


def test_the_binding_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pocketvlm\[gguf\]'"):
        load()


# --- verbs ------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["llama_cpp"] = None
from importlib import util
real = util.find_spec
util.find_spec = lambda name, *more: None if name == "llama_cpp" else real(name, *more)
from pocketvlm import main
sys.argv = ["pocketvlm", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("verb", ["run", "bench", "doctor", "export"])
def test_without_the_binding_a_verb_is_one_line(plain: Path, tmp_path: Path, verb: str) -> None:
    more = {
        "run": [str(plain), "what?"],
        "bench": [str(plain)],
        "doctor": [str(plain)],
        "export": [str(tmp_path), "--to", "gguf", "--out", str(tmp_path / "out")],
    }[verb]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, verb, *more], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install 'pocketvlm[gguf]'" in line


def test_run_doctor_and_bench(plain: Path) -> None:
    image = str(next((plain / "conformance").glob("*.png")))
    found = json.loads(
        call("run", plain, "--image", image, "red?", "--choices", "yes,no", "--threads", "1", "--json").stdout
    )
    assert found["text"] in ("yes", "no")
    assert "context" in call("run", plain, "--image", image, "what?", "-v", "--no-spin").stderr
    assert "conforms" in call("doctor", plain).stdout
    short = ("--rounds", "1", "--repeats", "2", "--warmup", "0", "--tokens", "3", "--threads", "1")
    (point,) = json.loads(call("bench", plain, *short, "--json").stdout)["bundles"][0]["points"]
    assert point["summary"]["ttft_ms"]["n"] == 2 and point["image_tokens"] == 16
    assert "prefill tok/s" in call("bench", plain, *short).stdout


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    assert "no manifest.json" in refusal("bench", tmp_path)
