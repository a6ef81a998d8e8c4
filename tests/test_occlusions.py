"""FullGrad+ over occluded pictures, against a loop over the pictures that the model was really given."""

import pytest
import torch
from models import tiny_llama, tiny_vit

from libragrad_minimal.attribution import attribute

PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_mean_over_the_passes_in_which_a_patch_stood():
    model, given = tiny_vit(), []
    with model.register_forward_pre_hook(lambda module, args: given.append(args[0].detach().clone())):
        found = attribute(model, PICTURES, 3, "Occluded FullGrad+", passes=5).scores
    painted = [pictures for pictures in given if pictures.shape == PICTURES.shape]
    patches = [pictures.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).abs().sum((1, 4)).flatten(1) for pictures in painted]
    shares = [(seen == 0).float().mean().item() for seen in patches]
    assert sorted({round(16 * share) for share in shares}) == [0, 4, 7, 11, 14]  # of 16 patches: 0, 22.5 ... 90 %
    one_each = {
        (seen == 0).float().mean().item(): (pictures, seen != 0)
        for pictures, seen in zip(painted, patches, strict=True)
    }
    one_each[0.0] = (PICTURES, torch.ones(2, 16, dtype=torch.bool))  # not those that asked where patches lie
    total, count = torch.zeros(2, 16), torch.zeros(2, 16)
    for pictures, stood in one_each.values():
        total += attribute(model, pictures, 3).scores * stood
        count += stood
    torch.testing.assert_close(found, total / count, rtol=1e-4, atol=1e-6)


def test_seeds_and_batches():
    model = tiny_vit()
    whole = attribute(model, PICTURES, 3, "Occluded FullGrad+", passes=3).scores
    alone = attribute(model, PICTURES[1:], 3, "Occluded FullGrad+", passes=3).scores
    torch.testing.assert_close(whole[1:], alone, rtol=1e-4, atol=1e-6)
    other = attribute(model, PICTURES, 3, "Occluded FullGrad+", passes=3, seed=1).scores
    assert (other - whole).abs().max() > 1e-3
    one = attribute(model, PICTURES, 3, "Occluded FullGrad+", passes=1).scores
    torch.testing.assert_close(one, attribute(model, PICTURES, 3).scores)


@pytest.mark.parametrize(("options", "message"), [({"passes": 0}, "at least one pass"), ({"passes": 1.5}, "whole")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        attribute(tiny_vit(), PICTURES, 3, "Occluded FullGrad+", **options)


def test_texts_have_no_patches_to_paint():
    with pytest.raises(ValueError, match="paint patches of a picture"):
        attribute(tiny_llama(), torch.arange(6)[None], 3, "Occluded FullGrad+")
