"""From file and overrides to a validated model, or to one error that lists every problem and its place.

    defaults < site file < YAML file < key=value overrides

Works on any pydantic model whose sections are models. Knows nothing of which keys exist.
"""

import difflib
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from selfmask_dist.common.shipped import find_config
from selfmask_dist.config import help as config_help
from selfmask_dist.config import yaml as config_yaml
from selfmask_dist.config.yaml import Keys, dotted

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """The configuration is wrong; the message has a line for each problem."""


class Conflict(NamedTuple):
    """Keys (dotted) whose values do not go together, and why."""

    keys: tuple[str, ...]
    message: str


class ConflictError(ValueError):
    """Raised by a model's own validator: values that are fine one by one and not together."""

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        super().__init__("; ".join(conflict.message for conflict in conflicts))
        self.conflicts = tuple(conflicts)


class Origin(NamedTuple):
    """Where a value was given. Origins sort in the order of reading."""

    order: tuple[int, int]  # (0, line) in a site's file, (1, line) in the run's, (2, position) of overrides
    place: str
    is_file: bool


@dataclass(frozen=True)
class Given:
    """Values by section and key, and where each was given."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[Keys, Origin] = field(default_factory=dict)


def load(
    model: type[Model], path: str | Path | None, overrides: Sequence[str], *, below: Given | None = None
) -> tuple[Model, dict[str, str]]:
    """Return `model` built from its defaults, a YAML file and `key=value` overrides, and the places of the
    values that were given, by dotted key.

    Args:
        path: a file, or the name of a configuration that ships with the package; see `find_config`.
        below: values that the file's and the overrides' are put over.

    Raises:
        ConfigError: with every problem found.
    """
    draft = _Draft(model)
    if below is not None:
        draft.add((), below.values, below.sources)
    if path is not None:
        draft.read_file(_file(path))
    for position, text in enumerate(overrides):
        draft.override(text, Origin((2, position), f"override {text!r}", is_file=False))
    places = {dotted(keys): source.place for keys, source in draft.sources.items() if keys in draft.fields}
    return _validated(model, draft), places


def load_given(model: type[Model], given: Given) -> Model:
    """Return `model` built from its defaults and these values. Raises ConfigError with every problem."""
    draft = _Draft(model)
    draft.add((), given.values, given.sources)
    return _validated(model, draft)


def read(path: Path) -> Given:
    """Return the values of a site's YAML file, unchecked. Raises ConfigError where it cannot be read."""
    parsed = config_yaml.parse(_text(path))
    sources = {keys: _in_file(path, line, layer=0) for keys, line in parsed.lines.items()}
    problems = [(_in_file(path, line), message) for line, message in parsed.problems]
    if not isinstance(parsed.value, dict | None):
        problems.append((sources[()], f"got {_shown(parsed.value)}; expected keys and values"))
    if problems:
        raise ConfigError(_message(problems))
    return Given(parsed.value or {}, sources)


def _validated(model: type[Model], draft: "_Draft") -> Model:
    result: Model | None = None
    try:
        result = model.model_validate(draft.values)
    except ValidationError as error:
        draft.explain(error)
    if draft.problems or result is None:
        raise ConfigError(_message(draft.problems))
    return result


def _message(problems: Iterable[tuple[Origin, str]]) -> str:
    lines = [f"{source.place}: {message}" for source, message in sorted(dict.fromkeys(problems))]
    if len(lines) == 1:
        return lines[0]
    return "\n  ".join([f"{len(lines)} problems in the configuration:", *lines])


@dataclass
class _Draft:
    """Values before validation, where each was given, and what is wrong so far."""

    model: type[BaseModel]
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[Keys, Origin] = field(default_factory=dict)
    problems: list[tuple[Origin, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fields = {tuple(name.split(".")): info for name, info in config_help.fields(self.model)}
        self.sections = {keys[:end] for keys in self.fields for end in range(1, len(keys))}

    def read_file(self, path: Path) -> None:
        """Take the values of a YAML file. Raises ConfigError where it cannot be read at all."""
        parsed = config_yaml.parse(_text(path))
        sources = {keys: _in_file(path, line) for keys, line in parsed.lines.items()}
        self.problems += [(_in_file(path, line), message) for line, message in parsed.problems]
        if isinstance(parsed.value, dict):
            self.add((), parsed.value, sources)
        elif parsed.value is not None:  # null is an empty file, or one of comments: the defaults
            self.problems.append(
                (sources[()], f"got {_shown(parsed.value)}; expected keys and values, for example seed: 0")
            )

    def override(self, text: str, source: Origin) -> None:
        """Take the value of one `key=value`."""
        name, equals, value_text = text.partition("=")
        keys = tuple(name.strip().split("."))
        if not equals or not all(keys):
            self.problems.append((source, "expected key=value, for example optim.score_lr=10"))
            return
        parsed = config_yaml.parse(value_text)
        self.problems += [(source, message) for _, message in parsed.problems]
        if not parsed.problems:
            self.add(keys, parsed.value, {(*keys, *rest): source for rest in parsed.lines})

    def add(self, keys: tuple[str, ...], value: Any, sources: dict[Keys, Origin]) -> None:
        """Merge `value` at `keys`: a section key by key; a field's value and source replace earlier ones."""
        if isinstance(value, dict) and (not keys or keys in self.sections):
            for key, inner in value.items():
                self.add((*keys, key), inner, sources)
            return
        if keys in self.sections and value is None and sources[keys].is_file:
            return  # a section whose keys are all commented out
        owner = next((keys[:end] for end in range(1, len(keys) + 1) if keys[:end] in self.fields), None)
        if keys not in self.sections and (owner is None or (owner != keys and not self._is_mapping(owner))):
            self.problems.append((sources[keys], self._unknown(keys)))
            return
        place = self.values
        for end, key in enumerate(keys[:-1], start=1):
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                self.problems.append(
                    (sources[keys], f"{dotted(keys[:end])} is {_shown(place)}, which holds no keys")
                )
                return
        place[keys[-1]] = value
        self.sources = {at: source for at, source in self.sources.items() if at[: len(keys)] != keys}
        self.sources |= {at: source for at, source in sources.items() if at[: len(keys)] == keys}

    def explain(self, error: ValidationError) -> None:
        """Turn pydantic's errors into problems: one for each field, one for each conflict between fields."""
        wrong: dict[Keys, Origin] = {}
        for detail in error.errors(include_url=False):
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, ConflictError):
                self.problems += [self._conflict(conflict) for conflict in cause.conflicts]
                continue
            location = detail["loc"]
            keys = next(location[:end] for end in range(len(location), 0, -1) if self._is_key(location[:end]))
            # the first error of a field: a bad item also makes its list too short
            wrong.setdefault(keys, self._source(location))
        self.problems += [(source, self._wrong(keys)) for keys, source in wrong.items()]

    def _is_key(self, keys: Keys) -> bool:
        return keys in self.fields or keys in self.sections

    def _is_mapping(self, keys: tuple[str, ...]) -> bool:
        return get_origin(self.fields[keys].annotation) is dict

    def _source(self, keys: Keys) -> Origin:
        """Return where the value at `keys` was given, or the nearest value around it."""
        return next(
            self.sources[keys[:end]] for end in range(len(keys), -1, -1) if keys[:end] in self.sources
        )

    def _conflict(self, conflict: Conflict) -> tuple[Origin, str]:
        keys = [tuple(name.split(".")) for name in conflict.keys]
        given = sorted(
            {self._source(key) for key in keys if any(at[: len(key)] == key for at in self.sources)}
        )
        return given[0]._replace(place=", ".join(source.place for source in given)), conflict.message

    def _wrong(self, keys: Keys) -> str:
        info = next((info for name, info in self.fields.items() if name == keys), None)
        wanted = config_help.expected(info) if info else f"keys under it: {', '.join(self._inside(keys))}"
        value: Any = reduce(operator.getitem, keys, self.values)  # type: ignore[arg-type]
        is_unquoted = isinstance(value, int | float) and "string" in wanted.split(" or ")[0].split()
        hint = "; quotes make a string of it" if is_unquoted else ""
        return f"{dotted(keys)}: got {_shown(value)}; expected {wanted}{hint}"

    def _unknown(self, keys: tuple[str, ...]) -> str:
        if tuple(dotted(keys).split(".")) in self.fields:  # dotted, in a file
            return f"unknown key {dotted(keys)!r}; in a file write {dotted(keys).replace('.', ': {')}: ...}}"
        if value := next((keys[:end] for end in range(1, len(keys)) if keys[:end] in self.fields), ()):
            return f"unknown key {dotted(keys)}; {dotted(value)} has no keys under it"
        sections = self.sections if len(keys) == 1 else ()
        if near := _nearest(keys, [*self.fields, *sections]):
            return f"unknown key {dotted(keys)}; did you mean {_alternatives(near)}?"
        section = keys[:-1] if keys[:-1] in self.sections else ()
        where = f"keys of {dotted(section)}" if section else "keys and sections"
        return f"unknown key {dotted(keys)}; {where} are {', '.join(self._inside(section))}"

    def _inside(self, section: Keys) -> list[str]:
        """Return the names of a section's keys; for (), those of all sections and of the keys beside them."""
        depth = len(section)
        return list(dict.fromkeys(keys[depth] for keys in self.fields if keys[:depth] == section))


def _file(path: str | Path) -> Path:
    try:
        return find_config(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})"
        ) from error
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        if path.is_dir():
            inside = sorted(path.glob("*.yaml"))
            reason = (
                f"it is a folder{f'; did you mean {inside[0]}?' if len(inside) == 1 else ', name a file'}"
            )
        raise ConfigError(f"{path}: cannot read the configuration: {reason}") from error


def _in_file(path: Path, line: int, *, layer: int = 1) -> Origin:
    return Origin((layer, line), f"{path}:{line}", is_file=True)


def _nearest(keys: tuple[str, ...], known: Iterable[tuple[str, ...]], limit: int = 4) -> list[str]:
    """Return the known keys that are most like an unknown one, the best first."""
    scores = {dotted(candidate): _likeness(keys, candidate) for candidate in known}
    near = sorted((name for name, score in scores.items() if score >= 0.65), key=lambda name: -scores[name])
    return near[:limit]


def _likeness(keys: tuple[str, ...], candidate: tuple[str, ...]) -> float:
    """Return how alike two keys are, 0 to 1.

    In the same section the last part decides; in another one it counts less, or the whole names are compared.
    """
    *words, last = *candidate[-1].split("_"), candidate[-1]
    likeness = max(_ratio(keys[-1], last), *(0.95 * _ratio(keys[-1], word) for word in words))  # lr: score_lr
    if keys[:-1] == candidate[:-1]:
        return likeness
    return max(likeness - 0.05, _ratio(dotted(keys), dotted(candidate)))


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _alternatives(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _shown(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]}..."
