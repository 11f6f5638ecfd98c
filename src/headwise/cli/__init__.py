"""The command line. Its parser imports nothing heavy; each command imports what it runs."""

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `headwise` command with `argv` (sys.argv[1:] where None) and return its exit code.

    0: done; 1: something unexpected failed; 2: the input was wrong; 130: interrupted.
    """
    from headwise.cli.dispatch import run

    return run(argv)
