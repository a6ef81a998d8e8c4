"""Which modules are the blocks: the graph's word over a name's, `blocks=` over both, candidates where neither tells."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import IDS, PICTURES, TEXT, VISION, perturbed, tiny_vit
from torch import nn

from libragrad_minimal import additive_constants, attribute, libra_grad, observed
from libragrad_minimal.families import Inputs
from libragrad_minimal.streams import find_streams, separators


def blocks_of(model, inputs, **options):
    return list(find_streams(model, Inputs(inputs), **options).blocks)


class Surrounded(nn.Module):
    """A ViT whose stem, neck and head are called what blocks are called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()), nn.Conv2d(3, 3, 1))
        self.vit = tiny_vit(num_classes=0)
        self.blocks = nn.ModuleList([Residual(24), Residual(24)])
        self.layer = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x):
        x = self.vit(self.layers(x))
        for block in self.blocks:
            x = block(x)
        return self.layer(x)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.linear, self.norm = nn.Linear(channels, channels), nn.LayerNorm(channels)

    def forward(self, x):
        return x + self.linear(self.norm(x))


def test_stems_and_heads_are_told_from_blocks():
    model = perturbed(Surrounded())
    assert blocks_of(model, PICTURES) == list(model.vit.blocks)
    assert attribute(model, PICTURES, 1).grid == (4, 4)


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit1, self.vit2 = tiny_vit(depth=2), tiny_vit(depth=2)

    def forward(self, x):
        return self.vit1(x) + self.vit2(x)


def test_towers_side_by_side_are_refused_and_can_be_named():
    model = perturbed(Ensemble())
    with pytest.raises(ValueError, match=r"several towers.*blocks=\[...\].*vit#.blocks \(4 Block\)"):
        attribute(model, PICTURES, 1)
    with pytest.raises(ValueError, match="no module of that name.*vit#.blocks"):
        attribute(model, PICTURES, 1, blocks="vit3.blocks")
    with pytest.warns(UserWarning, match="the input reaches the answer of Ensemble past the named blocks"):
        by_name = attribute(model, PICTURES, 1, "IxG", blocks="vit1.blocks")
    torch.testing.assert_close(by_name.scores, attribute(model.vit1, PICTURES, 1, "IxG").scores)
    with pytest.warns(UserWarning, match="past the named blocks"):
        by_module = attribute(model, PICTURES, 1, "IxG", blocks=list(model.vit1.blocks))
    torch.testing.assert_close(by_name.scores, by_module.scores)


class FedTwice(nn.Module):
    """Blocks of which each is given the first tokens again, beside a tower that nothing is given to."""

    def __init__(self):
        super().__init__()
        self.vit, self.blocks = tiny_vit(), nn.ModuleList([Fed(24), Fed(24)])
        self.embed, self.head = nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, x=None, sequence=None):
        if x is not None:
            return self.vit(x)
        first = tokens = self.embed(sequence)
        for block in self.blocks:
            tokens = block(tokens, first)
        return self.head(tokens.mean(1))


class Fed(Residual):
    def forward(self, x, first):
        return x + self.linear(self.norm(x)) + first / 2


def test_a_tower_that_does_not_run_is_no_choice():
    model = perturbed(FedTwice())
    streams = find_streams(model, Inputs({"sequence": torch.randn(2, 7, 6)}))
    assert streams.blocks == tuple(model.blocks)
    assert find_streams(model, Inputs({"x": PICTURES})).blocks == tuple(model.vit.blocks)


class Wide(nn.Module):
    """A single list of blocks, and beside it a way from the input to the answer."""

    def __init__(self, way):
        super().__init__()
        self.vit, self.beside, self.words = tiny_vit(), nn.Linear(3, 5), nn.Linear(24, 5)
        self.way = way

    def forward(self, x):
        answer = self.vit(x)
        if self.way == "from the pixels":
            return answer + self.beside(x.mean((2, 3)))
        if self.way == "from the first tokens":
            return answer + self.words(self.vit.patch_embed(x).mean(1))
        return answer


@pytest.mark.parametrize("way", ["from the pixels", "from the first tokens"])
def test_a_way_past_a_single_list_is_refused_or_told(way):
    model = perturbed(Wide(way))
    with pytest.raises(ValueError, match=r"leads past its blocks: the input.*libra_grad.*blocks=\[...\].*vit.blocks"):
        attribute(model, PICTURES, 1)
    with pytest.warns(UserWarning, match="the input reaches the answer of Wide past the named blocks"):
        result = attribute(model, PICTURES, 1, blocks="vit.blocks")
    assert (result.completeness_error < 1e-4).all()
    assert attribute(perturbed(Wide("none")), PICTURES, 1).grid == (4, 4)


class Reused(nn.Module):
    """What enters the first block goes another way, too: into a later block, into the head, or as a gate."""

    def __init__(self, place, in_place=False, embedded=lambda ids, weight: F.embedding(ids, weight)):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(200, 16))
        layer = partial(nn.TransformerEncoderLayer, 16, 2, 32, batch_first=True)
        self.blocks, self.head = nn.ModuleList([layer(), layer()]), nn.Linear(16, 4)
        self.place, self.in_place, self.embedded = place, in_place, embedded

    def from_tokens(self, tokens):
        h = tokens
        for place, block in enumerate(self.blocks):
            h = block(h + tokens if self.place == place else h)
        if self.place == "gate":
            return self.head(h.mean(1)) * torch.sigmoid(tokens.mean((1, 2)))[:, None]
        if self.place == "head" and self.in_place:
            tokens += h
            return self.head(tokens.mean(1))
        return self.head((h + tokens if self.place == "head" else h).mean(1))

    def forward(self, input_ids):
        return self.from_tokens(self.embedded(input_ids, self.weight))


REUSED = [dict(place=place) for place in (1, "head", "gate")] + [dict(place="head", in_place=True)]


def as_a_view(ids, weight):
    return F.embedding(ids.T, weight).transpose(0, 1)[:, :, :]


SHOWS_SLICES = hasattr(torch._C._functions.CopySlices, "_wrapped_node")
REUSED += [dict(place=place, embedded=as_a_view) for place in (1, "head", "gate")]


@pytest.mark.parametrize(
    "options", REUSED, ids=lambda options: "-".join(getattr(v, "__name__", str(v)) for v in options.values())
)
def test_tokens_that_go_another_way_count_there_too(options):
    model = perturbed(Reused(**options))
    if "embedded" in options and not SHOWS_SLICES:
        with pytest.raises(ValueError, match="hides what is written to a view"):
            attribute(model, {"input_ids": IDS}, 1, "IxG")
        return
    result = attribute(model, {"input_ids": IDS}, 1, "IxG")
    tokens = F.embedding(IDS, model.weight).detach().requires_grad_()
    with observed():
        output = model.from_tokens(tokens.clone())[:, 1]
    (gradient,) = libra_grad(output, tokens)
    torch.testing.assert_close(result.scores, (gradient * tokens).sum(-1).detach())
    assert (attribute(model, {"input_ids": IDS}, 1).completeness_error < 1e-5).all()
    path = attribute(model, {"input_ids": IDS}, 1, "IG", steps=200)
    assert (path.completeness_error < 0.01).all()


WAYS_TO_EMBED = {
    "functional": lambda ids, weight: F.embedding(ids, weight),
    "index": lambda ids, weight: weight[ids],
    "product with ones": lambda ids, weight: F.one_hot(ids, 200).float() @ weight,
}


@pytest.mark.parametrize("way", WAYS_TO_EMBED)
def test_words_are_followed_however_they_are_embedded(way):
    class Beside(Reused):
        def forward(self, input_ids):
            return super().forward(input_ids) + self.embedded(input_ids, self.weight).sum(1)[:, :4]

    plain, beside = (perturbed(kind(None, embedded=WAYS_TO_EMBED[way])) for kind in (Reused, Beside))
    assert (attribute(plain, {"input_ids": IDS}, 1).completeness_error < 1e-5).all()
    with pytest.raises(ValueError, match="leads past its blocks: input_ids"):
        attribute(beside, {"input_ids": IDS}, 1)


def test_what_enters_later_blocks_anew_is_told():
    class Anew(Reused):
        def forward(self, input_ids):
            h = self.blocks[0](self.embedded(input_ids, self.weight))
            return self.head(self.blocks[1](h + self.embedded(input_ids, self.weight)).mean(1))

    with pytest.warns(UserWarning, match="input_ids enters later blocks of Anew past the first one, too"):
        attribute(perturbed(Anew(None)), {"input_ids": IDS}, 1)


class WideText(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embedding, self.encoder = nn.Embedding(200, 16), nn.TransformerEncoder(layer, 2)
        self.bag, self.head = nn.Embedding(200, 4), nn.Linear(16, 4)

    def forward(self, input_ids):
        return self.head(self.encoder(self.embedding(input_ids)).mean(1)) + self.bag(input_ids).sum(1)


def test_a_second_embedding_of_the_same_words_is_a_way_past():
    with pytest.raises(ValueError, match="leads past its blocks: input_ids"):
        attribute(perturbed(WideText()), {"input_ids": IDS}, 1)


@pytest.mark.parametrize("read", [lambda answer: answer.last_hidden_state[:, 0, 0], torch.ones(24)])
def test_states_before_the_blocks_are_no_way_past(read):
    config = transformers.ViTConfig(
        **{**VISION, "hidden_size": 24, "num_attention_heads": 2}, output_hidden_states=True
    )
    model = perturbed(transformers.ViTModel(config))
    assert (attribute(model, PICTURES, read).completeness_error < 1e-4).all()


def test_blocks_can_be_a_part_of_the_list():
    model = tiny_vit()
    late = attribute(model, PICTURES, 1, "FullGrad", blocks=["blocks.1", "blocks.2"])
    torch.testing.assert_close(late.scores, attribute(model, PICTURES, 1, "FullGrad", layer=1).scores)


@pytest.mark.parametrize("family", ["XLM", "Flaubert"])
def test_blocks_whose_residuals_are_added_outside(family):
    """XLM keeps attention and MLPs in two lists and adds what they return itself."""
    config = getattr(transformers, f"{family}Config")(vocab_size=200, emb_dim=16, n_layers=3, n_heads=2)
    model = perturbed(getattr(transformers, f"{family}ForSequenceClassification")(config))
    assert blocks_of(model, {"input_ids": IDS}) == list(model.transformer.attentions)
    attribution = attribute(model, {"input_ids": IDS}, 1)
    assert attribution.completeness_error.max() < 1e-5
    assert attribution.scores.shape == IDS.shape
    entered = []
    hook = model.transformer.layer_norm_emb.register_forward_hook(lambda module, args, result: entered.append(result))
    output = model(IDS).logits[:, 1]
    hook.remove()
    (gradient,) = libra_grad(output, entered[0])  # which attention is given, and which is added to what it returns
    by_token = attribute(model, {"input_ids": IDS}, 1, "IxG").scores
    torch.testing.assert_close(by_token, (gradient * entered[0]).sum(-1).detach(), rtol=1e-3, atol=1e-6)


class SideBySide(nn.Module):
    """Two layers that are given the same tokens: no chain."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layers = nn.ModuleList([Residual(8), Residual(8)])
        self.others = nn.ModuleList([Residual(8), Residual(8)])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return torch.cat([self.layers[0](x) + self.layers[1](x), self.others[0](x) + self.others[1](x)], -1).mean(1)


def test_layers_side_by_side_are_no_chain():
    with pytest.raises(ValueError, match="no list of blocks as a whole"):
        blocks_of(SideBySide().eval(), {"input_ids": IDS % 50})


def test_separators_by_hand():
    x = torch.randn(3, requires_grad=True)
    a = x * 2
    b = a.exp()
    c = a.sin() + b
    found = separators([(c * 3).grad_fn], torch.autograd.graph.get_gradient_edge(x).node)
    assert {a.grad_fn, c.grad_fn} <= found
    assert b.grad_fn not in found


def test_a_tower_that_does_not_run_is_passed_over():
    vision = {"model_type": "siglip_vision_model", **VISION}
    text = {"model_type": "gemma3_text", **TEXT, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=199
    )
    model = perturbed(transformers.Gemma3ForConditionalGeneration(config))
    result = attribute(model, IDS, 3)
    assert result.scores.shape == IDS.shape
    assert (result.completeness_error < 1e-4 * (1 + result.output.abs())).all()


def test_a_block_that_is_shared_runs_several_times():
    config = transformers.AlbertConfig(**{**TEXT, "num_hidden_layers": 4}, embedding_size=16, num_labels=5)
    model = perturbed(transformers.AlbertForSequenceClassification(config))
    for layer in (0, 2, -1):
        result = attribute(model, IDS, 1, "FullGrad", layer=layer)
        assert (result.completeness_error < 1e-5 * (1 + result.output.abs())).all()


def small_t5():
    config = transformers.T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def small_bart():
    names = "encoder_layers decoder_layers encoder_attention_heads decoder_attention_heads".split()
    config = transformers.BartConfig(
        vocab_size=200, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, **dict.fromkeys(names, 2)
    )
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("build", [small_t5, small_bart])
def test_encoders_and_decoders_have_scores_each(build):
    model, decoded = perturbed(build()), IDS[:, :4]
    inputs = {"input_ids": IDS, "decoder_input_ids": decoded}
    result = attribute(model, inputs, 3, "FullGrad")
    assert result.scores.shape == IDS.shape and result.decoder_scores.shape == decoded.shape
    assert (result.completeness_error < 1e-5 * (1 + result.output.abs())).all()
    tokens = {}

    def keep(name):
        def hook(block, args, kwargs):
            if name not in tokens:
                h = args[0] if args else kwargs["hidden_states"]
                tokens[name] = h.detach().requires_grad_()
            if args:
                return (tokens[name] if name not in seen else args[0], *args[1:]), seen.add(name) or kwargs

        return hook

    seen = set()
    encoder, decoder = (
        getattr(part, "block", None) or part.layers for part in (model.get_encoder(), model.get_decoder())
    )
    hooks = [part[0].register_forward_pre_hook(keep(i), with_kwargs=True) for i, part in enumerate((encoder, decoder))]
    output = model(**inputs).logits[:, -1, 3]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(result.output, output.detach())
    gradients = libra_grad(output, (tokens[0], tokens[1]))
    expected = [(tokens[i] * g).sum(-1).detach() for i, g in enumerate(gradients)]
    inputs_alone = attribute(model, inputs, 3, "IxG")
    torch.testing.assert_close(inputs_alone.scores, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inputs_alone.decoder_scores, expected[1], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="two streams"):
        attribute(model, inputs, 3, "RawAtt")


def test_sounds_and_words():
    names = "encoder_layers decoder_layers encoder_attention_heads decoder_attention_heads".split()
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    sizes = dict(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=200, max_source_positions=50)
    config = transformers.WhisperConfig(**sizes, **special, **dict.fromkeys(names, 2))
    model = perturbed(transformers.WhisperForConditionalGeneration(config))
    inputs = {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": IDS[:, :4]}
    result = attribute(model, inputs, 3)
    assert result.scores.shape == (2, 50) and result.decoder_scores.shape == (2, 4)
    assert (result.completeness_error < 1e-4 * (1 + result.output.abs())).all()


class LateClassToken(nn.Module):
    """CaiT's way: the class token is put in front behind the blocks, by `cat`; a scaled residual by addcmul."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList([Residual(8), Residual(8)])
        self.token, self.scale, self.shift = (nn.Parameter(torch.randn(1, 1, 8)) for _ in range(3))
        self.pool = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = torch.addcmul(self.shift, self.scale, block(x))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.pool(x[:, :1], x, x)[0][:, 0])


@pytest.mark.parametrize("frozen", [False, True])
def test_constants_that_come_in_by_any_way_count(frozen):
    model = perturbed(LateClassToken()).requires_grad_(not frozen)
    result = attribute(model, PICTURES, 1)
    assert (result.completeness_error < 1e-5 * (1 + result.output.abs())).all()
    h = model.embed(PICTURES).flatten(2).transpose(1, 2).detach().requires_grad_()
    model.embed.forward = lambda x: h.transpose(1, 2).unflatten(2, (4, 4))
    with observed():
        output = model(PICTURES)[:, 1]
    constants = additive_constants(output, h)
    gradients = libra_grad(output, (h, *constants))
    torch.testing.assert_close(
        sum((t * g).sum() for t, g in zip((h, *constants), gradients, strict=True)), output.sum()
    )


def test_experts_mix_the_rows_of_a_batch():
    """The rows of a mixture of experts are sorted by expert, so a bias's samples can't be told by their place."""
    config = transformers.GptOssConfig(
        **{**TEXT, "num_key_value_heads": 2}, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    )
    model = perturbed(transformers.GptOssForCausalLM(config))
    both = attribute(model, IDS, 3)
    assert (both.completeness_error < 1e-5 * (1 + both.output.abs())).all()


def test_sigmoids_in_the_stream_have_their_halves_at_their_own_blocks():
    class Bounded(Residual):
        def forward(self, x):
            return x + torch.sigmoid(self.linear(self.norm(x)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Bounded(8), Bounded(8)]), nn.Linear(8, 5)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    for samples in (1, 2):
        for layer in (0, 1, 2):
            result = attribute(perturbed(Model()), torch.randn(samples, 3, 8), 1, "FullGrad", layer=layer)
            assert (result.completeness_error < 1e-5 * (1 + result.output.abs())).all()


def test_blocks_that_change_their_tokens_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            x += self.linear(self.norm(x.clone()))
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList([InPlace(), InPlace()]), nn.Linear(8, 5)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    model, x = perturbed(Model()), torch.randn(2, 3, 8)
    for layer in (0, 1):
        result = attribute(model, x.clone(), 1, "FullGrad", layer=layer)
        assert (result.completeness_error < 1e-5 * (1 + result.output.abs())).all()
        assert not torch.equal(result.scores, attribute(model, x.clone(), 1, "FullGrad", layer=1 - layer).scores)


def test_a_model_without_blocks_is_told_of_libra_grad():
    with pytest.raises(ValueError, match="no list of blocks.*libra_grad"):
        attribute(nn.Linear(2, 2).eval(), torch.randn(1, 2), 0)


def test_as_many_texts_as_pictures():
    """SigLIP's answer is the transpose of (texts, pictures), to which a bias is added: where are the samples there?"""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2))
            self.texts, self.bias = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.ones(1))

        def forward(self, pictures):
            for block in self.blocks:
                pictures = block(pictures)
            return (self.texts @ pictures.mean(1).T + self.bias).T

    model, pictures = Pair().eval(), torch.randn(3, 5, 8)
    result = attribute(model, pictures, 1)
    assert (result.completeness_error < 1e-5).all()


def test_recurrent_layers_show_their_gates():
    """Fused ones, as they run by default, hide them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.mix = nn.LSTM(8, 4, batch_first=True, bidirectional=True), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.mix(self.rnn(x)[0])

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 5)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    result = attribute(Recurrent().eval(), torch.randn(2, 5, 8), 1)
    assert (result.completeness_error < 1e-5).all()


def test_a_heads_bias_lies_on_no_token():
    """As many classes as tokens: what the head adds is still no token's."""
    model = perturbed(transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=9)))
    before = attribute(model, IDS, 1, "FullGrad")
    with torch.no_grad():
        model.classifier.bias += 7.0
    after = attribute(model, IDS, 1, "FullGrad")
    torch.testing.assert_close(after.scores, before.scores, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after.output, before.output + 7)
    assert after.completeness_error.max() < 1e-4
