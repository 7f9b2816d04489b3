"""Heads found on models: with a factor or a soft cap on the logits, whatever the configuration calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from distill.losses.lm_head import Head
from runtime.errors import CheckpointError

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 50, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def text_model(model_type: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **more})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("model_type", "more", "scale", "cap"),
    [
        ("granite", {"logits_scaling": 4.0}, 0.25, None),  # divides
        ("cohere", {"logit_scale": 0.0625}, 0.0625, None),  # multiplies
        ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 7.0}, 1.0, 3.0),
        ("llama", {}, 1.0, None),
    ],
)
def test_the_models_own_logits(
    model_type: str, more: dict[str, Any], scale: float, cap: float | None
) -> None:
    model = text_model(model_type, **more)
    head = Head.of(model)
    assert (head.scale, head.softcap) == (pytest.approx(scale), cap)
    ids = torch.randint(3, 50, (1, 9))
    with torch.no_grad():
        found = head.logits(model.base_model(input_ids=ids).last_hidden_state[0])
        torch.testing.assert_close(found, model(input_ids=ids).logits[0])


def test_probing_leaves_the_mode_alone() -> None:
    model = text_model("granite", logits_scaling=4.0).train()
    assert Head.of(model).scale == 0.25 and model.training


def test_logits_that_are_something_else() -> None:
    model = text_model("granite", logits_scaling=4.0)
    model.config.logits_scaling = 3.0
    plain = model.forward

    def squared(**inputs: Any) -> Any:
        out = plain(**inputs)
        out.logits = out.logits**2
        return out

    model.forward = squared
    with pytest.raises(CheckpointError, match="no scaled or soft-capped output of its head"):
        Head.of(model)


def test_a_vision_language_model(tiny_checkpoint: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    head = Head.of(model)
    assert head.linear is model.get_output_embeddings() and head.vocab == head.linear.out_features
    assert (head.scale, head.softcap) == (1.0, None)


def test_what_must_be_called_as_a_module() -> None:
    class Child(nn.Linear):
        pass

    assert Head(nn.Linear(2, 3)).linear is not None
    assert Head(Child(2, 3)).linear is None
    partitioned = nn.Linear(2, 3)
    partitioned.weight = nn.Parameter(torch.zeros(0))  # as ZeRO-3 leaves it between uses
    assert Head(partitioned).linear is None
    moved = nn.Linear(2, 3)
    moved.forward = moved.forward  # type: ignore[method-assign]  # as device hooks replace it
    assert Head(moved).linear is None
