"""Data of every format, by position; what cannot be used is named and counted."""

from __future__ import annotations

import base64
import io
import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from distill.inputs import data
from distill.inputs.data import Dataset, Sample, SampleError, Skips
from distill.recipe import Source
from evals.tasks import readers
from runtime.errors import InputError, TrainingError

RED, BLUE = (200, 10, 10), (10, 10, 200)


def png(colour: tuple[int, int, int] = RED, *, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(png(RED))
    (tmp_path / "images" / "blue.png").write_bytes(png(BLUE))
    return tmp_path


def opened(folder: Path, name: str, format: str, *, seed: int = 0, **settings: Any) -> Dataset:
    settings.setdefault("images", str(folder / "images"))
    return data.open_data([Source(format=format, path=str(folder / name), **settings)], seed=seed)  # type: ignore[arg-type]


def lines(folder: Path, records: Sequence[Any], name: str = "data.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return name


def turns(question: Any, answer: str | None = "yes") -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": question}]
    return asked + ([{"role": "assistant", "content": answer}] if answer is not None else [])


def colours(sample: Sample) -> list[tuple[int, int, int]]:
    return [image.getpixel((0, 0)) for image in sample.open_images()]  # type: ignore[misc]


# --- conversations ----------------------------------------------------


def test_the_last_assistant_turn_is_the_label(folder: Path) -> None:
    name = lines(folder, [{"messages": turns("is it red?"), "images": ["red.png"]}])
    (sample,) = opened(folder, name, "conversations")
    assert sample.messages == (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red?"}]},
    )
    assert (sample.answer, sample.question, sample.id) == ("yes", "is it red?", "data:0")
    assert (sample.scorer, sample.choices) == ("exact", ())
    assert colours(sample) == [RED]


IMAGES: dict[str, Callable[[bytes], Any]] = {
    "path": lambda _: "red.png",
    "base64": lambda raw: base64.b64encode(raw).decode(),
    "data URL": lambda raw: "data:image/png;base64," + base64.b64encode(raw).decode(),
    "mapping with a path": lambda _: {"path": "red.png", "bytes": None},
    "mapping with base64": lambda raw: {"base64": base64.b64encode(raw).decode()},
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_picture_may_be_written_in_many_ways(folder: Path, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    noise.putpixel((0, 0), RED)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    name = lines(folder, [{"messages": turns("?"), "images": [IMAGES[kind](buffer.getvalue())]}])
    assert colours(opened(folder, name, "conversations")[0]) == [RED]


def test_pictures_stand_where_the_messages_place_them(folder: Path) -> None:
    text, image = {"type": "text", "text": "left or right?"}, {"type": "image"}
    inline = [
        {"type": "image", "image": "blue.png"},
        text,
        {"type": "image_url", "image_url": {"url": "red.png"}},
    ]
    name = lines(
        folder,
        [
            {"messages": turns([image, text, image]), "images": ["red.png", "blue.png"]},
            {"messages": turns("<image>left<image> or right?"), "images": ["red.png", "blue.png"]},
            {"messages": turns(inline)},
            {"prompt": [{"role": "system", "content": "be brief"}, *turns("?", None)], "image": "red.png",
             "completion": "no"},
        ],
    )  # fmt: skip
    found = list(opened(folder, name, "conversations"))
    kinds = [[part["type"] for part in sample.messages[-1]["content"]] for sample in found]
    assert kinds == [
        ["image", "text", "image"], ["image", "text", "image", "text"], ["image", "text", "image"],
        ["image", "text"],
    ]  # fmt: skip
    assert [colours(sample) for sample in found] == [[RED, BLUE], [RED, BLUE], [BLUE, RED], [RED]]
    assert found[3].messages[0]["role"] == "system" and found[3].answer == "no"


def test_earlier_turns_stay_and_no_label_is_none(folder: Path) -> None:
    history = [*turns("is it red?"), *turns("is it blue?", None)]
    name = lines(folder, [{"messages": history, "images": ["red.png"]}])
    (sample,) = opened(folder, name, "conversations")
    assert [message["role"] for message in sample.messages] == ["user", "assistant", "user"]
    assert sample.answer is None and sample.question == "is it blue?"


def test_an_answer_column_and_choices(folder: Path) -> None:
    record = {"messages": turns("which?", None), "images": [], "answer": ["a", "b"], "choices": ["x", "y"]}
    (sample,) = opened(folder, lines(folder, [record]), "conversations", scorer="vqa")
    assert (sample.answer, sample.choices, sample.scorer) == ('["a", "b"]', ("x", "y"), "vqa")


def test_bytes_in_parquet_and_in_a_saved_data_set(folder: Path) -> None:
    features = datasets.Features(
        {
            "messages": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.Value("string")}
            ),
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = [{"messages": turns(f"q{i}"), "images": [{"bytes": png(c)}]} for i, c in enumerate((RED, BLUE))]
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(str(folder / "data.parquet"))
    table.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(folder / "splits"))
    for name in ("data.parquet", "saved"):
        found = opened(folder, name, "conversations")
        assert [sample.question for sample in found] == ["q0", "q1"]
        assert [colours(sample) for sample in found] == [[RED], [BLUE]]
    assert [s.question for s in opened(folder, "splits", "conversations", split="test")] == ["q1"]
    with pytest.raises(InputError, match="has the splits train, test; got split: None"):
        opened(folder, "splits", "conversations")


# --- LLaVA ------------------------------------------------------------


def llava(*said: str, **more: Any) -> dict[str, Any]:
    roles = ("human", "gpt") * len(said)
    found = [{"from": role, "value": value} for role, value in zip(roles, said, strict=False)]
    return {"id": "x", "conversations": found, **more}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_every_gpt_turn_is_a_question(folder: Path, name: str) -> None:
    records = [
        llava("<image>\nwhat is it?", "a square", "what color?", "red", image="red.png"),
        llava("hi", "hello ünïcode"),
        llava("is it\n<image> blue?", "yes", image=["blue.png"]),
    ]
    if name.endswith("jsonl"):
        lines(folder, records, name)
    else:
        (folder / name).write_text(json.dumps(records, ensure_ascii=False, indent=1))
    found = opened(folder, name, "llava")
    assert [sample.answer for sample in found] == ["a square", "red", "hello ünïcode", "yes"]
    assert [len(sample.messages) for sample in found] == [1, 3, 1, 1]
    assert found[0].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    assert [part["type"] for part in found[3].messages[0]["content"]] == ["text", "image", "text"]
    assert [colours(sample) for sample in found] == [[RED], [RED], [], [BLUE]]
    assert found[1].messages[1]["content"] == [{"type": "text", "text": "a square"}]


def test_pictures_of_later_turns_are_not_asked_about(folder: Path) -> None:
    record = llava("<image>what?", "a", "and <image>?", "b", image=["red.png", "blue.png"])
    found = opened(folder, lines(folder, [record]), "llava")
    assert [colours(sample) for sample in found] == [[RED], [RED, BLUE]]


# --- VLMEvalKit -------------------------------------------------------


def tsv(folder: Path, columns: Sequence[str], *rows: Sequence[str], name: str = "data.tsv") -> str:
    import csv

    with (folder / name).open("w", newline="") as stream:
        csv.writer(stream, delimiter="\t").writerows([columns, *rows])
    return name


def test_tsv_rows_options_and_shared_pictures(folder: Path) -> None:
    image = base64.b64encode(png(RED)).decode()
    name = tsv(
        folder,
        ["index", "image", "question", "hint", "A", "B", "C", "answer", "category"],
        ["7", image, 'Is "it"\nred?', "", "yes", "no", "", "A", "colour"],
        ["8", "7", "What\tcolour?", "look", "red", "blue", "green", "B", "colour"],
        ["9", f"['{image}', '{image}']", "Same?", "", "", "", "", "yes", "x"],
    )
    found = list(opened(folder, name, "tsv"))
    assert [sample.answer for sample in found] == ["A", "B", "yes"]
    assert [sample.scorer for sample in found] == ["choice", "choice", "exact"]
    assert [sample.choices for sample in found] == [("yes", "no"), ("red", "blue", "green"), ()]
    assert found[0].question.startswith('Question: Is "it"\nred?\nOptions:\nA. yes\nB. no\nPlease select')
    assert found[1].question.startswith("Hint: look\nQuestion: What\tcolour?")
    assert [len(colours(sample)) for sample in found] == [1, 1, 2]
    assert found[2].question == "Same?"


def test_tsv_with_paths_and_numbered_pictures(folder: Path) -> None:
    name = tsv(
        folder,
        ["index", "question", "image_path", "answer"],
        ["0", "Is <image 2> bluer than <image 1>?", "['red.png', 'blue.png']", "yes"],
        ["1", "colour?", "blue.png", "nan"],
    )
    first, second = opened(folder, name, "tsv")
    assert [part["type"] for part in first.messages[0]["content"]] == [
        "text",
        "image",
        "text",
        "image",
        "text",
    ]
    assert colours(first) == [BLUE, RED] and colours(second) == [BLUE]
    assert second.answer is None


def test_a_tsv_without_the_columns_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="wanted the columns question and image"):
        opened(folder, tsv(folder, ["index", "text"], ["0", "x"]), "tsv")


# --- built-in tasks ---------------------------------------------------


def test_easy_vqa_and_an_unknown_split() -> None:
    found = data.open_data([Source(format="easy-vqa", split="test", start=3, limit=4)])
    assert len(found) == 4 and found[0].id == "easy-vqa-test:3"
    assert found[0].open_images()[0].size == (64, 64) and found[0].answer
    with pytest.raises(InputError, match="has no split 'dev'"):
        data.open_data([Source(format="easy-vqa", split="dev")])


# --- several sources, labels ------------------------------------------


def test_sources_follow_each_other_and_names_differ(folder: Path) -> None:
    lines(folder, [{"messages": turns(f"a{i}")} for i in range(3)], "a.jsonl")
    (folder / "other").mkdir()
    lines(folder / "other", [{"messages": turns(f"b{i}")} for i in range(2)], "a.jsonl")
    sources = [
        Source(format="conversations", path=str(folder / part)) for part in ("a.jsonl", "other/a.jsonl")
    ]
    found = data.open_data(sources)
    assert [sample.question for sample in found] == ["a0", "a1", "a2", "b0", "b1"]
    assert len({sample.id for sample in found}) == 5
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            found[outside]


def test_labels_are_hidden_but_for_a_growing_subset(folder: Path) -> None:
    name = lines(folder, [{"messages": turns(f"q{i}", f"a{i}")} for i in range(30)])

    def kept(labels: Any, seed: int = 0) -> set[int]:
        found = opened(folder, name, "conversations", labels=labels, seed=seed)
        assert all(sample.answer in (None, f"a{i}") for i, sample in enumerate(found))
        return {i for i, sample in enumerate(found) if sample.answer is not None}

    assert kept("all") == set(range(30)) and kept("none") == kept(0) == set()
    assert len(kept(8)) == 8 and kept(8) < kept(12) and kept(8) == kept(8)
    assert kept(8) != kept(8, seed=1)
    assert len(kept(99)) == 30


def test_start_and_limit(folder: Path) -> None:
    name = lines(folder, [{"messages": turns(f"q{i}")} for i in range(6)])
    assert [s.question for s in opened(folder, name, "conversations", start=4, limit=9)] == ["q4", "q5"]
    with pytest.raises(InputError, match="no questions from record 6 on"):
        opened(folder, name, "conversations", start=6)


# --- what goes wrong --------------------------------------------------

BROKEN: dict[str, tuple[Any, str]] = {
    "missing picture": ({"messages": turns("?"), "images": ["gone.png"]}, "images/gone.png does not exist"),
    "address": ({"messages": turns("?"), "images": ["https://x/y.png"]}, "download it"),
    "too few": ({"messages": turns([{"type": "image"}])}, "place 1 pictures, the record has 0"),
    "no messages": ({"text": "?"}, "no messages; the keys are text"),
    "assistant alone": ({"messages": [{"role": "assistant", "content": "x"}]}, "wanted a user's turn"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "role is 'tool'"),
    "part": ({"messages": turns([{"type": "video"}])}, "part of type 'video'"),
    "shape": ({"messages": 3}, "malformed record"),
    "no base64": ({"messages": turns("?"), "images": ["data:image/png;base64,?"]}, "no base64"),
    "list": ([1], "wanted a JSON object"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_faulty_record_is_named_with_source_and_index(folder: Path, kind: str) -> None:
    record, said = BROKEN[kind]
    found = opened(folder, lines(folder, [{"messages": turns("fine")}, record]), "conversations")
    assert found[0].question == "fine"
    with pytest.raises(SampleError, match=said) as caught:
        found[1]
    assert (caught.value.source, caught.value.index) == ("data", 1)
    assert str(caught.value).startswith("data[1]: ")


def test_a_damaged_picture_is_named(folder: Path) -> None:
    (folder / "images" / "bad.png").write_bytes(png()[:40])
    found = opened(folder, lines(folder, [{"messages": turns("?"), "images": ["bad.png"]}]), "conversations")
    with pytest.raises(SampleError, match=r"data\[0\]: .*bad\.png"):
        found[0].open_images()


def test_skips_are_counted_once_and_limited(folder: Path) -> None:
    bad = {"messages": turns("?"), "images": ["gone.png"]}
    found = opened(folder, lines(folder, [bad, {"messages": turns("x")}, bad, bad]), "conversations")
    skips = Skips(2)
    assert [skips.get(found, i) is None for i in (0, 1, 0, 2)] == [True, False, True, True]
    assert list(skips.errors) == [("data", 0), ("data", 2)]
    with pytest.raises(
        TrainingError, match=r"3 samples cannot be used, data.skip_limit is 2: data\[0\].*data\[2\]"
    ):
        skips.get(found, 3)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "there is no such data file"),
        ("data.csv", "a,b", "wanted .jsonl"),
        ("data.json", '[{"a": 1}, {"b": ', "no JSON from byte 11 on"),
        ("data.json", '[{"a": 1}', "does not end"),
        ("empty.jsonl", "\n\n", "no questions"),
        ("data.tsv", "", "is empty"),
        ("data.parquet", "no parquet", "cannot be read as a data set"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_at_once(
    folder: Path, name: str, content: str | None, said: str
) -> None:
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=said):
        opened(folder, name, "tsv" if name.endswith("tsv") else "conversations")


def test_a_line_that_is_no_json_is_one_faulty_sample(folder: Path) -> None:
    (folder / "data.jsonl").write_text('{"messages": []\n\n  \r\n' + json.dumps({"messages": turns("x")}))
    found = opened(folder, "data.jsonl", "conversations")
    assert len(found) == 2 and found[1].question == "x"
    with pytest.raises(SampleError, match=r"data\[0\]: no JSON"):
        found[0]


# --- size -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "tsv"])
def test_a_file_is_not_held_in_memory(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 KiB against a file of 8 MiB: records straddle blocks, and little is allocated."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 16)
    records = [{"question": f"q{i} ü", "image": "x" * 8000} for i in range(1000)]
    path = folder / f"data.{kind}"
    if kind == "tsv":
        rows = [[record["question"], f'a "quoted"\nline {record["image"]}'] for record in records]
        tsv(folder, ["question", "image"], *rows)
    elif kind == "json":
        path.write_text(json.dumps(records, ensure_ascii=False))
    else:
        lines(folder, records)
    tracemalloc.start()
    store = readers.open_store(path)
    seen = [store[i]["question"] for i in (999, 0, 500)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(store) == 1000 and seen == ["q999 ü", "q0 ü", "q500 ü"]
    assert peak < path.stat().st_size / 8
