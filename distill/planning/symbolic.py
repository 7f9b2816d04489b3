"""A training step on tensors without values: what it keeps in memory, told by running its own code.

In: configurations, prompts, responses, settings. Out: bytes of each kind at the step's peak. Not here: how
many processes share them, disk, time (`distill/planning/plan.py`).

Weights are `FakeTensor`s: they have shapes and types, autograd and autocast treat them as real, and nothing
is computed or allocated. A dispatch mode sees every operation, and adds up the storages that are alive. So
what autograd saves, what checkpointing recomputes and what autocast copies is what the same code does in
training, for any model. Not seen: what one operation allocates inside itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from distill.forward import tree
from distill.forward.features import accepted
from distill.losses import heads
from distill.losses.signal import Head, LiveSignal
from distill.settings import Train
from distill.training.student import adapters_off, checkpointed, freeze, plain, with_lora


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and the most there ever were."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: dict[int, weakref.ref[Any] | None] = {}
        self._parameters: set[int] = set()
        self.casts = 0  # bytes of copies of known tensors in another type, alive
        for tensor in known:
            self._seen[tensor.untyped_storage()._cdata] = None
            self._parameters.add(tensor.untyped_storage()._cdata)

    def reset(self) -> None:
        """Begin a new peak."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        cast_of_known = func is torch.ops.aten._to_copy.default and self._is_parameter(args[0])
        for value in tree_iter(found):
            if isinstance(value, torch.Tensor):
                self._add(value, cast_of_known)
        return found

    def _is_parameter(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._parameters

    def _add(self, tensor: torch.Tensor, is_cast: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.bytes -= size
            self.casts -= size if is_cast else 0

        self._seen[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.casts += size if is_cast else 0
        self.peak = max(self.peak, self.bytes)


def empty_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A frozen model of this configuration whose tensors have no values."""
    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        model.tie_weights()
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def trainee(model: PreTrainedModel, train: Train) -> Any:
    """The student as training sets it up: frozen parts, checkpointing, adapters (`training/student.py`)."""
    model.requires_grad_(True)
    freeze(model, train.freeze)
    if train.gradient_checkpointing:
        checkpointed(model)
    model.train()
    if train.lora is None:
        return model
    mode = mode_of(model)
    with torch.device("meta"):
        adapted = with_lora(model, train.lora.rank, train.lora.alpha, train.lora.targets)
    for module in adapted.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.device.type == "meta":  # an adapter's
                with mode:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(weight.shape))
    return adapted


def mode_of(model: torch.nn.Module) -> FakeTensorMode:
    """The mode in which a model's tensors were made."""
    return cast(FakeTensor, next(model.parameters())).fake_mode


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct storages: tied weights count once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def weight_bytes(model: torch.nn.Module) -> int:
    """Parameters and buffers."""
    return tensor_bytes([*model.parameters(), *model.buffers()])


@dataclass(frozen=True)
class Step:
    """Bytes that a micro-batch adds to what lies in memory anyway, at its peak, and what they are.

    `activations` autograd keeps until the backward pass, `casts` of weights among them apart; `loss` is the
    most that the chunks of log-probs add; `working` the rest of the peak: gradients of activations, and what
    an operation needs beside its inputs. `teachers` is the peak of teachers' and reference's forwards.
    """

    peak: int
    activations: int
    casts: int
    loss: int
    working: int
    teachers: int
    tokens: int
    predicted: int


@dataclass(frozen=True)
class Beside:
    """A frozen model that the step asks, and its prompts for the student's rows."""

    model: PreTrainedModel
    rows: Sequence[tree.Row]


def micro_batch(
    student: Any,
    rows: Sequence[tree.Row],
    beside: Sequence[Beside],
    reference: Beside | None,
    train: Train,
    *,
    kind: str = "jsd",
    alpha: float = 0.1,
    reference_by_adapters: bool = False,
    accumulates: bool = True,
    cached_features: bool = False,
    pad_id: int = 0,
) -> Step:
    """Run a micro-batch, forward and backward, and tell what it keeps.

    `accumulates`: gradients of an earlier micro-batch are there (and are not counted here).
    `cached_features`: the vision part is frozen and its features come from a store.
    """
    bare, mode = plain(student), mode_of(student)
    trained = [p for p in student.parameters() if p.requires_grad]
    if accumulates:
        with mode:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
    models = [student, *(each.model for each in beside), *([reference.model] if reference else [])]
    known = [t for model in models for t in (*model.parameters(), *model.buffers())]
    known += [p.grad for p in trained if p.grad is not None]
    live = Live(known)
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16")
    with live:
        with bf16:
            signals = [_signal(each, mode, pad_id, train.sharing) for each in beside]
            teacher = signals[0] if signals else None
            said = None if reference is None else _signal(reference, mode, pad_id, train.sharing)
            if reference_by_adapters:
                with adapters_off(student):
                    said = _signal(Beside(bare, rows), mode, pad_id, train.sharing, cached_features)
            asked = live.peak
            live.reset()
            hidden_th, batch = _hidden(bare, rows, mode, pad_id, train.sharing, cached_features)
            activations, casts = live.bytes, live.casts
            forward = live.peak
            live.reset()
            terms = heads.token_terms(
                hidden_th, head_of(bare), batch.target_t, teacher, said, kind, alpha,
                chunk_tokens=train.chunk_tokens,
            )  # fmt: skip
        values = [terms.log_prob_t, terms.divergence_t, terms.reference_kl_t]
        with mode:
            loss = torch.stack([value.sum() for value in values if value is not None]).sum()
        loss_peak = live.peak
        del terms, values
        live.reset()
        loss.backward()
        backward = live.peak
    peak = max(asked, forward, loss_peak, backward)
    chunks = max(0, loss_peak - activations)
    rest = max(0, peak - activations - chunks)
    return Step(
        peak, activations - casts, casts, chunks, rest, asked, batch.ids_bl.numel(), len(batch.target_t)
    )


def head_of(model: PreTrainedModel) -> Head:
    """The LM head; factors on its logits change no memory worth telling."""
    return Head(cast(Any, model.get_output_embeddings()))


@torch.no_grad()
def _signal(
    beside: Beside, mode: FakeTensorMode, pad_id: int, sharing: str, cached: bool = False
) -> LiveSignal:
    hidden_th, _ = _hidden(beside.model, beside.rows, mode_of(beside.model), pad_id, sharing, cached)
    return LiveSignal(hidden_th, head_of(beside.model))


def _hidden(
    model: PreTrainedModel,
    rows: Sequence[tree.Row],
    mode: FakeTensorMode,
    pad_id: int,
    sharing: str,
    cached: bool,
) -> tuple[torch.Tensor, tree.Batch]:
    """What `tree.hidden_states` does for a tree, but for the model's own search for image placeholders, which
    depends on values: features are put in place by the same operation."""
    base = cast(Any, model.base_model)
    batch = tree.pack(model, rows if sharing != tree.NAIVE else _alone(rows), pad_id)
    images = [] if cached else _features(base, batch.rows)
    embedded = base.get_input_embeddings()(batch.ids_bl)
    if images:
        flat = torch.cat([x.flatten(0, -2) for x in images]).to(embedded.dtype)
        place = batch.ids_bl == tree.image_token(model)
        embedded = embedded.masked_scatter(place[..., None].expand_as(embedded), flat)
    batch = replace(
        batch,
        question_bl=mode.from_tensor(batch.question_bl),
        response_bl=mode.from_tensor(batch.response_bl),
        depth_bl=mode.from_tensor(batch.depth_bl),
    )
    hidden = base.get_decoder()(
        inputs_embeds=embedded,
        attention_mask=tree.attention_mask(model, batch.visible, batch.depth_bl, batch.depth_bl),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    return hidden[batch.row_t, batch.place_t], batch


def _features(base: Any, rows: Sequence[tree.Row]) -> list[torch.Tensor]:
    prompts = [row[0].prompt for row in rows]
    inputs = [accepted(base.get_image_features, prompt) for prompt in prompts]
    names = {name for found in inputs for name in found}
    if not names:
        return []
    joined = {name: torch.cat([found[name] for found in inputs if name in found]) for name in names}
    found = base.get_image_features(**joined, return_dict=True).pooler_output
    return [found] if isinstance(found, torch.Tensor) else list(found)


def _alone(rows: Sequence[tree.Row]) -> list[tree.Row]:
    """Every response as a row of its own."""
    return [
        [tree.Group(group.prompt, (response,))]
        for row in rows
        for group in row
        for response in group.responses
    ]


def try_or_none(call: Callable[[], Step]) -> tuple[Step | None, str]:
    """A step, or why its model cannot be run without values (routing of experts depends on them)."""
    try:
        return call(), ""
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
