"""Where gradients are known to be zero: what is predicted of a graph is where plain autograd puts zeros, counted."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from libragrad_minimal import LIBRA, audit, balanced, libra_grad
from libragrad_minimal.engine import plan
from libragrad_minimal.engine.nodes import edge_of
from libragrad_minimal.engine.reach import Within, through_view

SHAPES = [(2, 12, 6), (24, 6), (2, 3, 4, 6), (2, 4, 3, 2, 3), (2, 2, 6, 3, 2), (6, 24), (144,), (2, 72), (24, 3, 2)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(SHAPES), st.data())
def test_views_keep_track_of_every_element(seen, stored, data):
    dim = data.draw(st.integers(0, len(seen) - 1))
    period = data.draw(st.sampled_from([p for p in range(1, seen[dim] + 1) if seen[dim] % p == 0]))
    start = data.draw(st.integers(0, period - 1))
    stop = data.draw(st.integers(start + 1, period))
    mask = torch.zeros(seen)
    reach = Within(dim, start, stop, period)
    reach.part(mask).fill_(1)
    found = through_view(reach, seen, stored)
    if found is not None:
        again = torch.zeros(stored)
        found.part(again).fill_(1)
        assert torch.equal(again, mask.reshape(stored))
    if stored == seen:
        assert found is not None


def test_a_fused_projection_and_its_rows_are_found():
    """(B, N, 3 C) -> (B N, 3 C): the values' third of the columns; (B, N, C) -> (B N, C): one row in N."""
    assert through_view(Within(2, 2, 3, 3), (4, 5, 3, 2, 8), (4, 5, 48)) == Within(2, 32, 48, 48)
    assert through_view(Within(1, 0, 1, 5), (4, 5, 16), (20, 16)) == Within(0, 0, 1, 5)


class Classifier(nn.Module):
    """Two pre-norm blocks with a fused projection, read at one token."""

    def __init__(self, read, split):
        super().__init__()
        self.read, self.split = read, split
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(5))
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.out, self.up = (nn.ModuleList(nn.Linear(16, 16) for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(16, 7)

    def forward(self, x):
        for i in range(2):
            q, k, v = self.split(self.qkv[i](self.norms[2 * i](x)))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.read == -1)
            x = x + self.out[i](attended.transpose(1, 2).reshape(x.shape))
            x = x + F.gelu(self.up[i](self.norms[2 * i + 1](x)))
        read = torch.tensor([self.read]) if self.read > 0 else slice(self.read, self.read + 1 or None)
        return self.head(self.norms[4](x)[:, read][:, 0])


def unbound(qkv):
    return qkv.reshape(*qkv.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)


def chunked(qkv):
    return (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in qkv.chunk(3, -1))


def sliced(qkv):
    return (qkv[..., i : i + 16].unflatten(-1, (2, 8)).transpose(1, 2) for i in (0, 16, 32))


def indexed(qkv):
    packed = qkv.unflatten(-1, (3, 16)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return (packed[i].unflatten(-1, (2, 8)).transpose(1, 2) for i in range(3))


@pytest.fixture(params=[(read, split) for read in (0, -1, 3) for split in (unbound, chunked, sliced, indexed)])
def model(request):
    return Classifier(*request.param).double().eval()


def test_results_are_the_same_as_without(model, monkeypatch):
    x = torch.randn(3, 70, 16, dtype=torch.float64, requires_grad=True)
    logits = model(x)
    planned = plan.make_plan([edge_of(logits[:, 2])], {edge_of(x)}, LIBRA)
    spared = [treatment.reach for treatment in planned.treatments.values() if treatment.reach is not None]
    fused = "ScaledDotProductFlashAttentionForCpu" in str(audit(logits[:, 2], x))
    assert len(spared) == 2 + 2 + fused + 1  # both projections' columns, two products' rows and attention's, one logit
    inputs = (x, model.qkv[1].bias, model.up[1].bias, model.qkv[0].weight)
    gradients = libra_grad(logits[:, 2], inputs, retain_graph=True)
    monkeypatch.setattr(plan, "SPARES_ZEROS", set())
    torch.testing.assert_close(gradients, libra_grad(logits[:, 2], inputs), rtol=1e-10, atol=1e-13)


def test_what_is_predicted_is_where_plain_gradients_are_zero(model):
    """Inside the last block, the plain gradient of one logit is zero wherever the plan says that nothing arrives."""
    x = torch.randn(3, 70, 16, dtype=torch.float64, requires_grad=True)
    output = model(x)[:, 2]
    planned = plan.make_plan([edge_of(output)], {edge_of(x)}, LIBRA)
    rows = {node: t.reach for node, t in planned.treatments.items() if t.reach is not None and t.reach.dim == 0}
    seen = []
    for node, reach in rows.items():
        node.register_prehook(lambda grads, reach=reach: seen.append(reach.holds(grads[0])))
    torch.autograd.grad(output.sum(), x)
    assert len(seen) == 2 and all(seen)


def test_a_hook_that_adds_to_a_gradient_is_obeyed():
    """Then the zeros are none: what the hook says is multiplied as well."""
    model = Classifier(0, unbound).double().eval()
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    hidden = []
    handle = model.up[1].register_forward_hook(lambda module, args, result: hidden.append(result))
    output = model(x)[:, 2]
    handle.remove()
    added = torch.randn_like(hidden[0])
    hidden[0].register_hook(lambda gradient: gradient + added)
    with balanced(output, x):  # where nothing is spared, since gradient may come from elsewhere
        (expected,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    torch.testing.assert_close(libra_grad(output, x)[0], expected)


def test_inside_a_block_gradient_may_come_from_elsewhere():
    model = Classifier(0, unbound).double().eval()
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    hidden = []
    handle = model.up[1].register_forward_hook(lambda module, args, result: hidden.append(result))
    logits = model(x)
    handle.remove()
    total = logits[:, 2].sum() + (hidden[0] * torch.randn_like(hidden[0])).sum()
    expected = libra_grad(total, x, retain_graph=True)[0]
    with balanced(logits, x):
        (gradient,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(gradient, expected)
