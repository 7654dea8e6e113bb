"""YAML in and out for the configuration: plain values with the line of every key, and back.

Scalars read as YAML 1.2 reads them: 1e-3 is a number (PyYAML alone: text), and off, no, 010 and 2024-01-01
are text (PyYAML alone: false, false, 8 and a date). Knows nothing of which keys exist.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

Keys = tuple[str | int, ...]  # keys and list positions from the root to a value

_TAG = "tag:yaml.org,2002:"
_FLOAT = (
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# in this order: tag, pattern, the characters a match can begin with
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own interface)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or this module would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
_Dumper.add_implicit_resolver(_TAG + "float", re.compile(rf"(?:{_FLOAT})\Z"), list("-+.0123456789"))


@dataclass
class Parsed:
    """A document as plain values, the line (from 1) of every key, and what is wrong: (line, message)."""

    value: Any = None
    lines: dict[Keys, int] = field(default_factory=lambda: {(): 1})
    problems: list[tuple[int, str]] = field(default_factory=list)


def parse(text: str) -> Parsed:
    """Read one YAML document. Errors of syntax and duplicate keys are returned, not raised."""
    parsed = Parsed()
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                parsed.value = _Reader(loader, parsed).read(node, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        parsed.problems.append((mark.line + 1 if mark else 1, f"cannot be read as YAML: {_reason(error)}"))
    except yaml.YAMLError as error:  # the reader's errors carry no line: characters that YAML does not allow
        parsed.problems.append((1, f"cannot be read as YAML: {' '.join(str(error).split())}"))
    return parsed


class _Reader:
    """Walks a node tree; `parsed` collects lines and problems."""

    def __init__(self, loader: _Loader, parsed: Parsed) -> None:
        self.loader = loader
        self.parsed = parsed
        self.open: set[int] = set()  # the nodes that contain the one being read

    def read(self, node: yaml.Node, keys: Keys) -> Any:
        line = node.start_mark.line + 1
        self.parsed.lines[keys] = line
        kind = node.tag.removeprefix(_TAG)
        if kind not in ("null", "bool", "int", "float", "str", "seq", "map"):
            raise yaml.MarkedYAMLError(
                problem=f"the tag {node.tag} is not supported", problem_mark=node.start_mark
            )
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self.open:
            raise yaml.MarkedYAMLError(problem="an anchor contains itself", problem_mark=node.start_mark)
        self.open.add(id(node))
        try:
            return (
                self._mapping(node, keys)
                if isinstance(node, yaml.MappingNode)
                else self._sequence(node, keys)
            )
        finally:
            self.open.remove(id(node))

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self.loader.construct_object(node)
        except (ValueError, KeyError) as error:  # only with a tag: !!int x
            problem = f"{node.value!r} is no {node.tag.removeprefix(_TAG)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def _sequence(self, node: yaml.Node, keys: Keys) -> list[Any]:
        return [self.read(item, (*keys, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                text = key_node.value if isinstance(key_node, yaml.ScalarNode) else "of lists or mappings"
                self.parsed.problems.append((line, f"the key {text} is not text"))
                continue
            here = (*keys, key_node.value)
            if key_node.value in values:
                first = self.parsed.lines[here]
                self.parsed.problems.append((line, f"{dotted(here)} is given twice, first in line {first}"))
                continue
            values[key_node.value] = self.read(value_node, here)
            self.parsed.lines[here] = line  # of the key: its value may begin on a later one
        return values


def dotted(keys: Sequence[str | int]) -> str:
    """`("eval", "knn_k", 1)` as `eval.knn_k[1]`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def dump(values: Mapping[str, Any], groups: Mapping[str, str], meanings: Mapping[str, str]) -> str:
    """Sections of plain values as YAML: a blank line before each section, a comment where the group changes.

    Args:
        values: scalars, and sections as mappings.
        groups: the group of each dotted key.
        meanings: what the groups are, for the head of the file.
    """
    lines = [*(f"# {group}: {meaning}" for group, meaning in meanings.items()), ""]
    last = ""
    for name, value in values.items():
        if name in groups:
            keys, indent = {name: value}, ""
        else:
            keys, indent, last = value, "  ", ""
            lines += ["", f"{name}:"]
        for key, item in keys.items():
            group = groups[f"{name}.{key}" if indent else key]
            lines += [f"{indent}# {group}"] if group != last else []
            lines.append(f"{indent}{key}: {flow(item)}")
            last = group
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """A plain value in YAML on one line, in ASCII."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=2**31)
    return text.removesuffix("\n").removesuffix("\n...")


def _reason(error: yaml.MarkedYAMLError) -> str:
    reason = " ".join(part for part in (error.context, error.problem) if part)
    reason = reason.replace(r"'\x00'", "the end")
    if "alias" in reason or "anchor" in reason:
        reason += ' (text that begins with * or & needs quotes: "*.bias")'
    elif "cannot start any token" in reason:
        reason += " (such text needs quotes)"
    return reason
