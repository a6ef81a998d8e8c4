"""Every ordinary slip gets one sentence that says what, where and what to do; and how a model is called."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import transformers
from measuring import memory
from models import IDS, PICTURES, TEXT, tiny_llama, tiny_vit
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from libragrad_minimal import Against, Probability, UnsupportedOperation, attribute, libra_grad
from libragrad_minimal.attribution import attribute_many
from libragrad_minimal.streams import removed
from libragrad_minimal.treatments import TREATMENTS


def picture_model():
    return tiny_vit(depth=2)


def text_model(**changes):
    torch.manual_seed(0)
    return tiny_llama(max_position_embeddings=16, **changes)


NOTHING = torch.zeros_like(IDS)
NOT_A_NUMBER = PICTURES.clone()
NOT_A_NUMBER[0, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    "build, inputs, options, message",
    [
        (picture_model, PICTURES, dict(target="tabby"), "the target is a word, 'tabby': give the number"),
        (picture_model, PICTURES, dict(target=None), "no target: give one of 5 classes"),
        (picture_model, PICTURES, dict(target=True), "the target is boolean"),
        (picture_model, PICTURES, dict(target=torch.tensor([True, False])), "the target is boolean"),
        (picture_model, PICTURES, dict(target={"class": 1}), "the target is a dict: give a class"),
        (picture_model, PICTURES, dict(target=[]), "the target holds no class"),
        (picture_model, PICTURES, dict(target=7), r"0\.\.4"),
        (picture_model, PICTURES, dict(target=1, method="FullGrad", layer=5), "layer 5.*0..2"),
        (picture_model, PICTURES, dict(target=1, method="HiResCAM", layer=-4), "layer -4.*0..1"),
        (picture_model, PICTURES[0], dict(target=1), r"\(B, 3, H, W\), got \(3, 32, 32\).*picture\[None\]"),
        (picture_model, (PICTURES * 255).byte(), dict(target=1), "floating-point numbers, got torch.uint8"),
        (picture_model, PICTURES[:0], dict(target=1), "the input is empty"),
        (picture_model, NOT_A_NUMBER, dict(target=1), "the input holds NaN or infinity in 1 places"),
        (picture_model, PICTURES.numpy(), dict(target=1), "inputs are a ndarray: give a tensor"),
        (picture_model, PICTURES[:, :1], dict(target=1), "VisionTransformer itself doesn't run.*3 channels"),
        (picture_model, PICTURES.double(), dict(target=1), "itself doesn't run.*double"),
        (picture_model, PICTURES, dict(target=1, blocks=3), "got a int.*its lists of modules are"),
        (lambda: torch.sigmoid, PICTURES, dict(target=1), "the model is a builtin.*torch.nn.Module itself"),
        (text_model, -IDS, dict(target=1), "itself doesn't run.*index out of range"),
        (text_model, IDS[0], dict(target=1), r"\(B, T\), got \(9,\).*ids\[None\]"),
        (text_model, "once upon a time", dict(target=1), "inputs are a str"),
        (text_model, {"input_ids": IDS.tolist()}, dict(target=1), "no tensor.*return_tensors='pt'"),
        (text_model, IDS[:, :0], dict(target=1), "the input is empty"),
        (text_model, {"input_ids": IDS, "attention_mask": NOTHING}, dict(target=1), "hides every token of sample 0"),
        (text_model, IDS.repeat(1, 2), dict(target=1), "the text has 18 tokens, and LlamaForCausalLM knows 16"),
        (text_model, IDS + 300, dict(target=1), "token id 4.., and LlamaForCausalLM knows 200"),
    ],
)
def test_slips(build, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        attribute(build(), inputs, **options)


def test_what_an_encoder_decoder_lacks_is_named():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="it is given no decoder_input_ids"):
        attribute(model, torch.randint(50, (1, 4)), 3)


def test_inference_mode_and_training_mode():
    model = picture_model()
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode.*outside"):
        attribute(model, PICTURES, 1)
    with torch.no_grad():
        assert attribute(model, PICTURES, 1).scores.isfinite().all()
    with pytest.raises(ValueError, match="training mode; call model.eval"):
        attribute(model.train(), PICTURES, 1)


def test_arguments_that_attribute_sets_itself():
    model = text_model()
    expected = attribute(model, IDS, 3).scores
    for use_cache in (False, True):
        torch.testing.assert_close(attribute(model, {"input_ids": IDS, "use_cache": use_cache}, 3).scores, expected)
    embeddings = model.get_input_embeddings()(IDS).detach()
    torch.testing.assert_close(attribute(model, {"inputs_embeds": embeddings}, 3).scores, expected)


def test_nothing_is_left_on_the_model():
    model = picture_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError):
        attribute(model, PICTURES, 9)
    attribute(model, PICTURES, 1, "LeGrad")
    assert torch.is_grad_enabled()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def hooks_on(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("moment", range(12))
@pytest.mark.parametrize("method", ["FullGrad+", "LeGrad"])
def test_an_interrupt_leaves_nothing_on_the_model(method, moment):
    model, left = picture_model(), [moment]
    expected = attribute(copy.deepcopy(model), PICTURES, 1, method).scores

    def interrupted(module, args):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt

    attention = model.blocks[1].attn.register_forward_pre_hook(interrupted)
    stem = model.patch_embed.register_forward_pre_hook(interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        attribute(model, PICTURES, 1, method)
    attention.remove()
    stem.remove()
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled() and not hooks_on(model)
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(attribute(model, PICTURES, 1, method).scores, expected)


def test_hooks_come_off_even_if_an_interrupt_comes_between_two():
    model, stubborn = picture_model(), [1]

    class Interrupting:
        def remove(self):
            if stubborn and stubborn.pop():
                raise KeyboardInterrupt

    def hooks(count):
        for module in [*model.blocks]:
            yield module.register_forward_hook(print)
        yield Interrupting()
        if count:
            raise KeyboardInterrupt

    for count in (0, 1):
        stubborn[:] = [1]
        with pytest.raises(KeyboardInterrupt), removed(hooks(count)):
            pass
        assert not hooks_on(model)


# ---- precision -------------------------------------------------------------------------------------------------------


def test_double_precision_stays():
    result = attribute(picture_model().double(), PICTURES.double(), 3)
    assert result.scores.dtype == result.completeness_error.dtype == torch.float64
    assert (result.completeness_error < 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_single(dtype):
    model = text_model()
    expected = attribute(model, IDS, 3)
    half = attribute(text_model().to(dtype), IDS, 3)
    assert half.scores.dtype == torch.float32
    error = (half.scores - expected.scores).norm() / expected.scores.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_autocast():
    model = text_model()
    expected = attribute(model, IDS, 3)
    with torch.autocast("cpu", torch.bfloat16):
        result = attribute(model, IDS, 3)
    assert (result.scores - expected.scores).norm() < 0.05 * expected.scores.norm()


def test_checkpointed_blocks_count_or_are_refused():
    expected, model = attribute(text_model(), IDS, 3).scores, TREATMENTS["checkpointed"](text_model())
    torch.testing.assert_close(attribute(model, IDS, 3).scores, expected)
    with pytest.raises(RuntimeError, match="run the model without checkpointing"):
        attribute(model, IDS, 3, "GenAtt")  # a map that is computed once more isn't the one that was noted


class ReentrantHead(torch.nn.Module):
    def __init__(self, whole=False):
        super().__init__()
        self.model, self.whole = picture_model(), whole

    def forward(self, x):
        if self.whole:
            return checkpoint(self.model, x, use_reentrant=True)
        return checkpoint(self.model.forward_head, self.model.forward_features(x), use_reentrant=True)


@pytest.mark.parametrize("method", ["IxG", "GenAtt"])
def test_reentrant_checkpoints_are_refused_wherever_they_are(method):
    with pytest.raises((RuntimeError, UnsupportedOperation), match="checkpoint.* with use_reentrant=False"):
        attribute(ReentrantHead().eval(), PICTURES, 1, method)
    with pytest.raises(ValueError, match="is it detached, .*or checkpointed with use_reentrant=True"):
        attribute(ReentrantHead(whole=True).eval(), PICTURES, 1, method)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_is_refused():
    traced = torch.jit.trace(picture_model(), (PICTURES,))
    for model in (traced, torch.jit.freeze(traced)):
        with pytest.raises(ValueError, match="is TorchScript.*give the model that it was made of"):
            attribute(model, PICTURES, 1)


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_compiled_models_run_eagerly():
    model = text_model()
    compiled = torch.compile(text_model(), backend="aot_eager")
    torch.testing.assert_close(attribute(compiled, IDS, 3).scores, attribute(model, IDS, 3).scores)


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["IxG", "FullGrad+"])
def test_memory_is_that_of_libra_grad(method):
    """And so linear in the number of tokens: no T x T map, no logits but the last position's."""
    config = transformers.LlamaConfig(
        **{**TEXT, "vocab_size": 3000}, num_key_value_heads=2, max_position_embeddings=4096
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(0, 3000, (1, 1024))

    def bare():
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        libra_grad(model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1).logits[0, -1, 5], embeddings)

    attribute(model, ids, 5, method)
    ours, plain = (memory(run, "cpu").peak for run in (lambda: attribute(model, ids, 5, method), bare))
    assert ours < 1.1 * plain


def test_maps_that_do_not_fit_into_memory_are_refused_before(monkeypatch):
    monkeypatch.setattr("libragrad_minimal.attention_maps.free_memory", lambda device: 10_000)
    with pytest.raises(ValueError, match="attention maps needs .* GB for 2 blocks of 9 x 9 tokens.*FullGrad"):
        attribute(text_model(), IDS, 3, "Attention Rollout")
    assert attribute(text_model(), IDS, 3).scores.isfinite().all()


def test_an_incomplete_result_warns():
    class Doubling(torch.autograd.Function):
        """Says that it is linear, and is not."""

        @staticmethod
        def forward(context, x):
            return 2 * x

        @staticmethod
        def backward(context, gradient):
            return gradient

    from libragrad_minimal import register_rule
    from libragrad_minimal.engine import operations

    model = picture_model()
    model.norm.register_forward_hook(lambda module, args, result: Doubling.apply(result))
    before = dict(operations.OPERATIONS)
    try:
        register_rule("Doubling", "linear")
        with pytest.warns(UserWarning, match="FullGrad.* is not complete: .* miss its output"):
            attribute(model, PICTURES, 1)
    finally:
        operations.OPERATIONS.clear()
        operations.OPERATIONS.update(before)


def test_a_refusal_of_the_engines_is_not_blamed_on_the_inputs():
    class Silent(torch.nn.Module):
        def forward(self, x):
            y = 2 * x
            with torch.no_grad():
                y.add_(1)
            return y

    model = picture_model()
    model.norm = Silent()
    with pytest.raises(UnsupportedOperation, match="^add_ changed a tensor .* inside torch.no_grad"):
        attribute(model, PICTURES, 1)


def test_parts_in_training_mode_and_caches_are_refused():
    model = picture_model()
    model.head_drop.train()
    with pytest.raises(ValueError, match="head_drop is in training mode"):
        attribute(model, PICTURES, 1)
    text = text_model()
    cache = text(IDS[:, :4], use_cache=True).past_key_values
    for name in ("past_key_values", "cache"):  # since transformers 5.24
        with pytest.raises(ValueError, match=f"{name} among the inputs.*give the whole text"):
            attribute(text, {"input_ids": IDS[:, 4:], name: cache}, 1)
    assert cache.get_seq_length() == 4


def test_numbers_that_no_gradient_can_follow_are_refused():
    with torch.inference_mode():
        model = picture_model()
    with pytest.raises(ValueError, match=r"parameters of VisionTransformer were made inside torch.inference_mode"):
        attribute(model, PICTURES, 1)
    model = picture_model()
    with pytest.raises(ValueError, match="the input is on the meta device"):
        attribute(model, PICTURES.to("meta"), 1)
    with pytest.raises(ValueError, match="inside a transform of torch.func"):
        torch.func.vmap(lambda picture: attribute(model, picture[None], 1).scores)(PICTURES)
    model.blocks[1].mlp.to("meta")
    with pytest.raises(ValueError, match="blocks.1.mlp.fc1.weight is on the meta device"):
        attribute(model, PICTURES, 1)


def test_fake_tensors_are_refused():
    model, said = picture_model(), "the input is of torch's FakeTensorMode, which holds no numbers"
    with FakeTensorMode(), pytest.raises(ValueError, match=said):
        attribute(model, torch.randn(2, 3, 32, 32), 1)


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_it_runs_as_it_is_within_a_compiled_function():
    model = picture_model()
    compiled = torch.compile(lambda pictures: 2 * attribute(model, pictures, 1).scores, backend="aot_eager")
    torch.testing.assert_close(compiled(PICTURES), 2 * attribute(model, PICTURES, 1).scores)


def runs_backward(answer):
    answer.sum().backward(retain_graph=True)
    return answer[:, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(target=[True, False]), "the target is boolean"),
        (dict(target=Probability(1.5)), "no whole number"),
        (dict(target=Against(1, 1.5)), "not 1.5"),
        (dict(target=1, method="FullGrad+", layers="ab"), "layer must be a whole number, got 'a'"),
        (dict(target=1, method="IG", steps=1.5), "steps must be a whole number"),
        (dict(target=1, method=["IxG"]), "unknown method"),
        (dict(target=1, rules="libra"), "rules must be LIBRA"),
        (dict(target=lambda a: a[:, 1].to_sparse()), r"target\(answer\) is sparse: give an ordinary tensor"),
        (dict(target=lambda a: a[:, 1].long()), "floating-point numbers, got torch.int64"),
        (dict(target=lambda a: a[:, 1] * 1j), r"target\(answer\) is complex: give an ordinary tensor"),
        (dict(target=lambda a: a[:, 1:3]), r"one number per sample \(2,\), got \(2, 2\)"),
        (dict(target=lambda a: a[0, 1]), r"one number per sample \(2,\), got \(\)"),
        (dict(target=lambda a: a[:, 1].tolist()), "one number per sample.*got list"),
        (dict(target=lambda a: a.nonsense), "the target function fails on the model's answer: AttributeError"),
        (dict(target=lambda a: a[:, 1].detach()), "doesn't depend on the blocks"),
        (dict(target=lambda a: torch.ones(2)), "doesn't depend on the blocks"),
        (dict(target=lambda a: torch.ones(2, requires_grad=True) * 2), "doesn't depend on the blocks"),
        (dict(target=runs_backward), "the target function runs a backward pass"),
        (dict(target=lambda a: next(iter(()))), "the target function fails on the model's answer: StopIteration"),
        (dict(target=int), "the target function fails on the model's answer: ValueError: only one element"),
        (dict(target=lambda a: a[:, 1].to("meta")), r"target\(answer\) is on the meta device"),
        (dict(target=lambda a: torch.nested.as_nested_tensor([a[0], a[1]])), r"target\(answer\) is nested"),
        (dict(target=lambda a: a[:, 1].to(torch.float8_e4m3fn)), r"target\(answer\) is torch.float8_e4m3fn"),
        (dict(target=torch.ones(5, device="meta")), "the target is on the meta device"),
        (dict(target=torch.ones(5).to_sparse()), "the target is sparse"),
        (dict(target=1, readout=torch.ones(2, device="meta")), "readout is on the meta device"),
        (dict(target=1, method=np.ones(2)), "unknown method"),
    ],
)
def test_slips_of_type(options, message):
    model = picture_model()
    with pytest.raises(ValueError, match=message):
        attribute(model, PICTURES, **options)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.nested.as_nested_tensor([torch.tensor([1, 2]), torch.tensor([3])]), "the input is nested"),
        (torch.tensor(3), "which of the inputs.*is the text isn't known"),
        (IDS * 1j, "the input is complex"),
        ({"input_ids": IDS.to_sparse()}, "input_ids is sparse"),
        ({1: IDS}, r"names of inputs must be words.*got \[1\]"),
        ({"input_ids": IDS, "attention_mask": torch.ones(IDS.shape, device="meta")}, "attention_mask is on the meta"),
    ],
)
def test_tensors_that_are_none(inputs, message):
    with pytest.raises(ValueError, match=message):
        attribute(text_model(), inputs, 1)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"IxG": None}, "options of IxG must be a dict.*got None"),
        ({"IxG": 3}, "options of IxG must be a dict.*got 3"),
        ({"IxG": ["layer"]}, r"options of IxG must be a dict.*\['layer'\]"),
        ({"IxG": {1: 2}}, "IxG has no option 1"),
        ([["IxG"]], r"unknown method \['IxG'\]"),
        (["IxG", None], "unknown method None"),
    ],
)
def test_slips_in_options_of_many(methods, message):
    with pytest.raises(ValueError, match=message):
        attribute_many(picture_model(), PICTURES, 1, methods)
