"""llama.cpp's arm of `benchmarks/onnx.py`; runs in the peers' environment, on the low-level binding.

    python onnx_llama.py WORK --build           text-q4.gguf and mmproj-q8.gguf from text-f16, mmproj-f16
    python onnx_llama.py WORK --what decode --past 128 --threads 1
    python onnx_llama.py WORK --what ttft --model mmproj-q8.gguf

Text: Q4_0 throughout (`pure`), so the LM head has 4 bits as in the other arms; flash attention, float16 keys
and values, the fastest settings. `decode`: `llama_decode` and argmax. `ttft`: `mtmd` from the bytes of one
PNG and the same prompt to the first text, with a cleared cache, the model loaded and warm.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", os.environ.get("POCKETVLM_BENCH_WAIT", "active"))

import numpy as np
import onnx_common as common

TEXT, BATCH = "text-q4.gguf", 2048


def library() -> tuple[Any, Any]:
    import llama_cpp
    from llama_cpp import mtmd_cpp

    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    library.silent = silent  # type: ignore[attr-defined]  # the library keeps a pointer to it
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_log_set(silent, None)
    mtmd_cpp.mtmd_helper_log_set(silent, None)
    return llama_cpp, mtmd_cpp


def build(work: Path) -> None:
    lib, _ = library()
    kinds = {
        "text": (lib.LLAMA_FTYPE_MOSTLY_Q4_0, TEXT),
        "mmproj": (lib.LLAMA_FTYPE_MOSTLY_Q8_0, "mmproj-q8.gguf"),
    }
    for name, (kind, out) in kinds.items():
        settings = lib.llama_model_quantize_default_params()
        settings.ftype, settings.pure, settings.nthread = kind, True, 1
        if name == "text":
            settings.output_tensor_type = settings.token_embedding_type = lib.GGML_TYPE_Q4_0
        source, target = (str(work / x).encode() for x in (f"{name}-f16.gguf", out))
        if status := lib.llama_model_quantize(source, target, ctypes.byref(settings)):
            raise SystemExit(f"llama_model_quantize of {name}: {status}")


class Text:
    """A text model with one context, flash attention on."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        self.lib, self.mtmd = library()
        lib = self.lib
        loading = lib.llama_model_default_params()
        self.model = lib.llama_model_load_from_file(str(path).encode(), loading)
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, BATCH, 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        settings.no_perf = True
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.model or not self.context:
            raise SystemExit(f"{path}: llama.cpp cannot open it")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.size = lib.llama_vocab_n_tokens(self.vocab)

    def feed(self, ids: list[int]) -> int:
        """Append ids; the token with the largest logit."""
        tokens = (self.lib.llama_token * len(ids))(*ids)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        return self.best()

    def best(self) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.size,))))

    def piece(self, token: int) -> str:
        buffer = ctypes.create_string_buffer(64)
        count = self.lib.llama_token_to_piece(self.vocab, token, buffer, 64, 0, False)
        return buffer.raw[: max(count, 0)].decode(errors="ignore")

    def tokenize(self, text: str) -> list[int]:
        """Ids, special tokens recognised and none added."""
        data, room = text.encode(), len(text) + 8
        ids = (self.lib.llama_token * room)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, room, False, True)
        return list(ids[:count])

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)


def decode(options: Any) -> None:
    text = Text(options.work / TEXT, options.threads, options.past + options.steps + 64)
    token = text.feed(common.prompt_ids(options.past, text.size))

    def step() -> None:
        nonlocal token
        token = text.feed([token])

    taken = common.decode_ms(step, options.steps)
    common.finish(ms=taken, model_bytes=(options.work / TEXT).stat().st_size)


class Mtmd:
    """Text model and vision part: a prompt with one picture to the first text."""

    def __init__(self, work: Path, vision: str, threads: int) -> None:
        self.text = Text(work / TEXT, threads, 2048)
        self.mtmd = self.text.mtmd
        settings = self.mtmd.mtmd_context_params_default()
        settings.use_gpu, settings.print_timings, settings.n_threads = False, False, threads
        settings.flash_attn_type = self.text.lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = self.mtmd.mtmd_init_from_file(str(work / vision).encode(), self.text.model, settings)
        if not self.context:
            raise SystemExit(f"{vision}: mtmd cannot open it")

    def first_text(self, png: bytes, before: str, after: str) -> tuple[str, int]:
        """The first piece of text that is not empty, and the tokens of the prompt.

        mtmd itself always sends a tile and the whole picture; here only the whole one is encoded, as in the
        other arms.
        """
        mtmd, text = self.mtmd, self.text
        text.clear()
        chunks, bitmap = self._cut(png)
        every = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
        kind = mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
        image = [chunk for chunk in every if mtmd.mtmd_input_chunk_get_type(chunk) == kind][-1]
        first, last = text.tokenize(before), text.tokenize(after)
        text.feed(first)
        past = text.lib.llama_pos(len(first))
        if mtmd.mtmd_helper_eval_chunk_single(
            self.context, text.context, image, len(first), 0, BATCH, False, ctypes.byref(past)
        ):
            raise SystemExit("mtmd_helper_eval_chunk_single failed")
        token = text.feed(last)
        while not (piece := text.piece(token)):
            token = text.feed([token])
        count = len(first) + mtmd.mtmd_input_chunk_get_n_tokens(image) + len(last)
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return piece, count

    def _cut(self, png: bytes) -> tuple[Any, Any]:
        """The picture as mtmd cuts it, the whole one last; both are the caller's to free."""
        mtmd = self.mtmd
        data = (ctypes.c_uint8 * len(png)).from_buffer_copy(png)
        bitmap = mtmd.mtmd_helper_bitmap_init_from_buf(self.context, data, len(png), False)
        chunks, marker = mtmd.mtmd_input_chunks_init(), mtmd.mtmd_default_marker()
        given = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(given), bitmaps, 1):
            raise SystemExit("mtmd_tokenize failed")
        return chunks, bitmap


def ttft(options: Any) -> None:
    model = Mtmd(options.work, options.model, options.threads)
    png = (options.work / "picture.png").read_bytes()
    before, after = (options.work / "prompt.txt").read_text().split("<picture>")
    taken, count, piece = [], 0, ""
    for number in range(options.repeats + 1):
        start = time.perf_counter()
        piece, count = model.first_text(png, before, after)
        if number:
            taken.append(1e3 * (time.perf_counter() - start))
    common.finish(ms=taken, prompt_tokens=count, text=piece)


if __name__ == "__main__":
    found = common.options(
        *common.DECODE,
        ("--what", {"choices": ("decode", "ttft"), "default": "decode"}),
        ("--build", {"action": "store_true"}),
        ("--repeats", {"type": int, "default": 3}),
    )
    if found.build:
        build(found.work)
        common.finish(built="gguf")
    else:
        {"decode": decode, "ttft": ttft}[found.what](found)
