"""The functions that notebook 02 defines: against derivatives by hand, a loop, and libra_grad."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from models import perturbed, tiny_clip
from notebook_functions import NOTEBOOKS, functions_of
from open_clip.transformer import QuickGELU
from torch import nn

from libragrad_minimal import libra_grad

NOTEBOOK = NOTEBOOKS / "02_clip_text_prompted_regions.ipynb"


needs_notebook = pytest.mark.skipif(not NOTEBOOK.exists(), reason="the notebook is absent")


@pytest.fixture(scope="module")
def notebook():
    module = functions_of(NOTEBOOK)
    module.REPAIRS = {
        nn.LayerNorm: ("norm", module.balanced_norm),
        nn.GELU: ("activation", module.balanced_gelu),
        QuickGELU: ("activation", module.balanced_quick_gelu),
        nn.MultiheadAttention: ("attention", module.balanced_attention),
    }
    return module


@needs_notebook
def test_unit_length_against_its_gradient_by_hand(notebook):
    e, t = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    f = notebook.balanced_unit(e) @ t
    assert torch.equal(f, F.normalize(e, dim=-1) @ t)
    (gradient,) = torch.autograd.grad(f.sum(), e)
    torch.testing.assert_close(gradient, t / e.detach().norm(dim=-1, keepdim=True))


@needs_notebook
@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.GELU(), QuickGELU()], ids=lambda layer: type(layer).__name__)
def test_repairs_of_layers_against_libra_grad(notebook, layer):
    _, hook = next(value for kind, value in notebook.REPAIRS.items() if isinstance(layer, kind))
    layer = perturbed(layer.double())
    x, weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
    ours = hook(layer, (x,), layer(x))
    assert torch.equal(ours, layer(x))
    (expected,) = libra_grad((layer(x) * weight).sum(), x)
    torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), x)[0], expected)


@needs_notebook
@pytest.mark.parametrize("masked", [False, True])
def test_repair_of_attention_against_a_loop(notebook, masked):
    layer = perturbed(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1) if masked else None
    output = layer(x, x, x, need_weights=False, attn_mask=mask)
    ours, _ = notebook.balanced_attention(layer, (x, x, x), {"attn_mask": mask}, output)
    assert torch.equal(ours, output[0])

    maps = layer(x, x, x, attn_mask=mask, average_attn_weights=False)[1].detach()
    weight = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = torch.zeros_like(x)
    values, out = layer.in_proj_weight.chunk(3)[2].detach(), layer.out_proj.weight.detach()
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        through = out[:, rows] @ values[rows]  # (8, 8): from a token, through this head, to the output
        for b in range(2):
            for query in range(5):
                for key in range(5):
                    expected[b, key] += maps[b, head, query, key] * through.T @ weight[b, query]
    torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), x)[0], expected)


@needs_notebook
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_notebooks_bills_add_up_and_equal_libra_grad(notebook, quick_gelu):
    model = tiny_clip(quick_gelu=quick_gelu)
    vision, text = list(model.visual.modules()), [*model.transformer.modules(), model.ln_final]
    towers = {
        "picture": (
            notebook.Tower(model.encode_image, list(model.visual.transformer.resblocks), vision),
            torch.randn(2, 3, 32, 32),
        ),
        "words": (
            notebook.Tower(model.encode_text, list(model.transformer.resblocks), text),
            open_clip.tokenize(["a b", "c"], 8),
        ),
    }
    directions = 10 * F.normalize(torch.randn(3, 24), dim=-1)
    for tower, inputs in towers.values():
        with notebook.libra(notebook.repairs_of_tower(tower)):
            bill = notebook.explain_similarity(tower, inputs, directions, notebook.balanced_unit)
        for block in range(2):
            torch.testing.assert_close(notebook.total(bill, block), bill.output, rtol=1e-4, atol=1e-4)
        one_line = notebook.explain_similarity(tower, inputs, directions, gradient=libra_grad)
        for ours, theirs in zip(bill, one_line, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(notebook.word_scores(bill).sum(-1), bill.output, rtol=1e-4, atol=1e-4)
        plain = notebook.explain_similarity(tower, inputs, directions)
        assert (notebook.total(plain) - plain.output).abs().max() > 0.1  # the hooks are off again


@needs_notebook
def test_contrast_leaves_nothing_of_what_all_share(notebook):
    own = torch.randn(4, 3, 3)
    assert torch.allclose(notebook.contrast(own + 5), notebook.contrast(own), atol=1e-5)
    others = own[[1, 2, 3]].mean(0)
    torch.testing.assert_close(notebook.contrast(own)[0], own[0] - others)


@needs_notebook
def test_a_product_of_two_streams_gives_half_to_each(notebook):
    a, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    f = notebook.libra_product(a, b).sum()
    for ours, other in zip(torch.autograd.grad(f, (a, b)), (b, a), strict=True):
        torch.testing.assert_close(ours, other.detach() / 2)
