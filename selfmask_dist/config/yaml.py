"""YAML in and out for the configuration: plain values with the line of every key, and back.

Scalars read as YAML 1.2 has them, without its octal and hexadecimal numbers: 1e-3 is a number, and off, no,
010, 0x1F and 2024-01-01 are text. Knows nothing of which keys exist.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.emitter import Emitter, ScalarAnalysis
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

Keys = tuple[str | int, ...]  # keys and list positions from the root to a value

_TAG = "tag:yaml.org,2002:"
_PLAIN = {  # what unquoted text is, in this order; anything else is a string
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*)"),
    "float": re.compile(
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}
_PYTHON: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": lambda text: int(text.replace("_", "")),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "str": str,
}


class _Resolver(VersionedResolver):
    """Says what unquoted text is. ruamel's own rules would make numbers of 010 and 0x1F, and dates."""

    def resolve(self, kind: type[Node], value: str, implicit: tuple[bool, bool]) -> Tag:
        if kind is ScalarNode and implicit[0]:
            name = next((name for name, pattern in _PLAIN.items() if pattern.fullmatch(value)), "str")
            return Tag(suffix=_TAG + name)
        resolved: Tag = super().resolve(kind, value, implicit)
        return resolved


class _CarefulResolver(_Resolver):
    """Also says what YAML 1.1 makes of unquoted text, so that such text is written in quotes."""

    processing_version = (1, 1)

    def resolve(self, kind: type[Node], value: str, implicit: tuple[bool, bool]) -> Tag:
        resolved = super().resolve(kind, value, implicit)
        if kind is ScalarNode and implicit[0] and str(resolved) == f"{_TAG}str":
            resolved = VersionedResolver.resolve(self, kind, value, implicit)
        return resolved


class _Emitter(Emitter):
    def analyze_scalar(self, scalar: str) -> ScalarAnalysis:
        analysis: ScalarAnalysis = super().analyze_scalar(scalar)
        if ":" in scalar or "?" in scalar:  # which YAML 1.1 allows within brackets only in quotes
            analysis.allow_flow_plain = False
        return analysis


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_float(self, data: float) -> ScalarNode:
        text = repr(data) if data == data and abs(data) != float("inf") else ""
        if "e" in text and "." not in text:  # YAML 1.1 would read 1e-07 as text
            return self.represent_scalar(f"{_TAG}float", text.replace("e", ".0e", 1))
        return super().represent_float(data)


_Representer.add_representer(float, _Representer.represent_float)


@dataclass
class Parsed:
    """A document as plain values, the line (from 1) of every key, and what is wrong: (line, message)."""

    value: Any = None
    lines: dict[Keys, int] = field(default_factory=lambda: {(): 1})
    problems: list[tuple[int, str]] = field(default_factory=list)


def parse(text: str) -> Parsed:
    """Return one YAML document as plain values. Errors of syntax and duplicate keys are in it, not raised."""
    parsed = Parsed()
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _Resolver
    yaml.composer.warn_double_anchors = False  # the later one holds from there on, as the standard has it
    try:
        node = yaml.compose(text)
        if node is not None:
            parsed.value = _NodeReader(parsed).read(node, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        parsed.problems.append((mark.line + 1 if mark else 1, f"cannot be read as YAML: {_reason(error)}"))
    except YAMLError as error:  # the reader's errors carry no line: characters that YAML does not allow
        parsed.problems.append((1, f"cannot be read as YAML: {' '.join(str(error).split())}"))
    return parsed


class _NodeReader:
    """Turns a tree of nodes into plain values; `parsed` collects their lines and the problems."""

    def __init__(self, parsed: Parsed) -> None:
        self.parsed = parsed
        self.open: set[int] = set()  # the nodes that contain the one being read

    def read(self, node: Node, keys: Keys) -> Any:
        """Return the plain value of a node that lies at `keys`."""
        line = node.start_mark.line + 1
        self.parsed.lines[keys] = line
        kind = _kind(node)
        if kind not in (*_PYTHON, "seq", "map"):
            raise MarkedYAMLError(
                problem=f"the tag {node.tag} is not supported", problem_mark=node.start_mark
            )
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        if id(node) in self.open:
            raise MarkedYAMLError(problem="an anchor contains itself", problem_mark=node.start_mark)
        self.open.add(id(node))
        try:
            return self._mapping(node, keys) if isinstance(node, MappingNode) else self._sequence(node, keys)
        finally:
            self.open.remove(id(node))

    def _scalar(self, node: ScalarNode) -> Any:
        try:
            return _PYTHON[_kind(node)](node.value)
        except (ValueError, KeyError) as error:  # only with a tag: !!int x
            problem = f"{node.value!r} is no {_kind(node)}"
            raise MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def _sequence(self, node: Node, keys: Keys) -> list[Any]:
        return [self.read(item, (*keys, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: MappingNode, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode) or _kind(key_node) != "str":
                text = key_node.value if isinstance(key_node, ScalarNode) else "of lists or mappings"
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


def _kind(node: Node) -> str:
    """Return the name of a node's tag: int, str, seq, map, and so on."""
    return str(node.tag).removeprefix(_TAG)


def dotted(keys: Sequence[str | int]) -> str:
    """Return keys and list positions as they are written: `("eval", "knn_k", 1)` as `eval.knn_k[1]`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def dump(
    values: Mapping[str, Any],
    groups: Mapping[str, str],
    meanings: Mapping[str, str],
    notes: Mapping[str, str] | None = None,
) -> str:
    """Return sections of plain values as YAML, with a comment wherever the group of the keys changes.

    Args:
        values: scalars, and sections as mappings.
        groups: the group of each dotted key.
        meanings: what the groups are, for the head of the file.
        notes: comments behind values, by dotted key.
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
            note = (notes or {}).get(f"{name}.{key}" if indent else key, "")
            lines.append(f"{indent}{key}: {flow(item)}{f'  # {note}' if note else ''}")
            last = group
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """Return a plain value as YAML on one line, in ASCII."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Representer, yaml.Emitter = _CarefulResolver, _Representer, _Emitter
    yaml.default_flow_style, yaml.allow_unicode, yaml.width = True, False, 2**31
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue().removesuffix("\n").removesuffix("\n...")


def _reason(error: MarkedYAMLError) -> str:
    reason = " ".join(part for part in (error.context, error.problem) if part)
    reason = reason.replace(r"'\x00'", "the end")
    if "alias" in reason or "anchor" in reason:
        reason += ' (text that begins with * or & needs quotes: "*.bias")'
    elif r"'\t'" in reason:
        reason += " (indent with blanks: YAML allows no tabs)"
    elif "cannot start any token" in reason:
        reason += " (such text needs quotes)"
    return reason
