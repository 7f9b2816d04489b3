"""Runs a bundle in onnxruntime-genai; a script for an interpreter that has it and numpy, nothing of ours.

In: a bundle's directory, a JSON file: `cases` of {`ids` or `prompt`, `images` (paths), `tensors` (a .npz that
stands in for its image processor's output), `new_tokens`}. Out, on stdout: a JSON list, for each case the
prompt's `ids`, the `tokens` after them, the `logits` that the first and the last of them were taken from, and
the file that its own processor's tensors went to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


def run(model: Any, case: dict[str, Any], out: Path) -> dict[str, Any]:
    tensors = og.NamedTensors()
    found: dict[str, Any] = {}
    if "prompt" in case:
        processor = model.create_multimodal_processor()
        images = og.Images.open(*case["images"]) if case.get("images") else None
        tensors = processor(case["prompt"], images=images)
        kept: dict[str, Any] = {name: np.asarray(tensors[name].as_numpy()) for name in tensors.keys()}  # noqa: SIM118
        np.savez(out, **kept)
        ids = kept["input_ids"].reshape(-1)
        found["tensors"] = str(out)
    else:
        ids = np.array(case["ids"], np.int32)
        tensors["input_ids"] = ids[None]
        tensors["num_image_tokens"] = np.array([case.get("image_tokens", 0)], np.int64)
        if "tensors" in case:
            with np.load(case["tensors"]) as arrays:
                for name in arrays.files:
                    tensors[name] = arrays[name]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + case["new_tokens"], do_sample=False)
    generator = og.Generator(model, params)
    generator.set_inputs(tensors)
    found["logits"] = []
    while not generator.is_done():
        found["logits"] = [*found["logits"][:1], generator.get_logits().reshape(-1).tolist()]
        generator.generate_next_token()
    sequence = generator.get_sequence(0)
    return {**found, "ids": [int(i) for i in ids], "tokens": [int(i) for i in sequence[len(ids) :]]}


def main() -> None:
    bundle, job = Path(sys.argv[1]), Path(sys.argv[2])
    model = og.Model(str(bundle))
    cases = json.loads(job.read_text(encoding="utf-8"))
    found = [run(model, case, job.with_name(f"{job.stem}-{i}.npz")) for i, case in enumerate(cases)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
