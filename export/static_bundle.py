"""Writes bundles of the flavour `portable-static`: four graphs, weights once, through the same gate.

In: a checkpoint directory, precisions and a plan. Out: bundle directories. Not here: tracing (`static.py`),
static rounding (`static_qdq.py`), what both flavours share (`onnx.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from export import browser_package, gate, onnx, space, static, static_files, static_qdq, target
from export.calibrate import Example
from export.checkpoint import load, read_config
from export.draft import LOGIT_SPREAD, ROUNDED_SPREAD, draft_manifest, part_of, write_conformance
from export.facts import Facts, Progress, expected_of, prepare
from export.families import check_type
from export.quantize import quantize, resolve
from export.static import ROLES
from export.static_qdq import RECIPES, Feeds
from export.targets import Plan, check_precision
from runtime import bundle
from runtime.image import ImageInput
from runtime.manifest import Manifest, Parity, Part, StaticCache
from runtime.session import Session

FILES = {
    "vision_encoder": "vision_encoder.onnx",
    "embed_tokens": "embed_tokens.onnx",
    "decoder_prefill": "decoder_prefill.onnx",
    "decoder": "decoder_token.onnx",
}
DATA = "weights.onnx_data"
"""Every weight of the bundle, each once: prefill and decode differ in their nodes alone."""


def export_static(
    checkpoint: Path,
    targets: Mapping[str, Path],
    *,
    names: Mapping[str, str],
    plan: Plan,
    sample_images: Sequence[ImageInput] = (),
    image_required: bool = False,
    examples: Sequence[Example] = (),
    progress: Progress | None = None,
) -> list[Path]:
    """Write one bundle per precision in `targets`, in that order. Raises PocketError; see the gate.

    `examples`: pictures with questions that ranges are calibrated on, beside those of the gate.
    """
    for precision, path in targets.items():
        check_precision(plan, precision)
        target.check(path)
    say = progress or (lambda _: None)
    say("reading the checkpoint")
    check_type(checkpoint, str(read_config(checkpoint)["model_type"]))
    loaded = load(checkpoint)
    space.check(loaded, dict.fromkeys(targets.values(), resolve("fp32")))  # the most that a precision takes
    facts = prepare(loaded, sample_images, say, image_required=image_required, plan=plan, examples=examples)
    facts.reference.close()
    with tempfile.TemporaryDirectory(prefix="pocketvlm-export-") as scratch, space.told(Path(scratch)):
        plain = Path(scratch) / "fp32"
        if "fp32" not in targets:
            say("fp32: parity gate of the traced parts")
            write_files(facts, plain, facts.graphs)
            check_float(facts, plain, draft(facts, plain, "fp32", "fp32"))
        for precision in sorted(targets, key=lambda each: each != "fp32"):
            with target.staging(targets[precision]) as staged:
                build(facts, staged, precision, names[precision], Path(scratch))
    return list(targets.values())


def build(facts: Facts, staged: Path, precision: str, name: str, scratch: Path) -> None:
    """Fill `staged` with a whole bundle; the manifest is the last file."""
    exact = precision == "fp32"
    facts = _remasked(facts, precision, scratch)
    graphs = facts.graphs if exact else _rounded(facts, precision, scratch)
    facts.say(f"{precision}: writing parts")
    write_files(facts, staged, graphs)
    found = draft(facts, staged, precision, name)
    facts.say(f"{precision}: parity gate")
    parity = check_float(facts, staged, found) if exact else _check_rounded(facts, staged, found, scratch)
    facts.say(f"{precision}: conformance vectors")
    spread = LOGIT_SPREAD if exact else ROUNDED_SPREAD
    vectors = write_conformance(facts, staged, found, spread)
    if found.target == browser_package.TARGET:
        browser_package.write(staged, found)
    bundle.write(found.model_copy(update={"parity": parity, "conformance": vectors}), staged)
    bundle.read(staged)


def _remasked(facts: Facts, precision: str, scratch: Path) -> Facts:
    """The facts with the mask of the precision's recipe, its float graphs proved again."""
    masked = RECIPES[precision].masked if precision in RECIPES else None
    if masked is None:
        return facts
    graphs = static.remasked(facts.graphs, masked)
    facts = replace(facts, graphs=graphs, plan=replace(facts.plan, masked=masked))
    facts.say(f"{precision}: parity gate of the float parts with its mask")
    plain = scratch / f"calibration{masked:.0f}"
    write_files(facts, plain, facts.graphs)
    check_float(facts, plain, draft(facts, plain, "fp32", "calibration"))
    return facts


def _rounded(facts: Facts, precision: str, scratch: Path) -> dict[str, ir.Model]:
    """float16, or the provider's recipe on what the float parts see on the gate's and the user's pictures."""
    if precision not in RECIPES:
        rules = resolve(precision).rules
        return {role: quantize(facts.graphs[role], role, rules) for role in ROLES}
    facts.say(f"{precision}: calibrating on {len(facts.cases) + len(facts.examples)} prompts")
    feeds = record(facts, scratch)
    return {
        role: static_qdq.quantize(facts.graphs[role], role, RECIPES[precision], feeds[role]) for role in ROLES
    }


def record(facts: Facts, scratch: Path) -> dict[str, Feeds]:
    """What each part is fed while the float bundle answers the gate's cases with their forced tokens."""
    plain = scratch / f"calibration{facts.plan.masked:.0f}"
    if not plain.exists():
        write_files(facts, plain, facts.graphs)
    with Session.from_manifest(plain, draft(facts, plain, "fp32", "calibration"), threads=1) as session:
        later = expected_of(facts).later
        shown = [*facts.cases, *facts.examples]
        return static_qdq.record(session, shown, None if later is None else later.talk)


def write_files(facts: Facts, staged: Path, graphs: Mapping[str, ir.Model]) -> None:
    """The parts over one store of weights, and what stands beside them."""
    (staged / "onnx").mkdir(parents=True)
    static_files.save_sharing({FILES[role]: graphs[role] for role in ROLES}, staged / "onnx" / DATA)
    onnx.write_companions(facts, staged)


def draft(facts: Facts, staged: Path, precision: str, name: str) -> Manifest:
    """The manifest of the files in `staged`, with parity and conformance still to come."""
    fixed = StaticCache(chunk=facts.plan.chunk, masked=facts.plan.masked)
    return draft_manifest(
        facts, staged, precision, name, parts=[_part(staged, role) for role in ROLES], fixed=fixed
    )


def _part(staged: Path, role: str) -> Part:
    path = staged / "onnx" / FILES[role]
    return part_of(staged, role, path, [path.parent / x for x in static_files.used_files(ir.load(path))])


def check_float(facts: Facts, staged: Path, found: Manifest) -> Parity:
    """The float parts against the checkpoint."""
    return gate.check_float(facts.checkpoint, staged, found, expected_of(facts), geometry=facts.geometry)


def _limits(precision: str) -> Sequence[gate.Limit]:
    """A recipe has its own limit on the logits."""
    if precision not in RECIPES:
        return gate.ROUNDED_LIMITS
    recipe = RECIPES[precision]
    return [
        *(limit for limit in gate.ROUNDED_LIMITS if limit.figure != "logit_rms_error"),
        gate.Limit("logit_rms_error", recipe.most_error, recipe.reason),
    ]


def _check_rounded(facts: Facts, staged: Path, found: Manifest, scratch: Path) -> Parity:
    return gate.check_quantized(
        facts.checkpoint,
        facts.graphs,
        staged,
        found,
        expected_of(facts),
        scratch,
        twin_of=static_qdq.float_twin,
        geometry=facts.geometry,
        allowed=_limits(found.precision),
    )
