"""Precisions by name and by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import quantize_policy as policies
from export.quantize_policy import Rule
from runtime.errors import InputError


@pytest.mark.parametrize(
    ("name", "decoder", "cache"),
    [
        ("fp32", "keep", "keep"),
        ("fp16", "fp16", "fp16"),
        ("fp16-kv8", "fp16", "int8-kv"),
        ("int8-kv8", "int8-dynamic", "int8-kv"),
        ("int8-blocks-b128", "int8-block128", "keep"),
        ("int4", "int4-block32", "keep"),
        ("int8-blocks-fp16", "int8-block32", "fp16"),
        ("int4-b64-gptq-kv8", "int4-block64-gptq", "int8-kv"),
    ],
)
def test_a_name_is_a_list_of_rules(name: str, decoder: str, cache: str) -> None:
    found = policies.named(name)
    assert found.name == name
    assert _first(found.rules, "decoder", "MatMul:text.layers.0.mlp.down_proj") == decoder
    assert _first(found.rules, "decoder", "GroupQueryAttention:node") == cache
    assert found.calibrated == ("kv8" in name or "gptq" in name)


def _first(rules: tuple[Rule, ...], part: str, label: str) -> str:
    from fnmatch import fnmatchcase

    return next(r.scheme for r in rules if fnmatchcase(part, r.part) and fnmatchcase(label, r.node))


@pytest.mark.parametrize("name", list(policies.POLICIES))
def test_vision_and_embedding_never_go_below_eight_bits(name: str) -> None:
    for part, label in (("vision_encoder", "MatMul:x"), ("embed_tokens", "Gather:x")):
        assert not _first(policies.named(name).rules, part, label).startswith("int4")


@pytest.mark.parametrize(
    "wrong",
    ["int3", "fp32-b64", "int8-gptq", "int4-kv4", "int4-kv8-gptq", "fp16-fp16", "int8-fp16", "", "INT4"],
)
def test_what_is_no_name_is_refused_with_the_names(wrong: str) -> None:
    with pytest.raises(InputError, match=r"is not known; .*choose from fp32, fp16, int8"):
        policies.resolve(wrong)


def test_a_near_miss_is_named() -> None:
    with pytest.raises(InputError, match="did you mean int4-gptq"):
        policies.resolve("int4-gtpq")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_own_rules_lie_over_a_named_precision(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.yaml",
        "base: int4\nrules:\n- {part: decoder, node: 'MatMul:head', scheme: int8-block32}\n",
    )
    found = policies.resolve(str(path))
    assert found.name == "mine"
    assert _first(found.rules, "decoder", "MatMul:head") == "int8-block32"
    assert _first(found.rules, "decoder", "MatMul:text.layers.0.mlp.down_proj") == "int4-block32"


def test_a_policy_survives_its_file(tmp_path: Path) -> None:
    before = policies.named("int4-b64-gptq-kv8")
    assert policies.read(policies.dump(before, tmp_path / "p.yaml")) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules: [{nodes: x, scheme: keep}]", r"rules.0.nodes: unknown key; did you mean node\?"),
        ("rule: []", r"rule: unknown key; did you mean rules\?"),
        (
            "rules: [{scheme: int4-blok64}]",
            r"rules.0.scheme: 'int4-blok64' is not known; did you mean int4-block64",
        ),
        ("rules: [{part: vision, scheme: keep}]", "'vision' is not known; did you mean vision_encoder"),
        ("rules: [{node: x}]", "rules.0.scheme: this key is missing"),
        ("base: int5\nrules: []", "base: precision 'int5' is not known"),
        ("name: a/b\nrules: [{scheme: keep}]", "name: string should match"),
        ("rules: []", "neither base nor rules"),
        ("- keep", "wanted a mapping"),
        ("rules: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "p.yaml", text)
    with pytest.raises(InputError, match=said) as caught:
        policies.resolve(str(path))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        policies.resolve(str(tmp_path / "none.yaml"))
