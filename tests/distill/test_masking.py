"""Masks: exact counts, nesting, bitwise restore, which tensors, the schedule and the choice of r_max."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distill.masks import magnitudes, masking
from distill.masks.masking import Masker, Rule
from runtime.errors import CheckpointError
from tests.distill.peak import Peak

RATIOS = st.integers(0, 50).map(lambda percent: percent / 100)


class Toy(nn.Module):
    """The few methods of a model that masking asks for: a vision part, a decoder, embeddings and a head."""

    def __init__(self, weight: torch.Tensor | None = None, *, tied: bool = False) -> None:
        super().__init__()
        self.vision = nn.ModuleDict({"patch": nn.Conv2d(3, 4, 2), "place": nn.Embedding(5, 4)})
        self.words = nn.Embedding(7, 4)
        self.decoder = nn.ModuleDict(
            {"up": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "down": nn.Linear(6, 4)}
        )
        self.head = nn.Linear(4, 7)
        if tied:
            self.head.weight = self.words.weight
        if weight is not None:
            self.decoder["up"] = nn.Linear(1, 1)
            self.decoder["up"].weight = nn.Parameter(weight.clone())
        self.base_model = SimpleNamespace(get_decoder=lambda: self.decoder)
        self.config = SimpleNamespace(name_or_path="toy")

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.words


def toy(weight: torch.Tensor | None = None, **options: bool) -> Any:
    torch.manual_seed(0)
    return Toy(weight, **options)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Many ties (few distinct values, both signs and both zeros) or none, in three precisions."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    size = draw(st.integers(1, 70))
    value = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0]) | st.floats(-3, 3, width=16)
    return torch.tensor(draw(st.lists(value, min_size=size, max_size=size)), dtype=dtype)[:, None]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@settings(max_examples=80, deadline=None)
@given(weights(), st.lists(RATIOS, min_size=1, max_size=6))
def test_counts_order_and_restore(weight: torch.Tensor, ratios: list[float]) -> None:
    """Against the definition: a stable sort by magnitude, whatever ratio was in force before."""
    model = toy(weight)
    masker = Masker(model, max(ratios), only="decoder.up.weight")
    held = model.decoder["up"].weight.data
    order = weight.flatten().abs().argsort(stable=True)
    for ratio in ratios:
        masker.set(ratio)
        expected = weight.flatten().clone()
        expected[order[: math.floor(Fraction(str(ratio)) * weight.numel())]] = 0
        assert torch.equal(bits(held.flatten()), bits(expected))
        assert masker.sparsity == pytest.approx(int((expected == 0).sum()) / weight.numel())
    masker.set(0.0)
    assert torch.equal(bits(held), bits(weight))


@settings(max_examples=40, deadline=None)
@given(weights(), RATIOS, RATIOS)
def test_masks_nest(weight: torch.Tensor, first: float, second: float) -> None:
    kept = []
    for ratio in sorted((first, second)):
        model = toy(weight)
        Masker(model, 0.5, only="decoder.up.weight").set(ratio)
        kept.append(bits(model.decoder["up"].weight.data) != 0)
    assert not (kept[1] & ~kept[0]).any(), "what the larger ratio keeps, the smaller one keeps too"


def test_the_threshold_is_each_tensors_own() -> None:
    """A tensor of tiny weights loses the same share as one of large weights."""
    model = toy()
    with torch.no_grad():
        model.decoder["up"].weight.mul_(1e-6)
    Masker(model, 0.25).set(0.25)
    for name in ("up", "down"):
        assert int((model.decoder[name].weight == 0).sum()) == 24 // 4


@pytest.mark.parametrize("ratio", [0.29, 0.57, 0.58, 0.07, 0.14, 0.55])
def test_the_count_is_that_of_the_written_decimal(ratio: float) -> None:
    """0.29 * 100 is 28.999999999999996 in floats; 29 weights are masked, also at r_max itself."""
    model = toy(torch.arange(1.0, 101.0)[:, None])
    masker = Masker(model, ratio, only="decoder.up.weight")
    masker.set(ratio)
    assert masker.sparsity == round(ratio * 100) / 100


@pytest.mark.parametrize(("dtype", "bit"), [(torch.float32, 1 / 32), (torch.bfloat16, 1 / 16)])
def test_memory_kept_aside(dtype: torch.dtype, bit: float) -> None:
    """METHOD 1: at most r_max + 1/16 of the weights' bytes."""
    weight = torch.randn(300, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    masker = Masker(toy(weight), 0.2, only="decoder.up.weight")
    assert masker.weight_bytes == weight.nbytes
    assert masker.kept_bytes == pytest.approx((0.2 + bit) * weight.nbytes, rel=1e-6)
    storage = {t.untyped_storage().nbytes() for k in masker._kept for t in (k.values, k.bits)}
    assert sum(storage) == masker.kept_bytes, "no view that keeps a larger tensor alive"


def test_which_tensors_by_default() -> None:
    assert set(masking.maskable(toy())) == {"decoder.up.weight", "decoder.down.weight"}


def test_kinds() -> None:
    vision = {"vision.patch.weight"}
    embeddings = {"vision.place.weight", "words.weight"}
    assert set(masking.maskable(toy(), (masking.VISION,))) == vision
    assert set(masking.maskable(toy(), (masking.EMBEDDINGS,))) == embeddings
    assert "head.weight" not in masking.maskable(toy(), ("language", "vision", "embeddings"))
    with pytest.raises(ValueError, match=r"unknown tensors \['norms'\]; known: language, vision, embeddings"):
        masking.maskable(toy(), ("language", "norms"))


def test_tied_embeddings_are_the_head() -> None:
    assert "words.weight" not in masking.maskable(toy(tied=True), (masking.EMBEDDINGS,))


def test_a_shared_weight_is_masked_once() -> None:
    model = toy()
    model.decoder["again"] = nn.Linear(4, 6)
    model.decoder["again"].weight = model.decoder["up"].weight
    assert set(masking.maskable(model)) == {"decoder.up.weight", "decoder.down.weight"}


def test_everything_else_is_untouched_in_a_real_model(tiny_model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    masker = Masker(tiny_model, 0.5)
    masker.set(0.5)
    after = tiny_model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert changed == {
        f"model.text_model.layers.{layer}.{part}.{name}.weight"
        for layer in (0, 1)
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in (f"{short}_proj" for short in names)
    }
    assert {name.split(".")[-2] for name in changed} == projections
    assert masker.sparsity == 0.5
    masker.set(0)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())


def test_refusals() -> None:
    quantised = toy()
    quantised.hf_quantizer = object()
    with pytest.raises(CheckpointError, match="toy: a quantised teacher cannot be masked"):
        Masker(quantised, 0.2)
    masker = Masker(toy(), 0.2)
    for ratio in (0.25, -0.1, math.nan):
        with pytest.raises(ValueError, match="larger r_max"):
            masker.set(ratio)
    for r_max in (1.0, -0.1):
        with pytest.raises(ValueError, match="must be in"):
            Masker(toy(), r_max)


def test_the_papers_schedule() -> None:
    """Sec. 3.2: r_max 0.2 and s 0.05 give five stages."""
    assert masking.schedule(0.2, 0.05) == (0.2, 0.15, 0.1, 0.05, 0.0)
    assert masking.schedule(0.4, 0.1) == (0.4, 0.3, 0.2, 0.1, 0.0)
    assert masking.schedule(0.0, 0.05) == (0.0,)
    with pytest.raises(ValueError, match="r_max"):
        masking.schedule(1.0, 0.1)
    with pytest.raises(ValueError, match="step"):
        masking.schedule(0.2, 0.0)


def test_a_step_that_does_not_divide_still_ends_at_the_full_teacher() -> None:
    assert masking.schedule(0.25, 0.1) == (0.25, 0.15, 0.05, 0.0)
    assert masking.schedule(0.3, 0.3 / 4) == (0.3, 0.225, 0.15, 0.075, 0.0)


@pytest.mark.parametrize(("r_max", "step"), [(0.2, 0.05), (0.4, 0.05), (0.3, 0.1), (0.4, 0.1), (0.0, 0.1)])
def test_schedule_is_equation_3(r_max: float, step: float) -> None:
    """r[i] = r_max - s * floor(i * M / I) in exact arithmetic, by equal shares of the steps."""
    exact_max, exact_step = Fraction(str(r_max)), Fraction(str(step))
    stages = exact_max / exact_step + 1
    total = int(12 * stages)
    formula = [float(exact_max - exact_step * math.floor(i * stages / total)) for i in range(total)]
    assert formula == [ratio for ratio in masking.schedule(r_max, step) for _ in range(12)]


def test_choosing_r_max() -> None:
    curve = [(0.0, 0.95), (0.1, 0.96), (0.2, 0.94), (0.3, 0.925), (0.4, 0.91), (0.5, 0.4)]
    assert masking.choose_r_max(curve) == 0.3
    assert masking.choose_r_max(curve, most_lost=0.05) == 0.4
    assert masking.choose_r_max([(0.0, 0.9), (0.1, 0.5)]) == 0.0
    assert masking.choose_r_max([(0.4, 0.3), (0.0, 0.5), (0.2, 0.5)]) == 0.2, "in any order"


def test_inert_masks() -> None:
    assert masking.is_inert([(0.0, 0.99), (0.3, 0.985), (0.5, 0.985), (0.6, 0.7)])
    assert not masking.is_inert([(0.0, 0.99), (0.3, 0.97), (0.5, 0.99)])


@settings(max_examples=40, deadline=None)
@given(weights(), st.integers(1, 9), RATIOS)
def test_pieces_give_what_the_whole_gives(weight: torch.Tensor, eighths: int, ratio: float) -> None:
    """Bits, values and ties carried from piece to piece."""
    order = weight.flatten().abs().argsort(stable=True)
    expected = weight.flatten().clone()
    expected[order[: math.floor(Fraction(str(ratio)) * weight.numel())]] = 0
    model = toy(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magnitudes, "PIECE", 8 * eighths)
        masker = Masker(model, max(ratio, 0.5), only="decoder.up.weight")
        masker.set(0.5)
        masker.set(ratio)
        assert torch.equal(bits(model.decoder["up"].weight.data.flatten()), bits(expected))
        masker.set(0.0)
    assert torch.equal(bits(model.decoder["up"].weight.data), bits(weight))


def test_large_tensors_and_no_second_copy() -> None:
    """Far more than the 16M elements of torch.quantile, every value a tie of many; the peak of building and
    masking is what is kept plus a fixed piece, well below another copy of the weights."""
    count = 120_000_001
    weight = torch.arange(count, dtype=torch.int32).remainder_(2**14).to(torch.int16).view(torch.bfloat16)
    held = weight[:, None]
    model = toy()
    model.decoder["up"].weight = torch.nn.Parameter(held)
    with Peak() as made:
        masker = Masker(model, 0.2, only="decoder.up.weight")
        masker.set(0.2)
        masker.set(0.1)
    assert masker.kept_bytes <= (0.2 + 1 / 16) * held.nbytes + 1
    assert made.peak < masker.kept_bytes + 10 * magnitudes.PIECE < held.nbytes / 2
    (measured,) = masker.measure()
    always_zero = -(-count // 2**14)
    assert measured.zeros == max(count // 10, always_zero) and measured.count == count


def test_rules_in_order() -> None:
    """The first rule that fits decides; a scale multiplies the ratio, None leaves the tensor alone."""
    rules = (Rule("decoder.down.*", 0.5), Rule("decoder.*"), Rule("vision.*", None))
    model = toy()
    kinds = (masking.LANGUAGE, masking.VISION)
    masker = Masker(model, 0.5, kinds, rules=rules)
    masker.set(0.5)
    assert {x.name: (x.zeros, x.count) for x in masker.measure()} == {
        "decoder.up.weight": (12, 24),
        "decoder.down.weight": (6, 24),
    }
    masker.set(0)
    assert masker.sparsity == 0
    with pytest.raises(
        CheckpointError, match=r"'decoder.dwon.\*' fits no weight; names look like decoder.up"
    ):
        Masker(model, 0.5, rules=[Rule("decoder.dwon.*")])
    with pytest.raises(ValueError, match=r"2.0 times r_max 0.5 is not below 1 for decoder.up.weight"):
        Masker(model, 0.5, rules=[Rule("*", 2.0)])
    with pytest.raises(CheckpointError, match="toy: no weights of language to mask"):
        Masker(model, 0.5, rules=[Rule("*", None)])


def test_masked_on_the_way_to_another_ratio_only_by_the_masker() -> None:
    """Measured zeros, not asked ones: weights that were zero before count too."""
    weight = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])[:, None]
    masker = Masker(toy(weight), 0.2, only="decoder.up.weight")
    masker.set(0.2)
    assert masker.sparsity == 0.3


@pytest.fixture(scope="module")
def experts() -> Any:
    """A tiny mixture of experts with its stacks in bare parameters."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 16,
        "patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision)).eval()


def test_stacked_experts_and_routers_are_language_weights(experts: Any) -> None:
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if "experts" in name or "mlp.gate" in name:
                parameter.normal_()
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    masker = Masker(experts, 0.5)
    masker.set(0.5)
    halved = {x.name for x in masker.measure() if x.share == 0.5}
    layers = [f"model.language_model.layers.{i}" for i in (0, 1)]
    moe = {
        f"{at}.mlp.{x}" for at in layers for x in ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    }
    attention = {f"{at}.self_attn.{x}_proj.weight" for at in layers for x in "qkvo"}
    assert halved == moe | attention
    changed = {n for n, tensor in experts.state_dict().items() if not torch.equal(before[n], tensor)}
    assert changed == halved
    masker.set(0)
    assert all(torch.equal(before[n], tensor) for n, tensor in experts.state_dict().items())


def test_an_unknown_matrix_is_refused_until_a_rule_names_it() -> None:
    model = toy()
    model.decoder["mix"] = nn.Module()
    model.decoder["mix"].table = nn.Parameter(torch.ones(5, 6))
    with pytest.raises(CheckpointError, match=r"decoder.mix.table: \(5, 6\) in Module is no linear layer"):
        Masker(model, 0.2)
    assert "decoder.mix.table" in masking.maskable(model, rules=[Rule("*.table", 1.0)])
    assert "decoder.mix.table" not in masking.maskable(model, rules=[Rule("*.table", None)])


def test_weights_that_cannot_be_masked_in_place() -> None:
    def refused(weight: torch.Tensor, message: str) -> None:
        model = toy()
        model.decoder["up"].weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(CheckpointError, match=rf"decoder.up.weight: .*{message}"):
            Masker(model, 0.2)

    refused(torch.ones(6, 4, device="meta"), "not in memory")
    refused(torch.ones(6, 4).to(torch.float8_e4m3fn), "float8_e4m3fn cannot be masked")
    refused(torch.ones(4, 6).T, "make it contiguous")
    model = toy()
    model.decoder["up"].weight.ds_id = 3
    with pytest.raises(
        CheckpointError, match=r"decoder.up.weight: masking under DeepSpeed ZeRO-3 is not sup"
    ):
        Masker(model, 0.2)
