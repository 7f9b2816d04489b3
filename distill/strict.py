"""YAML read strictly into frozen models: unknown keys, wrong values and changed settings, said in one line.

In: a YAML file, overrides `key.path=value`, a pydantic model. Out: an instance, or an error that names file,
key path and the nearest right key. Not here: what the keys mean.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime import files
from runtime.errors import InputError, StateError

Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
CLAIM = "recipe.json"


class Strict(BaseModel):
    """Base of every section of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=Strict)


# --- reading ----------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-6` is a number, as in YAML 1.2, and a key may stand only once in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError when it cannot be read or is none."""
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: wanted a mapping of recipe keys, got {type(raw).__name__}")
    return raw


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
            value = yaml.load(text, _Loader)
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


def validate(model: type[M], raw: Mapping[str, Any], where: object) -> M:
    """An instance of `model`. Raises InputError that starts with `where` and tells the first fault."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, model, raw)}") from error


# --- errors -----------------------------------------------------------


def explain(error: ValidationError, model: type[BaseModel], raw: Any) -> str:
    """The first fault in one line, with the nearest right key for an unknown one."""
    faults = error.errors(include_url=False)
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    place = _place(fault["loc"], raw, missing=fault["type"] == "missing")
    where = ".".join(map(str, place)) or "the recipe"
    if fault["type"] == "missing":
        return f"{where}: this key is missing"
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(str(place[-1]), place[:-1], model)}"
    if fault["type"] == "value_error":
        text = str(fault["ctx"]["error"])
        return f"{where}: {text}" if place and not text.startswith(where) else text
    same = [f for f in faults if _place(f["loc"], raw) == place]
    said = " or ".join(dict.fromkeys(f["msg"].removeprefix("Input should be ") for f in same))
    return f"{where}: wanted {said}, got {fault['input']!r}"


def _place(loc: Sequence[int | str], raw: Any, *, missing: bool = False) -> tuple[int | str, ...]:
    """The keys of a fault's location that are in the data: pydantic adds the names of union branches."""
    found: list[int | str] = []
    for key in loc:
        inside = key in raw if isinstance(raw, Mapping) else isinstance(raw, list) and isinstance(key, int)
        if inside:
            raw = raw[key]
            found.append(key)
    return (*found, loc[-1]) if missing else tuple(found)


def _nearest(key: str, place: Sequence[int | str], model: type[BaseModel]) -> str:
    here = [name for each in _models_at(model, place) for name in each.model_fields]
    every = {path.rsplit(".", 1)[-1]: path for path in sorted(_paths(model), reverse=True)}
    if key in every:
        return f"; did you mean {every[key]}?"
    if near := difflib.get_close_matches(key, here, n=1):
        return f"; did you mean {near[0]}?"
    if near := difflib.get_close_matches(key, every, n=1, cutoff=0.75):
        return f"; did you mean {every[near[0]]}?"
    return f"; known here: {', '.join(here)}" if here else "; remove it"


def _models_at(model: type[BaseModel], place: Sequence[int | str]) -> list[type[BaseModel]]:
    found = [model]
    for key in place:
        if isinstance(key, int):
            continue
        fields = [each.model_fields[key] for each in found if key in each.model_fields]
        found = [inner for field in fields for inner in _models_in(field.annotation)]
    return found


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation such as `list[A | B] | None` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for inner in _models_in(field.annotation):
            yield from _paths(inner, f"{prefix}{name}.")


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
