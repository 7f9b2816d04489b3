"""Mutations of what only tiles, several pictures and later turns have: each must fail, in every precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export import gate, gate_batch, gate_turns, onnx, proof
from export.checkpoint import load
from export.facts import expected_of, prepare
from runtime import bundle, image, sequence, tiles
from runtime.errors import ParityError
from runtime.image_spec import GridTiles, SplitTiles
from runtime.manifest import Manifest
from runtime.prompt_spec import ImageSlot
from runtime.session import Session
from tests.checkpoints import VARIANTS, write_internvl
from tests.export.conftest import Exported

PRECISIONS = ("fp32", "int8", "int4")


def _export(path: Path, out: Path) -> Exported:
    facts = prepare(load(path), (), lambda _: None)
    bundles = {precision: out / precision for precision in PRECISIONS}
    (out / "scratch").mkdir(parents=True)
    for precision, folder in bundles.items():
        folder.mkdir()
        onnx.build(facts, folder, precision, f"tiny-{precision}", out / "scratch")
    return Exported(facts, bundles, out / "scratch")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """SmolVLM with tiles and a whole view."""
    root = tmp_path_factory.mktemp("split")
    return _export(VARIANTS["smolvlm_tiles"](root / "tiny"), root / "out")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """InternVL with tiles and a thumbnail."""
    root = tmp_path_factory.mktemp("grid")
    return _export(write_internvl(root / "tiny"), root / "out")


@pytest.fixture(params=[pytest.param("split", marks=pytest.mark.slow), "grid"])
def exported(request: pytest.FixtureRequest) -> Exported:
    found: Exported = request.getfixturevalue(request.param)
    return found


def judge(exported: Exported, precision: str, manifest: Manifest) -> object:
    facts, directory = exported.facts, exported.bundles[precision]
    if precision == "fp32":
        return gate.check_float(facts.checkpoint, directory, manifest, expected_of(facts))
    return gate.check_quantized(
        facts.checkpoint, facts.graphs, directory, manifest, expected_of(facts), exported.scratch
    )


# --- mutations of how pictures are cut --------------------------------

Cut = Callable[[Any, Any], tuple[list[Any], tuple[int, int]]]


def _swapped(cut: Cut) -> Cut:
    """The two first tiles change places."""

    def mutant(pixels: Any, operation: Any) -> tuple[list[Any], tuple[int, int]]:
        views, grid = cut(pixels, operation)
        return (views[1::-1] + views[2:] if grid[0] * grid[1] > 1 else views), grid

    return mutant


def _dropped(cut: Cut) -> Cut:
    """The last tile of a row is missing: the row shows the one before it twice."""

    def mutant(pixels: Any, operation: Any) -> tuple[list[Any], tuple[int, int]]:
        views, grid = cut(pixels, operation)
        tiles = grid[0] * grid[1]
        return ([*views[: tiles - 1], views[tiles - 2], *views[tiles:]] if tiles > 1 else views), grid

    return mutant


def _fewer(cut: Cut) -> Cut:
    """One tile less."""

    def mutant(pixels: Any, operation: Any) -> tuple[list[Any], tuple[int, int]]:
        views, grid = cut(pixels, operation)
        return (views[1:] if grid[0] * grid[1] > 1 else views), grid

    return mutant


def _without_whole(cut: Cut) -> Cut:
    """The whole view after the tiles is missing."""

    def mutant(pixels: Any, operation: Any) -> tuple[list[Any], tuple[int, int]]:
        views, grid = cut(pixels, operation)
        return (views[: grid[0] * grid[1]] if grid[0] * grid[1] > 1 else views), grid

    return mutant


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("damage", [_swapped, _dropped, _fewer, _without_whole])
def test_wrong_tiles_fail_the_gate(
    exported: Exported, precision: str, damage: Callable[[Cut], Cut], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, cut in ((SplitTiles, tiles.split), (GridTiles, tiles.grid)):
        monkeypatch.setitem(image.CUTS, kind, damage(cut))
    with pytest.raises(ParityError):
        judge(exported, precision, exported.manifest(precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_manifest_without_the_thumbnail_fails_the_gate(grid: Exported, precision: str) -> None:
    manifest = grid.manifest(precision)
    operations = tuple(
        op.model_copy(update={"whole_after_tiles": False}) if isinstance(op, GridTiles) else op
        for op in manifest.image.operations
    )
    spec = manifest.image.model_copy(update={"operations": operations})
    with pytest.raises(ParityError):
        judge(grid, precision, manifest.model_copy(update={"image": spec}))


# --- mutations of the prompt ------------------------------------------


def _without_between(manifest: Manifest) -> Manifest:
    user = tuple(ImageSlot() if isinstance(x, ImageSlot) else x for x in manifest.prompt.user)
    return manifest.model_copy(update={"prompt": manifest.prompt.model_copy(update={"user": user})})


def _turn_not_closed(manifest: Manifest) -> Manifest:
    assert manifest.prompt.later is not None
    later = manifest.prompt.later.model_copy(update={"turn_end": ()})
    return manifest.model_copy(update={"prompt": manifest.prompt.model_copy(update={"later": later})})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("change", [_without_between, _turn_not_closed])
def test_a_wrong_prompt_fails_the_gate(
    grid: Exported, precision: str, change: Callable[[Manifest], Manifest]
) -> None:
    with pytest.raises(ParityError, match="prompt of"):
        judge(grid, precision, change(grid.manifest(precision)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_row_names_in_another_order_fail_the_gate(split: Exported, precision: str) -> None:
    manifest = split.manifest(precision)
    tiled = manifest.prompt.image.tiled
    assert tiled is not None
    other = tiled.model_copy(update={"cells": tiled.cells[::-1]})
    picture = manifest.prompt.image.model_copy(update={"tiled": other})
    prompt = manifest.prompt.model_copy(update={"image": picture})
    with pytest.raises(ParityError, match="prompt of"):
        judge(split, precision, manifest.model_copy(update={"prompt": prompt}))


# --- mutations of running ---------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cache_that_is_kept_one_token_short_fails_the_gate(
    grid: Exported, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session believes that it has one token more in common than it has."""
    known = sequence.shared_length

    def wrong(*args: Any) -> int:
        length = known(*args)
        return length + 1 if length else 0

    monkeypatch.setattr(sequence, "shared_length", wrong)
    with pytest.raises(ParityError):
        judge(grid, precision, grid.manifest(precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_that_see_their_padding_fail_the_gate(
    grid: Exported, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gate_batch.BatchDecoder._step

    def wrong(self: Any, embeds: Any, positions: Any, stack: Any, lengths: Any) -> Any:
        return run(self, embeds, positions, stack, np.full_like(lengths, lengths.max()))

    monkeypatch.setattr(gate_batch.BatchDecoder, "_step", wrong)
    with pytest.raises(ParityError):
        judge(grid, precision, grid.manifest(precision))


# --- what passes ------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_written_parts_pass_the_gate(exported: Exported, precision: str) -> None:
    parity = judge(exported, precision, exported.manifest(precision))
    named = set(parity.limits)  # type: ignore[attr-defined]
    assert "batch_logit_rms_error" in named
    assert {"later_logit_rel_diff", "twin_later_logit_rms_error"} & named


def test_the_conversation_has_three_turns_and_two_pictures(grid: Exported) -> None:
    later = expected_of(grid.facts).later
    assert later is not None
    talk = later.talk
    with Session.from_manifest(grid.bundles["fp32"], grid.manifest("fp32"), threads=1) as session:
        assert [len(shown) for shown in talk.pictures] == [1, 0, 1] and len(talk.answers) == 2
        going_on = gate_turns.going_on(session, talk)
        assert session._sequence.reused > 60  # of the prompt of the last turn
        assert np.abs(going_on - gate_turns.afresh(session, talk)).max() < 1e-4


def test_rows_of_the_batch_differ_in_length_and_picture(grid: Exported) -> None:
    with Session.from_manifest(grid.bundles["fp32"], grid.manifest("fp32"), threads=1) as session:
        rows = gate_batch.rows_of(session, grid.facts.cases)
    assert len({len(row.ids) for row in rows}) == gate_batch.ROWS
    assert len({sum(map(len, row.images)) for row in rows}) >= 2


def test_a_checkpoint_with_tiles_can_be_exported_without(tmp_path: Path) -> None:
    """The reference is set the same way, the manifest says what was changed, and the gate passes."""
    from export.targets import Plan

    path = VARIANTS["smolvlm_tiles"](tmp_path / "tiny")
    out = onnx.export_onnx(
        path, {"fp32": tmp_path / "out"}, names={"fp32": "tiny"}, plan=Plan(split_images=False)
    )
    manifest = bundle.read(out[0])
    assert manifest.source.changed == {"image_processor.do_image_splitting": False}
    assert (manifest.image.max_views, manifest.image.max_tokens) == (1, 16)
    assert manifest.prompt.image.tiled is None
    with Session.from_manifest(out[0], manifest, threads=1) as session:
        assert session.prepare(Image.new("RGB", (300, 200))).tiles == (0, 0)


def test_the_proof_is_part_of_every_gate(grid: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def count(*_: object, **__: object) -> int:
        calls.append(1)
        return 1

    monkeypatch.setattr(proof, "first_turn", count)
    for precision in PRECISIONS:
        judge(grid, precision, grid.manifest(precision))
    assert len(calls) == len(PRECISIONS)
