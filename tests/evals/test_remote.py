"""`bench --on ssh://`: a real bench of a real bundle through a real ssh server, and what stops it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evals import digits
from evals.bench import bench_results
from evals.remote import remote, remote_job, remote_setup, remote_ssh, remote_wheel
from evals.remote.remote import Request, Settings
from evals.remote.remote_ssh import DeviceError, Done, Ssh
from runtime.errors import BundleError, InputError
from tests.cli import call, refusal
from tests.evals import sshd
from tests.evals.sshd import Server

needs_sshd = pytest.mark.skipif(sshd.SSHD is None, reason="no sshd on this machine")
QUICK = (
    "--rounds=1",
    "--repeats=1",
    "--warmup=0",
    "--tokens=2",
    "--threads=1",
    "--energy=0",
    "--bandwidth=0",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with sshd.serve(tmp_path_factory.mktemp("sshd")) as found:
        yield found


@pytest.fixture
def environment(server: Server) -> dict[str, str]:
    server.client()
    return {**os.environ, "PATH": server.path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def ssh(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ssh]:
    monkeypatch.setenv("PATH", server.path)
    server.client()
    with Ssh(remote_ssh.parse(server.url)) as found:
        yield found


def fake_python(folder: Path, facts: dict[str, Any] | None, name: str = "python3") -> str:
    """A program called like an interpreter that answers the question about itself; None: it fails."""
    path = folder / name
    path.write_text("#!/bin/sh\n" + (f"echo '{json.dumps(facts)}'\n" if facts else "exit 1\n"))
    path.chmod(0o755)
    return str(path)


def described(path: str = "/usr/bin/python3", **changes: Any) -> dict[str, Any]:
    return {"version": [3, 11, 2], "bits": 64, "venv": True, "libc": "glibc", "path": path, **changes}


# --- the whole way ----------------------------------------------------


@needs_sshd
def test_a_bench_on_a_device(
    server: Server, environment: dict[str, str], tiny_bundle: Path, tmp_path: Path
) -> None:
    """The interpreter of these tests stands in for the device's; folder and connection are real."""
    folder, out = tmp_path / "device", tmp_path / "bench.json"
    picture = next((tiny_bundle / "conformance").glob("*.png"))
    asked = ("bench", tiny_bundle, "--on", server.url, "--on-dir", folder, "--on-python", sys.executable)
    done = call(
        *asked, *QUICK, "--image", picture, "--question", "what is it?", "--out", out, env=environment
    )
    assert done.stdout.strip() == str(out)
    found = bench_results.read(out)
    assert (found.source, found.emulated) == ("ssh", False)
    assert found.bundles[0].name == tiny_bundle.name
    assert found.grid[0].image == picture.name and found.grid[0].question == "what is it?"
    assert len(found.bundles[0].points[0].runs[0].times.ttft_ms) == 1
    assert not (folder / "run").exists()
    again = call(*asked, *QUICK, "--on-clean", "--json", env=environment)
    assert "every file is there already" in again.stderr.replace("\n", " ")
    assert json.loads(again.stdout)["source"] == "ssh"
    assert not folder.exists()


@needs_sshd
def test_results_wait_for_who_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The results are not fetched (this side dies): the same command takes them, another measures anew."""
    monkeypatch.setenv("PATH", server.path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server.client()
    wheel = remote_wheel.write(tmp_path)
    monkeypatch.setattr(remote_wheel, "write", lambda folder: Path(shutil.copy(wheel, folder)))
    request = Request((tiny_bundle,), QUICK)
    settings = Settings(folder=str(tmp_path / "device"), python=sys.executable)
    kept = remote._Place.fetch

    def dies(place: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(remote._Place, "fetch", dies)
    with pytest.raises(KeyboardInterrupt):
        remote.bench(server.url, request, settings, lambda line: None)
    monkeypatch.setattr(remote._Place, "fetch", kept)
    measured = bench_results.read(tmp_path / "device/run/bench.json")
    lines: list[str] = []
    nowhere = tmp_path / "file" / "bench.json"
    nowhere.parent.touch()
    with pytest.raises(InputError, match="cannot be written"):  # fetched, and no place for it here
        remote.bench(server.url, request, settings, lines.append, nowhere)
    out = tmp_path / "bench.json"
    fetched = remote.bench(server.url, request, settings, lines.append, out)
    assert fetched.created == measured.created and bench_results.read(out) == fetched
    assert any("has ended there; fetching" in line for line in lines)


@needs_sshd
@pytest.mark.slow
def test_a_bench_that_fails_there(
    server: Server, environment: dict[str, str], tiny_bundle: Path, tmp_path: Path
) -> None:
    """Its own words come back; nothing is written here; the next try starts anew."""
    out = tmp_path / "bench.json"
    asked = ("bench", tiny_bundle, "--on", server.url, "--on-dir", tmp_path / "device")
    for _ in range(2):
        line = refusal(
            *asked, "--on-python", sys.executable, *QUICK, "--images", "0x0", "--out", out, env=environment
        )
        assert "the bench there: " in line and "0x0" in line
    assert not out.exists()


@needs_sshd
def test_another_bench_is_not_disturbed(server: Server, ssh: Ssh, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "device"
    remote_setup.claim(ssh, str(folder))
    remote_job.start(ssh, str(folder), "other", ["sleep", "5"], [], remote_setup.probe(ssh))
    settings = Settings(folder=str(folder), python=sys.executable)
    with pytest.raises(DeviceError, match="another bench runs there"):
        remote.bench(server.url, Request((tiny_bundle,), QUICK), settings, lambda line: None)


# --- refused before anything is sent ----------------------------------


def test_what_is_asked_is_checked_here(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got no bundle"):
        Request(())
    with pytest.raises(InputError, match="one directory name"):
        Request((tiny_bundle, tiny_bundle))
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Request((tmp_path,))
    with pytest.raises(InputError, match="is no file here"):
        Request((tiny_bundle,), ("--image", tmp_path / "nothing.png"))


def test_the_options_of_this_side_are_the_verbs() -> None:
    """A renamed option would be sent to the device, or a picture be sought there."""
    import inspect

    from evals import verbs

    names = set(inspect.signature(verbs.bench).parameters)
    assert {*remote.HERE_ONLY, *remote.FILES} <= names
    assert {name for name in names if name.startswith("on")} <= set(remote.HERE_ONLY)


def test_the_verb_refuses_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    assert "one of the two" in refusal("bench", "--import", tmp_path / "x.json", "--on", "ssh://host")
    assert "wanted ssh://user@host" in refusal("bench", tiny_bundle, "--on", "host")
    assert "--on-wheels" in refusal("bench", tiny_bundle, "--on", "ssh://h", "--on-wheels", tmp_path / "no")


# --- what a device may lack -------------------------------------------


@needs_sshd
def test_a_folder_of_others_is_left_alone(ssh: Ssh, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(DeviceError, match="holds other things"):
        remote_setup.claim(ssh, str(tmp_path / "home"))
    remote_setup.remove(ssh, str(tmp_path / "home"))
    assert (tmp_path / "home" / "thesis.tex").exists()
    remote_setup.claim(ssh, str(tmp_path / "ours"))
    remote_setup.claim(ssh, str(tmp_path / "ours"))
    remote_setup.remove(ssh, str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_the_folder_there_is_not_the_cache_of_this_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that made data sets of its own has them there; they neither stop a bench nor go with it."""
    for name in ("POCKETVLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = Path.home() / remote.FOLDER
    assert digits.cache_directory() in folder.parents


@needs_sshd
def test_too_little_space_is_said_before_copying(ssh: Ssh, tmp_path: Path) -> None:
    remote_setup.require_space(ssh, str(tmp_path), {"to copy": 1000, "to install": 0})
    with pytest.raises(DeviceError, match=r"free in .*wanted \(.*to copy\)"):
        remote_setup.require_space(ssh, str(tmp_path), {"to copy": 10**16, "to install": 0})


class Said(Ssh):
    """A connection whose scripts all print `out`."""

    def __init__(self, out: str) -> None:
        super().__init__(remote_ssh.parse("ssh://device"))
        self.out = out

    def run(self, script: str, *, check: bool = True) -> Done:
        return Done(0, self.out, "")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("system=Darwin\nmachine=arm64\n", "runs Darwin; wanted Linux"),
        ("", "runs an unknown system"),
        ("system=Linux\nmachine=armv7l\nhome=/root\n", "its processor is armv7l; wanted x86_64 or aarch64"),
        ("system=Linux\nmachine=riscv64\nhome=/root\n", "its processor is riscv64"),
        (
            "system=Linux\nmachine=aarch64\nhome=/root\nlacks=sha256sum\n",
            "has no sha256sum; install coreutils",
        ),
    ],
)
def test_devices_that_cannot(said: str, words: str) -> None:
    with pytest.raises(DeviceError) as caught:
        remote_setup.probe(Said(said))
    assert words in str(caught.value)


def test_power_mode_and_clocks_are_noted() -> None:
    said = (
        "system=Linux",
        "machine=aarch64",
        "home=/h",
        "nvpmodel=NV Power Mode: 15W 0 ",
        "clocks=1510400 1510400 ",
    )
    assert remote_setup.probe(Said("\n".join(said))).extra == {
        "nvpmodel": "NV Power Mode: 15W 0",
        "cpu_khz_before": "1510400 1510400",
    }


@needs_sshd
@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (None, "no Python there"),
        (described(version=[3, 8, 10]), r"3\.8\.10 .*wanted 64-bit Python 3\.10 to 3\.13"),
        (described(version=[3, 14, 0]), r"3\.14\.0 .*wanted 64-bit Python"),
        (described(bits=32), r"\(32 bit\); wanted 64-bit"),
    ],
)
def test_no_usable_python(ssh: Ssh, tmp_path: Path, facts: dict[str, Any] | None, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        remote_setup.interpreter(ssh, (fake_python(tmp_path, facts),))


@needs_sshd
def test_the_first_usable_python_is_taken(ssh: Ssh, tmp_path: Path) -> None:
    old = fake_python(tmp_path, described(version=[3, 9, 1]), "python3.9")
    good = fake_python(tmp_path, described("/usr/py", version=[3, 10, 12]), "python3.10")
    found = remote_setup.interpreter(ssh, ("/nowhere/python", old, good))
    assert (found.path, found.version) == ("/usr/py", (3, 10, 12))


@needs_sshd
@pytest.mark.parametrize(
    ("facts", "words"),
    [(described(venv=False), r"install python3\.11-venv there"), (described(libc=""), "not built on glibc")],
)
def test_pythons_without_a_venv(
    ssh: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], words: str
) -> None:
    program = fake_python(tmp_path, facts)
    monkeypatch.setattr(remote_setup, "PYTHONS", (program,))
    monkeypatch.setattr(remote_setup.interpreter, "__defaults__", ((program,),))
    with pytest.raises(DeviceError, match=words):
        remote_setup.make_venv(ssh, str(tmp_path), "wheel/x.whl", ["onnx"], None, lambda line: None)


RETRYING = "WARNING: Retrying (Retry(total=0)) after connection broken by '{}': /simple/numpy/"
NOTHING = "ERROR: No matching distribution found for numpy<2.4,>=1.26"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "SSLError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate is not yet valid')",
            "is the clock there",
        ),
        ("NameResolutionError('Temporary failure in name resolution')", "finds no address"),
        ("NewConnectionError('[Errno 101] Network is unreachable')", "is not reachable; without a network"),
        ("ConnectTimeoutError('Connection to it timed out. (connect timeout=15)')", "does not answer"),
    ],
)
def test_why_pip_finds_no_package(said: str, words: str) -> None:
    """Its last line says the same in all cases. A board without a battery has a clock that is wrong."""
    assert words in remote_setup._pip_fault([RETRYING.format(said), NOTHING], offline=False)


def test_a_package_that_is_really_missing_is_named() -> None:
    assert remote_setup._pip_fault(["Collecting numpy", NOTHING], offline=True) == (
        "No matching distribution found for numpy<2.4,>=1.26; put the missing wheel into --on-wheels"
    )


@needs_sshd
def test_a_python_without_venv_is_told_before_anything_is_sent(
    server: Server, ssh: Ssh, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fake_python(tmp_path, described(venv=False))
    monkeypatch.setattr(remote_setup.interpreter, "__defaults__", ((program,),))
    folder = tmp_path / "device"
    with pytest.raises(DeviceError, match="cannot make a venv"):
        remote.bench(server.url, Request((tiny_bundle,)), Settings(folder=str(folder)), lambda line: None)
    assert not (folder / "bundles").exists()


@needs_sshd
def test_a_given_python_that_lacks_packages(ssh: Ssh, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(DeviceError, match=r"has no numpy, PIL, .*onnxruntime; install them there"):
        remote_setup.check_given(ssh, str(bare), ["onnx"])


# --- the wheel --------------------------------------------------------


def test_the_wheel_is_the_device_runtime(tmp_path: Path) -> None:
    wheel = remote_wheel.write(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = (name for name in names if name.endswith("METADATA"))
        metadata = archive.read(info).decode()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "pocketvlm.py",
        "evals",
        "runtime",
    }
    assert not any("__pycache__" in name for name in names)
    assert f"Version: {remote_wheel.version(wheel)}\n" in metadata
    assert 'onnxruntime>=1.23; extra == "onnx"' in metadata and "torch" not in metadata
    assert remote_wheel.write(tmp_path).read_bytes() == wheel.read_bytes()


def test_other_code_is_another_version(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for package in remote_wheel.PACKAGES:
        shutil.copytree(remote_wheel.ROOT / package, root / package)
    for name in ("pocketvlm.py", "pyproject.toml"):
        shutil.copy(remote_wheel.ROOT / name, root / name)
    first = remote_wheel.write(tmp_path, root)
    assert first.name == remote_wheel.write(tmp_path).name
    (root / "runtime/errors.py").write_text("# changed")
    assert remote_wheel.write(tmp_path, root).name != first.name


def test_pip_takes_the_wheel(tmp_path: Path) -> None:
    """Its hashes and metadata are right: pip installs it and the program says its version."""
    wheel = remote_wheel.write(tmp_path)
    target = tmp_path / "target"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        wheel,
    ]
    subprocess.run(command, check=True)
    shown = subprocess.run(
        [sys.executable, "-m", "pocketvlm", "--version"],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.strip() == f"pocketvlm {remote_wheel.version(wheel)}"


@pytest.mark.slow
@needs_sshd
def test_a_venv_of_its_own(
    server: Server, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    """From nothing: venv, wheel and backend by pip (needs a package registry), small, and used again."""
    monkeypatch.setenv("PATH", server.path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server.client()
    wheel = remote_wheel.write(tmp_path)
    monkeypatch.setattr(remote_wheel, "write", lambda folder: Path(shutil.copy(wheel, folder)))
    folder, request = tmp_path / "device", Request((tiny_bundle,), QUICK)
    found = remote.bench(server.url, request, Settings(folder=str(folder)), lambda line: None)
    assert found.device.packages["pocketvlm"] == remote_wheel.version(wheel)
    files = [path for path in (folder / "venv").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= 220_000_000
    stamp = (folder / "venv/.pocketvlm").stat().st_mtime_ns
    remote.bench(server.url, request, Settings(folder=str(folder)), lambda line: None)
    assert (folder / "venv/.pocketvlm").stat().st_mtime_ns == stamp
