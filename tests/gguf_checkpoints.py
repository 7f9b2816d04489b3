"""Tiny checkpoints that llama.cpp runs: one window size, deepstack in fewer layers than there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.checkpoints import FAMILIES, VARIANTS


def write(family: str, out: Path, **shape: int) -> Path:
    """A checkpoint of the family, changed where llama.cpp would refuse it."""
    maker = FAMILIES.get(family) or VARIANTS[family]
    maker(out, **shape)
    if family == "qwen2_5_vl":
        edit(out, lambda config: config["vision_config"].update(window_size=112))
    if family == "qwen3_vl":
        edit(out, lambda config: config["vision_config"].update(deepstack_visual_indexes=[0]))
        weights = load_file(out / "model.safetensors")
        kept = {name: each for name, each in weights.items() if "deepstack_merger_list.1" not in name}
        save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change config.json in place."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
