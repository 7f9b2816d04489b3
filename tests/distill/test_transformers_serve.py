"""A real server, `transformers serve` on a tiny checkpoint, behind a proxy that goes wrong.

One server for the whole file. It takes options as a generation config and gives text only: one answer a
request, no token ids, no log-probs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from distill.answers import probe, responses
from distill.answers.engines import HfEngine, OpenAIEngine
from distill.answers.partial import Partial
from distill.answers.server import Server
from distill.forward.sampling import Sampling
from distill.inputs.encoding import Encoder
from evals.client import Client, ServerError
from tests.distill.test_engines import chat_of, sample, samples
from tests.distill.test_responses import dataset, draw, total
from tests.faults import FaultServer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
COMMAND = f"{Path(sys.executable).parent}/transformers serve {{checkpoint}} --port {{port}} --device cpu"
SAMPLING = Sampling(max_new_tokens=5, top_k=3)
FAULTS = ["500", "", "429", "half", "", "reset", "mute", "", "cut", "empty", "503", "page", "slow"]


def serving(checkpoint: Path, log: Path) -> Server:
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return Server(COMMAND, checkpoint, log, environment=environment, start_seconds=300)


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_checkpoint, tmp_path_factory.mktemp("served") / "server.log") as running:
        yield running


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> Encoder:
    return Encoder(AutoProcessor.from_pretrained(tiny_checkpoint))


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultServer]:
    with FaultServer(upstream=server.port, mute_seconds=20) as running:
        yield running


@pytest.fixture
def client(proxy: FaultServer, server: Server) -> Iterator[Client]:
    options: dict[str, Any] = {"retries": 5, "pause_seconds": 0.02, "timeout_seconds": 10, "concurrency": 3}
    with Client(proxy.url, server.checkpoint, **options) as found:
        yield found


def test_what_the_server_understands(server: Server, client: Client) -> None:
    ((choice,),) = client.chat([chat_of(samples()[0])], count=2, tokens=True, max_new_tokens=3)
    assert client.dialect == "transformers" and choice.text and choice.finish == "length"
    assert choice.token_ids is None and choice.log_probs is None
    assert client.usage.completion_tokens == 3
    assert server.client().model == server.checkpoint


def test_images_are_really_seen(client: Client, tiny_model: Any, encoder: Encoder) -> None:
    """Greedy text is this process's for every image, and differs where only the image does."""
    asked = [sample(i, i, "what color?") for i in range(4)]
    greedy = Sampling(max_new_tokens=8, greedy=True)
    texts = client.generate([chat_of(one) for one in asked], max_new_tokens=8)
    mine = HfEngine(tiny_model, encoder).draw(asked, 1, greedy, 0)
    assert texts == [encoder.tokenizer.decode(some[0].ids, skip_special_tokens=True) for some in mine]
    assert len(set(texts)) > 1


def test_sampling_options_arrive(client: Client) -> None:
    chat = [chat_of(samples()[0])]
    greedy = client.generate(chat, max_new_tokens=6)
    one = client.generate(chat * 4, max_new_tokens=6, greedy=False, top_k=1)
    assert one == greedy * 4, "the best token alone"
    assert len(set(client.generate(chat * 6, max_new_tokens=6, greedy=False, top_k=50))) > 1
    assert len(set(client.generate(chat * 4, max_new_tokens=6, greedy=False, temperature=1e-4))) == 1
    long = {"max_new_tokens": 60, "greedy": False, "top_k": 1}
    assert client.generate(chat, **long) != client.generate(chat, **long, repetition_penalty=5.0)


def test_the_right_weights_are_proved(
    server: Server, client: Client, tiny_model: Any, processor: Any
) -> None:
    proof = server.probe(client, tiny_model, processor)
    assert (proof.by, proof.gap_nats) == ("greedy text", 0.0)


def test_the_wrong_weights_are_caught(
    server: Server, client: Client, teacher: Path, processor: Any, tmp_path: Path
) -> None:
    """A is served, B is expected: by B itself, and by what B answered when it was served before."""
    with pytest.raises(ServerError, match=r"the served weights are not those of .*compared by greedy text"):
        server.probe(client, AutoModelForImageTextToText.from_pretrained(teacher), processor)
    record = tmp_path / "probe.json"
    with serving(teacher, tmp_path / "teacher.log") as other:
        assert other.probe(other.client(), record=record).by == "first record"
        assert other.probe(other.client(), record=record).by == "record"
    with pytest.raises(ServerError, match=r"probe\.json"):
        server.probe(client, record=record)


def test_a_pool_through_every_fault(
    proxy: FaultServer, client: Client, encoder: Encoder, tmp_path: Path
) -> None:
    """Timeouts are 2 s here; 600 s in a recipe."""
    client.timeout_seconds = 2.0
    proxy.plan.extend(FAULTS)
    draw(OpenAIEngine(client, encoder), tmp_path, sampling=SAMPLING)
    pool = responses.load(tmp_path)
    assert total(pool) == {f"few:{i}": 4 for i in range(10)}
    assert not proxy.plan and client.usage.retries >= 8
    assert all(r.retokenised and r.mu is None for some in pool.values() for r in some)
    assert any(len(some) > 1 for some in pool.values())
    assert len(proxy.bodies) <= 40 + 3, (
        "an answer is asked for once; before the first one, three ask for four"
    )


def test_a_server_that_stays_broken(
    proxy: FaultServer, client: Client, encoder: Encoder, tmp_path: Path
) -> None:
    client.retries = 1
    engine = OpenAIEngine(client, encoder)
    proxy.plan.extend([""] * 9 + ["dead"])
    with pytest.raises(ServerError, match=r"in 2 tries .*no connection.*run the same command again"):
        draw(engine, tmp_path, sampling=SAMPLING)
    kept = kept_in(tmp_path)
    proxy.plan.clear()
    before = len(proxy.bodies)
    draw(engine, tmp_path, sampling=SAMPLING)
    assert kept > 0 and len(proxy.bodies) - before == 40 - kept
    assert total(responses.load(tmp_path)).total() == 40


def kept_in(directory: Path) -> int:
    """Responses that are on disk, sealed or not (each is one request here)."""
    partial = sum(len(some) for path in directory.glob("*.partial") for some in Partial(path).drawn.values())
    return partial + 4 * sum(
        len({line.split(",")[0] for line in path.read_text().splitlines() if line.startswith("[")})
        for path in directory.glob("0*.jsonl")
    )


def test_kill_9_in_the_middle_of_a_shard(
    proxy: FaultServer, client: Client, encoder: Encoder, tmp_path: Path
) -> None:
    """What had arrived is on disk, and only the rest is asked for."""
    pool = tmp_path / "pool"
    script = f"""
        from pathlib import Path
        from transformers import AutoProcessor
        from distill.inputs.encoding import Encoder
        from distill.answers.engines import OpenAIEngine
        from evals.client import Client
        from tests.distill.test_responses import draw
        from tests.distill.test_transformers_serve import SAMPLING
        encoder = Encoder(AutoProcessor.from_pretrained({client.model!r}))
        client = Client({proxy.url!r}, {client.model!r}, concurrency=2)
        draw(OpenAIEngine(client, encoder), Path({str(pool)!r}), sampling=SAMPLING)
    """
    proxy.plan.extend(["", "", ""] + ["slow"] * 60)
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT)
    until = time.monotonic() + 300
    while len(proxy.bodies) < 22 and child.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = kept_in(pool)
    assert 16 < kept < 40 and list(pool.glob("*.partial")), "in the middle of a shard"
    proxy.plan.clear()
    while proxy.running:
        time.sleep(0.05)
    before = len(proxy.bodies)
    draw(OpenAIEngine(client, encoder), pool, sampling=SAMPLING)
    assert len(proxy.bodies) - before == 40 - kept
    assert total(responses.load(pool)) == {f"few:{i}": 4 for i in range(len(dataset()))}
    assert not list(pool.glob("*.partial"))


def test_proof_through_a_proxy_that_fails(
    proxy: FaultServer, client: Client, tiny_model: Any, processor: Any
) -> None:
    proxy.plan.extend(["500", "half", "reset", "429"])
    assert probe.prove(client, tiny_model, processor).gap_nats == 0.0
    assert client.usage.retries >= 3
