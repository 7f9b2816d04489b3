"""The checkpoint itself as a session: the reference that bundles are compared with.

In: a Hugging Face checkpoint directory. Out: `TorchSession`, with the methods of `runtime.session.Session`,
on transformers and the checkpoint's own processor. Not here: comparing (`parity.py`), exporting.
Uses only the general API of transformers, no family's names.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from runtime.answer import History, Sources, Turn, sources_of, turns_of
from runtime.answering import Answering
from runtime.errors import CheckpointError, InputError, MissingExtra
from runtime.image import ImageFeatures, ImageInput, PreparedImage, View

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]


@dataclass(frozen=True)
class TorchImage(PreparedImage):
    """A picture as the processor made it: `source` for the template, `inputs` for the model.

    Its one view holds the processor's tensors as they are; cutting them into views is the bundle's matter.
    """

    source: Any = None
    inputs: dict[str, Any] = field(default_factory=dict)
    count: int = 0

    @property
    def tokens(self) -> int:
        return self.count


@dataclass(frozen=True)
class TorchFeatures(ImageFeatures):
    """`output`: what the model's `get_image_features` gave, to be given back to the model."""

    output: Any = None


class TorchSession(Answering):
    """Answers with transformers in float32 on the CPU. One sequence at a time, like a bundle's session."""

    def __init__(self, checkpoint: Path | str, *, model: Any = None, processor: Any = None) -> None:
        """Open a directory, or wrap an already loaded model and processor of it.

        Raises CheckpointError when it cannot be loaded, MissingExtra without transformers.
        """
        super().__init__()
        start = time.perf_counter()
        self.path = Path(checkpoint)
        if model is None or processor is None:
            model, processor = _load(self.path)
        self.model, self.processor = model, processor
        self._image_token = int(model.config.image_token_id)
        self._cache: Any = None
        self._length = 0
        self._prompts: dict[tuple[int, ...], dict[str, Any]] = {}
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self.load_ms = (time.perf_counter() - start) * 1e3

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, from the generation configuration."""
        stop = self.model.generation_config.eos_token_id
        return tuple(stop) if isinstance(stop, (list, tuple)) else () if stop is None else (int(stop),)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's."""
        return self.processor.tokenizer.backend_tokenizer

    # --- steps --------------------------------------------------------

    def prepare(self, source: ImageInput) -> TorchImage:
        """What the checkpoint's processor makes of a picture; a path or bytes count as a file."""
        if isinstance(source, bytes):
            source = self._as_file(source)
        picture = source if isinstance(source, Image.Image) else str(source)
        found = self._template([_message("", [picture])])
        inputs = {k: found[k] for k in self.processor.image_processor.model_input_names if k in found}
        tokens = int((found["input_ids"] == self._image_token).sum())
        view = View({name: value.numpy() for name, value in inputs.items()}, (1, tokens))
        return TorchImage((view,), (0, 0), picture, inputs, tokens)

    def encode_image(self, prepared: PreparedImage) -> TorchFeatures:
        """Features float32 by the model's own `get_image_features`."""
        import torch

        if not isinstance(prepared, TorchImage):
            raise InputError("encode_image: takes what this session's prepare gave")
        with torch.no_grad():
            found = self.model.get_image_features(**prepared.inputs, return_dict=True)
        tokens = _flat(found.pooler_output)
        levels = getattr(found, "deepstack_features", None) or ()
        return TorchFeatures(
            tokens.float().numpy(),
            tuple(view.grid for view in prepared.views),
            torch.stack([_flat(level) for level in levels]).float().numpy() if levels else None,
            output=found,
        )

    def prompt_ids(
        self, question: str, images: Sequence[PreparedImage], history: Sequence[Turn] = ()
    ) -> TokenIds:
        """Ids (prompt,) from the chat template; an answer's ids of `history` become text for it."""
        messages = []
        for turn in history:
            messages += [_message(turn.question, _sources(turn.images)), self._answered(turn.answer)]
        messages.append(_message(question, _sources(images)))
        found = dict(self._template(messages))
        ids = found.pop("input_ids")[0].numpy()
        self._prompts = {tuple(ids.tolist()): found}
        return ids

    def prefill(self, ids: TokenIds, images: Sequence[ImageFeatures] = ()) -> Floats:
        """Start a sequence with the processor's other inputs for it; logits (vocab,) of its last position."""
        more = dict(self._prompts.get(tuple(int(i) for i in ids), {}))
        if images:
            more["mm_encoder_outputs"] = {"image": _joined(images)}
            more.pop("pixel_values", None)
        more.pop("attention_mask", None)
        self._cache, self._length = None, 0
        for module in self.model.modules():
            if hasattr(module, "rope_deltas"):  # of the last picture; a prompt without one would decode by it
                module.rope_deltas = None
        return self._step([int(i) for i in ids], more)

    def decode(self, token_id: int) -> Floats:
        """Logits (vocab,) after one more token."""
        if self._length == 0:
            raise InputError("decode: no sequence is running; call prefill first")
        return self._step([int(token_id)], {})

    # --- beside the answers of every session ---

    def generate(
        self, source: Sources, question: str, max_new_tokens: int, *, history: History = ()
    ) -> list[int]:
        """Greedy new ids by transformers' own `generate` on the processor's inputs, a stop id included."""
        return self.greedy(source, question, max_new_tokens, history=history)[0]

    def greedy(
        self, source: Sources, question: str, max_new_tokens: int, *, history: History = ()
    ) -> tuple[list[int], list[float]]:
        """As `generate`, and for each id how far the two largest logits were apart; no penalties or beams."""
        import torch

        ids, inputs = self._inputs(source, question, history)
        with torch.no_grad(), _plainly(self.model):
            found = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        best = [torch.topk(logits[0].float(), 2).values for logits in found.logits]
        return found.sequences[0, len(ids) :].tolist(), [float(two[0] - two[1]) for two in best]

    def close(self) -> None:
        """Forget the running sequence and the pictures given as bytes."""
        self._cache, self._length = None, 0
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside -------------------------------------------------------

    def _as_file(self, data: bytes) -> Path:
        """Bytes are a file's content: the processor gets a path, kept as long as the session."""
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="pocketvlm-")
        path = Path(self._files.name) / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        return path

    def _prepared(self, source: Any) -> PreparedImage:
        return source if isinstance(source, PreparedImage) else self.prepare(source)

    def _inputs(self, source: Sources, question: str, history: History) -> tuple[TokenIds, dict[str, Any]]:
        """Ids (prompt,) and everything that the processor gives for the model."""
        import torch

        turns, images = turns_of(history, [self._prepared(each) for each in sources_of(source)])
        ids = self.prompt_ids(question, images, turns)
        more = self._prompts[tuple(ids.tolist())]
        return ids, {"input_ids": torch.from_numpy(ids)[None], **more}

    def _answered(self, answer: str | tuple[int, ...]) -> dict[str, Any]:
        text = answer if isinstance(answer, str) else self.tokenizer.decode(list(answer)).strip()
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    def _template(self, messages: list[dict[str, Any]]) -> Any:
        try:
            with quiet_transformers():
                return self.processor.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
        except (ValueError, OSError, RuntimeError) as error:
            raise InputError(f"the checkpoint's processor refuses it: {error}") from error

    def _step(self, ids: Sequence[int], more: dict[str, Any]) -> Floats:
        """Run further ids (S,), with more inputs of the model's forward; logits (vocab,) of the last one.

        Without a mask: nothing is padded, and models with positions of their own would count from it.
        """
        import torch

        total = self._length + len(ids)
        with torch.no_grad():
            out = self.model(
                **more,
                input_ids=torch.tensor([list(ids)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache, self._length = out.past_key_values, total
        return out.logits[0, -1].float().numpy()


@contextlib.contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """`generate` chooses by the logits alone in this block.

    generation_config.json often asks for more (a repetition penalty, beams), and `do_sample=False` ends only
    some of it. What ends an answer stays.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


def _message(question: str, images: Sequence[Any]) -> dict[str, Any]:
    """A user's turn as the chat template takes it, pictures first."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def _sources(images: Sequence[PreparedImage]) -> list[Any]:
    return [each.source for each in images if isinstance(each, TorchImage)]


def _flat(features: Any) -> Any:
    """One tensor or a list of them as (image tokens, hidden)."""
    import torch

    pieces = [features] if isinstance(features, torch.Tensor) else features
    return torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces])


def _joined(images: Sequence[ImageFeatures]) -> Any:
    """What the model made of several pictures, as if it had been one call."""
    outputs = [each.output for each in images if isinstance(each, TorchFeatures)]
    if len(outputs) != len(images):
        raise InputError("prefill: takes what this session's encode_image gave")
    if len(outputs) == 1:
        return outputs[0]
    joined = copy.copy(outputs[0])
    joined.pooler_output = _side_by_side([each.pooler_output for each in outputs])
    if getattr(joined, "deepstack_features", None):
        levels = zip(*(each.deepstack_features for each in outputs), strict=True)
        joined.deepstack_features = [_side_by_side(level) for level in levels]
    return joined


def _side_by_side(pictures: Sequence[Any]) -> Any:
    """Features of several pictures: tensors as one, lists (an entry a picture) as one list."""
    import torch

    if isinstance(pictures[0], torch.Tensor):
        return torch.cat(list(pictures))
    return [piece for picture in pictures for piece in picture]


def _load(path: Path) -> tuple[Any, Any]:
    try:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise MissingExtra(error.name or "transformers", "export") from error
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; expected a Hugging Face checkpoint directory")
    try:
        with quiet_transformers():
            model = AutoModelForImageTextToText.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
            processor = AutoProcessor.from_pretrained(path, local_files_only=True)
            take_template(processor)
            take_tokenizer(path / TOKENIZER, processor)
    except Exception as error:  # transformers, safetensors and tokenizers each raise classes of their own
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(f"{path}: transformers cannot load it: {first}") from error
    return model.eval().requires_grad_(False), processor


def take_template(processor: Any) -> bool:
    """Whether the processor has a chat template; one that only its tokenizer was saved with becomes its own.

    transformers reads tokenizer_config.json's, where older versions wrote it, for the tokenizer alone.
    """
    if not getattr(processor, "chat_template", None):
        found = getattr(processor.tokenizer, "chat_template", None)
        processor.chat_template = found.get("default") if isinstance(found, dict) else found
    return bool(processor.chat_template)


TOKENIZER = "tokenizer.json"
_CUTS = ("normalizer", "pre_tokenizer")
"""What cuts a text before the vocabulary is asked."""


def take_tokenizer(file: Path, processor: Any) -> tuple[str, ...]:
    """Let the processor's tokenizer cut texts as this tokenizer.json says; what was put right.

    transformers 5 builds some classes anew, with the class's own rule: SmolVLM's published files name
    GPT2Tokenizer, which cuts a number after a line's end otherwise than the digits' rule of their
    tokenizer.json, and so otherwise than in training. Nothing is done where there is no such file.
    """
    if not file.is_file():
        return ()
    stored, taken = Tokenizer.from_file(str(file)), processor.tokenizer.backend_tokenizer
    changed = tuple(name for name in _CUTS if _rule(getattr(stored, name)) != _rule(getattr(taken, name)))
    if changed:
        for name in (*_CUTS, "decoder"):  # they belong together: one may replace what another puts back
            setattr(taken, name, getattr(stored, name))
    return changed


def _rule(part: Any) -> Any:
    """A normalizer or pre-tokenizer as data, without what changes only the places of tokens in the text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items() if name != "trim_offsets"}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return None if part is None else plain(json.loads(part.__getstate__()))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars, and no remarks of transformers and torchvision on future decoders, in this block."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
