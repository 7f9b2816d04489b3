"""Benchmark files become questions: pictures, options, answers, units; what is wrong with a file is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as every
from hypothesis import strategies as st

from evals.tasks import scoring
from evals.tasks.catalogue import LMMS, VLMEVALKIT, open_task
from evals.tasks.prompts import PROMPTS
from evals.tasks.question import Question, Task, given, opened, picture_sha256
from runtime.errors import InputError
from tests.evals.task_files import base64_png, png, write_jsonl, write_tsv

MCQ = {"question": "which?", "answer": "B", "A": "cat", "B": "dog"}


def only(path: Path, **options: Any) -> Question:
    (found,) = open_task(str(path), **options).questions
    return found


# --- VLMEvalKit's TSV -------------------------------------------------


def test_a_row_has_its_picture_options_and_answer(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "AI2D_TEST.tsv", [{"index": 7, **MCQ, "category": "food", "hint": "look"}])
    task = open_task(str(path))
    found = task.questions[0]
    assert (task.scorer, task.prompt, task.format) == ("vlmevalkit.mcq", "vlmevalkit.mcq", "vlmevalkit-tsv")
    assert (found.id, found.unit, found.category) == ("7", "7", "food")
    assert found.options == ("cat", "dog")
    assert found.references == ("B",)
    assert found.prompt.startswith("Hint: look\nQuestion: which?\nOptions:\nA. cat\nB. dog\n")
    assert given(found.images[0]) == png(7)
    assert opened(found.images[0]).getpixel((3, 3)) == (7, 40, 200)


def test_rows_share_a_picture_by_index_and_then_a_group(tmp_path: Path) -> None:
    rows = [{"index": 1, **MCQ}, {"index": 2, **MCQ, "image": "1"}, {"index": 3, **MCQ}]
    one, two, three = open_task(str(write_tsv(tmp_path / "MMStar.tsv", rows))).questions
    assert given(two.images[0]) == png(1)
    assert one.group == two.group != three.group


def test_several_pictures_stand_in_a_list(tmp_path: Path) -> None:
    pictures = str([base64_png(5), base64_png(6)])
    found = only(write_tsv(tmp_path / "BLINK.tsv", [{"index": 1, **MCQ, "image": pictures}]))
    assert [given(one) for one in found.images] == [png(5), png(6)]


def test_pictures_may_be_files(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(9))
    path = write_tsv(tmp_path / "my.tsv", [{"index": 1, **MCQ, "image_path": "a.png"}], pictures=False)
    found = only(path, images=tmp_path / "pictures")
    assert found.images == (tmp_path / "pictures" / "a.png",)


def test_an_option_none_is_no_option_as_in_pandas(tmp_path: Path) -> None:
    """The letters of the others stay."""
    row = {"index": 1, "question": "q", "answer": "C", "A": "cat", "B": "None", "C": "dog"}
    found = only(write_tsv(tmp_path / "SEEDBench_IMG.tsv", [row]))
    assert scoring.options_of(found) == {"A": "cat", "C": "dog"}
    assert "A. cat\nC. dog" in found.prompt
    assert scoring.score("vlmevalkit.mcq", found, "it is a dog").score == 1


def test_orders_of_one_question_are_one_unit_and_are_never_cut(tmp_path: Path) -> None:
    rows = [{"index": group + turn * 10**6, **MCQ} for group in (1, 2, 3) for turn in range(2)]
    task = open_task(str(write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)), limit=2)
    assert task.circular
    assert [one.unit for one in task.questions] == ["1", "1", "2", "2"]
    assert task.available == 6


@pytest.mark.parametrize(
    ("name", "row", "scorer", "references"),
    [
        ("ChartQA_TEST", {"answer": "12.5"}, "vlmevalkit.relaxed", ("12.5",)),
        ("TextVQA_VAL", {"answer": "['a', 'b']"}, "vlmevalkit.vqa_score", ("a", "b")),
        ("DocVQA_VAL", {"answer": '["x"]'}, "vlmevalkit.anls", ("x",)),
        ("GQA_TestDev_Balanced", {"answer": "yes"}, "vlmevalkit.accuracy", ("yes",)),
        ("RealWorldQA", {"answer": "A", "A": "up", "B": "down"}, "vlmevalkit.mcq", ("A",)),
        ("other", {"answer": "yes"}, "vlmevalkit.vqa_match", ("yes",)),
        ("other", {"answer": "A", "A": "x", "B": "y"}, "vlmevalkit.mcq", ("A",)),
        ("MMMU_DEV_VAL", {"answer": "free text"}, "vlmevalkit.mcq", ("A",)),
    ],
)
def test_the_name_of_a_file_tells_its_rules(
    name: str, row: dict[str, str], scorer: str, references: tuple[str, ...], tmp_path: Path
) -> None:
    path = write_tsv(tmp_path / f"{name}.tsv", [{"index": 1, "question": "q", **row}])
    assert open_task(str(path)).scorer == scorer
    assert only(path).references == references


def test_mathvista_has_its_options_in_a_list(tmp_path: Path) -> None:
    row = {"index": 1, "question": "q", "question_type": "multi_choice", "answer_type": "text"}
    row |= {"answer": "dog", "answer_option": "B", "choices": "['cat', 'dog']"}
    path = write_tsv(tmp_path / "MathVista_MINI.tsv", [row])
    assert scoring.score("vlmevalkit.mathvista", only(path), "(B) dog").score == 1
    assert scoring.score("vlmevalkit.mathvista", only(path), "(A)").score == 0


def test_a_split_is_chosen_by_its_column(tmp_path: Path) -> None:
    rows = [{"index": 1, **MCQ, "split": "dev"}, {"index": 2, **MCQ, "split": "validation"}]
    path = write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", rows)
    assert only(path, split="validation").id == "2"
    with pytest.raises(InputError, match="no questions of split test"):
        open_task(str(path), split="test")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"index": 1, "question": "q", "answer": ""}], "row 1: has no answer"),
        ([{"index": 1, **MCQ, "image": "-" * 80}], "row 1: a picture is no base64"),
        ([{"index": 1, **MCQ}, {"index": 2, **MCQ, "image": "9"}], "row 2: image '9' is neither"),
        ([{"index": 1, "answer": "x"}], "wanted the columns index, question"),
    ],
)
def test_what_is_wrong_with_a_tsv(rows: list[dict[str, Any]], says: str, tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "AI2D.tsv", rows)
    with pytest.raises(InputError, match=r"AI2D\.tsv") as caught:
        open_task(str(path))
    assert says in str(caught.value)


def test_circular_evaluation_needs_numbers(tmp_path: Path) -> None:
    path = tmp_path / "MMBench.tsv"
    path.write_text(f"index\timage\tquestion\tanswer\tA\tB\nq-1\t{base64_png(1)}\tq\tA\tx\ty\n")
    with pytest.raises(InputError, match="row 1: index 'q-1': circular evaluation needs whole numbers"):
        open_task(str(path))


# --- lmms-eval's documents --------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> str:
    (tmp_path / "p.png").write_bytes(png(3))
    return "p.png"


@pytest.mark.parametrize(
    ("name", "record", "scorer", "references", "options"),
    [
        ("mmmu_val", {"answer": "B", "options": "['x', 'y']"}, "lmms.mmmu", ("B",), ("x", "y")),
        ("ai2d", {"answer": "1", "options": ["x", "y"]}, "lmms.ai2d", ("B",), ("x", "y")),
        ("vqav2_val", {"answers": [{"answer": "a"}, {"answer": "b"}]}, "lmms.vqav2", ("a", "b"), ()),
        ("docvqa_val", {"answers": ["a", "b"]}, "lmms.anls", ("a", "b"), ()),
        (
            "seedbench",
            {"answer": "A", "choice_a": "x", "choice_b": "y"},
            "lmms.seedbench",
            ("A",),
            ("x", "y"),
        ),
        ("my", {"answer": "yes"}, "exact", ("yes",), ()),
        ("my", {"answer": 1, "choices": ["x", "y"]}, "choice", ("B",), ("x", "y")),
        ("my", {"answer": "y", "choices": ["x", "y"]}, "choice", ("y",), ("x", "y")),
    ],
)
def test_a_document_is_read_as_its_data_set_has_it(
    name: str, record: dict[str, Any], scorer: str, references: tuple[str, ...], options: tuple[str, ...],
    picture: str, tmp_path: Path,
) -> None:  # fmt: skip
    path = write_jsonl(tmp_path / f"{name}.jsonl", [{"question": "q", "image": picture, **record}])
    found = only(path)
    assert open_task(str(path)).scorer == scorer
    assert (found.references, found.options) == (references, options)
    assert found.images == (tmp_path / "p.png",)


def test_documents_have_several_pictures_and_may_be_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    record = {"id": "validation_Art_1", "question": "q", "options": "['x', 'y']", "answer": "A"}
    record |= {"image_1": {"bytes": png(1)}, "image_2": {"bytes": png(2)}, "image_3": None}
    path = tmp_path / "mmmu_val.parquet"
    datasets.Dataset.from_list([record]).to_parquet(str(path))
    found = only(path)
    assert (found.id, found.category) == ("validation_Art_1", "Art")
    assert [given(one) for one in found.images] == [png(1), png(2)]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "q"}, "no answer"),
        ({"answer": "x"}, "no question; the keys are answer"),
        ({"question": "q", "answer": "x", "image": "absent.png"}, "does not exist"),
        ({"question": "q", "answer": 5, "choices": ["x", "y"]}, "there are 2 options"),
    ],
)
def test_what_is_wrong_with_a_document(record: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "my.jsonl", [record])
    with pytest.raises(InputError, match=r"my\.jsonl, record 1") as caught:
        open_task(str(path))
    assert says in str(caught.value)


def test_an_id_is_there_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "my.jsonl", [{"id": "x", "question": "q", "answer": "a"}] * 2)
    with pytest.raises(InputError, match=r"my\.jsonl: the id 'x' is there 2 times"):
        open_task(str(path))


# --- tasks ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("easy-vqq", {}, "did you mean easy-vqa"),
        ("nothing.tsv", {}, "no such task and no such file"),
        ("easy-vqa", {"kind": "MMBench"}, "is built in"),
        ("easy-vqa", {"scorer": "exakt"}, "wanted exact"),
        ("FILE", {"kind": "AI3D"}, "wanted one of MMBench"),
    ],
)
def test_what_cannot_be_asked(name: str, options: dict[str, str], says: str, tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "my.tsv", [{"index": 1, **MCQ}])
    with pytest.raises(InputError, match=says):
        open_task(str(path) if name == "FILE" else name, **options)  # type: ignore[arg-type]


def test_the_kind_of_a_file_can_be_given(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "my.tsv", [{"index": 1, "question": "q", "answer": "3"}])
    assert open_task(str(path), kind="chartqa").scorer == "vlmevalkit.relaxed"


def test_built_in_tasks_are_asked_as_they_are() -> None:
    pytest.importorskip("easy_vqa")
    task = open_task("easy-vqa", limit=5)
    assert (task.scorer, task.split, task.available, len(task.questions)) == ("exact", "test", 9673, 5)
    first = task.questions[0]
    assert first.prompt == first.question
    with pytest.raises(InputError, match="no such split"):
        open_task("easy-vqa", split="valid")


def test_what_is_asked_has_a_hash(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "AI2D.tsv", [{"index": 1, **MCQ}])
    before = open_task(str(path)).sha256
    assert open_task(str(path)).sha256 == before
    write_tsv(path, [{"index": 1, **MCQ, "image": base64_png(2)}])
    assert open_task(str(path)).sha256 != before
    assert picture_sha256(png(1)) == picture_sha256(lambda: png(1)) != picture_sha256(opened(png(1)))


def test_tables_name_rules_and_wordings_that_exist() -> None:
    for kind in (*VLMEVALKIT, *LMMS):
        assert kind.scorer in scoring.RULES
        assert kind.prompt in PROMPTS


LETTERED = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "(", "the answer is "]),
    st.sampled_from("ABCD"),
    st.text(max_size=9),
)
RESPONSES = st.one_of(st.text(max_size=40), LETTERED)


@every(response=RESPONSES, name=st.sampled_from(sorted(scoring.RULES)), answer=st.sampled_from("ABCD"))
def test_every_rule_scores_every_text(response: str, name: str, answer: str) -> None:
    """No response breaks a rule, and the answer itself is right by every rule that has one."""
    options = ("one cat", "two dogs", "three", "four")
    row = {"question_type": "multi_choice", "answer_option": answer, "answer_type": "text"}
    asked = Question("1", "1", "q", "q", (), (answer,), options, row=row)
    if name == "numeric":
        asked = dataclasses.replace(asked, references=("3",))
    found = scoring.score(name, asked, response)
    assert 0 <= found.score <= 1
    if name not in ("numeric", "vlmevalkit.vqa_score", "lmms.vqav2", "lmms.textvqa", "lmms.mathvista"):
        assert scoring.score(name, asked, answer).score == 1


def test_a_limit_takes_whole_units() -> None:
    questions = tuple(Question(str(i), "g", "q", "q", (), ("a",), unit=str(i // 2)) for i in range(6))
    task = Task("t", "digits", "test", "s", questions, "exact")
    assert len(task.limited(2).questions) == 4
    assert task.limited(None) is task
    assert task.limited(2).available == 6
