"""Converting to GGUF takes the memory of its largest tensor, and a killed export leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from runtime.files import TEMP_PREFIX
from tests import gguf_checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONSTANT_MIB = 16
"""The allocator's own, buffers of files, the tables of the writer."""

CHILD = """
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from export.gguf import plan_files
from export.gguf_write import write


def convert(checkpoint, out):
    files = plan_files(Path(checkpoint))
    for precision in ("f32", "f16", "bf16", "q8_0"):
        write(files.text, files.source, Path(out) / "text.gguf", precision)
        write(files.vision, files.source, Path(out) / "vision.gguf", precision)


def resident(key):
    line = next(x for x in open("/proc/self/status") if x.startswith(key))
    return int(line.split()[1]) / 1024


small, large, out = sys.argv[1:]
convert(small, out)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
convert(large, out)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_tensor_is_all_that_is_in_memory(tmp_path: Path, dtype: str) -> None:
    small = gguf_checkpoints.write("smolvlm", tmp_path / "small")
    large = wide(tmp_path / "large", dtype)
    weights = (large / "model.safetensors").stat().st_size / 2**20
    largest = WIDE["intermediate_size"] * WIDE["hidden_size"] * 4 / 2**20
    assert weights > 12 * largest * (1 if dtype == "float32" else 0.5)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, small, large, tmp_path],
        capture_output=True, text=True, cwd=ROOT, timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    grown = float(done.stdout)
    assert grown <= 1.5 * largest + CONSTANT_MIB, f"{grown:.0f} MiB for tensors of {largest:.0f} MiB"


WIDE = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 4}
"""Twelve matrices of 24 MiB in float32."""


def wide(out: Path, dtype: str) -> Path:
    """A checkpoint whose text model is a few hundred MiB in float32."""
    import torch
    from safetensors.torch import load_file, save_file

    gguf_checkpoints.write("smolvlm", out)
    config = json.loads((out / "config.json").read_text())
    config["text_config"] |= {**WIDE, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    (out / "config.json").write_text(json.dumps(config))
    hidden, inner = WIDE["hidden_size"], WIDE["intermediate_size"]
    kept = {
        name: each
        for name, each in load_file(out / "model.safetensors").items()
        if "text_model.layers" not in name
    }
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    for layer in range(WIDE["num_hidden_layers"]):
        for name, shape in shapes.items():
            kept[f"model.text_model.layers.{layer}.{name}.weight"] = torch.randn(shape)
    kind = getattr(torch, dtype)
    save_file(
        {name: each.to(kind) for name, each in kept.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    return out


def test_a_killed_export_leaves_nothing_for_long(tmp_path: Path) -> None:
    """Killed with files half written: no bundle; the next export removes what lies there."""
    checkpoint = gguf_checkpoints.write("smolvlm", tmp_path / "tiny")
    out = tmp_path / "out"
    options = ["--to", "gguf", "--quant", "q4_0", "--out", str(out)]
    command = [sys.executable, "-m", "pocketvlm", "export", str(checkpoint), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    while running.poll() is None and not list(out.glob(f"{TEMP_PREFIX}*/*Q4_0.gguf")):
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    left = [path.name for path in out.iterdir()]
    assert left and all(name.startswith(TEMP_PREFIX) for name in left)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in out.iterdir()] == ["tiny-gguf-q4_0"]
    assert not list((tmp_path / "temporary").rglob("*.gguf"))
