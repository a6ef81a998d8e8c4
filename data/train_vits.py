"""Train a demo image model on GlyphScenes, from nothing, on a CPU; see its card, demo_NAME.md, for what came out.

python data/train_vits.py eva02               # trains, or goes on where an interrupted run stopped; then evaluates
python data/train_vits.py eva02 --evaluate    # the accuracies of the card, from the shipped checkpoint

All but the first ViT need PyTorch 2.9 or newer, whose optimizer Muon takes a tenth of the time.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import progress
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed, set_fused_attn
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from libragrad_minimal.demo_vits import SIDE, build
from libragrad_minimal.files import whole_file
from libragrad_minimal.models import load_demo
from libragrad_minimal.scenes import CLASSES, TRAINING_SEED, draw_scene

HERE = Path(__file__).parent
BATCH = 64
SAVE_EVERY = 250  # steps


@dataclass(frozen=True)
class Recipe:
    """Sizes of a model, and how it is trained."""

    sizes: dict[str, int]
    steps: int = 800
    refinement: int = 100  # the last steps, which make each logit speak of its own object only
    warm_up: int = 100
    learning_rate: float = 8e-3
    muon: bool = True  # for the matrices of the blocks; else AdamW for all
    other_patch: int | None = None  # every third step sees the pictures in patches of this size


def sizes(width: int, depth: int, heads: int) -> dict[str, int]:
    one = {"img_size": SIDE, "patch_size": 8, "num_classes": len(CLASSES)}
    return one | {"embed_dim": width, "depth": depth, "num_heads": heads}


SMALL = sizes(96, 4, 3)
RECIPES = {
    "vit": Recipe(sizes(128, 5, 4), 6600, 600, 500, 1e-3, muon=False),
    "vit_tiny": Recipe(sizes(48, 3, 3), 1600),
    "vit_small": Recipe(sizes(64, 4, 4), 1200),
    "vit_base": Recipe(SMALL, 1000),
    "eva02": Recipe(SMALL),
    "beitv2": Recipe(SMALL, 1000),
    "flexivit": Recipe(SMALL, 1100, other_patch=16),
    "siglip": Recipe(SMALL),
    "clip_vit": Recipe(SMALL),
    "deit3": Recipe(SMALL, 1000),  # LayerScale, which begins small, takes longer
    "mixer": Recipe({"img_size": SIDE, "patch_size": 8, "num_classes": len(CLASSES), "embed_dim": 96, "num_blocks": 5}),
}


class Scenes(Dataset):
    """Scene i is drawn from seed `first_seed` + i; its label shares 1 equally among the classes it shows."""

    def __init__(self, first_seed: int, count: int, objects: int | None = None):
        self.first_seed, self.count, self.objects = first_seed, count, objects

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        objects = self.objects or (1 if i % 3 == 0 else 2)  # two objects are harder, so they come twice as often
        scene = draw_scene(self.first_seed + i, objects)
        label = torch.zeros(len(CLASSES))
        label[scene.classes] = 1 / objects
        return torch.from_numpy(scene.image).permute(2, 0, 1) / 127.5 - 1, label


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Rises, stays, and falls to 0 over the last 40 %; rises once more, a little, for the refinement."""
    steps -= recipe.refinement
    if step >= steps:
        left = (steps + recipe.refinement - step) / recipe.refinement
        return 0.3 * recipe.learning_rate * min(1, (step - steps + 1) / 50, left)
    return recipe.learning_rate * min(1, (step + 1) / recipe.warm_up, (steps - step) / (0.4 * steps))


def optimizers_of(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW; and where the recipe says so, Muon for the weight matrices inside the blocks."""
    if not recipe.muon:
        return [torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True)]
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit("this recipe needs Muon: install PyTorch 2.9 or newer")
    parameters = dict(model.named_parameters())
    matrices = {n for n, p in parameters.items() if n.startswith("blocks.") and n.endswith(".weight") and p.ndim == 2}
    return [
        torch.optim.Muon([parameters[n] for n in sorted(matrices)], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [p for n, p in parameters.items() if n not in matrices], betas=(0.9, 0.98), weight_decay=0.01, fused=True
        ),
    ]


def shared_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy, 1 shared among the classes shown, less its lowest possible value: quick to learn with."""
    return F.cross_entropy(logits, labels) - torch.special.entr(labels).sum(1).mean()


def rival_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy of each class shown against the absent ones only.

    `shared_loss` wants both classes of a picture equally likely, so each object learns to steer the other's logit.
    Here the classes shown are no rivals: a logit is about its own object.
    """
    absent = logits.masked_fill(labels > 0, -torch.inf).logsumexp(1, keepdim=True)
    return (F.softplus(absent - logits) * labels).sum(1).mean()


def answer_in_patches(model: nn.Module, images: torch.Tensor, patch: int) -> torch.Tensor:
    """Logits as a FlexiViT gives them for patches of another size: its filters and positions resampled, by timm."""
    filters = model.patch_embed.proj
    side = SIDE // patch
    resampled = {
        "patch_embed.proj.weight": resample_patch_embed(filters.weight, [patch, patch]),
        "pos_embed": resample_abs_pos_embed(model.pos_embed, [side, side], num_prefix_tokens=0),
    }
    own, filters.stride = filters.stride, (patch, patch)
    try:
        return functional_call(model, resampled, images)
    finally:
        filters.stride = own


def train(name: str, steps: int, seed: int) -> None:
    recipe, file = RECIPES[name], progress.FOLDER / f"train_vits_{name}.pt"
    torch.manual_seed(seed)
    set_fused_attn(False)  # whose backward pass takes, on a CPU, half of a step's time
    model = build(name, recipe.sizes).train()
    optimizers = optimizers_of(model, recipe)
    done, seconds = 0, 0.0
    settings = {"steps": steps, "seed": seed}
    if saved := progress.saved(file, settings):
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        done, seconds = saved["done"], saved["seconds"]

    scenes = Scenes(TRAINING_SEED * (1 + seed), steps * BATCH)
    rest = range(done * BATCH, steps * BATCH)
    worker = {"num_workers": 1, "prefetch_factor": 8, "worker_init_fn": progress.end_with_the_run}
    batches = DataLoader(scenes, BATCH, sampler=rest, **worker)
    bar = tqdm(batches, initial=done, total=steps, unit="step")
    started, average = time.time(), None
    for images, labels in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, steps, recipe)
        with torch.autocast("cpu", torch.bfloat16):
            flexible = recipe.other_patch is not None and done % 3 == 2
            logits = answer_in_patches(model, images, recipe.other_patch) if flexible else model(images)
        loss = (shared_loss if done < steps - recipe.refinement else rival_loss)(logits.float(), labels)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        done += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}")
        if done % SAVE_EVERY == 0 or done == steps:
            state: dict[str, Any] = {"model": model.state_dict(), "done": done}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            state["seconds"] = seconds + time.time() - started
            progress.save(file, settings, state)
            bar.write(f"step {done}: loss {average:.4f}, {state['seconds'] / 60:.1f} minutes")
    save(name, model)


def save(name: str, model: nn.Module) -> None:
    """Write the weights as fp16, with all that load_demo needs to build the model again."""
    about = {"architecture": json.dumps(RECIPES[name].sizes), "class_names": json.dumps(CLASSES)}
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    with whole_file(checkpoint(name)) as unfinished:
        save_file(weights, unfinished, about)


def checkpoint(name: str) -> Path:
    return HERE / f"demo_{name}.safetensors"


@torch.no_grad()
def evaluate(name: str, count: int) -> None:
    """Print how often a lone object's class comes first, and how often the two classes of a scene are the top two."""
    model, other = load_demo(name).model, RECIPES[name].other_patch
    for objects, first_seed in ((1, 0), (2, 100_000)):
        right, in_other = 0, 0
        for images, labels in DataLoader(Scenes(first_seed, count, objects), 250):
            right += all_named(model(images), labels)
            in_other += all_named(answer_in_patches(model, images, other), labels) if other else 0
        also = f"; in patches of {other} pixels {100 * in_other / count:.1f} %" if other else ""
        print(f"{objects} object{'s' * (objects > 1)}: {100 * right / count:.1f} % of {count} unseen scenes{also}")


def all_named(logits: torch.Tensor, labels: torch.Tensor) -> int:
    """How many pictures' classes are the highest logits, as many as the picture shows."""
    top = logits.topk(int((labels[0] > 0).sum())).indices
    return int((labels.gather(1, top) > 0).all(dim=1).sum())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--steps", type=int, help=f"steps of {BATCH} scenes in all (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the scenes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the shipped checkpoint, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    if not options.evaluate:
        with progress.alone(checkpoint(options.name)):
            train(options.name, options.steps or RECIPES[options.name].steps, options.seed)
    evaluate(options.name, count=2000)
