"""Which way of prefix sharing is cheapest for questions of a shape."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from distill.forward.sharing import Shape, by_cost
from distill.forward.tree import NAIVE, PREFIX, TREE


def test_long_responses_go_to_the_prefix_cache(tiny_model: PreTrainedModel) -> None:
    """A tree attends over all pairs of its tokens, a prefix cache over those that are seen."""
    assert by_cost(tiny_model, Shape(40, 6, 6))[0] == TREE
    assert by_cost(tiny_model, Shape(1000, 8, 300))[0] == PREFIX


def test_a_single_response_shares_nothing(tiny_model: PreTrainedModel) -> None:
    assert by_cost(tiny_model, Shape(100, 1, 50))[0] in (TREE, NAIVE)


@pytest.mark.parametrize("responses", [2, 8])
def test_naive_is_last_once_a_prompt_is_shared(tiny_model: PreTrainedModel, responses: int) -> None:
    assert by_cost(tiny_model, Shape(500, responses, 30))[-1] == NAIVE
