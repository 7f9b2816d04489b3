r"""Training, loss memory and pool generation against TRL and transformers, on the same models and tokens.

    make a virtual environment for the peer, once (it is no dependency of the project):
        python -m venv benchmarks/.venv-trl
        benchmarks/.venv-trl/bin/pip install -c constraints.txt torch torchvision transformers accelerate \
            'trl>=1.10'
    python benchmarks/distill.py [--parts training memory generation] [--rounds 5] [--threads 2] [--quick]

Markdown and JSON on stdout, progress on stderr.

Training. `DistillationTrainer` (TRL) and `PoolSteps` under `loop.fit` (ours) train the same Qwen3-VL-like
student on the same questions, each with an image and 8 responses, against the same live teacher, with the
same loss (JSD, mean over response tokens), AdamW and clipping, in float32. Responses and prompts are there
beforehand: neither generation nor image preprocessing is timed. First the gradients of one step must agree;
then each arm is tuned (TRL: sequences a batch; ours: tokens a batch, tree or prefix cache); then every arm
runs in a fresh process, arms in turn, and a ratio compares two arms of one round. Two of ours tell apart
what brings what: `naive` has one sequence a response as TRL has, `merged` trains on questions whose
duplicates are merged by count (TRL runs each of them).

Memory: `against/arm_loss.py`. Generation: `against/arm_generate.py`.
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
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

from benchmarks.against import setup
from benchmarks.against.common import Shape

HERE = Path(__file__).parent
PEER = HERE / ".venv-trl" / "bin" / "python"
SHAPES = [Shape(200, 8, 64, 4), Shape(1000, 64, 256, 2), Shape(1000, 300, 256, 1)]
QUICK = [Shape(40, 6, 9, 4), Shape(60, 12, 9, 2)]
DUPLICATES = {8: 4, 64: 6, 6: 4}  # response tokens -> distinct ones among 8 in the `merged` arm
BATCHES, BUDGETS = (4, 8, 16, 32), (2048, 8192, 32768)
PLAIN_TOKENS, LOSS_TOKENS = (512, 1024, 2048), 8192
Result = dict[str, Any]


class Bench:
    """What all parts need: threads, the directories, how an arm is run."""

    def __init__(self, work: Path, threads: int, quick: bool) -> None:
        self.work, self.threads, self.quick = work, threads, quick
        self.shapes = QUICK if quick else SHAPES
        setup.make_models(work, setup.TINY if quick else setup.SIZES)

    def directory(self, shape: Shape) -> Path:
        """Both models and the shape's batch."""
        path = self.work / f"{shape.prompt}-{shape.response}-{shape.distinct}"
        if not path.exists():
            path.mkdir()
            for name in (setup.common.STUDENT, setup.common.TEACHER):
                (path / name).symlink_to(self.work / name)
            setup.make_batch(path, shape)
        return path

    def run(self, arm: str, *options: object, python: Path | str = sys.executable) -> Result:
        """One arm in a fresh process; what it measured."""
        command = [str(python), str(HERE / "against" / f"arm_{arm}.py"), *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [*command, "--threads", str(self.threads)], capture_output=True, text=True, env=environment
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or (not lines and "--gradient" not in command):
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        found = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {}
        print(f"{arm} {' '.join(map(str, options[1:]))}", file=sys.stderr)
        return found


# --- training ----------------------------------------------------------


def agreement(bench: Bench, shape: Shape) -> Result:
    """Cosine of our gradient of one step with TRL's, and the ratio of their lengths."""
    work, (mine, theirs) = bench.directory(shape), ("ours.pt", "trl.pt")
    bench.run("ours", work, "--gradient", work / mine)
    bench.run("trl", work, "--gradient", work / theirs, python=PEER)
    first, second = torch.load(work / mine), torch.load(work / theirs)
    if first.keys() != second.keys():
        raise SystemExit(f"gradients of other parameters: {sorted(first.keys() ^ second.keys())}")
    one, other = (torch.cat([x[name].flatten() for name in first]).double() for x in (first, second))
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    for name in (mine, theirs):
        (work / name).unlink()
    return {"cosine": cosine, "length": float(one.norm() / other.norm()), "distinct": shape.distinct}


def tuned(bench: Bench, shape: Shape) -> Result:
    """The fastest setting of each arm, and everything that was tried."""
    work, steps = bench.directory(shape), ("--steps", 1)
    sequences = shape.questions * shape.responses
    batches = [8] if bench.quick else sorted({min(size, sequences) for size in BATCHES})
    budgets = [8192] if bench.quick else BUDGETS
    tried = {
        "trl": [bench.run("trl", work, *steps, "--batch", n, python=PEER) for n in batches],
        "ours": [
            bench.run("ours", work, *steps, "--sharing", mode, "--tokens", n)
            for mode in ("tree", "prefix")
            for n in budgets
        ],
        "naive": [bench.run("ours", work, *steps, "--sharing", "naive", "--tokens", n) for n in budgets],
    }
    best = {name: min(found, key=lambda x: x["seconds"][0]) for name, found in tried.items()}
    return {"best": best, "tried": tried}


def settings(best: Result) -> list[object]:
    """The options of an arm that ran with these."""
    if best["arm"] == "trl":
        return ["--batch", best["batch"]]
    return ["--sharing", best["sharing"], "--tokens", best["tokens"]]


def timed(bench: Bench, shape: Shape, sizes: Result, steps: int) -> Result:
    """One round: every arm in a fresh process."""
    work, count = bench.directory(shape), ("--steps", steps)
    chosen = {name: settings(best) for name, best in sizes.items()}
    found = {
        "trl": bench.run("trl", work, *count, *chosen["trl"], python=PEER),
        "ours": bench.run("ours", work, *count, *chosen["ours"]),
        "naive": bench.run("ours", work, *count, *chosen["naive"]),
    }
    if merged := duplicated(shape):
        found["merged"] = bench.run("ours", bench.directory(merged), *count, *chosen["ours"])
    return found


def duplicated(shape: Shape) -> Shape | None:
    """The same step with some responses drawn more than once."""
    distinct = DUPLICATES.get(shape.response)
    return replace(shape, distinct=distinct) if distinct else None


def training(bench: Bench, rounds: int, steps: int) -> list[Result]:
    found = []
    for shape in bench.shapes:
        variants = [shape, *([merged] if (merged := duplicated(shape)) else [])]
        same = [agreement(bench, variant) for variant in variants]
        if min(x["cosine"] for x in same) < 0.999:
            raise SystemExit(f"{shape.name}: the arms do not compute the same gradient: {same}")
        limits = {variant.distinct: setup.bounds(bench.directory(variant), variant) for variant in variants}
        entry = {"shape": asdict(shape), "agreement": same, "bounds": limits, **tuned(bench, shape)}
        found.append({**entry, "rounds": []})
    for _ in range(rounds):
        for shape, entry in zip(bench.shapes, found, strict=True):
            entry["rounds"].append(timed(bench, shape, entry["best"], steps))
    return found


def training_table(found: Sequence[Result]) -> list[str]:
    lines = [
        "| (prompt, response) | arm | questions a second | TRL's time / its time: min / **median** / max "
        "| bound by tokens (by weights) | share of it | peak MiB (models loaded) | setting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in found:
        shape = Shape(**entry["shape"])
        for arm in entry["rounds"][0]:
            runs = [each[arm] for each in entry["rounds"]]
            seconds = [statistics.median(run["seconds"]) for run in runs]
            peers = [statistics.median(each["trl"]["seconds"]) for each in entry["rounds"]]
            ratios = sorted(peer / own for peer, own in zip(peers, seconds, strict=True))
            middle = statistics.median(ratios)
            merged = duplicated(shape) if arm == "merged" else shape
            limit = entry["bounds"][merged.distinct if merged else 8]
            shared = arm in ("ours", "merged")
            size = " ".join(map(str, settings(runs[0]))).replace("--", "")
            lines.append(
                f"| {shape.name} | {arm} | {shape.questions / statistics.median(seconds):.2f} "
                f"| {ratios[0]:.2f} / **{middle:.2f}** / {ratios[-1]:.2f} "
                + (
                    f"| {limit['tokens']:.2f} ({limit['weights']:.2f}) | {middle / limit['tokens']:.0%} "
                    if shared
                    else "| | "
                )
                + f"| {max(run['peak_mib'] for run in runs):,.0f} ({runs[0]['loaded_mib']:,.0f}) "
                f"| {size} |"
            )
    same = [x for entry in found for x in entry["agreement"]]
    lines += [
        "",
        f"Gradients of one step against TRL's: lowest cosine {min(x['cosine'] for x in same):.9f}, lengths "
        f"{min(x['length'] for x in same):.6f} to {max(x['length'] for x in same):.6f} of theirs "
        f"({len(same)} batches, those with duplicates among them).",
    ]
    return lines


# --- loss memory -------------------------------------------------------


def memory(bench: Bench) -> Result:
    """The plain loss at a few sizes and, by a straight line, at the full one; then the others."""
    vocab = ("--vocab", 2000 if bench.quick else 151_936)
    few = (64, 128, 256) if bench.quick else PLAIN_TOKENS
    many = 1024 if bench.quick else LOSS_TOKENS
    plain = [bench.run("loss", "plain", tokens, *vocab) for tokens in few]
    slope, offset = statistics.linear_regression(few, [x["grown_mib"] for x in plain])
    chunks = (32, 128) if bench.quick else (256, 1024)
    return {
        "tokens": many,
        "plain": plain,
        "extrapolated_mib": slope * many + offset,
        "ours": [bench.run("loss", "ours", many, *vocab, "--chunk", chunk) for chunk in chunks],
        "trl": bench.run("loss", "trl", many, *vocab, python=PEER),
    }


def memory_table(found: Result) -> list[str]:
    whole = found["extrapolated_mib"]
    lines = ["| loss | tokens | MiB grown by | share of the plain one | seconds |", "|---|---|---|---|---|"]
    lines += [
        f"| plain | {x['tokens']:,} | {x['grown_mib']:,.0f} | | {x['loss_seconds']:.1f} |"
        for x in found["plain"]
    ]
    lines.append(f"| plain, extrapolated | {found['tokens']:,} | {whole:,.0f} | 1 | |")
    named = [(f"ours, chunks of {x['chunk']}", x) for x in found["ours"]]
    for name, x in [*named, ("TRL's, chunked", found["trl"])]:
        lines.append(
            f"| {name} | {x['tokens']:,} | {x['grown_mib']:,.0f} | 1/{whole / x['grown_mib']:.1f} "
            f"| {x['loss_seconds']:.1f} |"
        )
    return lines


# --- generation --------------------------------------------------------


def generation(bench: Bench, rounds: int) -> list[Result]:
    return [
        {"shape": asdict(shape), **bench.run("generate", bench.directory(shape), "--rounds", rounds)}
        for shape in bench.shapes
    ]


def generation_table(found: Sequence[Result]) -> list[str]:
    lines = [
        "| (prompt, response) | ours, ms a question | `generate`, question by question: times ours, "
        "min / **median** / max | `generate`, batched | greedy responses equal |",
        "|---|---|---|---|---|",
    ]
    for entry in found:
        shape, figures = Shape(**entry["shape"]), entry["figures"]
        ratios = [
            "{:.2f} / **{:.2f}** / {:.2f}".format(*figures[arm]["wall_ratio"])
            for arm in ("a question", "batched")
        ]
        own = figures["ours"]["wall_ms"][1] / shape.questions
        lines.append(
            f"| {shape.name} | {own:.0f} | {ratios[0]} | {ratios[1]} | {entry['greedy_equal']:.1%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("training", "memory", "generation")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repeats of all arms")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, in every arm")
    parser.add_argument("--quick", action="store_true", help="tiny models and lengths: does it run?")
    options = parser.parse_args()
    if not PEER.exists() and {"training", "memory"} & set(options.parts):
        raise SystemExit(f"{PEER} is missing; see the head of {Path(__file__).name} for how to make it")
    transformers.utils.logging.disable_progress_bar()
    result: Result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start",
        "threads": options.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, **_peer()},
    }
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), options.threads, options.quick)
        if "training" in options.parts:
            result["training"] = training(bench, options.rounds, options.steps)
            lines += ["**Training**", "", *training_table(result["training"]), ""]
        if "memory" in options.parts:
            result["memory"] = memory(bench)
            lines += ["**Loss memory**", "", *memory_table(result["memory"]), ""]
        if "generation" in options.parts:
            result["generation"] = generation(bench, options.rounds)
            lines += ["**Generation**", "", *generation_table(result["generation"]), ""]
    print("\n".join(lines) + "\n```json\n" + json.dumps(result) + "\n```")


def _peer() -> dict[str, str]:
    """Versions in the peer's environment: torch and transformers must be ours."""
    if not PEER.exists():
        return {}
    code = (
        "import json; from importlib.metadata import version as v; "
        "print(json.dumps({'trl': v('trl'), 'torch': v('torch'), 'transformers': v('transformers')}))"
    )
    found = json.loads(subprocess.run([str(PEER), "-c", code], capture_output=True, text=True).stdout)
    own = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, version in own.items():
        if found[name].split("+")[0] != version.split("+")[0]:
            raise SystemExit(f"{name} is {found[name]} in the peer's environment and {version} here")
    return {"trl": found["trl"]}


if __name__ == "__main__":
    main()
