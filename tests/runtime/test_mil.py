"""Packages read and programs evaluated: written by hand, so that all of this runs without coremltools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import mil, mil_evaluate
from runtime.errors import BundleError
from runtime.mil import Program
from runtime.mil_program import Blob, TensorType, parse
from runtime.mil_weights import STORED, Store, WeightFiles
from runtime.mil_wire import WireError, fields
from tests.runtime import mil_writer as write

ROWS: write.Type = ("float16", (2, 4))
RANDOM = np.random.default_rng(0)


def linear_package(path: Path) -> Path:
    """y = relu(x W^T + b), float16 weights in the weight file."""
    weights = write.Weights()
    body = write.function(
        {"x": ROWS},
        [
            write.const("weight", weights.add(weight(), "float16"), ("float16", (3, 4))),
            write.const("bias", weights.add(bias(), "float16"), ("float16", (3,))),
            write.operation(
                "linear", {"x": "x", "weight": "weight", "bias": "bias"}, {"z": ("float16", (2, 3))}
            ),
            write.operation("relu", {"x": "z"}, {"y": ("float16", (2, 3))}),
        ],
        ["y"],
    )
    return write.package(path, write.model({"main": body}), weights)


def weight() -> Any:
    return np.arange(12, dtype=np.float16).reshape(3, 4) / 8 - 0.5


def bias() -> Any:
    return np.array([0.5, -1, 0.25], np.float16)


def single(path: Path, operation: bytes, kind: write.Type, given: write.Type = ROWS, *more: bytes) -> Program:
    """A program of one operation from x to y, and the constants that it needs."""
    body = write.function({"x": given}, [*more, operation], ["y"])
    return Program.open(write.package(path / "one.mlpackage", write.model({"main": body})))


def test_a_package_is_read_and_evaluated(tmp_path: Path) -> None:
    program = Program.open(linear_package(tmp_path / "linear.mlpackage"))
    x = RANDOM.standard_normal((2, 4)).astype(np.float16)
    assert program.functions == ("main",) and program.default == "main" and program.specification == 9
    assert program.inputs() == {"x": TensorType("float16", (2, 4))}
    assert program.outputs() == {"y": TensorType("float16", (2, 3))}
    wanted = np.maximum(x.astype(np.float32) @ weight().astype(np.float32).T + bias(), 0)
    found = program.run({"x": x})["y"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted.astype(np.float16).astype(np.float32))
    exact = Program.open(tmp_path / "linear.mlpackage", rounded=False)
    np.testing.assert_allclose(exact.run({"x": x})["y"], wanted, rtol=1e-6)


def test_rounding_is_what_float16_does(tmp_path: Path) -> None:
    add = write.operation("add", {"x": "x", "y": "one"}, {"y": ROWS})
    one = write.number("one", np.float16(1), "float16")
    x = np.array([[2048, 65504, 1, 0], [-2048, 0.1, 3, 4]], np.float16)
    rounded = single(tmp_path, add, ROWS, ROWS, one)
    np.testing.assert_array_equal(rounded.run({"x": x})["y"][0], [2048, 65504, 2, 1])
    exact = Program.open(tmp_path / "one.mlpackage", rounded=False)
    np.testing.assert_array_equal(exact.run({"x": x.astype(np.float32)})["y"][0], [2049, 65505, 2, 1])


def test_what_float16_cannot_hold_is_infinite(tmp_path: Path) -> None:
    program = single(tmp_path, write.operation("square", {"x": "x"}, {"y": ROWS}), ROWS)
    found = program.run({"x": np.full((2, 4), 300, np.float16)})["y"]
    assert np.isinf(found).all()


def test_functions_share_weights_and_states(tmp_path: Path) -> None:
    """The state counts; `two` adds twice what `one` adds, by the same weight, expanded once."""
    weights = write.Weights()
    value = weights.add(np.array([1, 2, 3], np.float16), "float16")
    kind: write.Type = ("float16", (3,))

    def body(times: int) -> bytes:
        steps = [
            write.const("w", value, kind),
            write.operation("read_state", {"input": "count"}, {"old": kind}),
        ]
        for number in range(times):
            names = ("old" if number == 0 else f"s{number - 1}", f"s{number}")
            steps.append(write.operation("add", {"x": names[0], "y": "w"}, {names[1]: kind}))
        steps.append(write.operation("write_state", {"input": "count", "data": f"s{times - 1}"}, {}))
        steps.append(write.operation("identity", {"x": "old"}, {"y": kind}))
        return write.function({}, steps, ["y"], states={"count": kind})

    store = Store()
    path = write.package(
        tmp_path / "two.mlpackage", write.model({"one": body(1), "two": body(2)}, "two"), weights
    )
    program = Program.open(path, store=store)
    assert program.default == "two" and program.states() == {"count": TensorType(*kind, is_state=True)}
    state = program.new_state()
    np.testing.assert_array_equal(program.run({}, function="one", state=state)["y"], [0, 0, 0])
    np.testing.assert_array_equal(program.run({}, state=state)["y"], [1, 2, 3])
    np.testing.assert_array_equal(state["count"], [3, 6, 9])
    assert store.kept_bytes == 3 * 4
    with pytest.raises(BundleError, match=r"function two: has the state count; give one from new_state\(\)"):
        program.run({})


def cache_program(path: Path, *, late_reader: bool) -> Program:
    """cache[start : start + 1] = x; with `late_reader` the value from before is used afterwards."""
    kind: write.Type = ("float16", (4, 2))
    row: write.Type = ("float16", (1, 2))
    ends = [write.number("one", [1]), write.number("zero", [0]), write.number("two", [2])]
    update = {"x": "first", "update": "x", "begin": "begin", "end": "end"}
    steps = [
        *ends,
        write.number("axis", 0),
        write.operation("concat", {"values": ["start", "zero"], "axis": "axis"}, {"begin": ("int32", (2,))}),
        write.operation("add", {"x": "start", "y": "one"}, {"stop": ("int32", (1,))}),
        write.operation("concat", {"values": ["stop", "two"], "axis": "axis"}, {"end": ("int32", (2,))}),
        write.operation("read_state", {"input": "cache"}, {"first": kind}),
        write.operation("slice_update", update, {"second": kind}),
        write.operation("write_state", {"input": "cache", "data": "second"}, {}),
        write.operation("read_state", {"input": "cache"}, {"third": kind}),
        write.operation("add", {"x": "first" if late_reader else "third", "y": "third"}, {"y": kind}),
    ]
    body = write.function({"x": row, "start": ("int32", (1,))}, steps, ["y"], states={"cache": kind})
    return Program.open(write.package(path, write.model({"main": body})))


def test_a_state_is_updated_in_place_where_nobody_can_tell(tmp_path: Path) -> None:
    program = cache_program(tmp_path / "early.mlpackage", late_reader=False)
    state = program.new_state()
    buffer = state["cache"]
    for start in (0, 2):
        found = program.run(
            {"x": np.full((1, 2), start + 1, np.float16), "start": np.array([start])}, state=state
        )
        np.testing.assert_array_equal(found["y"], 2 * state["cache"])
    assert state["cache"] is buffer
    np.testing.assert_array_equal(buffer, [[1, 1], [0, 0], [3, 3], [0, 0]])


def test_what_was_read_before_an_update_stays_as_it_was(tmp_path: Path) -> None:
    program = cache_program(tmp_path / "late.mlpackage", late_reader=True)
    state = program.new_state()
    state["cache"][...] = 5
    found = program.run({"x": np.full((1, 2), 1, np.float16), "start": np.array([3])}, state=state)["y"]
    np.testing.assert_array_equal(found, [[10, 10], [10, 10], [10, 10], [6, 6]])
    np.testing.assert_array_equal(state["cache"], [[5, 5], [5, 5], [5, 5], [1, 1]])


def test_an_update_that_is_not_written_back_leaves_the_state(tmp_path: Path) -> None:
    kind: write.Type = ("float16", (4, 2))
    steps = [
        write.number("begin", [1, 0]),
        write.number("end", [2, 2]),
        write.operation("read_state", {"input": "cache"}, {"old": kind}),
        write.operation(
            "slice_update", {"x": "old", "update": "x", "begin": "begin", "end": "end"}, {"y": kind}
        ),
    ]
    body = write.function({"x": ("float16", (1, 2))}, steps, ["y"], states={"cache": kind})
    program = Program.open(write.package(tmp_path / "p.mlpackage", write.model({"main": body})))
    state = program.new_state()
    found = program.run({"x": np.ones((1, 2), np.float16)}, state=state)["y"]
    assert found.sum() == 2 and not state["cache"].any()


def test_outputs_do_not_change_with_later_runs(tmp_path: Path) -> None:
    kind: write.Type = ("float16", (2,))
    steps = [
        write.operation("read_state", {"input": "s"}, {"old": kind}),
        write.operation("add", {"x": "old", "y": "x"}, {"new": kind}),
        write.operation("write_state", {"input": "s", "data": "new"}, {}),
        write.operation("read_state", {"input": "s"}, {"y": kind}),
    ]
    body = write.function({"x": kind}, steps, ["y"], states={"s": kind})
    program = Program.open(write.package(tmp_path / "p.mlpackage", write.model({"main": body})))
    state = program.new_state()
    first = program.run({"x": np.ones(2, np.float16)}, state=state)["y"]
    program.run({"x": np.ones(2, np.float16)}, state=state)
    np.testing.assert_array_equal(first, [1, 1])


# --- the weight file --------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dtype=st.sampled_from(sorted(STORED.values())), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_every_stored_type_comes_back(tmp_path: Path, dtype: str, count: int, seed: int) -> None:
    values = stored_values(dtype, count, seed)
    weights = write.Weights()
    weights.add(np.ones(3, np.float32), "float32")
    offset = len(weights.data)
    weights.add(values, dtype)
    (tmp_path / "weights").mkdir(exist_ok=True)
    (tmp_path / "weights" / "weight.bin").write_bytes(bytes(weights.data))
    blob = Blob(write.WEIGHT_FILE, offset, TensorType(dtype, (count,)))
    np.testing.assert_array_equal(WeightFiles(tmp_path / "model.mlmodel").read(blob), values)


def stored_values(dtype: str, count: int, seed: int) -> Any:
    kind, generator = TensorType(dtype, (count,)), np.random.default_rng(seed)
    if kind.numpy.kind == "f":
        return generator.standard_normal(count).astype(kind.numpy)
    bits = write.SUB_BYTE_BITS.get(dtype, kind.numpy.itemsize * 8)
    low, high = (-(1 << bits - 1), 1 << bits - 1) if kind.numpy.kind == "i" else (0, 1 << bits)
    return generator.integers(low, high, count).astype(kind.numpy)


@pytest.mark.parametrize("dtype", sorted({*write.SUB_BYTE_BITS, "int8", "uint8", "int16", "uint16"}))
@pytest.mark.parametrize("count", [8, 13, 64])
def test_the_weight_file_is_coremltools_own(tmp_path: Path, dtype: str, count: int) -> None:
    pytest.importorskip("coremltools")
    from coremltools.libmilstoragepython import _BlobStorageWriter

    values = stored_values(dtype, count, 1)
    (tmp_path / "weights").mkdir()
    writer = _BlobStorageWriter(str(tmp_path / "weights" / "weight.bin"))
    try:
        offset = getattr(writer, f"write_{dtype}_data")(values)
    except (TypeError, RuntimeError) as error:  # 3 and 6 bits want whole bytes
        pytest.skip(f"coremltools does not write {count} of them: {type(error).__name__}")
    del writer
    blob = Blob(write.WEIGHT_FILE, offset, TensorType(dtype, (count,)))
    np.testing.assert_array_equal(WeightFiles(tmp_path / "model.mlmodel").read(blob), values)


def test_a_store_keeps_no_more_than_it_may() -> None:
    store, made = Store(100), []

    def make(number: int) -> Any:
        made.append(number)
        return np.zeros(10, np.float64)

    for number in (1, 2, 1, 2):
        store.get(number, lambda number=number: make(number))  # type: ignore[misc]
    assert made == [1, 2, 2] and store.kept_bytes == 80


# --- what is wrong ----------------------------------------------------


def refusal(action: Any) -> str:
    with pytest.raises(BundleError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_operation_that_is_not_known_is_named_and_placed(tmp_path: Path) -> None:
    body = write.function({"x": ROWS}, [write.operation("lstm", {"x": "x"}, {"y": ROWS})], ["y"])
    path = write.package(tmp_path / "odd.mlpackage", write.model({"decode": body}))
    text = refusal(lambda: Program.open(path))
    assert text == (
        "odd.mlpackage: function decode: operation lstm ('y') is not known to this runtime; update pocketvlm"
    )


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "takes x; got nothing"),
        ({"x": np.zeros((2, 4), np.float16), "z": np.zeros(1)}, "takes x; got x, z"),
        ({"x": np.zeros((2, 5), np.float16)}, "input x has the shape [2, 5], declared is float16[2, 4]"),
        ({"x": np.zeros((2, 4), np.int32)}, "input x is float16, got int32"),
    ],
)
def test_inputs_must_be_those_declared(tmp_path: Path, inputs: dict[str, Any], words: str) -> None:
    program = Program.open(linear_package(tmp_path / "linear.mlpackage"))
    assert words in refusal(lambda: program.run(inputs))


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (write.operation("relu", {"x": "x"}, {"y": ("float16", (4, 2))}), "relu 'y': has the shape [2, 4]"),
        (write.operation("relu", {"x": "absent"}, {"y": ROWS}), "relu 'y': nothing gives 'absent'"),
        (write.operation("relu", {}, {"y": ROWS}), "relu 'y'"),
        (write.operation("relu", {"x": "x", "w": "x"}, {"y": ROWS}), "relu 'y'"),
        (write.operation("relu", {"x": ["x", "x"]}, {"y": ROWS}), "relu 'y'"),
        (write.operation("matmul", {"x": "x", "y": "x"}, {"y": ROWS}), "matmul 'y'"),
        (write.operation("read_state", {"input": "x"}, {"y": ROWS}), "read_state 'y'"),
    ],
)
def test_an_operation_that_fails_is_named(tmp_path: Path, operation: bytes, words: str) -> None:
    program = single(tmp_path, operation, ROWS)
    text = refusal(lambda: program.run({"x": np.ones((2, 4), np.float16)}))
    assert text.startswith("one.mlpackage: function main, ") and words in text


def test_a_constant_that_makes_itself_is_refused(tmp_path: Path) -> None:
    kind = write.immediate("fp16", "string")
    loop = write.operation("constexpr_cast", {"source_val": "w", "output_dtype": kind}, {"w": ROWS})
    body = write.function({"x": ROWS}, [loop, write.operation("relu", {"x": "w"}, {"y": ROWS})], ["y"])
    program = Program.open(write.package(tmp_path / "p.mlpackage", write.model({"main": body})))
    assert "recursion" in refusal(lambda: program.run({"x": np.ones((2, 4), np.float16)}))


@pytest.mark.parametrize("inputs", [{}, {"input": "s"}, {"data": "x"}, {"input": "s", "data": []}])
def test_a_write_without_state_or_value_is_refused(tmp_path: Path, inputs: dict[str, Any]) -> None:
    steps = [write.operation("write_state", inputs, {}), write.operation("relu", {"x": "x"}, {"y": ROWS})]
    body = write.function({"x": ROWS}, steps, ["y"], states={"s": ROWS})
    path = write.package(tmp_path / "p.mlpackage", write.model({"main": body}))

    def run() -> None:
        program = Program.open(path)
        program.run({"x": np.ones((2, 4), np.float16)}, state=program.new_state())

    assert "write_state" in refusal(run)


def test_a_constant_may_be_an_output(tmp_path: Path) -> None:
    body = write.function({}, [write.number("y", [1, 2])], ["y"])
    program = Program.open(write.package(tmp_path / "p.mlpackage", write.model({"main": body})))
    np.testing.assert_array_equal(program.run({})["y"], [1, 2])


def test_an_output_that_nothing_gives_is_refused(tmp_path: Path) -> None:
    body = write.function({"x": ROWS}, [], ["y"])
    path = write.package(tmp_path / "p.mlpackage", write.model({"main": body}))
    assert "nothing gives the output y" in refusal(lambda: Program.open(path))


def test_a_function_that_is_not_there_is_refused(tmp_path: Path) -> None:
    program = Program.open(linear_package(tmp_path / "linear.mlpackage"))
    text = refusal(lambda: program.run({}, function="prefill"))
    assert text == "linear.mlpackage: has no function prefill, only main"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "names no model"),
        ("[]", "names no model"),
        ("{}", "names no model"),
        ('{"rootModelIdentifier": "A", "itemInfoEntries": {}}', "names no model"),
        ('{"rootModelIdentifier": "A", "itemInfoEntries": {"A": {"path": 3}}}', "names no model"),
        ('{"rootModelIdentifier": "A", "itemInfoEntries": {"A": {"path": "../x"}}}', "leads out"),
        ('{"rootModelIdentifier": "A", "itemInfoEntries": {"A": {"path": "/etc/passwd"}}}', "leads out"),
        ('{"rootModelIdentifier": "A", "itemInfoEntries": {"A": {"path": "gone"}}}', "is missing"),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    path = linear_package(tmp_path / "linear.mlpackage")
    (path / "Manifest.json").write_text(content)
    assert words in refusal(lambda: Program.open(path))


def test_no_package_is_one_line(tmp_path: Path) -> None:
    assert "names no model" in refusal(lambda: Program.open(tmp_path / "absent.mlpackage"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "cannot be read"),
        (lambda data: data[:70], "a record is at 64"),
        (lambda data: data[:64] + bytes(len(data) - 64), "no record at 64"),
        (lambda data: data[:68] + b"\x02" + data[69:], "holds float32 at 64, not float16"),
        (lambda data: data[:136], "ends inside of the record at 64"),
    ],
)
def test_a_damaged_weight_file_is_one_line(tmp_path: Path, change: Any, words: str) -> None:
    path = linear_package(tmp_path / "linear.mlpackage")
    file = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    file.write_bytes(change(file.read_bytes()))
    program = Program.open(path)
    text = refusal(lambda: program.run({"x": np.ones((2, 4), np.float16)}))
    assert words in text


@pytest.mark.parametrize("file", ["/etc/hostname", "@model_path/../../../../secret"])
def test_a_weight_file_stays_in_the_package(tmp_path: Path, file: str) -> None:
    blob = Blob(file, 0, TensorType("float16", (1,)))
    with pytest.raises(WireError, match="leads out of the package"):
        WeightFiles(tmp_path / "model.mlmodel").read(blob)


def test_a_model_cut_short_is_one_line_wherever_it_is_cut(tmp_path: Path) -> None:
    path = linear_package(tmp_path / "linear.mlpackage")
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1, 3):
        file.write_bytes(whole[:length])
        assert "model.mlmodel: " in refusal(lambda: Program.open(path))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_model_with_odd_bytes_opens_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Never another exception, whatever the bytes: opened and run, or one line."""
    path = tmp_path / "linear.mlpackage"
    if not path.exists():
        linear_package(path)
        (tmp_path / "whole").write_bytes((path / "Data/com.apple.CoreML/model.mlmodel").read_bytes())
    changed = bytearray((tmp_path / "whole").read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=4)):
        changed[place] = data.draw(st.integers(0, 255))
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(bytes(changed))
    try:
        Program.open(path).run({"x": np.ones((2, 4), np.float16)})
    except BundleError as error:
        assert "\n" not in str(error)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_none(data: bytes) -> None:
    try:
        list(fields(memoryview(data)))
    except WireError:
        return
    try:
        parse(data)
    except WireError:
        return


def test_a_neural_network_is_no_program() -> None:
    with pytest.raises(WireError, match="holds no ML program"):
        parse(write.message((1, 4), (500, b"")))


def test_signatures_are_read_without_knowing_the_operations(tmp_path: Path) -> None:
    body = write.function(
        {"x": ROWS}, [write.operation("lstm", {"x": "x"}, {"y": ROWS})], ["y"], states={"s": ROWS}
    )
    path = write.package(tmp_path / "odd.mlpackage", write.model({"decode": body}))
    assert mil.signatures(path) == {"decode": {"x": TensorType("float16", (2, 4))}}


def test_the_default_function_is_one_that_is_there(tmp_path: Path) -> None:
    path = linear_package(tmp_path / "linear.mlpackage")
    assert json.loads((path / "Manifest.json").read_text())["rootModelIdentifier"] == "A"
    body = write.function({"x": ROWS}, [write.operation("relu", {"x": "x"}, {"y": ROWS})], ["y"])
    assert parse(write.model({"decode": body}, "gone")).default == "decode"


def test_the_evaluator_imports_neither_coremltools_nor_torch() -> None:
    source = "".join(path.read_text() for path in Path(mil.__file__).parent.glob("mil*.py"))
    assert mil_evaluate.__doc__ and "import coremltools" not in source and "import torch" not in source
