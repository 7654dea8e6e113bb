"""Which of the tensors in somebody's checkpoint are the encoder's: containers, prefixes, and the choice.

    {"state_dict": {"module.encoder_q.conv1.weight": ...}}    ->    {"conv1.weight": ...}

Training codes save more than one network: DINO a student and a teacher, MoCo a query and a key encoder. What
is taken, and what else was there, is a line in the log; `backbone.weights_key` chooses otherwise. Knows
nothing of files or architectures: names are compared with those of the model that is to be loaded.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selfmask_dist.common.tensor_names import plain_names
from selfmask_dist.common.text import some

_LOG = logging.getLogger(__name__)
# what holds a state dict or stands before its names; earlier ones are taken where several fit equally well
KNOWN = (
    # one network
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "backbone",
    "base_model",
    "trunk",
    "feature_extractor",
    "visual_encoder",
    "classy_state_dict",
    "_feature_blocks",
    # one of several: the one that is published or evaluated
    "teacher",  # DINO, iBOT
    "encoder_q",  # MoCo
    "base_encoder",  # MoCo v3
    "online_encoder",
    "online_network",
    "target_encoder",  # I-JEPA, MSN
    "encoder",  # SimSiam
    "student",
    "encoder_k",
    "momentum_encoder",
    "target_network",
    "state_dict_ema",
    "model_ema",
    "ema",
)
_WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel, torch.compile
_COUNTER = "num_batches_tracked"
_MAX_DEPTH = 5


@dataclass(frozen=True)
class Choice:
    """A state dict in a checkpoint: below the keys `path`, the names that begin with `prefix`.

    level: the dict that its tensors lie in.
    state: its tensors, by names without the prefix.
    """

    path: tuple[str, ...]
    prefix: str
    level: Mapping[Any, Any]
    state: dict[str, Tensor]

    @property
    def steps(self) -> tuple[str, ...]:
        """Return the keys and the parts of the prefix, without wrappers."""
        return tuple(step for step in (*self.path, *self.prefix.split(".")[:-1]) if step not in _WRAPPERS)

    @property
    def rank(self) -> list[int]:
        """Return what orders choices that fit equally well, the first to be taken first."""
        return [KNOWN.index(step) if step in KNOWN else len(KNOWN) for step in self.steps]

    def __str__(self) -> str:
        return ".".join((*self.path, *self.prefix.split(".")[:-1])) or "what lies at the top"


def choose(
    content: Mapping[Any, Any], own: Sequence[Collection[str]], *, key: str | None, source: str
) -> Choice | None:
    """Return the state dict in `content` that has the names of a model, or None where none has any of them.

    Args:
        content: a checkpoint: tensors by name, in dicts or not.
        own: the model's names; of several sets the one that fits best counts.
        key: `backbone.weights_key`: take what lies below this key or prefix.
        source: what the file is called in messages.

    Raises:
        ValueError: nothing lies below `key`, or several fit and none is known to be the one to take; the
            message names what there is.
    """
    found = list(_choices(content))
    scored = [(_score(one, own), one) for one in found]
    scored = [(score, one) for score, one in scored if score]
    if key is not None:
        wanted = tuple(step for step in key.strip(".").split(".") if step not in _WRAPPERS)
        scored = [(score, one) for score, one in scored if _contains(one.steps, wanted)]
        if not scored:
            there = some(sorted({str(one) for one in found if one.steps})) or "no keys or prefixes"
            raise ValueError(
                f"{source} has nothing of this model below backbone.weights_key={key}; it has {there}"
            )
    if not scored:
        return None
    most = max(score for score, _ in scored)
    ranked = sorted((one.rank, -score, at) for at, (score, one) in enumerate(scored) if score >= 0.9 * most)
    fitting = [scored[at][1] for _, _, at in ranked]
    # one network under two names, such as a wrapper's, is one
    fitting = list({id(max(one.state.items())[1]): one for one in reversed(fitting)}.values())[::-1]
    taken, others = fitting[0], fitting[1:]
    if others and others[0].rank == taken.rank:
        raise ValueError(
            f"{source} holds more than one network that fits: {some([str(one) for one in fitting])}; choose "
            f"one by backbone.weights_key={'.'.join(taken.steps)}"
        )
    if others:
        _LOG.warning(
            "%s holds more than one network that fits: taken is %s; backbone.weights_key takes another: %s",
            *(source, taken, some([".".join(one.steps) or str(one) for one in others])),
        )
    return taken


def _choices(content: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[Choice]:
    """Yield every state dict below `content`, with each prefix of known parts that some of its names have."""
    named = {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}
    short = {new: named[name] for name, new in plain_names(named).items()}
    for state in (named, short) if short.keys() != named.keys() else (named,):
        prefixes = {""} if state else set[str]()
        for name in state:
            prefix = ""
            for part in name.split(".")[:-1]:
                if part not in KNOWN and part not in _WRAPPERS:
                    break
                prefix += f"{part}."
                prefixes.add(prefix)
        for prefix in sorted(prefixes):
            below = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            yield Choice(path, prefix, content, below)
    for name, value in content.items():
        if isinstance(value, Mapping) and isinstance(name, str) and len(path) < _MAX_DEPTH:
            yield from _choices(value, (*path, name))


def _score(one: Choice, own: Sequence[Collection[str]]) -> int:
    """Return how many of the model's names a choice has; counters are in some files and not in others."""
    names = [name for name in one.state if not name.endswith(_COUNTER)]
    return max(sum(name in expected for name in names) for expected in own)


def _contains(steps: Sequence[str], wanted: Sequence[str]) -> bool:
    return any(tuple(steps[at : at + len(wanted)]) == tuple(wanted) for at in range(len(steps)))


def open_known(content: Any, known: Sequence[str], *, source: str) -> Any:
    """Return the innermost dict below known keys, where the model's names do not tell."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(content, Mapping):
            break
        keys = [key for key in known if isinstance(content.get(key), Mapping)]
        if not keys:
            break
        if keys[1:]:
            _LOG.warning("%s holds %s: taken is %s", source, some(keys), keys[0])
        content = content[keys[0]]
    return content
