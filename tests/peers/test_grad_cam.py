"""pytorch-grad-cam (Gildenblat): class activation maps of one block, before it cuts off what is negative."""

import copy

import pytest
import torch
from models import PICTURES

from libragrad_minimal import PLAIN, attribute

grad_cam = pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam", exc_type=ImportError)


@pytest.mark.parametrize(
    "method, theirs", [("GradCAM", "GradCAM"), ("GradCAM++", "GradCAMPlusPlus"), ("XGradCAM", "XGradCAM")]
)
@pytest.mark.parametrize("layer", [1, 2])
def test_maps_of_one_block(steep, method, theirs, layer):
    compare(steep, method, theirs, layer)


@pytest.mark.parametrize("layer", [1, 2])
def test_hirescam(steep, layer):
    compare(steep, "HiResCAM", "HiResCAM", layer)


@pytest.fixture
def steep(vit):
    """In double precision, with gradients so large that what it adds to its sums, 1e-7 or 1e-6, doesn't count."""
    vit = copy.deepcopy(vit).double()
    with torch.no_grad():
        vit.head.weight *= 1e4
    return vit


def compare(vit, method, theirs, layer):
    pictures = PICTURES.double()
    entering = vit.blocks[layer - 1]  # its output is what the layer is given
    targets = [grad_cam.utils.model_targets.ClassifierOutputTarget(3)] * 2

    def patches(tokens):
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    with getattr(grad_cam, theirs)(vit, [entering], reshape_transform=patches) as cam:
        cam(pictures, targets)
        seen = cam.activations_and_grads
        parts = (seen.activations[0].numpy(), seen.gradients[0].numpy())
        expected = torch.as_tensor(cam.get_cam_image(pictures, entering, targets, *parts, False))
    ours = attribute(vit, pictures, 3, method, PLAIN, layer=layer).maps
    scale = expected.abs().max()
    torch.testing.assert_close(ours / scale, expected / scale, rtol=0, atol=1e-5)
