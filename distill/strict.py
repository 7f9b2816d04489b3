"""Recipes read strictly: settings laid on top, directories claimed, changed settings said in one line.

In: YAML as plain values, overrides `key.path=value`. Out: values with them, or an error that names the key.
Not here: reading YAML and checking it against a model (`evals/strict.py`); what the keys mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from evals.strict import Loader, Strict, load_yaml, validate
from runtime import files
from runtime.errors import InputError, StateError

__all__ = [
    "CLAIM", "Count", "Positive", "Rate", "Share", "Strict", "claim", "differences", "known", "load_yaml",
    "matches", "override", "validate", "without",
]  # fmt: skip

Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
CLAIM = "recipe.json"


# --- settings on top --------------------------------------------------


def override(raw: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with each `key.path=value` laid on top; values are YAML, numbers index lists.

    A mapping that is absent or null on the way is made. Raises InputError for text without `=`, a value
    that is no YAML, and a list index that is not there; a wrong key is found when the result is validated.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise InputError(f"--set {setting}: wanted key.path=value, for example train.lr=1e-6")
        try:
            value = yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise InputError(
                f"--set {setting}: the value is no YAML ({' '.join(str(error).split())})"
            ) from error
        raw = _laid(raw, keys, value, setting)
    return raw


def _laid(raw: Any, keys: Sequence[str], value: Any, setting: str) -> Any:
    if not keys:
        return value
    key, *rest = keys
    if isinstance(raw, list):
        if not key.isdecimal() or int(key) >= len(raw):
            raise InputError(f"--set {setting}: {key} is no index of a list of {len(raw)} (they start at 0)")
        return [_laid(x, rest, value, setting) if i == int(key) else x for i, x in enumerate(raw)]
    if raw is not None and not isinstance(raw, Mapping):
        raise InputError(f"--set {setting}: there is no {key} in {raw!r}; set the whole key instead")
    return {**(raw or {}), key: _laid((raw or {}).get(key), rest, value, setting)}


# --- one recipe, one directory ----------------------------------------


def claim(out: Path, wanted: Mapping[str, Any], may_change: Sequence[str] = ()) -> None:
    """Mark `out` as the work of these settings, or check that it is.

    `may_change` lists key paths (`train.trackers`; `*` stands for any key) that a resumed run may set anew.
    Raises StateError with the other differences; a directory in which nothing was made yet is taken over.
    """
    path = out / CLAIM
    if path.exists():
        found = files.read_json(path)
        fresh = all(each.name in (CLAIM, ".lock") for each in out.iterdir())
        changed = list(differences(found, wanted))
        refused = [] if fresh else [line for key, line in changed if not matches(key, may_change)]
        if refused:
            raise StateError(
                f"{out}: holds the state of another recipe ({'; '.join(refused)}); "
                "run with the same settings, or choose another --out"
            )
        if not changed:
            return
    files.write_json(path, wanted)


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a key path is one of `patterns` or lies below one."""
    parts = key.split(".")
    return any(
        len(parts) >= len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=False))
        for wanted in (pattern.split(".") for pattern in patterns)
    )


def without(value: Any, patterns: Sequence[str], where: str = "") -> Any:
    """A JSON value without the keys that `patterns` name."""
    if not isinstance(value, Mapping):
        return value
    inner = {key: f"{where}.{key}" if where else str(key) for key in value}
    return {
        key: without(value[key], patterns, inner[key]) for key in value if not matches(inner[key], patterns)
    }


def known(name: str, names: Iterable[str], what: str) -> None:
    """Raises ValueError when `name` is not among `names`, with the nearest one."""
    every = list(names)
    if name not in every:
        near = difflib.get_close_matches(name, every, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(every)}"
        raise ValueError(f"unknown {what} {name}; {hint}")


def differences(found: Any, wanted: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(key path, `path: there A, now B`) of every leaf in which two JSON values differ."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        pairs = [(key, found.get(key), wanted.get(key)) for key in sorted(found.keys() | wanted.keys())]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = [(str(i), *each) for i, each in enumerate(zip(found, wanted, strict=True))]
    else:
        if found != wanted:
            yield where, f"{where}: there {found!r}, now {wanted!r}"
        return
    for key, there, now in pairs:
        yield from differences(there, now, f"{where}.{key}" if where else key)
