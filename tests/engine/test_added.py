"""Additive constants: with them the sum is the output, whatever the branch that a constant comes through."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from completeness import assert_complete
from torch import nn

from libragrad_minimal import additive_constants, audit, libra_grad


def parameter(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator))


P, Q, W, B = parameter(6, 6, seed=1), parameter(6, 6, seed=2), parameter(6, seed=3), parameter(6, seed=4)
ADDED = {  # function, and the parameters that are added
    "bias": (lambda x: x @ P + B, [B]),
    "product of two matrices": (lambda x: x + P @ Q, [P]),
    "fused product of two matrices": (lambda x: torch.addmm(x, P, Q), [P]),
    "fused product of two vectors": (lambda x: torch.addcmul(x, W, B), [W]),
    "a number times a parameter": (lambda x: x + torch.ops.aten.mul.Scalar(W, 2.0), [W]),
    "gate times a parameter": (lambda x: x + torch.sigmoid(W) * B, [B]),
    "parameter times a gate": (lambda x: x + B * torch.sigmoid(W), [B]),
    "attention of constants": (lambda x: x + (P @ Q).softmax(-1) @ W, [W]),
    "fused attention of constants": (lambda x: x + F.scaled_dot_product_attention(P[None], P[None], Q[None])[0], [Q]),
    "norm of a constant": (lambda x: x + F.layer_norm(P, (6,), W, B), [P, B]),
    "through GELU": (lambda x: F.gelu(x + B), [B]),
    "norm's weight": (lambda x: F.layer_norm(x, (6,), W, B), [B]),
    "a constant over a parameter": (lambda x: x + B / W, [B]),
    "bounds": (lambda x: torch.clamp(x, -W.abs(), W.abs()), []),
}


@pytest.mark.parametrize("name", ADDED)
def test_finds_what_is_added_and_nothing_else(name):
    function, expected = ADDED[name]
    x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    found = assert_complete(function(x).sum(1), x)
    assert {id(constant) for constant in found} == {id(constant) for constant in expected}


def test_attention_among_constants_of_an_encoder_decoder():
    """The first attention of BART's decoder looks at the decoder's own tokens only: all of it is a constant here."""
    config = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=40, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration._from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.2 * torch.randn_like(weights))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    read = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    output = model(inputs_embeds=read, decoder_input_ids=torch.randint(4, 40, (1, 4))).logits[:, -1, 3]
    assert_complete(output, read)


def test_tied_weights_are_announced():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    tied = ((x + P[0]) @ P.T)[:, 1]
    with pytest.warns(UserWarning, match="tied weights"):
        assert_complete(tied, x)


def test_constants_without_a_gradient_are_listed_in_the_audit():
    norm = nn.BatchNorm1d(6).double().eval()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert "adds a constant without a gradient" in str(audit((norm(x) + 1).sum(1), x))
    assert "adds a constant" not in str(audit((x @ P + B).sum(1), x))


def test_additive_constants_of_a_freed_graph(model, x):
    output = model(x)[:, 0]
    libra_grad(output, x)
    parts = (x, *additive_constants(output, x))  # what is added is known without what was saved
    with pytest.raises(RuntimeError, match="has been freed.*retain_graph=True"):
        libra_grad(output, parts)
