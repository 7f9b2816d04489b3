"""The way to a device: addresses, the system's ssh against a real server, and what breaks on it."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evals.remote import remote_job, remote_setup, remote_sync
from evals.remote.remote_job import Job, State
from evals.remote.remote_setup import Facts
from evals.remote.remote_ssh import ConnectionLost, DeviceError, Ssh, Target, explain, parse
from runtime.errors import InputError
from tests.evals import sshd
from tests.evals.sshd import Server

needs_sshd = pytest.mark.skipif(sshd.SSHD is None, reason="no sshd on this machine")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with sshd.serve(tmp_path_factory.mktemp("sshd")) as found:
        yield found


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, with its `ssh` first in PATH, and the right key and host key."""
    monkeypatch.setenv("PATH", server.path)
    server.client()
    return server


@pytest.fixture
def ssh(client: Server) -> Iterator[Ssh]:
    with Ssh(parse(client.url)) as found:
        yield found


@pytest.fixture
def folder(ssh: Ssh, tmp_path: Path) -> Path:
    """A folder of ours `there`, which is this machine."""
    place = tmp_path / "de vice's"
    remote_setup.claim(ssh, str(place))
    return place


# --- addresses --------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ssh://jetson", Target("jetson")),
        ("ssh://pi@raspberrypi.local/", Target("raspberrypi.local", "pi")),
        ("ssh://nvidia@192.168.55.1:2222", Target("192.168.55.1", "nvidia", 2222)),
        ("ssh://Alias_1", Target("Alias_1")),
        ("ssh://root@[fe80::1%eth0]:22", Target("fe80::1%eth0", "root", 22)),
        ("ssh://[::1]", Target("::1")),
    ],
)
def test_addresses(url: str, expected: Target) -> None:
    assert parse(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "pi@raspberrypi",
        "ssh://",
        "ssh://@host",
        "ssh://pi@host:port",
        "ssh://pi@host:99999",
        "ssh://pi@host:0",
        "ssh://pi@host/home/pi",
        "ssh://host?x",
        "ssh://-oProxyCommand=touch%20x",
        "ssh://-oProxyCommand@host",
        "ssh://a b@host",
        "ssh://host;reboot",
        "ssh://$(reboot)",
    ],
)
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(InputError, match="wanted ssh://user@host"):
        parse(url)


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(InputError) as caught:
        parse("ssh://pi:secret@host")
    assert "secret" not in str(caught.value)


def test_a_host_name_that_does_not_exist_is_told_apart() -> None:
    error = explain(Target("nix", "pi"), "ssh: Could not resolve hostname nix: Name or service not known\n")
    assert isinstance(error, ConnectionLost) and "no such host name" in str(error)


# --- connecting -------------------------------------------------------


@needs_sshd
def test_scripts_run_there(ssh: Ssh) -> None:
    done = ssh.run("printf '%s|' 'a  b' \"it's\" '$HOME'; echo bad >&2; exit 3", check=False)
    assert (done.code, done.out, done.err) == (3, "a  b|it's|$HOME|", "bad\n")
    with pytest.raises(DeviceError, match="ls: cannot access '/nowhere'"):
        ssh.run("ls /nowhere")


@needs_sshd
def test_a_shell_that_greets_is_not_heard(client: Server) -> None:
    """A ForceCommand stands in for a .bashrc that prints."""
    configuration = client.folder / "sshd_config"
    before = configuration.read_text()
    configuration.write_text(before + 'ForceCommand echo "Welcome!"; eval "$SSH_ORIGINAL_COMMAND"\n')
    client.stop()
    client.start()
    try:
        with Ssh(parse(client.url)) as ssh:
            assert ssh.run("echo pure").out == "pure\n"
    finally:
        configuration.write_text(before)
        client.stop()
        client.start()


@needs_sshd
@pytest.mark.parametrize(
    ("key", "known", "words"),
    [
        ("stranger", "known", "it refused our key"),
        ("client", "empty", "its host key is not known here"),
        ("client", "changed", "its host key has changed"),
    ],
)
def test_wrong_keys(
    client: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, known: str, words: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client.client(key=key, known=known)
    with pytest.raises(DeviceError, match=words) as caught, Ssh(parse(client.url)):
        pass
    assert not isinstance(caught.value, ConnectionLost)
    assert list(tmp_path.glob("pv-*")) == []
    assert (client.folder / "empty").read_text() == "", "an unknown host key was accepted"


@needs_sshd
def test_nobody_listens(client: Server) -> None:
    with (
        pytest.raises(DeviceError, match="nothing listens there"),
        Ssh(Target("127.0.0.1", None, sshd.free_port())),
    ):
        pass


# --- copying ----------------------------------------------------------


@needs_sshd
def test_only_what_differs_is_copied(ssh: Ssh, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "here"
    (source / "on nx").mkdir(parents=True)
    (source / "manifest.json").write_text("{}")
    (source / "on nx" / "it's.onnx").write_bytes(os.urandom(300_000))
    (source / "empty").write_bytes(b"")

    def sync() -> int:
        wanted = remote_sync.local_files(source, "bundles/b")
        missing = remote_sync.differing(ssh, str(folder), wanted, "bundles/b")
        return remote_sync.send(ssh, str(folder), missing, lambda line: None)

    assert sync() == 300_002
    assert sync() == 0
    (folder / "bundles/b/stranger").write_text("old part")
    (folder / "bundles/b/on nx/it's.onnx").write_bytes(os.urandom(300_000))  # damaged: same size
    (source / "manifest.json").write_text("[]")
    assert sync() == 300_002
    for path in source.rglob("*"):
        if path.is_file():
            assert (folder / "bundles/b" / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert not (folder / "bundles/b/stranger").exists()


@needs_sshd
def test_a_broken_connection_costs_no_byte_twice(
    client: Server, ssh: Ssh, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's end is killed in the middle of a file: the same call connects again and goes on."""
    monkeypatch.setattr(remote_sync, "PAUSES_SECONDS", (0.05, 0.2, 0.5))
    big = tmp_path / "big"
    big.write_bytes(os.urandom(24_000_000))
    cuts = []

    def cut(line: str) -> None:
        if len(cuts) < 2 and "24.0" not in line.split(" of ")[0]:
            cuts.append(line)
            client.cut()

    wanted = {"files/big": remote_sync.local_file(big)}
    sent = remote_sync.send(ssh, str(folder), wanted, cut)
    assert len(cuts) == 2
    assert (folder / "files/big").read_bytes() == big.read_bytes()
    in_flight = 2 * 4_000_000  # what the pipes and the dead server had taken and not written
    assert 24_000_000 <= sent <= 24_000_000 + in_flight


@needs_sshd
def test_a_device_that_goes_away_keeps_what_it_has(
    client: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_sync, "PAUSES_SECONDS", (0.05,))
    big = tmp_path / "big"
    big.write_bytes(os.urandom(24_000_000))

    def cut(line: str) -> None:
        """The pipes in between hold 2 MB or so: in the second half, something has arrived."""
        if line[7:9] in ("12", "13", "14", "15", "16", "17"):
            client.stop()

    wanted = {"files/big": remote_sync.local_file(big)}
    try:
        with pytest.raises(ConnectionLost, match="what was copied is kept"), Ssh(parse(client.url)) as ssh:
            remote_sync.send(ssh, str(folder), wanted, cut)
    finally:
        client.start()
    kept = (folder / ".parts" / wanted["files/big"].sha256).stat().st_size
    assert 0 < kept < 24_000_000 and not (folder / "files/big").exists()
    with Ssh(parse(client.url)) as ssh:
        assert remote_sync.send(ssh, str(folder), wanted, lambda line: None) == 24_000_000 - kept
    assert (folder / "files/big").read_bytes() == big.read_bytes()


@needs_sshd
def test_a_wrong_part_is_sent_anew(ssh: Ssh, folder: Path, tmp_path: Path) -> None:
    """Left by a crash of the device: the right size, other bytes."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    wanted = {"files/file": remote_sync.local_file(file)}
    (folder / ".parts").mkdir()
    (folder / ".parts" / wanted["files/file"].sha256).write_bytes(b"\0" * 1000)
    (folder / ".parts" / "abandoned").write_bytes(b"of another bundle")
    assert remote_sync.send(ssh, str(folder), wanted, lambda line: None) == 1000
    assert (folder / "files/file").read_bytes() == file.read_bytes()
    assert list((folder / ".parts").iterdir()) == []


@needs_sshd
def test_a_full_disk_is_called_so(ssh: Ssh, folder: Path, tmp_path: Path) -> None:
    """/dev/full behind the part's name: every write to it fails as on a full disk."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100_000)
    wanted = {"files/file": remote_sync.local_file(file)}
    (folder / ".parts").mkdir()
    (folder / ".parts" / wanted["files/file"].sha256).symlink_to("/dev/full")
    with pytest.raises(DeviceError, match="its disk is full"):
        remote_sync.send(ssh, str(folder), wanted, lambda line: None)


def test_names_that_no_shell_line_carries(tmp_path: Path) -> None:
    (tmp_path / "a\nb").write_text("")
    with pytest.raises(InputError, match="line break"):
        remote_sync.local_files(tmp_path, "bundles/b")


# --- jobs -------------------------------------------------------------


@pytest.fixture
def facts(ssh: Ssh) -> Facts:
    return remote_setup.probe(ssh)


def start(ssh: Ssh, folder: Path, facts: Facts, script: str, job_id: str = "abc") -> None:
    remote_job.start(ssh, str(folder), job_id, ["sh", "-c", script], [], facts)


@needs_sshd
def test_a_job_is_followed_to_its_end(ssh: Ssh, folder: Path, facts: Facts) -> None:
    start(ssh, folder, facts, "echo one >&2; sleep 0.2; echo two >&2; echo x > bench.json; exit 3")
    lines: list[str] = []
    assert remote_job.follow(ssh, str(folder), facts.boot_id, lines.append) == 3
    assert lines == ["one", "two"]
    assert remote_job.look(ssh, str(folder)) == remote_job.Job("abc", State.ENDED, facts.boot_id)
    assert remote_job.failure(ssh, str(folder), 3) == "two"
    remote_job.stop(ssh, str(folder))
    assert remote_job.look(ssh, str(folder)).state is State.NONE


@needs_sshd
def test_a_job_outlives_the_connection(client: Server, ssh: Ssh, folder: Path, facts: Facts) -> None:
    start(ssh, folder, facts, "for i in 1 2 3 4 5 6; do echo $i >&2; sleep 0.3; done")
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if line == "2":
            client.cut()

    assert remote_job.follow(ssh, str(folder), facts.boot_id, tell) == 0
    assert [line for line in lines if line.isdigit()] == list("123456")


@needs_sshd
def test_a_device_that_stays_away_is_given_up_and_its_job_goes_on(
    client: Server, folder: Path, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_job, "AWAY_SECONDS", 0.0)
    with Ssh(parse(client.url)) as ssh:
        start(ssh, folder, facts, "sleep 1; echo late >&2")
        timer = threading.Timer(0.3, client.stop)
        timer.start()
        try:
            with pytest.raises(ConnectionLost, match="the same command fetches its results"):
                remote_job.follow(ssh, str(folder), facts.boot_id, lambda line: None)
        finally:
            timer.join()
            client.start()
    with Ssh(parse(client.url)) as ssh:
        lines: list[str] = []
        assert remote_job.follow(ssh, str(folder), facts.boot_id, lines.append) == 0
        assert lines == ["late"]


@needs_sshd
def test_a_killed_job_is_noticed(
    ssh: Ssh, folder: Path, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_job, "SILENT_SECONDS", 0.3)
    start(ssh, folder, facts, "sleep 5")
    os.kill(int((folder / "run/pid").read_text()), 9)
    with pytest.raises(DeviceError, match="the bench was killed there; run again"):
        remote_job.follow(ssh, str(folder), facts.boot_id, lambda line: None)


@needs_sshd
def test_a_disk_that_a_job_has_filled_is_not_called_a_killed_job(ssh: Ssh, facts: Facts) -> None:
    """/proc has no byte free, as a full disk."""
    died = Job("abc", State.DIED, facts.boot_id)
    assert "its disk is full in /proc; free some" in remote_job._how_it_died(ssh, "/proc", died, "")


@needs_sshd
def test_what_is_left_of_a_killed_job_is_ended(ssh: Ssh, folder: Path, facts: Facts) -> None:
    """Two benches at once would spoil both."""
    bundle = folder / "bundles" / "b"
    bundle.mkdir(parents=True)
    (bundle / "sleeps").write_text(f"echo $$ > '{folder.parent}/pid'; sleep 60; true")
    remote_job.start(ssh, str(folder), "abc", ["sh", str(bundle / "sleeps")], [], facts)
    for _ in range(100):
        if (folder.parent / "pid").exists() and (folder.parent / "pid").read_text():
            break
        time.sleep(0.05)
    left = int((folder.parent / "pid").read_text())
    os.kill(int((folder / "run/pid").read_text()), 9)
    os.kill(left, 0)
    start(ssh, folder, facts, "true")
    for _ in range(100):
        if b"sleeps" not in _read(Path(f"/proc/{left}/cmdline")):
            break
        time.sleep(0.05)
    assert b"sleeps" not in _read(Path(f"/proc/{left}/cmdline"))


@needs_sshd
def test_a_reboot_is_noticed(ssh: Ssh, folder: Path, facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's boot id cannot be changed here; the one that the job noted can."""
    monkeypatch.setattr(remote_job, "SILENT_SECONDS", 0.3)
    start(ssh, folder, facts, "sleep 2")
    (folder / "run/boot").write_text("an earlier one\n")
    assert remote_job.look(ssh, str(folder)).state is State.DIED
    with pytest.raises(DeviceError, match="started anew while it measured; run again"):
        remote_job.follow(ssh, str(folder), "an earlier one", lambda line: None)


@needs_sshd
def test_no_tail_is_left_behind(ssh: Ssh, folder: Path, facts: Facts) -> None:
    start(ssh, folder, facts, "echo x >&2")
    remote_job.follow(ssh, str(folder), facts.boot_id, lambda line: None)
    log = str(folder / "run/log").encode()
    for _ in range(50):
        left = [
            path
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if log in _read(path) and b"tail" in _read(path)
        ]
        if not left:
            break
        time.sleep(0.1)
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
