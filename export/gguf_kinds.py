"""What a GGUF bundle can be asked for: types by name, rules for single tensors, from a user's YAML.

In: names, a path. Out: checked kinds and a `Request`. Not here: carrying it out; this module loads neither
torch nor llama.cpp.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from runtime.errors import InputError, MissingExtra

DIRECT = ("f32", "f16", "bf16", "q8_0")
"""Written by our own converter."""

QUANTIZED = ("q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_nl")
"""Made by llama.cpp from the float32 file."""

KINDS = (*DIRECT, *QUANTIZED)


@dataclass(frozen=True)
class TensorRule:
    """Tensors whose GGUF name matches `tensor` (as in fnmatch) get `type`; the first match decides."""

    tensor: str
    type: str


@dataclass(frozen=True)
class Request:
    """What is asked of every bundle: `rules` set tensors of the text model apart, `importance`: weigh columns
    by what image-conditioned prompts feed them."""

    rules: tuple[TensorRule, ...] = ()
    importance: bool = False


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tensor: str
    type: str


class _Rules(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rules: list[_Rule]


def check(kind: str) -> str:
    """The kind in lower case. Raises InputError with the nearest known one."""
    found = kind.lower().replace("-", "_")
    if found not in KINDS:
        near = difflib.get_close_matches(found, KINDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"GGUF type {kind!r} is not known; {hint}choose from {', '.join(KINDS)}")
    return found


def read_rules(path: Path) -> tuple[TensorRule, ...]:
    """Rules of a YAML file: `rules: [{tensor: "blk.*.ffn_down.*", type: q8_0}]`. Raises InputError."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra("pyyaml", "export") from error
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = _Rules.model_validate(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a YAML file with rules") from error
    except (yaml.YAMLError, ValidationError) as error:
        first = str(error).splitlines()[0] if isinstance(error, yaml.YAMLError) else _fault(error)
        raise InputError(f"{path}: {first}; expected rules: [{{tensor: PATTERN, type: q8_0}}]") from error
    return tuple(TensorRule(rule.tensor, rule.type) for rule in found.rules)


def _fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
