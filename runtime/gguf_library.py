"""llama.cpp through the low-level binding of llama-cpp-python: a text model, its context, the vision part.

In: paths of GGUF files. Out: logits of tokens and embeddings, features of pictures. Not here: sessions.

`FIDELITY` is for comparing (no flash attention, float32 cache), `SPEED` for use. Idle threads must sleep, not
spin, before the library is loaded: with busy neighbours a decode is else many times slower.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError, InputError, MissingExtra

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """How a context computes. `cache`: type of keys and values."""

    flash_attention: bool
    cache: str


SPEED = Settings(flash_attention=True, cache="f16")
FIDELITY = Settings(flash_attention=False, cache="f32")

_CACHE_TYPES = {"f32": 0, "f16": 1}


def load(spin: bool = False) -> tuple[Any, Any]:
    """(llama_cpp, its mtmd_cpp), logs silenced. Raises MissingExtra."""
    if not spin and "llama_cpp" not in sys.modules:  # read once, when the OpenMP library is loaded
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        import llama_cpp
        from llama_cpp import mtmd_cpp
    except ImportError as error:
        raise MissingExtra("llama-cpp-python", "gguf") from error
    llama_cpp.llama_backend_init()
    global _silent
    if _silent is None:
        _silent = llama_cpp.llama_log_callback(_listen)
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_log_set(_silent, None)
        mtmd_cpp.mtmd_helper_log_set(_silent, None)
    return llama_cpp, mtmd_cpp


_silent: Any = None  # the library keeps a pointer to it
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_complaints: deque[str] = deque(maxlen=32)


def _listen(level: int, text: bytes, _: Any) -> None:
    """Nothing is printed; errors are kept for the message of whoever called."""
    if level == _ERROR:
        _complaints.append(text.decode(errors="replace").strip())


def _complaint() -> str:
    """In brackets the first error that the library told since it was last asked: its cause."""
    found = next((line.rsplit(": ", 1)[-1] for line in _complaints if line), "")
    _complaints.clear()
    return f" ({found})" if found else ""


def _flash_attention(lib: Any, settings: Settings) -> int:
    """The library's constant for what the settings ask."""
    name = "ENABLED" if settings.flash_attention else "DISABLED"
    return int(getattr(lib, f"LLAMA_FLASH_ATTN_TYPE_{name}"))


class TextModel:
    """A text model and one sequence in it. Close it: the memory is not Python's."""

    def __init__(self, path: Path, *, context: int, threads: int, settings: Settings, spin: bool) -> None:
        self._lib, _ = load(spin)
        lib = self._lib
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        _complaints.clear()
        self.model = lib.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise BundleError(
                f"{path.name}: llama.cpp cannot open it{_complaint()}; re-export, or update llama-cpp-python"
            )
        self.vocabulary = lib.llama_model_get_vocab(self.model)
        self.tokens = int(lib.llama_vocab_n_tokens(self.vocabulary))
        self.width = int(lib.llama_model_n_embd_inp(self.model))
        self.hidden = int(lib.llama_model_n_embd(self.model))
        wanted = lib.llama_context_default_params()
        wanted.n_ctx = context
        wanted.n_batch = wanted.n_ubatch = min(context, MOST_AT_ONCE)
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.flash_attn_type = _flash_attention(lib, settings)
        wanted.type_k = wanted.type_v = _CACHE_TYPES[settings.cache]
        self.context = lib.llama_init_from_model(self.model, wanted)
        if not self.context:
            lib.llama_model_free(self.model)
            raise BundleError(f"{path.name}: no memory for a context of {context} tokens; ask for fewer")
        self._cache_width = {"f32": 4, "f16": 2}[settings.cache]
        self._memory = lib.llama_get_memory(self.context)

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a state that cannot be cut."""
        lib = self._lib
        return bool(lib.llama_model_is_recurrent(self.model) or lib.llama_model_is_hybrid(self.model))

    @property
    def cache_bytes(self) -> int:
        """Keys and values of a full context, all layers counted as attention: at most this."""
        lib = self._lib
        # of a model that mixes layers only those of the first one are told, and that may have none
        heads = lib.llama_model_n_head_kv(self.model) or lib.llama_model_n_head(self.model)
        layers = lib.llama_model_n_layer(self.model)
        # a head may be wider than its share of the model
        said = self._value(f"{self._value('general.architecture')}.attention.key_length")
        head = int(said) if said else self.hidden // lib.llama_model_n_head(self.model)
        return int(2 * layers * heads * head * self._cache_width * lib.llama_n_ctx(self.context))

    def _value(self, key: str) -> str:
        """A key's value as text; nothing where the file has none (or one of more than 255 bytes)."""
        buffer = ctypes.create_string_buffer(256)
        found = self._lib.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer))
        return buffer.value.decode() if 0 <= found < len(buffer) else ""

    def clear(self) -> None:
        """Forget the sequence."""
        self._lib.llama_memory_clear(self._memory, True)

    def cut(self, length: int) -> bool:
        """Forget all from position `length` on; False when this model cannot."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, 0, length, -1))

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens recognised, none added."""
        data = text.encode()
        size = len(data) + 8
        buffer = (self._lib.llama_token * size)()
        count = self._lib.llama_tokenize(self.vocabulary, data, len(data), buffer, size, False, True)
        if count < 0:
            raise InputError(f"text: llama.cpp cannot tokenise it ({count})")
        return list(buffer[:count])

    def extend(
        self,
        rows: Sequence[int] | NDArray[np.int64] | Floats,
        positions: NDArray[np.int64],
        *,
        both_ways: bool = False,
    ) -> Floats:
        """Append ids (S,) or embeddings (S, width) at positions (1 or 4, S); logits (vocab,) of the last.

        `both_ways`: each row sees those after it, too; more than fit into one batch are an InputError.
        """
        if both_ways and len(rows) > MOST_AT_ONCE:
            raise InputError(
                f"picture: has {len(rows)} tokens, which see each other; at most {MOST_AT_ONCE} fit here"
            )
        self._lib.llama_set_causal_attn(self.context, not both_ways)
        for start in range(0, len(rows), MOST_AT_ONCE):
            part = slice(start, start + MOST_AT_ONCE)
            self._decode(rows[part], positions[:, part])
        logits = self._lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.tokens,)).copy()

    def _decode(self, rows: Any, positions: NDArray[np.int64]) -> None:
        lib, count = self._lib, len(rows)
        embeds = isinstance(rows, np.ndarray) and rows.ndim == 2
        batch = lib.llama_batch_init(count * len(positions), self.width if embeds else 0, 1)
        try:
            batch.n_tokens = count
            if embeds:
                data = np.ascontiguousarray(rows, np.float32)
                ctypes.memmove(batch.embd, data.ctypes.data, data.nbytes)
            else:
                ids = np.ascontiguousarray(rows, np.int32)
                ctypes.memmove(batch.token, ids.ctypes.data, ids.nbytes)
            places = np.ascontiguousarray(positions, np.int32)
            ctypes.memmove(batch.pos, places.ctypes.data, places.nbytes)
            for i in range(count):
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == count - 1
            if status := lib.llama_decode(self.context, batch):
                raise InputError(
                    f"llama.cpp: decode of {count} tokens failed ({status}); the context is full"
                )
        finally:
            lib.llama_batch_free(batch)

    def close(self) -> None:
        """Free model and context."""
        if self.context:
            self._lib.llama_free(self.context)
            self._lib.llama_model_free(self.model)
        self.context = self.model = None


MOST_AT_ONCE = 2048
"""Tokens a batch."""

MOST_IMAGE_TOKENS = 1 << 16


class VisionModel:
    """The mmproj beside a text model."""

    def __init__(self, path: Path, text: TextModel, *, threads: int, settings: Settings) -> None:
        self._lib, self._mtmd = load()
        lib, mtmd = self._lib, self._mtmd
        wanted = mtmd.mtmd_context_params_default()
        wanted.use_gpu, wanted.print_timings, wanted.warmup = False, False, False
        wanted.n_threads = threads
        # pictures come in the size that the model is to see: no smallest or largest one of llama.cpp's own
        wanted.image_min_tokens, wanted.image_max_tokens = 1, MOST_IMAGE_TOKENS
        wanted.flash_attn_type = _flash_attention(lib, settings)
        self._text, self._name = text, path.name
        _complaints.clear()
        self.context = mtmd.mtmd_init_from_file(str(path).encode(), text.model, wanted)
        if not self.context:
            raise BundleError(
                f"{path.name}: llama.cpp cannot open it beside the text model{_complaint()}; re-export"
            )

    def encode(self, pixels: NDArray[np.uint8]) -> Floats:
        """Embeddings (tokens, width) of one picture (H, W, 3) whose size llama.cpp keeps as it is."""
        mtmd, chunks = self._mtmd, self._mtmd.mtmd_input_chunks_init()
        try:
            chunk = self._whole_image(chunks, np.ascontiguousarray(pixels, np.uint8))
            if status := mtmd.mtmd_encode_chunk(self.context, chunk):
                raise BundleError(f"{self._name}: llama.cpp cannot encode the picture ({status}); re-export")
            count = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            found = ctypes.cast(mtmd.mtmd_get_output_embd(self.context), ctypes.POINTER(ctypes.c_float))
            return np.ctypeslib.as_array(found, shape=(count, self._text.width)).copy()
        finally:
            mtmd.mtmd_input_chunks_free(chunks)

    def _whole_image(self, chunks: Any, pixels: NDArray[np.uint8]) -> Any:
        mtmd = self._mtmd
        height, width, _ = pixels.shape
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text()
        text.text, text.text_len, text.add_special, text.parse_special = marker, len(marker), False, True
        try:
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            if status := mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(text), bitmaps, 1):
                raise BundleError(f"{self._name}: llama.cpp cannot cut the picture ({status}); re-export")
        finally:
            mtmd.mtmd_bitmap_free(bitmap)
        every = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
        images = [c for c in every if mtmd.mtmd_input_chunk_get_type(c) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE]
        if not images:
            raise BundleError(
                f"{self._name}: llama.cpp makes nothing of a picture of {width} x {height}; re-export"
            )
        return images[-1]  # where llama.cpp also cuts tiles, the whole picture is the last

    def close(self) -> None:
        """Free the model."""
        if self.context:
            self._mtmd.mtmd_free(self.context)
        self.context = None
