"""What shrinking saves, really: every benchmark of the room, one after another, in one run.

    python -m bench.shrink                                  # cache, structure, bits, tokens
    python -m bench.shrink --only cache,structure --threads 2
    python -m bench.shrink --peer-python ../peer/bin/python # and kvpress, in its own environment

Each is a module of its own (`bench.shrink_cache` ...), with options of its own, whose table it
prints below the command that makes it.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

PARTS = ("cache", "quantised", "structure", "weights", "tokens", "peers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS[:-1]), help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peer-python", help="an interpreter that has kvpress and its transformers"
    )
    options = parser.parse_args()
    asked = options.only.split(",") + (["peers"] if options.peer_python else [])
    unknown = sorted(set(asked) - set(PARTS))
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    failed = []
    for part in dict.fromkeys(asked):
        command = ["-m", f"bench.shrink_{part}", "--threads", str(options.threads)]
        if part == "peers":
            if options.peer_python is None:
                parser.error("peers needs --peer-python: kvpress runs with an older transformers")
            command += ["--peer-python", options.peer_python]
        print(f"\n## python {shlex.join(command)}\n", flush=True)
        if subprocess.run([sys.executable, *command], check=False).returncode:
            failed.append(part)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
