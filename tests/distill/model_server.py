"""Answers of a real (tiny) model in the form that vLLM documents, for a server of `tests/faults.py`.

It knows neither our packing nor our drawing: transformers' generate draws, and one forward over the whole
sequence gives the raw log-probs.
"""

from __future__ import annotations

import base64
import io
import threading
from typing import Any

import torch
from PIL import Image

from tests.faults import Answer, completion


def vllm_answers(model: Any, processor: Any) -> Answer:
    """Chat completions with `n`, seeds, `token_ids` and raw log-probs of every token."""

    one_at_a_time = threading.Lock()

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        with one_at_a_time, torch.no_grad():
            return alone(body)

    def alone(body: dict[str, Any]) -> dict[str, Any]:
        inputs = processor.apply_chat_template(
            [{**turn, "content": [_part(part) for part in turn["content"]]} for turn in body["messages"]],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        torch.manual_seed(body.get("seed") or 0)
        how: dict[str, Any] = {"do_sample": False}
        if body["temperature"]:
            how = {"do_sample": True, "temperature": body["temperature"], "top_p": body["top_p"]}
            how.update(top_k=max(body["top_k"], 0), repetition_penalty=body["repetition_penalty"])
        count, start = body["n"], inputs["input_ids"].shape[1]
        how.update(num_return_sequences=count, suppress_tokens=[processor.image_token_id])
        drawn = model.generate(**inputs, max_new_tokens=body["max_tokens"], **how)
        choices = [_choice(model, processor.tokenizer, inputs, row[start:].tolist()) for row in drawn]
        whole = completion([choice.pop("text") for choice in choices])
        for told, choice in zip(whole["choices"], choices, strict=True):
            told.update(choice)
        return whole

    return answer


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image_url":
        return part
    data = part["image_url"]["url"].partition("base64,")[2]
    return {"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(data)))}


def _choice(model: Any, tokenizer: Any, inputs: Any, ids: list[int]) -> dict[str, Any]:
    end = tokenizer.eos_token_id
    finished = end in ids
    ids = ids[: ids.index(end) + 1] if finished else ids
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    for key, value in rest.items():
        if key.endswith("token_type_ids"):
            rest[key] = torch.cat([value, torch.zeros(1, len(ids), dtype=value.dtype)], 1)
    logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), **rest).logits[0]
    log_probs = logits.log_softmax(-1)[len(whole[0]) - len(ids) - 1 : -1]
    content = [
        {"token": f"token_id:{token}", "logprob": float(row[token]), "bytes": None, "top_logprobs": []}
        for token, row in zip(ids, log_probs, strict=True)
    ]
    return {
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "finish_reason": "stop" if finished else "length",
        "token_ids": ids,
        "logprobs": {"content": content},
    }
