"""A `Modelfile` beside the GGUF files, so that `ollama create` takes them.

In: a bundle's manifest, how the chat template writes a system message. Out: the file. Not here: running
Ollama, which was not tried.

Ollama's templates are Go's; the manifest's segments are ids, so their text stands between Go's fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from export import prompts
from export.checkpoint import Checkpoint
from runtime.files import write_text
from runtime.manifest import Manifest
from runtime.prompt import load_tokenizer
from runtime.prompt_spec import Ids, PromptSpec, QuestionSlot, Segment

NAME = "Modelfile"
_SYSTEM, _QUESTION = "\ue000S\ue001", "\ue000Q\ue001"


def write(
    staged: Path, manifest: Manifest, remarks: Sequence[str] = (), system: tuple[str, str] | None = None
) -> None:
    """Write the file. `remarks`: further lines of comment. `system`: texts around a system message, which
    opens a conversation then; None: one is left out, as a session has none either."""
    tokenizer = load_tokenizer(staged / manifest.tokenizer.file.path)
    stops = [f"PARAMETER stop {_quoted(_text(tokenizer, (stop,)))}" for stop in manifest.tokenizer.stop_ids]
    lines = [
        "# Not tried with Ollama: written from the chat template, see docs/gguf.md.",
        *(f"# {remark}" for remark in remarks),
        *([] if system else ["# A system message is left out."]),
        *(
            []
            if manifest.prompt.later
            else ["# One turn: the chat template's further turns have no fixed text."]
        ),
        f"FROM ./{manifest.part('text_model').path}",
        f"FROM ./{manifest.part('mmproj').path}",
        f'TEMPLATE """{_template(manifest.prompt, tokenizer, system)}"""',
        *stops,
        "PARAMETER temperature 0",
    ]
    write_text(staged / NAME, "\n".join(lines) + "\n")


def system_texts(checkpoint: Checkpoint, prompt: PromptSpec) -> tuple[str, str] | None:
    """What the chat template writes before and after a system message, up to the first turn; None where that
    turn is another one then, or there is no such message."""
    opening = _text(checkpoint.tokenizer.backend_tokenizer, prompt.system)
    plain = prompts.render(checkpoint, [prompts.Message(_QUESTION)], generate=False)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": _SYSTEM}]},
        *prompts.conversation([prompts.Message(_QUESTION)]),
    ]
    try:
        full = str(checkpoint.processor.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template raises what it likes
        return None
    turn = plain.removeprefix(opening)
    if not plain.startswith(opening) or not full.endswith(turn):
        return None
    before, mark, after = full.removesuffix(turn).partition(_SYSTEM)
    return (before, after) if mark and _SYSTEM not in after else None


def _template(prompt: PromptSpec, tokenizer: Tokenizer, system: tuple[str, str] | None) -> str:
    """A whole conversation in Go's syntax: the opening, then message by message."""

    def segment(piece: Segment) -> str:
        if isinstance(piece, Ids):
            return _text(tokenizer, piece.ids)
        # Ollama puts pictures before the message's text by itself
        return f"{piece.before}{{{{ .Content }}}}{piece.after}" if isinstance(piece, QuestionSlot) else ""

    begin = _begin(tokenizer)
    opening = _text(tokenizer, _without(prompt.system, begin))
    if system:
        before = system[0].removeprefix(_text(tokenizer, begin))
        opening = (
            f"{{{{ if .System }}}}{before}{{{{ .System }}}}{system[1]}{{{{ else }}}}{opening}{{{{ end }}}}"
        )
    reply, first = _text(tokenizer, prompt.assistant), "".join(map(segment, prompt.user))
    later = prompt.later
    if later is None:
        return f"{opening}{first}{reply}".replace("{{ .Content }}", "{{ .Prompt }}") + "{{ .Response }}"
    # what closes an answer stands in front of the next question: a last answer has nothing behind it
    closing = _text(tokenizer, later.turn_end)
    further = "".join(map(segment, later.user_without_image))
    return (
        f"{opening}{{{{ $later := false }}}}{{{{ range .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ if $later }}}}{closing}{further}'
        f"{{{{ else }}}}{first}{{{{ end }}}}{reply}{{{{ $later = true }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{later.answer_before}{{{{ .Content }}}}{{{{ end }}}}'
        "{{ end }}"
    )


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def _begin(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What llama.cpp puts before every text by itself, as this tokenizer does."""
    plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return tuple(full[: full.index(plain[0])]) if plain and plain[0] in full else ()


def _without(ids: tuple[int, ...], begin: tuple[int, ...]) -> tuple[int, ...]:
    return ids[len(begin) :] if begin == ids[: len(begin)] else ids


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
