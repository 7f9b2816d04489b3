"""GGUF bundles of every family through llama.cpp: parity, sessions, quantization, damage."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import torch  # noqa: E402
from tokenizers import processors  # noqa: E402

from evals.torch_session import TorchSession  # noqa: E402
from export import export_all, gguf_gate, gguf_modelfile, llamacpp  # noqa: E402
from export.checkpoint import load as load_checkpoint  # noqa: E402
from export.gguf import _OTHERS, _needed, export_gguf, plan_files  # noqa: E402
from export.gguf_kinds import DIRECT, KINDS, QUANTIZED, Request, TensorRule  # noqa: E402
from export.gguf_vocabulary import Kind  # noqa: E402
from export.gguf_write import write as write_file  # noqa: E402
from export.llamacpp import quantize, weight_bits  # noqa: E402
from runtime import bundle, conformance  # noqa: E402
from runtime.answer import Turn  # noqa: E402
from runtime.errors import CheckpointError, InputError, ParityError, StateError  # noqa: E402
from runtime.generation import GenerationOptions  # noqa: E402
from runtime.gguf_library import FIDELITY, MOST_AT_ONCE, TextModel, VisionModel  # noqa: E402
from runtime.gguf_library import load as load_library  # noqa: E402
from runtime.gguf_session import GgufBackend  # noqa: E402
from runtime.prompt import load_tokenizer  # noqa: E402
from runtime.providers import RunSettings  # noqa: E402
from runtime.session import Session, open_bundle  # noqa: E402
from tests import gguf_checkpoints  # noqa: E402

NAMES = ("smolvlm", "smolvlm_tiles", "qwen2_5_vl", "qwen3_vl", "internvl", "lfm2_vl", "gemma3")
TEXT_RMS = {"qwen2_5_vl": 5e-3, "qwen3_vl": 5e-3, "gemma3": 1e-3}
"""float32 files; `test_where_llama_cpp_computes_otherwise`, and GELU, which ggml has in a float16 table."""
SHORT = GenerationOptions(max_new_tokens=8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gguf")
    return {name: gguf_checkpoints.write(name, root / name) for name in NAMES}


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """float32 of each family; the gate has passed when this returns."""
    out = tmp_path_factory.mktemp("bundles")
    for name, checkpoint in checkpoints.items():
        export_gguf(checkpoint, {"f32": out / name}, names={"f32": name})
    return {name: out / name for name in checkpoints}


@pytest.fixture(scope="module", params=NAMES)
def session(bundles: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Session]:
    with open_bundle(bundles[request.param], threads=1) as opened:
        yield opened


def picture(seed: int = 0, size: tuple[int, int] = (96, 72)) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


# --- parity -----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_text_model_is_the_checkpoints_and_features_are_near(bundles: dict[str, Path], name: str) -> None:
    parity = bundle.read(bundles[name]).parity
    assert parity.figures["text_top1_agreement"] == 1.0
    assert parity.figures["text_logit_rms_error"] < TEXT_RMS.get(name, 1e-5)
    assert parity.figures["feature_rms_error"] < 0.02, "ggml's float16 tables"
    assert set(parity.limits) == {"feature_rms_error", "text_logit_rms_error"}


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_conforms(bundles: dict[str, Path], name: str) -> None:
    with open_bundle(bundles[name], threads=1) as opened:
        assert conformance.check(opened, bundles[name]) == []


def test_features_in_another_order_are_seen(session: Session) -> None:
    """The limits alone must see what a wrong layout of the vision model would do."""
    prepared = session.prepare(picture())
    features = session.encode_image(prepared)
    turned = type(features)(features.tokens[::-1].copy(), features.grids, features.deepstack)
    error = np.sqrt(np.mean((turned.tokens - features.tokens) ** 2) / np.mean(features.tokens**2))
    assert error > 5 * 0.02


# --- pictures whose tokens see each other ------------------------------


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("add_sliding_window_pattern", None),
        ("add_sliding_window", 19),
        ("add_rope_freq_base_swa", 2e3),
        ("add_rope_scaling_factor", 1.9),
    ],
)
def test_a_wrong_key_breaks_the_gate(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    changed: float | None,
) -> None:
    real = getattr(gguf.GGUFWriter, key)
    monkeypatch.setattr(
        gguf.GGUFWriter, key, lambda writer, _: None if changed is None else real(writer, changed)
    )
    with pytest.raises(ParityError, match="gate: logit_rms_error"):
        export_gguf(checkpoints["gemma3"], {"f32": tmp_path / "b"}, names={"f32": "b"})


def test_a_session_that_does_not_let_them_breaks_the_gate(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TextModel.extend
    monkeypatch.setattr(TextModel, "extend", lambda self, rows, at, both_ways=False: real(self, rows, at))
    with pytest.raises(ParityError, match="gate: logit_rms_error"):
        export_gguf(checkpoints["gemma3"], {"f32": tmp_path / "b"}, names={"f32": "b"})


def test_greedy_answers_are_the_checkpoints(checkpoints: dict[str, Path], bundles: dict[str, Path]) -> None:
    """Whole answers of the session at its usual speed: pictures in one turn, in a later one, in none."""
    one, two = picture(), picture(1, (40, 90))
    red, blue = ("what color?", "red", (one,)), ("and this?", "blue", (two,))
    asked = [
        ("what color?", [one], []),
        ("a  circle\n\nyes or no?", [one, two], []),
        ("and this?", [two], [red]),
        ("sure?", [], [red, blue]),
        ("is it red?", [], []),
    ]
    reference, seen = TorchSession(checkpoints["gemma3"]), set()
    with open_bundle(bundles["gemma3"], threads=1) as opened:
        for question, images, turns in asked:
            ours, theirs = (
                [Turn(text, answer, tuple(map(each.prepare, shown))) for text, answer, shown in turns]
                for each in (opened, reference)
            )
            wanted = reference.generate(images, question, SHORT.max_new_tokens, history=theirs)
            assert list(opened.ask(images, question, SHORT, history=ours).token_ids) == wanted, question
            seen |= set(wanted)
    reference.close()
    assert len(seen) > 8, "an answer of one token would show little"


def test_too_many_of_them_are_an_input_error(bundles: dict[str, Path]) -> None:
    with open_bundle(bundles["gemma3"], threads=1) as opened:
        text = opened._backend.text  # type: ignore[union-attr]
        rows = np.zeros((MOST_AT_ONCE + 1, text.width), np.float32)
        with pytest.raises(InputError, match="which see each other"):
            text.extend(rows, np.zeros((1, len(rows)), np.int64), both_ways=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 12}, "has 16 tokens and text_config.sliding_window is 12"),
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        (
            {"rope_parameters": {
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3},
                "full_attention": {"rope_type": "default", "rope_theta": 1e5},
            }},
            "sliding_attention: rope_type 'linear'",
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_do_is_refused_by_name(
    checkpoints: dict[str, Path], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    copy = _copy(checkpoints["gemma3"], tmp_path, "other")
    gguf_checkpoints.edit(copy, lambda config: config["text_config"].update(change))
    with pytest.raises(CheckpointError, match=message):
        plan_files(copy)


def test_a_configuration_that_leaves_out_what_is_usual(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """As published ones do: transformers knows the rest."""
    copy = _copy(checkpoints["gemma3"], tmp_path, "sparse")

    def older(config: dict[str, object]) -> None:
        text = config["text_config"]
        ropes = text.pop("rope_parameters")  # type: ignore[attr-defined]
        for name in ("rms_norm_eps", "hidden_activation", "max_position_embeddings", "attention_bias"):
            del text[name]  # type: ignore[attr-defined]
        text["rope_theta"] = ropes["full_attention"]["rope_theta"]  # type: ignore[index]
        text["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]  # type: ignore[index]
        text["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}  # type: ignore[index]

    gguf_checkpoints.edit(copy, older)
    found = {}
    for name, checkpoint in (("whole", checkpoints["gemma3"]), ("sparse", copy)):
        files = plan_files(checkpoint)
        write_file(files.text, files.source, tmp_path / f"{name}.gguf", "f32")
        fields = gguf.GGUFReader(tmp_path / f"{name}.gguf").fields
        found[name] = {key: fields[key].contents() for key in fields if key.startswith("gemma3.")}
    assert found["whole"].pop("gemma3.context_length") == 2048
    assert found["sparse"].pop("gemma3.context_length") == 131072
    assert found["sparse"] == found["whole"] and len(found["whole"]) > 12


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "q4_0"])
def test_a_wrong_key_breaks_the_gate_of_small_types(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Their weights are near those of a float32 file, which then must be the checkpoint's."""
    real = gguf.GGUFWriter.add_rope_freq_base
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda writer, base: real(writer, base / 1.5))
    with pytest.raises(ParityError, match=r"logit_rms_error .* at most 0\.005 allowed \(the float32 file"):
        export_gguf(checkpoints["smolvlm"], {kind: tmp_path / "b"}, names={kind: "b"})
    assert not (tmp_path / "b").exists()


class Float16Gelu(torch.nn.Module):
    """A table of float16 numbers, between -10 and 10."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
        return torch.where(values <= -10, 0.0, torch.where(values >= 10, values, table))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_where_llama_cpp_computes_otherwise(
    checkpoints: dict[str, Path], bundles: dict[str, Path], name: str
) -> None:
    """Text alone is 1e-4 off, and equal to a checkpoint that does the same: a norm without its epsilon; the
    frequencies that no section of the interleaved M-RoPE claims left at position 0; GELU in float16."""
    ids = np.random.default_rng(0).integers(10, 300, 24)
    path = bundles[name] / bundle.read(bundles[name]).part("text_model").path
    text = TextModel(path, context=64, threads=1, settings=FIDELITY, spin=False)
    got = text.extend(ids, np.arange(len(ids))[None])
    text.close()
    model = load_checkpoint(checkpoints[name]).model

    def error() -> float:
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor(ids)[None]).logits[0, -1].numpy()
        return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))

    before = error()
    assert before > 5e-5
    if name == "qwen2_5_vl":
        for module in model.model.language_model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.0
    elif name == "gemma3":
        for layer in model.model.language_model.layers:
            layer.mlp.act_fn = Float16Gelu()
    else:
        counts = model.config.text_config.rope_parameters["mrope_section"]
        frequencies = model.model.language_model.rotary_emb.inv_freq
        unclaimed = [at for at in range(len(frequencies)) if at >= 3 * counts[at % 3]]
        assert unclaimed
        frequencies[unclaimed] = 0.0
    assert error() < before / 10


# --- sessions ---------------------------------------------------------


def test_a_second_question_gives_what_a_fresh_one_gives(session: Session) -> None:
    image = picture()
    first = session.ask(image, "what color?", SHORT)
    assert session.ask(image, "what color?", SHORT).token_ids == first.token_ids
    second = session.ask(image, "is it red?", SHORT)
    other = session.ask(picture(1), "is it red?", SHORT)
    assert session.ask(image, "is it red?", SHORT).token_ids == second.token_ids
    assert other.stats.image_tokens and second.stats.prompt_tokens


def test_prefill_equals_prefill_and_decode(session: Session) -> None:
    prepared = session.prepare(picture())
    ids, features = session.prompt_ids("what color?", [prepared]), session.encode_image(prepared)
    whole = session.prefill(ids, [features])
    session.prefill(ids[:-3], [features])
    for token in ids[-3:]:
        logits = session.decode(int(token))
    # the speed settings: flash attention and a float16 cache
    assert np.abs(logits - whole).max() < 0.02 * np.abs(whole).max()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_llama_cpps_own_way_gives_the_same_logits(bundles: dict[str, Path], name: str) -> None:
    """As its tools go: one text with a mark for the picture, which has the size that they leave alone."""
    manifest = bundle.read(bundles[name])
    paths = {part.role: bundles[name] / part.path for part in manifest.parts}
    with open_bundle(bundles[name], threads=1) as opened:
        prepared = opened.prepare(picture(size=(64, 64)))
        ids = opened.prompt_ids("what color?", [prepared])
        places = np.flatnonzero(ids == manifest.merge.token)
        slot = manifest.prompt.image
        first, last = places[0] - len(slot.before), places[-1] + 1 + len(slot.after)
        texts = [
            opened.tokenizer.decode(part.tolist(), skip_special_tokens=False)
            for part in (ids[:first], ids[last:])
        ]
    backend = GgufBackend(bundles[name], manifest, RunSettings(threads=1), 256, FIDELITY)
    with Session(manifest, backend, opened.tokenizer, max_context=256, reuse=False) as session:
        ours = session.prefill(ids, [session.encode_image(prepared)])
    text = TextModel(paths["text_model"], context=256, threads=1, settings=FIDELITY, spin=False)
    vision = VisionModel(paths["mmproj"], text, threads=1, settings=FIDELITY)
    theirs = by_its_helper(text, vision, texts, prepared.views[0].inputs["pixel_bytes"])
    vision.close()
    text.close()
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()


def by_its_helper(text: TextModel, vision: VisionModel, around: list[str], pixels: np.ndarray) -> np.ndarray:
    """Logits after the text around a picture, tokenised and decoded by mtmd."""
    lib, mtmd = load_library()
    prompt = mtmd.mtmd_default_marker().join(part.encode() for part in around)
    given = mtmd.mtmd_input_text()
    given.text, given.text_len, given.add_special, given.parse_special = prompt, len(prompt), False, True
    height, width, _ = pixels.shape
    data = np.ascontiguousarray(pixels).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap, chunks = mtmd.mtmd_bitmap_init(width, height, data), mtmd.mtmd_input_chunks_init()
    bitmaps, past = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), lib.llama_pos(0)
    assert mtmd.mtmd_tokenize(vision.context, chunks, ctypes.byref(given), bitmaps, 1) == 0
    status = mtmd.mtmd_helper_eval_chunks(
        vision.context, text.context, chunks, 0, 0, 256, True, ctypes.byref(past)
    )
    mtmd.mtmd_input_chunks_free(chunks)
    mtmd.mtmd_bitmap_free(bitmap)
    assert status == 0
    return np.ctypeslib.as_array(lib.llama_get_logits_ith(text.context, -1), shape=(text.tokens,)).copy()


def test_a_question_without_a_picture(session: Session) -> None:
    if session.manifest.prompt.user_without_image is not None:
        assert session.ask(None, "what color?", SHORT).token_ids


def test_streaming_gives_the_answer_in_pieces(session: Session) -> None:
    pieces = list(session.stream(picture(), "what color?", SHORT))
    assert "".join(pieces) == session.ask(picture(), "what color?", SHORT).text
    assert session.kv_bytes > 0


# --- quantization -----------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, the block of k-quants."""
    return gguf_checkpoints.write("smolvlm", tmp_path_factory.mktemp("wide") / "wide", hidden=256)


def test_named_types_store_what_they_say(wide: Path, tmp_path: Path) -> None:
    files = plan_files(wide)
    base = tmp_path / "base.gguf"
    write_file(files.text, files.source, base, "f32")
    sizes = {}
    for kind in QUANTIZED:
        out = tmp_path / f"{kind}.gguf"
        quantize(base, out, kind)
        assert gguf_gate.same_but_rounded(base, out, kind) > 0
        stored = weight_bits(out)[0].scheme
        assert stored == kind.removesuffix("_m") or stored == kind
        sizes[kind] = out.stat().st_size
    assert sizes["q6_k"] > sizes["q5_k_m"] > sizes["q4_k_m"] > sizes["q4_0"]


def test_rules_and_importance(wide: Path, tmp_path: Path) -> None:
    rules = (TensorRule("blk.0.ffn_*", "q8_0"),)
    plain, weighed = (tmp_path / name for name in ("plain", "weighed"))
    export_gguf(wide, {"q4_k_m": plain}, names={"q4_k_m": "m"}, request=Request(rules=rules))
    export_gguf(wide, {"q4_k_m": weighed}, names={"q4_k_m": "m"}, request=Request(importance=True))
    manifests = [bundle.read(path) for path in (plain, weighed)]
    assert [manifest.precision for manifest in manifests] == ["q4_k_m", "q4_k_m-imatrix"]
    schemes = {bits.scheme for bits in manifests[0].part("text_model").bits}
    assert {"q4_k", "q6_k", "q8_0"} <= schemes
    texts = [
        (path / m.part("text_model").path).read_bytes()
        for path, m in zip((plain, weighed), manifests, strict=True)
    ]
    assert texts[0] != texts[1]
    assert "Not tried" in (plain / "Modelfile").read_text()


def test_importance_of_the_user_s_own_questions(wide: Path, tmp_path: Path) -> None:
    photo = Image.new("RGB", (40, 30), (200, 30, 90))
    asked: dict[str, Any] = {"to": "gguf", "request": Request(importance=True)}
    own, gates = tmp_path / "own", tmp_path / "gates"
    (first,) = export_all(wide, own, ["q4_0"], examples=[(photo, "is it red?")], **asked)
    (second,) = export_all(wide, gates, ["q4_0"], **asked)
    texts = [(path / bundle.read(path).part("text_model").path).read_bytes() for path in (first, second)]
    assert texts[0] != texts[1]
    with pytest.raises(InputError, match="--imatrix"):
        export_all(wide, tmp_path / "none", ["q4_0"], to="gguf", examples=[(photo, "is it red?")])
    assert not (tmp_path / "none").exists()


def test_rows_that_do_not_fit_are_told(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    export_gguf(checkpoints["smolvlm"], {"q4_k_m": tmp_path / "b"}, names={"q4_k_m": "b"})
    part = bundle.read(tmp_path / "b").part("text_model")
    assert part.fallbacks and part.fallbacks[0].asked == "q4_k_m"
    assert part.fallbacks[0].got != "q4_k"
    assert all(bits.bits >= 8 for bits in bundle.read(tmp_path / "b").part("mmproj").bits)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("kind", ["f32", "q4_k_m"])
def test_too_little_space_is_told_before_the_work(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 80, 20 * 2**20))
    with pytest.raises(StateError, match=r"needs about \d+ MiB, 20 MiB are free; free some space"):
        export_gguf(
            checkpoints["smolvlm"], {kind: tmp_path / "new" / "b"}, names={kind: "b"}, progress=lines.append
        )
    assert lines == ["reading the checkpoint"] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_no_smaller_than_the_tensors_but_of_their_size(
    wide: Path, tmp_path: Path, kind: str
) -> None:
    """q8_0 stands for all that take less."""
    files = plan_files(wide)
    text, vision = tmp_path / "text.gguf", tmp_path / "vision.gguf"
    write_file(files.text, files.source, text, kind if kind in DIRECT else "f32")
    if kind not in DIRECT:
        text, base = tmp_path / "small.gguf", text
        quantize(base, text, kind)
    write_file(
        files.vision, files.source, vision, {"f32": "f32", "f16": "f16", "bf16": "f16"}.get(kind, "q8_0")
    )
    tensors = sum(int(tensor.n_bytes) for path in (text, vision) for tensor in gguf.GGUFReader(path).tensors)
    (_, bundle_bytes), *others = _needed(files, {kind: tmp_path / "b"}, {})
    assert tensors <= bundle_bytes - _OTHERS <= (tensors if kind in DIRECT else 2 * tensors)
    assert len(others) == (kind != "f32")


def test_unknown_tensor_types_are_told() -> None:
    with pytest.raises(InputError, match="is not known"):
        llamacpp.ggml_type("q9")


def test_kinds_of_tokens_are_ggufs() -> None:
    assert all(gguf.TokenType[kind.name] == kind for kind in Kind)


def test_an_importance_matrix_that_weighs_nothing_is_told(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="imatrix: weighs nothing in f16, q8_0"):
        export_gguf(
            wide, {kind: tmp_path / kind for kind in ("f16", "q8_0")}, names={"f16": "a", "q8_0": "b"},
            request=Request(importance=True),
        )  # fmt: skip


def test_what_stops_llama_cpps_own_tools_is_told(bundles: dict[str, Path]) -> None:
    """They look up a token of two newlines, which this tokenizer does not have."""
    assert "no token '\\n\\n'" in (bundles["smolvlm"] / "Modelfile").read_text()
    assert "own tools" not in (bundles["internvl"] / "Modelfile").read_text()


def test_a_modelfile_leaves_the_first_token_to_llama_cpp(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Which puts it before every text where the tokenizer does."""
    manifest = bundle.read(bundles["smolvlm"])
    tokenizer = load_tokenizer(bundles["smolvlm"] / "tokenizer.json")
    begin = manifest.prompt.system[0] if manifest.prompt.system else tokenizer.token_to_id("<|im_start|>")
    text, rest = tokenizer.id_to_token(begin), manifest.prompt.system[1:]
    prompt = manifest.prompt.model_copy(update={"system": (begin, *rest)})
    written = {}
    for adds in (False, True):
        if adds:
            tokenizer.post_processor = processors.TemplateProcessing(f"{text} $A", None, [(text, begin)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        gguf_modelfile.write(tmp_path, manifest.model_copy(update={"prompt": prompt}))
        written[adds] = (tmp_path / "Modelfile").read_text().split('TEMPLATE """')[1]
    assert written[False] == text + written[True]


# --- damage -----------------------------------------------------------


def _copy(checkpoint: Path, out: Path, name: str) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(checkpoint, out / name))


def test_a_wrong_pre_tokenizer_is_seen(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that merges 1 and 2, under a rule that takes digits one by one."""
    copy = _copy(checkpoints["smolvlm"], tmp_path, "digits")
    content = json.loads((copy / "tokenizer.json").read_text())
    model = content["model"]
    last = "".join(model["merges"].pop())
    model["merges"].append(["1", "2"])
    model["vocab"]["12"] = model["vocab"].pop(last)
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    monkeypatch.setattr("export.gguf_tokenizer.pre_tokenizer", lambda *_: "smollm")
    with pytest.raises(ParityError, match=r"llama\.cpp reads"):
        export_gguf(copy, {"f32": tmp_path / "b"}, names={"f32": "b"})
    assert not (tmp_path / "b").exists()
    monkeypatch.undo()
    export_gguf(copy, {"f32": tmp_path / "b"}, names={"f32": "b"})


def test_a_tensor_that_nobody_knows_fails(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = _copy(checkpoints["internvl"], tmp_path, "more")
    weights = load_file(copy / "model.safetensors")
    prefix = next(name for name in weights if "vision_tower" in name).split("vision_tower")[0]
    weights[f"{prefix}vision_tower.encoder.layer.0.odd.weight"] = weights[next(iter(weights))].clone()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no name for it in GGUF"):
        plan_files(copy)


@pytest.mark.parametrize("place", ["blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight"])
def test_another_text_tensor_breaks_the_gate(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    _change(monkeypatch, place)
    with pytest.raises(ParityError, match="gate"):
        export_gguf(checkpoints["qwen3_vl"], {"f32": tmp_path / "b"}, names={"f32": "b"})


@pytest.mark.parametrize("place", ["v.position_embd.weight", "v.blk.0.attn_qkv.weight", "mm.0.weight"])
def test_another_vision_tensor_breaks_the_gate(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    _change(monkeypatch, place)
    with pytest.raises(ParityError, match="gate"):
        export_gguf(checkpoints["qwen3_vl"], {"f32": tmp_path / "b"}, names={"f32": "b"})


def _change(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The writer stores the tensor `place` with its rows in another order."""
    from export import gguf_write

    real = gguf_write._rows

    def rows(piece, source):  # type: ignore[no-untyped-def]
        found = real(piece, source)
        return found.flip(0) if piece.name == place else found

    monkeypatch.setattr(gguf_write, "_rows", rows)
