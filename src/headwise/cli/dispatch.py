"""From the arguments to the command, and from an exception to one line and an exit code."""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from headwise.cli.errors import describe
from headwise.cli.parser import build_parser


def run(argv: Sequence[str] | None = None) -> int:
    """Parse `argv`, run the command that it names, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as leaving:  # --help, --version and unusable arguments
        return leaving.code if isinstance(leaving.code, int) else 2
    if options.command is None:
        parser.print_help()
        return 0
    options.argv = arguments
    # transformers imports torchao where it is installed, which speaks of kernels that it misses
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    module, _, function = options.run.partition(":")
    try:
        code: int = getattr(import_module(module), function)(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if options.debug:
            traceback.print_exc()
        message, code = describe(error)
        prefix = "" if code == 130 else "error: "
        print(f"headwise {options.command}: {prefix}{message}", file=sys.stderr)
        return code
