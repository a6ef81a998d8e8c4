"""What notebook 04 writes out: against derivatives by hand, brute force, and the engine on models of all kinds."""

import ast
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import IDS, PICTURES, TEXT, VISION, perturbed
from notebook_functions import NOTEBOOKS, functions_of
from torch import nn
from torch.autograd.graph import get_gradient_edge

import libragrad_minimal
from libragrad_minimal.models import load_demo

PATH = NOTEBOOKS / "04_every_architecture.ipynb"
TABLES = {"GATES", "LINEAR", "PRODUCTS", "ONE_STREAM", "SLOPES", "NORMS"}


@pytest.fixture
def notebook():
    """Its functions, with the tables that they read."""
    module = functions_of(PATH)
    for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and any(f"{table} = " in source for table in TABLES):
            tables = [statement for statement in ast.parse(source).body if written(statement) in TABLES]
            exec(compile(ast.Module(tables, type_ignores=[]), str(PATH), "exec"), module.__dict__)
    return module


def written(statement: ast.stmt) -> str:
    """The name that a statement assigns to."""
    target = getattr(statement, "target", None) or getattr(statement, "targets", [None])[0]
    return getattr(target, "id", "")


def live(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# --- the walk ---


def test_walk_is_the_whole_graph_and_in_order(notebook):
    x = live(3)
    h = x.exp() * x
    y = (h + x.sin() + h.cos()).sum()
    nodes = notebook.walk(y.grad_fn)

    def below(node):
        children = [child for child, _ in node.next_functions if child is not None]
        return {node}.union(*map(below, children))

    assert len(nodes) == len(set(nodes)) and set(nodes) == below(y.grad_fn)
    for i, node in enumerate(nodes):
        assert all(nodes.index(child) < i for child, _ in node.next_functions if child is not None)


def test_walk_reaches_the_bottom_of_a_deep_graph(notebook):
    y = x = live(1)
    for _ in range(5000):
        y = y + x
    assert len(notebook.walk(y.grad_fn)) == 5001


def test_kinds_of_a_product_tell_gates_from_streams(notebook):
    x, w = live(4), live(4)
    gate = torch.sigmoid(x) * torch.softmax(x, 0)
    stream = gate * x
    kind = notebook.kinds(notebook.walk((stream + w.exp()).sum().grad_fn), [get_gradient_edge(x).node])
    assert kind[gate.grad_fn] == "gate" and kind[stream.grad_fn] == "stream"
    assert get_gradient_edge(w).node not in kind, "what doesn't depend on the input has no kind"


# --- the repairs, on what autograd makes of the same formula with its gate detached ---

x5 = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REPAIRED = {
    "gate times stream": (lambda x: x * torch.sigmoid(x), lambda x: x * torch.sigmoid(x).detach()),
    "division": (
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: x / x.norm(dim=-1, keepdim=True).detach(),
    ),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
        lambda x: (torch.softmax(x @ x.T / 6**0.5, -1).detach() @ x)[None, None],
    ),
    "stream times stream": (lambda x: x * x[:, :1], lambda x: (x * x[:, :1].detach() + x.detach() * x[:, :1]) / 2),
    "gelu": (F.gelu, lambda x: x * (F.gelu(x) / x).detach()),
    "silu": (F.silu, lambda x: x * torch.sigmoid(x).detach()),
    "layer norm": (
        lambda x: F.layer_norm(x, (6,), weight=x5[0], eps=1e-3),
        lambda x: x5[0] * (x - x.mean(-1)[:, None]) / (x.var(-1, unbiased=False)[:, None] + 1e-3).sqrt().detach(),
    ),
    "layer norm of two dimensions": (
        lambda x: F.layer_norm(x, (5, 6), eps=0),
        lambda x: (x - x.mean()) / x.std(unbiased=False).detach(),
    ),
}


@pytest.mark.parametrize("case", REPAIRED)
def test_repair_equals_the_formula_with_its_gate_detached(case, notebook):
    layer, by_hand = REPAIRED[case]
    x, direction = live(5, 6), torch.randn(5, 6, dtype=torch.float64)
    (ours,) = notebook.libra_grad((layer(x) * direction).sum(), [x])
    (expected,) = torch.autograd.grad((by_hand(x) * direction).sum(), x)
    torch.testing.assert_close(ours, expected)
    (plain,) = torch.autograd.grad((layer(x) * direction).sum(), x)
    assert not torch.allclose(plain, expected), "a repair that changes nothing isn't tested"


def test_slope_at_zero_is_the_limit(notebook):
    for function in (F.gelu, F.silu):
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        assert notebook.libra_grad(function(x).sum(), [x])[0].tolist() == [0.5] * 3


# --- all of it ---


def questions():
    """Models that the notebook doesn't try, and its three demos."""
    picture = PICTURES.clone().requires_grad_()
    siglip = perturbed(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)))
    mistral = perturbed(transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, num_key_value_heads=2)))
    embeddings = mistral.get_input_embeddings()(IDS).detach().requires_grad_()
    demo = load_demo("vit").model
    pixels = torch.randn(1, 3, 64, 64, requires_grad=True)
    return {
        "SigLIP tower": (siglip(pixel_values=picture).last_hidden_state[:, 3, :5], picture),
        "Mistral": (mistral(inputs_embeds=embeddings).logits[:, -1, 7], embeddings),
        "demo ViT": (demo(pixels)[:, 3], pixels),
    }


@pytest.mark.parametrize("model", ["SigLIP tower", "Mistral", "demo ViT"])
def test_equal_to_the_package(model, notebook):
    f, x = questions()[model]
    parts = [x, *libragrad_minimal.additive_constants(f, x)]
    ours = notebook.libra_grad(f, parts)
    for mine, theirs in zip(ours, libragrad_minimal.libra_grad(f.sum(), parts, retain_graph=True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4 * theirs.abs().max().item())
    bill = sum((part * g).sum() for part, g in zip(parts, ours, strict=True))
    torch.testing.assert_close(bill, f.sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "output, says",
    [
        (lambda x: torch.sinh(x).sum(), "Sinh"),
        (lambda x: torch.softmax(x, -1)[0, 0], "Softmax is a gate"),
        (lambda x: torch.softmax(x, -1).square().sum(), "Pow"),
        (lambda x: (torch.sigmoid(x) * torch.softmax(x, -1)).sum(), "is a gate"),
        (lambda x: (x + torch.sigmoid(x)).sum(), "Sigmoid is a gate"),
        (lambda x: 1 / (x.sum() + 9), "Reciprocal is a gate"),
        (lambda x: (torch.ones(5, 6).double() / (x + 9)).sum(), "Div"),
        (lambda x: x.square().mean(-1).rsqrt().sum(), "Rsqrt is a gate"),
    ],
)
def test_refuses_what_it_does_not_know(output, says, notebook):
    x = live(5, 6)
    with pytest.raises(NotImplementedError, match=says):
        notebook.libra_grad(output(x), [x])


def test_nothing_stays_behind(notebook):
    x = live(5, 6)
    f = (F.gelu(x) * x).sum()
    (before,) = torch.autograd.grad(f, x, retain_graph=True)
    notebook.libra_grad(f, [x])
    assert torch.equal(torch.autograd.grad(f, x, retain_graph=True)[0], before)
    with pytest.raises(RuntimeError):
        notebook.libra_grad(f, [x, live(2)][::-1] + [torch.ones(1, dtype=torch.int64)])
    assert torch.equal(torch.autograd.grad(f, x)[0], before)


# --- the picture ---


def test_places_keep_nodes_apart_and_links_forward(notebook):
    x = torch.randn(3, 4, requires_grad=True)
    h = F.silu(x @ torch.randn(4, 4))
    y = x + h * (x @ torch.randn(4, 4)) + h.cumsum(0)
    nodes = notebook.walk(y.grad_fn)
    place, chains = notebook.places(nodes)
    at = [place[point] for point in place]
    assert all(abs(a[0] - b[0]) > 0.99 for i, a in enumerate(at) for b in at[:i] if a[1] == b[1])
    assert {(chain[0], chain[-1]) for chain in chains} == set(notebook.links(nodes))
    assert all(place[b][1] - place[a][1] == 1 for chain in chains for a, b in zip(chain, chain[1:], strict=False))


# --- the models of the tour ---


def test_eight_bit_weights_are_the_weights_to_half_a_step(notebook):
    layer = nn.Linear(6, 5, bias=False)
    inside = notebook.Int8(layer)
    assert inside.codes.dtype == torch.int8
    step = layer.weight.abs().amax(1, keepdim=True) / 127
    assert ((inside(torch.eye(6)).T - layer.weight).abs() <= 0.51 * step).all()


def test_lora_adds_a_product_of_low_rank(notebook):
    layer = nn.Linear(6, 5, bias=False)
    change = notebook.LoRA(layer, rank=2)(torch.eye(6)).T - layer.weight
    assert torch.linalg.matrix_rank(change) == 2


def test_puzzles_answer_is_the_digit_after_the_star(notebook):
    notebook.STAR = 10
    ids, answers, star = notebook.puzzles(200, torch.Generator().manual_seed(3))
    for row, answer, place in zip(ids.tolist(), answers.tolist(), star.tolist(), strict=True):
        assert row.count(10) == 1 and row.index(10) == place and row[place + 1] == answer


def test_memory_is_what_a_loop_over_numbers_says(notebook):
    layer, x = notebook.Memory(2).double(), torch.randn(1, 4, 2, dtype=torch.float64)
    state, expected = [0.0, 0.0], []
    for token in x[0].tolist():
        mean_square = (sum(value**2 for value in token) / 2 + torch.finfo(torch.float64).eps) ** 0.5
        h = torch.tensor([value / mean_square for value in token], dtype=torch.float64)
        keep, new = torch.sigmoid(layer.keep(h)).tolist(), layer.new(h).tolist()
        state = [k * s + (1 - k) * n for k, s, n in zip(keep, state, new, strict=True)]
        expected.append(torch.tensor(token) + layer.out(torch.tensor(state, dtype=torch.float64)))
    torch.testing.assert_close(layer(x)[0], torch.stack(expected))


def test_exercise_1_power(notebook):
    """The answer's repair: 1/k of x**k."""
    x = live(4)
    y = F.relu(x).pow(2)
    total = (x * torch.autograd.grad(y.sum(), x, retain_graph=True)[0]).sum() / 2
    torch.testing.assert_close(total, y.sum())
    y.grad_fn.register_hook(lambda sent, arrived: (sent[0] / y.grad_fn._saved_exponent,))
    torch.testing.assert_close((x * torch.autograd.grad(y.sum(), x)[0]).sum(), y.sum())
