"""The map of one module alone."""

import copy

import pytest
import torch
from architectures import (
    Masked,
    ResidualMLP,
    Transformer,
    Twice,
    check_tail,
    tokens,
    vectors,
)
from torch import fx, nn

import lmnfast
from lmnfast import cut


def test_a_module_alone_is_measured_although_skip_connections_go_around_it():
    torch.manual_seed(0)
    x = vectors()
    model = ResidualMLP(True)
    tail, samples = cut(model, block="blocks.1", inputs=x)
    torch.testing.assert_close(
        samples, model.after[0](model.stem(x) + model.blocks[0](model.stem(x))).detach()
    )
    check_tail(tail, samples, model.blocks[1])
    assert lmnfast.explain(ResidualMLP(), block="blocks.0", inputs=x)["blocks.0"].route == "fused"
    model, x = Transformer().eval(), tokens()
    for name in ("blocks.0", "blocks.1.mlp", "blocks.1.norm_1", "blocks.0.out", "head"):
        tail, samples = cut(model, block=name, inputs=x)
        check_tail(tail, samples, model.get_submodule(name))
        assert isinstance(tail, fx.GraphModule)


def test_the_other_arguments_of_a_module_stay_as_they_are():
    torch.manual_seed(0)
    model, x = Masked(), torch.randn(8, 5, 6)
    exact = copy.deepcopy(model).double()
    angles = torch.arange(5.0).double()[None, :, None]
    positions = {"position_embeddings": (angles.cos(), angles.sin())}
    check_tail(*cut(model, block="attention", inputs=x), lambda z: exact.attention(z, **positions)[0])
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[:, 3:] = False

    def masked(z):
        return exact.attention(z, mask[:1, None, :].expand(len(z), 5, 5), **positions)[0]

    check_tail(*cut(model, block="attention", inputs=(x, mask)), masked)
    five = torch.randn(5, 5, 6)  # as many samples as tokens
    check_tail(*cut(model, block="attention", inputs=five), lambda z: exact.attention(z, **positions)[0])


def test_an_argument_that_differs_between_samples_is_refused_by_name_if_it_matters():
    torch.manual_seed(0)
    model, x, mask = Masked(), torch.randn(8, 5, 6), torch.ones(8, 5, dtype=torch.bool)
    mask[:3, 3:] = False
    with pytest.raises(ValueError) as error:
        cut(model, block="attention", inputs=(x, mask))
    assert str(error.value) == (
        "block: the output of 'attention' depends also on 'attention_mask', not the same for all samples; expected one value "
        "of it for all samples (of a padding mask: samples of equal length, or one mask, repeated)"
    )
    check_tail(*cut(model, block="mlp", inputs=(x, mask)), model.mlp)  # the mask does not reach it
    with pytest.raises(
        ValueError, match="layer: the model's output depends also on the input 'mask', not the same"
    ):
        cut(model, "", (x, mask))

    class Ignoring(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.part = nn.Linear(6, 6), Part()

        def forward(self, x, label):
            return x[:, :2] + self.part(self.first(x), label=label)

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x, label):
            return torch.tanh(self.layer(x)) + 0 * label[:, None]

    model = Ignoring()  # the labels differ, and change nothing
    check_tail(
        *cut(model, block="part", inputs=(vectors(), torch.arange(14.0))),
        nn.Sequential(model.part.layer, nn.Tanh()),
    )


def test_one_tensor_in_several_arguments_is_replaced_in_all():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2).eval()
    x = torch.randn(8, 4, 6)
    exact = copy.deepcopy(encoder).double()
    tail, samples = cut(encoder, block="layers.0.self_attn", inputs=x)
    assert torch.equal(samples, x)
    check_tail(tail, samples, lambda z: exact.layers[0].self_attn(z, z, z, need_weights=False)[0])
    check_tail(*cut(encoder, block="layers.1", inputs=x), encoder.layers[1])


class Cache:
    """As the caches of keys and values are: every call adds to it."""

    def __init__(self):
        self.values = []


def test_an_object_among_the_arguments_is_as_it_was_before_the_call():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x, cache):
            cache.values.append(self.layer(x))
            return sum(cache.values)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Cached()

        def forward(self, x):
            return x + self.part(x, cache=Cache())

    torch.manual_seed(0)
    model = Model()
    check_tail(*cut(model, block="part", inputs=vectors()), model.part.layer)


def test_a_module_that_cannot_be_measured_alone_is_told_why():
    model, x = Transformer(), tokens()
    with pytest.raises(ValueError, match="block: 'blocks.9' is not in the model; it has"):
        cut(model, block="blocks.9", inputs=x)
    with pytest.raises(
        TypeError,
        match=r"block: 'token' takes no floating-point tensor with a row for each of 12 samples, but 'input' \(12, 4\) of "
        "torch.int64",
    ):
        cut(model, block="token", inputs=x)
    with pytest.raises(
        ValueError, match="block: 'blocks' was called 0 times .* a container that has no forward"
    ):
        cut(model, block="blocks", inputs=x)
    twice, x = Twice(), vectors()
    with pytest.raises(ValueError, match="block: 'layer' was called 2 times .* from 'layer@0' to 'layer@1'"):
        cut(twice, block="layer", inputs=x)
    tail, samples = cut(twice, block="layer@1", inputs=x)
    torch.testing.assert_close(samples, torch.relu(twice.layer(x)).detach())
    check_tail(tail, samples, twice.layer)
    with pytest.raises(ValueError, match="layer: expected either layer or block, got both"):
        cut(twice, "layer", x, block="layer")
    with pytest.raises(ValueError, match="layer: expected either layer or block, got neither"):
        cut(twice, inputs=x)
    with pytest.raises(
        ValueError, match="until: expected with a layer alone, as a block ends where its module ends"
    ):
        cut(twice, block="layer@0", inputs=x, until="last")

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean()

    with pytest.raises(ValueError, match=r"block: the output of '0' has shape \(\) for 14 inputs"):
        cut(nn.Sequential(Mean()), block="0", inputs=x)

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return torch.vmap(self.inner)(x)

    with pytest.raises(ValueError, match="block: 'inner' is called under torch.vmap, one sample at a time"):
        cut(Mapped(), block="inner", inputs=x)


class Setting(nn.Module):
    """Sets something for its part before it calls it."""

    def __init__(self, how):
        super().__init__()
        self.part, self.how = Part(), how

    def forward(self, x):
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return x + self.part(x)
        self.part.scale = {"missing": torch.ones(6), "other": 3.0}[self.how]
        return x + self.part(x)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 6), 1

    def forward(self, x):
        return self.layer(x) * (self.scale if self.scale is not None else x.nothing)


@pytest.mark.parametrize("how", ["autocast", "other", "missing"])
def test_a_module_that_is_another_when_called_alone_is_refused(how):
    model = Setting(how)
    model.part.scale = None if how == "missing" else 1
    said = {
        "missing": "block: 'part' fails when it is called alone .* which the model sets before .AttributeError: .*nothing",
        "other": "block: the output of 'part' is not the same in a second call .* as autocast or an attribute",
    }
    with pytest.raises(ValueError, match=said.get(how, said["other"])):
        cut(model, block="part", inputs=vectors())
    assert model.part.scale == (None if how == "missing" else 1)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.filterwarnings("ignore")  # of transformers
def test_blocks_of_gpt2_and_llama_are_what_they_are_when_called_by_hand(cached):
    transformers = pytest.importorskip("transformers", reason="the blocks are Hugging Face's")
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": cached}
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=2, n_head=2, **ends)
    ).eval()
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes, **ends)).eval()
    ids = torch.randint(40, (7, 5))
    mask = torch.ones_like(ids)
    exact = copy.deepcopy(gpt.transformer.h[1]).double()
    layer, rotary = copy.deepcopy(llama.model.layers[1]).double(), llama.model.rotary_emb

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    def of_llama(z):
        return first(layer(z, position_embeddings=rotary(z, torch.arange(5)[None])))

    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        tails = [
            (cut(gpt, block="transformer.h.1", inputs=inputs), lambda z: first(exact(z))),
            (cut(gpt, "transformer.h.0", inputs, until="transformer.h.1"), lambda z: first(exact(z))),
            (cut(gpt, block="transformer.h.1.mlp", inputs=inputs), exact.mlp),
            (cut(gpt, block="transformer.h.1.attn", inputs=inputs), lambda z: first(exact.attn(z))),
            (cut(llama, block="model.layers.1", inputs=inputs), of_llama),
            (cut(llama, "model.layers.0", inputs, until="model.layers.1"), of_llama),
            (cut(llama, block="model.layers.1.mlp", inputs=inputs), layer.mlp),
        ]
        for (tail, samples), expected in tails:
            check_tail(tail, samples, expected)
    padded = mask.clone()
    padded[:2, :2] = 0
    for model, block in ((gpt, "transformer.h.1"), (llama, "model.layers.1.self_attn")):
        with pytest.raises(
            ValueError, match=f"block: the output of '{block}' depends also on 'attention_mask'"
        ):
            cut(model, block=block, inputs={"input_ids": ids, "attention_mask": padded})
    with pytest.raises(TypeError, match="integers .tokens. cannot be interpolated: cut .* 'transformer.wte'"):
        cut(gpt, "inputs", {"input_ids": ids}, output="logits")
