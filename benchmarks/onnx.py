r"""ONNX bundles against onnxruntime-genai and llama.cpp: decode, time to the first text, export.

    make a virtual environment for the peers, once (it is no dependency of the project; llama-cpp-python is
    built from source, about six minutes):
        python -m venv benchmarks/.venv-onnx
        benchmarks/.venv-onnx/bin/pip install -c constraints.txt torch transformers onnx onnx-ir onnxruntime \
            'onnxruntime-genai==0.18.*' 'llama-cpp-python==0.3.36' gguf numpy pillow
    python benchmarks/onnx.py [--parts decode ttft export] [--rounds 5] [--threads 1 2] [--quick] [--work DIR]

Markdown and JSON on stdout, progress on stderr. About 15 minutes to make the models (kept in `--work`), and
12 minutes a round at the full size on two cores. Without the peers' environment our arms run alone.

One checkpoint in the shape of SmolVLM-256M with random weights is converted by everybody's own converter
(`against/onnx_models.py`). Every arm runs in a fresh process, arms in turn, and a ratio compares arms of one
round; its interval is a bootstrap over rounds and repeats (`evals/stats.py`).

Decode: int4 weights with the LM head, one token after another, the largest logit taken, after a prompt of
128 or 1,100 tokens. `ours`: blocks of 64, int8 keys and values; `ours-float-kv`: float keys and values.
`genai`: the builder at blocks of 64 (its best here); `genai-default`: its default, blocks of 32. `llama`:
Q4_0, float16 keys and values. The share of memory bandwidth is (decoder weights + keys and values) / time
over what `against/onnx_bandwidth.py` reads in the same round.

TTFT: bytes of a PNG of 512 px and a question of 64 tokens in, first text out, models loaded, cache empty.
`ours`: int8 vision, int4 decoder, `-prefill8` with a second int8 graph for prompts; `ours-fp32`: everything
in float32; `mtmd`: llama.cpp, float16 and Q8_0 vision.

Export: checkpoint to int4 bundle, gate and conformance vectors included.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [
    str(HERE.parent),
    *(x for x in sys.path if Path(x or ".").resolve() != HERE),
]  # not `import onnx`

from evals.stats import bootstrap_ratio  # noqa: E402

PEER = HERE / ".venv-onnx" / "bin" / "python"
PAST, QUICK_PAST = (128, 1100), (32, 100)
Result = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A script, its options, and whether it runs in the peers' environment."""

    name: str
    script: str
    options: tuple[object, ...] = ()
    peer: bool = False


DECODE = (
    Arm("ours", "ours", ("--model", "int4-b64-kv8")),
    Arm("ours-float-kv", "ours", ("--model", "int4-b64")),
    Arm("genai", "genai", ("--model", "genai-64"), peer=True),
    Arm("genai-default", "genai", ("--model", "genai-32"), peer=True),
    Arm("llama", "llama", ("--what", "decode"), peer=True),
)
TTFT = (
    Arm("ours", "ours", ("--what", "ttft", "--model", "int4-b64")),
    Arm("ours-prefill8", "ours", ("--what", "ttft", "--model", "int4-b64-prefill8")),
    Arm("ours-fp32", "ours", ("--what", "ttft", "--model", "fp32")),
    Arm("mtmd-f16", "llama", ("--what", "ttft", "--model", "mmproj-f16.gguf"), peer=True),
    Arm("mtmd-q8", "llama", ("--what", "ttft", "--model", "mmproj-q8.gguf"), peer=True),
)
EXPORT = Arm("export", "ours", ("--what", "export", "--model", "int4-b64"))
BUNDLES = ("int4-b64-kv8", "int4-b64", "int4-b64-prefill8", "fp32")


class Bench:
    """The directory of models, and how an arm is run."""

    def __init__(self, work: Path, quick: bool, peers: bool) -> None:
        self.work, self.quick, self.peers = work, quick, peers

    def arms(self, arms: Sequence[Arm]) -> list[Arm]:
        return [arm for arm in arms if self.peers or not arm.peer]

    def run(self, arm: Arm, threads: int, *more: object) -> Result:
        """One arm in a fresh process; what it measured."""
        python = PEER if arm.peer else Path(sys.executable)
        script = HERE / "against" / f"onnx_{arm.script}.py"
        command = [python, script, self.work, *arm.options, "--threads", threads, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        print(f"{arm.name} threads {threads} {' '.join(map(str, more))}", file=sys.stderr)
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not lines:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
        return json.loads(lines[-1].removeprefix("RESULT "))

    def make(self, parts: Sequence[str]) -> None:
        """Models and bundles that the parts need and that are not there yet."""
        self._models("checkpoint", *(["--tiny"] if self.quick else []))
        if {"decode", "ttft"} & set(parts):
            for name in BUNDLES:
                self._models(name, "--bundle", name)
        if not self.peers:
            return
        if "decode" in parts:
            for block in (32, 64):
                if not (self.work / f"genai-{block}").exists():
                    self.run(Arm("genai's builder", "genai", ("--build", block), peer=True), 2)
        self._models("mmproj-f16.gguf", "--gguf")
        if not (self.work / "mmproj-q8.gguf").exists():
            self.run(Arm("llama.cpp's quantizer", "llama", ("--build",), peer=True), 2)

    def _models(self, made: str, *options: str) -> None:
        if (self.work / made).exists():
            return
        print(f"making {made}", file=sys.stderr)
        command = [sys.executable, str(HERE / "against" / "onnx_models.py"), str(self.work), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


# --- parts -------------------------------------------------------------


def decode(bench: Bench, rounds: int, threads: Sequence[int]) -> list[Result]:
    """Every arm at every past and number of threads, `rounds` times in turn."""
    found = [
        {"past": past, "threads": count, "rounds": [], "bandwidth_gb_s": []}
        for count in threads
        for past in (QUICK_PAST if bench.quick else PAST)
    ]
    steps = 4 if bench.quick else 48
    for _ in range(rounds):
        for entry in found:
            more = ("--past", entry["past"], "--steps", steps)
            arms = bench.arms(DECODE)
            entry["rounds"].append({arm.name: bench.run(arm, entry["threads"], *more) for arm in arms})
            reading = Arm("bandwidth", "bandwidth", ("--mib", 32 if bench.quick else 512))
            entry["bandwidth_gb_s"].append(bench.run(reading, entry["threads"])["gb_s"])
    return found


def ttft(bench: Bench, rounds: int, threads: Sequence[int]) -> list[Result]:
    found: list[Result] = [{"threads": count, "rounds": []} for count in threads]
    for _ in range(rounds):
        for entry in found:
            arms = bench.arms(TTFT)
            entry["rounds"].append(
                {arm.name: bench.run(arm, entry["threads"], "--repeats", 3) for arm in arms}
            )
    for entry in found:
        counts = {name: run["prompt_tokens"] for name, run in entry["rounds"][0].items()}
        if len(set(counts.values())) != 1:
            raise SystemExit(f"the arms do not answer the same prompt: {counts} tokens")
    return found


def export(bench: Bench, rounds: int, threads: int) -> list[Result]:
    return [bench.run(EXPORT, threads) for _ in range(rounds)]


# --- tables ------------------------------------------------------------


def ratio(rounds: Sequence[Mapping[str, Result]], arm: str, to: str) -> str:
    """`arm`'s time over `to`'s, with an interval, from the same rounds."""
    base, own = ([each[name]["ms"] for each in rounds] for name in (to, arm))
    value, interval = bootstrap_ratio(base, own)
    return f"{value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def median_ms(rounds: Sequence[Mapping[str, Result]], arm: str, what: str = "ms") -> float:
    return statistics.median(value for each in rounds for value in each[arm][what])


def reached(entry: Result, arm: str) -> float | None:
    """Share of the memory bandwidth: bytes that a token must read over its time."""
    run = entry["rounds"][0][arm]
    if "decoder_bytes" not in run:
        return None
    size = run["decoder_bytes"] + run["kv_bytes_a_token"] * entry["past"]
    rate = size / (1e-3 * median_ms(entry["rounds"], arm)) / 1e9
    return rate / statistics.median(entry["bandwidth_gb_s"])


def decode_table(found: Sequence[Result]) -> list[str]:
    lines = [
        "| threads | past | arm | ms a token (median) | its time / ours (95 %) | share of bandwidth "
        "| bandwidth GB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in found:
        for arm in entry["rounds"][0]:
            share = reached(entry, arm)
            lines.append(
                f"| {entry['threads']} | {entry['past']:,} | {arm} | {median_ms(entry['rounds'], arm):.2f} "
                f"| {ratio(entry['rounds'], arm, 'ours')} | {'' if share is None else f'{share:.0%}'} "
                f"| {statistics.median(entry['bandwidth_gb_s']):.1f} |"
            )
    return lines


def ttft_table(found: Sequence[Result]) -> list[str]:
    lines = [
        "| threads | arm | ms (median) | its time / ours-fp32 (95 %) | picture, vision, prompt ms |",
        "|---|---|---|---|---|",
    ]
    for entry in found:
        for arm, run in entry["rounds"][0].items():
            names = [name for name in ("prepare", "encode", "prefill") if name in run]
            stages = [median_ms(entry["rounds"], arm, name) for name in names]
            lines.append(
                f"| {entry['threads']} | {arm} | {median_ms(entry['rounds'], arm):.0f} "
                f"| {ratio(entry['rounds'], arm, 'ours-fp32')} | {', '.join(f'{x:.0f}' for x in stages)} |"
            )
    return lines


def export_table(found: Sequence[Result]) -> list[str]:
    seconds = sorted(run["ms"][0] / 1e3 for run in found)
    peak, weights = max(run["peak_mib"] for run in found), found[0]["fp32_mib"]
    spread = f"{seconds[0]:.0f} / {statistics.median(seconds):.0f} / {seconds[-1]:.0f}"
    size = found[0]["bundle_bytes"] / 1e6
    return [
        "| seconds: min / median / max | peak MiB | float32 weights MiB | times the weights | bundle MB |",
        "|---|---|---|---|---|",
        f"| {spread} | {peak:,.0f} | {weights:,.0f} | {peak / weights:.2f} | {size:.0f} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("decode", "ttft", "export")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repeats of all arms")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, help="where models are kept; a temporary directory by default")
    parser.add_argument("--quick", action="store_true", help="tiny model and lengths: does it run?")
    parser.add_argument("--no-peers", action="store_true", help="only this project's arms")
    options = parser.parse_args()
    peers = PEER.exists() and not options.no_peers
    if not peers:
        print(f"no peers; see the head of {Path(__file__).name} for how to get them", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options.work or Path(temporary), options.quick, peers)
        bench.make(options.parts)
        result, lines = measure(bench, options.parts, options.rounds, options.threads)
    print("\n".join(lines) + "\n```json\n" + json.dumps(result) + "\n```")


def measure(
    bench: Bench, parts: Sequence[str], rounds: int, threads: Sequence[int]
) -> tuple[Result, list[str]]:
    """All parts; the raw figures and Markdown."""
    result: Result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start",
        "threads": list(threads),
    }
    lines: list[str] = []
    if "decode" in parts:
        result["decode"] = decode(bench, rounds, threads)
        lines += ["**Decode**", "", *decode_table(result["decode"]), ""]
    if "ttft" in parts:
        result["ttft"] = ttft(bench, rounds, threads)
        lines += ["**Time to the first text**", "", *ttft_table(result["ttft"]), ""]
    if "export" in parts:
        result["export"] = export(bench, min(rounds, 3), max(threads))
        lines += ["**Export**", "", *export_table(result["export"]), ""]
    return result, lines


if __name__ == "__main__":
    main()
