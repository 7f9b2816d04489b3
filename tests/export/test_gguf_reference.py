"""Our GGUF converter against llama.cpp's own: every key and every tensor, bit for bit.

llama.cpp's converter comes from the source archive of llama-cpp-python (its wheel has none), fetched by pip
and kept in pytest's cache; POCKETVLM_LLAMA_CPP may name a directory with llama.cpp's sources instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: E402

from export.gguf import plan_files  # noqa: E402
from export.gguf_gate import TEXTS, check_tokenizer  # noqa: E402
from export.gguf_tokenizer import write_tokenizer  # noqa: E402
from export.gguf_write import write as write_file  # noqa: E402
from runtime.gguf_library import TextModel, load  # noqa: E402
from tests import gguf_checkpoints  # noqa: E402
from tests.checkpoints import WORDS  # noqa: E402

pytestmark = pytest.mark.slow

PRECISIONS = ("f32", "f16", "bf16", "q8_0")
VARIABLE = "POCKETVLM_LLAMA_CPP"
CONVERT = Path(__file__).with_name("llamacpp_convert.py")
SECONDS = 500


@dataclass(frozen=True)
class Reference:
    """How llama.cpp's converter takes a family. `change` the checkpoint for both, `prepare` a copy for it."""

    text: str
    vision: str
    prepare: Callable[[Path], None] = lambda _: None
    change: Callable[[Path], None] = lambda _: None
    # key or tensor (`NAME in f32`: of that precision alone) -> why it is not theirs
    differs: Mapping[str, str] = field(default_factory=dict)
    family: str = ""


def renamed(checkpoint: Path, old: str, new: str) -> None:
    """Tensors that begin with `old` begin with `new`."""
    path = checkpoint / "model.safetensors"
    weights = {
        new + name.removeprefix(old) if name.startswith(old) else name: each
        for name, each in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def older_siglip(checkpoint: Path) -> None:
    """Its converter knows the prefixes that transformers wrote before version 5."""
    renamed(checkpoint, "model.vision_tower.", "model.vision_tower.vision_model.")


def scaled(kind: str, **more: float) -> Callable[[Path], None]:
    """Another kind of rotary scaling."""

    def change(config: dict[str, Any]) -> None:
        text = config["text_config"]
        found = text.get("rope_parameters") or {"rope_theta": 1e4}
        text["rope_parameters"] = {**found, "rope_type": kind, "original_max_position_embeddings": 64, **more}

    return lambda checkpoint: gguf_checkpoints.edit(checkpoint, change)


def of_intern_s1(checkpoint: Path) -> None:
    """Its converter knows this layout of the vision part from another model only."""
    renamed(checkpoint, "vision_tower.", "model.vision_tower.")
    renamed(checkpoint, "multi_modal_projector.", "model.multi_modal_projector.")


def larger_pictures(checkpoint: Path) -> None:
    """A processor that resizes to more than the encoder takes, and does not cut tiles."""
    path = checkpoint / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"]["size"] = {"longest_edge": 128}
    path.write_text(json.dumps(content))


def patches_of_16(checkpoint: Path) -> None:
    """The only size that its converter knows for this family."""
    gguf_checkpoints.edit(checkpoint, lambda config: config["vision_config"].update(patch_size=16))
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if name.endswith("patch_embedding.weight"))
    drawn = torch.Generator().manual_seed(0)
    weights[name] = torch.randn(len(weights[name]), 16 * 16 * 3, generator=drawn)
    save_file(weights, path, metadata={"format": "pt"})


def sentencepiece_tokenizer(checkpoint: Path) -> None:
    """A tokenizer as Gemma's: trained by SentencePiece and converted by transformers; queries are scaled by
    the head's size, as in every published one but the largest."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="its converter reads tokenizer.model alone")
    from transformers import GemmaTokenizer

    corpus = checkpoint / "corpus.txt"
    corpus.write_text((WORDS + "\n") * 4)
    special = {"pad": "<|endoftext|>", "eos": "<|im_end|>", "bos": "<|im_start|>"}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(checkpoint / "tokenizer"), minloglevel=2,
        model_type="bpe", vocab_size=330, hard_vocab_limit=False, byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        **{f"{role}_piece": text for role, text in special.items()},
        user_defined_symbols=["\n", "\n\n", "\t", "\u2581\u2581", "<unused0>", "<table>"],
        control_symbols=["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
    )  # fmt: skip
    corpus.unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.vocab"):
        (checkpoint / name).unlink()
    settings = {"tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>"}
    settings |= {f"{role}_token": text for role, text in special.items()}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    GemmaTokenizer.from_pretrained(checkpoint).save_pretrained(checkpoint)
    gguf_checkpoints.edit(checkpoint, lambda config: config["text_config"].update(query_pre_attn_scalar=16))


def older_gemma(checkpoint: Path) -> None:
    """What transformers wrote before version 5: prefixes of tensors, added tokens beside the tokenizer, the
    number of image tokens beside the image processor."""
    renamed(checkpoint, "vision_tower.", "vision_tower.vision_model.")
    path = checkpoint / "tokenizer_config.json"
    added = json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]
    decoder = {each["id"]: {"content": each["content"], "special": each["special"]} for each in added}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": decoder}))
    path = checkpoint / "processor_config.json"
    content = json.loads(path.read_text())
    image = content["image_processor"] | {"image_seq_length": content["image_seq_length"]}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(image))


ADDED = {
    f"tokenizer.ggml.add_{place}_token": "theirs is a key only if the tokenizer's configuration says so; "
    "llama.cpp then guesses, ours is what the tokenizer does"
    for place in ("bos", "eos", "sep")
}
REFERENCES = {
    "smolvlm": Reference(
        "VLlama3ForCausalLM",
        "SmolVLMForConditionalGeneration",
        change=larger_pictures,
        differs={
            "clip.vision.preproc_image_size": "theirs makes llama.cpp cut every picture into tiles, "
            "also where the processor's do_image_splitting is off"
        },
    ),
    "smolvlm_llama3": Reference(
        "VLlama3ForCausalLM",
        "SmolVLMForConditionalGeneration",
        change=scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
        family="smolvlm",
    ),
    "qwen2_5_vl_yarn": Reference(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        change=scaled("yarn", factor=4.0),
        family="qwen2_5_vl",
    ),
    "smolvlm_tiles": Reference("VLlama3ForCausalLM", "SmolVLMForConditionalGeneration"),
    "qwen2_5_vl": Reference("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": Reference("Qwen3VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
    "lfm2_vl": Reference("Lfm2ForCausalLM", "Lfm2VlForConditionalGeneration", older_siglip, patches_of_16),
    "gemma3": Reference(
        "Gemma3ForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        older_gemma,
        sentencepiece_tokenizer,
        differs={
            "gemma3.attention.sliding_window_pattern": "theirs leaves it out where layers are not 5 with a "
            "window and 1 without, and llama.cpp then takes them so",
            "mm.input_projection.weight in f32": "theirs is always float16",
        },
    ),
    "internvl": Reference(
        "Qwen2ForCausalLM",
        "InternVisionModel",
        of_intern_s1,
        differs={
            "clip.vision.preproc_min_tiles": "theirs reads another configuration's name for it",
            "clip.vision.preproc_max_tiles": "theirs reads another configuration's name for it",
            "v.class_embd": "theirs keeps the two axes of length 1; the numbers are equal",
            "v.position_embd.weight": "theirs keeps the class token first, llama.cpp's graph has it last",
        },
    ),
}


# --- the other converter ----------------------------------------------


@pytest.fixture(scope="session")
def llama_cpp_sources(request: pytest.FixtureRequest) -> Path:
    """The directory of llama.cpp's sources, of the installed version of the binding."""
    if given := os.environ.get(VARIABLE):
        return found_in(Path(given))
    wanted = f"llama_cpp_python-{version('llama-cpp-python')}"
    cache = request.config.cache
    assert cache is not None
    out = cache.mkdir("llama-cpp")
    if not (out / wanted).is_dir():
        fetch(wanted, out)
    return found_in(out / wanted)


def found_in(directory: Path) -> Path:
    for root in (directory, directory / "vendor" / "llama.cpp"):
        if (root / "conversion" / "__init__.py").is_file():
            return root
    raise FileNotFoundError(f"{directory}: holds no llama.cpp with conversion/__init__.py ({VARIABLE})")


def fetch(wanted: str, out: Path) -> None:
    """Unpack the archive into `out`, or skip with pip's reason."""
    name = wanted.replace("llama_cpp_python-", "llama-cpp-python==")
    options = ["--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(out)]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    archive = out / f"{wanted}.tar.gz"
    if not archive.is_file():
        lines = done.stderr.strip().splitlines() or ["pip wrote nothing"]
        pytest.skip(f"the source archive of llama-cpp-python could not be fetched: {lines[-1]}")
    with tarfile.open(archive) as opened:
        opened.extractall(out / "unpacked", filter="data")
    (out / "unpacked" / wanted).rename(out / wanted)
    (out / "unpacked").rmdir()
    archive.unlink()


# --- both files -------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Directories with `<part>-<precision>.gguf`."""

    name: str
    ours: Path
    theirs: Path

    def readers(self, part: str, precision: str) -> tuple[Any, Any]:
        return tuple(gguf.GGUFReader(path / f"{part}-{precision}.gguf") for path in (self.ours, self.theirs))  # type: ignore[return-value]


@pytest.fixture(scope="module", params=REFERENCES)
def pair(
    request: pytest.FixtureRequest, llama_cpp_sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """One family through both converters."""
    name: str = request.param
    out = tmp_path_factory.mktemp(name)
    # two directories of one name: it becomes a key of the file
    checkpoint = gguf_checkpoints.write(REFERENCES[name].family or name, out / "a" / name)
    REFERENCES[name].change(checkpoint)
    copy = Path(shutil.copytree(checkpoint, out / "b" / name))
    REFERENCES[name].prepare(copy)
    pair = Pair(name, out / "ours", out / "theirs")
    for directory in (pair.ours, pair.theirs):
        directory.mkdir()
    files = plan_files(checkpoint)
    for precision in PRECISIONS:
        write_file(files.text, files.source, pair.ours / f"text-{precision}.gguf", precision)
        write_file(files.vision, files.source, pair.ours / f"vision-{precision}.gguf", precision)
    pre_tokenizer = gguf.GGUFReader(pair.ours / "text-f32.gguf").fields["tokenizer.ggml.pre"].contents()
    wanted = {
        "text": REFERENCES[name].text,
        "vision": REFERENCES[name].vision,
        "precisions": PRECISIONS,
        "pre_tokenizer": pre_tokenizer,
    }
    command = [sys.executable, CONVERT, llama_cpp_sources, copy, pair.theirs, json.dumps(wanted)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return pair


def values(reader: Any) -> dict[str, Any]:
    """Every key with its types and value."""
    return {
        key: ([kind.name for kind in item.types], item.contents())
        for key, item in reader.fields.items()
        if not key.startswith("GGUF.")
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("part", ["text", "vision"])
def test_every_key_is_theirs(pair: Pair, part: str, precision: str) -> None:
    ours, theirs = map(values, pair.readers(part, precision))
    known = {**ADDED, **REFERENCES[pair.name].differs}
    different = {
        key: (ours.get(key), theirs.get(key))
        for key in ours.keys() | theirs.keys()
        if key not in known and ours.get(key) != theirs.get(key)
    }
    assert different == {}
    assert len(ours) > (15 if part == "text" else 12)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("part", ["text", "vision"])
def test_every_tensor_is_theirs(pair: Pair, part: str, precision: str) -> None:
    ours, theirs = (
        {tensor.name: tensor for tensor in reader.tensors} for reader in pair.readers(part, precision)
    )
    assert set(ours) == set(theirs)
    known = REFERENCES[pair.name].differs
    different = [
        (name, ours[name].tensor_type.name, theirs[name].tensor_type.name)
        for name in ours
        if not {name, f"{name} in {precision}"} & known.keys() and not same(ours[name], theirs[name])
    ]
    assert different == []


def same(left: Any, right: Any) -> bool:
    return (
        left.tensor_type == right.tensor_type
        and list(left.shape) == list(right.shape)
        and np.array_equal(left.data.view(np.uint8), right.data.view(np.uint8))
    )


def test_a_known_difference_is_one(pair: Pair) -> None:
    """What is listed as different and is not would hide a later mistake."""
    found = set()
    for part in ("text", "vision"):
        ours, theirs = map(values, pair.readers(part, "f32"))
        found |= {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        left, right = (
            {tensor.name: tensor for tensor in reader.tensors} for reader in pair.readers(part, "f32")
        )
        tensors = [name for name in left if not same(left[name], right[name])]
        found |= {*tensors, *(f"{name} in f32" for name in tensors)}
    assert set(REFERENCES[pair.name].differs) <= found


@pytest.mark.parametrize("pair", ["internvl"], indirect=True)
def test_where_internvl_differs(pair: Pair) -> None:
    """The same numbers: axes of length 1 gone, the class token's position at the end instead of the start."""
    ours, theirs = ({t.name: t.data for t in reader.tensors} for reader in pair.readers("vision", "f32"))
    assert np.array_equal(ours["v.class_embd"].ravel(), theirs["v.class_embd"].ravel())
    positions = np.squeeze(theirs["v.position_embd.weight"])
    assert np.array_equal(ours["v.position_embd.weight"], np.roll(positions, -1, axis=0))


# --- a published vocabulary -------------------------------------------


def test_a_published_vocabulary_gives_the_tokenizers_ids(llama_cpp_sources: Path, tmp_path: Path) -> None:
    """Gemma 4's 262,144 tokens, which llama.cpp tests with, as the tokenizer.json that transformers has
    (Gemma 3's is of that kind); here by scores, on many texts and the ones of llama.cpp's own test."""
    source = llama_cpp_sources / "models" / "ggml-vocab-gemma-4.gguf"
    if not source.exists():
        pytest.skip(f"these sources have no {source.name}")
    tokenizer = published(source)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "gemma3")
    for value in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{value}")(8)
    write_tokenizer(writer, tmp_path, tokenizer.get_vocab_size())
    for step in ("header_to_file", "kv_data_to_file", "ti_data_to_file"):
        getattr(writer, f"write_{step}")()
    writer.close()
    model = Vocabulary(tmp_path / "vocabulary.gguf")
    assert check_tokenizer(tokenizer, model, source) > TEXTS
    own = Path(f"{source}.inp").read_text().split("\n__ggml_vocab_test__\n")
    runs = [character * count for character in "\n \t=-.a" for count in range(1, 70)]
    for text in (*own, *runs, *(f"x{run}y" for run in runs)):
        assert model.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def published(path: Path) -> Tokenizer:
    """The tokenizer of a vocabulary file whose tokens are joined by merges."""
    reader = gguf.GGUFReader(path)
    tokens, kinds, merges = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: place for place, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for kind, special in ((gguf.TokenType.CONTROL, True), (gguf.TokenType.USER_DEFINED, False)):
        added = [token for token, each in zip(tokens, kinds, strict=True) if each == kind]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    return tokenizer


class Vocabulary:
    """A file without tensors, of which llama.cpp loads the tokenizer alone."""

    tokenize = TextModel.tokenize

    def __init__(self, path: Path) -> None:
        self._lib, _ = load()
        parameters = self._lib.llama_model_default_params()
        parameters.vocab_only = True
        self.model = self._lib.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model
        self.vocabulary = self._lib.llama_model_get_vocab(self.model)
