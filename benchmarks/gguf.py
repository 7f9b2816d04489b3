r"""GGUF: what our session costs over a bare loop on llama.cpp, and what a conversion takes.

    python benchmarks/gguf.py [--rounds 8] [--threads 1 2] [--work DIR] [--quick]

Markdown and JSON on stdout, progress on stderr. A checkpoint in the shape of SmolVLM-256M with random weights
is made and exported to Q8_0 first (a few minutes, kept in `--work`).

Decode: one process, one llama.cpp context, 128 tokens of prompt and then 48 more, the largest logit taken
each time; our session and the bare loop (`llama_batch_get_one`, `llama_decode`, argmax) in turn, the first
one changing every round. Both must choose the same tokens. Ratio of the medians with a bootstrap interval
over rounds and steps (`evals/stats.py`). Each number of threads once with idle threads asleep (the default
of a GGUF session) and once with llama.cpp's own default, in processes of their own: OpenMP reads it once.

Conversion: checkpoint to text model and mmproj, each type in a process of its own; seconds, and the most
memory over what Python and its libraries hold before (resident; the mapped weights count, too).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [
    str(HERE.parent),
    *(x for x in sys.path if Path(x or ".").resolve() != HERE),
]  # not `import gguf`

import numpy as np  # noqa: E402

from evals.stats import bootstrap_ratio  # noqa: E402

BUNDLE, CHECKPOINT = "gguf-q8_0", "checkpoint"
PAST, STEPS = 128, 48
QUICK_STEPS = 6
TYPES = ("f16", "q8_0")
Result = dict[str, Any]


def make(work: Path, quick: bool) -> None:
    """Checkpoint and bundle, where they are not there yet."""
    from benchmarks.against import onnx_models
    from export import export_checkpoint

    work.mkdir(parents=True, exist_ok=True)
    if not (work / CHECKPOINT).exists():
        print("making the checkpoint", file=sys.stderr)
        onnx_models.write_checkpoint(work, onnx_models.TINY if quick else onnx_models.FULL)
    if not (work / BUNDLE).exists():
        say = lambda step: print(f"export: {step}", file=sys.stderr)  # noqa: E731
        export_checkpoint(work / CHECKPOINT, work / BUNDLE, to="gguf", precision="q8_0", progress=say)


# --- arms, each call in a fresh process --------------------------------


def decode(work: Path, threads: int, spin: bool, rounds: int, steps: int) -> Result:
    """Milliseconds of every step of both arms, round by round."""
    from benchmarks.against.onnx_common import prompt_ids
    from runtime import open_bundle
    from runtime.gguf_session import GgufBackend

    found: Result = {"session": [], "bare": []}
    room = PAST + steps + 16
    with open_bundle(
        work / BUNDLE, threads=threads, spin=spin or None, max_context=room, verify=False
    ) as session:
        backend = session._backend
        assert isinstance(backend, GgufBackend)
        text, lib = backend.text, backend.text._lib
        prompt = prompt_ids(PAST, text.tokens)

        def bare(ids: Sequence[int]) -> int:
            tokens = (lib.llama_token * len(ids))(*ids)  # the batch points into it
            if lib.llama_decode(text.context, lib.llama_batch_get_one(tokens, len(ids))):
                raise SystemExit("llama_decode failed")
            logits = lib.llama_get_logits_ith(text.context, -1)
            return int(np.argmax(np.ctypeslib.as_array(logits, shape=(text.tokens,))))

        def bare_prompt() -> int:
            text.clear()
            return bare(prompt)

        arms: dict[str, tuple[Callable[[], int], Callable[[int], int]]] = {
            "session": (
                lambda: int(np.argmax(session.prefill(np.array(prompt, np.int64)))),
                lambda token: int(np.argmax(session.decode(token))),
            ),
            "bare": (bare_prompt, lambda token: bare([token])),
        }
        for number in range(-1, rounds):  # the first one warms up
            order = list(arms) if number % 2 else list(arms)[::-1]
            chosen = {name: timed(*arms[name], steps) for name in order}
            if chosen["session"][1] != chosen["bare"][1]:
                raise SystemExit("the arms chose different tokens")
            for name in arms if number >= 0 else ():
                found[name].append(chosen[name][0])
    return found


def timed(start: Callable[[], int], step: Callable[[int], int], steps: int) -> tuple[list[float], list[int]]:
    """Milliseconds and token of each step after the prompt."""
    token, taken, tokens = start(), [], []
    for _ in range(steps):
        mark = time.perf_counter()
        token = step(token)
        taken.append(1e3 * (time.perf_counter() - mark))
        tokens.append(token)
    return taken, tokens


def convert(work: Path, kind: str) -> Result:
    """Seconds and peak memory of writing both files."""
    import torch

    from benchmarks.against.onnx_common import resident_mib
    from export.gguf import plan_files
    from export.gguf_write import write

    torch.set_num_threads(1)
    before = resident_mib("VmRSS")
    with tempfile.TemporaryDirectory(dir=work) as out:
        start = time.perf_counter()
        files = plan_files(work / CHECKPOINT)
        write(files.text, files.source, Path(out) / "text.gguf", kind)
        write(files.vision, files.source, Path(out) / "vision.gguf", kind)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(out).iterdir())
    largest = max(np.prod(files.source.shape(name)) for name in files.source.names)
    return {
        "seconds": seconds,
        "over_mib": resident_mib() - before,
        "largest_tensor_mib": float(largest) * 4 / 2**20,
        "bytes": size,
    }


def child(work: Path, **arguments: Any) -> Result:
    """One of the functions above in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gguf", "--work", str(work), "--child", json.dumps(arguments)]
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    print(arguments, file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=kept)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- tables -------------------------------------------------------------


def measure(work: Path, quick: bool, rounds: int, threads: Sequence[int]) -> Result:
    """All figures, raw."""
    make(work, quick)
    steps = QUICK_STEPS if quick else STEPS
    found: Result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start",
        "decode": [],
        "convert": {kind: child(work, what="convert", kind=kind) for kind in TYPES},
    }
    for count in threads:
        for spin in (False, True):
            run = child(work, what="decode", threads=count, spin=spin, rounds=rounds, steps=steps)
            found["decode"].append({"threads": count, "spin": spin, **run})
    return found


def table(found: Result) -> list[str]:
    lines = [
        f"Machine: {found['machine']}.",
        "",
        "| threads | idle threads | session ms a token | bare loop | session / bare (95 %) |",
        "|---|---|---|---|---|",
    ]
    for entry in found["decode"]:
        value, interval = bootstrap_ratio(entry["bare"], entry["session"])
        session, bare = (
            statistics.median(x for one in entry[name] for x in one) for name in ("session", "bare")
        )
        idle = "llama.cpp's default" if entry["spin"] else "sleep"
        lines.append(
            f"| {entry['threads']} | {idle} | {session:.2f} | {bare:.2f} "
            f"| {value:.3f} ({interval.low:.3f} to {interval.high:.3f}) |"
        )
    lines += ["", "| conversion | seconds | peak MiB over start | largest tensor, float32 MiB | MB written |"]
    lines += ["|---|---|---|---|---|"]
    lines += [
        f"| {kind} | {run['seconds']:.1f} | {run['over_mib']:.0f} | {run['largest_tensor_mib']:.0f} "
        f"| {run['bytes'] / 1e6:.0f} |"
        for kind, run in found["convert"].items()
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="both arms once each")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, help="where models are kept; a temporary directory by default")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what = {"decode": decode, "convert": convert}[options.child.pop("what")]
        print(json.dumps(what(options.work, **options.child)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options.work or Path(temporary), options.quick, options.rounds, options.threads)
    print("\n".join(table(found)) + "\n```json\n" + json.dumps(found) + "\n```")


if __name__ == "__main__":
    main()
