"""What a user reads when something goes wrong: one line, and the exit code that goes with it."""

import textwrap

BAD_INPUT = 2
UNEXPECTED = 1
INTERRUPTED = 130


class UserError(Exception):
    """The input is wrong in a way that the message explains: what was given, expected, to do."""


class Interrupted(Exception):  # noqa: N818 -- not an error of anybody's
    """Ctrl-C, with the message that says what was kept and how to go on."""


def describe(error: BaseException) -> tuple[str, int]:
    """The line that is shown for `error`, and the exit code."""
    if isinstance(error, Interrupted):
        return str(error), INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, UserError):
        return str(error), BAD_INPUT
    if _raised_here(error):
        return one_line(error), BAD_INPUT
    # torch has a class of its own for it, which is not imported for this
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            "out of memory; use fewer --tokens, a smaller --batch-size or --dtype bfloat16 "
            f"({one_line(error, 120)})",
            UNEXPECTED,
        )
    return f"{type(error).__name__}: {one_line(error)} (--debug shows where)", UNEXPECTED


def one_line(error: BaseException, width: int = 500) -> str:
    """The message of `error` with its line breaks taken out, at most `width` characters."""
    return textwrap.shorten(str(error) or type(error).__name__, width, placeholder=" ...")


def _raised_here(error: BaseException) -> bool:
    """Whether headwise itself refused: its messages say what to do, those of others may not."""
    if type(error).__module__.startswith("headwise."):
        return True
    if not isinstance(error, ValueError | ImportError | FileNotFoundError):
        return False
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    raised_in = "" if where is None else str(where.tb_frame.f_globals.get("__name__", ""))
    return raised_in.startswith("headwise.")
