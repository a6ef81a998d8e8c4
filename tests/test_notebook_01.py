"""The functions that notebook 01 defines: against formulas, a loop, and libra_grad."""

import json

import pytest
import torch
import torch.nn.functional as F
from models import grouped_attention_is_fused
from notebook_functions import NOTEBOOKS, functions_of
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from libragrad_minimal import ATTN_LRP, LIBRA, audit, libra_grad
from libragrad_minimal.models import DATA, load_demo, load_pretrained, token_texts

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "initializer_range": 0.2,
}
LLAMA_32_1B = {  # meta-llama/Llama-3.2-1B, config.json, with 2 of its 16 layers
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def random_llama(**config) -> LlamaForCausalLM:
    """Random weights, norm weights too, so that no rule can hide behind ones."""
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.weight.normal_(1, 0.3)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def notebook():
    lifted = functions_of(NOTEBOOKS / "01_llama3_token_attribution.ipynb")
    lifted.plain_attention = F.scaled_dot_product_attention  # what the notebook assigns outside functions
    lifted.REPAIRS = {
        "attention": (F, "scaled_dot_product_attention", lifted.libra_sdpa),
        "gate": (SiLUActivation, "forward", lifted.libra_silu_forward),
        "norm": (LlamaRMSNorm, "forward", lifted.libra_rms_norm),
        "product": (LlamaMLP, "forward", lifted.libra_mlp),
    }
    return lifted


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(1)
    return random_llama(**TINY)


@pytest.fixture(scope="module")
def demo():
    return load_demo("llama")


# ---- the four repairs, against formulas ------------------------------------------------------------------------------


def gradient_of(function, x, weights):
    """Value, and gradient of <weights, function(x)>."""
    x = x.clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad((value * weights).sum(), x)[0]


def test_norm_holds_its_denominator(notebook):
    norm = LlamaRMSNorm(8, eps=1e-5).requires_grad_(False)
    norm.weight.normal_()
    x, weights = torch.randn(3, 8), torch.randn(3, 8)
    value, gradient = gradient_of(lambda x: notebook.libra_rms_norm(norm, x), x, weights)
    assert torch.equal(value, norm(x))
    torch.testing.assert_close(gradient, weights * norm.weight / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())


def test_gate_has_the_slope_of_the_secant(notebook):
    x = torch.tensor([-30.0, -1.0, 0.0, 2.0])
    value, gradient = gradient_of(lambda x: notebook.libra_silu(x), x, torch.ones(4))
    assert torch.equal(value, F.silu(x))
    torch.testing.assert_close(gradient, 1 / (1 + torch.exp(-x)))  # 1/2 at 0, not NaN


def test_mlp_halves_both_factors(notebook):
    mlp = LlamaMLP(LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=2)).requires_grad_(False)
    x, weights = torch.randn(4, 6), torch.randn(4, 6)
    with notebook.repairs_on(["gate"]):
        value, gradient = gradient_of(lambda x: notebook.libra_mlp(mlp, x), x, weights)
    assert torch.equal(value, mlp(x))
    up, gate, arriving = x @ mlp.up_proj.weight.T, x @ mlp.gate_proj.weight.T, weights @ mlp.down_proj.weight
    through_gate = (arriving * up * torch.sigmoid(gate)) @ mlp.gate_proj.weight
    through_up = (arriving * F.silu(gate)) @ mlp.up_proj.weight
    torch.testing.assert_close(gradient, (through_gate + through_up) / 2)
    torch.testing.assert_close((gradient * x).sum(-1), (value * weights).sum(-1))  # complete


def test_attention_passes_gradient_to_the_values_only(notebook):
    """Grouped queries and causal, against the attention map written out."""
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    weights = torch.randn(1, 4, 5, 8)
    result = notebook.libra_sdpa(*inputs, is_causal=True, enable_gqa=True)
    to_query, to_key, to_value = torch.autograd.grad((result * weights).sum(), inputs, materialize_grads=True)

    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    attention_map = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1).detach()
    torch.testing.assert_close(result, attention_map @ value.repeat_interleave(2, 1))
    torch.testing.assert_close(to_value, (attention_map.mT @ weights).unflatten(1, (2, 2)).sum(2))
    assert not to_query.any() and not to_key.any()


def test_three_number_examples_by_hand(notebook):
    value, contributions = notebook.value_and_sum(lambda u, a: (u * a).sum(), [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert (value, contributions) == (32, 64)
    value, contributions = notebook.value_and_sum(lambda x: notebook.rms_norm(x)[2], [1.0, 2.0, 2.0])
    assert value == pytest.approx(2 / 3**0.5) and contributions == pytest.approx(0, abs=1e-6)


# ---- the repairs together --------------------------------------------------------------------------------------------


def test_repairs_leave_no_trace(notebook, tiny):
    originals = [getattr(owner, name) for owner, name, _ in notebook.REPAIRS.values()]
    ids = torch.randint(97, (2, 7))
    plain = tiny(ids).logits
    with notebook.repairs_on():
        assert torch.equal(tiny(ids).logits, plain)
        assert LlamaMLP.forward is notebook.libra_mlp
        with notebook.repairs_on(["norm"]):  # nested: the inner one puts the outer one's back
            pass
        assert LlamaRMSNorm.forward is notebook.libra_rms_norm
    with pytest.raises(ZeroDivisionError), notebook.repairs_on():
        1 / 0  # noqa: B018
    assert [getattr(owner, name) for owner, name, _ in notebook.REPAIRS.values()] == originals


def largest(logits):
    return logits.amax(-1)


def test_complete_at_every_block_and_equal_to_libra_grad(notebook, tiny):
    ids, mask = torch.randint(97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    with notebook.repairs_on():
        by_hand, output = notebook.scores_by_block(tiny, ids, mask, largest)
    torch.testing.assert_close(by_hand.sum(-1), output.expand(3, 2), rtol=1e-4, atol=1e-4)

    with notebook.recorded_block_inputs(tiny.model.layers) as states:
        output = largest(notebook.next_logits(tiny, notebook.embed(tiny, ids), mask))
    gradients = libra_grad(output.sum(), states)
    one_line = torch.stack([notebook.input_x_grad(*pair) for pair in zip(states, gradients, strict=True)])
    assert (one_line - by_hand).norm() < 1e-5 * by_hand.norm()
    assert not any(block._forward_pre_hooks for block in tiny.model.layers)


def test_the_exercise_on_qwen_3(notebook, monkeypatch):
    """Its answer adds two entries to REPAIRS; repairs_on() takes them along, and Qwen's bill is complete."""
    monkeypatch.setitem(notebook.REPAIRS, "qwen norm", (Qwen3RMSNorm, "forward", notebook.libra_rms_norm))
    monkeypatch.setitem(notebook.REPAIRS, "qwen product", (Qwen3MLP, "forward", notebook.libra_mlp))
    shape = {name: TINY[name] for name in TINY if name != "rope_parameters"}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8)).eval().requires_grad_(False)
    ids, mask = torch.randint(97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    plain, output = notebook.scores_by_block(model, ids, mask, largest)
    with notebook.repairs_on():
        libra, repaired_output = notebook.scores_by_block(model, ids, mask, largest)
    assert torch.equal(repaired_output, output)
    torch.testing.assert_close(libra.sum(-1), output.expand(3, 2), rtol=1e-4, atol=1e-4)
    assert ((plain.sum(-1) - output).abs() > 0.1 * output.abs()).all()  # the check can fail


@pytest.mark.parametrize("name", ["attention", "gate", "norm", "product"])
def test_each_single_rule_equals_libra_grad(notebook, tiny, name):
    rule = {"gate": "activation"}.get(name, name)
    ids, mask = torch.randint(97, (1, 8)), torch.ones(1, 8, dtype=torch.long)
    with notebook.repairs_on([other for other in notebook.REPAIRS if other != name]):
        by_hand, output = notebook.scores_by_block(tiny, ids, mask, largest)
    embeddings = notebook.embed(tiny, ids)
    logit = largest(notebook.next_logits(tiny, embeddings, mask))
    (gradient,) = libra_grad(logit, embeddings, rules=LIBRA.without(rule))
    torch.testing.assert_close(notebook.input_x_grad(embeddings, gradient), by_hand[0], rtol=1e-4, atol=1e-5)
    assert (by_hand[0].sum() - output).abs() > 1e-3 * output.abs()  # and without it the bill is wrong


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rules", [LIBRA, ATTN_LRP], ids=["libra", "attn_lrp"])
def test_padding_scores_zero_and_changes_nothing(notebook, tiny, side, rules):
    prompts = [torch.randint(1, 97, (length,)) for length in (5, 12, 1, 9)]

    def scores(rows):
        width = max(map(len, rows))
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for row, prompt in enumerate(rows):
            place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
            ids[row, place], mask[row, place] = prompt, 1
        embeddings = notebook.embed(tiny, ids)
        logits = notebook.next_logits(tiny, embeddings, mask)
        (gradient,) = libra_grad(largest(logits).sum(), embeddings, rules=rules)
        return notebook.input_x_grad(embeddings, gradient), mask.bool()

    together, real = scores(prompts)
    assert (together[~real] == 0).all()
    for row, prompt in enumerate(prompts):
        alone, _ = scores([prompt])
        torch.testing.assert_close(together[row, real[row]], alone[0], rtol=1e-5, atol=1e-5)


def test_nothing_of_the_size_of_an_attention_map_is_stored(notebook, tiny):
    """What autograd keeps for the backward pass of a 400-token prompt: nothing with 400 x 400 entries."""
    if not grouped_attention_is_fused():
        pytest.skip("this PyTorch stores the maps itself where queries share keys")
    sizes = []
    ids, mask = torch.randint(97, (1, 400)), torch.ones(1, 400, dtype=torch.long)

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        notebook.next_logits(tiny, notebook.embed(tiny, ids), mask)
    assert sizes and max(sizes) < 400 * 400
    tiny.set_attn_implementation("eager")  # the check can fail
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        notebook.next_logits(tiny, notebook.embed(tiny, ids), mask)
    tiny.set_attn_implementation("sdpa")
    assert max(sizes) >= 400 * 400


@pytest.mark.slow
def test_the_exact_shape_of_llama_3_2_1b(notebook):
    model = random_llama(**LLAMA_32_1B)
    ids, mask = torch.randint(128256, (1, 12)), torch.ones(1, 12, dtype=torch.long)
    with notebook.repairs_on():
        by_hand, output = notebook.scores_by_block(model, ids, mask, largest)
    torch.testing.assert_close(by_hand.sum(-1), output.expand(2, 1), rtol=1e-4, atol=1e-4)
    embeddings = notebook.embed(model, ids)
    logit = largest(notebook.next_logits(model, embeddings, mask))
    assert audit(logit, embeddings).complete
    (gradient,) = libra_grad(logit, embeddings)
    one_line = notebook.input_x_grad(embeddings, gradient)
    assert (one_line - by_hand[0]).norm() < 1e-5 * by_hand[0].norm()


# ---- the notebook's measurements -------------------------------------------------------------------------------------


def test_evidence_found_against_a_loop(notebook):
    scores, evidence = torch.randn(20, 9), torch.rand(20, 9) < 0.4
    evidence[:, 3] = True
    candidates = torch.ones_like(evidence)
    candidates[:, 0] = evidence[:, 0] = False
    expected = []
    for row in range(20):
        places = [place for place in range(9) if candidates[row, place]]
        k = int(evidence[row].sum())
        best = sorted(places, key=lambda place, row=row: -scores[row, place])[:k]
        expected.append(sum(bool(evidence[row, place]) for place in best) / k)
    torch.testing.assert_close(notebook.evidence_found(scores, evidence, candidates), torch.tensor(expected))


def test_evidence_tokens_are_the_evidence_words(notebook, demo):
    notebook.tokenizer, notebook.model = demo.tokenizer, demo.model
    group = json.loads((DATA / "evidence_questions.json").read_text())[:30]
    ids, mask = notebook.encode([question["prompt"] for question in group])
    evidence = notebook.evidence_tokens(group, ids, mask)
    for row, question in enumerate(group):
        words = [question["prompt"][start:end] for start, end in question["evidence"]]
        assert [text.strip() for text in token_texts(demo.tokenizer, ids[row][evidence[row]])] == words


def test_chat_greys_out_all_but_the_message(notebook, demo):
    notebook.tokenizer, notebook.model = demo.tokenizer, demo.model
    ids, roles = notebook.chat("Anna has a red ball.")
    texts = token_texts(demo.tokenizer, ids[0])
    assert "".join(text for place, text in enumerate(texts) if place not in roles) == "Anna has a red ball."
    assert texts[roles[0]] == "<|begin_of_text|>" and "assistant" in [texts[place] for place in roles]


def test_a_phrase_is_explained_by_its_own_logits(notebook, demo):
    notebook.tokenizer, notebook.model = demo.tokenizer, demo.model
    strip, output = notebook.explain_phrase("Say: tree moon fish star. Again: tree", 3)
    ids = demo.tokenizer("Say: tree moon fish star. Again: tree", return_tensors="pt")["input_ids"]
    total = 0
    for _ in range(3):  # one forward pass for every token, as generation does
        logits = demo.model(ids).logits[0, -1]
        total += logits.max().item()
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    assert output.item() == pytest.approx(total, rel=1e-4)
    assert sum(strip.scores) == pytest.approx(total, rel=1e-4)


def test_real_llama_from_a_folder(notebook, shared):
    llama = load_pretrained("llama", str(shared / "models" / "stories260K"))
    notebook.tokenizer, notebook.model = llama.tokenizer, llama.model
    prompt = "Once upon a time, there was a little girl named"
    ids, mask = notebook.encode([prompt])
    assert "".join(token_texts(llama.tokenizer, ids[0, 1:])) == " " + prompt
    answer = notebook.next_logits(llama.model, notebook.embed(llama.model, ids), mask).argmax(-1)
    assert token_texts(llama.tokenizer, answer) == [" L"] or token_texts(llama.tokenizer, answer) == [" Lily"]
    with notebook.repairs_on():
        scores, output = notebook.scores_by_block(llama.model, ids, mask, largest)
    torch.testing.assert_close(scores.sum(-1), output.expand(len(llama.blocks), 1), rtol=1e-4, atol=1e-4)
