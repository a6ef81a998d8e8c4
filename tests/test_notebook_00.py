"""The functions that notebook 00 defines, against gradients derived by hand (NumPy and plain Python, no autograd)."""

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from notebook_functions import NOTEBOOKS, functions_of

NAMES = ("query", "key", "value", "out", "gate", "up", "down")


@pytest.fixture(scope="module")
def notebook():
    return functions_of(NOTEBOOKS / "00_balanced_gradients.ipynb")


@pytest.fixture(autouse=True)
def fp64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def operations(notebook):
    plain = {"norm": notebook.layer_norm, "attention": notebook.attention, "activation": F.silu, "product": torch.mul}
    libra = {
        "norm": notebook.libra_norm,
        "attention": notebook.libra_attention,
        "activation": notebook.libra_silu,
        "product": notebook.libra_product,
    }
    return plain, libra


def gradients_of(function, *inputs, weights=None):
    """Gradient of the (weighted) sum of function(*inputs), zeros where nothing flows."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    return torch.autograd.grad(
        output, inputs, weights if weights is not None else torch.ones_like(output), materialize_grads=True
    )


# --- the measuring tools ---


def test_accounted_for_is_a_sum_over_finite_differences(notebook):
    x, bias = torch.randn(3, 2, requires_grad=True), torch.randn(3, 1, requires_grad=True)

    def function(x, bias):
        return (x.sin() * x[:, :1] + bias.exp()).sum(1)

    h = 1e-6
    expected = bias[:, 0] * (function(x, bias + h) - function(x, bias - h)) / (2 * h)
    for i in range(2):
        step = torch.zeros(2).index_fill(0, torch.tensor(i), h)
        expected = expected + x[:, i] * (function(x + step, bias) - function(x - step, bias)) / (2 * h)
    torch.testing.assert_close(
        notebook.accounted_for(function(x, bias), x, bias), expected.detach(), rtol=1e-7, atol=1e-8
    )


def test_complete_draws_counts_only_the_complete_ones(notebook):
    x = torch.tensor([[1.0], [2.0], [0.0], [-3.0]], requires_grad=True)
    half_right = torch.where(x > 0, 5 * x, x.square())[:, 0]  # degree 1 where x > 0; 0 is complete; (-3)^2 isn't
    assert notebook.complete_draws(half_right, x) == 3


def test_check_repair_sees_a_changed_value_and_an_incomplete_gradient(notebook):
    assert notebook.check_repair(torch.square, lambda x: 2 * x, notebook.random_draws(3)) == (False, 0, 1000)
    assert notebook.check_repair(F.relu, torch.square, notebook.random_draws(3)) == (False, 1000, 0)


def test_contributions_are_input_times_slope(notebook):
    x, y = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor(5.0, requires_grad=True)
    assert notebook.each_contribution(x[0] ** 3 + x[1] * y.detach(), x, y) == [24, 15, 0]


# --- the repairs: value to the last bit, gradient as derived by hand ---


def test_swap_backward_keeps_the_first_value_even_when_the_other_is_huge(notebook):
    x = torch.tensor([0.1, -1e-300, 3.0])
    assert torch.equal(notebook.swap_backward(x, 1e200 * x), x)
    (gradient,) = gradients_of(lambda x: notebook.swap_backward(x.exp(), 7 * x), x)
    assert gradient.tolist() == [7, 7, 7]


def test_activations_have_their_gate_as_slope(notebook):
    x = torch.tensor([-9.0, -1.5, -1e-9, 0.0, 0.3, 2.0, 40.0])
    normal_distribution = [(1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()]
    logistic = [1 / (1 + math.exp(-v)) for v in x.tolist()]
    for repaired, plain, slope in (
        (notebook.libra_gelu, F.gelu, normal_distribution),
        (notebook.libra_silu, F.silu, logistic),
    ):
        assert torch.equal(repaired(x), plain(x))
        torch.testing.assert_close(gradients_of(repaired, x)[0], torch.tensor(slope), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(notebook.slope_of(repaired, x), torch.tensor(slope), rtol=1e-12, atol=1e-15)


def test_norm_passes_the_centred_gradient_over_the_deviation(notebook):
    x, weights = torch.randn(4, 5), torch.randn(4, 5)
    deviation = numpy.sqrt(x.numpy().var(1, keepdims=True) + 1e-5)
    expected = (weights.numpy() - weights.numpy().mean(1, keepdims=True)) / deviation
    assert torch.equal(notebook.libra_norm(x), notebook.layer_norm(x))
    gradient = gradients_of(notebook.libra_norm, x, weights=weights)[0]
    numpy.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14)


def test_attention_sends_its_map_back_to_the_values_only(notebook):
    q, k, v, weights = (torch.randn(3, 4) for _ in range(4))
    attention_map = hand_attention_map(q.numpy(), k.numpy())
    assert torch.equal(notebook.libra_attention(q, k, v), notebook.attention(q, k, v))
    to_q, to_k, to_v = gradients_of(notebook.libra_attention, q, k, v, weights=weights)
    assert to_q.abs().sum() == to_k.abs().sum() == 0
    numpy.testing.assert_allclose(to_v, attention_map.T @ weights.numpy(), rtol=1e-12, atol=1e-14)


def hand_attention_map(q, k):
    scores = numpy.exp(q @ k.T / math.sqrt(q.shape[1]))
    return scores / scores.sum(1, keepdims=True)


def test_product_halves_each_branch_and_split_product_shares_out(notebook):
    g, h, a = torch.tensor([2.0, -1.0]), torch.tensor([3.0, 0.5]), torch.tensor([0.9, -2.0])
    assert torch.equal(notebook.libra_product(g, h), g * h)
    assert [gradient.tolist() for gradient in gradients_of(notebook.libra_product, g, h)] == [[1.5, 0.25], [1, -0.5]]
    to_g, to_h = gradients_of(lambda g, h: notebook.split_product(g, h, a), g, h)
    torch.testing.assert_close(to_g, torch.tensor([0.9 * 3, -2 * 0.5]))
    torch.testing.assert_close(to_h, torch.tensor([0.1 * 2, 3 * -1.0]))


# --- the toy Transformer ---


def hand_norm_backward(x, gradient):
    centred = gradient - gradient.mean(1, keepdims=True)
    return centred / numpy.sqrt(x.var(1, keepdims=True) + 1e-5)


def hand_norm(x):
    return (x - x.mean(1, keepdims=True)) / numpy.sqrt(x.var(1, keepdims=True) + 1e-5)


def hand_libra_gradient(x, block, readout):
    """Output and Libra gradient of a one-block network for one draw, layer by layer in NumPy."""
    y = hand_norm(x)
    q, k, v = (y @ block[name][0] + block[name][1] for name in NAMES[:3])
    attention_map = hand_attention_map(q, k)
    middle = x + (attention_map @ v) @ block["out"][0] + block["out"][1]
    z = hand_norm(middle)
    before_gate, up = (z @ block[name][0] + block[name][1] for name in ("gate", "up"))
    sigmoid = 1 / (1 + numpy.exp(-before_gate))
    last = middle + (before_gate * sigmoid * up) @ block["down"][0] + block["down"][1]
    output = hand_norm(last)[0] @ readout

    at_norm = numpy.zeros_like(x)
    at_norm[0] = readout
    at_last = hand_norm_backward(last, at_norm)
    at_product = at_last @ block["down"][0].T
    at_gate = at_product * up / 2 * sigmoid
    at_up = at_product * before_gate * sigmoid / 2
    at_z = at_gate @ block["gate"][0].T + at_up @ block["up"][0].T
    at_middle = at_last + hand_norm_backward(middle, at_z)
    at_v = attention_map.T @ (at_middle @ block["out"][0].T)
    return output, at_middle + hand_norm_backward(x, at_v @ block["value"][0].T)


def test_one_block_agrees_with_numpy_layer_by_layer(notebook, operations):
    x, blocks, readout = notebook.random_network(depth=1, draws=3, tokens=4, width=6)
    f = notebook.forward(x, blocks, readout, operations[1])
    (gradient,) = torch.autograd.grad(f.sum(), x)
    for draw in range(3):
        block = {name: [part[draw].detach().numpy() for part in layer] for name, layer in blocks[0].items()}
        output, expected = hand_libra_gradient(x[draw].detach().numpy(), block, readout[draw].numpy())
        assert f[draw].item() == pytest.approx(output, rel=1e-11)
        numpy.testing.assert_allclose(gradient[draw], expected, rtol=1e-10, atol=1e-12)


def test_stack_is_complete_with_all_four_rules_and_with_no_three(notebook, operations):
    plain, libra = operations
    network = notebook.random_network(depth=3, draws=50)
    assert torch.equal(*(notebook.forward(*network, rules) for rules in operations))
    assert notebook.mean_relative_error(network, libra) < 1e-12
    for name in plain:
        assert notebook.mean_relative_error(network, {**libra, name: plain[name]}) > 0.01


# --- the other attributions ---


def test_integrated_gradients_is_the_midpoint_sum(notebook):
    x = torch.tensor([2.0, -1.0])
    found = notebook.integrated_gradients(lambda x: x[:, 0] ** 3 * x[:, 1], x, steps=3)
    midpoints = [1 / 6, 3 / 6, 5 / 6]
    cubes = sum(a**3 for a in midpoints) / 3
    assert found.tolist() == pytest.approx([2 * 3 * 4 * -1 * cubes, -1 * 8 * cubes], rel=1e-12)


def test_second_output_and_its_integral_by_hand(notebook):
    x = torch.tensor([1.0, 3.0])
    assert notebook.second_output(x, eps=0.5).item() == pytest.approx(1 / math.sqrt(1.5))
    midpoints = (numpy.arange(50) + 0.5) / 50  # d/da of a / sqrt(a^2 + eps) is eps / (a^2 + eps)^1.5
    expected = numpy.mean(1e-5 / (midpoints**2 + 1e-5) ** 1.5)
    assert notebook.integrated_gradients(notebook.second_output, x).sum().item() == pytest.approx(expected, rel=1e-9)


def test_deletion_curve_takes_the_highest_scores_first_and_spares_its_input(notebook):
    x = torch.tensor([1.0, 2.0, 4.0])
    assert notebook.deletion_curve(torch.sum, x, torch.tensor([0.0, 5.0, -1.0])) == [7, 5, 4, 0]
    assert notebook.deletion_curve(torch.sum, x, torch.zeros(3)) == [7, 6, 4, 0]  # ties: from the left
    assert x.tolist() == [1, 2, 4]
