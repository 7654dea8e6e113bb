"""Warnings of masks that are used in a way that is hardly meant."""


class MaskWarning(UserWarning):
    """Masks are used in a way that is hardly meant."""


class PartlyMaskedWarning(MaskWarning):
    """A preset masks less than half of a model's matrices."""


class ForgottenBindWarning(MaskWarning):
    """Masks get gradients, other parameters are stepped, and no optimizer is bound to the masks."""


class UnusedGradientWarning(MaskWarning):
    """Gradients of theta were changed after the scores' were made of them."""
