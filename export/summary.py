"""What an export wrote, in numbers: bytes and bits of each part, cache bytes, parity.

In: bundle directories. Out: plain facts (`--json`), a table. Not here: writing bundles.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.formatting import parameters, significant, size
from runtime import bundle
from runtime.manifest import Manifest, Part

if TYPE_CHECKING:
    from rich.table import Table

PER_TOKENS = 1000
"""The cache is told for so many tokens."""


def facts(path: Path) -> dict[str, Any]:
    """The numbers of one bundle, as JSON has them."""
    manifest = bundle.read(path, verify=False)
    return {
        "path": str(path),
        "target": manifest.target,
        "flavour": manifest.flavour,
        "precision": manifest.precision,
        "providers": list(manifest.providers),
        "context": manifest.limits.context,
        "image_tokens": manifest.limits.image_tokens,
        "images": manifest.limits.images,
        # llama.cpp has its own
        "cache_bytes_per_1000_tokens": cache_bytes(manifest, PER_TOKENS) if manifest.state else None,
        "parts": [_part(part) for part in manifest.parts],
        "bytes": _all_bytes(manifest),
        "parity": manifest.parity.figures,
        "notes": list(manifest.notes),
    }


def cache_bytes(manifest: Manifest, tokens: int) -> int:
    """Bytes of the state of so many tokens; what has a fixed shape counts in whole."""
    return sum(state.bytes(tokens) for state in manifest.state)


def _part(part: Part) -> dict[str, Any]:
    return {
        "role": part.role,
        "bytes": part.bytes,
        "data": {file.path: file.bytes for file in part.data},
        "bits": {f"{each.bits} {each.scheme}": each.parameters for each in part.bits},
    }


def _all_bytes(manifest: Manifest) -> int:
    """Parts and their data files, each file once."""
    return sum({file.path: file.bytes for file in manifest.files()}.values())


def table(path: Path) -> Table:
    """One row a part and a data file, for people; under it what the bundle holds and how close it is."""
    from rich.table import Table

    manifest = bundle.read(path, verify=False)
    limits = manifest.limits
    cache = (
        f"cache {size(cache_bytes(manifest, PER_TOKENS))} per {PER_TOKENS} tokens; " if manifest.state else ""
    )
    found = Table(
        "part",
        "bytes",
        "parameters x bits",
        title=f"{path.name} ({manifest.flavour if manifest.format == 'onnx' else manifest.format})",
        caption=f"{cache}at most {limits.context} tokens, {limits.images} "
        f"picture{'s' * (limits.images != 1)}, {limits.image_tokens} tokens a picture; "
        f"against the checkpoint: {_parity(manifest)}",
    )
    for part in manifest.parts:
        bits = ", ".join(f"{parameters(each.parameters)} x {each.bits}" for each in part.bits)
        found.add_row(part.role, size(part.bytes), bits)
    for file, number in {file.path: file.bytes for part in manifest.parts for file in part.data}.items():
        found.add_row(file, size(number), "weights of the parts above, each once")
    return found


def _parity(manifest: Manifest) -> str:
    figures = manifest.parity.figures
    shown = (("top-1", "top1_agreement"), ("KL", "kl_mean"), ("logits differ", "logit_rel_diff"))
    return ", ".join(f"{label} {significant(figures[key])}" for label, key in shown if key in figures)
