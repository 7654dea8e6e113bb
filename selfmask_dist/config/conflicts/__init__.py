"""Values of a configuration that are fine one by one and do not go together.

A new rule is a `yield` in one of these files: the keys that it is about, what is wrong, and the way out.
"""

from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.conflicts import general, habits, lean, masks, procedures, retrieval, targets
from selfmask_dist.config.loading import Conflict


def conflicts(config: AllSections) -> list[Conflict]:
    """Return every conflict of a configuration; none where its values go together."""
    checks = (
        general.run_conflicts,
        general.data_conflicts,
        general.backbone_conflicts,
        general.objective_conflicts,
        general.view_conflicts,
        targets.target_conflicts,
        masks.mask_conflicts,
        masks.score_step_conflicts,
        procedures.procedure_conflicts,
        retrieval.retrieval_conflicts,
        habits.habit_conflicts,
        general.engine_conflicts,
        lean.lean_conflicts,
        general.number_conflicts,
    )
    return [conflict for check in checks for conflict in check(config)]
