"""States that a kill cannot lose, checkpoints that load anywhere, features that are computed once."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.integrations import deepspeed

from distill import models, recipe
from distill.forward import tree
from distill.forward.feature_store import FeatureStore
from distill.inputs.encoding import Encoder
from distill.training import checkpoints, learner, loop, optim, processes
from distill.training.student import adapters_off, freeze, with_lora
from runtime import files
from runtime.errors import InputError, StateError, TrainingError
from tests.checkpoints import FAMILIES
from tests.distill import learning


class Cut(Exception):
    """The plug is pulled."""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["smolvlm"](tmp_path_factory.mktemp("student") / "student")


def prepared(
    student: Path, settings: optim.Optimizing | None = None, model: Any = None
) -> tuple[Any, Any, Any]:
    accelerator = processes.accelerator()
    model = learning.load(student) if model is None else model
    wrapped, optimizer = accelerator.prepare(
        learner.Learner(model), optim.build(model, settings or optim.Optimizing(lr=1e-3))
    )
    return accelerator, wrapped, optimizer


def moved(wrapped: Any, optimizer: Any, names: str = "") -> None:
    """One optimizer step with gradients of ones on parameters whose name contains `names`."""
    for name, parameter in wrapped.named_parameters():
        if names in name and parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def content(wrapped: Any, optimizer: Any) -> list[Any]:
    return [wrapped.state_dict(), [part.state_dict() for part in optim.parts(optimizer)]]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


@pytest.mark.parametrize("settings", [optim.Optimizing(lr=1e-3), optim.Optimizing.muon()])
def test_a_state_is_restored(student: Path, tmp_path: Path, settings: optim.Optimizing) -> None:
    accelerator, wrapped, optimizer = prepared(student, settings)
    moved(wrapped, optimizer)
    checkpoints.save(tmp_path, accelerator, wrapped, optimizer, 3, [{"step": 2, "loss": 0.1}])
    other = prepared(student, settings)
    assert not equal(content(wrapped, optimizer), content(*other[1:]))
    assert checkpoints.restore(tmp_path, *other) == (3, [{"step": 2, "loss": 0.1}])
    assert equal(content(wrapped, optimizer), content(*other[1:]))


def test_a_parameter_without_gradients_has_no_state_afterwards(student: Path, tmp_path: Path) -> None:
    """Loading must not make one up: its first step would be counted as its second."""
    accelerator, wrapped, optimizer = prepared(student)
    moved(wrapped, optimizer, "text_model")
    checkpoints.save(tmp_path, accelerator, wrapped, optimizer, 1, [])
    other = prepared(student)
    checkpoints.restore(tmp_path, *other)
    for pair in ((wrapped, optimizer), other[1:]):
        moved(*pair)
    assert equal(content(wrapped, optimizer), content(*other[1:]))


def test_frozen_weights_are_not_in_a_state(student: Path, tmp_path: Path) -> None:
    model = learning.load(student)
    freeze(model, ["vision"])
    accelerator, wrapped, optimizer = prepared(student, model=model)
    moved(wrapped, optimizer)
    checkpoints.save(tmp_path, accelerator, wrapped, optimizer, 1, [])
    saved = checkpoints._saved_keys(checkpoints.states(tmp_path)[-1])
    assert any("text_model" in name for name in saved)
    assert not any("vision_model.encoder" in name for name in saved)
    with pytest.raises(StateError, match=r"what is frozen has changed since"):
        checkpoints.restore(tmp_path, *prepared(student))


def test_no_state_is_step_zero(student: Path, tmp_path: Path) -> None:
    assert checkpoints.restore(tmp_path, *prepared(student)) == (0, [])


def test_killed_while_a_state_is_written(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the weights, the log, the rename, the removal of the state before: a whole state is
    always there, the old one or the new one."""
    saved, text, rmtree = checkpoints.dcp.save, files.write_text, shutil.rmtree
    replace = Path.replace
    budget = 0

    def counted(call: Any) -> Any:
        def cut(*arguments: Any, **options: Any) -> Any:
            nonlocal budget
            budget -= 1
            if budget == 0:
                raise Cut
            found = call(*arguments, **options)
            budget -= 1
            if budget == 0:
                raise Cut
            return found

        return cut

    accelerator, wrapped, optimizer = prepared(student)
    moved(wrapped, optimizer)
    checkpoints.save(tmp_path, accelerator, wrapped, optimizer, 1, [])
    old = copy.deepcopy(content(wrapped, optimizer))
    moved(wrapped, optimizer)
    new = content(wrapped, optimizer)
    assert not equal(old, new)
    steps = []
    for start in range(1, 40):
        with monkeypatch.context() as patch:
            budget = start
            patch.setattr(checkpoints.dcp, "save", counted(saved))
            patch.setattr(files, "write_text", counted(text))
            patch.setattr(shutil, "rmtree", counted(rmtree))
            patch.setattr(Path, "replace", counted(replace))
            try:
                checkpoints.save(tmp_path, accelerator, wrapped, optimizer, 2, [])
                done = True
            except Cut:
                done = False
        other = prepared(student)
        step, _ = checkpoints.restore(tmp_path, *other)
        assert equal(content(*other[1:]), old if step == 1 else new)
        steps.append(step)
        if done:
            break
    assert done and steps == sorted(steps) and set(steps) == {1, 2} and len(steps) > 6
    assert [path.name for path in checkpoints.states(tmp_path)] == ["state-00000002"]


def test_forget(student: Path, tmp_path: Path) -> None:
    accelerator, wrapped, optimizer = prepared(student)
    moved(wrapped, optimizer)
    checkpoints.save(tmp_path, accelerator, wrapped, optimizer, 1, [])
    checkpoints.forget(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- Hugging Face checkpoints -----------------------------------------


def logits(model: Any, encoder: Encoder) -> torch.Tensor:
    prompt = encoder.encode(learning.sample(1))
    batch = tree.pack(model, [[tree.Group(prompt, (prompt.ids[:5],))]], encoder.pad_id)
    with torch.no_grad():
        return tree.log_probs(model, batch)


def test_a_checkpoint_with_its_processor(student: Path, tmp_path: Path) -> None:
    accelerator, wrapped, optimizer = prepared(student)
    moved(wrapped, optimizer)
    encoder = Encoder.load(str(student))
    checkpoints.write_model(tmp_path / "out", accelerator, wrapped, encoder.processor)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded, encoder), logits(wrapped.model.eval(), encoder))
    AutoProcessor.from_pretrained(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("kind", ["merge", "adapter"])
def test_lora(student: Path, tmp_path: Path, kind: Any) -> None:
    """Off, the adapters leave the initial student; merged, the checkpoint needs no peft."""
    from peft import PeftModel

    encoder = Encoder.load(str(student))
    before = logits(learning.load(student), encoder)
    model = with_lora(learning.load(student), 4, 8.0, "all-linear")
    accelerator, wrapped, optimizer = prepared(student, optim.Optimizing(lr=1e-2), model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    moved(wrapped, optimizer)
    moved(wrapped, optimizer)
    plain = model.get_base_model()
    learned = logits(plain, encoder)
    assert not torch.allclose(learned, before, atol=1e-3)
    with adapters_off(model):
        assert torch.equal(logits(plain, encoder), before)
    assert torch.equal(logits(plain, encoder), learned)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    checkpoints.write_model(tmp_path / "out", accelerator, wrapped, lora=kind)
    if kind == "merge":
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
        assert not (tmp_path / "out" / "adapter_config.json").exists()
    else:
        loaded = PeftModel.from_pretrained(learning.load(student), tmp_path / "out").get_base_model()
    assert torch.allclose(logits(loaded, encoder), learned, atol=1e-4)


# --- refusals ---------------------------------------------------------


def test_weights_in_sixteen_bits_are_refused(student: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.bfloat16)
    with pytest.raises(TrainingError, match=r"is bfloat16, wanted float32: at a rate of 1e-06"):
        optim.build(model, optim.Optimizing())


def test_frozen_sixteen_bits_under_lora_are_fine(student: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.bfloat16)
    tuned = with_lora(model, 4, 8.0, "all-linear")
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    optim.build(tuned, optim.Optimizing())


def test_such_an_update_does_round_to_zero() -> None:
    """What the refusal is about: Adam's update is about the rate; bfloat16 has 8 bits."""
    for dtype, changes in ((torch.bfloat16, False), (torch.float32, True)):
        weight = torch.nn.Parameter(torch.full((4,), 0.02, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
        before = weight.detach().clone()
        for _ in range(10):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert torch.equal(weight, before) != changes


def test_nothing_to_train(student: Path) -> None:
    model = learning.load(student)
    freeze(model, ["vision", "language", "embeddings"])
    with pytest.raises(TrainingError, match=r"no trainable parameter"):
        optim.build(model, optim.Optimizing())


def test_an_unknown_part_to_freeze(student: Path) -> None:
    with pytest.raises(InputError, match=r"train.freeze: unknown part 'eyes'; known: vision"):
        freeze(learning.load(student), ["eyes"])


def test_frozen_vision_freezes_its_adapters(student: Path) -> None:
    tuned = with_lora(learning.load(student), 4, 8.0, "all-linear")
    freeze(tuned, ["vision"])
    learned = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert learned and all("text_model" in name and "lora_" in name for name in learned)


def test_freezing_vision_leaves_the_decoder(student: Path) -> None:
    model = learning.load(student)
    freeze(model, ["vision"])
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned and all("text_model" in name or "lm_head" in name for name in learned)


def test_weight_decay_spares_vectors(student: Path) -> None:
    groups = optim.build(learning.load(student), optim.Optimizing(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])


# --- features ---------------------------------------------------------


def test_features_are_kept_and_found_again(student: Path, tmp_path: Path) -> None:
    model, encoder = learning.load(student), Encoder.load(str(student))
    prompts = [encoder.encode(learning.sample(number)) for number in (0, 3, 1, 6)]  # 0 and 1: one image
    store = FeatureStore(tmp_path)
    first = store.features(model, prompts)
    assert store.computed == 3 and len(first) == 4
    again = FeatureStore(tmp_path)
    second = again.features(model, prompts[::-1])
    assert again.computed == 0
    for mine, other in zip(first.tokens, second.tokens[::-1], strict=True):
        assert torch.equal(mine, other)


def test_memory_and_disk_are_bounded(student: Path, tmp_path: Path) -> None:
    model, encoder = learning.load(student), Encoder.load(str(student))
    prompts = [encoder.encode(learning.sample(3 * number)) for number in range(4)]
    store = FeatureStore(tmp_path, memory_mib=0, disk_mib=0)
    store.features(model, prompts)
    store.features(model, prompts[-1:])
    assert store.computed == 4 and len(store._kept) == 1, "the last one is kept, whatever its size"
    store.features(model, prompts[:1])
    assert store.computed == 5 and list(tmp_path.iterdir()) == []


# --- the loop's extras ------------------------------------------------


def fit(student: Path, directory: Path, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    torch.manual_seed(int(directory.stat().st_ino) % 100)  # the global generator must not matter
    model, encoder = learning.load(student), Encoder.load(str(student))
    steps = learning.label_steps(encoder)
    settings = options.pop("settings", optim.Optimizing(lr=1e-3))
    steps.steps = options.pop("steps", steps.steps)
    return model, loop.fit(model, steps, settings, directory, **options)


def test_the_best_student_is_kept(student: Path, tmp_path: Path) -> None:
    values = iter([0.3, 0.7, 0.5])
    seen: list[Any] = []

    def validate(model: Any, step: int) -> float:
        assert not torch.is_grad_enabled() and not model.training
        seen.append((step, model.get_input_embeddings().weight.detach().clone()))
        return next(values)

    _, log = fit(student, tmp_path, validate=validate, validate_every=1)
    assert [entry["validation"] for entry in log] == [0.3, 0.7, 0.5]
    best = AutoModelForImageTextToText.from_pretrained(tmp_path / loop.BEST)
    assert torch.equal(best.get_input_embeddings().weight, seen[1][1])


def test_patience(student: Path, tmp_path: Path) -> None:
    values = iter([0.5, 0.4, 0.5, 0.9])
    _, log = fit(student, tmp_path, validate=lambda *_: next(values), validate_every=1, patience=2)
    assert len(log) == 3
    _, again = fit(student, tmp_path, validate=lambda *_: next(values), validate_every=1, patience=2)
    assert again == log, "an early stop is not resumed past"


def test_the_final_model_and_shown_figures(student: Path, tmp_path: Path) -> None:
    shown: list[dict[str, float]] = []
    model, log = fit(
        student, tmp_path, out=tmp_path / "final", progress=lambda done, total, figures: shown.append(figures)
    )
    final = AutoModelForImageTextToText.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(final[name], value) for name, value in model.state_dict().items())
    assert all(figures["tokens_per_s_device"] > 0 for figures in shown)
    assert not any("tokens_per_s_device" in entry or "flops" in entry for entry in log)


def test_cut_and_continued_with_dropout(student: Path, tmp_path: Path) -> None:
    """Random numbers of a step come from (seed, step)."""

    def run(directory: Path, cut: int = -1, seed: int = 1) -> Any:
        directory.mkdir(exist_ok=True)
        model, encoder = learning.load(student), Encoder.load(str(student))
        for layer in model.model.text_model.layers:
            layer.self_attn.attention_dropout = 0.3
        steps = learning.label_steps(encoder)

        def progress(done: int, *_: object) -> None:
            if done == cut:
                raise Cut

        torch.manual_seed(cut + 5)
        log = loop.fit(
            model, steps, optim.Optimizing(lr=1e-3), directory, save_every=1, progress=progress, seed=seed
        )
        return model.state_dict(), log

    wanted = run(tmp_path / "whole")
    with pytest.raises(Cut):
        run(tmp_path / "cut", 2)
    assert equal(list(run(tmp_path / "cut")), list(wanted))
    assert not equal(list(run(tmp_path / "other", seed=2)), list(wanted)), "dropout does something"


def test_bf16_computes_over_float32_weights(student: Path, tmp_path: Path) -> None:
    """Other losses than in float32, near them; weights stay float32 and a rate of 1e-6 does change them."""
    from accelerate.state import AcceleratorState

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    _, exact = fit(student, tmp_path / "a", steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = processes.accelerator("bf16")
        model, log = fit(
            student, tmp_path / "b", steps=2, accelerator=accelerator, settings=optim.Optimizing(lr=1e-6)
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert log[0]["loss"] != exact[0]["loss"]
    assert log[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
    start = learning.load(student).state_dict()
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    changed = [not torch.equal(value, start[name]) for name, value in model.state_dict().items()]
    assert sum(changed) > 0.9 * len(changed)


def test_gradient_checkpointing_changes_nothing(student: Path, tmp_path: Path) -> None:
    from distill.training.student import checkpointed

    found = []
    for name in ("plain", "checkpointed"):
        model, encoder = learning.load(student), Encoder.load(str(student))
        if name == "checkpointed":
            checkpointed(model)
        model.train()
        steps = learning.label_steps(encoder)
        steps.prepare(model, 0)
        found.append(learning.gradients(model, steps, 0)[0])
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_tensorboard(student: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accelerator = processes.accelerator(trackers=["tensorboard"], directory=tmp_path)
    accelerator.init_trackers("run")
    fit(student, tmp_path, steps=2, accelerator=accelerator)
    accelerator.end_training()
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_out_of_memory_has_advice(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(tree, "hidden_states", full)
    with pytest.raises(TrainingError, match=r"step 0: out of memory .*lower `train.tokens_per_device`"):
        fit(student, tmp_path, steps=1)


def test_zero_3_does_not_shard_what_is_loaded(student: Path) -> None:
    """Masks need whole tensors; with ZeRO-3 on, transformers would load through `zero.Init`."""

    class ZeroThree:
        def is_zero3(self) -> bool:
            return True

    config = ZeroThree()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        model = models.load(recipe.Model(checkpoint=str(student)))
        assert deepspeed.is_deepspeed_zero3_enabled(), "the run's own setting stands afterwards"
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert all(parameter.numel() for parameter in model.parameters())
