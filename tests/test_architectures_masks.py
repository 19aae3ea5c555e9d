"""Masks and other inputs that each sample has of its own, behind the layer."""

import pytest
import torch
import transformers
from architectures import FLOAT32, tokens, truth
from torch import nn

import lmnfast


class Encoder(nn.Module):
    """torch.nn's own transformer, which in eval mode has a fast path."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 16), nn.Linear(16, 3)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, tokens, padded=None, mask=None):
        hidden = self.encoder(self.embedding(tokens), mask=mask, src_key_padding_mask=padded)
        return self.head(hidden[:, -1])


def test_a_padding_mask_that_is_the_same_for_all_samples_is_measured():
    model, x = Encoder(), tokens(6, 5)
    padded = torch.zeros(6, 5, dtype=torch.bool)
    padded[:, 1] = True
    tail, samples = lmnfast.cut(model, "encoder.layers.0", (x, padded))
    exact = Encoder().double().eval()
    exact.load_state_dict(model.state_dict())

    def f(h):
        return exact.head(
            exact.encoder.layers[1](h, src_key_padding_mask=padded[:1].expand(len(h), 5))[:, -1]
        )

    with torch.enable_grad():  # of the fast path this is not the reference
        L = truth(f, samples)
    assert (lmnfast.connectivity(tail, samples) - L).abs().max() < FLOAT32 and L.min() < 0.999
    assert torch.backends.mha.get_fastpath_enabled()
    padded[3:, 2] = True
    message = (
        "through 'encoder.layers.0': through the input 'padded', not the same for all samples; expected one value of the input "
        r"'padded' .* sequences of one length .* largest such group has 3 of 6 samples, sample 0 and those equal to it\), or"
    )
    with pytest.raises(ValueError, match=message):
        lmnfast.cut(model, "encoder.layers.0", (x, padded))
    assert torch.backends.mha.get_fastpath_enabled()
    lmnfast.cut(model, "encoder.layers.1", (x, padded))  # behind which it does not act


@pytest.mark.parametrize("samples", [5, 6])
def test_a_mask_of_tokens_by_tokens_is_shared_also_by_as_many_samples(samples):
    model, x = Encoder(), tokens(samples, 5)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    mask[-1, 1:3] = float("-inf")
    tail, h = lmnfast.cut(model, "encoder.layers.0", {"tokens": x, "mask": mask})
    exact = Encoder().double().eval()
    exact.load_state_dict(model.state_dict())
    L = truth(lambda h: exact.head(exact.encoder.layers[1](h, src_mask=mask.double())[:, -1]), h)
    assert (lmnfast.connectivity(tail, h) - L).abs().max() < FLOAT32 and L.min() < 0.999


class Depends(Encoder):
    """Has no graph, as its code depends on values."""

    def forward(self, tokens, padded=None, mask=None):
        output = super().forward(tokens, padded, mask)
        return output if float(output.sum()) < 1e9 else tokens


@pytest.mark.parametrize("kind", [Encoder, Depends])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_torch_is_not_taken_with_a_padding_mask(kind, padding):
    """It would hand nested tensors from layer to layer, without the shape of the samples."""
    model, x = kind().eval(), tokens(6, 5)
    padded = torch.zeros(6, 5, dtype=torch.bool)
    padded[:, :padding] = True
    tail, h = lmnfast.cut(model, "encoder.layers.0", (x, padded))
    exact = Encoder().double().eval()
    exact.load_state_dict(model.state_dict())

    def f(h):
        mask = padded[:1].expand(len(h), 5)
        return exact.head(exact.encoder.layers[1](h, src_key_padding_mask=mask)[:, -1])

    with torch.enable_grad():  # of the fast path this is not the reference
        L = truth(f, h)
    assert (lmnfast.connectivity(tail, h) - L).abs().max() < FLOAT32 and L.min() < 0.999
    with torch.no_grad():
        torch.testing.assert_close(tail(h), model(x, padded).float(), atol=1e-5, rtol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def language(causal):
    """A model of Hugging Face with blocks 'h.N' or 'encoder.layer.N', and what selects its output."""
    torch.manual_seed(0)
    if causal:
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=8, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2Model(config), "h.{}", lambda output: output.last_hidden_state[:, -1]
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    return model, "encoder.layer.{}", "pooler_output"


@pytest.mark.parametrize("causal", [True, False])
def test_a_ragged_batch_of_hugging_face_names_the_mask_and_its_sequences_of_one_length_are_measured(causal):
    model, block, output = language(causal)
    ids, mask = torch.randint(1, 50, (12, 7)), torch.ones(12, 7, dtype=torch.long)
    mask[:3, :2], mask[8:, :1] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    message = r"through the input 'attention_mask', not the same .* has 5 of 12 samples, sample 3 and those equal to it\)"
    with pytest.raises(ValueError, match=message) as refusal:
        lmnfast.cut(model, block.format(0), batch, output=output)
    assert "skip" not in str(refusal.value) and "input_ids" not in str(refusal.value)
    rows = (mask == mask[8]).all(1)  # the recipe of docs/models.md
    tail, h = lmnfast.cut(model, block.format(0), {k: t[rows] for k, t in batch.items()}, output=output)
    alone = model.eval()(
        ids[8:, 1:] if causal else ids[8:], attention_mask=mask[8:, 1:] if causal else mask[8:]
    )
    alone = output(alone) if callable(output) else alone.pooler_output
    if not causal:  # positions of GPT-2 count from the padding on, so its values are others
        torch.testing.assert_close(tail(h), alone.detach())
    assert h.shape == (4, 7, 16) and 0 < lmnfast.connectivity(tail, h).min() < 0.9999
    lmnfast.cut(model, block.format(2), batch, output=output if causal else "last_hidden_state")


def test_masks_that_differ_and_do_not_matter_for_the_output_are_no_obstacle():
    model, block, _ = language(True)
    ids, mask = torch.randint(1, 50, (12, 7)), torch.ones(12, 7, dtype=torch.long)
    mask[5:, -2:] = 0  # behind the positions that a causal model's third output depends on
    batch = {"input_ids": ids, "attention_mask": mask}

    def third(output):
        return output.last_hidden_state[:, 2]

    measured = lmnfast.connectivity(*lmnfast.cut(model, block.format(0), batch, output=third))
    whole = lmnfast.connectivity(*lmnfast.cut(model, block.format(0), {"input_ids": ids}, output=third))
    assert (measured - whole).abs().max() < FLOAT32 and whole.min() < 0.999


def test_positions_and_types_of_each_sample_travel_with_it():
    model, block, output = language(False)
    ids, ends = torch.randint(1, 50, (12, 7)), torch.arange(12)[:, None] % 5
    types, positions = (torch.arange(7) > ends).long(), (torch.arange(7) + ends % 2) % 7
    inputs = {"input_ids": ids, "token_type_ids": types, "position_ids": positions}
    tail, h = lmnfast.cut(model, block.format(0), inputs, output=output)
    torch.testing.assert_close(tail(h), model.eval()(**inputs).pooler_output.detach())
    assert lmnfast.connectivity(tail, h).min() < 0.999


def test_a_skip_around_the_layer_and_a_mask_are_told_apart():
    model, _, output = language(True)
    mask = torch.ones(12, 7, dtype=torch.long)
    mask[5:, :2] = 0
    batch = {"input_ids": torch.randint(1, 50, (12, 7)), "attention_mask": mask}
    message = (
        "through the input 'input_ids' and the input 'attention_mask', .* a layer that all of it passes through, as 'h.1' is "
        r"\(block='h.1.mlp' measures that part alone\), and one value of the input 'attention_mask' for all samples: "
        "measure those that share it, .* has 7 of 12 samples, sample 5 and"
    )
    with pytest.raises(ValueError, match=message):
        lmnfast.cut(model, "h.1.mlp", batch, output=output)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int32, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
)
def test_masks_of_every_dtype_are_grouped(dtype):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4)
    mask = torch.ones(6, 3)
    mask[2:, 0] = 0
    with pytest.raises(ValueError, match="largest such group has 4 of 6 samples, sample 2 and those equal"):
        lmnfast.cut(
            model, "0", (x, mask.to(dtype)), forward=lambda m, i: m(i[0]) * i[1].to(torch.complex64).real
        )


def test_a_mask_of_another_length_is_named():
    model, x = Encoder(), tokens(6, 5)
    shapes = {
        (6, 4): r"shape\[1\] to be 5, but got 4",
        (1, 5): r"shape\[0\] to be 6, but got 1",
        (7, 5): "but got 7",
    }
    for shape, said in shapes.items():
        rows, length = shape
        message = (
            rf"inputs: the input 'padded' has shape \({rows}, {length}\), but the input 'tokens' has \(6, 5\); "
            rf"expected \(6, 5\), an entry for each position; the model fails on them \(AssertionError: .*{said}"
        )
        with pytest.raises(ValueError, match=message):
            lmnfast.cut(model, "encoder.layers.0", (x, torch.zeros(shape, dtype=torch.bool)))
    scaled = {"x": torch.randn(6, 4), "mask": torch.ones(1, 4)}  # that is no error of the mask
    with pytest.raises(ValueError, match="^output: no 'logits' in what the model returns"):
        lmnfast.cut(
            nn.Sequential(nn.Linear(4, 3)),
            "0",
            scaled,
            forward=lambda m, i: m(i["x"] * i["mask"]),
            output="logits",
        )
