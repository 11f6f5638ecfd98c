"""Benchmarks through lm-evaluation-harness, for those who have it and its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

__all__ = ["benchmark"]


def benchmark(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    cache: Callable[[nn.Module], Any] | None = None,
    batch_size: int = 1,
    **more: Any,
) -> dict[str, dict[str, Any]]:
    """Task -> its figures, as `lm_eval.simple_evaluate` gives them.

    tasks: names that the harness knows, or its own task descriptions. cache: makes the cache of
    each generation, such as `lambda model: HeadCache(model, budget=0.25)`; tasks that only compare
    likelihoods read their text in one pass and never use one. more: goes on to `simple_evaluate`
    (limit=, num_fewshot=, task_manager= ...).

    Raises ImportError where the harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            "benchmarks run through lm-evaluation-harness, which is not installed: "
            "pip install 'headwise[harness]'"
        ) from error

    class Cached(HFLM):
        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            if cache is None:
                return super()._model_generate(*args, **kwargs)
            with cache(self.model) as made:
                return super()._model_generate(*args, past_key_values=made, **kwargs)

    lm = Cached(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(lm, tasks=list(tasks), **more)
    results: dict[str, dict[str, Any]] = found["results"]
    return results
