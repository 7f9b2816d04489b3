"""`bench BUNDLE --on browser://`: a bundle's page measures itself in a browser and sends the results back.

In: a bundle with a page, and a browser here or a device that opens an address. Out: `BenchResults`, source
browser. Not here: the page (`export/browser`), the server (`evals/page_server.py`).

`browser://` starts a headless Chromium here, which POCKETVLM_BROWSER names or the path has. `browser://HOST:PORT`
waits for a browser on any device to open the address that is told; a browser gives pages from another device
neither a fine clock nor several threads unless they came over https, and the results say so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from evals.bench import bench_import, bench_results
from evals.bench.bench import seconds_of
from evals.bench.bench_results import BenchResults
from evals.page_server import RESULTS, PageServer
from evals.remote import remote_rounds
from runtime import files
from runtime.errors import InputError, PocketError

SCHEME = "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
POLL_SECONDS = 2.0

Tell = Callable[[str], None]


class BrowserError(PocketError):
    """The browser or its page did not do what was asked."""


@dataclass(frozen=True)
class Asked:
    """What the page is to measure. provider: auto, webgpu or wasm. seconds: of a sustained run, 0: none.

    rounds: loadings of the page, each with `warmup` and `repeats` answers; the sustained run is in the first.
    wait_s: how long the results of a round may take; threads: of WebAssembly, None: the page's own choice.
    """

    provider: str = "auto"
    rounds: int = 1
    warmup: int = 3
    repeats: int = 10
    tokens: int = 16
    seconds: float = 0.0
    threads: int | None = None
    wait_s: float = 3600.0

    def query(self, number: int = 0) -> str:
        """What the page's address asks of it in this round."""
        values: dict[str, Any] = {
            "run": "bench",
            "post": RESULTS,
            "provider": self.provider,
            "warmup": self.warmup,
            "repeats": self.repeats,
            "tokens": self.tokens,
            "seconds": 0.0 if number else self.seconds,
        }
        if self.threads is not None:
            values["threads"] = self.threads
        return urlencode(values)


def bench(url: str, bundle: Path, asked: Asked = Asked(), tell: Tell = print) -> BenchResults:
    """Results of the page of `bundle`, completed by what is known of the bundle here.

    Raises InputError for a wrong address or bundle, BrowserError when the page fails or sends nothing.
    """
    host, port, is_here = parse(url)
    with PageServer(bundle, host, port) as server, tempfile.TemporaryDirectory() as scratch:
        server.again = 0 if is_here else asked.rounds - 1

        def measure(number: int) -> BenchResults:
            address = f"{server.address}?{asked.query(number)}"
            if asked.rounds > 1:
                tell(f"round {number + 1} of {asked.rounds}")
            if is_here:
                found = run_headless(address, server, asked.wait_s, tell)
            else:
                if number == 0:
                    tell(f"open {address} on the device (its own name for this machine in place of {host})")
                found = _received(server, asked.wait_s)
            return _checked(found, Path(scratch) / "bench.json")

        rounds, stopped = remote_rounds.taken(asked.rounds, measure, tell)
        found = joined(rounds, fresh=is_here)
        path = Path(scratch) / "joined.json"
        bench_results.write(found.model_copy(update={"missing": (*found.missing, *stopped)}), path)
        return bench_import.read(path, [bundle])


def _checked(found: dict[str, Any], path: Path) -> BenchResults:
    """What a page sent, read as what it must be. Raises BrowserError, InputError."""
    if "error" in found:
        raise BrowserError(f"the page: {found['error']}")
    files.write_text(path, json.dumps(found))
    results = bench_results.read(path)
    if results.source != SCHEME or [len(one.points) for one in results.bundles] != [1]:
        raise BrowserError(f"the page: sent results of {results.source!r}; reload it")
    return results


def joined(rounds: Sequence[BenchResults], fresh: bool) -> BenchResults:
    """Rounds of one bundle as one result. fresh: each was a browser of its own, not a page loaded anew.

    Raises BrowserError when they differ in bundle, provider, threads or picture: then they are no rounds.
    """
    first = rounds[0]
    for one in rounds[1:]:
        for what, here, there in (
            ("bundle", first.bundles[0].sha256, one.bundles[0].sha256),
            ("providers", first.policy.providers, one.policy.providers),
            ("threads", first.policy.threads, one.policy.threads),
            ("picture and question", first.grid, one.grid),
        ):
            if here != there:
                raise BrowserError(f"the page: its rounds differ in {what}: {here}, then {there}; ask again")
    runs = [
        one.bundles[0]
        .points[0]
        .runs[0]
        .model_copy(update={"round": number, "order": number, "fresh_process": fresh or number == 0})
        for number, one in enumerate(rounds)
    ]
    point = first.bundles[0].points[0].model_copy(update={"runs": tuple(runs)})
    return first.model_copy(
        update={
            "bundles": (first.bundles[0].model_copy(update={"points": (point,)}),),
            "policy": first.policy.model_copy(update={"rounds": len(rounds)}),
            "notes": tuple(dict.fromkeys(note for one in rounds for note in one.notes)),
        }
    )


KNOWS = (
    *("--rounds", "--repeats", "--warmup", "--tokens", "--threads", "--providers", "--sustained"),
    "--device-name",
)
"""Options of the verb that mean something to a page."""


def measure(
    url: str, bundles: Sequence[Path], values: Mapping[str, Any], given: Sequence[str], tell: Tell = print
) -> BenchResults:
    """What the verb does. `values`: its parameters by name; `given`: its options that somebody set.

    Raises InputError on an option that a page does not know, or another number of bundles than one.
    """
    if unknown := [flag for flag in given if flag not in KNOWS]:
        raise InputError(f"{', '.join(unknown)}: not for browser://; a page knows {', '.join(KNOWS)}")
    if len(bundles) != 1:
        raise InputError(f"--on browser://: wanted one bundle, got {len(bundles)}")
    seconds = seconds_of(values["sustained"])
    asked = Asked(
        provider=values["providers"] or "auto",
        rounds=values["rounds"],
        warmup=values["warmup"],
        repeats=values["repeats"],
        tokens=values["tokens"],
        seconds=seconds,
        threads=values["threads"],
        wait_s=Asked.wait_s + seconds,
    )
    found = bench(url, bundles[0], asked, tell)
    name = values["device_name"]
    if name is None:
        return found
    return found.model_copy(update={"device": found.device.model_copy(update={"name": name})})


def parse(url: str) -> tuple[str, int, bool]:
    """(host, port, whether the browser is to be started here). Raises InputError."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    is_bare = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username)
    if parts.scheme != SCHEME or not is_bare or port == -1 or (parts.hostname and port is None):
        raise InputError(f"--on: got {url!r}, expected browser:// or browser://HOST:PORT")
    if parts.hostname is None:
        return "127.0.0.1", 0, True
    return parts.hostname, port or 0, False


def find_browser() -> str:
    """The program of a Chromium. Raises InputError saying how to name one."""
    given = os.environ.get("POCKETVLM_BROWSER")
    for name in (given,) if given else BROWSERS:
        if found := shutil.which(name):
            return found
    raise InputError(
        f"--on browser://: {given or 'no Chromium'} is not on the path; set POCKETVLM_BROWSER to one, "
        "or give browser://HOST:PORT and open the page yourself"
    )


def run_headless(address: str, server: PageServer, seconds: float, tell: Tell = print) -> dict[str, Any]:
    """What the page at `address` sends to the server, in a browser with a profile of its own.

    Raises BrowserError when the browser ends before or the time is over.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [find_browser(), "--headless=new", f"--user-data-dir={profile}", "--no-first-run"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses to sandbox as root
        tell(f"starting {command[0]}")
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen([*command, address], stdout=log, stderr=log)
            try:
                return _received(server, seconds, process)
            finally:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _received(
    server: PageServer, seconds: float, process: subprocess.Popen[bytes] | None = None
) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return server.results(POLL_SECONDS)
        except TimeoutError:
            if process is not None and process.poll() is not None:
                raise BrowserError(
                    f"the browser ended with status {process.returncode} and sent nothing; "
                    "try its command by hand"
                ) from None
    raise BrowserError(f"no results within {seconds:.0f} s; is the page open, and what does it say?")
