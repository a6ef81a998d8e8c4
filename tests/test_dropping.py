"""Tokens that are dropped never enter the blocks: against a ViT run by hand on those that are left."""

from functools import partial

import pytest
import timm
import torch
import transformers
from models import tiny_clip, tiny_hf_vit, tiny_vit
from torch import nn

from libragrad_minimal import metrics
from libragrad_minimal.dropping import drop_tokens, dropping


def without_patches(model, image, gone):
    """The logits of a timm ViT run by hand on the tokens that are left."""
    tokens = model._pos_embed(model.patch_embed(image[None]))
    kept = [0, *(1 + t for t in range(16) if t not in gone)]
    return model.forward_head(model.norm(model.blocks(tokens[:, kept])))


def test_dropping_tokens_equals_a_naive_loop():
    """The protocol of the paper: 10 ... 90 %, rounded down, without the untouched picture."""
    model, images, scores = tiny_vit(), torch.randn(2, 3, 32, 32), torch.randn(2, 4, 4)
    run = dropping(model, model)
    result = metrics.deletion(run, images, {"x": scores}, drop_tokens, batch_size=5, **metrics.AUTHORS_PROTOCOL)["x"]
    assert result.protocol == "drop tokens"
    torch.testing.assert_close(result.fractions, torch.arange(10) / 10)
    for i in range(2):
        predicted = model(images[i : i + 1]).argmax(1).item()
        for curves, descending in ((result.mif, True), (result.lif, False)):
            order = sorted(range(16), key=lambda t: scores[i].flatten()[t].item(), reverse=descending)
            with torch.no_grad():
                logits = torch.cat([without_patches(model, images[i], order[: 16 * k // 10]) for k in range(10)])
            torch.testing.assert_close(curves.logit[i], logits[:, predicted], rtol=1e-4, atol=1e-5)
            accuracy = (logits[1:].argmax(1) == predicted).float().mean() * 100
            name, value = ("MIF accuracy", 100 - accuracy) if descending else ("LIF accuracy", accuracy)
            torch.testing.assert_close(result.summary()[name][i], value)


CAPTIONS = torch.tensor([[5, 6, 1], [7, 8, 1]])


def hf_clip():
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    text = dict(**small, vocab_size=30, bos_token_id=0, eos_token_id=1)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(**small, image_size=32, patch_size=8))
    return transformers.CLIPModel(config).eval()


@pytest.mark.parametrize(
    "build, tower, answer",
    [
        (tiny_hf_vit, lambda model: model, lambda model, x: model(x).logits),
        (hf_clip, lambda model: model.vision_model, lambda model, x: model(CAPTIONS, x).logits_per_image),
        (tiny_clip, lambda model: model, lambda model, x: model.encode_image(x)),
    ],
    ids=["transformers ViT", "transformers CLIP", "open_clip"],
)
def test_dropped_tokens_never_enter_the_blocks(build, tower, answer):
    """Tokens that are dropped can't matter; those that stay are as many in every MLP."""
    model, images, lengths = build(), torch.randn(2, 3, 32, 32), []
    for module in tower(model).modules():
        if "GELU" in type(module).__name__:
            module.register_forward_hook(lambda module, args, result: lengths.append(max(result.shape[:2])))
    run = dropping(tower(model), partial(answer, model))
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[0, [1, 5]] = keep[1, [0, 15, 7]] = False
    with torch.no_grad():
        whole = run((images, torch.ones_like(keep)))
        torch.testing.assert_close(whole, answer(model, images))
        lengths.clear()
        some = run((images, keep))
        assert lengths == 2 * [14] + 2 * [15]
        painted = images.clone()
        painted[0, :, 8:16, 8:16] = 7  # patch 5, which is gone
        torch.testing.assert_close(run((painted, keep)), some)
        assert (some - whole).abs().max() > 1e-4


def test_models_that_need_all_their_tokens_say_so():
    beit = timm.create_model("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=2)
    keep = torch.ones(1, 16, dtype=torch.bool)
    keep[0, 3] = False
    with torch.no_grad(), pytest.raises(ValueError, match="13|15 of 16 patches.*occlude_patches"):
        dropping(beit.eval(), beit)((torch.randn(1, 3, 32, 32), keep))
    swin = timm.models.SwinTransformer(img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 2), num_heads=(1, 2, 2))
    with torch.no_grad(), pytest.raises(ValueError, match="are no row"):
        dropping(swin.eval(), swin)((torch.randn(1, 3, 64, 64), torch.ones(1, 256, dtype=torch.bool)))


class Backwards(nn.Module):
    """Runs its blocks from the last to the first."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True) for _ in range(2))

    def behind(self, h):
        for block in reversed(self.blocks):
            h = block(h)
        return self.head(h.mean(1))

    def forward(self, pictures):
        return self.behind(self.embed(pictures).flatten(2).mT)


def test_tokens_are_dropped_before_the_block_that_runs_first():
    model, pictures, keep = Backwards().eval(), torch.randn(1, 3, 32, 32), torch.arange(16)[None] % 3 > 0
    expected = model.behind(model.embed(pictures).flatten(2).mT[:, keep[0]])
    torch.testing.assert_close(dropping(model, model)((pictures, keep)), expected)


class Numbered(nn.TransformerEncoderLayer):
    def forward(self, h):
        return super().forward(h + torch.linspace(-1, 1, h.shape[1])[:, None])


def test_blocks_that_number_their_tokens_are_refused():
    model = Backwards()
    model.blocks = nn.ModuleList(Numbered(16, 2, 24, batch_first=True) for _ in range(2))
    with pytest.raises(ValueError, match="by their number"):
        dropping(model.eval(), model)((torch.randn(1, 3, 32, 32), torch.arange(16)[None] > 3))
