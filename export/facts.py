"""What every format and precision of one checkpoint shares: read, claims proved, the reference, its answers.

In: a checkpoint, pictures, a plan. Out: `Facts`. Not here: writing any format (`onnx.py`, `static_bundle.py`,
`gguf.py`, `coreml.py`), manifests (`draft.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from evals.parity.parity import ParityCase
from evals.torch_session import TorchSession
from export import calibrate, gate, gate_expected, limits, prompts, proof, static
from export.checkpoint import Checkpoint, first_line
from export.families import Family, family_of, without_tiles
from export.gate_cases import GateReference
from export.gate_expected import Expected
from export.graphs import trace_all
from export.static_decoder import StaticSizes
from export.targets import Plan
from runtime.errors import CheckpointError, PocketError
from runtime.image import ImageInput
from runtime.image_spec import ImageSpec
from runtime.prompt_spec import PromptSpec
from runtime.session import usual_context

Progress = Callable[[str], None]
"""Called with one line at the start of every step."""


@dataclass(frozen=True)
class Facts:
    """What every precision of one checkpoint shares.

    `geometry`: the image section that the checkpoint's processor follows; another than `image` only where a
    static plan gives pictures of any size one size.
    """

    checkpoint: Checkpoint
    family: Family
    image: ImageSpec
    prompt: PromptSpec
    graphs: Mapping[str, ir.Model]
    reference: TorchSession
    cases: Sequence[ParityCase]
    say: Progress
    images: int = 1
    notes: tuple[str, ...] = ()
    changed: Mapping[str, bool | int] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)
    context: int = 0
    geometry: ImageSpec | None = None
    examples: Sequence[ParityCase] = ()
    """What calibrated schemes look at; the gate's cases when there is none."""
    expected: Expected | None = None
    """What the gate compares with; None where a format has a gate of its own over the live reference."""


def prepare(
    checkpoint: Checkpoint,
    samples: Sequence[ImageInput],
    say: Progress,
    *,
    image_required: bool = False,
    plan: Plan | None = None,
    examples: Sequence[calibrate.Example] = (),
    trace: bool = True,
    expect: bool = True,
) -> Facts:
    """Trace the float32 graphs (unless a format needs none) and record what the reference answers.

    Without `plan.split_images` a checkpoint that cuts pictures into tiles is taken without them, and its
    reference too. A conversation takes at most `plan.max_images` pictures, fewer where the context ends.
    """
    plan = plan or Plan()
    changed = {} if plan.split_images else without_tiles(checkpoint)
    family = family_of(checkpoint)
    if plan.static and trace:
        static.check_decoder(family.decoder_shape(checkpoint))
    changed |= limits.hold(checkpoint, family, plan.max_image_tokens)
    geometry = limits.narrowed(family.image(checkpoint), plan.max_image_tokens)
    prompt = family.prompt(checkpoint)
    image = static.fixed_views(geometry, plan.max_image_tokens) if plan.static else geometry
    if image_required:
        prompt = prompt.model_copy(update={"user_without_image": None})
    context = limits.context(checkpoint, family, image, plan.max_context)
    room = limits.most_pictures(image, context, fixed=plan.static)
    _check_ids(checkpoint)
    # before the costly steps; the gate repeats it on the written tokenizer
    with _running(checkpoint):
        claims = proof.settle(checkpoint, prompt, geometry, min(plan.max_images, room))
    prompt = claims.prompt
    notes = (*checkpoint.notes, *claims.notes, *prompts.day_note(checkpoint), *_generation_note(checkpoint))
    if plan.static and room < plan.max_images:
        notes += (
            f"at most {room} of {plan.max_images} pictures in a conversation: each takes {image.max_tokens} "
            f"of {context} tokens; more fit with fewer --max-image-tokens",
        )
    for note in notes:
        say(f"note: {note}")
    kind = GateReference if image == geometry else limits.presized(image)
    reference = kind(checkpoint.path, model=checkpoint.model, processor=checkpoint.processor)
    if not reference.stop_ids:
        raise CheckpointError(
            f"{checkpoint.path}: generation_config.json has no eos_token_id: an answer would not end; add it"
        )
    say("reference answers")
    with _running(checkpoint):
        cases = gate.make_cases(
            reference,
            samples,
            text_only=prompt.user_without_image is not None,
            images=claims.images,
        )
    _check_room(cases, reference, context)
    expected = None
    if expect:
        room = usual_context(context, image.max_tokens)
        expected = gate_expected.record(reference, cases, prompt, claims.images, room)
    if not trace:
        graphs = {}
    elif plan.static:
        say("tracing the parts")
        graphs = static.trace_all(checkpoint, family, image, StaticSizes(context, plan.chunk, plan.masked))
    else:
        say("tracing the parts")
        graphs = trace_all(checkpoint, family)
    return Facts(
        checkpoint,
        family,
        image,
        prompt,
        graphs,
        reference,
        cases,
        say,
        images=claims.images,
        notes=notes,
        changed=changed,
        plan=plan,
        context=context,
        geometry=geometry,
        examples=calibrate.answered(reference, examples),
        expected=expected,
    )


def _check_ids(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError when a question can have an id for which there is no embedding."""
    rows = len(checkpoint.model.get_input_embeddings().weight)
    beyond = {text: i for text, i in checkpoint.tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        text = min(beyond, key=beyond.__getitem__)
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {len(beyond)} tokens beyond the {rows} embeddings (first: "
            f"{text!r}, id {beyond[text]}), and a question with one has no answer; call "
            "resize_token_embeddings before training, or take the base model's tokenizer"
        )


def _check_room(cases: Sequence[ParityCase], reference: TorchSession, context: int) -> None:
    """Raises CheckpointError when an ordinary photo does not fit into the context."""
    for case in cases:
        tokens = sum(reference.prepare(each).tokens for each in case.images)
        if len(case.images) == 1 and tokens + limits.LEAST_TOKENS > context:
            raise CheckpointError(
                f"{reference.path}: a picture of the gate ({case.name}) takes {tokens} tokens, the context "
                f"is {context}; give --max-image-tokens {max(1, context // 2)} or fewer"
            )


@contextlib.contextmanager
def _running(checkpoint: Checkpoint) -> Iterator[None]:
    """What transformers raises in this block is the checkpoint's fault, told in one line."""
    try:
        yield
    except PocketError:
        raise
    except Exception as error:  # of any class: a shape, a type, an index
        raise CheckpointError(
            f"{checkpoint.path}: transformers cannot answer with it: {first_line(error)}; "
            "correct its configuration"
        ) from error


_CHOICES = {
    **dict.fromkeys(("repetition_penalty", "num_beams", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "min_new_tokens", "min_length", "stop_strings"), None),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"), None),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), None),
}
"""Settings of generation_config.json that change which token is taken, with what they are otherwise."""
_SAMPLING = {"temperature": 1, "top_k": None, "top_p": 1, "min_p": None, "typical_p": 1}
"""Those that do when `do_sample` is on."""


def _generation_note(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What generation_config.json asks for beyond the best token, which a session must be told."""
    own = checkpoint.model.generation_config
    known = {"do_sample": False, **_CHOICES, **_SAMPLING} if own.do_sample else _CHOICES
    found = {name: getattr(own, name, None) for name in known}
    asked = [f"{name} {value}" for name, value in found.items() if value and value != known[name]]
    if not asked:
        return ()
    listed = ", ".join(asked)
    return (
        f"generation_config.json asks for {listed}; a session takes the best token unless asked for more",
    )


def expected_of(facts: Facts) -> Expected:
    """What the checkpoint answers, which `prepare` recorded."""
    assert facts.expected is not None
    return facts.expected
