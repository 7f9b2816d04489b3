from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight SmolVLM directory: 2 vision and 2 text layers, width 64, 64 px images."""
    from tests.checkpoints import write_smolvlm

    return write_smolvlm(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as a float32 ONNX bundle, made by the real exporter."""
    from export import export_checkpoint

    return export_checkpoint(tiny_checkpoint, tmp_path_factory.mktemp("bundles") / "tiny")
