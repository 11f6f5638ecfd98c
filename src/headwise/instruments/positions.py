"""How many positions a model has."""

from torch import nn

__all__ = ["position_limit", "position_table"]

_TABLES = ("wpe", "position_embeddings", "embed_positions")


def position_table(model: nn.Module) -> int | None:
    """The number of positions in the smallest table that positions are looked up in: nothing
    longer can run. None where positions are computed (rotary, relative).

    Some tables keep rows for padding in front (OPT and BART 2, RoBERTa its padding index + 1).
    """
    sizes = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding):
            behind = 0 if module.padding_idx is None else module.padding_idx + 1
            sizes.append(module.num_embeddings - max(behind, int(getattr(module, "offset", 0))))
    return min(sizes, default=None)


def position_limit(model: nn.Module) -> int | None:
    """The longest input that the model is made for, by its tables and its config."""
    config = getattr(model, "config", None)
    get_text = getattr(config, "get_text_config", None)
    config = config if get_text is None else get_text()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    known = [limit for limit in (*limits, position_table(model)) if isinstance(limit, int)]
    return min(known, default=None)
