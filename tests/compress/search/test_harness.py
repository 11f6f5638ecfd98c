"""Against the harness itself where it is installed (it is no part of the test extras: it brings
sixty packages)."""

import json
from pathlib import Path

import pytest
import torch

from headwise.compress.search.harness import benchmark
from headwise.models.default import default_model_path


def test_without_the_harness_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"headwise\[harness\]"):
        benchmark(torch.nn.Identity(), None, ["lambada_openai"])


def test_a_task_of_local_data_is_run_with_any_cache(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from headwise.compress import HeadCache

    model = AutoModelForCausalLM.from_pretrained(default_model_path())
    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    rows = [{"text": "a b c d a b c", "answer": " d"}, {"text": "x y x", "answer": " y"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "copying",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    plain = benchmark(model, tokenizer, [task], task_manager=TaskManager())
    whole = benchmark(
        model,
        tokenizer,
        [task],
        task_manager=TaskManager(),
        cache=lambda m: HeadCache(m, budget=1.0),
    )
    assert plain["copying"] == whole["copying"]
