"""Prompt segments against chat templates: one turn, several pictures, further turns, and what is left out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoProcessor

from export import proof
from export.checkpoint import Checkpoint, load
from export.families import family_of
from runtime import image
from runtime.errors import CheckpointError, ParityError
from runtime.prompt import load_tokenizer, render_later
from runtime.prompt_spec import ImageSlot
from tests import gguf_checkpoints
from tests.checkpoints import CHATML, FAMILIES, VARIANTS

SMOL = ("{{ line['text'] }}", "<end_of_utterance>")
MODELS = ("smolvlm", "qwen3_vl", "qwen2_5_vl", "internvl", "lfm2_vl", "smolvlm_tiles", "idefics3_tiles")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root, makers = tmp_path_factory.mktemp("templates"), {**FAMILIES, **VARIANTS}
    return {name: load(makers[name](root / name)) for name in MODELS}


def templated(checkpoint: Checkpoint, tmp_path: Path, template: str) -> Checkpoint:
    """The same checkpoint under another chat template."""
    copy = Path(shutil.copytree(checkpoint.path, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text(template)
    return Checkpoint(copy, checkpoint.model, AutoProcessor.from_pretrained(copy))


def template_of(checkpoint: Checkpoint) -> str:
    return (checkpoint.path / "chat_template.jinja").read_text()


def settled(checkpoint: Checkpoint, images: int = 3) -> proof.Claims:
    family = family_of(checkpoint)
    return proof.settle(checkpoint, family.prompt(checkpoint), family.image(checkpoint), images)


def proved(checkpoint: Checkpoint, claims: proof.Claims) -> int:
    """By the tokenizer's file and a new reading of every picture."""
    tokenizer, spec = (
        load_tokenizer(checkpoint.path / "tokenizer.json"),
        family_of(checkpoint).image(checkpoint),
    )
    return proof.prove(
        checkpoint, claims.prompt, tokenizer, lambda each: image.prepare(each, spec), claims.images
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_family_talks_in_turns_about_several_pictures(models: dict[str, Checkpoint], name: str) -> None:
    claims = settled(models[name])
    assert claims.notes == () and claims.images == 3
    assert claims.prompt.later is not None and claims.prompt.later.user is not None
    assert proved(models[name], claims) >= 2 * len(proof.QUESTIONS) + len(proof.SIZES) - 1 + 4 + 7


def test_line_breaks_that_are_tokens_join_with_those_beside_them(tmp_path: Path) -> None:
    """A tokenizer as Gemma's has a token of two; before a picture they stand behind a role's own."""
    checkpoint = load(gguf_checkpoints.write("gemma3", tmp_path / "gemma"))
    two = checkpoint.tokenizer.convert_tokens_to_ids("\n\n")
    ids = checkpoint.tokenizer("user\n\n\n<start_of_image>").input_ids
    assert ids[-3] == two and ids[-2] != two
    assert proved(checkpoint, settled(checkpoint))


def test_a_begin_token_of_template_and_tokenizer_comes_once(tmp_path: Path) -> None:
    """As Gemma's published ones: the template writes it, the tokenizer would put it before every text."""
    path = gguf_checkpoints.write("gemma3", tmp_path / "gemma")
    tokenizer = load_tokenizer(path / "tokenizer.json")
    begin = tokenizer.token_to_id("<|im_start|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", "<|im_start|> $A <|im_start|> $B", [("<|im_start|>", begin)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    template = (path / "chat_template.jinja").read_text().replace("part['text']", "part['text'] | trim")
    (path / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    checkpoint = load(path)
    claims = settled(checkpoint)
    assert claims.prompt.system == (begin,) and claims.prompt.later is not None
    assert proved(checkpoint, claims)


def test_a_template_that_trims_questions_is_followed(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    """As Gemma's does."""
    plain = models["qwen3_vl"]
    template = template_of(plain)
    assert "part['text']" in template and not trims(settled(plain))
    trimming = templated(plain, tmp_path, template.replace("part['text']", "part['text'] | trim"))
    claims = settled(trimming)
    assert not claims.notes and claims.images == 3 and trims(claims)
    assert claims.prompt.later is not None and proved(trimming, claims)


def trims(claims: proof.Claims) -> bool:
    (slot,) = (piece for piece in claims.prompt.user if piece.kind == "question")
    return slot.trim


def test_a_template_that_trims_one_end_only_is_refused(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    plain = models["qwen3_vl"]
    template = template_of(plain).replace("part['text']", "part['text'].rstrip()")
    with pytest.raises(ParityError, match="leading space"):
        settled(templated(plain, tmp_path, template))


def test_pictures_of_the_proof_reach_many_tilings(models: dict[str, Checkpoint]) -> None:
    for name, least in (("smolvlm_tiles", 5), ("internvl", 6)):
        spec = family_of(models[name]).image(models[name])
        tiles = {image.prepare(proof.picture(n), spec).tiles for n in range(len(proof.SIZES))}
        assert len(tiles) >= least, tiles


def test_an_answer_that_ended_with_its_stop_id_is_not_closed_twice(models: dict[str, Checkpoint]) -> None:
    prompt = settled(models["smolvlm"]).prompt
    tokenizer = models["smolvlm"].tokenizer.backend_tokenizer
    assert prompt.later is not None
    stop = prompt.later.turn_end[0]
    cut, ended = (render_later(prompt, tokenizer, "why?", (), last).tolist() for last in (None, stop))
    assert cut == [stop, *ended] and ended[0] != stop


# --- other templates --------------------------------------------------


def test_a_system_prompt_and_text_around_the_question(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    text = template_of(models["smolvlm"])
    brief = "<|im_start|>System: be brief.<end_of_utterance>{{ '\\n' }}{% for"
    text = text.replace("<|im_start|>{% for", brief, 1)
    end = "(' ?' if message['role'] == 'user' else '')"
    text = text.replace("{{ line['text'] }}", f"{{{{ '\\n' + line['text'] + {end} }}}}")
    checkpoint = templated(models["smolvlm"], tmp_path, text)
    claims = settled(checkpoint)
    assert claims.notes == () and claims.prompt.system and claims.prompt.later is not None
    assert proved(checkpoint, claims) > 0


def test_pictures_that_are_numbered_go_one_at_a_time(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    """`Picture 1: ` cannot be said by one fixed text between two pictures."""
    count = "{%- set n = namespace(i=0) -%}" + CHATML.replace(
        "IMAGE", "{%- set n.i = n.i + 1 -%}Picture {{ n.i }}: <IMG_CONTEXT>{{ '\\n' }}"
    )
    claims = settled(templated(models["internvl"], tmp_path, count))
    assert claims.images == 1 and "one picture in a conversation" in claims.notes[0]
    assert claims.prompt.later is not None and claims.prompt.later.user is None
    assert "no pictures in a further turn" in claims.notes[1] and len(claims.notes) == 2


def test_text_between_pictures_is_kept(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    checkpoint = templated(
        models["internvl"], tmp_path, CHATML.replace("IMAGE", "A picture:{{ '\\n' }}<IMG_CONTEXT>;")
    )
    claims = settled(checkpoint)
    slot = next(segment for segment in claims.prompt.user if isinstance(segment, ImageSlot))
    assert checkpoint.tokenizer.decode(slot.between) == ";A picture:\n" and claims.images == 3


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        # the answer of an earlier turn is not what was generated
        ("{%- elif part['type'] == 'text' -%}{{ part['text'] }}",
         "{%- elif part['type'] == 'text' -%}{{ part['text'][:2] if message['role'] == 'assistant' "
         "else part['text'] }}", "changes an earlier answer"),
        # another word ends it than the one that ends a generated answer
        ("<|im_end|>", "{{ '<|im_end|>' if message['role'] == 'user' else '<|endoftext|>' }}",
         "no token that ends a generated one"),
        # the opening of an answer is written only while it is open
        ("<|im_start|>assistant{{ '\n' }}", "<|im_start|>assistant{{ '\nSay: ' }}", "in another way"),
    ],
)  # fmt: skip
def test_templates_whose_later_turns_cannot_be_cut_give_one_turn_and_the_reason(
    models: dict[str, Checkpoint], tmp_path: Path, old: str, new: str, says: str
) -> None:
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>{{ '\\n' }}")
    assert old in template
    claims = settled(templated(models["internvl"], tmp_path, template.replace(old, new)))
    assert claims.prompt.later is None and claims.images == 3
    assert len(claims.notes) == 1 and says in claims.notes[0]


@pytest.mark.parametrize("change", ["{{ part['text'] | upper }}", "{{ part['text'] | trim('t') }}"])
def test_a_template_that_changes_the_question_is_refused(
    models: dict[str, Checkpoint], tmp_path: Path, change: str
) -> None:
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>{{ '\\n' }}").replace("{{ part['text'] }}", change)
    with pytest.raises((ParityError, CheckpointError), match=r"template"):
        settled(templated(models["internvl"], tmp_path, template))


def test_a_question_before_its_picture_is_refused(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    template = CHATML.replace(
        "{%- for part in message['content'] -%}", "{%- for part in message['content'] | reverse -%}"
    )
    with pytest.raises(CheckpointError, match="puts the question before the picture"):
        settled(templated(models["internvl"], tmp_path, template.replace("IMAGE", "<IMG_CONTEXT>")))


# --- the proof itself -------------------------------------------------


def test_the_proof_sees_every_damage(models: dict[str, Checkpoint]) -> None:
    """One id of any segment missing: each must fail."""
    checkpoint = models["smolvlm_tiles"]
    claims = settled(checkpoint, images=2)
    prompt = claims.prompt
    tiled, later = prompt.image.tiled, prompt.later
    assert tiled is not None and later is not None
    swapped = (tiled.cells[1], tiled.cells[0], *tiled.cells[2:])

    def with_tiled(**change: object) -> object:
        changed = prompt.image.model_copy(update={"tiled": tiled.model_copy(update=change)})
        return prompt.model_copy(update={"image": changed})

    damaged = [
        with_tiled(whole=tiled.whole[1:]),
        with_tiled(row_end=()),
        with_tiled(cells=swapped),
        with_tiled(after=()),
        prompt.model_copy(update={"image": prompt.image.model_copy(update={"tiled": None})}),
        prompt.model_copy(update={"assistant": prompt.assistant[:-1]}),
        prompt.model_copy(update={"later": later.model_copy(update={"turn_end": ()})}),
        prompt.model_copy(
            update={"later": later.model_copy(update={"user_without_image": prompt.user_without_image})}
        ),
        prompt.model_copy(update={"later": later.model_copy(update={"answer_before": ""})}),
    ]
    for each in damaged:
        with pytest.raises(ParityError, match="prompt of"):
            proved(checkpoint, proof.Claims(each, 2))  # type: ignore[arg-type]


def test_the_proof_sees_missing_ids_between_pictures(models: dict[str, Checkpoint]) -> None:
    prompt = settled(models["internvl"]).prompt
    slots = tuple(ImageSlot() if isinstance(segment, ImageSlot) else segment for segment in prompt.user)
    with pytest.raises(ParityError, match=r"2 picture.*several pictures"):
        proved(models["internvl"], proof.Claims(prompt.model_copy(update={"user": slots}), 2))
