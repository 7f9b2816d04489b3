"""Weights of one function's package in fewer bits, by rules and through coremltools.optimize.

In: a saved package with one function, a part's name, a policy. Out: another package, and what was asked for
and not possible. Not here: the rules (`coreml_policy.py`), merging functions (`coreml_convert.py`), the check
of what came out (`coreml_audit.py`).

Functions are compressed before they are merged: equal weights become equal bytes, which merging stores once.
Rules are looked up weight by weight, so that nothing is rounded by the way: a setting for all weights of a
program would take its rotary tables too. Tables of a palette get no scale by row, which makes the file grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from export import coreml_convert, coreml_package
from export.coreml_package import Weight
from export.coreml_policy import Policy, Scheme, sized
from runtime.errors import CheckpointError, MissingExtra
from runtime.manifest import Fallback

LEAST_PARAMETERS = 1024
"""A smaller tensor stays: its scales would take what it saves."""

_DENSE = ("linear", "conv", "matmul", "gather")


@dataclass(frozen=True)
class Choice:
    """A weight and the scheme that it gets; `reason`: why that is not the one that was `asked` for."""

    weight: Weight
    scheme: Scheme
    asked: Scheme
    reason: str = ""

    def fallback(self) -> Fallback | None:
        """For the manifest; None where the weight got what was asked."""
        if self.scheme == self.asked:
            return None
        return Fallback(node=self.weight.label, asked=self.asked, got=self.scheme, reason=self.reason)


def choose(package: Path, part: str, policy: Policy) -> list[Choice]:
    """What each weight of a package with one function gets."""
    (function,) = coreml_package.functions(package).values()
    return [_choice(weight, policy.scheme(part, weight.label)) for weight in coreml_package.weights(function)]


def _choice(weight: Weight, asked: Scheme) -> Choice:
    if asked == "keep" or weight.label.split(":")[0] not in _DENSE or len(weight.shape) < 2:
        return Choice(weight, "keep", "keep")  # norms, biases, tables that are added: no rule is for them
    if weight.parameters < LEAST_PARAMETERS:
        return Choice(weight, "keep", "keep")
    found = sized(asked)
    if found is None:
        return Choice(weight, asked, asked)
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    if found.kind == "int" and (len(weight.shape) != 2 or columns % found.size):
        return Choice(weight, "int8", asked, f"rows of {columns} are no multiple of a block")
    if found.kind == "pal" and rows % found.size:
        return Choice(weight, "int8", asked, f"{rows} rows are no multiple of a group")
    return Choice(weight, asked, asked)


def compress(package: Path, choices: list[Choice], out: Path) -> Path:
    """Write `package` with its weights as chosen to `out`. Raises CheckpointError when one came out other.

    Palettes need scikit-learn (MissingExtra).
    """
    wanted = {each.weight.name: each.scheme for each in choices if each.scheme != "keep"}
    if any(scheme.startswith("pal") for scheme in wanted.values()) and find_spec("sklearn") is None:
        raise MissingExtra("scikit-learn", "coreml")
    model = coreml_convert.opened(package)
    ct = coreml_convert.tools()
    optimize = ct.optimize.coreml
    linear = {name: _linear(ct, scheme) for name, scheme in wanted.items() if not scheme.startswith("pal")}
    palettes = {name: _palette(ct, scheme) for name, scheme in wanted.items() if scheme.startswith("pal")}
    with coreml_convert.quiet(), coreml_convert.unguarded():
        for configs, step in (
            (linear, optimize.linear_quantize_weights),
            (palettes, optimize.palettize_weights),
        ):
            if configs:
                model = step(model, optimize.OptimizationConfig(op_name_configs=configs))
    unchecked = coreml_convert.save(model, out.with_name(f"unchecked-{out.name}"))
    _check(unchecked, wanted, choices)
    return unchecked.rename(out)


def _linear(ct: Any, scheme: Scheme) -> Any:
    found = sized(scheme)
    more: dict[str, Any] = {"dtype": "int8", "granularity": "per_channel"}
    if found is not None:
        more = {"dtype": "int4", "granularity": "per_block", "block_size": found.size}
    config = ct.optimize.coreml.OpLinearQuantizerConfig
    return config(mode="linear_symmetric", weight_threshold=0, **more)


def _palette(ct: Any, scheme: Scheme) -> Any:
    found = sized(scheme)
    assert found is not None
    return ct.optimize.coreml.OpPalettizerConfig(
        mode="kmeans",
        nbits=found.bits,
        granularity="per_grouped_channel",
        group_size=found.size,
        weight_threshold=0,
    )


def _check(package: Path, wanted: Mapping[str, Scheme], choices: list[Choice]) -> None:
    """coremltools skips what it cannot do with a warning alone."""
    (function,) = coreml_package.functions(package).values()
    got = {weight.name: weight for weight in coreml_package.weights(function)}
    for choice in choices:
        weight, name = got.get(choice.weight.name), choice.weight.name
        if weight is None:
            raise CheckpointError(f"{package.name}: weight {name} is gone after compression")
        expected = wanted.get(name, choice.weight.scheme).split("-")[0]
        if weight.scheme != expected:
            raise CheckpointError(
                f"{package.name}: {weight.label} is stored as {weight.scheme}, wanted {expected}; "
                "coremltools skipped it: give it another scheme by a rule"
            )
