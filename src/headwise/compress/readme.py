"""The README that lies in a saved model's folder."""

from __future__ import annotations

from typing import Any

_HEAD = """# {name}, changed with headwise

```python
import headwise

model = headwise.load("this folder")
```
"""
_PLAIN = """
This is also a plain Hugging Face checkpoint: `{name}.from_pretrained("this folder")` gives the same
model without headwise.
"""
_OTHER = """
`from_pretrained` cannot load it: {reason}. An ordinary config has no way of saying that, and so
the weights do not carry the name that transformers looks for.
"""
_OWN = """
Its class is no class of transformers: build the model as it was before the changes below and give
it as `headwise.load("this folder", into=model)`.
"""


def readme(manifest: dict[str, Any], reason: str) -> str:
    """reason: why transformers alone cannot load it."""
    room, _, name = str(manifest["class"]).rpartition(".")
    text = _HEAD.format(name=name)
    if room != "transformers":
        text += _OWN
    elif manifest["weights"]["file"] == "model.safetensors":
        text += _PLAIN.format(name=name)
    else:
        text += _OTHER.format(reason=reason)
    lines = [f"{number}. {_line(step)}" for number, step in enumerate(manifest["steps"], 1)]
    return text + "\nWhat was done:\n\n" + ("\n".join(lines) or "nothing") + "\n"


def _line(step: dict[str, Any]) -> str:
    told = ", ".join(f"{k}={_short(v)}" for k, v in step.items() if k != "step")
    return f"{step['step']}({told})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:180]} ... ({len(value)} entries)"
