"""The native runners, built for this machine: they compute what the sessions here compute, for every family.

Needs a C++ compiler and the library of onnxruntime's (or llama-cpp-python's) wheel. On Arm they are built by
`evals/remote/native/build_*.sh`, which the tests do not do.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evals.bench import bench_grid
from evals.remote import remote_adb, runner_output, runner_plan
from evals.remote.remote_adb import Asked
from evals.remote.runner_output import Said
from evals.remote.runner_plan import Case, Policy
from tests import checkpoints

SOURCES = Path(remote_adb.__file__).parent / "native"
POLICY = Policy(warmup=1, repeats=2, decode_tokens=16, threads=1)
ONNX_FAMILIES = ("qwen3_vl", "lfm2_vl", "gemma3", "smolvlm_tiles")
"""M-RoPE and deepstack; a conv state; image types; several views."""
GGUF_FAMILIES = ("smolvlm", "qwen3_vl")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ and a Linux system"
    ),
]


def build(folder: Path, source: str, *arguments: str | Path) -> Path:
    """Compile one of the runners; what the compiler says is the failure."""
    program = folder / f"native-{Path(source).stem}"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCES / source]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def onnx_runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    capi = Path(pytest.importorskip("onnxruntime").__file__).parent / "capi"
    libraries = sorted(capi.glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("this onnxruntime has no library of its own")
    folder = tmp_path_factory.mktemp("onnx")
    library = folder / "libonnxruntime.so.1"
    shutil.copy(libraries[0], library)
    return build(folder, "onnx_runner.cpp", library)


@pytest.fixture(scope="module")
def gguf_runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = Path(pytest.importorskip("llama_cpp").__file__).parent
    headers, libraries = package.parent / "include", package / "lib"
    if not (headers / "mtmd.h").is_file():
        pytest.skip("this llama-cpp-python has no headers")
    names = [f"-l{name}" for name in ("llama", "mtmd", "ggml", "ggml-base", "ggml-cpu")]
    folder = tmp_path_factory.mktemp("gguf")
    return build(
        folder, "gguf_runner.cpp", f"-I{headers}", f"-L{libraries}", *names, f"-Wl,-rpath,{libraries}"
    )


def prepared(bundle: Path, folder: Path, case: Case | None = None) -> Case:
    """The case of a bundle with its files in a folder, as a phone has them."""
    if case is None:
        image, question = bench_grid.subject(bundle, None, None)
        case = runner_plan.make(bundle, image, question, POLICY)
    for path, data in {**case.files, "plan.txt": case.plan.encode()}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / runner_plan.BUNDLE).symlink_to(bundle)
    return case


def started(runner: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"LD_LIBRARY_PATH": str(runner.parent)}
    return subprocess.run([runner, "plan.txt"], cwd=folder, capture_output=True, text=True, env=environment)


def ran(runner: Path, folder: Path) -> Said:
    done = started(runner, folder)
    found = runner_output.read(done.stdout)
    assert done.returncode == 0 and found is not None, done.stdout + done.stderr
    return found


def agrees(case: Case, said: Said) -> None:
    """Same processor, same library, same threads: the same tokens and, to the last bit or nearly, logits."""
    assert [answer.tokens for answer in said.answers] == [case.tokens] * POLICY.repeats
    for token, logit in said.logits.items():
        assert logit == pytest.approx(float(case.logits[token]), abs=1e-4)
    assert all(len(answer.decode_ms) == POLICY.decode_tokens for answer in said.answers)
    assert all(
        0 < answer.encode_ms + answer.prefill_ms <= answer.first_ms <= answer.total_ms
        for answer in said.answers
    )
    assert 0 < said.load_peak_kib <= said.peak_kib


def test_onnx(onnx_runner: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    said = ran(onnx_runner, (tmp_path, case := prepared(tiny_bundle, tmp_path))[0])
    agrees(case, said)
    assert said.program == onnx_runner.name and len(set(case.tokens)) > 3


@pytest.mark.parametrize("family", ONNX_FAMILIES)
def test_onnx_families(onnx_runner: Path, family: str, tmp_path: Path) -> None:
    from export import export_checkpoint

    maker = checkpoints.FAMILIES.get(family) or checkpoints.VARIANTS[family]
    bundle = export_checkpoint(maker(tmp_path / "checkpoint"), tmp_path / "b", precision="int8")
    folder = tmp_path / "phone"
    case = prepared(bundle, folder)
    agrees(case, ran(onnx_runner, folder))


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_gguf_families(gguf_runner: Path, family: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from export import export_checkpoint
    from tests import gguf_checkpoints

    checkpoint = gguf_checkpoints.write(family, tmp_path / "checkpoint")
    bundle = export_checkpoint(checkpoint, tmp_path / "b", to="gguf", precision="q8_0")
    folder = tmp_path / "phone"
    case = prepared(bundle, folder)
    agrees(case, ran(gguf_runner, folder))
    wrong = folder / "plan.txt"
    wrong.write_text(wrong.read_text().replace("backend llama.cpp", "backend onnxruntime"))
    assert "error: plan: is for onnxruntime, this runner has llama.cpp" in started(gguf_runner, folder).stderr


def test_through_adb(
    onnx_runner: Path,
    tiny_bundle: Path,
    phone: Path,
) -> None:
    asked = Asked(tiny_bundle, onnx_runner, rounds=2, repeats=2, warmup=0, tokens=8, threads=1)
    found = remote_adb.bench("adb://phone", asked, lambda line: None)
    assert any("4 of 4 have the 9 tokens of the Python session" in note for note in found.notes)
    assert not found.emulated and found.device.packages["onnxruntime"]
    summary = found.bundles[0].points[0].summary
    assert summary is not None and summary.prefill_ms is not None and summary.ttft_ms is not None


# --- what must not go unnoticed -----------------------------------------


def test_other_pixels_are_seen(onnx_runner: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    case = prepared(tiny_bundle, tmp_path)
    pixels = tmp_path / "case" / "view-0-0.bin"
    pixels.write_bytes(np.frombuffer(pixels.read_bytes(), np.float32)[::-1].tobytes())
    assert "more than the" in runner_output.agreement(
        replace(case, logit_tolerance=1e-3), [ran(onnx_runner, tmp_path)]
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("pocketvlm-plan 1", "pocketvlm-plan 9", "is no plan of version 1"),
        ("backend onnxruntime", "backend llama.cpp", "plan: is for llama.cpp, this runner has onnxruntime"),
        ("threads 1", "threads one", "plan: line 3: wanted a number, got one"),
        ("threads 1", "threads", "plan: line 3: ends too early"),
        ("threads 1", "thread 1", "plan: line 3: knows no thread"),
        ("tokens 17", "tokens 100000", "longer than the context"),
        ("float32", "float31", "knows no type float31"),
        ("part decoder bundle", "part decoder elsewhere", "onnxruntime: Load model from elsewhere"),
        ("step attention_mask", "step attention_musk", "onnxruntime: "),
        ("image_token", "image_token 1", "image tokens, the vision part gave"),
        ("part decoder", "part encoder", "plan: has no part decoder"),
        ("step num_logits_to_keep", "step num_logits", "no num_logits_to_keep"),
        ("vocabulary", "hidden", "sizes or the vision part's outputs are missing"),
        ("image_features", "image_textures", "onnxruntime: "),
    ],
)  # fmt: skip
def test_a_plan_that_is_wrong(
    onnx_runner: Path, broken: Path, tmp_path: Path, old: str, new: str, words: str
) -> None:
    plan = (broken / "plan.txt").read_text()
    assert old in plan
    changed = plan.replace(old, new)
    (tmp_path / "plan.txt").write_text(changed)
    for name in ("case", "bundle"):
        (tmp_path / name).symlink_to(broken / name)
    done = started(onnx_runner, tmp_path)
    assert done.returncode == 1 and runner_output.read(done.stdout) is None
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.fixture(scope="module")
def broken(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case to break."""
    folder = tmp_path_factory.mktemp("case")
    prepared(tiny_bundle, folder)
    return folder


def test_files_that_are_damaged(onnx_runner: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    prepared(tiny_bundle, tmp_path)
    ids = tmp_path / "case" / "ids.bin"
    ids.write_bytes(ids.read_bytes()[:-3])
    assert "ids.bin: has" in started(onnx_runner, tmp_path).stderr
    ids.unlink()
    assert "ids.bin: cannot be read" in started(onnx_runner, tmp_path).stderr
    (tmp_path / "plan.txt").unlink()
    assert "plan.txt: cannot be read" in started(onnx_runner, tmp_path).stderr
