"""A stage's server: started, waited for, ended in every way out, its workers with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill.answers.server import Server
from evals.client import ServerError
from runtime.errors import InputError

ROOT = Path(__file__).parent.parent.parent
SERVER = """
    import http.server, os, pathlib, signal, subprocess, sys, time
    checkpoint, port, how = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    here = pathlib.Path(__file__).parent
    print("loading", checkpoint, flush=True)
    if "stubborn" in how:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    work = "time.sleep(600)"
    if "stubborn" in how:
        work = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + work
    worker = subprocess.Popen([sys.executable, "-c", "import signal, time; " + work])
    (here / "pids").write_text(f"{os.getpid()} {worker.pid}")
    if "taken" in how and not (here / "tried").exists():
        (here / "tried").write_text(str(port))
        sys.exit("[Errno 98] error while attempting to bind: address already in use")
    if "dies" in how:
        print("CUDA out of memory", file=sys.stderr)
        sys.exit(3)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503 if "mute" in how else 200)
            self.end_headers()
        def do_POST(self):
            print("a bug in a kernel", flush=True)
            os._exit(7)
        def log_message(self, *_): ...
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Server]:
    (tmp_path / "serve.py").write_text(textwrap.dedent(SERVER))

    def make(*how: str, **options: Any) -> Server:
        command = f"{sys.executable} {tmp_path}/serve.py {{checkpoint}} {{port}} {' '.join(how)}"
        settings: dict[str, Any] = {"start_seconds": 60, "stop_seconds": 10, **options}
        return Server(
            command, settings.pop("checkpoint", "a model"), tmp_path / "log" / "server.log", **settings
        )

    return make


def pids(tmp_path: Path) -> list[int]:
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def alive(some: list[int]) -> list[int]:
    return [
        pid for pid in some if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def gone(some: list[int], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while alive(some) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(some)


def test_it_runs_while_the_block_does(start: Callable[..., Server], tmp_path: Path) -> None:
    with start() as server:
        running = pids(tmp_path)
        assert alive(running) == running and len(running) == 2
        assert server.base_url == f"http://127.0.0.1:{server.port}/v1"
        assert os.getpgid(running[0]) == os.getpgid(running[1]) != os.getpgid(0)
        assert server.client(retries=0).model == "a model", "without a list of models: the checkpoint"
    assert alive(running) == []
    assert "loading a model" in server.log.read_text(), "a path may hold spaces; the log has what it prints"
    server.stop()


def test_an_error_in_the_block_ends_it(start: Callable[..., Server], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), start():
        raise KeyboardInterrupt
    assert alive(pids(tmp_path)) == []


def test_a_server_that_ignores_term_is_killed(start: Callable[..., Server], tmp_path: Path) -> None:
    with start("stubborn", stop_seconds=0.3):
        pass
    assert alive(pids(tmp_path)) == []


def test_a_server_that_dies_at_the_start(start: Callable[..., Server], tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"ended with status 3 before it answered.*CUDA out of memory"),
        start("dies"),
    ):
        pass
    assert gone(pids(tmp_path)), "and leaves no worker behind"


def test_a_server_that_stays_mute(start: Callable[..., Server], tmp_path: Path) -> None:
    told: list[str] = []
    mute = start("mute", start_seconds=0.8, say=told.append)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ServerError, match=r"has not answered for 1 s; .*server\.log ends: loading a model"),
    ):
        patch.setattr("distill.answers.server.SAY_SECONDS", 0.2)
        mute.start()
    assert told and "waiting for the server" in told[0]
    assert alive(pids(tmp_path)) == []


def test_a_server_that_dies_later(start: Callable[..., Server], tmp_path: Path) -> None:
    """The client only sees a lost connection; the message says what the log says."""
    server = start()
    with pytest.raises(ServerError, match=r"no connection.*had ended by itself; .*a bug in a kernel"), server:
        client = server.client(retries=1, pause_seconds=0.2)
        client.generate([[{"role": "user", "content": "x"}]])
    assert gone(pids(tmp_path)), "the worker that it left is ended too"


def test_a_port_that_was_taken_meanwhile(start: Callable[..., Server], tmp_path: Path) -> None:
    with start("taken") as server:
        assert server.port != int((tmp_path / "tried").read_text())


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    server = Server("no-such-server {checkpoint} --port {port}", "m", tmp_path / "log")
    with pytest.raises(ServerError, match=r"status 127.*no-such-server: No such file or directory"):
        server.start()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("vllm serve {checkpoint}", "{port} is missing"),
        ("vllm serve --port {port}", "{checkpoint} is missing"),
        ("vllm serve {checkpoint} --port {prot}", "prot"),
        ("vllm serve '{checkpoint} --port {port}", "quotation"),
    ],
)
def test_a_command_that_cannot_be_filled_in(command: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told.replace("{", r"\{")):
        Server(command, "m", tmp_path / "log")


def test_it_dies_with_its_stage(start: Callable[..., Server], tmp_path: Path) -> None:
    """kill -9 of the process that started it, which then can clean nothing up."""
    start()
    script = f"""
        import os, signal, sys
        from pathlib import Path
        from distill.answers.server import Server
        here = Path({str(tmp_path)!r})
        command = f"{{sys.executable}} {{here}}/serve.py {{{{checkpoint}}}} {{{{port}}}} stubborn"
        Server(command, "m", here / "log", stop_seconds=0.3).start()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert gone(pids(tmp_path))


def test_it_outlives_the_thread_that_started_it(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        time.sleep(0.5)
        assert len(alive(pids(tmp_path))) == 2
    finally:
        server.stop()
    assert alive(pids(tmp_path)) == []
