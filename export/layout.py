"""What loaders of the ecosystem need beyond the bundle's own contract.

In: a bundle being written. Out: `config.json` with its `transformers.js_config`, processor files; a vision
graph that takes a picture's tensor with or without a batch in front. Not here: the parts' names (`onnx.py`),
large files (`storage.py`).

transformers.js picks a part's file by its dtype's suffix, fetches as many data files as the configuration
says, and makes an empty cache of the configured type. Loading there is claimed only for families whose
answers were compared; `docs/export.md` names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.passes import add_initializer, constant
from runtime import files
from runtime.manifest import Part

CONFIG = "config.json"
JS_KEY = "transformers.js_config"
_DTYPES = {"": "fp32", "_fp16": "fp16", "_int8": "int8", "_q4": "q4", "_q4f16": "q4f16"}
"""transformers.js' name for each file suffix."""

_CACHES = ("float32", "float16")
"""Types of keys and values that transformers.js can make."""


def any_batch(model: ir.Model) -> int:
    """`pixel_values` may be (pictures, 3, H, W) or (batch, pictures, 3, H, W), as transformers.js feeds it.

    The input loses its declared shape (a graph declares one rank only); `dimensions` still finds it.
    """
    graph = model.graph
    pixels = next((value for value in graph.inputs if value.name == "pixel_values"), None)
    if pixels is None or pixels.shape is None or len(pixels.shape) != 4:
        return 0
    sizes = [size if isinstance(size, int) else 0 for size in list(pixels.shape)[1:]]
    if 0 in sizes:
        return 0
    users = list(pixels.uses())
    target = add_initializer(graph, "pixel_values.views", np.array([-1, *sizes], np.int64))
    flat = ir.node("Reshape", [pixels, target], name="pixel_values.reshape")
    flat.outputs[0].name, flat.outputs[0].type = "pixel_values.flat", pixels.type
    flat.outputs[0].shape, pixels.shape = pixels.shape, None
    for node, index in users:
        node.replace_input_with(index, flat.outputs[0])
    graph.insert_before(users[0][0], flat)
    return 1


def dimensions(value: ir.Value) -> tuple[int | str, ...]:
    """Sizes and names of a graph input or output; those of the first reshape where none are declared."""
    if value.shape is not None:
        return tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    for node, _ in value.uses():
        if node.op_type == "Cast" and not node.outputs[0].is_graph_output():
            return dimensions(node.outputs[0])
        if node.op_type == "Reshape" and (target := constant(node.inputs[1])) is not None:
            return tuple("num_images" if size == -1 else int(size) for size in target)
    raise ValueError(f"{value.name}: has no shape and is not reshaped")


def write_processor(staged: Path, processor: Any) -> None:
    """Tokenizer and processor files; transformers.js looks for the processor's class and the chat template in
    other places than transformers does."""
    processor.save_pretrained(staged)
    image = {**processor.image_processor.to_dict(), "processor_class": type(processor).__name__}
    files.write_json(staged / "preprocessor_config.json", image)
    settings = staged / "tokenizer_config.json"
    if settings.is_file() and isinstance(template := getattr(processor, "chat_template", None), str):
        files.write_json(settings, {**files.read_json(settings), "chat_template": template})


def write_config(staged: Path, parts: Sequence[Part]) -> None:
    """Tell transformers.js the dtype and data files of each part, and the type of the cache."""
    path = staged / CONFIG
    if not path.is_file():
        return
    config = files.read_json(path)
    config[JS_KEY] = {**config.get(JS_KEY, {}), **javascript(parts)}
    files.write_json(path, config)


def javascript(parts: Sequence[Part]) -> dict[str, Any]:
    """`transformers.js_config` of these parts. Nothing about a cache that it cannot make."""
    names = {part.role: Path(part.path).name.removesuffix(".onnx") for part in parts}
    found: dict[str, Any] = {"dtype": {}, "use_external_data_format": {}}
    for part in parts:
        if part.role == "decoder_prefill":
            continue  # it knows one decoder
        base, suffix = split_suffix(names[part.role])
        found["dtype"][base] = _DTYPES[suffix]
        if part.data:
            found["use_external_data_format"][f"{base}{suffix}.onnx"] = len(part.data)
    decoder = next(part for part in parts if part.role == "decoder")
    kinds = {spec.dtype for spec in decoder.inputs if spec.name.startswith("past_")}
    if len(kinds) == 1 and (kind := kinds.pop()) in _CACHES:
        found["kv_cache_dtype"] = kind
    return found


def split_suffix(name: str) -> tuple[str, str]:
    """`decoder_model_merged_q4` -> (`decoder_model_merged`, `_q4`)."""
    for suffix in _DTYPES:
        if suffix and name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""
