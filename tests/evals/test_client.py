"""The client against a server that goes wrong: what is tried again, what is not, what a user is told."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evals import chats
from evals.client import Ask, Choice, Client, RequestRefused, ServerError
from runtime.errors import InputError
from tests.faults import FaultServer, completion


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def client_of(server: FaultServer, **options: Any) -> Client:
    settings = {"timeout_seconds": 0.5, "retries": 2, "pause_seconds": 0.02, "concurrency": 4, **options}
    return Client(server.url, "m", **settings)


def asks(*texts: str) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_answers_come_back_in_the_order_of_the_chats(server: FaultServer) -> None:
    server.plan.extend(["slow", "", "slow"])
    names = [f"q{i}" for i in range(12)]
    with client_of(server, timeout_seconds=5) as client:
        assert client.generate(asks(*names)) == [f"re: {name}" for name in names]
        assert (client.usage.requests, client.usage.retries) == (12, 0)
        assert (client.usage.prompt_tokens, client.usage.completion_tokens) == (36, 24)


def test_no_more_than_so_many_at_once_and_no_more_taken_than_there_is_room(server: FaultServer) -> None:
    taken: list[int] = []

    def chats_one_by_one() -> Iterator[tuple[list[dict[str, Any]], Ask]]:
        for i, chat in enumerate(asks(*map(str, range(20)))):
            taken.append(i)
            yield chat, Ask()

    server.plan.extend(["slow"] * 20)
    with client_of(server, concurrency=3, timeout_seconds=5) as client:
        for done, _ in enumerate(client.stream(chats_one_by_one()), 1):
            assert len(taken) <= done + 3
    assert server.most_running == 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("500", "HTTP 500"),
        ("503", "HTTP 503"),
        ("429", "HTTP 429"),
        ("half", "half an answer"),
        ("empty", "half an answer (no choices"),
        ("page", "half an answer"),
        ("cut", "no connection"),
        ("reset", "no connection"),
        ("mute", "no answer within 0.5 s"),
    ],
)
def test_a_fault_is_tried_again_and_a_broken_server_is_named(
    server: FaultServer, fault: str, told: str
) -> None:
    server.plan.extend([fault, fault])
    with client_of(server) as client:
        assert client.generate(asks("hello")) == ["re: hello"]
        assert client.usage.retries == 2
        assert sum(client.usage.faults.values()) == 2 and told in next(iter(client.usage.faults))
        server.plan.extend([fault] * 3)
        with pytest.raises(ServerError) as caught:
            client.generate(asks("hello"))
    for part in (server.url, "in 3 tries", told, "wanted a chat completion of m", "run the same command"):
        assert part in str(caught.value)
    assert caught.value.status == (int(fault) if fault.isdigit() else None)


def test_pauses_grow(server: FaultServer) -> None:
    server.plan.extend(["500"] * 3)
    with client_of(server, retries=3, pause_seconds=0.1) as client:
        client.generate(asks("x"))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert all(gap >= 0.05 * 2**i for i, gap in enumerate(gaps)) and len(gaps) == 3


def test_a_refused_request_is_not_tried_again(server: FaultServer) -> None:
    with client_of(server) as client:
        client.generate(asks("first"))
        server.plan.append("400")
        with pytest.raises(RequestRefused, match=r"refuses the request .HTTP 400.*no luck"):
            client.generate(asks("x"))
        assert server.seen == 2
        server.plan.append("detail")
        with pytest.raises(RequestRefused, match=r"HTTP 400: pinned to another"):
            client.generate(asks("x"))
        for status, hint in ((401, "OPENAI_API_KEY"), (404, "/v1/models")):
            server.plan.append(str(status))
            with pytest.raises(ServerError, match=hint):
                client.generate(asks("x"))


def test_refusals_can_be_taken_note_of(server: FaultServer) -> None:
    with client_of(server, concurrency=1) as client:
        client.generate(asks("first"))
        server.plan.extend(["", "400", ""])
        noted: list[int] = []
        requests = [(chat, Ask()) for chat in asks("a", "b", "c")]
        found = dict(client.stream(requests, refused=lambda place, error: noted.append(place)))
    assert noted == [1] and {place: c[0].text for place, c in found.items()} == {0: "re: a", 2: "re: c"}


def test_what_is_under_way_when_a_server_breaks_still_arrives(server: FaultServer) -> None:
    """One request fails for good while two slow ones are being answered: those are not thrown away."""
    server.plan.extend(["slow", "slow", "500"])
    got: list[int] = []
    with client_of(server, retries=0, concurrency=3, timeout_seconds=5) as client:
        stream = client.stream((chat, Ask()) for chat in asks(*map(str, range(9))))
        with pytest.raises(ServerError, match="HTTP 500"):
            got.extend(place for place, _ in stream)
        assert len(got) == 2 and server.seen == 3, "and no more are begun"
        assert client.generate(asks("again")) == ["re: again"], "the client can be used on"


def test_nobody_listens() -> None:
    with (
        Client("http://127.0.0.1:9/v1", "m", retries=1, pause_seconds=0.01) as client,
        pytest.raises(ServerError, match=r"127\.0\.0\.1:9.*no connection"),
    ):
        client.generate(asks("x"))


# --- what is sent -----------------------------------------------------


def test_images_travel_as_they_are(server: FaultServer, tmp_path: Path) -> None:
    image = Image.effect_noise((9, 7), 80).convert("RGB")
    image.save(tmp_path / "a.png")
    for given in (image, tmp_path / "a.png"):
        content = [{"type": "image", "image": given}, {"type": "text", "text": "what?"}]
        with client_of(server) as client:
            client.generate([[{"role": "user", "content": content}]])
        url = server.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"]
        head, _, data = url.partition(",")
        seen = Image.open(io.BytesIO(base64.b64decode(data)))
        assert head == "data:image/png;base64" and seen.tobytes() == image.tobytes()


def test_an_image_that_is_missing_is_never_left_out(server: FaultServer) -> None:
    picture = Image.new("RGB", (4, 4))
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]}]
    with client_of(server) as client, pytest.raises(InputError, match="without an image"):
        client.generate([two])
    assert server.seen == 0
    with pytest.raises(InputError, match="more image parts than images"):
        chats.with_images(two, [picture])
    with pytest.raises(InputError, match="3 images but places for 2"):
        chats.with_images(two, [picture] * 3)
    assert chats.with_images(two, [picture, picture])[0]["content"][1]["image"] is picture
    assert "image" not in two[0]["content"][0], "the sample's own messages stay as they are"


def strict(known: set[str], status: int) -> Any:
    """A server that refuses fields it does not know, as `transformers serve` and OpenAI do."""

    class Strict(FaultServer):
        def serve(self, handler: Any, body: bytes) -> None:
            unknown = set(json.loads(body)) - known - {"model", "messages"}
            if unknown:
                self.reply(handler, status, json.dumps({"detail": f"unexpected {sorted(unknown)}"}).encode())
            else:
                super().serve(handler, body)

    return Strict()


def test_the_dialect_is_found_once() -> None:
    how = {"count": 2, "top_k": 7, "repetition_penalty": 1.1, "seed": 5, "tokens": True, "max_new_tokens": 9}
    for known, status, name in (
        ({"generation_config", "max_tokens", "seed"}, 422, "transformers"),
        ({"n", "max_completion_tokens", "temperature", "top_p", "seed", "logprobs"}, 400, "openai"),
    ):
        with strict(known, status) as server, client_of(server, concurrency=1) as client:
            client.chat(asks("a", "b"), **how)
            assert client.dialect == name
            before = len(server.bodies)
            client.chat(asks("c"), **how)
            assert len(server.bodies) == before + 1
            body = server.bodies[-1]
            if name == "transformers":
                sent = json.loads(body["generation_config"])
                assert sent["do_sample"] and sent["top_k"] == 7 and sent["repetition_penalty"] == 1.1
            assert body["seed"] == 5
    with FaultServer() as server, client_of(server) as client:
        client.chat(asks("a"), **how)
        assert client.dialect == "vllm"
        body = server.bodies[-1]
        assert body["top_k"] == 7 and body["n"] == 2 and body["return_token_ids"] and body["logprobs"]
        client.chat(asks("a"), greedy=True)
        assert server.bodies[-1]["temperature"] == 0 and "return_token_ids" not in server.bodies[-1]


# --- what comes back --------------------------------------------------


def test_token_ids_in_the_three_forms_that_servers_have() -> None:
    def entries(**more: Any) -> list[dict[str, Any]]:
        return [{"token": "a", "logprob": -0.5, **more}, {"token": "</s>", "logprob": -0.25, **more}]

    vllm = completion(["a"], token_ids=[11, 2], logprobs={"content": entries()})
    older = completion(["a"], logprobs={"content": [{"token": "token_id:11", "logprob": -0.5}]})
    llama = completion(["a"], logprobs={"content": [{"id": 11, "token": "a", "logprob": -0.5}]})
    assert chats.choices(vllm) == [("a", "stop", (11, 2), (-0.5, -0.25))]
    assert chats.choices(older) == chats.choices(llama) == [("a", "stop", (11,), (-0.5,))]
    text_only = completion(["a"], logprobs={"content": entries()})
    assert chats.choices(text_only) == [("a", "stop", None, None)], "token texts are no ids"
    uneven = completion(["a"], token_ids=[11, 12, 2], logprobs={"content": entries()})
    assert chats.choices(uneven) == [("a", "stop", (11, 12, 2), None)]


@pytest.mark.parametrize(
    "payload",
    [{}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": 3}}]}, {"error": "x"}],
)
def test_what_is_no_completion(payload: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        chats.choices(payload)


def test_several_answers_a_chat(server: FaultServer) -> None:
    with client_of(server) as client:
        (found,) = client.chat(asks("x"), count=3)
    assert found == [Choice("re: x", "stop")] * 3


def test_a_client_can_be_used_again_after_closing(server: FaultServer) -> None:
    client = client_of(server)
    for _ in range(2):
        assert client.generate(asks("x")) == ["re: x"]
        client.close()
    assert [entry["id"] for entry in client.models()] == ["m"]
    client.close()


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with client_of(server) as client:
        assert client.generate(asks("x")) == ["re: x"]


def test_importing_it_loads_neither_torch_nor_openai() -> None:
    script = (
        "import sys, evals.client; print({'torch', 'transformers', 'openai', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).parent.parent.parent
    assert subprocess.check_output([sys.executable, "-c", script], cwd=root, text=True).strip() == "set()"
