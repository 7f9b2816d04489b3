"""The template of a Modelfile against the chat template, read by a small reader of the Go syntax in it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from transformers import AutoProcessor

from export import gguf_modelfile
from export.checkpoint import load
from export.gguf import export_gguf
from export.gguf_modelfile import system_texts
from runtime import bundle
from tests import gguf_checkpoints

PICTURES = {
    "smolvlm": ("<image>", ""),
    "qwen3_vl": ("<|vision_start|><|image_pad|><|vision_end|>", ""),
    "internvl": ("<IMG_CONTEXT>", ""),
    "gemma3": ("<start_of_image>", "\n\n\n\n"),
}
"""What the chat template writes for a picture, and what of it is text; Ollama writes the rest by itself."""
SYSTEM = "Answer in one word."
TURNS = [("user", "what color?"), ("assistant", "red"), ("user", "and  this\nline?"), ("assistant", "no")]


def render(template: str, messages: list[tuple[str, str]], system: str) -> str:
    """What Go's text/template makes of it, of the constructs that our files have."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    text, later, _ = _block(parts, 0, {"System": system, "Messages": messages, "later": False})
    assert later == len(parts)
    return text


def _block(parts: list[str], at: int, values: dict) -> tuple[str, int, str]:
    """Text up to the action that ends this block, the place after it, and that action."""
    found = ""
    while at < len(parts):
        if at % 2 == 0:
            found += parts[at]
            at += 1
            continue
        action, at = parts[at], at + 1
        if action == "end" or action.startswith("else"):
            return found, at, action
        if action.startswith("if "):
            text, at = _choice(parts, at, action.removeprefix("if "), values)
            found += text
        elif action == "range .Messages":
            start, end = at, _block(parts, at, {**values, "message": ("", "")})[1]
            for message in values["Messages"]:
                values["message"] = message
                found += _block(parts, start, values)[0]
            at = end
        elif action in ("$later := false", "$later = true"):
            values["later"] = action.endswith("true")
        else:
            found += {".System": values["System"], ".Content": values.get("message", ("", ""))[1]}[action]
    return found, at, ""


def _choice(parts: list[str], at: int, condition: str, values: dict) -> tuple[str, int]:
    """The first branch that holds, and the place after all of them."""
    text, taken = "", False
    while True:
        holds = not taken and _holds(condition, values)
        branch, at, action = _block(parts, at, values if holds else dict(values))
        text, taken = (branch, True) if holds else (text, taken)
        if action == "end":
            return text, at
        condition = action.removeprefix("else").strip().removeprefix("if ") or "true"


def _holds(condition: str, values: dict) -> bool:
    if match := re.fullmatch(r'eq \.Role "(\w+)"', condition):
        return bool(values["message"][0] == match[1])
    return bool({"true": True, "$later": values["later"], ".System": values["System"]}[condition])


@pytest.fixture(scope="module", params=PICTURES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    name: str = request.param
    root = tmp_path_factory.mktemp(name)
    checkpoint = gguf_checkpoints.write(name, root / "checkpoint")
    export_gguf(checkpoint, {"f32": root / "bundle"}, names={"f32": name})
    return name, checkpoint, root / "bundle"


@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("count", [1, 3])
def test_a_conversation_is_the_chat_templates(
    exported: tuple[str, Path, Path], system: str, count: int
) -> None:
    """A picture in the first turn; one question, or two with the answer between them."""
    name, checkpoint, directory = exported
    template = (directory / "Modelfile").read_text().split('TEMPLATE """')[1].split('"""')[0]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in TURNS[:count]]
    messages[0]["content"].insert(0, {"type": "image"})  # type: ignore[attr-defined]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    wanted = AutoProcessor.from_pretrained(checkpoint).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    placeholder, text = PICTURES[name]
    assert wanted.count(placeholder) == 1
    given = [("system", system)] * bool(system) + TURNS[:count]
    assert render(template, given, system) == wanted.replace(placeholder, text)


def test_a_system_message_inside_of_a_turn_is_left_out_and_said(
    exported: tuple[str, Path, Path], tmp_path: Path
) -> None:
    """As Gemma's templates write it: then the first turn is another one."""
    _, checkpoint, directory = exported
    assert "A system message is left out" not in (directory / "Modelfile").read_text()
    loaded, prompt = load(checkpoint), bundle.read(directory).prompt
    own = loaded.processor.chat_template
    assert system_texts(loaded, prompt) is not None
    refuses = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('none') }}{%- endif -%}"
    inside = (
        "{%- if messages[0]['role'] == 'system' -%}{%- set before = messages[0]['content'][0]['text'] -%}"
        "{%- set messages = messages[1:] -%}{%- endif -%}<|im_start|>user\n{{ before }}\n\n"
        "{{ messages[0]['content'][0]['text'] }}<|im_end|>\n"
    )
    for template in (refuses + own, inside):
        loaded.processor.chat_template = template
        assert system_texts(loaded, prompt) is None
    gguf_modelfile.write(tmp_path, bundle.read(_copied(directory, tmp_path)))
    assert "A system message is left out" in (tmp_path / "Modelfile").read_text()


def _copied(directory: Path, out: Path) -> Path:
    """The manifest and the tokenizer, beside which the file is written."""
    for name in ("manifest.json", "tokenizer.json"):
        shutil.copyfile(directory / name, out / name)
    return directory
