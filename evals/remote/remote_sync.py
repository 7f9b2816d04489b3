"""Copies files to a device so that its copy is byte for byte ours, sending only what differs.

In: an open `Ssh`, local files with the names that they get there. Out: how many bytes were sent.
Not here: what the files are for. The device needs sh, find, sha256sum and cat, no rsync.

A file travels into `.parts/<sha256>` and takes its name when its hash is right, so that a broken connection
leaves the sent bytes for the next try and never a part of a file under its name. What is there is judged by
its hash, not by its date.
"""

from __future__ import annotations

import contextlib
import posixpath
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from evals import formatting as fmt
from evals.remote.remote_ssh import LOST, ConnectionLost, DeviceError, Done, Ssh, explain
from runtime import files
from runtime.errors import InputError

BLOCK = 1 << 18
PAUSES_SECONDS = (1.0, 4.0, 10.0)
"""Waits before a file is tried again after the connection broke; then the command ends, and resumes later."""

MOST_DAMAGES = 2
"""How often a file may arrive wrong: after a break the old end may still write for a moment."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Local:
    """A file here and what is known of it."""

    path: Path
    bytes: int
    sha256: str


def local_files(root: Path, prefix: str) -> dict[str, Local]:
    """Every file below `root` by the name that it gets there (`prefix/...`).

    Raises InputError on a name that a shell's line cannot carry.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            found[f"{prefix}/{path.relative_to(root).as_posix()}"] = local_file(path)
    return found


def local_file(path: Path) -> Local:
    if any(character in str(path) for character in "\n\\"):
        raise InputError(f"{str(path)!r}: a name with a line break or backslash cannot be copied; rename it")
    return Local(path, path.stat().st_size, files.sha256_file(path))


def differing(ssh: Ssh, root: str, wanted: Mapping[str, Local], owned: str) -> dict[str, Local]:
    """Those of `wanted` (all below `owned`) that are not there, or not with these bytes.

    Other files below `owned` are deleted there.
    """
    present = tree_hashes(ssh, root, owned)
    strangers = sorted(set(present) - set(wanted))
    if strangers:
        ssh.run(f"cd {shlex.quote(root)} && rm -f -- {_words(strangers)}")
    return {name: file for name, file in wanted.items() if present.get(name) != file.sha256}


def tree_hashes(ssh: Ssh, root: str, folder: str) -> dict[str, str]:
    """SHA-256 of every file below `root`/`folder`, by its name below `root`."""
    place = shlex.quote(folder)
    done = ssh.run(
        f"cd {shlex.quote(root)} && {{ [ ! -d {place} ] || find {place} -type f -exec sha256sum -- {{}} +; }}"
    )
    found = {}
    for line in done.out.splitlines():
        digest, _, name = line.partition("  ")
        found[name] = digest
    return found


def send(ssh: Ssh, root: str, wanted: Mapping[str, Local], progress: Progress) -> int:
    """Copy `wanted` to below `root`; bytes sent, without those that an earlier try had brought.

    Raises DeviceError when the disk is full or the connection stays broken; a later call goes on.
    """
    keep = " ".join(f"! -name {file.sha256}" for file in wanted.values())
    ssh.run(f"cd {shlex.quote(root)} && mkdir -p .parts && find .parts -type f {keep} -exec rm -f {{}} +")
    meter = _Meter(progress, sum(file.bytes for file in wanted.values()))
    begun = parts(ssh, root)
    for name, file in wanted.items():
        _send_one(ssh, root, name, file, begun.get(file.sha256, 0), meter)
    return meter.sent


def parts(ssh: Ssh, root: str) -> dict[str, int]:
    """Bytes of the files under way there, by their SHA-256."""
    script = f"cd {shlex.quote(root)}/.parts && find . -type f -exec wc -c {{}} \\;"
    lines = (line.split() for line in ssh.run(script).out.splitlines())
    return {name.removeprefix("./"): int(size) for size, name in lines}


class _Meter:
    """Tells of every twentieth of `total`, and of the end. `sent`: bytes that went out, repeated ones too."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._before = self._told = self.sent = 0

    def __call__(self, block: int, done: int) -> None:
        """`block` more bytes are sent; `done` of the file under way are there."""
        self.sent += block
        now = self._before + done
        if now - self._told >= self._total / 20 or now == self._total:
            self._told = now
            self._progress(f"copied {fmt.size(now)} of {fmt.size(self._total)}")

    def next_file(self, file: Local) -> None:
        self._before += file.bytes


def _send_one(ssh: Ssh, root: str, name: str, file: Local, offset: int, meter: _Meter) -> None:
    """One file, over broken connections. Its hash is checked there; a wrong part is sent anew."""
    pauses, damages = list(PAUSES_SECONDS), 0
    while True:
        try:
            state = _stream(ssh, root, name, file, offset, meter)
            if state == "whole":
                meter.next_file(file)
                return
            damages += state == "damaged"
            if damages > MOST_DAMAGES:
                raise DeviceError(
                    f"{ssh.target}: {name}: arrives damaged (or changes here meanwhile); check its disk and "
                    "memory, run again"
                )
            offset = parts(ssh, root).get(file.sha256, 0)
        except ConnectionLost as error:
            if not pauses:
                raise ConnectionLost(f"{error}; what was copied is kept there") from None
            time.sleep(pauses.pop(0))
            reconnect(ssh)
            with contextlib.suppress(ConnectionLost):
                offset = parts(ssh, root).get(file.sha256, 0)


def reconnect(ssh: Ssh) -> None:
    """Connect again; a device that does not answer yet is no error. Raises DeviceError when it refuses us."""
    with contextlib.suppress(ConnectionLost):
        ssh.connect()


def _stream(ssh: Ssh, root: str, name: str, file: Local, offset: int, meter: _Meter) -> str:
    """Append the file's bytes from `offset` on and give the whole file its name.

    `whole`, `short` (more is to come) or `damaged` (other bytes than the file's, deleted there).
    """
    with ssh.process(_receive(root, name, file)) as child, file.path.open("rb") as source:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        source.seek(offset)
        with contextlib.suppress(BrokenPipeError):  # the exit code says why
            while block := source.read(BLOCK):
                child.stdin.write(block)
                offset += len(block)
                meter(len(block), offset)
            child.stdin.close()
        state = child.stdout.read().decode(errors="replace").split()
        err = child.stderr.read().decode(errors="replace")
        code = child.wait()
    if code == LOST:
        raise explain(ssh.target, err)
    if code or not state:
        raise ssh.failed(Done(code, "", err))
    return state[-1]


def _receive(root: str, name: str, file: Local) -> str:
    """The other end of the pipe. What arrived short stays; what is wrong at full length goes."""
    part, place = shlex.quote(f".parts/{file.sha256}"), shlex.quote(name)
    folder = shlex.quote(posixpath.dirname(name) or ".")
    return (
        f"cd {shlex.quote(root)} && cat >> {part} || exit 1; "
        f"if [ $(wc -c < {part}) -lt {file.bytes} ]; then echo short; exit 0; fi; "
        f"set -- $(sha256sum {part}); "
        f'if [ "$1" = {file.sha256} ]; then mkdir -p {folder} && mv -f {part} {place} && echo whole; '
        f"else rm -f {part}; echo damaged; fi"
    )


def _words(names: list[str]) -> str:
    return " ".join(map(shlex.quote, names))
