"""Libra gradients are complete on untouched models of other libraries: random weights, tiny configs, both precisions.

<input, gradient> plus <constant, gradient> over all additive constants must give the logit, and the forward pass must
not notice.
"""

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from completeness import relative_error
from models import LLAMA, TEXT, VIT, image_tower, perturbed, tiny_clip
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from libragrad_minimal import PLAIN, audit, libra_grad

SMALL_VIT = VIT | dict(depth=2)
TIMM = {
    "vit_tiny_patch16_224": SMALL_VIT,
    "deit3_small_patch16_224": SMALL_VIT,
    "beitv2_base_patch16_224": SMALL_VIT,
    "eva02_tiny_patch14_224": SMALL_VIT,
    "flexivit_small": SMALL_VIT,
    "vit_base_patch16_siglip_224": SMALL_VIT,
    "vit_base_patch16_clip_224": SMALL_VIT,
    "vit_small_patch14_reg4_dinov2": SMALL_VIT,
    "mixer_s16_224": dict(img_size=32, num_classes=5),
    "swin_tiny_patch4_window7_224": dict(img_size=56, embed_dim=12, depths=(2, 2), num_heads=(1, 2), num_classes=5),
    "cait_xxs24_224": dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5),
    "xcit_nano_12_p16_224": dict(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5),
    "tnt_s_patch16_224": dict(img_size=32, depth=2, num_classes=5),
    "gmlp_ti16_224": dict(img_size=32, num_classes=5),
    "resmlp_12_224": dict(img_size=32, num_classes=5),
    "convnextv2_atto": dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 24), num_classes=5),
    "mobilenetv3_small_050": dict(num_classes=5),
    "efficientformer_l1": dict(num_classes=5),
    "mvitv2_tiny": dict(num_classes=5),
    "maxvit_tiny_tf_224": dict(num_classes=5),
    "gcvit_xxtiny": dict(num_classes=5),
}
WHOLE = ("efficientformer_l1", "mvitv2_tiny", "maxvit_tiny_tf_224", "gcvit_xxtiny")  # no small configuration: full size

SPECIAL_TOKENS = dict(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
DECODERS = {
    "Llama": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": LLAMA | dict(head_dim=8),
    "Mistral": LLAMA,
    "Mixtral": LLAMA | dict(num_local_experts=4),
    "Gemma2": LLAMA | dict(head_dim=8),
    "Gemma3Text": LLAMA | dict(head_dim=8),
    "Phi3": LLAMA,
    "Olmo2": LLAMA,
    "Cohere": LLAMA,
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, vocab_size=200, n_positions=64),
    "GPTNeoX": TEXT,
    "Bloom": dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=200),
}
FUSED_TOO = [name for name in DECODERS if name not in ("Gemma2", "Bloom")]  # transformers offers no sdpa for these


class Float64(TorchFunctionMode):
    """transformers' norms compute in float32 whatever the model's dtype: send them to float64 instead."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, dtype, tolerance):
    if name in WHOLE and dtype == torch.float32:
        pytest.skip("full-size model: once, in float64, is enough")
    model = perturbed(timm.create_model(name, **TIMM[name]), 0.05).to(dtype)
    size = TIMM[name].get("img_size", 224 if name in WHOLE else 64)
    images = torch.randn(1 if name in WHOLE else 2, 3, size, size, dtype=dtype, requires_grad=True)
    before = model(images)
    assert relative_error(before[:, 1], images) <= tolerance
    assert torch.equal(model(images), before)
    assert audit(model(images)[:, 1], images).complete


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_transformers(name, attention):
    if attention == "sdpa" and name not in FUSED_TOO:
        pytest.skip(f"transformers has no sdpa for {name}")
    transformers.logging.set_verbosity_error()
    config = getattr(transformers, f"{name}Config")(**DECODERS[name], **SPECIAL_TOKENS)
    model = perturbed(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention))
    tokens = torch.randint(3, 64, (2, 7))
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    before = model(inputs_embeds=embeddings).logits
    assert relative_error(before[:, -1, 5], embeddings) <= 1e-5
    assert relative_error(before[:, -1, 5], embeddings, PLAIN) > 1e-3  # the check can fail
    assert torch.equal(model(inputs_embeds=embeddings).logits, before)
    model, embeddings = model.double(), embeddings.detach().double().requires_grad_()
    if name == "Mixtral":
        model.set_experts_implementation("eager")  # there are no grouped matrix products in float64
    with Float64():
        output = model(inputs_embeds=embeddings).logits[:, -1, 5]
    assert relative_error(output, embeddings) <= 1e-9


def test_padding_gets_exactly_zero():
    """Attention masks: a padded position gets no gradient at all, and the others what they get alone."""
    config = transformers.LlamaConfig(**LLAMA, **SPECIAL_TOKENS)
    model = perturbed(transformers.LlamaForCausalLM(config), 0.05).double()
    tokens = torch.randint(3, 64, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embed = model.get_input_embeddings()
    alone, together = embed(tokens).detach().requires_grad_(), embed(padded).detach().requires_grad_()
    output = model(inputs_embeds=alone).logits[:, -1, 7]
    with_padding = model(inputs_embeds=together, attention_mask=mask, position_ids=positions).logits[:, -1, 7]
    expected, gradient = libra_grad(output, alone)[0], libra_grad(with_padding, together)[0]
    assert (gradient[:, :3] == 0).all()
    torch.testing.assert_close(gradient[:, 3:], expected, rtol=1e-5, atol=1e-7)


# ---- towers of CLIP --------------------------------------------------------------------------------------------------


def cosine_with_a_prompt(features: Tensor) -> Tensor:
    """With a vector at about 45 degrees: a cosine near 0 would make any relative error large."""
    other = F.normalize(features.detach(), dim=-1) + F.normalize(torch.randn_like(features), dim=-1)
    return (F.normalize(features, dim=-1) * F.normalize(other, dim=-1)).sum()


@pytest.mark.parametrize(
    "name",
    ["ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-B-16-SigLIP", "EVA02-B-16", "coca_ViT-B-32"],
)
def test_image_towers_are_complete(name):
    model = image_tower(name)
    size = model.visual.image_size
    image = torch.randn(1, 3, *(size if isinstance(size, tuple) else (size, size)), requires_grad=True)
    features = model.encode_image(image)
    f = cosine_with_a_prompt(features[0] if isinstance(features, tuple) else features)
    assert audit(f, image).complete
    assert relative_error(f, image) <= 1e-4
    assert relative_error(f, image, PLAIN) > 1e-2  # so the test can fail


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_text_towers_are_complete(quick_gelu):
    model = tiny_clip(quick_gelu=quick_gelu)
    words = []
    model.token_embedding.register_forward_hook(lambda layer, ids, vectors: words.append(vectors))
    f = cosine_with_a_prompt(model.encode_text(open_clip.tokenize(["a red heart"], 8)))
    assert relative_error(f, words[0]) <= 1e-4


def transformers_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=small, vision_config=vision, projection_dim=24))


def transformers_siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    text = {**small, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize("build", [transformers_clip, transformers_siglip])
def test_transformers_models_are_complete(build):
    model = perturbed(build())
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    ids = torch.tensor([[5, 6, 7, model.config.text_config.eos_token_id]])
    f = model(input_ids=ids, pixel_values=image).logits_per_image[0, 0]
    assert relative_error(f, image) <= 1e-4


# ---- the real models beside a developer's checkout -------------------------------------------------------------------


def test_real_vit_on_a_photograph(shared):
    from skimage import data

    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=True).eval()
    photo = torch.from_numpy(data.chelsea()[:, 75:375].copy()).permute(2, 0, 1)[None] / 255
    photo = torch.nn.functional.interpolate(photo, (224, 224), mode="bicubic", antialias=True)
    image = ((photo - 0.5) / 0.5).requires_grad_()
    logits = model(image)
    assert logits.argmax().item() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    output = logits[:, logits.argmax()]
    assert relative_error(output, image) < 1e-4
    assert relative_error(output, image, PLAIN) > 0.2


def test_real_llama_on_a_story(shared):
    folder = shared / "models" / "stories260K"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer("Once upon a time, there was a little girl named", return_tensors="pt").input_ids
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits[:, -1]
    assert tokenizer.decode(logits.argmax()).strip() in "Lily"
    output = logits[:, logits.argmax()]
    assert relative_error(output, embeddings) < 1e-4
    assert relative_error(output, embeddings, PLAIN) > 0.1
