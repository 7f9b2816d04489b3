"""onnxruntime-genai's arm of `benchmarks/onnx.py`; runs in the peers' environment.

    python onnx_genai.py WORK --build BLOCK      its builder makes WORK/genai-BLOCK from WORK/llama
    python onnx_genai.py WORK --model genai-64 --past 128 --threads 1

int4 weights with the LM head, accuracy level 4 (its fast CPU kernel). The builder's defaults are blocks of 32
and one buffer for past and present keys and values; blocks of 64 were its fastest here. Only the number of
threads is set.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_common as common


def build(work: Path, block: int) -> None:
    """`python -m onnxruntime_genai.models.builder` on the Llama checkpoint."""
    out = work / f"genai-{block}"
    shutil.rmtree(out, ignore_errors=True)
    extra = ["int4_accuracy_level=4", f"block_size={block}", "hf_token=false"]
    command = ["-m", "onnxruntime_genai.models.builder", "-i", work / "llama", "-o", out]
    more = ["-p", "int4", "-e", "cpu", "-c", work / "genai-cache", "--extra_options", *extra]
    subprocess.run([sys.executable, *map(str, [*command, *more])], check=True, stdout=sys.stderr)


def settings(path: Path, threads: int) -> None:
    """Write the number of threads into the model's genai_config.json."""
    file = path / "genai_config.json"
    found = json.loads(file.read_text())
    session = found["model"]["decoder"]["session_options"]
    session.update({"intra_op_num_threads": threads, "inter_op_num_threads": 1})
    file.write_text(json.dumps(found, indent=1))


def decode(options: Any) -> None:
    import onnxruntime_genai as og

    path = options.work / options.model
    settings(path, options.threads)
    config = json.loads((path / "genai_config.json").read_text())
    model = og.Model(str(path))
    ids = common.prompt_ids(options.past, config["model"]["vocab_size"])
    params = og.GeneratorParams(model)
    total = options.past + options.steps + common.WARM_STEPS + 2
    params.set_search_options(do_sample=False, max_length=total, min_length=total)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    generator.generate_next_token()
    taken = common.decode_ms(generator.generate_next_token, options.steps)
    size = sum(file.stat().st_size for file in path.glob("model.onnx*"))
    common.finish(ms=taken, model_bytes=size, version=og.__version__)


if __name__ == "__main__":
    found = common.options(*common.DECODE, ("--build", {"type": int, "default": 0}))
    if found.build:
        build(found.work, found.build)
        common.finish(built=found.build)
    else:
        decode(found)
