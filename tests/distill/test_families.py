"""Every family: shared prefixes, gradients and drawing equal the model alone; no family is known by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from distill.forward import layout, sharing, tree
from distill.forward.sampling import Sampling
from distill.forward.sampling import sample as draw
from distill.forward.tree import Group, Row
from distill.inputs.encoding import Encoder
from runtime.errors import CheckpointError, InputError, TrainingError
from tests.checkpoints import FAMILIES
from tests.distill import families

TREES = [name for name in FAMILIES if name != "lfm2_vl"]
WAYS = [(name, mode) for name in FAMILIES for mode in tree.MODES if mode != "tree" or name in TREES]


class Family:
    """A tiny checkpoint, loaded as a user would."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.encoder = Encoder.load(str(path))
        self.rows = families.rows(self.encoder)

    def model(self, **options: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.path, **options).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {}


@pytest.fixture
def family(
    request: pytest.FixtureRequest, made: dict[str, Family], tmp_path_factory: pytest.TempPathFactory
) -> Family:
    name = request.param
    if name not in made:
        made[name] = Family(FAMILIES[name](tmp_path_factory.mktemp(name) / name))
    return made[name]


every = pytest.mark.parametrize("family", FAMILIES, indirect=True)
ways = pytest.mark.parametrize("family, mode", WAYS, indirect=["family"])


# --- the makers -------------------------------------------------------


@every
def test_a_checkpoint_answers_with_the_library_alone(family: Family) -> None:
    """Processor, chat template and generate(); another picture gives other log-probs."""
    model = family.model()
    found = {}
    for seed in (0, 1):
        sample = families.sample("square", seed=seed)
        (image,) = sample.open_images()
        message = {
            "role": "user",
            "content": [{"type": "image", "image": image}, *sample.messages[0]["content"][1:]],
        }
        encoded = family.encoder.processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prompt = family.encoder.encode(sample)
        assert list(prompt.ids) == encoded["input_ids"][0].tolist()
        assert all(torch.equal(encoded[name], value) for name, value in prompt.vision.items())
        assert set(encoded) - set(prompt.vision) <= {"input_ids", "attention_mask", "mm_token_type_ids"}
        out = model.generate(
            **encoded, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert out.sequences.shape[1] > len(prompt.ids)
        found[seed] = out.logits[0]
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_makers_share_a_signature_and_a_seed_decides(tmp_path: Path) -> None:
    for name, write in FAMILIES.items():
        first, second, other = (
            write(tmp_path / f"{name}-{i}", seed=seed, hidden=32, layers=2, heads=2, kv_heads=1)
            for i, seed in enumerate((3, 3, 4))
        )
        weights = [(path / "model.safetensors").read_bytes() for path in (first, second, other)]
        assert weights[0] == weights[1] != weights[2]
        tokens = {(path / "tokenizer.json").read_bytes() for path in (first, other)}
        assert len(tokens) == 1, "teacher and student share a tokenizer"


# --- encoding ---------------------------------------------------------


@every
def test_a_target_is_what_the_template_would_say(family: Family) -> None:
    """Prompt and target ids together are the conversation with the answer in it."""
    sample = families.sample("text")
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red circle"}]}
    whole = family.encoder.processor.apply_chat_template(
        [*sample.messages, answer], tokenize=True, return_dict=True
    )["input_ids"][0]
    ids = (*family.encoder.encode(sample).ids, *family.encoder.response_ids("red circle"))
    assert list(ids) == whole[: len(ids)] and len(whole) - len(ids) <= 1, "a line end may follow"
    assert ids[-1] in family.encoder.eos_ids
    assert family.encoder.response_ids("red", end=False) == family.encoder.response_ids("red")[:-1]
    assert family.encoder.text(family.encoder.response_ids("red circle")) == "red circle"


@every
def test_keys_tell_images_apart(family: Family) -> None:
    encode = family.encoder.encode
    same = {encode(families.sample("wide", text)).key for text in ("a", "b")}
    assert len(same) == 1
    others = {encode(families.sample(*which)).key for which in (("wide", "a", 1), ("two",), ("text",))}
    assert len(others) == 3 and not others & same
    assert encode(families.sample("text")).key == "" and encode(families.sample("text")).vision == {}


@every
def test_limits(family: Family) -> None:
    sample = families.sample("two")
    whole = family.encoder.encode(sample)
    small = Encoder(family.encoder.processor, max_pixels=1024, eos_ids=family.encoder.eos_ids).encode(sample)
    assert len(small.ids) <= len(whole.ids) and small.key != whole.key
    with pytest.raises(InputError, match=rf"two: .*{len(whole.ids)} tokens, 20 are allowed"):
        Encoder(family.encoder.processor, max_prompt_tokens=20).encode(sample)


@every
def test_what_cannot_be_a_prompt(family: Family) -> None:
    """A placeholder that a user typed, more places than images: an error that names the sample."""
    token = family.encoder.tokenizer.convert_ids_to_tokens(family.model().config.image_token_id)
    for shape in ("text", "square"):
        with pytest.raises(InputError, match=f"sample {shape}: "):
            family.encoder.encode(families.sample(shape, f"what is {token}?"))
    with pytest.raises(InputError, match="placeholder"):
        family.encoder.response_ids(f"a {token}")
    sample = families.sample("two")
    with pytest.raises(InputError, match="2 image places in its messages, 1 images"):
        family.encoder.encode(dataclasses.replace(sample, images=sample.images[:1]))


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_all_end_tokens_of_a_checkpoint_count(family: Family, tmp_path: Path) -> None:
    family.encoder.processor.save_pretrained(tmp_path)
    assert Encoder.load(str(tmp_path)).eos_ids == family.encoder.eos_ids, "no generation config"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert Encoder.load(str(tmp_path)).eos_ids == (2, 0)


# --- hidden states, log-probs, gradients ------------------------------


@ways
def test_log_probs_and_gradients_equal_the_model_alone(family: Family, mode: str) -> None:
    """fp32, all parameters: images of other sizes, several images, text alone, prompts of other lengths."""
    model = family.model()
    found = tree.log_probs(model, tree.pack(model, family.rows, family.encoder.pad_id), sharing=mode)
    expected = families.alone(model, family.rows)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
    weight_tv = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)) / len(found)
    names, parameters = zip(*model.named_parameters(), strict=True)
    shared = torch.autograd.grad((found * weight_tv).sum(), parameters, allow_unused=True)
    separate = torch.autograd.grad((expected * weight_tv).sum(), parameters, allow_unused=True)
    largest = max(float(g.norm()) for g in separate if g is not None)
    assert sum(g is not None for g in separate) > 0.9 * len(names)
    for name, one, other in zip(names, shared, separate, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:  # a key's bias has gradient 0 up to rounding
            assert (one - other).norm() <= 2e-4 * other.norm() + 2e-6 * largest, name


@pytest.mark.parametrize("family", TREES, indirect=True)
def test_a_tree_bears_recomputed_layers(family: Family) -> None:
    """Gradient checkpointing changes neither log-probs nor gradients."""
    found = []
    for recompute in (False, True):
        model = family.model().train()
        if recompute:
            model.activation_checkpointing_enable()
        log_probs = tree.log_probs(model, tree.pack(model, family.rows, 0))
        log_probs.square().mean().backward()
        found.append([log_probs.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("family", ["qwen3_vl", "lfm2_vl"], indirect=True)
def test_adapters_of_peft(family: Family) -> None:
    """The wrapped model is used as it is: what its inner model says, gradients of adapters only."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(family.model(), config).eval()
    mode, _ = sharing.choose(model, family.encoder, family.rows[0])
    assert mode == ("prefix" if family.path.name == "lfm2_vl" else "tree")
    found = tree.log_probs(model, tree.pack(model, family.rows, 0), sharing=mode)
    inner = model.get_base_model()
    torch.testing.assert_close(found, families.alone(inner, family.rows), atol=5e-5, rtol=1e-4)
    found.square().mean().backward()
    assert {"lora_" in name for name, p in model.named_parameters() if p.grad is not None} == {True}
    plain = tree.log_probs(family.model(), tree.pack(inner, family.rows, 0), sharing=mode)
    assert (plain - found).abs().max() > 0.1


@every
def test_cached_features_equal_fresh_ones(family: Family) -> None:
    """Encoded one by one, joined, selected and passed back in another order of rows."""
    model = family.model()
    with torch.no_grad():
        parts = [tree.encode_images(model, [row[0].prompt]) for row in family.rows]
        order = [2, 0, 3, 1]
        batch = tree.pack(model, [family.rows[i] for i in order], family.encoder.pad_id)
        cached = tree.Features.join(parts).select(order)
        assert [len(x) for x in cached.tokens] == [
            row[0].prompt.ids.count(model.config.image_token_id) for row in batch.rows
        ]
        fresh = tree.hidden_states(model, batch, sharing="naive")
        torch.testing.assert_close(
            tree.hidden_states(model, batch, cached, sharing="naive"), fresh, atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", tree.MODES)
def test_windows_of_attention(family: Family, attention: str, mode: str) -> None:
    """A layer that sees the last 9 tokens sees them along the path, in every way of sharing."""
    model = _windowed(family, attention)
    with torch.no_grad():
        batch = tree.pack(model, family.rows, family.encoder.pad_id)
        found = tree.log_probs(model, batch, sharing=mode)
        torch.testing.assert_close(found, families.alone(model, family.rows), atol=5e-5, rtol=1e-4)
        plain = families.alone(family.model(), family.rows)
    assert (found - plain).abs().max() > 1e-2, "the window must matter"


def _windowed(family: Family, attention: str = "sdpa") -> Any:
    config = family.model().config
    text = config.text_config
    text.use_sliding_window, text.sliding_window = True, 9
    text.layer_types = ["full_attention", "sliding_attention"]
    return family.model(config=config, attn_implementation=attention)


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"], indirect=True)
def test_half_precision_and_eager_attention(family: Family) -> None:
    model = family.model(dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        batch = tree.pack(model, family.rows, family.encoder.pad_id)
        one, other = (tree.hidden_states(model, batch, sharing=mode) for mode in ("tree", "naive"))
    assert one.dtype == torch.bfloat16
    assert (one - other).float().norm() < 0.03 * other.float().norm()


@ways
def test_under_autocast(family: Family, mode: str) -> None:
    """fp32 weights, bf16 arithmetic, as training on a GPU does: near the fp32 values, with gradients."""
    model = family.model()
    batch = tree.pack(model, family.rows, family.encoder.pad_id)
    with torch.autocast("cpu", torch.bfloat16):
        found = tree.hidden_states(model, batch, sharing=mode)
    expected = tree.hidden_states(model, batch, sharing="naive").detach()
    assert (found.detach() - expected).norm() < 0.05 * expected.norm()
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["smolvlm", "internvl"], indirect=True)
def test_flex_attention_gets_the_same_mask(family: Family) -> None:
    """Uncompiled, on a CPU: what the mask says. The compiled kernel needs a GPU and is not proven here."""
    model = family.model(attn_implementation="flex_attention")
    torch.compiler.set_stance("force_eager")
    try:
        with torch.no_grad():
            found = tree.log_probs(model, tree.pack(model, family.rows, 0))
            drawn = sampled(family, model, family.rows, 1, "tree", greedy=True, max_new_tokens=4)
    finally:
        torch.compiler.set_stance("default")
    model = family.model()
    torch.testing.assert_close(found, families.alone(model, family.rows).detach(), atol=5e-5, rtol=1e-4)
    again = sampled(family, model, family.rows, 1, "tree", greedy=True, max_new_tokens=4)
    assert [s.ids for answer in drawn for s in answer] == [s.ids for answer in again for s in answer]


# --- drawing ----------------------------------------------------------


def sampled(family: Family, model: Any, rows: list[Row], count: int, mode: str, **options: Any) -> Any:
    eos = options.pop("eos_ids", family.encoder.eos_ids)
    return draw(
        model, rows, tree.encode_images(model, [row[0].prompt for row in rows]), count,
        Sampling(**options), torch.Generator().manual_seed(4), pad_id=family.encoder.pad_id, eos_ids=eos,
        sharing=mode,
    )  # fmt: skip


def generated(model: Any, group: Group, length: int) -> list[int]:
    """transformers' greedy ids; a placeholder is passed over, as it is here."""
    never = [model.config.image_token_id, *filter(None, [getattr(model.config, "video_token_id", None)])]
    given = families.inputs(model, group.prompt)
    out = model.generate(**given, max_new_tokens=length, do_sample=False, suppress_tokens=never)
    return out[0, len(group.prompt.ids) :].tolist()


@ways
def test_greedy_is_generates(family: Family, mode: str) -> None:
    model = family.model()
    model.generation_config.eos_token_id = eos = [family.encoder.eos_ids[0], 60, 61, 62]
    drawn = sampled(family, model, family.rows, 1, mode, greedy=True, max_new_tokens=8, eos_ids=eos)
    groups = [group for row in family.rows for group in row]
    for group, (found,) in zip(groups, drawn, strict=True):
        assert list(found.ids) == generated(model, group, 8)


@ways
def test_recorded_log_probs_score_again(family: Family, mode: str) -> None:
    """Raw log-probs of what was drawn equal the model alone on those ids; no response holds a placeholder.
    Many end tokens let responses leave the cache at different steps."""
    model = family.model()
    with torch.no_grad():
        drawn = sampled(
            family, model, family.rows, 3, mode,
            max_new_tokens=10, temperature=3.0, top_k=0, top_p=1.0, eos_ids=range(20, 60),
        )  # fmt: skip
        answers = iter(drawn)
        again = [[Group(g.prompt, tuple(s.ids for s in next(answers))) for g in row] for row in family.rows]
        found = families.alone(model, again)
    lengths = {len(s.ids) for answer in drawn for s in answer}
    assert len(lengths) > 3
    target = torch.tensor([i for answer in drawn for s in answer for i in s.ids])
    recorded = torch.tensor([value for answer in drawn for s in answer for value in s.log_probs])
    torch.testing.assert_close(recorded, found.gather(-1, target[:, None])[:, 0], atol=5e-5, rtol=1e-4)
    assert model.config.image_token_id not in target


@ways
def test_the_first_token_falls_as_generate_says(family: Family, mode: str) -> None:
    """800 draws against the processed distribution of transformers: within 4.5 sigma each."""
    model, count = family.model(), 800
    options: dict[str, Any] = {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.05, "temperature": 1.5}
    asked = Group(family.encoder.encode(families.sample("wide")))
    given = families.inputs(model, asked.prompt)
    scores = model.generate(
        **given, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
        suppress_tokens=[model.config.image_token_id], **options,
    ).scores  # fmt: skip
    expected = scores[0][0].softmax(-1)
    assert (expected > 0).sum() >= 3
    drawn = sampled(family, model, [[asked]], count, mode, max_new_tokens=1, **options)
    found = torch.bincount(torch.tensor([s.ids[0] for s in drawn[0]]), minlength=len(expected)) / count
    assert found[expected == 0].sum() == 0
    assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-6).all()


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("mode", tree.MODES)
def test_drawing_past_a_window(family: Family, mode: str) -> None:
    model = _windowed(family)
    drawn = sampled(family, model, family.rows, 1, mode, greedy=True, max_new_tokens=14)
    groups = [group for row in family.rows for group in row]
    for group, (found,) in zip(groups, drawn, strict=True):
        assert list(found.ids) == generated(model, group, 14)


def test_padding_sees_something_past_a_window() -> None:
    """A slot without a response keeps depth 0, so that its row of the softmax is never empty."""
    config = type("Text", (), {"sliding_window": 3, "layer_types": ["sliding_attention"]})
    config._attn_implementation = "sdpa"
    outer = type("Config", (), {"get_text_config": lambda self: config})
    model: Any = type("Model", (), {"config": outer(), "dtype": torch.float32})
    question, branch = torch.tensor([[0, tree.PADDING]]), torch.tensor([[0, 0]])
    key = torch.tensor([[tree.ROOT, tree.ROOT, 0, 0, 0, 0]])
    seen = tree.visible(question, branch, key, torch.zeros_like(key), causal=False)
    mask: Any = tree.attention_mask(model, seen, torch.tensor([[5, 0]]), torch.arange(6)[None])
    assert mask["sliding_attention"][0, 0].tolist() == [
        [False, False, False, True, True, True],
        [True, True, False, False, False, False],
    ]
    config.layer_types = ["chunked_attention"]
    with pytest.raises(NotImplementedError):
        tree.attention_mask(model, seen, seen, seen)


# --- choosing ---------------------------------------------------------


@every
def test_the_best_way_is_found(family: Family) -> None:
    """Attention shares a tree; short convolutions leak in one, and share a prefix."""
    model = family.model().train()
    for row in family.rows:
        mode, reason = sharing.choose(model, family.encoder, row)
        if family.path.name == "lfm2_vl":
            assert mode == "prefix" and "tree: " in reason and "a layer carries one branch" in reason
        else:
            assert mode == "tree" and "hidden states and gradients equal" in reason
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["lfm2_vl"], indirect=True)
def test_checkpointing_leaves_naive(family: Family) -> None:
    """Layers that are recomputed run without a cache; a frozen teacher may still share its prefix."""
    model = family.model()
    model.activation_checkpointing_enable()
    mode, reason = sharing.choose(model, family.encoder, family.rows[0])
    assert mode == "naive" and "gradient checkpointing drops the cache" in reason
    assert sharing.choose(model, family.encoder, family.rows[0], gradients=False)[0] == "prefix"
    batch = tree.pack(model.train(), family.rows, family.encoder.pad_id)
    with pytest.raises(TrainingError, match="gradient checkpointing"):
        tree.hidden_states(model, batch, sharing="prefix")
    expected = families.alone(model, family.rows)
    torch.testing.assert_close(tree.log_probs(model, batch, sharing="naive"), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["lfm2_vl"], indirect=True)
def test_a_cache_without_gradients_is_found(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states are right, the gradients are not: the probe must look at both."""
    before = tree.prefill

    def cut(*args: Any) -> tree.Prefilled:
        filled = before(*args)
        for layer in filled.cache.layers:
            for place, state in getattr(layer, "conv_states", {}).items():
                layer.conv_states[place] = state.detach()
        return filled

    monkeypatch.setattr(tree, "prefill", cut)
    model = family.model()
    mode, reason = sharing.choose(model, family.encoder, family.rows[0])
    assert mode == "naive" and "prefix: gradients differ" in reason
    assert sharing.choose(model, family.encoder, family.rows[0], gradients=False)[0] == "prefix"


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"], indirect=True)
def test_branches_that_start_wrong_are_found(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting tokens instead of positions: only the model's own positions pass the probe."""
    before = layout._prompt_positions

    def counted(model: Any, prompts: Any) -> Any:
        return before(model, prompts)[0], [len(prompt.ids) for prompt in prompts]

    monkeypatch.setattr(layout, "_prompt_positions", counted)
    mode, reason = sharing.choose(family.model(), family.encoder, family.rows[0])
    assert mode == "naive" and reason.count("differ from separate sequences") == 2


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_nothing_equal_is_an_error(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions off by one in whatever is batched: no mode passes, and the message says what was tried."""
    model = family.model()
    before = tree.hidden_states
    monkeypatch.setattr(tree, "hidden_states", lambda *a, **k: before(*a, **k).roll(1, 0))
    with pytest.raises(CheckpointError, match=r"tree: .*prefix: .*naive: "):
        sharing.choose(model, family.encoder, family.rows[0])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"], indirect=True)
def test_branches_go_on_after_the_largest_position(family: Family) -> None:
    """An image of 6 x 2 tokens takes 6 positions, so text goes on earlier than by counting tokens."""
    model = family.model()
    prompt = family.encoder.encode(families.sample("wide"))
    batch = tree.pack(model, [[Group(prompt, ((5, 6, 7), (8, 9, 10)))]], 0)
    start = int(batch.positions[:, 0, : len(prompt.ids)].max()) + 1
    assert start == len(prompt.ids) - 6
    fed = batch.positions[:, 0, len(prompt.ids) :]
    assert fed.tolist() == [[start, start + 1] * 2] * 3
