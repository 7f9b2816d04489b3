r"""Core ML: what a conversion takes, bytes by precision, what the evaluator takes, how near it is to torch.

    python benchmarks/coreml.py [--precisions fp16 int8 int4] [--work DIR] [--quick] [--families]

Markdown and JSON on stdout, progress on stderr. A checkpoint in the shape of SmolVLM-256M with random weights
goes into five functions (kept in `--work`, some minutes).

Conversion: each function in a process of its own; seconds from the loaded model to the saved package, and the
most memory that was resident. Packages: compressing, and merging what shares its weights; bytes of all three.
Evaluation: numpy evaluates the packages (numerics only, not a device's speed): a picture, a prefill of one
chunk, one token after 128; median of the repeats, and the most memory that was resident.
Differences: the largest |difference| from torch in float32 over the largest |value|, by part; the decoder on
embeddings of its own, over padded chunks and single tokens. `--families`: the same for a tiny checkpoint of
every family instead. Weights are random, so small types look worse than on a trained model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [
    str(HERE.parent),
    *(x for x in sys.path if Path(x or ".").resolve() != HERE),
]  # not `import onnx`

import numpy as np  # noqa: E402

CHECKPOINT = "checkpoint"
CHUNK, CONTEXT = 64, 2048
QUICK_CHUNK, QUICK_CONTEXT = 8, 128
PRECISIONS = ("fp16", "int8", "int4")
FAMILY_PRECISIONS = ("fp32", "fp16", "int8", "int4")
FAMILIES = ("smolvlm", "qwen3_vl", "qwen2_5_vl", "qwen2_vl", "internvl", "internvl_qwen3", "lfm2_vl")
PAST, REPEATS = 128, 5
Result = dict[str, Any]


# --- parts of a checkpoint ---------------------------------------------


class Parts:
    """A loaded checkpoint, its functions, and where their packages lie."""

    def __init__(self, work: Path, chunk: int, context: int) -> None:
        import torch

        from export import static
        from export.checkpoint import load
        from export.coreml_parts import parts_of
        from export.families import family_of, without_tiles
        from export.static_decoder import StaticSizes

        torch.set_num_threads(1)
        self.work, self.chunk = work, chunk
        self.checkpoint = load(work / CHECKPOINT)
        self.family = family_of(self.checkpoint)
        if self.family.untiled():
            without_tiles(self.checkpoint)
        self.image = static.fixed_views(self.family.image(self.checkpoint), 64)
        sizes = StaticSizes(context, chunk)
        self.parts = parts_of(self.checkpoint, self.family, self.image, sizes)

    def convert(self, role: str, name: str, base: str = "float16") -> Path:
        """The function's package, made if it is not there."""
        from export import coreml_convert

        path = self.work / base / f"{role}-{name}.mlpackage"
        if not path.exists():
            coreml_convert.save(coreml_convert.convert(self.parts.of(role)[name], role, base), path)
        return path


def package(work: Path, precision: str) -> Result:
    """Compress what was converted and merge it; seconds and bytes by part."""
    from export import coreml_compress, coreml_convert, coreml_policy
    from runtime.bundle import digest

    policy, found = coreml_policy.resolve(precision), {}
    start = time.perf_counter()
    for role, names in functions().items():
        sources = {}
        for name in names:
            source = work / policy.base / f"{role}-{name}.mlpackage"
            if policy.compresses:
                out = work / precision / f"{role}-{name}.mlpackage"
                source = coreml_compress.compress(source, coreml_compress.choose(source, role, policy), out)
            sources[name] = source
        merged = coreml_convert.merge(sources, work / precision / f"{role}.mlpackage")
        found[role] = digest(merged)[1]
    return {"seconds": time.perf_counter() - start, "bytes": found}


def functions() -> dict[str, tuple[str, ...]]:
    """Names by part. Nothing is imported: the evaluator's memory is measured without the exporter's."""
    both = ("prefill", "decode")
    return {"vision_encoder": ("main",), "embed_tokens": both, "decoder": both}


# --- what is measured, each call in a fresh process ---------------------


def convert(work: Path, role: str, name: str, chunk: int, context: int) -> Result:
    """Seconds and peak memory of one function."""
    from benchmarks.against.onnx_common import resident_mib

    parts = Parts(work, chunk, context)
    before = resident_mib("VmRSS")
    start = time.perf_counter()
    parts.convert(role, name)
    return {"seconds": time.perf_counter() - start, "start_mib": before, "peak_mib": resident_mib()}


def evaluate(work: Path, precision: str, chunk: int) -> Result:
    """Milliseconds of a picture, a prefill of one chunk and a token, by the evaluator; its peak memory."""
    from benchmarks.against.onnx_common import resident_mib
    from runtime.mil import Program
    from runtime.mil_weights import Store

    store = Store()
    programs = {
        role: Program.open(work / precision / f"{role}.mlpackage", store=store) for role in functions()
    }
    vision, decoder = programs["vision_encoder"], programs["decoder"]
    state = decoder.new_state()
    pixels = zeros(vision.inputs())
    found = {"picture_ms": median_ms(lambda: vision.run(pixels))}
    for name, start in (("prefill", 0), ("decode", min(PAST, 2 * chunk))):
        given = zeros(decoder.inputs(name))
        given["inputs_embeds"] += 0.1
        given["start"][:] = start
        run = lambda name=name, given=given: decoder.run(given, function=name, state=state)  # noqa: E731
        found[f"{name}_ms"] = median_ms(run)
    return {**found, "peak_mib": resident_mib()}


def zeros(signature: Any) -> dict[str, Any]:
    """An input of zeros for each tensor of a function."""
    return {
        name: np.zeros(kind.shape, np.float32 if kind.dtype.startswith("float") else kind.numpy)
        for name, kind in signature.items()
    }


def median_ms(step: Callable[[], Any]) -> float:
    step()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def differences(work: Path, precision: str, chunk: int, context: int) -> Result:
    """By part, the largest difference from torch over the largest value."""
    import torch
    from PIL import Image

    from runtime.image import prepare
    from runtime.image_spec import PatchifyPadded
    from runtime.mil import Program

    parts = Parts(work, chunk, context)
    base = "float32" if precision == "fp32" else "float16"
    for role, names in functions().items():
        for name in names:
            parts.convert(role, name, base)
    if not (work / precision / "decoder.mlpackage").exists():
        package(work, precision)
    rounded = precision != "fp32"
    programs = {
        role: Program.open(work / precision / f"{role}.mlpackage", rounded=rounded) for role in functions()
    }
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 255, (70, 90, 3), dtype=np.uint8))
    view = prepare(picture, parts.image).views[0]
    modules = parts.family.modules(parts.checkpoint)
    given = [torch.from_numpy(np.ascontiguousarray(view.inputs[name])) for name in modules.vision.example]
    if isinstance(parts.image.operations[-1], PatchifyPadded):
        given[0] = given[0][:, : view.tokens * parts.image.tokens.merge**2]
    with torch.no_grad():
        found = modules.vision.module(*given)
        table = modules.embed(torch.arange(chunk)[None]).numpy()
    features = (found if isinstance(found, tuple) else (found,))[0].numpy()
    got = programs["vision_encoder"].run({"pixel_values": view.inputs["pixel_values"]})["image_features"]
    ids = {"input_ids": np.arange(chunk, dtype=np.int32)[None]}
    rows = programs["embed_tokens"].run(ids, function="prefill")["inputs_embeds"]
    logits = list(decoded(parts, programs["decoder"]))
    top1 = float(np.mean([a.argmax() == b.argmax() for a, b in logits]))
    return {
        "vision_encoder": relative(got, features.reshape(got.shape)),
        "embed_tokens": relative(rows, table),
        "decoder": max(relative(a, b) for a, b in logits),
        "top1": top1,
    }


def decoded(parts: Parts, program: Any) -> Iterator[tuple[Any, Any]]:
    """Logits (vocab,) of the program and of torch: a full chunk, a padded one, single tokens, a chunk."""
    import torch

    shape, modules = parts.family.decoder_shape(parts.checkpoint), parts.family.modules(parts.checkpoint)
    chunk = parts.chunk
    borders = [0, chunk, 2 * chunk - 3, 2 * chunk - 2, 2 * chunk - 1, 3 * chunk - 1]
    count = borders[-1]
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, shape.vocab, (1, count)))
    positions = torch.arange(count)[None]
    more: dict[str, Any] = {}
    if shape.position_rows > 1:
        positions = torch.cat([positions, positions // 2, positions % 7])
        more = {"position_ids": positions[:, None]}
    with torch.no_grad():
        embeds = modules.embed(ids)
        hidden = modules.text(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state
        wanted = modules.head(hidden[:, [end - 1 for end in borders[1:]]])[0].numpy()
    state = program.new_state()
    for place, (start, end) in enumerate(itertools.pairwise(borders)):
        function, size = ("decode", 1) if end - start == 1 else ("prefill", chunk)
        given = zeros(program.inputs(function))
        given["inputs_embeds"][:, : end - start] = embeds[:, start:end].numpy()
        given["position_ids"][:, : end - start] = positions[:, start:end].numpy()
        given["start"][:], given["last"][:] = start, end - start - 1
        assert size >= end - start
        yield program.run(given, function=function, state=state)["logits"].reshape(-1), wanted[place]


def relative(got: Any, wanted: Any) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def child(work: Path, **arguments: Any) -> Result:
    """One of the functions above in a process of its own."""
    command = [
        sys.executable, "-m", "benchmarks.coreml", "--work", str(work), "--child", json.dumps(arguments)
    ]  # fmt: skip
    print(arguments, file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- tables -------------------------------------------------------------


def measure(work: Path, quick: bool, precisions: Sequence[str]) -> Result:
    """All figures of the one shape, raw."""
    from benchmarks.against import onnx_models

    sizes = {"chunk": QUICK_CHUNK if quick else CHUNK, "context": QUICK_CONTEXT if quick else CONTEXT}
    work.mkdir(parents=True, exist_ok=True)
    if not (work / CHECKPOINT).exists():
        onnx_models.write_checkpoint(work, onnx_models.TINY if quick else onnx_models.FULL)
    found: Result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start",
        **sizes,
        "convert": {
            f"{role} {name}": child(work, what="convert", role=role, name=name, **sizes)
            for role, names in functions().items()
            for name in names
        },
        "precisions": {},
    }
    for precision in precisions:
        found["precisions"][precision] = {
            **child(work, what="package", precision=precision),
            "evaluate": child(work, what="evaluate", precision=precision, chunk=sizes["chunk"]),
            "differences": child(work, what="differences", precision=precision, **sizes),
        }
    return found


def families(work: Path) -> Result:
    """Differences of a tiny checkpoint of every family."""
    from tests.checkpoints import FAMILIES as MAKERS
    from tests.checkpoints import VARIANTS

    found: Result = {}
    for name in FAMILIES:
        if not (work / name / CHECKPOINT).exists():
            (MAKERS | VARIANTS)[name](work / name / CHECKPOINT)
        found[name] = {
            precision: differences(work / name, precision, chunk=16, context=128)
            for precision in FAMILY_PRECISIONS
        }
    return found


def table(found: Result) -> list[str]:
    lines = [
        f"Machine: {found['machine']}. Chunk {found['chunk']}, context {found['context']}.",
        "",
        "| function | seconds | MiB before | peak MiB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {run['seconds']:.1f} | {run['start_mib']:.0f} | {run['peak_mib']:.0f} |"
        for name, run in found["convert"].items()
    ]
    lines += [
        "",
        "| | MB: vision, embedding, decoder | packing s | evaluator, ms: picture | prefill | token ",
    ]
    lines[-1] += "| peak MiB |"
    lines += ["|---|---|---|---|---|---|---|"]
    for precision, run in found["precisions"].items():
        sizes = ", ".join(f"{size / 1e6:.1f}" for size in run["bytes"].values())
        times = " | ".join(
            f"{run['evaluate'][f'{name}_ms']:.0f}" for name in ("picture", "prefill", "decode")
        )
        peak = run["evaluate"]["peak_mib"]
        lines.append(f"| {precision} | {sizes} | {run['seconds']:.0f} | {times} | {peak:.0f} |")
    return [*lines, "", *difference_table({"256M shape": _differences(found)})]


def _differences(found: Result) -> Result:
    return {precision: run["differences"] for precision, run in found["precisions"].items()}


def difference_table(found: Result) -> list[str]:
    """Vision / embedding / decoder by precision."""
    precisions = list(next(iter(found.values())))
    lines = [f"| | {' | '.join(precisions)} |", "|---|" + "---|" * len(precisions)]
    for name, runs in found.items():
        cells = [
            " / ".join(f"{runs[p][role]:.1e}" for role in ("vision_encoder", "embed_tokens", "decoder"))
            for p in precisions
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), help="pal4 takes minutes more")
    parser.add_argument("--work", type=Path, help="where models are kept; a temporary directory by default")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--families", action="store_true", help="differences of every family, tiny models")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        steps = {"convert": convert, "package": package, "evaluate": evaluate, "differences": differences}
        print(json.dumps(steps[options.child.pop("what")](options.work, **options.child)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if options.families:
            found = families(work)
            print("\n".join(difference_table(found)) + "\n```json\n" + json.dumps(found) + "\n```")
            return
        found = measure(work, options.quick, options.precisions)
    print("\n".join(table(found)) + "\n```json\n" + json.dumps(found) + "\n```")


if __name__ == "__main__":
    main()
