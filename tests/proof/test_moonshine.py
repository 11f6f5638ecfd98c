"""Moonshine tiny: speech to text, encoder and decoder of 6 layers, 8 heads of 36, partial rotary.

Weights: Useful Sensors (MIT), int8 made float again. Known: what is said in two recordings, and
what must be true of any model that hears from left to right: while it writes, cross-attention
moves forward through the recording.
"""

import pytest
import torch

from headwise.models import AttentionReading, observe, view
from tests.proof.eager import CLOSE, Where, differences, where
from tests.proof.weights import loader, sound

tokenizers = pytest.importorskip("tokenizers")

SAID = {
    "moonshine_tiny/beckett.wav": "Ever tried, ever failed, no matter try again, fail again, fail "
    "better.",
    "speech_wav/jfk.wav": "And so, my fellow Americans, ask not what your country can do for you, "
    "ask what you can do for your country.",
}
RECORDINGS = list(SAID)
STACKS = [("encoder", "self"), ("decoder", "self"), ("decoder", "cross")]


@pytest.fixture(scope="module")
def model(assets):
    load = loader(assets / "moonshine_tiny" / "load_moonshine.py").load
    return load(attn_implementation="sdpa")


@pytest.fixture(scope="module")
def tokenizer(assets):
    return tokenizers.Tokenizer.from_file(str(assets / "moonshine_tiny" / "tokenizer.json"))


@pytest.mark.parametrize("name", RECORDINGS)
@torch.no_grad()
def test_it_writes_the_same_words_observed(assets, model, tokenizer, name):
    samples = sound(assets / name)
    before = model.generate(samples, max_new_tokens=60, do_sample=False)
    seen: dict[Where, int] = {}

    def read(reading: AttentionReading) -> None:
        seen[where(reading)] = seen.get(where(reading), 0) + 1

    with observe(view(model), read=read):
        during = model.generate(samples, max_new_tokens=60, do_sample=False)
    assert tokenizer.decode(during[0].tolist()).strip() == SAID[name]
    assert torch.equal(before, during)
    assert set(seen) == {(*stack, layer) for stack in STACKS for layer in range(6)}
    steps = during.shape[1] - 1
    assert all(count == (1 if at[0] == "encoder" else steps) for at, count in seen.items())


@torch.no_grad()
def written(model, samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """The recording with what the model writes about it, to be read again in one pass."""
    words = model.generate(samples, max_new_tokens=60, do_sample=False)
    return {"input_values": samples, "decoder_input_ids": words[:, :-1]}


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_statistic_agrees_with_the_eager_matrices(assets, model, name):
    found = differences(model, written(model, sound(assets / name)))
    assert found.pop("output") < 1e-3  # logits reach 30
    assert max(found.values()) < CLOSE, found


def test_every_statistic_agrees_in_a_padded_batch(assets, model):
    long, short = (sound(assets / name)[0] for name in reversed(RECORDINGS))
    lengths = torch.tensor([[len(long)], [len(short)]])
    samples = torch.stack([long, torch.nn.functional.pad(short, (0, len(long) - len(short)))])
    inputs = {
        "input_values": samples,
        "attention_mask": (torch.arange(len(long)) < lengths).long(),
        "decoder_input_ids": torch.tensor([[1, 400, 900, 30], [1, 77, 5000, 12]]),
    }
    found = differences(model, inputs)
    assert found.pop("output") < 1e-3
    assert max(found.values()) < CLOSE, found


def rank(x: torch.Tensor) -> torch.Tensor:
    return x.argsort(-1).argsort(-1).double()


def rising(places: torch.Tensor) -> torch.Tensor:
    """Rank correlation of places `(heads, n)` with their order: 1 if each lies after the last."""
    r = rank(places) - (places.shape[-1] - 1) / 2
    i = torch.arange(places.shape[-1], dtype=torch.double) - (places.shape[-1] - 1) / 2
    return (r * i).sum(-1) / (r.square().sum(-1) * i.square().sum()).sqrt()


@torch.no_grad()
def alignment(model, inputs: dict[str, torch.Tensor], shuffled: bool) -> torch.Tensor:
    """How steadily the mean attended place moves forward, by layer and head `(6, 8)`."""
    heard = model.get_encoder()(inputs["input_values"])
    frames = heard.last_hidden_state
    if shuffled:
        order = torch.randperm(frames.shape[1], generator=torch.Generator().manual_seed(0))
        frames = heard.last_hidden_state = frames[:, order]
    layers: list[torch.Tensor] = []

    def read(reading: AttentionReading) -> None:
        if reading.attention.kind == "cross":
            place = torch.arange(frames.shape[1], dtype=torch.float32)
            values = place[None, None, :, None].expand(1, reading.attention.kv_heads, -1, -1)
            layers.append(rising(reading.map.apply(values)[0, :, :, 0]))

    with observe(view(model), read=read):
        model(encoder_outputs=heard, decoder_input_ids=inputs["decoder_input_ids"])
    return torch.stack(layers)


@pytest.mark.parametrize("name", RECORDINGS)
def test_cross_attention_moves_forward_through_the_recording(assets, model, name):
    inputs = written(model, sound(assets / name))
    found, control = (alignment(model, inputs, shuffled) for shuffled in (False, True))
    assert found[5].min() > 0.9
    assert (found[3:] > 0.9).float().mean() > 0.9
    # frames in random order: the same attention, but no direction
    assert control.max() < 0.75
    assert control[3:].mean() < 0.25


@pytest.mark.parametrize("name", RECORDINGS)
@torch.no_grad()
def test_heads_of_its_first_encoder_layer_look_at_the_frames_beside(assets, model, name):
    inputs = written(model, sound(assets / name))
    beside: dict[tuple[str, int], torch.Tensor] = {}

    def read(reading: AttentionReading) -> None:
        a, n = reading.attention, reading.map.scores.n_q
        if a.kind == "self":
            for step in (-1, 1):
                index = torch.arange(n) + step
                index[(index < 0) | (index >= n)] = -1
                mass = reading.map.mass_at(index).mean((0, 2))
                beside[f"{a.stack} {step:+d}", a.layer] = mass

    with observe(view(model), read=read):
        model(**inputs)
    before = torch.stack([beside["encoder -1", layer] for layer in range(6)])
    after = torch.stack([beside["encoder +1", layer] for layer in range(6)])
    written_before = torch.stack([beside["decoder -1", layer] for layer in range(6)])
    written_after = torch.stack([beside["decoder +1", layer] for layer in range(6)])
    assert before.argmax() == 0
    assert before[0, 0] > 0.6
    assert before.flatten().topk(2).values[1] < 0.35
    assert after.argmax() == 1
    assert after[0, 1] > 0.6
    assert after.flatten().topk(2).values[1] < 0.35
    assert written_before.argmax() == 1 * 8 + 3  # the decoder's previous-token head
    assert written_before[1, 3] > 0.7
    assert written_after.max() == 0
