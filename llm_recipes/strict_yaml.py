"""YAML read strictly and values checked against type hints: nothing is guessed, every error names its place.

YAML 1.2 booleans: only `true` and `false` are booleans, so `eval_strategy: no` means the string it looks like, and `5e-7` is a
number.
"""

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from pathlib import Path

import yaml

from llm_recipes.errors import UserError


class Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads YAML 1.2 booleans and floats."""

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag.rsplit(":", 1)[1] not in ("bool", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key_node.start_mark)
            if key in lines:
                raise yaml.MarkedYAMLError(problem=f"{key} is set twice (lines {lines[key]} and {line})")
            lines[key] = line
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$"), "tTfF")
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.[\d_]+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    "-+0123456789.",
)


def load_yaml(path: str | Path) -> tuple[dict, dict[str, int]]:
    """Mapping in `path` and the line of each of its keys. Raises UserError with file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this config: {getattr(error, 'strerror', None) or error}") from error
    try:
        node = yaml.compose(text, Loader=Loader)
        values = yaml.load(text, Loader=Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{where}: {getattr(error, 'problem', None) or ' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config is a list of `key: value` lines; this file has none")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"{path}: {say(odd[0])} is not a key")
    return values, {key.value: key.start_mark.line + 1 for key, _ in node.value}


def say(value) -> str:
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else repr(value)


def cast(value, hint, choices=None):
    """`value` as `hint` asks for it; ValueError in plain words when it does not fit."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"expects keys such as `path: ...`, got {say(value)}")
        return _fill(hint, value)
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in members:
        return None
    for kind in members:
        if dataclasses.is_dataclass(kind):
            return cast(value, kind)
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str):
            choices = [member.value for member in kind]
        elif typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind) if len(members) == 1 else choices
    if choices and value not in choices:
        raise ValueError(f"expects one of {', '.join(map(str, choices))}; got {say(value)}")
    problem = None
    for kind in members:
        origin = typing.get_origin(kind) or kind
        if kind is typing.Any or (origin is typing.Literal and value in typing.get_args(kind)):
            return value
        if origin is bool and isinstance(value, bool):
            return value
        if origin is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ValueError(f"expects a finite number, got {value}")
            return value
        if isinstance(origin, type) and issubclass(origin, str) and isinstance(value, str):
            return value
        if origin is dict and isinstance(value, dict):
            inner = typing.get_args(kind)
            return {key: cast(item, inner[1]) for key, item in value.items()} if inner else value
        if origin is list and isinstance(value, list):
            try:
                return [cast(item, *typing.get_args(kind)) for item in value]
            except ValueError as error:
                problem = error
        if isinstance(origin, type) and issubclass(origin, enum.Enum) and value in choices:
            return value
    if problem:
        raise problem
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "keys and values"}
    expected = " or ".join(
        dict.fromkeys(
            names.get(typing.get_origin(kind) or kind, "a list" if typing.get_origin(kind) is list else "text")
            for kind in members
            if kind is not type(None)
        )
    )
    raise ValueError(f"expects {expected}, got {say(value)}")


def unknown_key(key, known, what: str = "key") -> str:
    """Says that `key` is none of `known`, and which of them is nearest."""
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
    return f"unknown {what} `{key}`" + (f", did you mean `{near[0]}`?" if near else "")


def _fill(cls, values: dict):
    """Instance of dataclass `cls` from a mapping, as strict as the top level."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in values:
        if key not in names:
            raise ValueError(unknown_key(key, names))
    checked = {}
    for key, value in values.items():
        try:
            checked[key] = cast(value, hints[key])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    try:
        return cls(**checked)
    except TypeError as error:  # a required key is missing
        raise ValueError(str(error).split("() ", 1)[-1].replace("required positional argument", "key")) from error
