"""Train the demo ViT on GlyphScenes, from nothing, on a CPU; see demo_vit.md for what came out.

python data/train_vit.py               # trains, or goes on where an interrupted run stopped; then evaluates
python data/train_vit.py --evaluate    # the accuracies of the card, from the shipped checkpoint
"""

import argparse
import json
import time
from pathlib import Path

import progress
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from libragrad_minimal.files import only_one, whole_file
from libragrad_minimal.models import load_demo
from libragrad_minimal.scenes import CLASSES, TRAINING_SEED, draw_scene

HERE = Path(__file__).parent
CHECKPOINT = HERE / "demo_vit.safetensors"
PROGRESS = progress.FOLDER / "train_vit.pt"
ARCHITECTURE = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 5,
    "num_heads": 4,
    "num_classes": len(CLASSES),
}
LEARNING_RATE, BATCH = 1e-3, 64
REFINEMENT = 600  # the last steps, which make each logit speak of its own object only


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


def learning_rate(step: int, steps: int) -> float:
    """Rises for 500 steps, stays, and falls to 0 over the last 40 %; rises once more, a little, for the refinement."""
    steps -= REFINEMENT
    if step >= steps:
        return 0.3 * LEARNING_RATE * min(1, (step - steps + 1) / 50, (steps + REFINEMENT - step) / REFINEMENT)
    return LEARNING_RATE * min(1, (step + 1) / 500, (steps - step) / (0.4 * steps))


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


def train(steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = VisionTransformer(**ARCHITECTURE).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    done, seconds = 0, 0.0
    settings = {"steps": steps, "seed": seed}
    if saved := progress.saved(PROGRESS, settings):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, seconds = saved["done"], saved["seconds"]

    scenes = Scenes(TRAINING_SEED * (1 + seed), steps * BATCH)
    rest = range(done * BATCH, steps * BATCH)
    worker = {"num_workers": 1, "prefetch_factor": 8, "worker_init_fn": progress.end_with_the_run}
    batches = DataLoader(scenes, BATCH, sampler=rest, **worker)
    bar = tqdm(batches, initial=done, total=steps, unit="step")
    started, average = time.time(), None
    for images, labels in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        loss = (shared_loss if done < steps - REFINEMENT else rival_loss)(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}")
        if done % 250 == 0 or done == steps:
            spent = seconds + time.time() - started
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done, "seconds": spent}
            progress.save(PROGRESS, settings, state)
            bar.write(f"step {done}: loss {average:.4f}, {spent / 60:.0f} minutes")
    save(model)


def save(model: VisionTransformer) -> None:
    """Write the weights as fp16, with all that load_demo needs to build the model again."""
    about = {"architecture": json.dumps(ARCHITECTURE), "class_names": json.dumps(CLASSES)}
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    with whole_file(CHECKPOINT) as unfinished:
        save_file(weights, unfinished, about)


@torch.no_grad()
def evaluate(count: int) -> None:
    """Print how often a lone object's class comes first, and how often the two classes of a scene are the top two."""
    model = load_demo("vit").model
    for objects, first_seed in ((1, 0), (2, 100_000)):
        right = 0
        for images, labels in DataLoader(Scenes(first_seed, count, objects), 250):
            top = model(images).topk(objects).indices
            right += (labels.gather(1, top) > 0).all(dim=1).sum().item()
        print(f"{objects} object{'s' * (objects > 1)}: {100 * right / count:.1f} % of {count} unseen scenes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=6600, help=f"steps of {BATCH} scenes in all (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the scenes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the shipped checkpoint, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    if not options.evaluate:
        try:
            with only_one(CHECKPOINT):
                train(options.steps, options.seed)
        except BlockingIOError as error:
            parser.error(str(error))
    evaluate(count=2000)
