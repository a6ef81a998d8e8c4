"""Train the demo CLIP on GlyphScenes with generated captions, on a CPU; see demo_clip.md for what came out.

python data/train_clip.py               # trains, or goes on where an interrupted run stopped; then evaluates
python data/train_clip.py --evaluate    # the accuracies of the card, from the shipped checkpoint

The image tower starts from the demo ViT (data/demo_vit.safetensors), which knows the glyphs already.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import open_clip
import progress
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from libragrad_minimal.checkpoints import read_checkpoint
from libragrad_minimal.files import whole_file
from libragrad_minimal.models import load_demo
from libragrad_minimal.scenes import CLASSES, COLOURS, TRAINING_SEED, Scene, caption, draw_scene

HERE = Path(__file__).parent
CHECKPOINT = HERE / "demo_clip.safetensors"
DEMO_VIT = HERE / "demo_vit.safetensors"
PROGRESS = progress.FOLDER / "train_clip.pt"
ARCHITECTURE = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "layers": 5, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
LEARNING_RATE, BATCH = 1e-3, 64
LARGEST_SCALE = 100  # of the logits, as in CLIP
NAMES = tuple(COLOURS)
PHRASES = [f"a {colour} {kind}" for colour in NAMES for kind in CLASSES]
TEMPLATES = ("{}", "{}", "{}", "a photo of {}", "the picture shows {}", "there is {} here")

# ---- words -----------------------------------------------------------------------------------------------------------

TOKENIZER = open_clip.SimpleTokenizer(context_length=ARCHITECTURE["text_cfg"]["context_length"])
# Only these tokens get an embedding of their own. All others share one, "unknown", which the templates' words train: so
# any text is accepted, words the model can't know do no harm, and the file holds 25 rows instead of 49,408.
WORDS = TOKENIZER.encode(" ".join(["a, and", *NAMES, *CLASSES]))
VOCABULARY = sorted(
    {*WORDS, TOKENIZER.sot_token_id, TOKENIZER.eot_token_id}
)  # sorted, so that the end stays the highest
ROW = torch.zeros(ARCHITECTURE["text_cfg"]["vocab_size"], dtype=torch.long)
ROW[VOCABULARY] = torch.arange(1, len(VOCABULARY) + 1)


def tokens(captions: list[str]) -> Tensor:
    """Captions -> rows of the small embedding table, (captions, context length)."""
    return ROW[TOKENIZER(captions)]


def varied(captions: list[str], rng: np.random.Generator) -> list[str]:
    return [
        TEMPLATES[i].format(text)
        for text, i in zip(captions, rng.integers(len(TEMPLATES), size=len(captions)), strict=True)
    ]


def swapped(scene: Scene) -> str:
    """The scene's caption with its colours moved on by one object: same words, wrong for all who see the difference."""
    return caption(Scene(scene.image, scene.masks, scene.classes, np.roll(scene.colours, 1)))


# ---- scenes ----------------------------------------------------------------------------------------------------------


def draw_confusable(seed: int) -> Scene:
    """Three objects such as a red heart, a blue heart and a red star: "a blue star" is wrong, none of its words is."""
    rng = np.random.default_rng([seed, 1])
    one, other = rng.permutation(CLASSES)[:2]
    red, blue = rng.permutation(NAMES)[:2]
    return draw_scene(seed, classes=[one, one, other], colours=[red, blue, red])


class Scenes(Dataset):
    """Scene i is drawn from seed `first_seed` + i: one, two, three objects, and three that invite confusion."""

    def __init__(self, first_seed: int, count: int):
        self.first_seed, self.count = first_seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Scene:
        seed, objects = self.first_seed + i, 1 + i % 4
        return draw_scene(seed, objects) if objects <= 3 else draw_confusable(seed)


def pixels(scenes: list[Scene]) -> Tensor:
    """(scenes, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1


# ---- what is true of what --------------------------------------------------------------------------------------------


def truths(scenes: list[Scene]) -> dict[str, tuple[list[str], Tensor]]:
    """Groups of captions that rival each other, and for each a table (scenes, captions) of what is true.

    Every phrase is a caption of every batch, so a scene with a red heart and a blue star always meets "a blue heart".
    """
    pairs = torch.zeros(len(scenes), len(NAMES), len(CLASSES))
    for row, scene in zip(pairs, scenes, strict=True):
        row[scene.colours, scene.classes] = 1
    own = torch.cat([torch.eye(len(scenes)), torch.zeros(len(scenes), len(scenes))], 1)
    swaps = [swapped(scene) for scene in scenes]
    complete = [caption(scene) for scene in scenes]
    for i, text in enumerate(swaps):  # a lone object's, and that of two in one colour, change nothing
        if text == complete[i]:
            swaps[i] = complete[i - 1]
    return {
        "phrases": (PHRASES, pairs.flatten(1)),
        "objects": ([f"a {kind}" for kind in CLASSES], pairs.amax(1)),
        "colours": ([f"something {colour}" for colour in NAMES], pairs.amax(2)),
        "complete": (complete + swaps, own),
    }


def spread_cross_entropy(logits: Tensor, true: Tensor) -> Tensor:
    """Cross entropy of each row, 1 shared equally among what is true in it; less the least it can be."""
    rows = true.sum(1) > 0
    share = true[rows] / true[rows].sum(1, keepdim=True)
    return F.cross_entropy(logits[rows], share) - torch.special.entr(share).sum(1).mean()


def contrastive_loss(model: CLIP, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """CLIP's loss, from images to captions and back, over every group of captions."""
    groups = truths(scenes)
    texts = tokens(varied([text for captions, _ in groups.values() for text in captions], rng))
    with (
        torch.autocast("cpu", torch.bfloat16),
        sdpa_kernel(SDPBackend.MATH),
    ):  # fused attention is slower on so few tokens
        images, captions = model.encode_image(pixels(scenes)), model.encode_text(texts)
    logits = model.logit_scale.exp() * F.normalize(images.float(), dim=1) @ F.normalize(captions.float(), dim=1).T
    tables = logits.split([len(captions) for captions, _ in groups.values()], dim=1)
    losses = [
        spread_cross_entropy(table, true) + spread_cross_entropy(table.T, true.T)
        for table, (_, true) in zip(tables, groups.values(), strict=True)
    ]
    return sum(losses) / (2 * len(losses)) + binding_loss(
        tables[0], *(groups[g][1] for g in ("phrases", "objects", "colours"))
    )


def binding_loss(logits: Tensor, true: Tensor, objects: Tensor, colours: Tensor) -> Tensor:
    """Cross entropy among those phrases (scenes, 72) whose words all fit the scene: whose colour is whose?"""
    words_fit = (colours[:, :, None] * objects[:, None, :]).flatten(1) > 0
    return spread_cross_entropy(logits.masked_fill(~words_fit, -100), true)


# ---- training --------------------------------------------------------------------------------------------------------


def build() -> CLIP:
    """The model with the small embedding table."""
    text_cfg = {**ARCHITECTURE["text_cfg"], "vocab_size": 1 + len(VOCABULARY)}
    return CLIP(**{**ARCHITECTURE, "text_cfg": text_cfg})


@torch.no_grad()
def start_from_vit(model: CLIP) -> None:
    """Copy the demo ViT into the image tower: other names, no bias of the patches, a norm before the first block."""
    vit = read_checkpoint(DEMO_VIT).tensors
    names = {
        "norm1": "ln_1",
        "attn.proj": "attn.out_proj",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    names = {f"{old}.{part}": f"{new}.{part}" for old, new in names.items() for part in ("weight", "bias")}
    names |= {"attn.qkv.weight": "attn.in_proj_weight", "attn.qkv.bias": "attn.in_proj_bias"}
    copied = {"conv1.weight": vit["patch_embed.proj.weight"], "class_embedding": vit["cls_token"][0, 0]}
    positions = vit["pos_embed"][0].clone()
    positions[1:] += vit["patch_embed.proj.bias"]
    copied["positional_embedding"] = positions
    for layer in range(ARCHITECTURE["vision_cfg"]["layers"]):
        for old, new in names.items():
            copied[f"transformer.resblocks.{layer}.{new}"] = vit[f"blocks.{layer}.{old}"]
    copied |= {"ln_post.weight": vit["norm.weight"], "ln_post.bias": vit["norm.bias"]}
    left_out = model.visual.load_state_dict(copied, strict=False)
    assert not left_out.unexpected_keys and set(left_out.missing_keys) == {"ln_pre.weight", "ln_pre.bias", "proj"}

    tower, seen = model.visual, []
    watch = tower.ln_pre.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tower(pixels([draw_scene(TRAINING_SEED + i, 2) for i in range(BATCH)]))
    watch.remove()
    tower.ln_pre.weight.fill_(seen[0].std(-1).mean())  # so that the first block finds tokens of the length it knows


def learning_rate(step: int, steps: int) -> float:
    """Rises for 300 steps, stays, and falls to 0 over the last 40 %."""
    return LEARNING_RATE * min(1, (step + 1) / 300, (steps - step) / (0.4 * steps))


def train(steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = build().train()
    start_from_vit(model)
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    done, seconds = 0, 0.0
    settings = {"steps": steps, "seed": seed}
    if saved := progress.saved(PROGRESS, settings):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, seconds = saved["done"], saved["seconds"]

    scenes = Scenes(TRAINING_SEED * (3 + seed), steps * BATCH)  # the demo ViT saw others
    rest = range(done * BATCH, steps * BATCH)
    worker = {"num_workers": 1, "prefetch_factor": 8, "worker_init_fn": progress.end_with_the_run}
    batches = DataLoader(scenes, BATCH, sampler=rest, collate_fn=list, **worker)
    bar = tqdm(batches, initial=done, total=steps, unit="step")
    started, average = time.time(), None
    for batch in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, steps)
        loss = contrastive_loss(model, batch, np.random.default_rng([seed, done]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=np.log(LARGEST_SCALE))
        done += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}", scale=f"{model.logit_scale.exp().item():.1f}")
        if done % 250 == 0 or done == steps:
            spent = seconds + time.time() - started
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done, "seconds": spent}
            progress.save(PROGRESS, settings, state)
            print(f"\nstep {done}: loss {average:.4f}, {spent / 60:.0f} minutes", flush=True)
    save(model)


def save(model: CLIP) -> None:
    """Write the weights as fp16, with all that load_demo needs to build the model again."""
    about = {"architecture": json.dumps(ARCHITECTURE), "vocabulary": json.dumps(VOCABULARY)}
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    with whole_file(CHECKPOINT) as unfinished:
        save_file(weights, unfinished, about)


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(count: int) -> None:
    """Print how well the shipped model retrieves captions, and whether it knows whose colour is whose."""
    loaded = load_demo("clip")

    def similarities(scenes: list[Scene], captions: list[str]) -> Tensor:
        images = F.normalize(loaded.model.encode_image(pixels(scenes)), dim=1)
        return images @ F.normalize(loaded.model.encode_text(loaded.tokenizer(captions)), dim=1).T

    to_caption, to_image = [], []
    for first_seed in range(0, count, 64):
        scenes = [draw_scene(seed, 1 + seed % 3) for seed in range(first_seed, first_seed + 64)]
        captions = [caption(scene) for scene in scenes]
        table = similarities(scenes, captions)
        to_caption += [captions[best] == own for best, own in zip(table.argmax(1), captions, strict=True)]
        to_image += [captions[best] == own for best, own in zip(table.argmax(0), captions, strict=True)]
    print(f"caption of an image, among 64 scenes of 1 to 3 objects: {percent(to_caption)}")
    print(f"image of a caption, among 64 scenes of 1 to 3 objects: {percent(to_image)}")

    confusable = [draw_confusable(seed) for seed in range(100_000, 100_000 + count)]
    first, second, wrong = (
        paired(similarities, confusable, [f"a {NAMES[s.colours[c]]} {CLASSES[s.classes[k]]}" for s in confusable])
        for c, k in ((0, 0), (1, 1), (1, 2))
    )
    right = torch.cat([first > wrong, second > wrong]).tolist()
    print(f'"a red heart" above "a blue star", beside a red heart, a blue heart and a red star: {percent(right)}')

    two = [draw_scene(seed, 2) for seed in range(200_000, 200_000 + count)]
    two = [scene for scene in two if scene.colours[0] != scene.colours[1]]
    above = paired(similarities, two, [caption(s) for s in two]) > paired(similarities, two, [swapped(s) for s in two])
    print(f"the caption of two objects above the one with their colours swapped: {percent(above.tolist())}")


def paired(similarities, scenes: list[Scene], captions: list[str]) -> Tensor:
    return torch.cat(
        [similarities(scenes[i : i + 250], captions[i : i + 250]).diagonal() for i in range(0, len(scenes), 250)]
    )


def percent(right: list[bool]) -> str:
    return f"{100 * np.mean(right):.1f} % of {len(right)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=3000, help=f"steps of {BATCH} scenes in all (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the scenes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the shipped checkpoint, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    if not options.evaluate:
        with progress.alone(CHECKPOINT):
            train(options.steps, options.seed)
    evaluate(count=1984)
