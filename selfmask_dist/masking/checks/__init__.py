"""What is checked before masks are attached, trained and saved.

`choosing` calls the others when masks are attached; `guard` watches the training after that.
"""

from selfmask_dist.masking.checks.choosing import (
    as_family,
    choose,
    choose_other,
    num_segments,
    warn_where_partly_masked,
)
from selfmask_dist.masking.checks.models import (
    check_finite_weights,
    check_free,
    check_model,
    check_underived,
)
from selfmask_dist.masking.checks.optimizers import (
    check_decay,
    check_no_closure,
    check_optimizer,
    check_score_step,
    check_steps_others,
    has_numbers,
)
from selfmask_dist.masking.checks.scores import (
    check_finite,
    check_same_names,
    check_same_weights,
    check_tensors,
    own_init,
    own_state,
)
from selfmask_dist.masking.checks.warned import (
    ForgottenBindWarning,
    MaskWarning,
    PartlyMaskedWarning,
    UnusedGradientWarning,
)

__all__ = [
    "ForgottenBindWarning",
    "MaskWarning",
    "PartlyMaskedWarning",
    "UnusedGradientWarning",
    "as_family",
    "check_decay",
    "check_finite",
    "check_finite_weights",
    "check_free",
    "check_model",
    "check_no_closure",
    "check_optimizer",
    "check_same_names",
    "check_same_weights",
    "check_score_step",
    "check_steps_others",
    "check_tensors",
    "check_underived",
    "choose",
    "choose_other",
    "has_numbers",
    "num_segments",
    "own_init",
    "own_state",
    "warn_where_partly_masked",
]
