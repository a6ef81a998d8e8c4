"""What batching saves in activation patching, and what its estimate by one gradient costs.

    python tests/benchmarks/patching.py                              # the demo Llama; a minute on one core
    python tests/benchmarks/patching.py --model ../shared/models/smollm2-135m-instruct --pairs 2
    python tests/benchmarks/patching.py --model ... --pairs 1 --long --sites heads   # 63 tokens; no naive loop
    python tests/benchmarks/patching.py --quick                      # one pair, seconds: does it still run?

The naive loop is the one that is written on a blackboard: for every layer and position a hook that puts the corrupt
activation in, and one forward pass. In every pair each runs once, in turns forwards and backwards.

Measured on one thread, torch 2.14:

- demo Llama, 4 layers, 25 tokens, MLPs, medians of 5: naive loop 2.65 s, patching 0.28 s (9.3 x), estimate 0.16 s.
- SmolLM2-135M, 30 layers, 16 tokens, MLPs, once: naive loop 299 s, patching 42.8 s (7.0 x), estimate 2.5 s (120 x).
- SmolLM2-135M, 63 tokens, another machine: MLPs, patching 19 and 25 s, estimate 0.75 s (25 and 34 x patching's speed);
  the naive loop's 1,890 runs at 0.28 s each would take about 520 s (20 and 28 x patching's time, 700 x the estimate's).
  Heads: patching 268 s, estimate 1.26 s (214 x patching's speed).

What the estimate saves grows with the number of parts: it takes the time of three to five runs of the model, however
many parts there are; patching takes a share of a run for each.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from libragrad_minimal.circuits import attribution_patching, patching
from libragrad_minimal.models import load_demo, load_pretrained

STORY = "Anna has a red ball. Ben has a {} kite. Carl comes from Peru. What colour is Ben's kite?"
LONG = (
    "Anna went to the market early in the morning, bought bread, cheese, apples and a newspaper, met an old friend "
    "from school, talked for a while about the weather, and walked home along the river before it began to rain. "
)
FACT = "When Mary and John went to the store, {} gave a bottle of milk to"
# Where the prompts differ in the beginning, nearly every position can be patched.
LONG_FACT = "{} bought a red kite. " + LONG + "The red kite was bought by"


@dataclass(frozen=True)
class Question:
    """A model of Llama's kind, two prompts, and what is asked."""

    model: nn.Module
    clean: dict[str, Tensor]
    corrupt: dict[str, Tensor]
    metric: Callable[[Tensor], Tensor]


def question(model: nn.Module, tokenizer, text: str, words: tuple[str, str], answers: tuple[str, str]) -> Question:
    prompts = [dict(tokenizer(text.format(word), return_tensors="pt")) for word in words]
    right, wrong = (tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in answers)
    return Question(model, *prompts, lambda logits: logits[..., right] - logits[..., wrong])


def demo() -> Question:
    loaded = load_demo("llama")
    return question(loaded.model, loaded.tokenizer, STORY, ("blue", "green"), (" blue", " green"))


def from_folder(folder: Path, long: bool) -> Question:
    """A language model from a folder that holds a GGUF file, or transformers' own files."""
    loaded = load_pretrained("llama", str(folder))
    model, tokenizer = loaded.model.float(), loaded.tokenizer
    if long:
        return question(model, tokenizer, LONG_FACT, ("John", "Mary"), (" John", " Mary"))
    return question(model, tokenizer, FACT, ("John", "Mary"), (" Mary", " John"))


def naive_patching(asked: Question) -> Tensor:
    """(layers, positions) for the MLPs: one forward pass each."""
    modules = [block.mlp for block in asked.model.model.layers]
    kept: list[Tensor] = []
    with torch.no_grad():
        hooks = [module.register_forward_hook(lambda module, args, result: kept.append(result)) for module in modules]
        asked.model(**asked.corrupt)
        for hook in hooks:
            hook.remove()
        before = asked.metric(asked.model(**asked.clean).logits[:, -1]).item()
        effect = torch.zeros(len(modules), kept[0].shape[1])
        for layer, module in enumerate(modules):
            for position in range(effect.shape[1]):

                def change(module, args, result, layer=layer, position=position):
                    result = result.clone()
                    result[:, position] = kept[layer][:, position]
                    return result

                hook = module.register_forward_hook(change)
                effect[layer, position] = asked.metric(asked.model(**asked.clean).logits[:, -1]).item() - before
                hook.remove()
    return effect


def compare(asked: Question, pairs: int, sites: str) -> dict[str, float]:
    """Seconds of each, the median of all pairs; results must agree. The naive loop knows MLPs alone."""
    pair = (asked.model, asked.clean, asked.corrupt, asked.metric, sites)
    passes = {
        **({"naive loop": lambda: naive_patching(asked)} if sites == "mlp" else {}),
        "patching": lambda: patching(*pair).effect,
        "attribution_patching": lambda: attribution_patching(*pair).effect,
    }
    passes["attribution_patching"]()  # the first one also looks round in the model
    effects: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(pairs):
        for name in passes if number % 2 == 0 else reversed(passes):
            start = time.perf_counter()
            effects[name] = passes[name]()
            times[name].append(time.perf_counter() - start)
    if "naive loop" in effects:
        torch.testing.assert_close(effects["patching"], effects["naive loop"], atol=1e-3, rtol=1e-3)
    return {name: statistics.median(several) for name, several in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair on the demo Llama, to see that it runs")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a real model of Llama's kind")
    parser.add_argument("--long", action="store_true", help="that model is asked for what a story began with")
    parser.add_argument("--sites", choices=["mlp", "attention", "heads"], default="mlp", help="default: mlp")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs (default: 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    asked = from_folder(options.model, options.long) if options.model else demo()
    layers, length = len(asked.model.model.layers), asked.clean["input_ids"].shape[1]
    print(f"{torch.get_num_threads()} threads; PyTorch {torch.__version__}; float32; {layers} layers, {length} tokens")
    seconds = compare(asked, 1 if options.quick else options.pairs, options.sites)
    for name, used in seconds.items():
        print(f"{name:22}{used:10.3f} s")
    if "naive loop" in seconds:
        print(f"patching is {seconds['naive loop'] / seconds['patching']:.1f} x as fast as the naive loop")
    print(f"the estimate is {seconds['patching'] / seconds['attribution_patching']:.1f} x as fast as patching")


if __name__ == "__main__":
    main()
