"""Models that torch.fx cannot trace, cut by a layer's name: against the part behind the layer written by hand, on the generic
route and in a plain loop, and against the whole model with a hook for each path point.

pytest bench/bench_cutting.py

The loop is `by_hand` of bench_connectivity with its best chunk. All bars give the same number.
"""

import functools

import pytest
import torch
from bench_connectivity import by_hand
from timing import best_of

import lmnfast

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SAMPLES, TOKENS = 20, 12
TEXT = {"vocab_size": 50, "max_position_embeddings": 64}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
GPT2 = {"n_layer": 12, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 64}
CHUNKS = (2, 5, 10, 20, 50, 100, 190)


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 50, (SAMPLES, TOKENS))}


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(SAMPLES, 3, 32, 32)}


def gpt2_behind(model, block):
    def tail(h):
        for each in model.transformer.h[block + 1 :]:
            h = each(h)
        return model.lm_head(model.transformer.ln_f(h))[:, -1]

    return tail


def bert_behind(model, block):
    def tail(h):
        for each in model.encoder.layer[block + 1 :]:
            h = each(h)
        return h[:, 0]

    return tail


def llama_behind(model, block):
    places = torch.arange(TOKENS)[None]
    mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None, None]

    def tail(h):
        turns = model.model.rotary_emb(h, places)
        for each in model.model.layers[block + 1 :]:
            h = each(h, attention_mask=mask, position_ids=places, position_embeddings=turns)
        return model.lm_head(model.model.norm(h))[:, -1]

    return tail


def vit_behind(model, block):
    def tail(h):
        for each in model.layers[block + 1 :]:
            h = each(h)
        return model.layernorm(h)[:, 0]

    return tail


def last_logits(result):
    return result.logits[:, -1]


def first_state(result):
    return result.last_hidden_state[:, 0]


# Model, layer, its number, inputs, what counts of the output, and the part behind the layer by hand.
MODELS = {
    "GPT-2, 12 layers, from block 10": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        "transformer.h.{}",
        10,
        tokens,
        last_logits,
        gpt2_behind,
    ),
    "GPT-2, 12 layers, from block 1": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        "transformer.h.{}",
        1,
        tokens,
        last_logits,
        gpt2_behind,
    ),
    "BERT": (
        lambda: transformers.BertModel(transformers.BertConfig(**WIDTHS, **TEXT)),
        "encoder.layer.{}",
        1,
        tokens,
        first_state,
        bert_behind,
    ),
    "Llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDTHS, **TEXT)),
        "model.layers.{}",
        1,
        tokens,
        last_logits,
        llama_behind,
    ),
    "ViT": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**WIDTHS, image_size=32, patch_size=8)),
        "layers.{}",
        1,
        pixels,
        first_state,
        vit_behind,
    ),
}


@functools.cache
def problem(name: str, device: torch.device):
    """Tail by name, tail by hand, the model with a hook, samples, their connectivity, and the best chunk of the loop."""
    torch.manual_seed(0)
    make, layer, number, draw, output, behind = MODELS[name]
    model = make().eval().requires_grad_(False).to(device)
    inputs = {key: value.to(device) for key, value in draw().items()}
    tail, x = lmnfast.cut(model, layer.format(number), inputs, output=output)
    hand = behind(model, number)
    part = model.get_submodule(layer.format(number))

    def hooked(points):
        first = {key: value[:1].expand(len(points), *value.shape[1:]) for key, value in inputs.items()}
        handle = part.register_forward_hook(
            lambda module, args, result: (points, *result[1:]) if isinstance(result, tuple) else points
        )
        try:
            return output(model(**first))
        finally:
            handle.remove()

    chunk = min(CHUNKS, key=lambda c: best_of(lambda: by_hand(hand, x, c), 1))
    return tail, hand, hooked, x, by_hand(hand, x, chunk), chunk


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "bar", ["ours", "ours, tail by hand", "eager, by hand", "eager, the model with a hook"]
)
def bench_cutting(benchmark, measure, device, name, bar):
    tail, hand, hooked, x, truth, chunk = problem(name, device)
    benchmark.group = f"connectivity, by a layer's name, {name} N={len(x)}, {device.type}"
    benchmark.extra_info["bar"] = bar
    f = {"ours": tail, "ours, tail by hand": hand, "eager, by hand": hand}.get(bar, hooked)
    call, arguments = lmnfast.connectivity, (f, x)
    if bar.startswith("eager"):
        benchmark.extra_info["chunk"] = chunk
        call, arguments = by_hand, (f, x, chunk)
    assert (call(*arguments) - truth).abs().max() < 1e-4
    measure(call, arguments, rounds=5)
