"""What a user reads when something goes wrong: one line, and the exit code that goes with it."""

import textwrap

BAD_INPUT = 2
UNEXPECTED = 1
INTERRUPTED = 130

# Errors of the lower rooms and of PyTorch whose own message already says what to do, by class
# name: importing the classes would import torch.
_SELF_EXPLAINING = {
    "UnsupportedModelError",
    "UnobservedError",
    "UnknownAttentionArgumentError",
}


class UserError(Exception):
    """The input is wrong in a way that the message explains: what was given, expected, to do."""


class Interrupted(Exception):  # noqa: N818 -- not an error of anybody's
    """Ctrl-C, with the message that says what was kept and how to go on."""


def describe(error: BaseException) -> tuple[str, int]:
    """The line that is shown for `error`, and the exit code."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, UserError):
        return str(error), BAD_INPUT
    if isinstance(error, Interrupted):
        return str(error), INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if kinds & _SELF_EXPLAINING:
        return one_line(error), BAD_INPUT
    if "OutOfMemoryError" in kinds or isinstance(error, MemoryError):
        return (
            "out of memory; use fewer --tokens, a smaller --batch-size or --dtype bfloat16 "
            f"({one_line(error, 120)})",
            UNEXPECTED,
        )
    return (
        f"{type(error).__name__}: {one_line(error)} (--debug shows where)",
        UNEXPECTED,
    )


def one_line(error: BaseException, width: int = 500) -> str:
    """The message of `error` with its line breaks taken out, at most `width` characters."""
    return textwrap.shorten(str(error) or type(error).__name__, width, placeholder=" ...")
