"""The MLP blocks of Hugging Face's models, cut out of them, are recognised as what they compute."""

import copy

import pytest
import torch
from test_recognise_block import changed, check, described
from torch import nn

from lmnfast import cut
from lmnfast._chain import Activation
from lmnfast._recognise import NotAChain
from lmnfast._recognise_block import block_or_reason

transformers = pytest.importorskip("transformers", reason="the blocks are Hugging Face's")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 40}
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 2}
GPT = {"n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}


def causal(name, **more):
    config = getattr(transformers, f"{name}Config")(**{**ENDS, **SIZES, **more})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**ENDS, **GPT))


def t5(projection):
    return transformers.T5EncoderModel(transformers.T5Config(**ENDS, **T5, feed_forward_proj=projection))


def bert():
    return transformers.BertModel(transformers.BertConfig(**ENDS, **SIZES, max_position_embeddings=16))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **SIZES))


def pieces():
    """Each model, how the block is cut out of it, the activation, and whether it has a gate."""
    gelu, tanh_gelu, silu, relu = (Activation(name) for name in ("gelu", "gelu_tanh", "silu", "relu"))
    layer = {"block": "model.layers.1.mlp"}
    few = {"num_key_value_heads": 2}
    return {
        "GPT-2": (gpt2, {"block": "transformer.h.1.mlp"}, tanh_gelu, False),
        "Llama": (lambda: causal("Llama"), layer, silu, True),
        "Mistral": (lambda: causal("Mistral", **few), layer, silu, True),
        "Qwen2": (lambda: causal("Qwen2", **few), layer, silu, True),
        "Gemma": (lambda: causal("Gemma", head_dim=4, num_key_value_heads=1), layer, tanh_gelu, True),
        "Phi": (lambda: causal("Phi"), layer, tanh_gelu, False),
        "Phi-3": (lambda: causal("Phi3"), layer, silu, True),
        "GPT-NeoX": (lambda: causal("GPTNeoX"), {"block": "gpt_neox.layers.1.mlp"}, gelu, False),
        "BERT": (
            bert,
            {"layer": "encoder.layer.1.attention", "until": "encoder.layer.1.output.dropout"},
            *(gelu, False),
        ),
        "ViT": (vit, {"layer": "layers.1.layernorm_after", "until": "layers.1.mlp"}, gelu, False),
        "T5": (lambda: t5("relu"), {"block": "encoder.block.1.layer.1.DenseReluDense"}, relu, False),
        "gated T5": (
            lambda: t5("gated-gelu"),
            {"block": "encoder.block.1.layer.1.DenseReluDense"},
            *(tanh_gelu, True),
        ),
    }


PIECES = pieces()


def made(name):
    """A model, with weights of the size of a trained one's, and inputs."""
    torch.manual_seed(0)
    model = PIECES[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model, torch.randn(7, 3, 8, 8) if name == "ViT" else torch.randint(40, (7, 5))


def in_dtype(inputs, dtype):
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


@pytest.mark.parametrize("name", PIECES)
def test_the_mlp_of_a_model_is_a_block(name):
    _, place, activation, gated = PIECES[name]
    model, inputs = made(name)
    model = model.double()
    tail, samples = cut(model, inputs=in_dtype(inputs, torch.float64), **place)
    block = block_or_reason(tail)
    assert described(block) == (activation, None, gated, False)
    check(tail, block, samples)
    check(tail, block, 3 * samples.flip(0))
    changed(model)
    check(tail, block, samples)  # the weights are the model's own
    check(tail, block_or_reason(tail), samples)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma", "Phi", "GPT-NeoX", "Phi-3"])
def test_the_module_itself_is_the_same_block(name):
    _, place, activation, gated = PIECES[name]
    f = copy.deepcopy(made(name)[0].get_submodule(place["block"])).double()
    block = block_or_reason(f)
    assert described(block) == (activation, None, gated, False)
    for shape in ((9, 8), (4, 3, 8)) if name != "GPT-2" else ((4, 3, 8),):
        check(f, block, torch.randn(shape, dtype=torch.float64))


class PreNorm(nn.Module):
    """The second half of a transformer's layer, of a model's own parts."""

    def __init__(self, norm, mlp):
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x):
        return x + self.mlp(self.norm(x))


HALVES = {
    "GPT-2": (lambda m: (m.transformer.h[1].ln_2, m.transformer.h[1].mlp), (True, 1e-5)),
    "Llama": (lambda m: (m.model.layers[1].post_attention_layernorm, m.model.layers[1].mlp), (False, 1e-6)),
    "Mistral": (lambda m: (m.model.layers[1].post_attention_layernorm, m.model.layers[1].mlp), (False, 1e-6)),
    "Qwen2": (lambda m: (m.model.layers[1].post_attention_layernorm, m.model.layers[1].mlp), (False, 1e-6)),
    "Gemma": (lambda m: (m.model.layers[1].post_attention_layernorm, m.model.layers[1].mlp), (False, 1e-6)),
    "ViT": (lambda m: (m.layers[1].layernorm_after, m.layers[1].mlp), (True, 1e-12)),
}


@pytest.mark.parametrize("name", HALVES)
def test_norm_and_mlp_with_the_residual_sum_are_a_block(name):
    _, _, activation, gated = PIECES[name]
    parts, norm = HALVES[name]
    f = PreNorm(*parts(made(name)[0]))
    block = block_or_reason(f)
    assert described(block) == (activation, norm, gated, True)
    x = torch.randn(4, 3, 8)
    check(f, block, x, 2e-6)
    changed(f)
    check(f, block_or_reason(f), x, 2e-6)
    f.double()
    if name in ("GPT-2", "ViT"):
        check(f, block_or_reason(f), x.double())
    else:  # these norms compute in float32, whatever the model's dtype
        with pytest.raises(NotAChain, match="its forward converts to torch.float32"):
            block_or_reason(f)


@pytest.mark.parametrize("name, activation, gated", [("T5", "relu", False), ("gated T5", "gelu_tanh", True)])
def test_the_last_layer_of_a_t5_block_is_a_block_with_its_norm(name, activation, gated):
    model, inputs = made(name)
    tail, samples = cut(model, block="encoder.block.1.layer.1", inputs=inputs)
    block = block_or_reason(tail)
    assert described(block) == (Activation(activation), (False, 1e-6), gated, True)
    check(tail, block, samples, 2e-6)
    changed(model)
    check(tail, block, samples, 2e-6)


def test_parts_of_models_that_are_no_blocks_are_refused():
    model, ids = made("BERT")
    tail, _ = cut(model, "encoder.layer.1.attention", ids, until="encoder.layer.1")
    with pytest.raises(NotAChain, match="a normalisation of other values than the samples"):
        block_or_reason(tail)
    for name in ("attn", "ln_2"):
        tail, _ = cut(made("GPT-2")[0], block=f"transformer.h.1.{name}", inputs=ids)
        with pytest.raises(NotAChain):
            block_or_reason(tail)
    tail, _ = cut(made("Llama")[0], block="model.layers.1", inputs=ids)
    with pytest.raises(NotAChain):
        block_or_reason(tail)
