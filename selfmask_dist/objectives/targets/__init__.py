"""The supervised objective by what it is trained towards: `objective.target`.

    class        one label a picture             cross-entropy           `objectives.supervised`
    multilabel   several labels a picture        a yes or no for each    `multilabel`
    regression   numbers of a picture            squared or absolute     `regression`
    dense        a class for each pixel          cross-entropy           `dense`

A new one is a file here and a line in `KINDS`.
"""

from selfmask_dist.backbones import Backbone
from selfmask_dist.config import Config
from selfmask_dist.objectives import supervised
from selfmask_dist.objectives.base import Context
from selfmask_dist.objectives.supervised import LogitsFn, Supervised
from selfmask_dist.objectives.targets.dense import Dense
from selfmask_dist.objectives.targets.multilabel import Multilabel
from selfmask_dist.objectives.targets.regression import Regression
from selfmask_dist.objectives.targets.targeted import Targeted

KINDS: dict[str, type[Targeted]] = {"multilabel": Multilabel, "regression": Regression, "dense": Dense}


def build(
    config: Config,
    backbone: Backbone,
    classes: tuple[str, ...],
    context: Context,
    *,
    distill_teacher: LogitsFn | None = None,
) -> Supervised:
    """Return the supervised objective for what `objective.target` asks for.

    Args:
        classes: names of what the head gives, in order.

    Raises:
        ValueError: as `supervised.build`; or there is nothing to give.
    """
    section = config.objective
    if section.target == "class":
        return supervised.build(config, backbone, classes, context, distill_teacher=distill_teacher)
    objective = KINDS[section.target](backbone.spec.dim, len(classes), section, seed=config.seed)
    objective.classes = classes
    if context.targets is not None:
        objective.know(context.targets)
    return objective
