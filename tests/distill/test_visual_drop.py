"""Visual tokens dropped for the teacher: scores against attention maps, dropping against masking, cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from distill.forward import tree, visual_drop
from distill.forward.features import encode_images, image_token
from distill.forward.tree import Group
from distill.forward.visual_drop import choose, cost, drop, scores, watch
from distill.inputs.encoding import Encoder
from distill.losses.objective import Objective
from distill.settings import SignalSettings
from distill.training.learner import Context, FrozenModel
from distill.training.parts import PoolPart, Totals
from distill.training.processes import Held
from runtime.errors import TrainingError
from tests.checkpoints import FAMILIES
from tests.distill import families

TREES = [name for name in FAMILIES if name != "lfm2_vl"]


class Family:
    """A tiny checkpoint and its rows."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, FAMILIES[name](path)
        self.encoder = Encoder.load(str(self.path))
        self.rows = families.rows(self.encoder)

    def model(self, **options: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.path, **options).eval()


@pytest.fixture(scope="module")
def made() -> dict[str, Family]:
    return {}


@pytest.fixture
def family(
    request: pytest.FixtureRequest, made: dict[str, Family], tmp_path_factory: pytest.TempPathFactory
) -> Family:
    name = request.param
    if name not in made:
        made[name] = Family(name, tmp_path_factory.mktemp(name) / name)
    return made[name]


every = pytest.mark.parametrize("family", TREES, indirect=True)
smolvlm = pytest.mark.parametrize("family", ["smolvlm"], indirect=True)


def packed(family: Family, model: Any, rows: Any = None) -> Any:
    rows = family.rows if rows is None else rows
    batch = tree.pack(model, rows, family.encoder.pad_id)
    return batch, encode_images(model, [row[0].prompt for row in rows])


@torch.no_grad()
def seen_scores(family: Family, model: Any, rows: Any = None) -> list[torch.Tensor]:
    batch, features = packed(family, model, rows)
    with watch(model) as seen:
        tree.hidden_states(model, batch, features)
    return scores(seen, model, batch)


@every
@torch.no_grad()
def test_scores_are_the_models_own_attention(family: Family) -> None:
    """One question and one response: the last layer's attention maps, which only `eager` gives."""
    prompt, response = family.rows[0][0].prompt, family.rows[0][0].responses[0]
    found = seen_scores(family, family.model(), [[Group(prompt, (response,))]])[0]
    eager = family.model(attn_implementation="eager")
    given = families.inputs(eager, prompt, response[:-1])
    maps = [x for x in eager(**given, output_attentions=True, use_cache=False).attentions if x is not None]
    ids = given["input_ids"][0]
    visual = (ids == image_token(eager)).nonzero()[:, 0]
    expected = maps[-1][0].mean(0)[int(visual[-1]) + 1 :][:, visual].mean(0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert 0 < found.sum() <= 1


@smolvlm
@torch.no_grad()
def test_scores_of_a_tree_are_means_over_its_tokens(family: Family) -> None:
    """Several questions and responses, a shared text behind the image: every token counts once."""
    model = family.model()
    row = family.rows[0][:2]
    found = seen_scores(family, model, [row])[0]
    batch, _ = packed(family, model, [row])
    eager = family.model(attn_implementation="eager")
    total, seen_tokens = torch.zeros_like(found), set()
    paths = [(g.prompt, r, q, n) for q, g in enumerate(row) for n, r in enumerate(g.responses)]
    shared = tree.shared_prefix([group.prompt.ids for group in row])
    for prompt, response, question, number in paths:
        given = families.inputs(eager, prompt, response[:-1])
        ids = given["input_ids"][0]
        visual = (ids == image_token(eager)).nonzero()[:, 0]
        attention = eager(**given, output_attentions=True, use_cache=False).attentions[-1][0].mean(0)
        for place in range(int(visual[-1]) + 1, len(ids)):
            branch = () if place < shared else (question,) if place < len(prompt.ids) else (question, number)
            if (branch, place) not in seen_tokens:
                seen_tokens.add((branch, place))
                total += attention[place, visual]
    assert len(seen_tokens) > 20 and int((batch.question_bl >= 0).sum()) <= len(seen_tokens)
    torch.testing.assert_close(found, total / len(seen_tokens), atol=1e-6, rtol=1e-4)


@smolvlm
def test_watching_changes_nothing(family: Family) -> None:
    model = family.model()
    batch, features = packed(family, model)
    results = []
    for watched in (False, True):
        model.zero_grad()
        if watched:
            with watch(model):
                hidden = tree.hidden_states(model, batch, features.detach())
        else:
            hidden = tree.hidden_states(model, batch, features.detach())
        hidden.square().sum().backward()
        results.append((hidden.detach(), next(model.base_model.get_decoder().parameters()).grad.clone()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not visual_drop.ALL_ATTENTION_FUNCTIONS._local_mapping
    with pytest.raises(RuntimeError, match="stop"), watch(model):
        raise RuntimeError("stop")
    assert not visual_drop.ALL_ATTENTION_FUNCTIONS._local_mapping


@every
@torch.no_grad()
def test_dropping_is_masking(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept tokens at their old positions see what they would see if the dropped ones were there, but
    masked for everyone: in every row, also with two images, and where a row has none."""
    model = family.model()
    batch, features = packed(family, model)
    kept = choose(seen_scores(family, model), 0.4)
    assert [len(k) for k in kept] == [-(-len(x) * 2 // 5) for x in features.tokens] and not len(kept[-1])
    smaller, fewer = drop(model, batch, features, kept)
    assert smaller.ids_bl.shape[1] < batch.ids_bl.shape[1]
    found = tree.hidden_states(model, smaller, fewer)

    visible = batch.visible
    for b, chosen in enumerate(kept):
        columns = (batch.ids_bl[b] == image_token(model)).nonzero()[:, 0]
        gone = torch.ones(len(columns), dtype=torch.bool)
        gone[chosen] = False
        visible[b, :, columns[gone]] = False
        visible[b, columns[gone], columns[gone]] = True  # no row of the softmax is empty
    monkeypatch.setattr(tree.Batch, "visible", visible)
    expected = tree.hidden_states(model, batch, features)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    monkeypatch.undo()
    assert (found - tree.hidden_states(model, batch, features)).abs().max() > 1e-3


@every
@torch.no_grad()
def test_keeping_all_is_the_whole_forward(family: Family) -> None:
    model = family.model()
    batch, features = packed(family, model)
    same, all_of_them = drop(model, batch, features, choose(seen_scores(family, model), 1.0))
    found = tree.hidden_states(model, same, all_of_them)
    torch.testing.assert_close(found, tree.hidden_states(model, batch, features))


@every
def test_what_it_saves_and_costs(family: Family) -> None:
    """FLOPs are counted, not timed: fewer tokens, fewer FLOPs; all tokens, no divergence."""
    model = family.model()
    rows = family.rows[:1]
    batch, features = packed(family, model, rows)
    of_student = seen_scores(family, model, rows)
    found = [cost(model, batch, features, choose(of_student, keep)) for keep in (1.0, 0.5, 0.25)]
    assert found[0].saved == 0 and found[0].divergence_nats < 1e-6
    assert 0 < found[1].saved < found[2].saved < 1
    assert found[2].divergence_nats > 1e-5
    whole, part = int(batch.ids_bl.shape[1]), found[2].visual_tokens - found[2].kept_tokens
    assert found[2].saved >= 0.95 * part / whole, "work is at least linear in tokens"


@smolvlm
def test_choosing(family: Family) -> None:
    kept = choose([torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.zeros(0), torch.tensor([0.5])], 0.5)
    assert [k.tolist() for k in kept] == [[1, 3], [], [0]]
    with pytest.raises(TrainingError, match=r"signal\.visual_keep 0"):
        choose([], 0)


@smolvlm
def test_refusals(family: Family, tmp_path: Path) -> None:
    model = family.model()
    batch, features = packed(family, model)
    with (
        pytest.raises(TrainingError, match="attn_implementation='sdpa'"),
        watch(family.model(attn_implementation="eager")),
    ):
        pass
    for mode in ("prefix", "naive"):
        with torch.no_grad(), watch(model) as seen:
            tree.hidden_states(model, batch, features, sharing=mode)
        with pytest.raises(TrainingError, match="needs sharing: tree"):
            scores(seen, model, batch)
    with pytest.raises(TrainingError, match="the teacher has 0 in row 3"):
        drop(model, batch, features, [torch.tensor([0])] * 4)


def test_a_family_that_mixes_neighbours(tmp_path: Path) -> None:
    """LFM2's convolutions: sharing falls back to a prefix cache, and scores say so."""
    family = Family("lfm2_vl", tmp_path / "lfm2_vl")
    model = family.model()
    batch, features = packed(family, model)
    with torch.no_grad(), watch(model) as seen:
        tree.hidden_states(model, batch, features, sharing="prefix")
    with pytest.raises(TrainingError, match="needs sharing: tree"):
        scores(seen, model, batch)


@smolvlm
@torch.no_grad()
def test_a_teacher_in_training_sees_what_the_students_attention_leaves(family: Family) -> None:
    """`signal.visual_keep` from the context to the teacher's distributions."""
    model, pad_id = family.model(), family.encoder.pad_id
    teacher = FrozenModel(Held(family.model()))
    context = Context(family.encoder, Objective(), visual_keep=0.5)
    batch, features = packed(family, model)
    _, kept = PoolPart(context, [], [], [], Totals(1.0, 1.0, 1.0, 1))._student(model, family.rows, batch)
    assert kept is not None
    found = teacher.signal(family.rows, pad_id, kept)
    expected = tree.hidden_states(model, *drop(model, batch, features, kept))
    torch.testing.assert_close(found.hidden_th, expected)
    assert (found.hidden_th - teacher.signal(family.rows, pad_id).hidden_th).abs().max() > 1e-3


def test_kept_signals_cannot_drop_visual_tokens() -> None:
    assert SignalSettings(visual_keep=0.5).visual_keep == 0.5
    with pytest.raises(ValueError, match=r"visual_keep 0.5 changes with the student; set kind: live"):
        SignalSettings(kind="topk", visual_keep=0.5)
