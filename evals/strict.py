"""YAML read strictly into frozen models: unknown keys and wrong values, said in one line.

In: a YAML file, a pydantic model. Out: an instance, or an error that names file, key path and the nearest
right key. Not here: what the keys mean; overrides and changed recipes (`distill/strict.py`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from runtime.errors import InputError, MissingExtra

try:
    import yaml
except ImportError:
    raise MissingExtra("pyyaml", "report") from None


class Strict(BaseModel):
    """Base of every section of a file that people write: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=BaseModel)


class Loader(yaml.SafeLoader):
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


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError when it cannot be read or is none."""
    try:
        raw = yaml.load(path.read_text(), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: wanted a mapping of {what} keys, got {type(raw).__name__}")
    return raw


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
    where = ".".join(map(str, place)) or "the file"
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
