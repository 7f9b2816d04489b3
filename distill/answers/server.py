"""A generation server that lives as long as its stage: started with the right weights, proved, stopped.

In: a command template, a checkpoint. Out: a client of the running server; its log in a file.
Not here: what is asked of it (engines.py), how its weights are proved (probe.py).

The server is stopped in every way out: at the end of the block, on an error, on Ctrl-C, and by
`keeper.py` when this process is killed. The whole process group goes, workers included.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from distill.answers import keeper
from evals.client import Client, ServerError
from runtime.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from distill.answers.probe import Proof

TAIL_LINES = 12
SAY_SECONDS = 10.0
PORT_TAKEN = ("address already in use", "errno 98", "errno 48")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens addresses of this machine; a proxy of the environment could not."""


class Server:
    """A context manager around `command`, for example `vllm serve {checkpoint} --port {port}`.

    The command is split like a shell would, then `{checkpoint}` and `{port}` are filled in, so a path may
    hold spaces; no shell runs. `log` gets what the server prints. `say` is told now and then how far the
    start is. Raises InputError for a template that cannot be filled in, ServerError for a server that
    does not come up within `start_seconds`; the message ends with the last lines of the log.
    """

    def __init__(
        self,
        command: str,
        checkpoint: Path | str,
        log: Path,
        *,
        model: str | None = None,
        start_seconds: float = 3600.0,
        stop_seconds: float = 30.0,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.checkpoint, self.log, self.model = str(checkpoint), log, model
        self.start_seconds, self.stop_seconds = start_seconds, stop_seconds
        self.environment, self.say = dict(environment or {}), say or _to_stderr
        self.port = 0
        self._template = _split(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._command: list[str] = []
        self._log_start = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        died = self._process is not None and self._process.poll() is not None
        tail = self.tail() if died else ""
        self.stop()
        if died and isinstance(error, ServerError):
            raise ServerError(f"{error}. The server had ended by itself; {tail}", error.status) from error

    def start(self) -> None:
        """Start and wait until the server answers. A port that another process took is replaced."""
        for attempt in range(3):
            self.port = free_port()
            self._spawn()
            try:
                self._wait_until_healthy()
                return
            except ServerError as error:
                self.stop()
                if attempt == 2 or not any(sign in str(error).lower() for sign in PORT_TAKEN):
                    raise
            except BaseException:
                self.stop()
                raise

    def client(self, **options: Any) -> Client:
        """A client of the served model; `options` are those of `Client`.

        The model's id is `model`, or the one under which the server lists the checkpoint, or the checkpoint.
        """
        client = Client(self.base_url, self.model or self.checkpoint, **options)
        if self.model is None:
            with contextlib.suppress(ServerError):
                for served in client.models():
                    if self.checkpoint in (served["id"], served.get("root")):
                        client.model = str(served["id"])
        return client

    def probe(
        self,
        client: Client,
        model: PreTrainedModel | None = None,
        processor: ProcessorMixin | None = None,
        *,
        record: Path | None = None,
        images: bool = True,
    ) -> Proof:
        """Prove that the served weights are `model`'s, or those that `record` remembers (see probe.py)."""
        from distill.answers import probe

        return probe.prove(client, model, processor, record=record, checkpoint=self.checkpoint, images=images)

    def stop(self) -> None:
        """TERM, then KILL, for the whole process group. Safe to call twice, and in every state."""
        process, self._process = self._process, None
        below: list[psutil.Process] = []
        if process is None:
            return
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(self.stop_seconds + 10.0)
        except BaseException as error:  # the keeper hangs, or Ctrl-C while it waits
            process.kill()
            process.wait()
            for left in below:
                with contextlib.suppress(psutil.Error):
                    left.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise

    def tail(self) -> str:
        """The last lines that this start of the server has printed, for a message."""
        with contextlib.suppress(OSError):
            lines = self.log.read_bytes()[self._log_start :].decode(errors="replace").splitlines()
            kept = " | ".join(line.strip() for line in lines[-TAIL_LINES:] if line.strip())
            return f"{self.log} ends: {kept or '(nothing printed)'}"
        return f"{self.log}: cannot be read"

    def _spawn(self) -> None:
        fields = {"checkpoint": self.checkpoint, "port": str(self.port)}
        command = self._command = [part.format(**fields) for part in self._template]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as stream:
            stream.write(f"$ {shlex.join(command)}\n".encode())
            stream.flush()
            self._log_start = stream.tell()
            # -I: modules of this package must not take the place of the standard library's
            watch = [sys.executable, "-I", keeper.__file__, str(os.getpid()), str(self.stop_seconds)]
            self._process = subprocess.Popen(
                [*watch, *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal reaches us, and we stop the server
                env={**os.environ, **self.environment},
            )

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        began = said = time.monotonic()
        while True:
            status = self._process.poll()
            if status is not None:
                raise ServerError(
                    f"the server ended with status {status} before it answered (started by: "
                    f"{shlex.join(self._command)}); {self.tail()}"
                )
            if self._answers():
                return
            now = time.monotonic()
            if now - began > self.start_seconds:
                raise ServerError(
                    f"{self.base_url}: the server has not answered for {self.start_seconds:.0f} s; wanted "
                    f"200 from /health or /v1/models; {self.tail()}"
                )
            if now - said >= SAY_SECONDS:
                said = now
                last = self.tail().rsplit(" | ", 1)[-1]
                self.say(f"waiting for the server, {now - began:.0f} s: {last[-100:]}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        for path in ("/health", "/v1/models"):
            address = f"http://127.0.0.1:{self.port}{path}"
            with contextlib.suppress(OSError, ValueError), _DIRECT.open(address, timeout=5) as response:
                return bool(response.status == 200)
        return False


def free_port() -> int:
    """A port that is free on this machine now."""
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        return int(probing.getsockname()[1])


def _split(command: str) -> list[str]:
    """The parts of a command template. Raises InputError for a field that is not known, or none."""
    try:
        parts = shlex.split(command)
        filled = [part.format(checkpoint="CHECKPOINT", port="PORT") for part in parts]
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"server command {json.dumps(command)}: {error!r}; wanted only the fields {{checkpoint}} and "
            "{port}, and literal braces doubled"
        ) from error
    for name in ("CHECKPOINT", "PORT"):
        if not any(name in part for part in filled):
            raise InputError(
                f"server command {json.dumps(command)}: {{{name.lower()}}} is missing; wanted for example "
                "vllm serve {checkpoint} --port {port}"
            )
    return parts


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
