"""The command `benchmark` against the loop one would write first: equal results, how much faster, where does it go?

python tests/benchmarks/whole_benchmark.py                # the demo ViT, eight scenes
python tests/benchmarks/whole_benchmark.py --pictures 16

The loop explains picture by picture, method by method and rules by rules, and takes patches away one curve at a time,
by both protocols; the command shares passes among methods and runs pictures in batches. Each has all threads.

Two cores, torch 2.14, November 2026: 31 s for the loop and 4.0 to 4.1 for the command (7.2 and 7.5 times faster, 98 %
of it inside the model).
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from deletion import drop, paint
from measuring import Inside
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


def by_the_command(of, examples, settings):
    """What `benchmark.run` does with its first batch."""
    with benchmark.one_thread_each() as threads:
        return batches.measured(of, examples, replace(settings, threads=threads))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3, help="how often both are timed in turn (default: 3)")
    args = parser.parse_args()
    settings = batches.Settings("vit", f"scenes:{args.pictures}", METHODS, RULES, metrics=("deletion",), target="true")
    of = benchmark.subject(benchmark.load("vit", torch.device("cpu")))
    examples = benchmark.open_data(settings.data, of.loaded)
    model = of.loaded.model
    batch, _ = batches.opened(of, examples, settings)
    classes, side = batch.explained("true"), model.patch_embed.grid_size[0]

    by_the_command(of, examples, settings)  # warm up: where the blocks are is known from now on
    fast, slow, inside = [], [], Inside()
    for _ in tqdm(range(args.pairs), disable=None):
        # the model's forward and backward passes; its gradients are `libra_grad` under either rules
        model.forward, libra_grad = inside.watched(model.forward), recording.libra_grad
        recording.libra_grad = inside.watched(libra_grad)
        start = time.perf_counter()
        table = by_the_command(of, examples, settings)
        fast.append(time.perf_counter() - start)
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
    print(f"share of the command's time inside the model: {100 * inside.total / sum(fast):.0f} %")
    assert worst < 1e-3


if __name__ == "__main__":
    main()
