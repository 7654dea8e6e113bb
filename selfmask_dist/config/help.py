"""The keys of a configuration in words: what there is, what a value may be, and the text of `--help`.

Works on any pydantic model whose sections are models and whose fields carry `group` and `unit`, as in
`fields`. Knows nothing of files or overrides.
"""

import re
import shutil
import textwrap
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from selfmask_dist.config import yaml as config_yaml

GROUPS = {
    "science": "changes results",
    "efficiency": "does not change results (beyond the rounding of sums)",
    "orchestration": "where it runs, what is measured and logged",
}

_INTRODUCTION = (
    "Configuration: defaults < YAML file < key=value. In a file keys stand under their section; on the "
    "command line they are dotted and take YAML values: optim.score_lr=10 eval.knn_k=[20,200] "
    "backbone.weights=null 'mask.exclude=[\"*.bias\"]'. The config.yaml of a run holds every key, and "
    "starts the run again."
)

_SCALARS: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "true | false",
    str: "string",
    type(None): "null",
}


def section(info: FieldInfo) -> type[BaseModel] | None:
    """Return the model behind a field that is a section, else None."""
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key, those inside sections too, by its dotted name, in the order of declaration."""
    for name, info in model.model_fields.items():
        if inner := section(info):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def groups(model: type[BaseModel]) -> dict[str, str]:
    """Return the group of every key, by its dotted name."""
    return {name: extra(info, "group") for name, info in fields(model)}


def extra(info: FieldInfo, name: str) -> str:
    """Return what `science` and its siblings noted beside a field: its `group` or `unit`."""
    return str(info.json_schema_extra[name]) if isinstance(info.json_schema_extra, dict) else ""


def expected(info: FieldInfo) -> str:
    """Return in words what values a field takes, for example `number >= 0 or null`."""
    return _expected(info.annotation, info.metadata)


def describe(model: type[BaseModel], width: int | None = None) -> str:
    """Return all keys by group, wrapped at `width` columns (None: the terminal's, 100 at most)."""
    columns = max(width or min(shutil.get_terminal_size((100, 24)).columns, 100), 40)
    parts = [textwrap.fill(_INTRODUCTION, columns, break_long_words=False, break_on_hyphens=False)]
    for group, meaning in GROUPS.items():
        parts.append(f"{group}: {meaning}")
        parts += [
            _entry(name, info, columns) for name, info in fields(model) if extra(info, "group") == group
        ]
    return "\n\n".join(parts) + "\n"


def overview(model: type[BaseModel], width: int | None = None) -> str:
    """Return how a configuration is written, and every section with what it is about, in a line each."""
    columns = max(width or min(shutil.get_terminal_size((100, 24)).columns, 100), 40)
    lines = [f"{name:12s}{meaning}" for name, meaning in sections(model).items()]
    lines += [f"{name:12s}{info.description}" for name, info in fields(model) if "." not in name]
    return "\n\n".join(
        (
            textwrap.fill(_INTRODUCTION, columns, break_long_words=False, break_on_hyphens=False),
            "\n".join(
                textwrap.shorten(line.replace("  ", "\0"), columns - 4).replace("\0", "  ") for line in lines
            ),
        )
    )


def sections(model: type[BaseModel]) -> dict[str, str]:
    """Return each section of a model with the first line of its docstring."""
    found = {name: section(info) for name, info in model.model_fields.items()}
    return {name: (inner.__doc__ or "").strip().split("\n")[0] for name, inner in found.items() if inner}


def describe_keys(model: type[BaseModel], names: Sequence[str], width: int | None = None) -> str:
    """Return the entries of some keys, by their dotted names, in the order of declaration."""
    columns = max(width or min(shutil.get_terminal_size((100, 24)).columns, 100), 40)
    entries = [_entry(name, info, columns) for name, info in fields(model) if name in names]
    return "\n\n".join(entries) + "\n"


def named_by(model: type[BaseModel], word: str) -> list[str]:
    """Return the keys whose description opens with a list that holds `word`, as in "packnet, supsup: ..."."""
    found = []
    for name, info in fields(model):
        opening, colon, _ = (info.description or "").partition(": ")
        if colon and word in re.findall(r"\w+", opening) and "." in name:
            found.append(name)
    return found


def unrecognized(words: Sequence[str], model: type[BaseModel]) -> str:
    """Return the complaint about words that a command does not know.

    A setting written like an option (`--train.epochs=3`) is the usual reason, and gets the way out.
    """
    names = {name for name, _ in fields(model)}
    settings = []
    for word in words:
        key = word.lstrip("-").partition("=")[0]
        if word.startswith("-") and ("." in key or key in names):
            settings.append(word.lstrip("-"))
    complaint = f"unrecognized arguments: {' '.join(words)}"
    if not settings:
        return complaint
    written = " ".join(word if "=" in word else f"{word}=..." for word in settings)
    return f"{complaint}; write {written}, without the dashes"


def _entry(name: str, info: FieldInfo, columns: int) -> str:
    default = info.get_default(call_default_factory=True, validated_data={})
    plain = list(default) if isinstance(default, tuple) else default
    unit = f"; unit: {extra(info, 'unit')}" if extra(info, "unit") else ""
    head = f"{name}: {expected(info)}; default: {config_yaml.flow(plain)}{unit}"
    return "\n".join(
        textwrap.fill(
            text,
            columns,
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for text, first, rest in ((head, "  ", "    "), (info.description or "", "      ", "      "))
    )


def _expected(kind: Any, metadata: Sequence[Any]) -> str:
    if isinstance(kind, FieldInfo):
        return _expected(kind.annotation, kind.metadata)
    if get_origin(kind) is Annotated:
        base, *notes = get_args(kind)
        return _expected(
            base, [*metadata, *(entry for note in notes for entry in getattr(note, "metadata", [note]))]
        )
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(
            _expected(option, metadata if option is not type(None) else ()) for option in get_args(kind)
        )
    if get_origin(kind) is Literal:
        return " | ".join(str(option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        return _some(metadata) + _tuple(get_args(kind))
    if get_origin(kind) is dict:
        return "mapping of plain values"
    return _some(metadata) + _SCALARS[kind] + _bounds(metadata)


def _tuple(items: tuple[Any, ...]) -> str:
    if items[-1] is Ellipsis:
        return f"list of {_plural(_expected(items[0], ()))}"
    return f"list of {len(items)} {_plural(_expected(items[0], ()))}"


def _plural(text: str) -> str:
    text = text.removeprefix("non-empty ")
    noun, *rest = text.split(" ", 1)
    return " ".join([f"{noun}s", *rest])


def _some(metadata: Sequence[Any]) -> str:
    return (
        "non-empty "
        if any(isinstance(note, annotated_types.MinLen) and note.min_length for note in metadata)
        else ""
    )


def _bounds(metadata: Sequence[Any]) -> str:
    signs = (
        (annotated_types.Ge, "ge", ">="),
        (annotated_types.Gt, "gt", ">"),
        (annotated_types.Le, "le", "<="),
        (annotated_types.Lt, "lt", "<"),
    )
    bounds = [
        f"{sign} {getattr(note, name)}"
        for note in metadata
        for kind, name, sign in signs
        if isinstance(note, kind)
    ]
    return f" {' and '.join(bounds)}" if bounds else ""
