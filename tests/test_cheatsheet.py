"""The cheat sheet's lines of code do what it says: the layer's own value, and a bill that adds up."""

import re

import pytest
import torch
import torch.nn.functional as F
from notebook_functions import NOTEBOOKS, functions_of
from torch import nn

SHEET = (NOTEBOOKS / "CHEATSHEET.md").read_text(encoding="utf-8")
LINES = dict(re.findall(r"^\| ([^|]+?) \|[^|]+\| `([^|]+)` \|$", SHEET, re.MULTILINE))
LAYERS = {
    "LayerNorm": lambda n: F.layer_norm(n["x"], (6,), n["weight"], n["bias"], n["eps"]),
    "RMSNorm": lambda n: F.rms_norm(n["x"], (6,), n["weight"], n["eps"]),
    "length (CLIP's embedding)": lambda n: F.normalize(n["x"], dim=-1),
    "GELU (erf)": lambda n: F.gelu(n["x"]),
    "GELU (tanh)": lambda n: F.gelu(n["x"], approximate="tanh"),
    "quick-GELU": lambda n: n["x"] / (1 + (-1.702 * n["x"]).exp()),
    "SiLU": lambda n: F.silu(n["x"]),
    "tanh of a stream": lambda n: n["x"].tanh(),
    "attention, its map at hand": lambda n: F.scaled_dot_product_attention(n["q"], n["k"], n["v"]),
    "attention, fused": lambda n: (n["q"] @ n["k"].mT / 6**0.5).softmax(-1) @ n["v"],
    "attention, causal, grouped queries": lambda n: F.scaled_dot_product_attention(
        n["q"], n["few_k"].repeat_interleave(2, 1), n["few_v"].repeat_interleave(2, 1), is_causal=True
    ),
    "product of two streams": lambda n: n["g"] * n["h"],
}
STREAMS = {"attention, causal, grouped queries": ["few_v"], "product of two streams": ["g", "h"]}
SHAPES = {"x": (3, 6), "weight": (6,), "bias": (6,), "g": (3, 6), "h": (3, 6)}
SHAPES |= {"q": (2, 4, 5, 6), "k": (2, 4, 5, 6), "v": (2, 4, 5, 6), "few_k": (2, 2, 5, 6), "few_v": (2, 2, 5, 6)}


def test_every_line_has_a_layer_to_check_it():
    assert LINES.keys() == LAYERS.keys()


@pytest.mark.parametrize("layer", LAYERS)
def test_line(layer):
    generator = torch.Generator().manual_seed(0)
    names = {n: torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for n, s in SHAPES.items()}
    names["eps"] = 0.1  # large enough to be seen if it is forgotten
    y = LAYERS[layer](names)
    swap = functions_of(NOTEBOOKS / "00_balanced_gradients.ipynb").swap_backward
    repaired = eval(LINES[layer], {"torch": torch, "F": F, "swap_backward": swap, "y": y, **names})  # noqa: S307 our own
    torch.testing.assert_close(repaired, y)

    read_out = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    streams = STREAMS.get(layer, ["v"] if "attention" in layer else ["x"])
    parts = [names[name] for name in (*streams, "bias")]

    def bill(output):
        gradients = torch.autograd.grad((output * read_out).sum(), parts, retain_graph=True, materialize_grads=True)
        return sum((part * gradient).sum() for part, gradient in zip(parts, gradients, strict=True))

    torch.testing.assert_close(bill(repaired), (y * read_out).sum())
    if "attention" not in layer:  # whose plain gradient is right where only the values are asked
        assert (bill(y) - (y * read_out).sum()).abs() > 1e-3, "a layer that needs no repair would pass unnoticed"


def test_a_bias_is_an_item_of_each_token():
    linear, tokens = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    output = linear(tokens)
    f = output.square().sum()
    gradient, whole = torch.autograd.grad(f, (output, linear.bias))
    torch.testing.assert_close((linear.bias * gradient).sum(-1).sum(), (linear.bias * whole).sum())
