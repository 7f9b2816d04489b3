"""Two processes on one machine (gloo), DDP and FSDP2, against one process."""

from __future__ import annotations

import multiprocessing
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.training import checkpoints
from tests.checkpoints import FAMILIES
from tests.distill import learning, worker
from tests.distill.worker import DDP, FSDP2

ADAM = 5e-3
"""Adam divides by the gradient's size: where that is rounding, so is the update."""
WAYS = {"ddp": DDP, "fsdp2": FSDP2}


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    write, root = FAMILIES["smolvlm"], tmp_path_factory.mktemp("smol")
    return {
        "student": str(write(root / "student", seed=0)),
        "teacher": str(write(root / "teacher", seed=1)),
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


FORKS = multiprocessing.get_context("forkserver")  # a fresh process that has imported everything already
FORKS.set_forkserver_preload(["tests.distill.worker"])


def start(world: int, way: dict[str, str], job: str, out: Path, arguments: Any) -> None:
    """Run a job in `world` processes as `accelerate launch --cpu` would."""
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if world > 1:
        port = str(free_port())
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), **way}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        process = FORKS.Process(target=worker.run, args=({**environment, **own}, job, out, arguments))
        process.start()
        running.append(process)
    for process in running:
        process.join(300)
    codes = [process.exitcode for process in running]
    if "die_after" in arguments:
        assert -signal.SIGKILL in codes
    else:
        logs = sorted(out.parent.glob(f"{out.name}.*.log"))
        assert codes == [0] * world, "\n".join(path.read_text()[-3000:] for path in logs)


def result(world: int, way: dict[str, str], job: str, out: Path, arguments: Any) -> dict[str, Any]:
    start(world, way, job, out, arguments)
    return torch.load(out, weights_only=True)


Tensors = dict[str, torch.Tensor]


def apart(first: Tensors, second: Tensors, start: Tensors | None = None) -> float:
    """Norm of the difference, relative to the norm of `first`, or of its way from `start`."""
    assert first.keys() == second.keys()
    way = torch.cat([(value - start[name] if start else value).flatten() for name, value in first.items()])
    return float(torch.cat([(first[n] - second[n]).flatten() for n in first]).norm() / way.norm())


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_two_processes(smol: dict[str, str], tmp_path: Path, way: str) -> None:
    """More micro-batches than processes, another number in each; some questions have no image."""
    arguments = {**smol, "work": str(tmp_path), "tokens": 100, "text_only": [1, 4]}
    one = result(1, {}, "gradients", tmp_path / "one", {**arguments, "tokens": 4096})
    two = result(2, WAYS[way], "gradients", tmp_path / "two", arguments)
    assert one["parts"] == 1 and two["parts"] > 1
    assert (two["shards"] > 3) == (way == "fsdp2")
    assert apart(one["gradients"], two["gradients"]) < 2e-5
    for name in one["figures"].keys() - {"flops", "input_tokens"}:
        assert two["figures"][name] == pytest.approx(one["figures"][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("way", WAYS)
def test_bf16_in_two_processes(smol: dict[str, str], tmp_path: Path, way: str) -> None:
    """Products in bfloat16 over float32 weights; the loss, the gradients and their sums are float32."""
    arguments = {**smol, "work": str(tmp_path), "tokens": 100}
    one = result(1, {}, "gradients", tmp_path / "one", arguments)
    two = result(2, WAYS[way], "gradients", tmp_path / "two", {**arguments, "precision": "bf16"})
    assert 1e-4 < apart(one["gradients"], two["gradients"]) < 0.15  # 8 bits through every layer
    assert two["figures"]["loss"] == pytest.approx(one["figures"]["loss"], rel=0.02)
    rounded = torch.tensor(two["figures"]["loss"]).bfloat16().item()
    assert two["figures"]["loss"] != rounded
    for gradient in two["gradients"].values():
        assert gradient.dtype == torch.float32


@pytest.fixture(scope="module")
def single(smol: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("single")
    found = result(1, {}, "fit", work / "out", {**smol, "work": str(work), "norms_every": 2})
    return {**found, "start": learning.load(Path(smol["student"])).state_dict()}


@pytest.mark.parametrize("way", WAYS)
def test_training_in_two_processes(
    smol: dict[str, str], single: dict[str, Any], tmp_path: Path, way: str
) -> None:
    """Four steps over two phases, the last batches uneven: the same losses, weights and gradient shares; the
    student that draws at a phase's start is the whole one. Then the state goes on in one process."""
    arguments = {**smol, "work": str(tmp_path), "norms_every": 2, "model": str(tmp_path / "model")}
    two = result(2, WAYS[way], "fit", tmp_path / "out", arguments)
    assert two["kind"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[way]
    assert apart(single["weights"], two["weights"], single["start"]) < ADAM
    assert len(two["log"]) == len(single["log"]) == 4
    for mine, other in zip(two["log"], single["log"], strict=True):
        for name in other.keys() - {"input_tokens"}:
            near = 0.2 if name.startswith("grad_share") else 1e-3  # shares: of the first micro-batches
            assert mine[name] == pytest.approx(other[name], rel=near, abs=near / 10), name
    assert two["drawn"] == pytest.approx(single["drawn"], rel=1e-4)
    loaded = checkpoints.AutoModelForImageTextToText.from_pretrained(tmp_path / "model").state_dict()
    for name, value in two["weights"].items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)])
def test_a_state_goes_on_in_another_number_of_processes(
    smol: dict[str, str], single: dict[str, Any], tmp_path: Path, way: str, worlds: tuple[int, int]
) -> None:
    arguments = {**smol, "work": str(tmp_path), "save_every": 1}
    start(worlds[0], WAYS[way], "fit", tmp_path / "never", {**arguments, "die_after": 3})
    assert [path.name for path in checkpoints.states(tmp_path)] == ["state-00000002"]
    found = result(worlds[1], WAYS[way], "fit", tmp_path / "out", arguments)
    assert apart(single["weights"], found["weights"], single["start"]) < ADAM
    assert [entry["step"] for entry in found["log"]] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_in_two_processes(smol: dict[str, str], tmp_path: Path, way: str) -> None:
    """On the same topology the weights are the same bit for bit."""
    whole = {**smol, "work": str(tmp_path / "whole"), "save_every": 1}
    cut = {**whole, "work": str(tmp_path / "cut")}
    wanted = result(2, WAYS[way], "fit", tmp_path / "wanted", whole)
    start(2, WAYS[way], "fit", tmp_path / "never", {**cut, "die_after": 3})
    found = result(2, WAYS[way], "fit", tmp_path / "found", cut)
    assert wanted["log"] == found["log"]
    assert all(torch.equal(wanted["weights"][name], found["weights"][name]) for name in wanted["weights"])
