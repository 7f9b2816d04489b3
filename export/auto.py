"""`--quant auto`: the smallest bundle whose accuracy stays inside a budget.

    auto_quantize(checkpoint: Path, out: Path, *, max_drop: float = 0.5, data: Path | None = None,
                  limit: int | None = None, name: str | None = None, image_required: bool = False,
                  sample_images: Sequence[ImageInput] = (), progress: Callable[[str], None] | None = None
                  ) -> Result

In: a checkpoint, an accuracy budget in points (percent of questions), questions with answers. Out: one bundle
at `out`, and `Result` (also `<out>.auto/frontier.json` and `.md`). Not here: rounding, the gate, the table.

Each axis (vision, embedding, decoder, head, cache) is first tried alone, smallest scheme first, until one
fits; then all of these together, and while that is too much, the axis that lost most by itself gives way.
The budget holds for the drop measured on the validation half. Held-out questions are asked once, at the end:
they are reported and choose nothing. Every candidate is one sealed file, so an interrupted search goes on.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.accuracy import AccuracyResult, compare_methods, evaluate
from export import auto_data, calibrate, space, target
from export.auto_report import Candidate, Result, frontier, write
from export.draft import draft_manifest
from export.facts import prepare
from export.quantize_policy import Policy, Rule, Scheme, dump
from export.targets import Plan
from runtime import files
from runtime.errors import InputError, StateError
from runtime.image import ImageInput
from runtime.manifest import Manifest
from runtime.session import Session

CACHE_TOKENS = 1024
"""The KV cache counts with so many tokens (fewer where the context ends), as bytes that a device needs."""

CALIBRATION_EXAMPLES = 32


@dataclass(frozen=True)
class Axis:
    """What may be rounded by itself, its schemes smallest first; the last keeps float32."""

    name: str
    part: str
    node: str
    schemes: tuple[Scheme, ...]

    def rule(self, scheme: Scheme) -> Rule:
        """fp16 is for a whole part: casts around single nodes gain nothing."""
        return Rule(self.part, "*" if scheme == "fp16" else self.node, scheme)


AXES = (
    Axis("cache", "decoder", "GroupQueryAttention:*", ("int8-kv", "keep")),
    Axis(
        "head", "decoder", "MatMul:head", ("int4-block64-gptq", "int4-block32-gptq", "int8-block32", "keep")
    ),
    Axis(
        "decoder",
        "decoder",
        "MatMul:*",
        ("int4-block128-gptq", "int4-block64-gptq", "int4-block32-gptq", "int8-block32", "fp16", "keep"),
    ),
    Axis("vision", "vision_encoder", "MatMul:*", ("int8-dynamic", "int8-block32", "fp16", "keep")),
    Axis("embed", "embed_tokens", "Gather:*", ("int8-row", "fp16", "keep")),
)
"""In the order of the rules: cache and head come before what the decoder's own rule would take."""

Setting = dict[str, Scheme]


def policy_of(setting: Mapping[str, Scheme], name: str = "auto") -> Policy:
    """The rules of one choice per axis."""
    return Policy(name, (*(axis.rule(setting[axis.name]) for axis in AXES), Rule("*", "*", "keep")))


def auto_quantize(
    checkpoint: Path,
    out: Path,
    *,
    max_drop: float = 0.5,
    data: Path | None = None,
    limit: int | None = None,
    name: str | None = None,
    image_required: bool = False,
    sample_images: Sequence[ImageInput] = (),
    plan: Plan | None = None,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Search, write the chosen bundle through the gate, and ask it the held-out questions.

    `max_drop`: points, 0.5 = half a percent of the questions. `data`: JSON lines of image, question and
    answer; easy-VQA by default. `limit`: at most so many questions in each half. Raises PocketError.
    """
    if not (math.isfinite(max_drop) and 0 <= max_drop < 100):
        raise InputError(f"max_drop: got {max_drop}, expected points from 0 to below 100")
    if plan is not None and plan.static:
        raise InputError("--quant auto: searches schemes of the flavour ort-fused; give --flavour ort-fused")
    out = Path(out)
    target.check(out)
    split = auto_data.load(data, limit)
    from export import onnx
    from export.checkpoint import load

    say = progress or (lambda _: None)
    say("reading the checkpoint")
    opened = load(Path(checkpoint))
    work = out.with_name(f"{out.name}.auto")
    files.make_directory(work)
    with files.lock(work):
        _claim(work, {"checkpoint": opened.sha256, "questions": split.sha256})
        examples = auto_data.examples(split.validation, CALIBRATION_EXAMPLES)
        facts = prepare(
            opened, sample_images, say, image_required=image_required, plan=plan, examples=examples
        )
        with tempfile.TemporaryDirectory(prefix="pocketvlm-auto-") as scratch, space.told(Path(scratch)):
            facts = onnx.on_disk(facts, Path(scratch))
            facts.reference.close()
            opened.forget()
            search = _Search(facts, split, work, Path(scratch), max_drop, say)
            chosen = search.run()
            policy = dump(policy_of(chosen.setting), work / "policy.yaml")
            onnx.write_bundles(facts, {str(policy): out}, {str(policy): name or out.name}, Path(scratch))
            held_out = search.confirm(out)
        result = Result(
            bundle=out,
            policy=policy,
            max_drop=max_drop,
            chosen=chosen,
            held_out=held_out,
            confirmed=-100 * held_out.difference <= max_drop,
            frontier=frontier(search.seen.values()),
            candidates=list(search.seen.values()),
        )
        write(result, work)
        return result


def _claim(work: Path, wanted: dict[str, str]) -> None:
    """Results of another checkpoint or other questions do not mix."""
    path = work / "claim.json"
    if path.exists() and files.read_json(path) != wanted:
        raise StateError(
            f"{work}: holds a search of another checkpoint or other questions; remove it, or "
            "choose another output"
        )
    files.write_json(path, wanted)


class _Search:
    """Candidates of one checkpoint, each measured once."""

    def __init__(
        self,
        facts: Any,
        split: auto_data.Split,
        work: Path,
        scratch: Path,
        max_drop: float,
        say: Callable[[str], None],
    ) -> None:
        self.facts, self.split, self.work, self.scratch = facts, split, work, scratch
        self.max_drop, self.say = max_drop, say
        self.seen: dict[str, Candidate] = {}
        self._calibration: calibrate.Calibration | None = None
        self._parts: dict[str, tuple[tuple[Rule, ...], Any]] = {}
        self._float: AccuracyResult | None = None

    def run(self) -> Candidate:
        """The smallest that fits among those looked at."""
        exact: Setting = {axis.name: "keep" for axis in AXES}
        self.measure(exact)
        alone = {axis.name: self._alone(axis, exact) for axis in AXES}
        together = {axis.name: found[0] for axis, found in zip(AXES, alone.values(), strict=True)}
        lost = {name: drop for name, (_, drop) in alone.items()}
        while not self.measure(together).fits:
            axis = max(
                (axis for axis in AXES if together[axis.name] != "keep"), key=lambda axis: lost[axis.name]
            )
            place = axis.schemes.index(together[axis.name])
            together = {**together, axis.name: axis.schemes[place + 1]}
            lost[axis.name] = self.measure({**exact, axis.name: together[axis.name]}).drop
        return min((each for each in self.seen.values() if each.fits), key=lambda each: each.total_bytes)

    def _alone(self, axis: Axis, exact: Setting) -> tuple[Scheme, float]:
        """The smallest scheme of an axis that fits while all else is float32, and its drop."""
        kind = axis.node.split(":")[0]
        there = any(kind in ("*", node.op_type) for node in self.facts.graphs[axis.part].graph)
        for scheme in axis.schemes if there else axis.schemes[-1:]:  # attention may stand inside branches
            found = self.measure({**exact, axis.name: scheme})
            if found.fits:
                return scheme, found.drop
        raise AssertionError("float32 has no drop")

    def measure(self, setting: Setting) -> Candidate:
        """Accuracy and bytes of a setting; from its file when it was measured before."""
        policy = policy_of(setting)
        key = files.sha256_json([dataclasses.astuple(rule) for rule in policy.rules])[:16]
        if key in self.seen:
            return self.seen[key]
        path = self.work / "candidates" / f"{key}.jsonl"
        if path.exists():
            head, answers = files.read_shard(path)
            answered = AccuracyResult.model_validate(answers)
        else:
            self.say(f"trying {' '.join(f'{axis}={scheme}' for axis, scheme in setting.items())}")
            head, answered = self._ask(policy, self.split.validation)
            files.write_shard(path, [head, answered.model_dump(mode="json")])
        if self._float is None:
            self._float = answered  # the first candidate is float32
            if not answered.score.right:
                raise InputError(
                    f"float32 answers none of {answered.score.n} questions right, so no drop could be seen; "
                    "give --data with questions that this checkpoint answers"
                )
        compared = compare_methods("validation", ("fp32", key), self._float, answered)
        found = Candidate(
            key=key, setting=setting, comparison=compared, score=answered.score,
            fits=-100 * compared.difference <= self.max_drop, **head,
        )  # fmt: skip
        self.seen[key] = found
        return found

    def confirm(self, bundle: Path) -> Any:
        """The written bundle and float32 on the held-out questions."""
        self.say(f"asking {len(self.split.held_out)} held-out questions")
        from runtime.session import open_bundle

        exact = policy_of({axis.name: "keep" for axis in AXES})
        _, before = self._ask(exact, self.split.held_out)
        with open_bundle(bundle) as session:
            after = evaluate(session, self.split.held_out)
        return compare_methods("held-out", ("fp32", bundle.name), before, after)

    def _ask(self, policy: Policy, questions: Sequence[Any]) -> tuple[dict[str, int], AccuracyResult]:
        from export import onnx
        from export.graphs import ROLES

        folder = self.scratch / "candidate"
        shutil.rmtree(folder, ignore_errors=True)
        onnx.write_files(self.facts, folder, {role: self._part(role, policy) for role in ROLES})
        draft = draft_manifest(self.facts, folder, policy.name, policy.name)
        with Session.from_manifest(folder, draft) as session:
            answered = evaluate(session, questions)
        size = {"bytes": sum(part.bytes for part in draft.parts), "cache_bytes": cache_bytes(draft)}
        return size, answered

    def _part(self, role: str, policy: Policy) -> Any:
        """A part under these rules; the last one of each role is kept, for most stay the same."""
        from export import onnx
        from export.quantize import quantize

        rules = tuple(rule for rule in policy.rules if rule.part in (role, "*"))
        if role not in self._parts or self._parts[role][0] != rules:
            if policy.calibrated and self._calibration is None:
                self._calibration = onnx.calibration_of(self.facts, self.scratch)
            made = quantize(self.facts.graphs[role], role, rules, self._calibration)
            self._parts[role] = (rules, made)
        return self._parts[role][1]


_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}


def cache_bytes(manifest: Manifest) -> int:
    """Bytes of the state of one sequence of CACHE_TOKENS tokens."""
    tokens = min(CACHE_TOKENS, manifest.limits.context)
    total = 0
    for state in manifest.state:
        sizes = [size if isinstance(size, int) else 1 for size in state.shape]
        if state.sequence_axis is not None:
            sizes[state.sequence_axis] = tokens
        total += math.prod(sizes) * _ITEM_BYTES[state.dtype]
    return total
