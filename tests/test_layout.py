"""Where tokens lie on a picture or in a text: known or asked, right or refused."""

import pytest
import timm
import torch
import torch.nn.functional as F
from models import IDS, PICTURES, TEXT, VISION, built, perturbed, tiny_vit
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LongformerConfig,
    LongformerForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
)

from libragrad_minimal import PLAIN, attribute, libra_grad
from libragrad_minimal.layout import beyond_chance


def pixel_relevance(logit_of, pictures: Tensor, patch: int) -> Tensor:
    """(B, rows, columns): balanced input x gradient of every pixel, summed over patches."""
    pixels = pictures.clone().requires_grad_()
    (gradient,) = libra_grad(logit_of(pixels), pixels)
    return patch**2 * nn.functional.avg_pool2d((gradient * pixels).sum(1), patch).detach()


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def assert_map_lies_on_pixels(model, inputs, pictures, logit_of, patch=8):
    """A map of tokens behind a linear patch embedding says nearly what the pixels under each token say."""
    maps = attribute(model, inputs, 1, "IxG").maps
    expected = pixel_relevance(logit_of, pictures, patch)
    assert maps.shape == expected.shape
    assert correlation(maps, expected) > 0.9


@pytest.mark.parametrize("size", [(32, 32), (37, 61), (64, 24)])
def test_pictures_of_any_size(size):
    model = perturbed(ViTForImageClassification(ViTConfig(**VISION, num_labels=5)), 0.05)
    pictures = torch.randn(1, 3, *size)
    inputs = {"pixel_values": pictures, "interpolate_pos_encoding": True}
    assert_map_lies_on_pixels(model, inputs, pictures, lambda x: model(x, interpolate_pos_encoding=True).logits[:, 1])


class Resizing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tiny_vit()

    def forward(self, pictures):
        return self.inner(F.interpolate(pictures, (32, 32), mode="nearest"))


def test_a_wrapper_that_resizes():
    result = attribute(Resizing().eval(), torch.randn(2, 3, 30, 50), 1)
    assert result.grid == (4, 4)


@pytest.mark.parametrize(
    "changes", [dict(reg_tokens=4), dict(class_token=False, global_pool="avg"), dict(img_size=(32, 48))]
)
def test_class_tokens_and_registers_are_told_from_patches(changes):
    model = tiny_vit(**changes)
    pictures = torch.randn(2, 3, *changes.get("img_size", (32, 32)))
    assert_map_lies_on_pixels(model, pictures, pictures, lambda x: model(x)[:, 1])


class Shuffling(nn.Module):
    """ViTMAE shuffles its patches, each sample's in its own order."""

    def __init__(self, seed, masked=0.0):
        super().__init__()
        self.mae, self.head, self.seed = ViTMAEModel(ViTMAEConfig(**VISION, mask_ratio=masked)), nn.Linear(32, 5), seed

    def forward(self, pictures):
        if self.seed is not None:
            torch.manual_seed(self.seed)
        return self.head(self.mae(pictures).last_hidden_state[:, 0])


def test_shuffled_patches_are_put_back():
    model = perturbed(Shuffling(seed=3), 0.05)
    assert_map_lies_on_pixels(model, PICTURES, PICTURES, lambda x: model(x)[:, 1])


@pytest.mark.parametrize("seed, masked, message", [(None, 0.0, "at random"), (3, 0.5, "don't lie on the picture")])
def test_patches_without_a_place_are_refused(seed, masked, message):
    with pytest.raises(ValueError, match=message):
        attribute(perturbed(Shuffling(seed, masked)), PICTURES, 1)


class Reordering(nn.Module):
    """Hiera's stem: patches that overlap and reach over the border, in an order that isn't row by row."""

    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 24, 7, stride=4, padding=3), nn.Linear(24, 5)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 32, batch_first=True) for _ in range(2))
        self.order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def forward(self, pictures):
        h = self.patch(pictures).flatten(2).mT[:, self.order]
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))


def attribute_by_token(model):
    """Input x gradient of each token, in the model's own order."""
    tokens = model.patch(PICTURES).flatten(2).mT[:, model.order].detach().requires_grad_()
    h = tokens
    for block in model.blocks:
        h = block(h)
    (gradient,) = libra_grad(model.head(h.mean(1))[:, 1].sum(), tokens)
    return (tokens * gradient).sum(-1).detach()


def test_order_of_overlapping_patches_is_read():
    model = perturbed(Reordering())
    result = attribute(model, PICTURES, 1, "IxG")
    assert result.grid == (8, 8)
    in_order = torch.zeros(2, 64).scatter(1, model.order.expand(2, -1), attribute_by_token(model))
    torch.testing.assert_close(result.scores, in_order)


class ChannelsFirst(nn.Module):
    """Three channels, as many as rows; convolutional blocks in a pyramid of two stages."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.mix, self.widen = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            return x + self.widen(F.gelu(self.mix(x)))

    def __init__(self):
        super().__init__()
        self.stem, self.down, self.head = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 6, 2, 2), nn.Linear(6, 5)
        self.stages = nn.ModuleList([nn.Sequential(self.Block(4), self.Block(4)), nn.Sequential(self.Block(6))])

    def forward(self, x):
        x = self.stages[0](self.stem(x))
        return self.head(self.stages[1](self.down(x)).mean((2, 3)))


def test_channels_first_blocks_and_pyramids():
    model = perturbed(ChannelsFirst())
    assert_map_lies_on_pixels(model, PICTURES, PICTURES, lambda x: model(x)[:, 1])
    h = model.stem(PICTURES).detach().requires_grad_()
    early = model.stages[0](h)
    late = model.down(early)
    output = model.head(model.stages[1](late).mean((2, 3)))[:, 1]
    gradients = libra_grad(output, (h, late))
    fine, coarse = ((t * g).sum(1).detach() for t, g in zip((h, late), gradients, strict=True))
    only_inputs = attribute(model, PICTURES, 1, "IxG").maps
    torch.testing.assert_close(only_inputs, fine)
    result = attribute(model, PICTURES, 1, "HiResCAM").maps  # of the last block: a token's score on four patches
    torch.testing.assert_close(result, coarse.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4)
    assert (attribute(model, PICTURES, 1).completeness_error < 1e-5).all()


@pytest.mark.parametrize(
    "name, grid",
    [
        ("swin_tiny_patch4_window7_224", (16, 16)),
        ("convnext_atto", (16, 16)),
        ("pvt_v2_b0", (16, 16)),
        ("levit_128s", (4, 4)),
        ("resnet18", (16, 16)),
        ("mobilevit_xxs", (32, 32)),
    ],
)
def test_timms_pyramids(name, grid):
    size = {"img_size": 64} if name.startswith(("swin", "levit")) else {}
    size |= {"window_size": 4} if name.startswith("swin") else {}
    torch.manual_seed(0)
    model = perturbed(timm.create_model(name, num_classes=5, **size), 0.02)
    result = attribute(model, torch.randn(1, 3, 64, 64), 1)
    assert result.grid == grid
    assert result.completeness_error < 1e-3 * result.output.abs()


@pytest.mark.parametrize(
    "name, grid", [("convit_tiny", (14, 14)), ("pit_ti_224", (27, 27)), ("coat_lite_tiny", (56, 56))]
)
def test_class_tokens_that_come_late_or_stay_in_front_of_every_stage(name, grid):
    torch.manual_seed(0)
    model = perturbed(timm.create_model(name, num_classes=5), 0.02)
    result = attribute(model, torch.randn(1, 3, 224, 224), 1)
    assert result.grid == grid and result.scores.shape == (1, grid[0] * grid[1])
    assert result.completeness_error < 1e-3 * result.output.abs()


def test_flat_tokens_of_a_pyramid():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    result = attribute(perturbed(SwinForImageClassification(config)), PICTURES, 1)
    assert result.grid == (8, 8)
    assert (result.completeness_error < 1e-4 * (1 + result.output.abs())).all()


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 24) for _ in range(2)])

    def forward(self, x):
        x = self.embed(x).flatten(2).permute(2, 0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(0))


@pytest.mark.parametrize("samples", [1, 3, 16])
def test_sequence_first_encoders(samples):
    """With 16 samples of 16 tokens no size tells them apart."""
    model, pictures = perturbed(SequenceFirst()), torch.randn(samples, 3, 32, 32)
    assert_map_lies_on_pixels(model, pictures, pictures, lambda x: model(x)[:, 1])
    result = attribute(model, pictures, 1)
    assert (result.completeness_error < 1e-5 * (1 + result.output.abs())).all()
    torch.testing.assert_close(attribute(model, pictures[:1], 1).scores, result.scores[:1], rtol=1e-3, atol=1e-5)


def test_videos_have_frames():
    config = VideoMAEConfig(**VISION, num_frames=4, tubelet_size=2, num_labels=5)
    model = perturbed(VideoMAEForVideoClassification(config))
    result = attribute(model, {"pixel_values": torch.randn(2, 4, 3, 32, 32)}, 1)
    assert result.grid == (2, 4, 4) and result.maps.shape == (2, 2, 4, 4)


def test_sounds_have_no_grid():
    config = ASTConfig(**{k: TEXT[k] for k in TEXT if k != "vocab_size"}, max_length=64, num_mel_bins=32, num_labels=5)
    result = attribute(perturbed(ASTForAudioClassification(config)), {"input_values": torch.randn(2, 64, 32)}, 1)
    assert result.grid is None and result.scores.shape[0] == 2
    with pytest.raises(ValueError, match="sequence"):
        _ = result.maps


def test_padding_inside_the_model_is_no_token_of_the_text():
    model = perturbed(LongformerForSequenceClassification(LongformerConfig(**TEXT, attention_window=4, num_labels=5)))
    result = attribute(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, 1)
    assert result.scores.shape == IDS.shape
    assert (result.completeness_error < 1e-5).all()


def test_as_many_texts_as_tokens():
    from transformers import BertConfig, BertForSequenceClassification

    model = perturbed(BertForSequenceClassification(BertConfig(**TEXT, num_labels=5)))
    square = IDS.repeat(5, 1)[:9]
    result = attribute(model, square, 1)
    torch.testing.assert_close(result.scores[:2], attribute(model, IDS, 1).scores, rtol=1e-3, atol=1e-5)


def test_pictures_within_texts():
    text = {**TEXT, "num_key_value_heads": 2}
    config = LlavaConfig(vision_config={"model_type": "clip_vision_model", **VISION}, text_config=LlamaConfig(**text))
    config.image_token_index = config.image_token_id = 199
    model = perturbed(LlavaForConditionalGeneration(config), 0.02)
    ids = torch.cat([torch.tensor([[1, 9]]), torch.full((1, 16), 199), torch.tensor([[20, 21]])], 1).repeat(2, 1)
    result = attribute(model, {"input_ids": ids, "pixel_values": PICTURES}, 7)
    assert result.scores.shape == (2, 20)
    torch.testing.assert_close(result.maps, result.scores[:, 2:18].unflatten(1, (4, 4)))
    assert (result.completeness_error < 1e-5 * (1 + result.output.abs())).all()
    with pytest.raises(ValueError, match="no grid"):
        _ = attribute(model, IDS, 7).maps


def test_tokens_of_a_codebook_have_no_map():
    """Chameleon's picture becomes words, and which of them a change of the pixels turns into others is chance."""
    case = built("transformers", "vision-language chameleon")
    result = attribute(case.model, case.inputs, case.target, readout=case.readout)
    assert (result.completeness_error < 1e-4 * (1 + result.output.abs())).all()
    with pytest.raises(ValueError, match="no map of the picture.*words of a codebook"):
        _ = result.maps


def test_a_picture_without_one_of_its_patches_has_no_map():
    """UDOP merges the patches under its words with them: fifteen of sixteen are left, and aren't five rows of three."""
    case = built("transformers", "vision-language udop")
    result = attribute(case.model, case.inputs, case.target, readout=case.readout)
    with pytest.raises(ValueError, match="no map of the picture"):
        _ = result.maps


@pytest.mark.parametrize("tokens", [9, 15, 64, 576])
def test_a_wrong_grid_is_not_right_by_chance(tokens):
    right = torch.rand(20000, tokens, generator=torch.Generator().manual_seed(0)) < 1 / 4
    assert (right.double().mean(1) >= beyond_chance(tokens)).double().mean() < 2e-3


class Arranged(nn.Module):
    """A text model, or one of rows of numbers, that puts its tokens or its samples into another order first."""

    def __init__(self, arrange, embed, sequence_first=False):
        super().__init__()
        self.embed, self.head, self.arrange = embed, nn.Linear(16, 5), arrange
        self.first = sequence_first
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 24, batch_first=not sequence_first) for _ in range(2)
        )

    def behind(self, h):
        h = self.arrange(h)
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(0 if self.first else 1))

    def forward(self, x):
        return self.behind(self.embed(x))


def by_position(model, x):
    """Plain input x gradient of the embedding at each position."""
    h = model.embed(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.behind(h)[:, 1].sum(), h)
    return (h * gradient).sum(-1).detach()


@pytest.mark.parametrize(
    "arrange, x, sequence_first",
    [
        (lambda h: h, IDS, False),
        (lambda h: h.flip(1), IDS, False),
        (lambda h: h.mT.mT[:, [2, 0, 1, *range(3, 9)]], IDS, False),
        (lambda h: h.flip(1), torch.randn(2, 6, 4), False),
        (lambda h: h.transpose(0, 1), torch.randn(6, 6, 4), True),
    ],
)
def test_order_of_texts_and_sequences_is_asked(arrange, x, sequence_first):
    embed = nn.Linear(4, 16) if x.is_floating_point() else nn.Embedding(200, 16)
    model = perturbed(Arranged(arrange, embed, sequence_first))
    torch.testing.assert_close(attribute(model, x, 1, "IxG", PLAIN).scores, by_position(model, x))


def test_tokens_and_samples_without_their_place_are_refused():
    shifted = Arranged(lambda h: torch.cat([torch.ones_like(h[:, :1]), h[:, :-1]], 1), nn.Embedding(200, 16))
    with pytest.raises(ValueError, match="doesn't tell which is which"):
        attribute(perturbed(shifted), IDS, 1)


class Sorting(nn.Module):
    """Samples by how bright they are, and back at the end."""

    def __init__(self):
        super().__init__()
        self.inner = Between(lambda h: h)

    def forward(self, pictures):
        order = pictures.sum((1, 2, 3)).argsort()
        return self.inner(pictures[order])[order.argsort()]


def test_samples_that_are_sorted_are_refused():
    model, brighter = perturbed(Sorting()), PICTURES + torch.tensor([0.0, 9.0]).view(2, 1, 1, 1)
    expected = attribute(model, brighter, 1).scores
    with pytest.raises(ValueError, match="samples of a batch into another order"):
        attribute(model, brighter.flip(0), 1)
    torch.testing.assert_close(attribute(model, brighter[1:], 1).scores, expected[1:], rtol=1e-3, atol=1e-5)


class Between(nn.Module):
    """A ViT that does something to its tokens between the two blocks."""

    def __init__(self, between, order=None):
        super().__init__()
        self.embed, self.head, self.between = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5), between
        self.order = torch.arange(64) if order is None else order
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True) for _ in range(2))

    def forward(self, pictures):
        h = self.embed(pictures).flatten(2).mT[:, self.order]
        return self.head(self.blocks[1](self.between(self.blocks[0](h))).mean(1))


@pytest.mark.parametrize("between", [lambda h: h.flip(1), lambda h: h[:, :16], lambda h: h[:, torch.arange(64) ^ 1]])
def test_tokens_that_change_places_between_blocks(between):
    model = perturbed(Between(between))
    for method in ("FullGrad+", "HiResCAM", "LeGrad"):
        with pytest.raises(ValueError, match="before block 1 tokens are dropped or put into another order"):
            attribute(model, PICTURES, 1, method)
    assert attribute(model, PICTURES, 1, "FullGrad").completeness_error.max() < 1e-5


def test_what_keeps_tokens_in_place_between_blocks():
    pooled = lambda h: F.avg_pool2d(h.mT.unflatten(2, (8, 8)), 2).flatten(2).mT  # noqa: E731
    for between in (lambda h: F.layer_norm(h, (16,)) + 0.1, pooled):
        assert attribute(perturbed(Between(between)), PICTURES, 1, "HiResCAM").grid == (8, 8)


def test_two_patches_in_each_others_place():
    order = torch.arange(64)
    order[[3, 50]] = order[[50, 3]]
    swapped, model = perturbed(Between(lambda h: h, order)), perturbed(Between(lambda h: h))
    model.load_state_dict(swapped.state_dict())
    torch.testing.assert_close(
        attribute(swapped, PICTURES, 1).scores, attribute(model, PICTURES, 1).scores, rtol=1e-3, atol=1e-5
    )


class Given(nn.Module):
    """The order of its patches is an argument, and the picture is changed in place."""

    def __init__(self):
        super().__init__()
        self.inner = Between(lambda h: h)

    def forward(self, x, noise=None, turned=False):
        self.inner.order = (
            torch.arange(64).flip(0) if turned else torch.arange(64) if noise is None else noise.argsort()
        )
        return self.inner(x.sub_(0.5))


def test_the_layout_belongs_to_all_that_is_given():
    model, noise, pictures = perturbed(Given()), torch.rand(64), PICTURES.clone()
    expected = attribute(model, {"x": pictures, "noise": torch.arange(64.0)}, 1).scores
    for other in ({"noise": noise}, {"turned": True}, {}):
        result = attribute(model, {"x": pictures, **other}, 1)
        torch.testing.assert_close(result.scores, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(pictures, PICTURES)
