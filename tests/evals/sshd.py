"""A real ssh server of our own on a high port: its own host key, its own clients' keys, nothing shared."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

SSHD = shutil.which("sshd") or next((p for p in ("/usr/sbin/sshd",) if Path(p).exists()), None)


def keygen(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


@dataclass
class Server:
    """`url` for --on. `path` goes first in PATH: its `ssh` is the system's with a configuration of ours."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def path(self) -> str:
        return f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def client(self, *, key: str = "client", known: str = "known") -> None:
        """Choose the client's key and its list of known hosts."""
        (self.folder / "config").write_text(
            f"IdentityFile {self.folder / key}\nIdentitiesOnly yes\nIdentityAgent none\n"
            f"UserKnownHostsFile {self.folder / known}\nGlobalKnownHostsFile none\n"
        )

    def know(self, host_key: str, name: str) -> None:
        """Write a list of known hosts that has this key for the server."""
        public = (self.folder / f"{host_key}.pub").read_text()
        (self.folder / name).write_text(f"[127.0.0.1]:{self.port} {public}")

    def stop(self) -> None:
        """End the server and the connections it has, as switching the device off does."""
        self.cut()
        self.process.kill()
        self.process.wait()

    def cut(self) -> None:
        """Break the connections and keep the server."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                child.kill()

    def start(self) -> None:
        self.process = _start(self.folder, self.port)


def _start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists on it when root starts it
    assert SSHD is not None
    process = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=(folder / "sshd.log").open("ab")
    )
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return process
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError((folder / "sshd.log").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serve(folder: Path, **settings: str) -> Iterator[Server]:
    """Run a server in `folder` until the block ends; `settings` are lines of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    host = keygen(folder / "host")
    for name in ("client", "stranger", "other_host"):
        keygen(folder / name)
    authorized = folder / "authorized"
    authorized.write_bytes((folder / "client.pub").read_bytes())
    port = free_port()
    lines = {
        "Port": str(port),
        "ListenAddress": "127.0.0.1",
        "HostKey": str(host),
        "AuthorizedKeysFile": str(authorized),
        "PidFile": "none",
        "UsePAM": "no",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        **settings,
    }
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in lines.items()))
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "config"} "$@"\n')
    wrapper.chmod(0o755)
    server = Server(folder, port, _start(folder, port))
    server.know("host", "known")
    server.know("other_host", "changed")
    (folder / "empty").write_text("")
    server.client()
    try:
        yield server
    finally:
        server.stop()
