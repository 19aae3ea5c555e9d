"""Models cut by a layer's name, on the generic route: against the part behind the layer written by hand, measured or in a plain
loop, and some against the whole model with a hook for each path point, or compiled.

pytest bench/bench_cutting.py            # the bars, for the report
python bench/bench_cutting.py [NAME...]  # ours and the loop by turns, and their ratio, for each model; --compile: both compiled

The loop is `by_hand` of bench_connectivity with its best chunk; it starts behind the layer. All bars give the same number.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bench_connectivity import by_hand
from timing import best_of
from torch import nn

import lmnfast

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SAMPLES, TOKENS = 20, 12
TEXT = {"vocab_size": 50, "max_position_embeddings": 64}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
IMAGES = {"image_size": 32, "patch_size": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CHUNKS = (2, 5, 10, 20, 50, 100, 190)


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 50, (SAMPLES, TOKENS))}


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(SAMPLES, 3, 32, 32)}


def vectors() -> dict[str, torch.Tensor]:
    return {"src": torch.randn(SAMPLES, TOKENS, 32)}


def last_logits(result):
    return result.logits[:, -1]


def first_state(result):
    return result.last_hidden_state[:, 0]


def pooled(result):
    return result.pooler_output.flatten(1)


def through(blocks, h, **given):
    """The blocks one after another."""
    for block in blocks:
        h = block(h, **given)
        h = h[0] if isinstance(h, tuple) else h
    return h


def causal(h):
    return torch.full((TOKENS, TOKENS), -torch.inf, device=h.device).triu(1)[None, None]


def turned(core, blocks, h):
    """Blocks of a decoder with rotary embeddings."""
    places = torch.arange(TOKENS, device=h.device)[None]
    turns = core.rotary_emb(h, places)
    return through(blocks, h, attention_mask=causal(h), position_ids=places, position_embeddings=turns)


@dataclass(frozen=True)
class Case:
    """A model, a layer of it, and the part behind that layer by hand: behind(model, samples)."""

    make: Callable[[], nn.Module]
    layer: str
    draw: Callable[[], dict[str, torch.Tensor]]
    output: Callable[[Any], torch.Tensor]
    behind: Callable[[nn.Module, torch.Tensor], torch.Tensor]


def gpt2(blocks: int, cut: int) -> Case:
    config = {"n_layer": blocks, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 64}
    return Case(
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)),
        f"transformer.h.{cut}",
        tokens,
        last_logits,
        lambda m, h: m.lm_head(m.transformer.ln_f(through(m.transformer.h[cut + 1 :], h)))[:, -1],
    )


def made(name: str, kind: str = "Model", **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name + kind)(getattr(transformers, name + "Config")(**settings))


def encoder(name: str, **settings: Any) -> Case:
    """Of the family of BERT."""
    return Case(
        made(name, **WIDTHS, **TEXT, **settings),
        "encoder.layer.1",
        tokens,
        first_state,
        lambda m, h: through(m.encoder.layer[2:], h)[:, 0],
    )


def decoder(name: str, **settings: Any) -> Case:
    """Of the family of Llama."""
    return Case(
        made(name, "ForCausalLM", **WIDTHS, **TEXT, **settings),
        "model.layers.1",
        tokens,
        last_logits,
        lambda m, h: m.lm_head(m.model.norm(turned(m.model, m.model.layers[2:], h)))[:, -1],
    )


def seeing(name: str) -> Case:
    """Of the family of ViT."""
    return Case(
        made(name, **WIDTHS, **IMAGES),
        "layers.1",
        pixels,
        first_state,
        lambda m, h: m.layernorm(through(m.layers[2:], h))[:, 0],
    )


def t5_behind(m, h):
    stack = m.encoder
    bias = stack.block[0].layer[0].SelfAttention.compute_bias(TOKENS, TOKENS, device=h.device)
    for block in stack.block[2:]:
        h = block(h, attention_mask=None, position_bias=bias)[0]
    return stack.final_layer_norm(h)[:, 0]


class Convolutional(nn.Module):
    """Residual blocks of convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1),
            )
            for _ in range(4)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, pixel_values):
        return self.behind(self.stem(pixel_values))

    def behind(self, h):
        for block in self.blocks:
            h = torch.relu(h + block(h))
        return self.head(h.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(50, 32), nn.LSTM(32, 32, 2, batch_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, input_ids):
        return self.behind(self.embedding(input_ids))

    def behind(self, h):
        return self.head(self.lstm(h)[0][:, -1])


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def whole(result):
    return result


MODELS = {
    "GPT-2, 12 layers, from block 10": gpt2(12, 10),
    "GPT-2, 12 layers, from block 1": gpt2(12, 1),
    "BERT": encoder("Bert"),
    "Llama": decoder("Llama"),
    "ViT": seeing("ViT"),
    "RoBERTa": encoder("Roberta"),
    "ELECTRA": encoder("Electra", embedding_size=32),
    "DistilBERT": Case(
        made("DistilBert", dim=32, n_layers=4, n_heads=2, hidden_dim=64, **TEXT),
        "transformer.layer.1",
        tokens,
        first_state,
        lambda m, h: through(m.transformer.layer[2:], h)[:, 0],
    ),
    "Mistral": decoder("Mistral", num_key_value_heads=2, head_dim=16),
    "Qwen2": decoder("Qwen2", num_key_value_heads=2),
    "Qwen3": decoder("Qwen3", num_key_value_heads=2, head_dim=16),
    "Gemma": decoder("Gemma", num_key_value_heads=2, head_dim=16),
    "OLMo 2": decoder("Olmo2"),
    "GPT-NeoX": Case(
        made("GPTNeoX", "ForCausalLM", **WIDTHS, **TEXT),
        "gpt_neox.layers.1",
        tokens,
        last_logits,
        lambda m, h: m.get_output_embeddings()(
            m.gpt_neox.final_layer_norm(turned(m.gpt_neox, m.gpt_neox.layers[2:], h))
        )[:, -1],
    ),
    "OPT": Case(
        made(
            *("OPT", "ForCausalLM"),
            **{k: v for k, v in WIDTHS.items() if k != "intermediate_size"},
            **TEXT,
            ffn_dim=64,
            word_embed_proj_dim=32,
        ),
        "model.decoder.layers.1",
        tokens,
        last_logits,
        lambda m, h: m.lm_head(
            m.model.decoder.final_layer_norm(through(m.model.decoder.layers[2:], h, attention_mask=causal(h)))
        )[:, -1],
    ),
    "T5, the encoder": Case(
        made("T5", "EncoderModel", d_model=32, d_kv=16, d_ff=64, num_layers=4, num_heads=2, vocab_size=50),
        "encoder.block.1",
        tokens,
        first_state,
        t5_behind,
    ),
    "DeiT": seeing("DeiT"),
    "DINOv2": Case(
        made("Dinov2", hidden_size=32, num_hidden_layers=4, num_attention_heads=2, **IMAGES),
        "encoder.layer.1",
        pixels,
        first_state,
        lambda m, h: m.layernorm(through(m.encoder.layer[2:], h))[:, 0],
    ),
    "CLIP, images": Case(
        made("CLIPVision", **WIDTHS, **IMAGES),
        "encoder.layers.1",
        pixels,
        pooled,
        lambda m, h: m.post_layernorm(through(m.encoder.layers[2:], h, attention_mask=None)[:, 0]),
    ),
    "ConvNeXt": Case(
        made("ConvNext", hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 2, 1]),
        "encoder.stages.1",
        pixels,
        pooled,
        lambda m, h: m.layernorm(through(m.encoder.stages[2:], h).mean((2, 3))),
    ),
    "ResNet": Case(
        made(
            "ResNet", embedding_size=8, hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 1, 1], layer_type="basic"
        ),
        "encoder.stages.1",
        pixels,
        pooled,
        lambda m, h: through(m.encoder.stages[2:], h).mean((2, 3)),
    ),
    "Whisper, the encoder": Case(
        lambda: (
            made(
                *("Whisper",),
                d_model=32,
                encoder_layers=4,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                vocab_size=50,
                max_source_positions=20,
                num_mel_bins=8,
                **SPECIAL,
            )().encoder
        ),
        "layers.1",
        lambda: {"input_features": torch.randn(SAMPLES, 8, 40)},
        first_state,
        lambda m, h: m.layer_norm(through(m.layers[2:], h, attention_mask=None))[:, 0],
    ),
    "nn.TransformerEncoder": Case(
        torch_encoder, "layers.1", vectors, lambda r: r[:, 0], lambda m, h: through(m.layers[2:], h)[:, 0]
    ),
    "nn.LSTM": Case(Recurrent, "embedding", tokens, whole, lambda m, h: m.behind(h)),
    "convolutions": Case(Convolutional, "stem", pixels, whole, lambda m, h: m.behind(h)),
}
HOOKED = ("GPT-2, 12 layers, from block 10", "GPT-2, 12 layers, from block 1")
COMPILED = ("GPT-2, 12 layers, from block 10", "BERT", "Llama", "ViT")
BARS = [
    (name, bar)
    for name in MODELS
    for bar in (
        *("ours", "ours, tail by hand", "eager, by hand"),
        *(["eager, the model with a hook"] if name in HOOKED else []),
        *(["ours, compiled", "torch.compile, by hand"] if name in COMPILED else []),
    )
]


@dataclass(eq=False)
class Problem:
    """A model cut by name and by hand."""

    case: Case
    model: nn.Module
    inputs: dict[str, torch.Tensor]
    tail: nn.Module
    x: torch.Tensor

    def hand(self, h: torch.Tensor) -> torch.Tensor:
        return self.case.behind(self.model, h)

    def hooked(self, points: torch.Tensor) -> torch.Tensor:
        first = {key: value[:1].expand(len(points), *value.shape[1:]) for key, value in self.inputs.items()}
        handle = self.model.get_submodule(self.case.layer).register_forward_hook(
            lambda module, args, result: (points, *result[1:]) if isinstance(result, tuple) else points
        )
        try:
            return self.case.output(self.model(**first))
        finally:
            handle.remove()

    @functools.cached_property
    def compiled_tail(self) -> nn.Module:
        case = self.case
        return lmnfast.cut(self.model, case.layer, self.inputs, output=case.output, compile=True)[0]

    @functools.cached_property
    def compiled_hand(self):
        return torch.compile(self.hand)

    @functools.cached_property
    def chunk(self) -> int:
        """The loop's best chunk."""
        return best_chunk(self.hand, self.x)

    @functools.cached_property
    def truth(self) -> torch.Tensor:
        """By the loop; by ours, on the tail by hand, where an output is constant on a path and the loop divides 0 by 0."""
        truth = by_hand(self.hand, self.x, self.chunk)
        return torch.where(truth.isnan(), lmnfast.connectivity(self.hand, self.x), truth)

    def check(self, L: torch.Tensor) -> None:
        assert (L - self.truth).nan_to_num().abs().max() < 1e-3


def best_chunk(f, x) -> int:
    return min(CHUNKS, key=lambda chunk: best_of(lambda: by_hand(f, x, chunk), 1))


@functools.cache
def problem(name: str, device: torch.device) -> Problem:
    torch.manual_seed(0)
    case = MODELS[name]
    model = case.make().eval().requires_grad_(False).to(device)
    inputs = {key: value.to(device) for key, value in case.draw().items()}
    return Problem(case, model, inputs, *lmnfast.cut(model, case.layer, inputs, output=case.output))


@pytest.mark.parametrize(("name", "bar"), BARS)
def bench_cutting(benchmark, measure, device, name, bar):
    this = problem(name, device)
    benchmark.group = f"connectivity, by a layer's name, {name} N={len(this.x)}, {device.type}"
    benchmark.extra_info["bar"] = bar
    functions = {
        "ours": this.tail,
        "ours, compiled": this.compiled_tail if bar == "ours, compiled" else None,
        "torch.compile, by hand": this.compiled_hand,
        "eager, the model with a hook": this.hooked,
    }
    f = functions.get(bar, this.hand)
    call, arguments = lmnfast.connectivity, (f, this.x)
    if not bar.startswith("ours"):
        chunk = best_chunk(f, this.x) if bar.startswith("torch") else this.chunk
        benchmark.extra_info["chunk"] = chunk
        call, arguments = by_hand, (f, this.x, chunk)
    this.check(call(*arguments))
    measure(call, arguments, rounds=5)


def by_turns(ours, loop, rounds: int) -> tuple[float, float]:
    """The seconds of the fastest of some calls of each, called by turns: a machine that gets slower is slower for both."""
    times = [(best_of(ours, 1), best_of(loop, 1)) for _ in range(rounds)]
    first, second = zip(*times, strict=True)
    return min(first), min(second)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ours and a loop by hand, by turns.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {'; '.join(MODELS)} (all)")
    parser.add_argument("--compile", action="store_true", help="both compiled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"{'model':36} {'ours, ms':>9} {'loop, ms':>9} {'chunk':>5} {'ratio':>6}")
    with torch.no_grad():
        for name in options.names or MODELS:
            this = problem(name, torch.device(options.device))
            tail, hand = (
                (this.compiled_tail, this.compiled_hand) if options.compile else (this.tail, this.hand)
            )
            chunk = best_chunk(hand, this.x)
            this.check(lmnfast.connectivity(tail, this.x))
            this.check(by_hand(hand, this.x, chunk))
            calls = lambda: lmnfast.connectivity(tail, this.x), lambda: by_hand(hand, this.x, chunk)  # noqa: B023
            ours, loop = by_turns(*calls, options.rounds)
            print(f"{name:36} {1e3 * ours:9.1f} {1e3 * loop:9.1f} {chunk:5} {ours / loop:6.2f}", flush=True)


if __name__ == "__main__":
    main()
