"""A Linux device behind ssh: commands, bytes in, lines out, and what went wrong in words a user can act on.

In: `ssh://user@host[:port]`. Out: an `Ssh` that runs shell scripts there. Not here: what is run.
It is the system's `ssh`, so keys, agents, jump hosts and known hosts are those of ~/.ssh/config. Nothing here
switches the check of host keys off. One connection is shared by all commands.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from runtime.errors import InputError, PocketError

CONNECT_SECONDS = 10
"""For a host that does not answer; a connection that falls silent is given up after three times 5 s."""

OPTIONS = (
    f"-oConnectTimeout={CONNECT_SECONDS}",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
    "-oClearAllForwardings=yes",
)
MARK = "@@pocketvlm@@"
"""What precedes a script's own output: a login shell may greet before it."""

LOST = 255
"""ssh's exit code when the connection, not the command, failed."""


class DeviceError(PocketError):
    """A device cannot be reached or used, or what ran there failed."""


class ConnectionLost(DeviceError):
    """The connection broke. Nothing is known of what ran; trying again may help."""


@dataclass(frozen=True)
class Target:
    """Where `--on` points. port: None is ssh's own choice (its configuration, else 22)."""

    host: str
    user: str | None = None
    port: int | None = None

    @property
    def destination(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    def __str__(self) -> str:
        return f"ssh://{self.destination}" + (f":{self.port}" if self.port else "")


ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[\w.][\w.-]*)@)?(?:\[(?P<six>[\da-fA-F:.]+(?:%[\w.]+)?)\]|(?P<host>[\w.][\w.-]*))"
    r"(?::(?P<port>\d{1,5}))?/?",
    re.ASCII,
)
"""Neither user nor host begins with a dash: ssh would take it for an option."""


def parse(url: str) -> Target:
    """Read `ssh://[user@]host[:port]`. Raises InputError on anything else."""
    wanted = "wanted ssh://user@host or ssh://user@host:port"
    if re.match(r"ssh://[^@/]*:[^@/]*@", url):
        raise InputError(f"--on ssh://...: a password does not belong into an address; use a key; {wanted}")
    found = ADDRESS.fullmatch(url)
    if not found:
        raise InputError(f"--on {url}: is no ssh address; {wanted}")
    port = None if found["port"] is None else int(found["port"])
    if port is not None and not 0 < port < 65536:
        raise InputError(f"--on {url}: no port {port}; {wanted}")
    return Target(found["six"] or found["host"], found["user"], port)


@dataclass(frozen=True)
class Done:
    """How a script ended. `out` is what it wrote to stdout, `err` to stderr."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        lines = [line for line in self.err.splitlines() if line.strip()] or self.out.splitlines()
        return lines[-1].strip() if lines else f"exit code {self.code}"


class Ssh:
    """An open connection. Use it in `with`; a script is POSIX sh and runs with LC_ALL=C."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._master: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None

    def __enter__(self) -> Ssh:
        """Connect. Raises DeviceError that tells an unreachable host from a wrong key."""
        if not shutil.which("ssh"):
            raise DeviceError(
                "ssh: not found here; install OpenSSH's client (Debian: apt install openssh-client)"
            )
        self._folder = tempfile.mkdtemp(prefix="pv-")  # short: a socket's path may have 104 bytes
        try:
            self.connect()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def connect(self) -> None:
        """Open the shared connection anew; ssh may ask a terminal for a passphrase or about a host key."""
        self._hang_up()
        socket = self._socket()
        socket.unlink(missing_ok=True)
        with tempfile.TemporaryFile() as err:
            command = [*self._command(), "-oControlMaster=yes", "-N", "--", self.target.destination]
            asks = sys.stdin is not None and sys.stdin.isatty()
            self._master = subprocess.Popen(
                command,
                stdin=None if asks else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if asks else err,
            )
            while not socket.exists():
                if self._master.poll() is not None:
                    err.seek(0)
                    raise explain(self.target, err.read().decode(errors="replace"))
                time.sleep(0.02)

    def run(self, script: str, *, check: bool = True) -> Done:
        """Run a script to its end.

        Raises ConnectionLost when the connection breaks; DeviceError with the script's last line when it
        fails and `check` is set.
        """
        command = self._remote(f"printf '%s\\n' '{MARK}'; {script}")
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        before, mark, after = out.partition(MARK + "\n")
        if done.returncode == LOST and not mark:
            raise explain(self.target, err)
        found = Done(done.returncode, after if mark else before, err)
        if done.returncode == LOST and self._is_down():
            raise ConnectionLost(f"{self.target}: the connection broke; run again")
        if check and found.code:
            raise self.failed(found)
        return found

    def failed(self, done: Done) -> DeviceError:
        """The error for a script that ended badly."""
        if "No space left on device" in done.err or "Disk quota exceeded" in done.err:
            return DeviceError(
                f"{self.target}: its disk is full; free some and run again: what is there is kept"
            )
        return DeviceError(f"{self.target}: {done.last_line}")

    @contextlib.contextmanager
    def process(self, script: str) -> Iterator[subprocess.Popen[bytes]]:
        """A script with pipes at its stdin, stdout and stderr; killed when the block ends before it does."""
        child = subprocess.Popen(
            self._remote(script),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            yield child
        finally:
            for pipe in (child.stdin, child.stdout, child.stderr):
                _close(pipe)
            if child.poll() is None:
                child.terminate()
            child.wait()

    def read(self, path: str) -> bytes:
        """All bytes of a file there. Raises DeviceError."""
        with self.process(f"cat {shlex.quote(path)}") as child:
            out, err = child.communicate()
        if child.returncode == LOST:
            raise explain(self.target, err.decode(errors="replace"))
        if child.returncode:
            raise self.failed(Done(child.returncode, "", err.decode(errors="replace")))
        return out

    def _command(self) -> list[str]:
        asks = sys.stdin is not None and sys.stdin.isatty()
        port = ["-p", str(self.target.port)] if self.target.port else []
        batch = [] if asks else ["-oBatchMode=yes"]
        return ["ssh", *OPTIONS, *batch, *port, f"-oControlPath={self._socket()}"]

    def _remote(self, script: str) -> list[str]:
        wrapped = f"exec sh -c {shlex.quote(f'LC_ALL=C; export LC_ALL; {script}')}"
        return [*self._command(), "-oControlMaster=no", "-T", "--", self.target.destination, wrapped]

    def _socket(self) -> Path:
        assert self._folder is not None, "use Ssh in a with block"
        return Path(self._folder) / "s"

    def _is_down(self) -> bool:
        return self._master is None or self._master.poll() is not None

    def _leave(self) -> None:
        self._hang_up()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _hang_up(self) -> None:
        if self._master is not None:
            self._master.terminate()
            self._master.wait()
            self._master = None


REFUSALS = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key has changed: another machine answers there, or it was set up anew; if that is so: "
        "ssh-keygen -R {known}",
    ),
    (
        "Host key verification failed",
        "its host key is not known here; connect once by hand (ssh {call}) and compare the fingerprint "
        "with the device's",
    ),
    (
        "Too many authentication failures",
        "it refused every key of the agent; name the right one in ~/.ssh/config (IdentitiesOnly yes)",
    ),
    (
        "Permission denied",
        "it refused our key; put a public key there (ssh-copy-id {call}) or load yours (ssh-add)",
    ),
    ("Bad owner or permissions", "ssh refuses its own configuration: {last}"),
    ("Bad configuration option", "ssh refuses its own configuration: {last}"),
)
"""What ssh says, and what that means here; the first that is found wins. Trying again changes nothing."""

ABSENCES = (
    ("Could not resolve hostname", "no such host name; check it, or give the address"),
    ("Connection refused", "nothing listens there; is the ssh server running, is the port right?"),
    ("No route to host", "it is not reachable; is it switched on and in this network?"),
    ("Network is unreachable", "it is not reachable; is this machine in its network?"),
    ("timed out", "no answer; is it switched on, is the address right?"),
)
"""The same for a device that is not there, or not yet again."""


def explain(target: Target, stderr: str) -> DeviceError:
    """ssh's own words as one line with a next step; a ConnectionLost where another try may help."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "the connection broke"
    port = f"-p {target.port} " if target.port else ""
    known = f"'[{target.host}]:{target.port}'" if target.port else target.host
    for sign, meaning in REFUSALS:
        if sign in stderr:
            words = meaning.format(call=port + target.destination, known=known, last=last)
            return DeviceError(f"{target}: {words}")
    for sign, meaning in ABSENCES:
        if sign in stderr:
            return ConnectionLost(f"{target}: {meaning}")
    return ConnectionLost(f"{target}: {last}; run again")


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(OSError):
            pipe.close()
