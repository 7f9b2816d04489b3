r"""How often `pocketvlm report --compare` is right; how long a browser takes for a page of twelve bundles.

    python benchmarks/report.py [--trials 1000] [--loads 11] [--chromium chromium]

Markdown and JSON on stdout, progress on stderr. The rates are simulated, no device is timed: 10,000 questions
of which 5 % change sides; timings of ten processes a side, or as many as the table says, that scatter by 2 %
and whose answers jitter by 5 %. The page is made from invented figures of twelve bundles on two devices, two
tasks, nine variants and 800 pictures; *ms* is what the browser itself counts until everything is laid out.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evals import stats
from evals.ship import ship_compare, ship_report
from tests.evals import ship_data as data

PROBE = (
    "<script>addEventListener('load',()=>{document.title="
    "String(performance.getEntriesByType('navigation')[0].loadEventStart)})</script>"
)
REPEATS = 6
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def worse(found: Any) -> set[str]:
    return {one.bundle for one in found.tests if one.finding == "worse"}


def nothing(draw: np.random.Generator, trial: int) -> bool:
    """Two bundles, accuracy and timings drawn anew on both sides: is anything called worse?"""
    right = draw.random(10_000) < 0.9
    sides = []
    for side in range(2):
        rights = {name: data.flipped(draw, right, 0.0, 0.025) for name in ("fp32", "int8")}
        timed = data.timed(2 * trial + side, repeats=REPEATS)
        sides.append(timed.model_copy(update={"tasks": data.asked(rights).tasks}))
    return bool(worse(ship_compare.compare(*sides)))


def point(draw: np.random.Generator, bundles: int) -> bool:
    """One of some bundles loses a point: is it found, and it alone?"""
    right = draw.random(10_000) < 0.9
    names = [f"bundle-{i}" for i in range(bundles)]
    after = dict.fromkeys(names, right) | {names[0]: data.flipped(draw, right, 0.01)}
    found = ship_compare.compare(data.asked(dict.fromkeys(names, right)), data.asked(after))
    return worse(found) == {names[0]}


def slower(trial: int, processes: int) -> bool:
    """One of two bundles is 5 % slower: is it found?"""
    before, now = (
        data.timed(10**6 + 2 * trial, processes=processes, repeats=REPEATS),
        data.timed(10**6 + 2 * trial + 1, processes=processes, repeats=REPEATS, int8=1.05),
    )
    return "int8" in worse(ship_compare.compare(before, now))


def rates(trials: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    kinds: dict[str, Any] = {
        "nothing changed, anything called worse": lambda i: nothing(draw, i),
        "1 point lost by 1 of 1 bundles": lambda i: point(draw, 1),
        "1 point lost by 1 of 12 bundles": lambda i: point(draw, 12),
        **{f"5 % slower, {n} processes": lambda i, n=n: slower(i, n) for n in (5, 10, 20)},
    }
    found = {}
    for name, trial in kinds.items():
        print(name, file=sys.stderr)
        count = sum(trial(i) for i in range(trials))
        interval = stats.wilson(count, trials)
        found[name] = {"count": count, "trials": trials, "low": interval.low, "high": interval.high}
    return found


def page(directory: Path) -> Path:
    """The report of twelve bundles."""
    forms, precisions = ("onnx", "gguf", "coreml", "static"), {"fp32": 1.0, "int8": 0.7, "int4": 0.6}
    names = {f"student-{form}-{p}": times for form in forms for p, times in precisions.items()}
    lost = {name: (0.05, 0.01) if name.endswith("int4") else (0.006, 0.004) for name in names}
    noise = [{"name": f"noise-{i}", "family": "noise", "severity": i} for i in range(1, 6)]
    data.save(
        directory,
        a=data.bench("Board A", names, grid=("small", "large")),
        b=data.bench("Board B", names, scale=3, seed=1),
        shapes=data.evaluation(lost, n=800, pictures=800, variants=[*data.VARIANTS, *noise]),
        charts=data.evaluation(lost, task="charts", n=800, seed=2),
        parity=data.parity(list(names)),
    )
    return ship_report.write(ship_report.make([directory]), directory / "report")


def load_ms(path: Path, chromium: str, profile: Path) -> float:
    copy = path.with_name("probed.html")
    copy.write_text(path.read_text().replace("</head>", f"{PROBE}</head>"))
    command = [chromium, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", f"file://{copy}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    return float(html.unescape(title[1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--loads", type=int, default=11, help="0: no browser")
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()
    found: dict[str, Any] = {"rates": rates(options.trials)}
    print("| simulated | share of trials (95 %) |\n|---|---|")
    for name, one in found["rates"].items():
        share = one["count"] / one["trials"]
        print(f"| {name} | {100 * share:.1f} % ({100 * one['low']:.1f} to {100 * one['high']:.1f}) |")
    if options.loads:
        with tempfile.TemporaryDirectory() as folder:
            path = page(Path(folder))
            profile = Path(folder) / "profile"
            times = [load_ms(path, options.chromium, profile) for _ in range(options.loads)]
            found["page"] = {"bytes": path.stat().st_size, "load_ms": times}
        median, size = statistics.median(times), found["page"]["bytes"]
        print(f"\nPage of 12 bundles: {size:,} bytes, laid out after {median:.0f} ms")
        print(f"(median of {len(times)} loads; longest {max(times):.0f} ms)")
    print("\n```json\n" + json.dumps(found) + "\n```")


if __name__ == "__main__":
    main()
