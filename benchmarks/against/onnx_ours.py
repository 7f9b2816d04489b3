"""Our arm of `benchmarks/onnx.py`: a bundle through the runtime that a device uses.

    python onnx_ours.py WORK --what decode|ttft|export [--model BUNDLE] [--threads N]

`decode`: `Session.decode` and argmax, token by token, after a prompt of `--past` random ids.
`ttft`: from the bytes of a PNG and a question to the first text, model loaded, cache empty.
`export`: the checkpoint to a bundle, seconds and the most memory held.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import onnx_common as common

common.import_from_root()


def decode(options: Any) -> None:
    import numpy as np

    from runtime.session import open_bundle

    with open_bundle(options.work / options.model, threads=options.threads, verify=False) as session:
        part = session.manifest.part("decoder")
        vocab = part.outputs[0].shape[-1]
        ids = np.array(common.prompt_ids(options.past, int(vocab)), np.int64)
        token = int(np.argmax(session.prefill(ids)))

        def step() -> None:
            nonlocal token
            token = int(np.argmax(session.decode(token)))

        taken = common.decode_ms(step, options.steps)
        common.finish(ms=taken, **weights(options.work / options.model, session.manifest))


def weights(bundle: Path, manifest: Any) -> dict[str, Any]:
    """Bytes of the decoder part, and of one token's keys and values; embedding rows are read one by one."""
    sizes = {"float32": 4, "float16": 2, "int8": 1, "uint8": 1}
    part = manifest.part("decoder")
    states = [s for s in manifest.state if s.kind == "kv"]
    token = sum(sizes[s.dtype] * int(s.shape[1]) * int(s.shape[3]) for s in states)
    read = part.bytes + sum(file.bytes for file in part.data)
    return {"decoder_bytes": read, "kv_bytes_a_token": token}


def ttft(options: Any) -> None:
    from runtime.generation import GenerationOptions
    from runtime.session import open_bundle

    picture = (options.work / "picture.png").read_bytes()
    question = (options.work / "question.txt").read_text()
    # a first question each time: nothing of the one before is used
    bundle = options.work / options.model
    with open_bundle(bundle, threads=options.threads, verify=False, reuse=False) as session:
        stages: dict[str, list[float]] = {"ms": [], "prepare": [], "encode": [], "prefill": []}
        for number in range(options.repeats + 1):
            answer = session.ask(picture, question, GenerationOptions(max_new_tokens=8))
            if number:
                stats = answer.stats
                stages["ms"].append(stats.ttft_ms)
                stages["prepare"].append(stats.prepare_ms)
                stages["encode"].append(stats.encode_ms)
                stages["prefill"].append(stats.prefill_ms)
        sizes = {"prompt_tokens": answer.stats.prompt_tokens, "image_tokens": answer.stats.image_tokens}
        common.finish(**stages, **sizes, text=answer.text)


def export(options: Any) -> None:
    from export import export_checkpoint

    out = options.work / "exported"
    shutil.rmtree(out, ignore_errors=True)
    checkpoint = options.work / "checkpoint"
    start = time.perf_counter()
    export_checkpoint(checkpoint, out, precision=options.model or "int4")
    seconds = time.perf_counter() - start
    parameters = sum(
        entry["parameters"]
        for part in _manifest(out)["parts"]
        for entry in part["bits"]
        if part["role"] != "embed_tokens"  # tied: the head holds the same
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    common.finish(ms=[1e3 * seconds], fp32_mib=_fp32_mib(checkpoint), bundle_bytes=size, stored=parameters)
    shutil.rmtree(out)


def _manifest(bundle: Path) -> Any:
    import json

    return json.loads((bundle / "manifest.json").read_text())


def _fp32_mib(checkpoint: Path) -> float:
    """The checkpoint's weights in float32 (they are stored so)."""
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 2**20


if __name__ == "__main__":
    found = common.options(
        *common.DECODE,
        ("--what", {"choices": ("decode", "ttft", "export"), "default": "decode"}),
        ("--repeats", {"type": int, "default": 3}),
    )
    {"decode": decode, "ttft": ttft, "export": export}[found.what](found)
