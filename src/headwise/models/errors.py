"""What can go wrong when looking into a model that somebody else wrote."""


class UnsupportedModelError(ValueError):
    """The model, or a part of it, cannot be viewed or observed; says which class and why."""


class UnobservedError(RuntimeError):
    """A forward pass ended although an expected attention was not seen; says which and why."""


class UnknownAttentionArgumentError(TypeError):
    """The model hands its attention an argument whose meaning is not known here.

    Passing over it could change what is computed (learned sinks, biases, block lists ...)
    without a word, so nothing is measured instead.
    """
