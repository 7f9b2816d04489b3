"""The command line as a user has it: in a process of its own, with its exit codes and its two streams."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomllib
from PIL import Image

import pocketvlm
from runtime import installation
from tests.cli import ROOT, call, refusal

QUESTION = "what color is the circle?"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.radial_gradient("L").convert("RGB").save(path)
    return path


def test_run_streams_the_answer_and_times_it(tiny_bundle: Path, photo: Path, session: Any) -> None:
    done = call("run", tiny_bundle, "--image", photo, QUESTION, "--max-new-tokens", "8")
    expected = session.ask(photo, QUESTION, pocketvlm._generation_options(max_new_tokens=8))
    assert done.stdout == expected.text.lstrip() + "\n"
    assert re.search(
        r"^load \d+ ms \| image [\d.]+ ms \(prepare [\d.]+, encode [\d.]+\) "
        r"\| TTFT [\d.]+ ms \| [\d.]+ tok/s",
        done.stderr,
        re.MULTILINE,
    )


def test_run_as_json(tiny_bundle: Path, photo: Path, session: Any) -> None:
    done = call(
        "run", tiny_bundle, "--image", photo, QUESTION, "--json", "--max-new-tokens", "4", "--threads", "1"
    )
    found = json.loads(done.stdout)
    expected = session.ask(photo, QUESTION, pocketvlm._generation_options(max_new_tokens=4))
    assert (found["text"], found["token_ids"]) == (expected.text, expected.token_ids)
    assert found["new_tokens"] == len(found["decode_ms"]) + 1
    assert found["ttft_ms"] > 0


def test_run_chooses_from_a_list(tiny_bundle: Path, photo: Path, session: Any) -> None:
    choices = ["yes", "no", "a red circle"]
    expected = session.ask(photo, QUESTION, choices=choices)
    arguments = ("run", tiny_bundle, "--image", photo, QUESTION, "--choices", "yes, no,a red circle")
    done = call(*arguments)
    assert done.stdout == expected.text + "\n"
    assert all(re.search(rf"^0\.\d{{4}}  -[\d.]+  {each}$", done.stderr, re.MULTILINE) for each in choices)
    found = json.loads(call(*arguments, "--json").stdout)
    assert [each["choice"] for each in found["scores"]] == choices
    assert sum(each["probability"] for each in found["scores"]) == pytest.approx(1)


def test_run_chats_over_stdin(tiny_bundle: Path, photo: Path, session: Any) -> None:
    """Empty lines, an undone turn, a question that fails: the conversation goes on."""
    chat, options = session.chat(photo), pocketvlm._generation_options(max_new_tokens=4)
    wanted = [chat.ask(QUESTION, options)]
    wanted.append(chat.ask("is it big?", options))
    chat.undo()
    wanted.append(chat.ask("is it red?", options))
    lines = [
        "is it big?",
        "",
        "/undo",
        "is it red?",
        "why? " * 300,
        "/image absent.png",
        "/imge x",
        "/exit",
        "no",
    ]
    arguments = ("run", tiny_bundle, "--image", photo, QUESTION, "--chat", "--json", "--max-new-tokens", "4")
    done = call(*arguments, input="\n".join(lines))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["token_ids"] for each in found] == [each.token_ids for each in wanted]
    assert found[1]["reused_tokens"] > found[0]["prompt_tokens"]
    assert "pocketvlm: prompt: needs" in done.stderr
    assert "pocketvlm: absent.png: cannot be read" in done.stderr
    assert "pocketvlm: /imge: is no command; /image FILE" in done.stderr
    plain = call(*(each for each in arguments if each != "--json"), input="is it big?")
    assert plain.stdout.splitlines() == [each.text.strip() for each in wanted[:2]]


def test_run_says_what_it_runs_on(tiny_bundle: Path, photo: Path, session: Any) -> None:
    arguments = ("run", tiny_bundle, QUESTION, "--max-new-tokens", "2", "--max-context", "128")
    done = call(*arguments, "--image", photo, "--image", photo, "--providers", "CUDAExecutionProvider", "-v")
    assert f"context 128 tokens, state {session.kv_bytes / 2 / 1024:.1f} KiB" in done.stderr
    assert "CUDAExecutionProvider: skipped (not in this build of onnxruntime" in done.stderr
    assert "CPUExecutionProvider: runs vision_encoder, embed_tokens, decoder" in done.stderr
    quiet = call(*arguments, "--providers", "CUDAExecutionProvider,CPUExecutionProvider")
    assert "CUDAExecutionProvider: skipped" in quiet.stderr
    assert "CPUExecutionProvider" not in quiet.stderr


def test_run_stops_before_a_text(tiny_bundle: Path, photo: Path, session: Any) -> None:
    text = session.ask(photo, QUESTION, pocketvlm._generation_options(max_new_tokens=12)).text
    stop = text[4:6]
    done = call("run", tiny_bundle, "--image", photo, QUESTION, "--max-new-tokens", "12", "--stop", stop)
    assert done.stdout == text[: text.index(stop)].lstrip() + "\n"


def test_run_loads_no_torch(tiny_bundle: Path, photo: Path) -> None:
    """The modules that would be wrong on a device are made impossible to import."""
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'matplotlib'): sys.modules[name] = None\n"
        f"sys.argv = ['pocketvlm', 'run', {str(tiny_bundle)!r}, '--image', {str(photo)!r}, 'what?']\n"
        "import pocketvlm; pocketvlm.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--top-p", "0"], "--top-p: got 0.0"),
        (["--repetition-penalty", "-1"], "--repetition-penalty: got -1.0"),
        (["--min-p", "2"], "--min-p: got 2.0"),
        (["--stop", ""], "--stop: got ; "),
        (["--choices", "yes,yes"], "'yes' and 'yes' are the same answer"),
        (["--max-context", "9999999"], "max_context: got 9999999, this bundle takes 1 to 256"),
        (["--image", "absent.png"], "absent.png: cannot be read (No such file or directory)"),
        (["--image", "pyproject.toml"], "pyproject.toml: is not an image that can be read"),
    ],
)
def test_bad_input_is_one_line(tiny_bundle: Path, extra: list[str], words: str) -> None:
    assert words in refusal("run", tiny_bundle, QUESTION, *extra)


def test_a_changed_byte_is_one_line(bundle_copy: Path, photo: Path) -> None:
    part = bundle_copy / "onnx" / "decoder_model_merged.onnx"
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    assert re.search(
        r"tiny/onnx/decoder_model_merged\.onnx: sha256 \w{8}\.\., manifest says \w{8}\.\.; re-export",
        refusal("run", bundle_copy, "--image", photo, QUESTION),
    )


def test_no_image_where_one_is_needed(bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    raw = json.loads(path.read_text())
    raw["prompt"]["user_without_image"] = None
    path.write_text(json.dumps(raw))
    assert "add an image" in refusal("run", bundle_copy, QUESTION)


def test_no_question_is_one_line(tiny_bundle: Path) -> None:
    assert "question: got none" in refusal("run", tiny_bundle)


def test_no_bundle_is_one_line(tmp_path: Path) -> None:
    assert "no manifest.json" in refusal("run", tmp_path, QUESTION)


@pytest.mark.parametrize(
    "arguments", [["run"], ["fly"], ["run", "a", "b", "--top-k", "-1"], ["run", "a", "b", "--colour"]]
)
def test_wrong_usage_is_code_2(arguments: list[str]) -> None:
    call(*arguments, code=2)


def test_a_missing_extra_names_the_command(tmp_path: Path, tiny_bundle: Path, photo: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    line = refusal("run", tiny_bundle, "--image", photo, QUESTION, env=environment)
    assert "onnxruntime is not installed; run: pip install 'pocketvlm[onnx]'" in line


def open_writer(pipe: Path) -> int | None:
    """The writing end of a named pipe, once somebody reads it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def test_ctrl_c_is_one_line_and_130(tmp_path: Path, tiny_bundle: Path) -> None:
    """A named pipe that nobody writes to holds the verb at a known place while the signal comes."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "pocketvlm", "run", str(tiny_bundle), "--image", str(pipe), QUESTION]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        deadline = time.monotonic() + 60
        while (writer := open_writer(pipe)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert writer is not None
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        os.close(writer)
    assert (child.returncode, errors) == (130, "pocketvlm: interrupted\n")


def test_export_makes_a_bundle_and_prints_its_path(
    tiny_checkpoint: Path, tmp_path: Path, photo: Path
) -> None:
    options = ("--precision", "int8", "--name", "small", "--image-required")
    done = call("export", tiny_checkpoint, "--out", tmp_path / "out", *options)
    path = Path(done.stdout.strip())
    assert path == tmp_path / "out" / "small-onnx-int8"
    assert "parity gate" in done.stderr
    assert call("run", path, "--image", photo, QUESTION).stdout
    assert "add an image" in refusal("run", path, QUESTION)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--precision", "int3"], "int3"),
        (["--precision", ","], "--precision: got nothing"),
        (["--to", "tflite"], "tflite"),
        ([], "absent"),
    ],
)
def test_bad_exports_are_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in refusal("export", tmp_path / "absent", "--out", tmp_path / "out", *arguments)


def test_doctor() -> None:
    found = json.loads(call("doctor", "--json").stdout)
    assert found["threads"] >= 1
    onnx = next(extra for extra in found["extras"] if extra["extra"] == "onnx")
    assert onnx["complete"] is True
    assert ("pip install 'pocketvlm[" in call("doctor").stdout) == (
        not all(extra["complete"] for extra in found["extras"])
    )


def test_doctor_names_the_command_of_a_missing_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "EXTRAS", (("some", ("numpy", "no-such-package")),))
    pocketvlm._print_installation({"pocketvlm": "1", **installation.describe()})
    said = capsys.readouterr().out
    assert "[some] missing no-such-package: pip install 'pocketvlm[some]' (have numpy " in said


def test_doctor_wants_no_onnxruntime_over_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Jetson: what it said would have put the CPU's files over the GPU's."""
    monkeypatch.setattr(installation, "installed", {"onnxruntime-gpu": "1.23.0", "numpy": "2.0"}.get)
    pocketvlm._print_installation({"pocketvlm": "1", **installation.describe()})
    said = capsys.readouterr().out
    assert "[onnx] ok (have onnxruntime-gpu 1.23.0)" in said and "[gguf] missing gguf" in said
    monkeypatch.setattr(installation, "installed", {}.get)
    pocketvlm._print_installation({"pocketvlm": "1", **installation.describe()})
    assert "[onnx] missing onnxruntime: pip install 'pocketvlm[onnx]'" in capsys.readouterr().out


def test_doctor_knows_the_extras_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in installation.EXTRAS:
        declared = {re.split(r"[<>=]", requirement)[0] for requirement in project[extra]}
        assert set(packages) <= declared, extra
    assert {extra for extra, _ in installation.EXTRAS} == set(project) - {"all", "dev"}


def test_doctor_checks_a_bundle(bundle_copy: Path) -> None:
    said = call("doctor", bundle_copy).stdout
    assert f"bundle: {bundle_copy} conforms" in said
    assert "bundle: context 256 tokens, state " in said
    assert "bundle: CPUExecutionProvider: runs " in said
    (bundle_copy / "tokenizer.json").write_text("{}")
    assert "sha256" in refusal("doctor", bundle_copy)


def test_help_has_examples_and_loads_nothing_heavy() -> None:
    script = (
        "import sys, pocketvlm\n"
        "try: pocketvlm.app(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'PIL', 'tokenizers', 'torch', 'transformers', 'onnxruntime'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "HEAVY []" in done.stdout
    for verb in ("run", "export", "doctor"):
        assert f"pocketvlm {verb} " in call(verb, "--help").stdout
