"""A command that goes on at the device when the connection does not.

In: an open `Ssh`, a folder there, a command. Out: its lines as they come, its exit code, its files.
Not here: what the command measures.

`<folder>/run` holds one job: `id` (what was asked), `boot` and `pid` (whether it still lives), `log`, and
`rc` once it has ended. Asking the same again while it runs follows it; after it has ended fetches it; after a
reboot starts it again in the same directory, where a bench finds what it had finished.
"""

from __future__ import annotations

import os
import select
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import IO

from evals.remote.remote_setup import Facts, free_bytes
from evals.remote.remote_ssh import LOST, ConnectionLost, DeviceError, Ssh
from evals.remote.remote_sync import reconnect

END = "@@ended@@"
AWAY_SECONDS = 120.0
"""How long a device may be unreachable before this side stops waiting; its job goes on."""

FULL_BYTES = 1 << 18
"""With less than this left, a job that went without a word is taken to have filled the disk."""

SILENT_SECONDS = 30.0
"""How long the log may stand still before the job is looked at: a killed one would never end it."""

DETACHED = "$(command -v setsid) nohup"
"""A group of its own, where there is setsid: `kill -- -PID` then ends the job with all that it started."""

Tell = Callable[[str], None]


class State(Enum):
    NONE = "none"
    RUNNING = "running"
    ENDED = "ended"
    DIED = "died"


@dataclass(frozen=True)
class Job:
    """What is at `<folder>/run`. `id` is empty when nothing is."""

    id: str
    state: State
    boot_id: str = ""


def look(ssh: Ssh, folder: str) -> Job:
    """The job there and whether it lives. A job of an earlier start of the system has died."""
    script = f"""
cd {shlex.quote(folder)}/run 2>/dev/null || exit 0
echo id=$(cat id 2>/dev/null); echo boot=$(cat boot 2>/dev/null); echo rc=$(cat rc 2>/dev/null)
echo now=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
if [ -f pid ] && kill -0 $(cat pid) 2>/dev/null; then echo alive=yes; fi
"""
    found = dict(line.partition("=")[::2] for line in ssh.run(script).out.splitlines())
    if not found.get("id"):
        return Job("", State.NONE)
    if found.get("rc"):
        state = State.ENDED
    elif found.get("alive") and found["boot"] == found["now"]:
        state = State.RUNNING
    else:
        state = State.DIED
    return Job(found["id"], state, found["boot"])


def start(ssh: Ssh, folder: str, job_id: str, command: list[str], beside: list[str], facts: Facts) -> None:
    """Start `command` in `<folder>/run`, and `beside` (a sampler) for as long as it takes.

    Its output goes to files; it outlives the connection. What is left of a killed job is ended first.
    """
    _end_leftovers(ssh, folder)
    run = shlex.quote(f"{folder}/run")
    sampler = f"{shlex.join(beside)} >/dev/null 2>sampler.log & other=$!" if beside else "other="
    script = f"""
cd {run} && echo $$ > pid && rm -f rc
{sampler}
{shlex.join(command)} > out 2> log
code=$?
[ -z "$other" ] || {{ kill $other; wait $other; }} 2>/dev/null
echo $code > rc.new && mv rc.new rc
printf '\\n%s %s\\n' '{END}' $code >> log
"""
    ssh.run(
        f"mkdir -p {run} && cd {run} && rm -f rc pid log && : > log && echo {job_id} > id && "
        f"echo {shlex.quote(facts.boot_id)} > boot && printf '%s' {shlex.quote(script)} > job.sh && "
        f"{{ {DETACHED} sh job.sh </dev/null >/dev/null 2>&1 & }} && "
        f"n=0; while [ ! -s pid ] && [ $n -lt 50 ]; do sleep 0.1; n=$((n+1)); done; [ -s pid ]"
    )


def _end_leftovers(ssh: Ssh, folder: str) -> None:
    """End processes that work on the bundles there: a bench goes on when only the script around it is killed.

    The path is put together there, so that the line that looks for it is not found.
    """
    ssh.run(
        f"f={shlex.quote(folder)}; for p in /proc/[0-9]*; do "
        "case $(tr '\\0' ' ' < $p/cmdline 2>/dev/null) in *\"$f\"/bun\"dles/\"*) kill ${p#/proc/};; esac; "
        "done 2>/dev/null; true"
    )


def follow(ssh: Ssh, folder: str, boot_id: str, tell: Tell) -> int:
    """Tell each line of the job's log, over broken connections, until it ends; its exit code.

    Raises DeviceError when the device was started anew meanwhile or the job was killed; ConnectionLost when
    the device stays away: the job goes on, and the same command again follows it.
    """
    seen: list[str] = []
    away_since = None
    while True:
        try:
            code = _follow_once(ssh, folder, seen, tell)
            if code is not None:
                return code
            job = look(ssh, folder)
            if job.state is State.DIED:
                raise DeviceError(_how_it_died(ssh, folder, job, boot_id))
            away_since = None
        except ConnectionLost as error:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > AWAY_SECONDS:
                raise ConnectionLost(
                    f"{error}; the bench goes on there: the same command fetches its results"
                ) from None
            tell("the connection broke; connecting again")
            time.sleep(2)
            reconnect(ssh)


def _follow_once(ssh: Ssh, folder: str, seen: list[str], tell: Tell) -> int | None:
    """The exit code, or None when the log was silent for long or its stream ended. Adds to the lines `seen`.

    `tail` is tied to our end of the connection: when its stdin closes, it is killed.
    """
    log = shlex.quote(f"{folder}/run/log")
    script = f"tail -n +{len(seen) + 1} -f {log} & t=$!; cat >/dev/null; kill $t"
    with ssh.process(script) as child:
        assert child.stdin is not None and child.stdout is not None
        for line in _lines(child.stdout, SILENT_SECONDS):
            seen.append(line)
            if line.startswith(END):
                child.stdin.close()
                child.wait()
                return int(line.split()[1])
            if line:
                tell(line)
        if child.poll() == LOST:
            raise ConnectionLost(f"{ssh.target}: the connection broke")
    return None


def _lines(stream: IO[bytes], seconds: float) -> Iterator[str]:
    """Whole lines, until the stream ends or nothing comes for `seconds`. What a break has cut is left out."""
    rest = b""
    while select.select([stream], [], [], seconds)[0]:
        block = os.read(stream.fileno(), 1 << 16)
        if not block:
            return
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").strip()


def _how_it_died(ssh: Ssh, folder: str, job: Job, boot_id: str) -> str:
    """A full disk looks like a killed job: its script cannot write how it ended."""
    if free_bytes(ssh, folder) < FULL_BYTES:
        return f"{ssh.target}: its disk is full in {folder}; free some and run again: what is there is kept"
    now = ssh.run("cat /proc/sys/kernel/random/boot_id 2>/dev/null; true").out.strip()
    how = (
        "started anew while it measured"
        if now not in (job.boot_id, boot_id)
        else "the bench was killed there"
    )
    return f"{ssh.target}: {how}; run again: it goes on from what it had finished"


def failure(ssh: Ssh, folder: str, code: int) -> str:
    """What a job that ended with `code` says of it: its last line, or the signal that killed it."""
    if code in (137, 9):
        return "was killed, most often for want of memory; take a smaller bundle or free memory there"
    lines = ssh.run(f"tail -n 5 {shlex.quote(f'{folder}/run/log')}").out.splitlines()
    last = [line.strip() for line in lines if line.strip() and not line.startswith(END)]
    return (last[-1] if last else f"exit code {code}").removeprefix("pocketvlm: ")


def stop(ssh: Ssh, folder: str) -> None:
    """Forget the job: what it wrote is deleted."""
    ssh.run(f"rm -rf -- {shlex.quote(f'{folder}/run')}")
