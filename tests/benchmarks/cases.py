"""The models whose passes are measured, with random weights, which doesn't change what they cost.

Libraries are imported where a case is built: the venv in which lxt runs needs transformers only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Case:
    """A model, what goes in, and the number that is explained."""

    model: torch.nn.Module
    inputs: torch.Tensor
    output: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

    def forward(self) -> torch.Tensor:
        return self.output(self.model, self.inputs)

    def explain(self, gradient: Callable, **options):
        """One forward and one backward pass; `gradient` is torch.autograd.grad or is called like it."""
        return gradient(self.forward(), self.inputs, **options)

    def freeze(self, frozen: bool) -> None:
        """Frozen parameters leave other nodes in the graph, and less is saved for them."""
        self.model.requires_grad_(not frozen)


def vit(device: str, batch: int, name: str = "vit_base_patch16_224", **shape) -> Case:
    import timm

    model = timm.create_model(name, pretrained=False, **shape).eval().to(device)
    images = torch.randn(batch, 3, *model.patch_embed.img_size, device=device, requires_grad=True)
    return Case(model, images, lambda model, images: model(images)[:, 0].sum())


def clip(device: str, **shape) -> Case:
    """The similarity of an image with one direction of text; the text's own encoder isn't run, so one layer will do."""
    import open_clip

    config = open_clip.get_model_config("ViT-L-14")
    vision, text = config["vision_cfg"] | shape, config["text_cfg"] | {"layers": 1}
    model = open_clip.CLIP(config["embed_dim"], vision, text).eval().to(device)
    direction = torch.nn.functional.normalize(torch.randn(config["embed_dim"], device=device), dim=0)
    images = torch.randn(1, 3, *model.visual.image_size, device=device, requires_grad=True)
    return Case(model, images, lambda model, images: (model.encode_image(images, normalize=True) @ direction).sum())


def llama(device: str, tokens: int, **shape) -> Case:
    """Four layers of Llama 3.2 1B's width, from the embeddings to one logit of the last token."""
    import transformers

    config = dict(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, head_dim=64)
    config |= dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, use_cache=False)
    config = transformers.LlamaConfig(**(config | shape))
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
        embeddings = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
    return Case(model, embeddings, lambda model, x: model(inputs_embeds=x, logits_to_keep=1).logits[0, -1, 0])


CASES = {
    "ViT-B/16, batch 1": lambda device: vit(device, 1),
    "ViT-B/16, batch 8": lambda device: vit(device, 8),
    "CLIP ViT-L/14, batch 1": lambda device: clip(device),
    "Llama 1B width, 4 layers, 256 tokens": lambda device: llama(device, 256),
    "Llama 1B width, 4 layers, 1,024 tokens": lambda device: llama(device, 1024),
}
TINY_LLAMA = dict(vocab_size=100, hidden_size=64, intermediate_size=256, num_attention_heads=1, num_key_value_heads=1)
QUICK_CASES = {
    "ViT, tiny": lambda device: vit(device, 2, "vit_tiny_patch16_224", depth=2, img_size=96),
    "CLIP, tiny": lambda device: clip(device, width=192, layers=2, patch_size=16, image_size=96),
    "Llama, tiny": lambda device: llama(device, 64, **TINY_LLAMA),
}
