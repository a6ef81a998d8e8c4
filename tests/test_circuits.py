"""Patching against loops by hand over modules by name; its estimate against derivatives, sums and linear models."""

import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from models import IDS, LLAMA, PICTURES, TEXT, perturbed, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from scipy.stats import pearsonr
from torch import nn

from libragrad_minimal import LIBRA, PLAIN, circuits
from libragrad_minimal.circuits import attribution_patching, patch_together, patching
from libragrad_minimal.models import DATA, load_demo
from libragrad_minimal.untrusted import tell_gguf_version

CLEAN = {"input_ids": IDS[:1]}
CORRUPT = {"input_ids": torch.cat([IDS[:1, :3], IDS[1:, 3:4], IDS[:1, 4:]], dim=1)}
SITES = ("attention", "mlp", "residual", "heads", "neurons")


def metric(logits):
    return logits[..., 3] - logits[..., 4]


def gpt_neox():
    config = transformers.GPTNeoXConfig(**TEXT, use_parallel_residual=True)
    return perturbed(transformers.GPTNeoXForCausalLM(config))


def opt():
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=200, word_embed_proj_dim=32
    )
    return perturbed(transformers.OPTForCausalLM(config))


def gemma():
    return perturbed(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**LLAMA, head_dim=8)))


def falcon():
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=200, new_decoder_architecture=True
    )
    return perturbed(transformers.FalconForCausalLM(config))


def bloom():
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=200)
    return perturbed(transformers.BloomForCausalLM(config))


def albert():
    config = transformers.AlbertConfig(**TEXT, embedding_size=32)
    return perturbed(transformers.AlbertForMaskedLM(config))


def vit(**changes):
    return tiny_vit(**dict(embed_dim=32, num_heads=4, depth=2, init_values=0.5) | changes)


# How a reader of the model's code names its parts: what adds to the stream, and what two of its layers are given.
NAMES = {  # blocks, attention, MLP, heads' projection, neurons' matrix
    tiny_llama: ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj", "self_attn.o_proj", "mlp.down_proj"),
    tiny_gpt2: ("transformer.h.{}", "attn.c_proj", "mlp.c_proj", "attn.c_proj", "mlp.c_proj"),
    gpt_neox: (
        "gpt_neox.layers.{}",
        "attention.dense",
        "mlp.dense_4h_to_h",
        "attention.dense",
        "mlp.dense_4h_to_h",
    ),
    opt: ("model.decoder.layers.{}", "self_attn.out_proj", "fc2", "self_attn.out_proj", "fc2"),
    gemma: (
        "model.layers.{}",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    falcon: (
        "transformer.h.{}",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),
    bloom: (
        "transformer.h.{}",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),
    tiny_bert: (
        "bert.encoder.layer.{}",
        "attention.output.dense",
        "output.dense",
        "attention.output.dense",
        "output.dense",
    ),
    vit: ("blocks.{}", "ls1", "ls2", "attn.proj", "mlp.fc2"),
}
HEADS = 4


def inputs_of(model):
    return (PICTURES[:1], PICTURES[1:]) if isinstance(model, timm.models.VisionTransformer) else (CLEAN, CORRUPT)


def answer_of(model, inputs, asked=metric):
    with torch.no_grad():
        answer = model(inputs) if isinstance(inputs, torch.Tensor) else model(**inputs).logits[:, -1]
    return asked(answer).item()


def hooked(module, given, change):
    """change(tensor) -> tensor or None, at what a module is given or at what it returns."""
    if given:
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: (
                ((change(args[0]), *args[1:]), kwargs)
                if args
                else (args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])})
            ),
            with_kwargs=True,
        )
    return module.register_forward_hook(lambda module, args, result: change(result))


def naive(model, clean, corrupt, asked, modules, given, groups):
    """One run of the model for every layer, position and group: (layers, positions, groups)."""
    kept = {}

    def keep(layer):
        def note(tensor):
            kept[layer] = tensor.clone()
            return tensor

        return note

    hooks = [hooked(module, given, keep(layer)) for layer, module in enumerate(modules)]
    answer_of(model, corrupt, asked)
    for hook in hooks:
        hook.remove()
    before = answer_of(model, clean, asked)
    length = kept[0].shape[-2]
    effect = torch.zeros(len(modules), length, groups)
    for layer, position, group in product(range(len(modules)), range(length), range(groups)):

        def change(tensor, layer=layer, position=position, group=group):
            size = tensor.shape[-1] // groups
            channels = slice(group * size, (group + 1) * size)
            tensor = tensor.clone()
            tensor[..., position, channels] = kept[layer][..., position, channels]
            return tensor

        hook = hooked(modules[layer], given, change)
        effect[layer, position, group] = answer_of(model, clean, asked) - before
        hook.remove()
    return effect


def reference(model, names, sites):
    blocks, attention, mlp, heads, neurons = names
    part = dict(attention=attention, mlp=mlp, heads=heads, neurons=neurons, residual="")[sites]
    names = [".".join(filter(None, (blocks.format(layer), part))) for layer in range(2)]
    modules = [model.get_submodule(name) for name in names]
    given = sites in ("residual", "heads", "neurons")
    groups = {"heads": HEADS, "neurons": max(modules[0].weight.shape) if sites == "neurons" else 1}.get(sites, 1)
    effect = naive(model, *inputs_of(model), metric, modules, given, groups)
    return effect if sites in ("heads", "neurons") else effect[..., 0]


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("build", NAMES, ids=lambda build: build.__name__)
def test_patching_is_the_naive_loop(build, sites):
    model = build()
    result = patching(model, *inputs_of(model), metric, sites)
    expected = reference(model, NAMES[build], sites)
    torch.testing.assert_close(result.effect, expected, atol=2e-6, rtol=1e-4)
    assert (expected.abs() > 1e-5).sum() > 0.02 * expected.numel()  # or else nothing was compared
    clean, corrupt = (answer_of(model, inputs) for inputs in inputs_of(model))
    assert (result.clean, result.corrupt) == pytest.approx((clean, corrupt), abs=1e-5)


@pytest.mark.parametrize("sites", ["attention", "mlp", "residual", "heads"])
def test_patching_on_the_demo_llama(sites):
    demo = load_demo("llama")
    texts = [
        f"Anna has a red ball. Ben has a {colour} kite. What colour is Ben's kite?" for colour in ("blue", "green")
    ]
    clean, corrupt = (demo.tokenizer(text, return_tensors="pt") for text in texts)
    blue, green = (demo.tokenizer(text, add_special_tokens=False).input_ids[0] for text in (" blue", " green"))

    def blue_over_green(logits):
        return logits[..., blue] - logits[..., green]

    result = patching(demo.model, clean, corrupt, blue_over_green, sites)
    assert result.clean > 5 and result.corrupt < -5
    names = NAMES[tiny_llama]
    part = dict(attention=names[1], mlp=names[2], heads=names[3], residual="")[sites]
    modules = [block.get_submodule(part) for block in demo.blocks]
    groups = 4 if sites == "heads" else 1
    with torch.no_grad():
        expected = naive(demo.model, clean, corrupt, blue_over_green, modules, sites in ("residual", "heads"), groups)
    torch.testing.assert_close(result.effect.reshape(expected.shape), expected, atol=2e-4, rtol=1e-4)
    word = (clean["input_ids"] != corrupt["input_ids"])[0].int().argmax()
    assert result.effect[:, :word].count_nonzero() == 0  # what comes before the word doesn't know of it


def test_blocks_that_share_their_weights():
    """ALBERT runs one module for every layer; each layer's run is patched for itself."""
    model = albert()
    effect = patching(model, CLEAN, CORRUPT, metric, "residual").effect
    with torch.no_grad():
        layers = [model(**inputs, output_hidden_states=True).hidden_states for inputs in (CLEAN, CORRUPT)]
        block = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
        mixed = layers[0][1].clone()
        mixed[:, 5] = layers[1][1][:, 5]
        result = block(mixed)
        logits = model.predictions(result[0] if isinstance(result, tuple) else result)[:, -1]
    assert effect.shape == (2, 9)
    assert effect[1, 5].item() == pytest.approx(metric(logits).item() - answer_of(model, CLEAN), abs=1e-5)


# --- properties of patching ---


@pytest.mark.parametrize("sites", SITES)
def test_the_same_prompt_changes_nothing(sites):
    model = tiny_llama()
    for method in (patching, attribution_patching):
        assert method(model, CLEAN, CLEAN, metric, sites).effect.count_nonzero() == 0


def test_all_of_the_stream_is_the_other_prompt():
    model = tiny_gpt2()
    everything = torch.ones(1, 2, 9, dtype=torch.bool)
    for layer in range(2):
        one = everything.clone()
        one[:, 1 - layer] = False
        answer = patch_together(model, CLEAN, CORRUPT, metric, {"residual": one})
        assert answer.item() == pytest.approx(answer_of(model, CORRUPT), abs=1e-5)


def test_sets_of_parts():
    """A set of one part is that part; all heads, or neurons, together are what they add up to; sets join sites."""
    model = tiny_llama()
    single = patching(model, CLEAN, CORRUPT, metric, "heads")
    places = single.effect.abs().flatten().argsort(descending=True)[:5]
    masks = torch.zeros(5, single.effect.numel(), dtype=torch.bool)
    masks[torch.arange(5), places] = True
    answers = patch_together(model, CLEAN, CORRUPT, metric, {"heads": masks.reshape(5, *single.effect.shape)})
    torch.testing.assert_close(answers - single.clean, single.effect.flatten()[places], atol=1e-5, rtol=1e-4)

    some = torch.zeros(2, 2, 9, dtype=torch.bool)
    some[0, :, 4:], some[1, 1] = True, True
    for parts, whole in (("heads", "attention"), ("neurons", "mlp")):
        groups = patching(model, CLEAN, CORRUPT, metric, parts, torch.zeros(2, 9, 4 if parts == "heads" else 48).bool())
        wide = some[..., None].expand(*some.shape, groups.effect.shape[-1])
        apart = patch_together(model, CLEAN, CORRUPT, metric, {parts: wide})
        torch.testing.assert_close(apart, patch_together(model, CLEAN, CORRUPT, metric, {whole: some}))
    both = patch_together(model, CLEAN, CORRUPT, metric, {"attention": some, "mlp": ~some & False})
    torch.testing.assert_close(both, patch_together(model, CLEAN, CORRUPT, metric, {"attention": some}))


def test_only_some_parts():
    model = tiny_llama()
    whole = patching(model, CLEAN, CORRUPT, metric, "heads")
    only = torch.zeros_like(whole.effect, dtype=torch.bool)
    for index in whole.strongest(7):
        only[index] = True
    some = patching(model, CLEAN, CORRUPT, metric, "heads", only)
    torch.testing.assert_close(some.effect[only], whole.effect[only])
    assert some.effect[~only].isnan().all()
    assert some.strongest(100) == whole.strongest(7)


def gemma_that_looks_ahead():
    config = transformers.Gemma3TextConfig(**LLAMA, head_dim=8, use_bidirectional_attention=True)
    return perturbed(transformers.Gemma3ForCausalLM(config))


def mistral_that_forgets():
    return perturbed(transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=3)))


@pytest.mark.parametrize(
    ("build", "remembers"),
    [(tiny_llama, True), (tiny_gpt2, True), (gemma, True), (bloom, True), (gemma_that_looks_ahead, False),
     (mistral_that_forgets, False), (tiny_bert, False)],
    ids=lambda one: getattr(one, "__name__", ""),
)  # fmt: skip
def test_a_beginning_is_left_out_where_nothing_in_it_can_change(build, remembers, monkeypatch):
    """Against runs of the whole text, on prompts that differ from their first token on."""
    model, corrupt = build(), {"input_ids": IDS[1:2]}
    pair = circuits.Pair(model, CLEAN, corrupt, metric)
    pair.site("mlp")
    assert (pair.memory is not None) == remembers
    found = patching(model, CLEAN, corrupt, metric).effect
    monkeypatch.setattr(circuits, "memory_of", lambda *given: None)
    torch.testing.assert_close(found, patching(model, CLEAN, corrupt, metric).effect, atol=1e-5, rtol=1e-4)


def test_a_model_that_fails_when_it_is_to_remember_is_patched_as_a_whole():
    model = tiny_llama()
    forward = model.model.forward

    def forgetful(*args, use_cache=None, **kwargs):
        if use_cache:
            raise NotImplementedError("no cache")
        return forward(*args, use_cache=False, **kwargs)

    expected = patching(model, CLEAN, CORRUPT, metric).effect
    model.model.forward = forgetful
    torch.testing.assert_close(patching(model, CLEAN, CORRUPT, metric).effect, expected, atol=1e-5, rtol=1e-4)


def test_runs_hold_every_part_once_and_few_tokens(monkeypatch):
    monkeypatch.setattr(circuits, "TOKENS_AT_ONCE", 60)
    parts = torch.tensor([(position, group) for position in range(3, 24) for group in range(2)])
    for beginnings in (False, True):
        runs = list(circuits.in_runs(parts, 24, beginnings))
        assert torch.equal(torch.cat(runs), parts)
        assert all(len(run) * (24 - (int(run[0, 0]) if beginnings else 0)) <= 60 for run in runs)


def test_memory_is_bounded(monkeypatch):
    """However many parts there are, no run holds more tokens than allowed, and the effects are the same."""
    model, widths = tiny_llama(), []
    whole = patching(model, CLEAN, CORRUPT, metric, "heads").effect
    monkeypatch.setattr(circuits, "TOKENS_AT_ONCE", 40)
    hook = model.model.norm.register_forward_hook(lambda module, args, result: widths.append(result.shape[:2].numel()))
    torch.testing.assert_close(patching(model, CLEAN, CORRUPT, metric, "heads").effect, whole)
    hook.remove()
    assert max(widths) <= 40 and 36 in widths


def test_the_model_is_left_alone():
    model = tiny_llama()
    before = answer_of(model, CLEAN)
    for sites in SITES:
        patching(model, CLEAN, CORRUPT, metric, sites)
        attribution_patching(model, CLEAN, CORRUPT, metric, sites)
    assert answer_of(model, CLEAN) == before
    hooks = (hook for module in model.modules() for hook in (module._forward_hooks, module._forward_pre_hooks))
    assert not any(hooks) and not any("forward" in vars(module) for module in model.modules())


# --- the estimate ---


class LinearBlock(nn.Module):
    """Attention with a fixed map and an MLP without activation: everything is linear in the tokens."""

    def __init__(self, width, length):
        super().__init__()
        self.map = nn.Parameter(torch.rand(length, length).tril())
        self.value, self.up, self.down = (nn.Linear(width, width) for _ in range(3))
        self.mix = Mixing(self.map, self.value)

    def forward(self, x):
        x = x + self.mix(x)
        return x + self.down(self.up(x))


class Mixing(nn.Module):
    def __init__(self, weights, value):
        super().__init__()
        self.weights, self.value = weights, value

    def forward(self, x):
        return self.weights @ self.value(x)


class LinearModel(nn.Module):
    def __init__(self, width=6, length=5, words=20):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(LinearBlock(width, length) for _ in range(3))
        self.head = nn.Linear(width, words)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("sites", ["attention", "mlp", "residual", "neurons"])
def test_on_a_linear_model_the_estimate_is_the_truth_and_gradient_times_difference(sites):
    torch.manual_seed(0)
    model = LinearModel().double().eval()
    clean, corrupt = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]])}, {"input_ids": torch.tensor([[1, 7, 3, 8, 5]])}
    truth = patching(model, clean, corrupt, metric, sites)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    modules = {
        "attention": [block.mix for block in model.blocks],
        "mlp": [block.down for block in model.blocks],
        "residual": list(model.blocks),
        "neurons": [block.down for block in model.blocks],
    }[sites]
    hooks = [hooked(module, sites in ("residual", "neurons"), keep) for module in modules]
    output = metric(model(**clean)[:, -1])
    here = list(kept)
    gradients = torch.autograd.grad(output, here)
    kept.clear()
    model(**corrupt)
    for hook in hooks:
        hook.remove()
    by_hand = torch.stack([(b - a)[0] * g[0] for a, b, g in zip(here, kept, gradients, strict=True)]).detach().float()
    by_hand = by_hand if sites == "neurons" else by_hand.sum(-1)
    torch.testing.assert_close(truth.effect, by_hand, atol=1e-6, rtol=1e-5)
    for rules in (PLAIN, LIBRA):
        estimate = attribution_patching(model, clean, corrupt, metric, sites, rules)
        torch.testing.assert_close(estimate.effect, by_hand, atol=1e-6, rtol=1e-5)
        assert (estimate.clean, estimate.corrupt) == pytest.approx((truth.clean, truth.corrupt), abs=1e-6)


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("build", [tiny_gpt2, gpt_neox, opt], ids=lambda build: build.__name__)
def test_plain_estimates_are_derivatives(build, sites):
    """For a small change of the prompt they are the truth, but for an error of second order."""
    model = build().double()
    embeddings = model.get_input_embeddings()(IDS[:1]).detach()
    direction = torch.zeros_like(embeddings)
    direction[:, 3] = torch.randn(embeddings.shape[-1], dtype=torch.float64)
    errors = []
    for size in (1e-3, 1e-4):
        pair = {"inputs_embeds": embeddings}, {"inputs_embeds": embeddings + size * direction}
        estimate = attribution_patching(model, *pair, metric, sites, PLAIN).effect
        truth = patching(model, *pair, metric, sites).effect
        errors.append(((estimate - truth).norm() / truth.norm()).item())
    assert errors[0] < 2e-2 and errors[1] < 0.2 * errors[0] + 1e-4


def test_balanced_estimates_of_a_layer_add_up():
    """From a prompt of nothing to the clean one: without biases, at every layer, all that the answer is; plain ones
    don't."""
    model = tiny_llama().double()
    embeddings = 3 * model.get_input_embeddings()(IDS[:1]).detach()
    pair = {"inputs_embeds": embeddings}, {"inputs_embeds": torch.zeros_like(embeddings)}
    for rules, complete in ((LIBRA, True), (PLAIN, False)):
        result = attribution_patching(model, *pair, metric, "residual", rules)
        assert result.corrupt == 0
        sums = result.effect.sum(1)
        assert torch.allclose(sums, torch.full_like(sums, -result.clean), rtol=1e-3) == complete


# --- refusals ---


def test_prompts_that_cannot_be_compared():
    model = tiny_llama()
    longer = {"input_ids": torch.cat([IDS[:1], IDS[:1, :2]], dim=1)}
    with pytest.raises(ValueError, match="clean has 9 tokens and corrupt 11.*rewrite one.*equally long"):
        patching(model, CLEAN, longer, metric)
    with pytest.raises(ValueError, match="clean holds 2 samples: give one prompt"):
        attribution_patching(model, {"input_ids": IDS}, {"input_ids": IDS}, metric)
    ones = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="clean is input_ids .1, 9. and corrupt is input_ids .1, 9., attention_mask"):
        patching(model, CLEAN, CORRUPT | {"attention_mask": ones}, metric)
    masks = ones.clone(), ones.clone()
    masks[0][0, 0] = 0
    pair = [prompt | {"attention_mask": mask} for prompt, mask in zip((CLEAN, CORRUPT), masks, strict=True)]
    with pytest.raises(ValueError, match="attention masks of clean and corrupt differ"):
        patching(model, *pair, metric)
    with pytest.raises(ValueError, match="one position only"):
        patching(model, {"input_ids": IDS[:1, :1]}, {"input_ids": IDS[1:, :1]}, metric)
    with pytest.raises(ValueError, match="return_tensors='pt'"):
        patching(model, {"input_ids": [[1, 2]]}, CORRUPT, metric)


def test_requests_that_cannot_be_met():
    model = tiny_llama()
    with pytest.raises(ValueError, match="sites are one of attention, mlp, residual, heads, neurons, got 'head'"):
        patching(model, CLEAN, CORRUPT, metric, "head")
    for wrong in (lambda logits: logits, lambda logits: 1.0, lambda logits: logits[..., 3].sum()):
        with pytest.raises(ValueError, match="metric must make one number of each row"):
            patching(model, CLEAN, CORRUPT, wrong)
    with pytest.raises(ValueError, match=r"a mask of mlp is a boolean tensor \(2, 9\), got torch.float32 \(2, 9\)"):
        patching(model, CLEAN, CORRUPT, metric, only=torch.ones(2, 9))
    sets = {"mlp": torch.ones(2, 2, 9).bool(), "attention": torch.ones(3, 2, 9).bool()}
    with pytest.raises(ValueError, match="equally many sets"):
        patch_together(model, CLEAN, CORRUPT, metric, sets)


def test_models_without_such_parts():
    shape = dict(hidden_size=32, num_hidden_layers=2, vocab_size=200)
    mamba = perturbed(transformers.MambaForCausalLM(transformers.MambaConfig(**shape, state_size=4)))
    assert patching(mamba, CLEAN, CORRUPT, metric, "residual").effect.shape == (2, 9)
    assert patching(mamba, CLEAN, CORRUPT, metric, "attention").effect.shape == (2, 9)  # what mixes positions
    with pytest.raises(ValueError, match="block 0 of MambaForCausalLM has 0 parts that work"):
        patching(mamba, CLEAN, CORRUPT, metric, "mlp")
    with pytest.raises(ValueError, match="0 attention maps"):
        patching(mamba, CLEAN, CORRUPT, metric, "heads")

    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4)
    mixtral = perturbed(transformers.MixtralForCausalLM(config))
    assert patching(mixtral, CLEAN, CORRUPT, metric, "mlp").effect.count_nonzero() > 2
    with pytest.raises(ValueError, match="no last matrix.*mixture of experts"):
        patching(mixtral, CLEAN, CORRUPT, metric, "neurons")

    swin = perturbed(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), num_classes=5))
    with pytest.raises(ValueError, match="don't all work on the same row of tokens"):
        patching(swin, torch.randn(1, 3, 224, 224), torch.randn(1, 3, 224, 224), metric)


class Mixed(nn.Module):
    """Its samples see each other."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        logits = self.model(input_ids).logits
        return logits - logits.mean(0, keepdim=True) * 0.5


def test_samples_that_mix_are_refused():
    with pytest.raises(ValueError, match="its samples mix"):
        patching(Mixed(tiny_llama()).eval(), CLEAN, CORRUPT, metric)


@pytest.mark.slow
def test_the_benchmark_runs():
    script = Path(__file__).parent / "benchmarks" / "patching.py"
    run = subprocess.run([sys.executable, script, "--quick", "--threads", "1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "4 layers, 25 tokens" in run.stdout and "x as fast as patching" in run.stdout


# --- the stored pairs and measurement ---

PAIRS = json.loads((DATA / "circuit_pairs.json").read_text(encoding="utf-8"))
TASKS = {"indirect object", "agreement", "capitals", "opposites", "sequences", "gender pronouns"}
spec = importlib.util.spec_from_file_location("measured_circuits", DATA / "circuits.py")
measured_circuits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measured_circuits)


@pytest.fixture(scope="module")
def smollm(shared):
    """The folder, the GGUF file and its tokenizer."""
    folder = shared / "models" / "smollm2-135m-instruct"
    pytest.importorskip("gguf")
    tell_gguf_version()
    (file,) = folder.glob("*.gguf")
    return folder, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def test_pairs_are_of_six_tasks_and_none_is_there_twice():
    assert len(PAIRS) >= 60 and {pair["task"] for pair in PAIRS} == TASKS
    assert all(sum(pair["task"] == task for pair in PAIRS) >= 9 for task in TASKS)
    assert len({(pair["clean"], pair["corrupt"]) for pair in PAIRS}) == len(PAIRS)
    for pair in PAIRS:
        assert pair["clean"] != pair["corrupt"] and pair["answer"] != pair["wrong"]
        assert pair["answer"].startswith(" ") and pair["wrong"].startswith(" ")
        assert not pair["clean"].endswith(" ") and not pair["corrupt"].endswith(" ")


def test_pairs_are_equally_long(smollm):
    _, tokenizer = smollm
    for pair in PAIRS:
        lengths = [len(tokenizer(pair[name]).input_ids) for name in ("clean", "corrupt")]
        assert lengths[0] == lengths[1], pair
        for name in ("answer", "wrong"):
            ids = tokenizer(pair[name], add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == pair[name] and len(ids) == 1, pair


@pytest.mark.slow
def test_the_stored_measurement_is_what_the_command_measures(smollm):
    folder, _ = smollm
    model, tokenizer = measured_circuits.load(str(folder))
    stored = np.load(DATA / "circuits_smollm2.npz")
    number = next(n for n in range(len(PAIRS)) if f"{n} | heads | true" in stored)
    prompts = measured_circuits.prompts_of(PAIRS[number], tokenizer)
    answers = measured_circuits.answers_of(model, *prompts)
    np.testing.assert_allclose(stored[f"{number} | answers"], answers, atol=1e-2)
    for how, rules in measured_circuits.RULES.items():
        effect = attribution_patching(model, *prompts, "mlp", rules).effect
        np.testing.assert_allclose(stored[f"{number} | mlp | {how}"], effect, rtol=2e-3, atol=2e-3)
    true = torch.from_numpy(stored[f"{number} | heads | true"].astype(np.float32))
    strong = torch.zeros_like(true, dtype=torch.bool)
    strong.view(-1)[true.abs().flatten().argsort(descending=True)[:20]] = True
    effect = patching(model, *prompts, "heads", strong).effect
    torch.testing.assert_close(effect[strong], true[strong], rtol=2e-3, atol=2e-3)


def test_correlations_are_pearsons(tmp_path, monkeypatch):
    """Over the places at which the prompts differ, by scipy."""
    generator = np.random.default_rng(0)
    effects = {how: generator.normal(size=(3, 4)).astype(np.float16) for how in ("true", *measured_circuits.RULES)}
    for effect in effects.values():
        effect[:, :2] = 0
    np.savez(tmp_path / "some.npz", **{f"0 | mlp | {how}": effect for how, effect in effects.items()})
    monkeypatch.setattr(measured_circuits, "RESULT", tmp_path / "some.npz")
    found = measured_circuits.correlations()
    true = effects["true"][:, 2:].flatten().astype(float)
    for how in measured_circuits.RULES:
        (value,) = found[PAIRS[0]["task"], "mlp", how]
        assert value == pytest.approx(pearsonr(true, effects[how][:, 2:].flatten().astype(float)).statistic)
