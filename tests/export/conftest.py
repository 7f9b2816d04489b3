from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from export import onnx
from export.checkpoint import load
from export.facts import Facts, prepare
from runtime import bundle
from runtime.manifest import Manifest


@dataclass(frozen=True)
class Exported:
    """One tiny checkpoint exported in every precision, with what the gate was given."""

    facts: Facts
    bundles: dict[str, Path]
    scratch: Path

    def manifest(self, precision: str) -> Manifest:
        return bundle.read(self.bundles[precision])


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("bundles")
    facts = prepare(load(tiny_checkpoint), (), lambda _: None)
    bundles = {}
    for precision in ("fp32", "int8", "int4"):
        bundles[precision] = out / precision
        bundles[precision].mkdir()
        onnx.build(facts, bundles[precision], precision, f"tiny-{precision}", out)
    return Exported(facts, bundles, tmp_path_factory.mktemp("scratch"))
