"""The functions that notebook 06 defines: against modules put in each other's place, differences, NumPy and SciPy."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from models import IDS, tiny_llama
from notebook_functions import NOTEBOOKS, functions_of
from torch import nn

from libragrad_minimal import libra_grad

CLEAN, CORRUPT = {"input_ids": IDS[:1, :5]}, {"input_ids": torch.cat([IDS[:1, :2], IDS[1:, 2:3], IDS[:1, 3:5]], 1)}


@pytest.fixture
def notebook():
    """Its functions, with a small Llama in the demo model's place."""
    lifted, model = functions_of(NOTEBOOKS / "06_from_tokens_to_circuits.ipynb", words=[""] * 5), tiny_llama()
    lifted.llama = SimpleNamespace(model=model, blocks=list(model.model.layers))
    lifted.clean, lifted.corrupt = CLEAN, CORRUPT
    lifted.blue, lifted.green = 3, 4
    return lifted


class Instead(nn.Module):
    """The layer, whose output at one position is another one."""

    def __init__(self, layer: nn.Module, position: int, value: torch.Tensor):
        super().__init__()
        self.layer, self.position, self.value = layer, position, value

    def forward(self, x):
        before, after = self.layer(x).split([self.position, x.shape[1] - self.position], 1)
        return torch.cat([before, self.value[:, None], after[:, 1:]], 1)


def difference_of_logits(model, prompt) -> float:
    return (model(**prompt).logits[0, -1, 3] - model(**prompt).logits[0, -1, 4]).item()


def inputs_of_down_projections(model, prompt) -> list[torch.Tensor]:
    """By the layers' own inputs, h + attention, written out."""
    states = model(**prompt, output_hidden_states=True).hidden_states
    found = []
    for block, h in zip(model.model.layers, states, strict=False):
        cosine_and_sine = model.model.rotary_emb(h, torch.arange(h.shape[1])[None])
        h = h + block.self_attn(block.input_layernorm(h), cosine_and_sine, None)[0]
        x = block.post_attention_layernorm(h)
        found.append(block.mlp.act_fn(block.mlp.gate_proj(x)) * block.mlp.up_proj(x))
    return found


@torch.no_grad()
def test_patching_is_another_module_in_its_place(notebook):
    model, before = notebook.llama.model, difference_of_logits(notebook.llama.model, CLEAN)
    modules = [block.mlp.down_proj for block in notebook.llama.blocks]
    effect, others = notebook.patch_by_hand(modules), inputs_of_down_projections(model, CORRUPT)
    for layer, (block, own, x) in enumerate(zip(notebook.llama.blocks, modules, others, strict=True)):
        for position in range(5):
            block.mlp.down_proj = Instead(own, position, own(x)[:, position])
            assert effect[layer, position].item() == pytest.approx(
                difference_of_logits(model, CLEAN) - before, abs=1e-5
            )
        block.mlp.down_proj = own
    assert (
        effect.abs().max() > 1e-3 and not effect[:, :2].any()
    )  # the prompts begin alike, and each token sees no later one
    assert not any(module._forward_hooks for module in modules)


def test_gradient_times_difference_by_hand(notebook):
    assert notebook.gradient_times_difference(lambda a: 3 * a, 2.0, 5.0) == 9
    assert notebook.gradient_times_difference(lambda a: a**2, 2.0, 5.0) == 4 * 3


def test_the_estimate_is_the_slope_of_a_small_step(notebook):
    modules = [block.self_attn.o_proj for block in notebook.llama.blocks]
    own, others = (notebook.returned_by(modules, prompt) for prompt in (CLEAN, CORRUPT))
    estimate, step = notebook.estimate_by_hand(modules), 0.02
    for layer in range(2):
        for position in range(5):
            a, b = own[layer][:, position].detach(), others[layer][:, position].detach()
            there, back = (notebook.patched(modules[layer], position, a + t * (b - a)) for t in (step, -step))
            assert estimate[layer, position].item() == pytest.approx((there - back) / (2 * step), rel=0.02, abs=2e-4)
    balanced = notebook.estimate_by_hand(modules, libra_grad)
    assert (balanced - estimate).abs().max() > 1e-4


def test_correlation_is_numpys(notebook):
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert notebook.correlation(a, b) == pytest.approx(np.corrcoef(a.flatten(), b.flatten())[0, 1], abs=1e-6)


def test_taking_a_square_away_by_hand(notebook):
    """a^2 at 2 loses 4; its slope there is 4, so a plain estimate is 4 (0 - 2), a balanced one half of it."""
    at = torch.tensor([2.0])
    assert notebook.taken_away(lambda a: a * a, at, torch.autograd.grad) == -8
    assert notebook.taken_away(lambda a: a * a, at, libra_grad) == -4


def test_sets_of_parts_come_in_their_own_shapes(notebook):
    notebook.SHAPES, notebook.truth = {"heads": (2, 5, 4), "mlp": (2, 5)}, torch.zeros(50)
    order = torch.randperm(50)
    sets = torch.stack([notebook.marked(order, count) for count in (0, 7, 50)])
    assert [set(one.nonzero().flatten().tolist()) for one in sets] == [set(), set(order[:7].tolist()), set(range(50))]
    masks = notebook.as_masks(sets)
    assert masks["heads"].shape == (3, 2, 5, 4) and masks["mlp"].shape == (3, 2, 5)
    for number in range(3):
        assert torch.equal(notebook.flat({site: mask[number] for site, mask in masks.items()}), sets[number])


def test_measured_correlations_are_pearsons_where_something_differs(notebook):
    rng = np.random.default_rng(0)
    notebook.ASKED, notebook.MEASURED, expected = [{"task": "a"}, {"task": "b"}, {"task": "a"}], {}, []
    for number in (0, 1, 2):
        true, estimate = rng.normal(size=(2, 12))
        notebook.MEASURED |= {
            f"{number} | mlp | true": np.concatenate([true, np.zeros(5)]),
            f"{number} | mlp | plain": np.concatenate([estimate, np.zeros(5)]),
        }
        expected.append(scipy.stats.pearsonr(true, estimate).statistic)
    np.testing.assert_allclose(notebook.measured("mlp", "plain"), expected)
    np.testing.assert_allclose(notebook.measured("mlp", "plain", "a"), [expected[0], expected[2]])


def test_a_cell_is_a_mean_and_its_standard_error(notebook):
    values = np.array([0.1, 0.5, 0.9, 0.7])
    assert notebook.cell(values) == f"{0.55:.2f} ± {scipy.stats.sem(values):.2f}"


def test_what_one_of_two_and_both_do(notebook):
    assert notebook.taken(1.0, 1.0, lambda a, b: min(a + b, 1.0)) == [0, 0, -1]
    assert notebook.taken(1.0, 1.0, lambda a, b: a * b) == [-1, -1, -1]
