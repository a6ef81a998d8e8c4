"""The functions written out in notebook 03: against hand-derived gradients, libra_grad, and a real ViT."""

from functools import partial

import pytest
import torch
from notebook_functions import NOTEBOOKS, functions_of
from timm.models import VisionTransformer
from torch import nn

from libragrad_minimal import LIBRA, libra_grad
from libragrad_minimal.models import LoadedModel, load_pretrained
from libragrad_minimal.photographs import photograph

RULES = ("norm", "activation", "attention")


@pytest.fixture(scope="module")
def notebook():
    return functions_of(NOTEBOOKS / "03_vit_class_discrimination.ipynb")


def random_vit(**options) -> LoadedModel:
    """A small ViT in which no bias or norm is trivial; fp64, so that equality means equality."""
    torch.manual_seed(1)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**{**sizes, **options}).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return LoadedModel(
        "vit",
        "random",
        model,
        list(model.blocks),
        prefix_tokens=model.num_prefix_tokens,
        grid=model.patch_embed.grid_size,
    )


def recording_all(notebook, vit):
    return notebook.recording(vit.blocks, list(vit.model.modules()), notebook.bias_of)


IMAGES = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
TARGETS = torch.tensor([0, 1, 2, 4])


def gradient_through_hook(hook, layer, x, direction):
    y = hook(layer, (x,), layer(x))
    assert torch.equal(y, layer(x)), "the forward value stays, bit for bit"
    return torch.autograd.grad(y, x, direction)[0]


def test_balanced_norm_against_the_derivative_by_hand(notebook):
    """With std constant, dy_i/dx_j = w_i (delta_ij - 1/C) / std."""
    layer = nn.LayerNorm(6, eps=1e-3).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    std = (x.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    weighted = direction * layer.weight
    by_hand = (weighted - weighted.mean(-1, keepdim=True)) / std
    torch.testing.assert_close(gradient_through_hook(notebook.balanced_norm, layer, x, direction), by_hand)


def test_balanced_gelu_slope_is_output_over_input(notebook):
    x = torch.tensor([-30.0, -3.0, -0.5, -1e-8, 0.0, 1e-8, 0.5, 3.0, 30.0], dtype=torch.float64, requires_grad=True)
    slope = gradient_through_hook(notebook.balanced_gelu, nn.GELU(), x, torch.ones_like(x))
    expected = torch.where(x == 0, 0.5, nn.functional.gelu(x) / x)
    torch.testing.assert_close(slope, expected.detach())


def test_libra_product_gives_each_factor_half(notebook):
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = notebook.libra_product(a, b)
    assert torch.equal(y, a * b)
    for gradient, other in zip(torch.autograd.grad(y.sum(), (a, b)), (b, a), strict=True):
        torch.testing.assert_close(gradient, other.detach() / 2)


@pytest.mark.parametrize(
    "options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}, {"pre_norm": True}]
)
def test_complete_at_every_block_and_equal_to_libra_grad(notebook, options):
    vit = random_vit(**options)
    repaired, expected = notebook.count_repairs(vit.model)
    assert repaired == expected
    before = vit.model(IMAGES)
    with notebook.libra(notebook.repairs_of_vit(vit.model)):
        by_hooks = notebook.explain_classes(vit, IMAGES, TARGETS)
        assert torch.equal(vit.model(IMAGES), before)
    by_graph = notebook.explain_classes(vit, IMAGES, TARGETS, gradient=libra_grad)
    for ours, theirs in zip(by_hooks, by_graph, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_hooks.output, before.gather(1, TARGETS[:, None])[:, 0].detach())
    for block in range(len(vit.blocks)):
        torch.testing.assert_close(notebook.total(by_hooks, block), by_hooks.output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_matters_and_matches_libra_grad_without_it(notebook, rule):
    vit = random_vit()
    with notebook.libra(notebook.repairs_of_vit(vit.model), without=rule):
        bill = notebook.explain_classes(vit, IMAGES, TARGETS)
    assert (notebook.total(bill) - bill.output).abs().min() > 1e-3, "without this rule the bill is wrong"

    gradient = partial(libra_grad, rules=LIBRA.without(rule))
    for ours, theirs in zip(bill, notebook.explain_classes(vit, IMAGES, TARGETS, gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_layer_that_isnt_repaired_is_counted(notebook):
    repaired, expected = notebook.count_repairs(random_vit(act_layer=nn.SiLU).model)
    assert repaired["activation"] == 0 and expected["activation"] == 3


def test_nothing_stays_behind(notebook):
    vit = random_vit()

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vit.model.modules())

    with notebook.libra(notebook.repairs_of_vit(vit.model)), recording_all(notebook, vit):
        assert hooks() > 0
    assert hooks() == 0
    with (
        pytest.raises(KeyboardInterrupt),
        notebook.libra(notebook.repairs_of_vit(vit.model)),
        recording_all(notebook, vit),
    ):
        raise KeyboardInterrupt
    assert hooks() == 0


def test_samples_do_not_mix(notebook):
    vit = random_vit()
    with notebook.libra(notebook.repairs_of_vit(vit.model)):
        together, alone = (
            notebook.explain_classes(vit, IMAGES, TARGETS),
            notebook.explain_classes(vit, IMAGES[2:3], TARGETS[2:3]),
        )
    torch.testing.assert_close(together.inputs[:, 2:3], alone.inputs)
    torch.testing.assert_close(together.constants[:, 2:3], alone.constants)


def test_fullgrad_plus_by_hand_with_prefix_tokens_left_out(notebook):
    vit = random_vit(img_size=8)  # 2 x 2 patches and a class token
    inputs = torch.arange(30.0).view(3, 2, 5)
    biases = torch.full((3, 2, 5), 100.0)
    bill = notebook.Bill(torch.zeros(2), inputs, biases, torch.zeros(2))
    # block l holds 10 l + 5 question + token: tokens 1..4 summed over three blocks, plus three biases of 100
    expected = torch.tensor([[[333.0, 336], [339, 342]], [[348, 351], [354, 357]]])
    assert torch.equal(notebook.fullgrad_plus(bill, vit), expected)
    assert torch.equal(notebook.input_x_gradient(bill, vit), torch.tensor([[[1.0, 2], [3, 4]], [[6, 7], [8, 9]]]))


def test_measures_of_a_perfect_and_of_a_mistaken_map(notebook):
    first, second = torch.zeros(2, 2), torch.zeros(2, 2)
    first[0, 0], second[1, 1] = 1, 1
    masks = torch.stack([first, second]).bool()
    perfect, mistaken = (notebook.measure(torch.stack(maps), masks) for maps in ([first, second], [second, first]))
    assert all((values == 1).all() for values in perfect.values())
    assert all((mistaken[name] == 0).all() for name in ("pointing", "inside", "right one"))


def test_a_real_vit_on_a_real_photograph(notebook, shared):
    """Plain gradients are off by logits; the Libra bill equals the logit at every block."""
    vit = load_pretrained("vit", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    images = torch.stack([vit.transform(photograph(name)) for name in ("cat", "coffee", "motorcycle")])
    targets = vit.model(images).argmax(1)
    plain = notebook.explain_classes(vit, images, targets)
    with notebook.libra(notebook.repairs_of_vit(vit.model)):
        balanced = notebook.explain_classes(vit, images, targets)
    assert (notebook.total(plain) - plain.output).abs().min() > 1
    for block in range(12):
        torch.testing.assert_close(notebook.total(balanced, block), balanced.output, rtol=1e-4, atol=0)
    for ours, theirs in zip(balanced, notebook.explain_classes(vit, images, targets, libra_grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * ours.abs().max().item())
