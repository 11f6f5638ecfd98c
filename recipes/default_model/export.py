"""Write the last checkpoint as a Hugging Face folder.

    python -m recipes.default_model.export --work build/default_model --out OUT

Weights are stored in float16 to keep the package small, and the configuration says float32, so
that they are computed with in float32 wherever they are loaded without a dtype. What is evaluated
and shipped is this rounded model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from recipes.default_model import corpus
from recipes.default_model.train import CONFIG

SHIPPED = Path(__file__).resolve().parents[2] / "src" / "headwise" / "default_model"


def export(work: Path, out: Path) -> None:
    """Weights, configuration and tokenizer of the checkpoint in `work`, into the folder `out`."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    model.load_state_dict(state["model"])
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=True, temperature=0.8
    )
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    AutoTokenizer.from_pretrained(corpus.tokenizer_folder(work)).save_pretrained(out)
    _patch(out / "config.json", dtype="float32")
    # the class name that every version of transformers knows
    _patch(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    training = {name: state[name] for name in ("step", "steps", "seed", "peak", "autocast")}
    training["minutes"] = round(state["seconds"] / 60)
    (work / "training.json").write_text(json.dumps(training, indent=2) + "\n")


def _patch(path: Path, **changes: str) -> None:
    content = json.loads(path.read_text()) | changes
    for name in ("is_local", "local_files_only"):  # how it was loaded here, not what it is
        content.pop(name, None)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the last checkpoint as a model folder")
    parser.add_argument("--work", type=Path, default=Path("build/default_model"))
    parser.add_argument("--out", type=Path, default=SHIPPED)
    given = parser.parse_args()
    export(given.work, given.out)
    print(given.out)


if __name__ == "__main__":
    main()
