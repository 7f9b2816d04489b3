"""A `Modelfile` beside the GGUF files, so that `ollama create` takes them.

In: a bundle's manifest. Out: the file. Not here: running Ollama, which was not tried.

Ollama's templates are Go's; the manifest's segments are ids, so their text stands between Go's fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from runtime.files import write_text
from runtime.manifest import Manifest
from runtime.prompt import load_tokenizer
from runtime.prompt_spec import Ids, QuestionSlot, Segment

NAME = "Modelfile"


def write(staged: Path, manifest: Manifest, remarks: Sequence[str] = ()) -> None:
    """Write the file; a system prompt of the template is part of it. `remarks`: further lines of comment."""
    tokenizer = load_tokenizer(staged / manifest.tokenizer.file.path)

    def text(ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    def segment(piece: Segment) -> str:
        if isinstance(piece, Ids):
            return text(piece.ids)
        # Ollama puts pictures before the prompt's text by itself
        return f"{piece.before}{{{{ .Prompt }}}}{piece.after}" if isinstance(piece, QuestionSlot) else ""

    prompt = manifest.prompt
    opening = text(_without_begin(prompt.system, tokenizer)) + "".join(map(segment, prompt.user))
    template = f"{opening}{text(prompt.assistant)}{{{{ .Response }}}}"
    stops = [f"PARAMETER stop {_quoted(text((stop,)))}" for stop in manifest.tokenizer.stop_ids]
    lines = [
        "# Not tried with Ollama: written from the chat template, see docs/gguf.md.",
        *(f"# {remark}" for remark in remarks),
        f"FROM ./{manifest.part('text_model').path}",
        f"FROM ./{manifest.part('mmproj').path}",
        f'TEMPLATE """{template}"""',
        *stops,
        "PARAMETER temperature 0",
    ]
    write_text(staged / NAME, "\n".join(lines) + "\n")


def _without_begin(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The opening without what llama.cpp puts before every text by itself, as this tokenizer does."""
    plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    begin = tuple(full[: full.index(plain[0])]) if plain and plain[0] in full else ()
    return ids[len(begin) :] if begin == ids[: len(begin)] else ids


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
