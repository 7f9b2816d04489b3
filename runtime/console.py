"""Answers on a terminal: one question, or a conversation line by line.

In: a session, what was asked. Out: text or JSON lines on stdout, timings and remarks on stderr.
Not here: options of the command line (`pocketvlm.py`), answering.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.answer import Answer, GenerationStats
from runtime.chat import Chat
from runtime.errors import InputError
from runtime.generation import GenerationOptions
from runtime.session import Session

COMMANDS = "/image FILE: another picture; /undo: forget the last turn; /exit or end of input: leave"


def facts(session: Session) -> list[str]:
    """What a session runs on: its context with the bytes of its state, and each execution provider."""
    return [
        f"context {session.max_context} tokens, state {size(session.kv_bytes)}",
        *(report.line() for report in session.providers),
    ]


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def answer(
    session: Session,
    images: Sequence[Path],
    question: str,
    options: GenerationOptions,
    choices: Sequence[str] | None,
    as_json: bool,
) -> None:
    """Answer one question, as it comes, and say what it took."""
    if as_json:
        found = session.ask(list(images), question, options, choices=choices)
        told = {"load_ms": round(session.load_ms, 3), **as_dict(found)}
        if session.emulated:
            told["emulated"] = session.emulated
        print(json.dumps(told, ensure_ascii=False))
        return
    if choices is not None:
        _print_choices(session.ask(list(images), question, options, choices=choices))
    else:
        _print_pieces(session.stream(list(images), question, options))
    print(timing_line(session.load_ms, session.last_stats), file=sys.stderr)


def converse(
    session: Session,
    images: Sequence[Path],
    lines: Iterable[str],
    options: GenerationOptions,
    choices: Sequence[str] | None,
    as_json: bool,
) -> None:
    """Answer line by line in one conversation; what cannot be asked is one line on stderr."""
    chat = session.chat(list(images))
    for line in lines:
        words = line.strip()
        if words == "/exit":
            return
        try:
            if not words or _command(chat, words):
                continue
            if as_json:
                print(json.dumps(as_dict(chat.ask(words, options, **_only(choices))), ensure_ascii=False))
            elif choices is not None:
                _print_choices(chat.ask(words, options, choices=choices))
            else:
                _print_pieces(chat.stream(words, options))
            sys.stdout.flush()
        except InputError as error:
            print(f"pocketvlm: {' '.join(str(error).split())}", file=sys.stderr)


def typed(first: str | None) -> Iterator[str]:
    """A question given beforehand, then the lines of stdin, asked for with a sign if somebody sits there."""
    if first:
        yield first
    if sys.stdin.isatty():
        print(COMMANDS, file=sys.stderr)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def as_dict(found: Answer) -> dict[str, Any]:
    """JSON-ready."""
    stats = found.stats
    scores = found.scores
    return {
        "text": found.text,
        "token_ids": found.token_ids,
        "finish_reason": found.finish_reason,
        **({} if scores is None else {"scores": _scores(found)}),
        "prepare_ms": round(stats.prepare_ms, 3),
        "encode_ms": round(stats.encode_ms, 3),
        "prefill_ms": round(stats.prefill_ms, 3),
        "ttft_ms": round(stats.ttft_ms, 3),
        "decode_ms": [round(each, 3) for each in stats.decode_ms],
        "prompt_tokens": stats.prompt_tokens,
        "image_tokens": stats.image_tokens,
        "reused_tokens": stats.reused_tokens,
        "new_tokens": stats.new_tokens,
        "prefill_tok_s": round(stats.prefill_tok_s, 2),
        "decode_tok_s": round(stats.decode_tok_s, 2),
    }


def timing_line(load_ms: float, stats: GenerationStats) -> str:
    """For people."""
    speed = f"{stats.decode_tok_s:.1f} tok/s" if stats.decode_ms else "no tok/s"
    image_ms = stats.prepare_ms + stats.encode_ms
    return (
        f"load {load_ms:.0f} ms | image {image_ms:.1f} ms "
        f"(prepare {stats.prepare_ms:.1f}, encode {stats.encode_ms:.1f}) | "
        f"TTFT {stats.ttft_ms:.1f} ms | {speed} | "
        f"{stats.prompt_tokens} prompt tokens, {stats.new_tokens} new"
    )


def _command(chat: Chat, words: str) -> bool:
    """Whether it was a command, which then is done."""
    verb, _, rest = words.partition(" ")
    if verb == "/image":
        chat.show(Path(rest.strip()))
    elif verb == "/undo":
        chat.undo()
    elif verb.startswith("/"):
        raise InputError(f"{verb}: is no command; {COMMANDS}")
    else:
        return False
    return True


def _only(choices: Sequence[str] | None) -> dict[str, Any]:
    return {} if choices is None else {"choices": choices}


def _print_pieces(pieces: Iterator[str]) -> None:
    started = False
    for piece in pieces:
        sys.stdout.write(piece if started else piece.lstrip())  # an answer often begins with a blank
        started = started or bool(piece.strip())
        sys.stdout.flush()
    print()


def _print_choices(found: Answer) -> None:
    """The choice on stdout, what each was worth on stderr."""
    print(found.text)
    for score in _scores(found):
        line = f"{score['probability']:.4f}  {score['log_probability']:.3f}  {score['choice']}"
        print(line, file=sys.stderr)


def _scores(found: Answer) -> list[dict[str, Any]]:
    if found.scores is None:
        return []
    rows = zip(found.scores.choices, found.scores.log_probabilities, found.scores.probabilities, strict=True)
    return [{"choice": name, "log_probability": log, "probability": share} for name, log, share in rows]
