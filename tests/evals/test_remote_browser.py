"""The server for pages, and the page in headless Chromium: answers, pictures, conformance, bench.

Chromium is looked for on the path; onnxruntime-web in the node_modules directory of POCKETVLM_NODE_MODULES
(`npm install --ignore-scripts onnxruntime-web`).
"""

from __future__ import annotations

import http.client
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import pocketvlm
from evals import page_server
from evals.bench import bench_results, bench_summary
from evals.bench.bench_results import BenchResults
from evals.page_server import PageServer
from evals.remote import remote, remote_browser
from evals.remote.remote_browser import Asked, BrowserError
from export import browser_package
from runtime import bundle as bundles
from runtime.errors import InputError
from runtime.generation import GenerationOptions
from runtime.session import open_bundle
from tests.evals import ship_data
from tests.export.browser_probe import modules

HAS_BROWSER = modules() is not None and any(shutil.which(name) for name in remote_browser.BROWSERS)
needs_browser = pytest.mark.skipif(not HAS_BROWSER, reason="no Chromium, or no onnxruntime-web")
DRIVE = Path(__file__).parents[1] / "export" / "browser"


@pytest.fixture(scope="module")
def with_page(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("pages") / "tiny"))
    browser_package.write(copy, bundles.read(copy))
    return copy


@pytest.fixture
def ort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like onnxruntime-web's."""
    dist = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    (dist / page_server.MODULE).write_text("export {};")
    (dist / "x.wasm").write_bytes(b"\0asm")
    (dist.parent / "package.json").write_text("{}")
    monkeypatch.setenv("POCKETVLM_NODE_MODULES", str(tmp_path / "node_modules"))
    return dist


@pytest.fixture
def server(with_page: Path, ort: Path) -> Iterator[PageServer]:
    with PageServer(with_page) as found:
        yield found


def request(
    server: PageServer, method: str, path: str, body: bytes | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    parts = urlsplit(server.address)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
    connection.putrequest(method, path, skip_accept_encoding=True)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response, data


# --- the server -------------------------------------------------------


def test_files_of_the_bundle_and_of_onnxruntime_are_given(server: PageServer, with_page: Path) -> None:
    for path, wanted, kind in (
        ("/manifest.json", (with_page / "manifest.json").read_bytes(), "application/json"),
        ("/browser/", (with_page / "browser" / "index.html").read_bytes(), "text/html"),
        ("/browser/?run=check", (with_page / "browser" / "index.html").read_bytes(), "text/html"),
        ("/browser/page.js", (with_page / "browser" / "page.js").read_bytes(), "text/javascript"),
        ("/browser/ort/x.wasm", b"\0asm", "application/wasm"),
        (f"/browser/ort/{page_server.MODULE}", b"export {};", "text/javascript"),
    ):
        response, data = request(server, "GET", path)
        assert (response.status, data) == (200, wanted)
        assert response.headers.get_content_type() == kind
        assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret",
        "/%2e%2e/secret",
        "/browser/ort/../../../../secret",
        "/browser/ort/%2e%2e/package.json",
        "/onnx/",
        "/linked",
        "/nowhere",
        "/%00",
    ],
)
def test_nothing_else_is_given(server: PageServer, with_page: Path, path: str) -> None:
    secret = with_page.parent / "secret"
    secret.write_text("secret")
    link = with_page / "linked"
    if not link.is_symlink():
        link.symlink_to(secret)
    response, data = request(server, "GET", path)
    assert response.status == 404
    assert b"secret" not in data.replace(path.encode(), b"")


def test_results_are_taken_once_and_where_they_belong(
    server: PageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert request(server, "POST", "/results", b'{"a": 1}')[0].status == 204
    assert server.results(1) == {"a": 1}
    with pytest.raises(TimeoutError):
        server.results(0.05)
    assert request(server, "POST", "/elsewhere", b"{}")[0].status == 400
    monkeypatch.setattr(page_server, "MOST_BYTES", 10)
    assert request(server, "POST", "/results", b'{"a": "long enough"}')[0].status == 400
    for body, wanted in ((b"{", "no JSON"), (b"[1]", "a JSON list")):
        assert request(server, "POST", "/results", body)[0].status == 204
        with pytest.raises(InputError, match=wanted):
            server.results(1)


def test_what_cannot_be_served_is_said(
    tiny_bundle: Path, with_page: Path, ort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="export it with --target browser"):
        PageServer(tiny_bundle)
    with PageServer(with_page) as server:
        port = urlsplit(server.address).port
        with pytest.raises(InputError, match="take another port"):
            PageServer(with_page, port=port or 0)
    monkeypatch.delenv("POCKETVLM_NODE_MODULES")
    with pytest.raises(InputError, match="holds no onnxruntime-web; run npm install"):
        PageServer(with_page)


def test_a_page_is_told_to_load_anew_as_often_as_wanted(server: PageServer) -> None:
    server.again = 2
    assert [request(server, "POST", "/results", b"{}")[0].status for _ in range(4)] == [205, 205, 204, 204]


# --- rounds -----------------------------------------------------------


def loaded(**changed: Any) -> BenchResults:
    """What a page sends, as far as it matters here: one process."""
    sent = ship_data.bench("Chrome", {"student-int4": 1.0}, processes=1, source="browser", **changed)
    return sent.model_copy(update={"notes": ("one thread",)})


def test_rounds_become_processes_of_one_result() -> None:
    rounds = [loaded(seed=i) for i in range(3)]
    for fresh in (True, False):
        found = remote_browser.joined(rounds, fresh)
        (point,) = found.bundles[0].points
        assert [(run.round, run.order, run.fresh_process) for run in point.runs] == [
            (0, 0, True), (1, 1, fresh), (2, 2, fresh),
        ]  # fmt: skip
        assert [run.times for run in point.runs] == [one.bundles[0].points[0].runs[0].times for one in rounds]
        assert found.policy.rounds == 3 and found.notes == ("one thread",)
        summary = bench_summary.complete(found).bundles[0].points[0].summary
        assert summary is not None and summary.ttft_ms is not None and summary.ttft_ms.low is not None


def test_rounds_of_different_things_are_not_joined() -> None:
    one = loaded()
    other = one.model_copy(update={"policy": one.policy.model_copy(update={"providers": ("webgpu",)})})
    with pytest.raises(BrowserError, match=r"differ in providers: .*, then \('webgpu',\)"):
        remote_browser.joined([one, other], fresh=True)
    with pytest.raises(BrowserError, match="differ in picture and question"):
        remote_browser.joined([one, loaded(grid=("large",))], fresh=True)


def test_rounds_before_the_one_that_fails_are_kept(
    with_page: Path, ort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results as a page sends them, twice, and then a browser that ends."""
    sent: list[dict[str, Any]] = [json.loads(loaded(seed=i).model_dump_json(by_alias=True)) for i in range(2)]

    def ends(*args: Any) -> dict[str, Any]:
        if not sent:
            raise BrowserError("chromium: ended with status 7")
        return sent.pop(0)

    monkeypatch.setattr(remote_browser, "run_headless", ends)
    monkeypatch.setattr(remote_browser.bench_import, "read", lambda path, bundles: bench_results.read(path))
    found = remote_browser.bench("browser://", with_page, Asked(rounds=4))
    assert len(found.bundles[0].points[0].runs) == 2
    assert [(one.what, one.why) for one in found.missing][-1] == (
        "round 3 of 4", "chromium: ended with status 7",
    )  # fmt: skip


# --- the verb ---------------------------------------------------------


def test_addresses() -> None:
    assert remote_browser.parse("browser://") == ("127.0.0.1", 0, True)
    assert remote_browser.parse("browser://0.0.0.0:8000") == ("0.0.0.0", 8000, False)
    for wrong in ("browser://host", "browser://h:99999", "browser:///x", "browser://u@h:1", "http://h:1"):
        with pytest.raises(InputError, match="expected browser:// or browser://HOST:PORT"):
            remote_browser.parse(wrong)


def test_options_that_a_page_does_not_know(with_page: Path) -> None:
    with pytest.raises(InputError, match="--energy: not for browser://"):
        remote_browser.measure("browser://", [with_page], {}, ["--energy"])
    with pytest.raises(InputError, match="wanted one bundle, got 2"):
        remote_browser.measure("browser://", [with_page, with_page], {}, [])
    assert set(remote_browser.KNOWS).isdisjoint(remote.HERE_ONLY)


def test_the_verb_hands_its_options_over(with_page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Path, Asked]] = []

    def instead(url: str, directory: Path, asked: Asked, tell: remote_browser.Tell) -> None:
        seen.append((url, directory, asked))
        raise BrowserError("far enough")

    monkeypatch.setattr(remote_browser, "bench", instead)
    options = ["--tokens", "5", "--repeats", "2", "--warmup", "0", "--sustained", "2m", "--threads", "3"]
    command = [
        "bench",
        str(with_page),
        "--on",
        "browser://",
        *options,
        "--providers",
        "wasm",
        "--rounds",
        "2",
    ]
    result = CliRunner().invoke(pocketvlm.app, command)
    assert (result.exit_code, result.stderr) == (2, "pocketvlm: far enough\n")
    wanted = Asked("wasm", rounds=2, warmup=0, repeats=2, tokens=5, seconds=120, threads=3, wait_s=3720)
    assert seen == [("browser://", with_page, wanted)]
    assert "seconds=120" in wanted.query() and "seconds=0.0" in wanted.query(1)
    result = CliRunner().invoke(pocketvlm.app, [*command[:4], "--images", "64"])
    assert result.exit_code == 2
    assert "--images: not for browser://" in result.stderr


def test_a_browser_that_is_not_there_or_ends(
    server: PageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETVLM_BROWSER", str(tmp_path / "none"))
    with pytest.raises(InputError, match="set POCKETVLM_BROWSER"):
        remote_browser.find_browser()
    program = tmp_path / "browser"
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("POCKETVLM_BROWSER", str(program))
    monkeypatch.setattr(remote_browser, "POLL_SECONDS", 0.2)
    with pytest.raises(BrowserError, match="ended with status 7 and sent nothing"):
        remote_browser.run_headless(server.address, server, 30)


# --- Chromium ---------------------------------------------------------


def run(directory: Path, path: str) -> dict[str, Any]:
    with PageServer(directory) as server:
        return remote_browser.run_headless(server.address + path, server, 240)


@needs_browser
@pytest.mark.slow
def test_the_page_conforms(with_page: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = run(with_page, "?run=check&post=/results&provider=wasm")
    assert found.get("lines") == [], found
    assert found["cases"] > 0


@needs_browser
@pytest.mark.slow
def test_a_bench_in_the_browser(with_page: Path) -> None:
    pytest.importorskip("onnxruntime")
    asked = Asked(
        provider="wasm", rounds=2, warmup=1, repeats=2, tokens=3, seconds=0.5, threads=1, wait_s=240
    )
    found = remote_browser.bench("browser://", with_page, asked)
    (measured,) = found.bundles
    assert (found.source, found.emulated, found.policy.threads) == ("browser", False, 1)
    assert measured.sha256 == bundles.digest(with_page / "manifest.json")[0]
    (point,) = measured.points
    assert point.decode_tokens == 3
    assert [[len(row) for row in run.times.decode_ms] for run in point.runs] == [[3, 3], [3, 3]]
    assert all(run.load.cold_ms is not None and run.fresh_process for run in point.runs)
    assert point.summary is not None
    assert point.sustained is not None
    assert found.device.packages["onnxruntime-web"]


@needs_browser
@pytest.mark.slow
def test_a_page_that_fails_says_why(with_page: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(with_page, tmp_path / "copy", symlinks=True))
    part = next((copy / "onnx").glob("decoder*.onnx"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(BrowserError, match=r"the page: onnx/decoder_model_merged\.onnx: sha256"):
        remote_browser.bench("browser://", copy, Asked(provider="wasm", wait_s=240))


def pictures() -> dict[str, bytes]:
    """Files that a browser decodes."""
    drawn = np.random.default_rng(0)
    smooth = Image.fromarray(drawn.integers(0, 256, (5, 7, 4), dtype=np.uint8)).resize((28, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    colours = smooth.convert("RGB")
    wanted: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.jpg": (colours, {"quality": 95, "subsampling": 0}),
        "turned.jpg": (colours, {"quality": 95, "subsampling": 0, "exif": exif}),
        "clear.webp": (smooth, {"lossless": True, "exact": True}),
        "turned.webp": (colours, {"lossless": True, "exif": exif}),
        "plain.gif": (colours.quantize(64), {}),
        "plain.bmp": (colours, {}),
        "clear.png": (smooth, {}),
    }
    files = {}
    for name, (picture, options) in wanted.items():
        out = io.BytesIO()
        picture.save(out, {"jpg": "JPEG"}.get(name.split(".")[1], name.split(".")[1].upper()), **options)
        files[name] = out.getvalue()
    return files


@needs_browser
@pytest.mark.slow
def test_a_person_asks(with_page: Path, tmp_path: Path) -> None:
    """The page's own buttons; answers are the Python session's, and pictures are decoded as Pillow does."""
    pytest.importorskip("onnxruntime")
    copy = Path(shutil.copytree(with_page, tmp_path / "copy", symlinks=True))
    page = copy / "browser"
    for name in ("drive.html", "drive.js"):
        shutil.copy(DRIVE / name, page / name)
    files = pictures()
    for name, data in files.items():
        (page / name).write_bytes(data)
    (page / "cut.jpg").write_bytes(files["plain.jpg"][:200])
    asked = {"picture": "clear.webp", "question": "What is it?", "further": "Which color?"}
    (page / "asked.json").write_text(json.dumps({**asked, "pictures": [*files, "cut.jpg"]}))
    found = run(copy, "drive.html")
    assert "error" not in found, found["error"]
    for name, data in files.items():
        got = found["pictures"][name]
        assert "error" not in got, f"{name}: {got}"
        assert got["orientation"] == (6 if name.startswith("turned") else 1)
        shape = (got["height"], got["width"], got["channels"])
        samples = np.array(got["samples"], dtype=np.int16).reshape(shape)
        picture = Image.open(io.BytesIO(data)).convert("RGBA" if shape[2] == 4 else "RGB")
        most = 2 if name.endswith("jpg") else 0  # two decoders of JPEG may round otherwise
        assert np.abs(samples - np.asarray(picture).astype(np.int16)).max() <= most, name
    assert "truncated or damaged" in found["pictures"]["cut.jpg"]["error"]
    assert found["hashes"][0] == found["hashes"][1]
    with open_bundle(copy, threads=1) as session:
        chat = session.chat(page / "clear.webp")
        options = GenerationOptions(max_new_tokens=256)
        wanted = [chat.ask(asked[key], options) for key in ("question", "further")]
    assert found["asked"]["answers"] == [wanted[0].text, "", wanted[1].text, ""]
    assert f"{len(wanted[1].token_ids)} out" in found["asked"]["cost"]
    assert found["asked"]["name"] == "tiny"
