"""The command `benchmark` against the loop one would write first: equal results, how much faster, where does it go?

python tests/benchmarks/whole_benchmark.py                # the demo ViT, eight scenes
python tests/benchmarks/whole_benchmark.py --pictures 16

The loop explains picture by picture, method by method and rules by rules, and takes patches away one curve at a time,
by both protocols; the command shares passes among methods and runs pictures in batches. Both have the same threads.

Two cores, torch 2.14, November 2026: 33 s for the loop and 4.5 for the command with two threads (7.4 times faster, 95 %
of it inside the model), 35 and 8.9 with one (4.0 times, 97 %): pictures one at a time gain nothing from the second.
"""

import argparse
import statistics
import time

import torch
from deletion import drop, paint
from tqdm import tqdm

from libragrad_minimal import attribute, batches, benchmark, recording
from libragrad_minimal.methods import NAMED_RULES

METHODS = ("IxG", "FullGrad+", "FullGrad", "GradCAM+", "XGradCAM+", "AttCAT", "GenAtt", "TokenTM")
RULES = ("plain", "libra")
PROTOCOLS = {"drop tokens": drop, "occlude patches": paint}


def by_a_loop(model, images, classes, side):
    """The SRG of each logit: example, method, rules and protocol -> a number."""
    found = {}
    for rules in RULES:
        for method in METHODS:
            for i, image in enumerate(images):
                scores = attribute(model, image[None], int(classes[i]), method, rules=NAMED_RULES[rules]).maps.flatten()
                for protocol, answer in PROTOCOLS.items():
                    mean = {}
                    for descending in (True, False):
                        ranked = scores.argsort(descending=descending, stable=True).tolist()
                        gone = [ranked[: tenth * len(ranked) // 10] for tenth in range(1, 10)]
                        with torch.no_grad():
                            logits = [answer(model, image, patches, side)[classes[i]].item() for patches in gone]
                        mean[descending] = sum(logits) / len(logits)
                    found[i, method, rules, protocol] = mean[False] - mean[True]
    return found


class timed:
    """Adds up the time inside a function, calls within calls counted once."""

    total, depth = 0.0, 0

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        start, timed.depth = time.perf_counter(), timed.depth + 1
        try:
            return self.function(*args, **kwargs)
        finally:
            timed.depth -= 1
            if not timed.depth:
                timed.total += time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3, help="how often both are timed in turn (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = batches.Settings("vit", f"scenes:{args.pictures}", METHODS, RULES, metrics=("deletion",), target="true")
    of = benchmark.subject(benchmark.load("vit", torch.device("cpu")))
    examples = benchmark.open_data(settings.data, of.loaded)
    model = of.loaded.model
    batch, _ = batches.opened(of, examples, settings)
    classes, side = batch.explained("true"), model.patch_embed.grid_size[0]

    batches.measured(of, examples, settings)  # warm up: where the blocks are is known from now on
    fast, slow, inside = [], [], []
    for _ in tqdm(range(args.pairs), disable=None):
        # the model's forward and backward passes; its gradients are `libra_grad` under either rules
        model.forward, libra_grad = timed(model.forward), recording.libra_grad
        recording.libra_grad, timed.total = timed(libra_grad), 0.0
        start = time.perf_counter()
        table = batches.measured(of, examples, settings)
        fast.append(time.perf_counter() - start)
        inside.append(timed.total)
        recording.libra_grad = libra_grad
        del model.forward
        start = time.perf_counter()
        expected = by_a_loop(model, batch.inputs, classes, side)
        slow.append(time.perf_counter() - start)

    table = table[table["metric"] == "SRG (logit)"].set_index(["example", "method", "rules", "protocol"])["value"]
    worst = max(abs(table[(batch.names[i], *run)] - value) for (i, *run), value in expected.items())
    ratio = statistics.median(s / f for s, f in zip(slow, fast, strict=True))
    print(f"{len(expected)} values, largest difference {worst:.1e}")
    print(f"loop {statistics.median(slow):.1f} s, command {statistics.median(fast):.1f} s: {ratio:.1f} times faster")
    print(f"share of the command's time inside the model: {100 * sum(inside) / sum(fast):.0f} %")
    assert worst < 1e-3


if __name__ == "__main__":
    main()
