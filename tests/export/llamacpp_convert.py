"""llama.cpp's own converter on one checkpoint, every precision; a process of its own.

    python llamacpp_convert.py LLAMA_CPP_DIR CHECKPOINT OUT JSON

In: the directory of llama.cpp's sources; JSON `{"text": CLASS, "vision": CLASS, "precisions": [...]}`.
Out: OUT/<text|vision>-<precision>.gguf. Not here: comparing (`test_gguf_reference.py`).

Two things of the converter are set: the name of the pre-tokenizer, which it looks up by a hash of ids that
only published tokenizers have, and the number of blocks of its name table, which it takes from another
place for tiny models than their vision encoder needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MOST_BLOCKS = 8


def no_vocabulary(*_: Any, **__: Any) -> None:
    raise FileNotFoundError("a tokenizer of this kind is not there")


def main() -> None:
    root, checkpoint, out, wanted = *map(Path, sys.argv[1:4]), json.loads(sys.argv[4])
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    import conversion
    import gguf
    import torch
    from conversion.base import TextModel

    torch.set_num_threads(1)
    TextModel.get_vocab_base_pre = lambda self, tokenizer: wanted["pre_tokenizer"]
    if not (checkpoint / "tokenizer.model").exists():
        TextModel._set_vocab_sentencepiece = TextModel._set_vocab_llama_hf = no_vocabulary
    table = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = lambda arch, blocks: table(arch, max(blocks, MOST_BLOCKS))
    types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    for part in ("text", "vision"):
        model = conversion.get_model_class(wanted[part], mmproj=part == "vision")
        model.hf_arch = wanted[part]
        for precision in wanted["precisions"]:
            with torch.inference_mode():
                file = out / f"{part}-{precision}.gguf"
                model(checkpoint, types[precision], file, eager=False).write()


if __name__ == "__main__":
    main()
