"""Measure how well one gradient estimates activation patching on a real language model, for notebook 06.

    python data/circuits.py pairs     # which prompt pairs are equally long, and told apart by the model
    python data/circuits.py measure   # -> data/circuits_smollm2.npz; about 25 minutes on one core
    python data/circuits.py table     # the correlations, from that file

The model is SmolLM2-135M-Instruct, from ../shared/models or, with --model, from the hub or another folder. The file
holds for every pair, "pair | answers", the metric (logit of the answer minus logit of the other prompt's) on both
prompts, and where the model tells them apart, "pair | site | how", the effects by patching ("true") and as estimated by
the gradients of three sets of rules, float16, (layers, positions) or, for some pairs of each task, (layers, positions,
heads). A run that was stopped goes on where it was.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import progress
import torch
from tqdm import tqdm

from libragrad_minimal import ATTN_LRP, LIBRA, PLAIN
from libragrad_minimal.circuits import attribution_patching, patching
from libragrad_minimal.files import whole_file
from libragrad_minimal.metrics import mean_and_error
from libragrad_minimal.models import load_pretrained

FOLDER = Path(__file__).parent
PAIRS = FOLDER / "circuit_pairs.json"
RESULT = FOLDER / "circuits_smollm2.npz"
MODEL = FOLDER.parent / ".." / "shared" / "models" / "smollm2-135m-instruct"
RULES = {"plain": PLAIN, "Libra": LIBRA, "AttnLRP": ATTN_LRP}
SITES = ("attention", "mlp", "residual", "heads")
OF_HEADS = 4  # pairs of each task, since there are nine times as many heads as parts of the other sites


def load(name: str):
    """The model in float32, and its tokenizer."""
    loaded = load_pretrained("llama", name)
    return loaded.model.float(), loaded.tokenizer


def prompts_of(pair: dict, tokenizer) -> tuple:
    """Both prompts, and what is asked of the logits. No token is put before them, as older transformers would."""
    clean, corrupt = (
        tokenizer(pair[name], return_tensors="pt", add_special_tokens=False) for name in ("clean", "corrupt")
    )
    answer, wrong = (tokenizer(pair[name], add_special_tokens=False).input_ids for name in ("answer", "wrong"))
    if len(answer) != 1 or len(wrong) != 1 or clean["input_ids"].shape != corrupt["input_ids"].shape:
        raise ValueError(f"prompts of unequal length, or an answer of several tokens: {pair}")
    return clean, corrupt, lambda logits: logits[..., answer[0]] - logits[..., wrong[0]]


def answers_of(model, clean, corrupt, metric) -> list[float]:
    with torch.no_grad():
        return [float(metric(model(**prompt, logits_to_keep=1).logits[0, -1])) for prompt in (clean, corrupt)]


def tells_apart(answers) -> bool:
    return answers[0] > 0 > answers[1]


def print_pairs(name: str) -> None:
    model, tokenizer = load(name)
    for number, pair in enumerate(json.loads(PAIRS.read_text(encoding="utf-8"))):
        try:
            answers = answers_of(model, *prompts_of(pair, tokenizer))
            verdict = "" if tells_apart(answers) else "NOT TOLD APART"
            told = f"{answers[0]:7.2f}{answers[1]:7.2f} {verdict:15}"
        except ValueError as error:
            told = str(error)[:28]
        print(f"{number:3} {pair['task']:16} {told} {pair['clean']!r} -> {pair['answer']!r}", flush=True)


def measure(name: str) -> None:
    pairs = json.loads(PAIRS.read_text(encoding="utf-8"))
    results = dict(np.load(RESULT)) if RESULT.exists() else {}
    model, tokenizer = load(name)
    told_apart: dict[str, int] = Counter()
    for number, pair in tqdm(in_turn(pairs), disable=None):
        prompts = prompts_of(pair, tokenizer)
        answers = results.setdefault(f"{number} | answers", np.array(answers_of(model, *prompts), np.float32))
        told_apart[pair["task"]] += tells_apart(answers)
        if not tells_apart(answers):
            continue
        for site in SITES if told_apart[pair["task"]] <= OF_HEADS else SITES[:3]:
            if f"{number} | {site} | true" in results:
                continue
            for how, rules in RULES.items():
                effect = attribution_patching(model, *prompts, site, rules).effect
                results[f"{number} | {site} | {how}"] = stored(effect)
            results[f"{number} | {site} | true"] = stored(patching(model, *prompts, site).effect)
            save(results)
    save(results)


def in_turn(pairs: list[dict]) -> list[tuple[int, dict]]:
    """The first pair of each task, the second of each, ..., with their numbers."""
    places: dict[str, int] = Counter()
    order = []
    for number, pair in enumerate(pairs):
        order.append((places[pair["task"]], number, pair))
        places[pair["task"]] += 1
    return [(number, pair) for _, number, pair in sorted(order, key=lambda one: one[:2])]


def stored(effect: torch.Tensor) -> np.ndarray:
    return effect.numpy().astype(np.float16)


def save(results: dict[str, np.ndarray]) -> None:
    """All of it or nothing, should the machine stop in between."""
    with whole_file(RESULT) as unfinished, open(unfinished, "wb") as file:
        np.savez_compressed(file, **results)


def correlations() -> dict[tuple[str, str, str], list[float]]:
    """(task, site, rules) -> for each pair Pearson's correlation with true patching, where the prompts differ."""
    pairs = json.loads(PAIRS.read_text(encoding="utf-8"))
    results = np.load(RESULT)
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for key in results:
        number, *rest = key.split(" | ")
        if rest[-1] in RULES:
            true = results[f"{number} | {rest[0]} | true"].astype(np.float64)
            estimate = results[key].astype(np.float64)
            places = (true != 0) | (estimate != 0)
            task = pairs[int(number)]["task"]
            found[task, rest[0], rest[1]].append(np.corrcoef(true[places], estimate[places])[0, 1])
    return found


def print_table() -> None:
    found = correlations()
    tasks = list(dict.fromkeys(task for task, _, _ in found))
    for site in SITES:
        print(f"{site:20}{'pairs':>6}" + "".join(f"{how:>16}" for how in RULES))
        for task in (*tasks, "all"):
            by_rules = [sum((found[t, site, how] for t in tasks if task in (t, "all")), []) for how in RULES]
            cells = (mean_and_error(torch.tensor(values)) for values in by_rules)
            told = "".join(f"{f'{mean:.3f} +- {error:.3f}':>16}" for mean, error in cells)
            print(f"  {task:18}{len(by_rules[0]):6}{told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pairs", "measure", "table"])
    parser.add_argument("--model", default=str(MODEL), help="a folder, or a name on the hub")
    options = parser.parse_args()
    if options.what == "table":
        print_table()
    elif options.what == "pairs":
        print_pairs(options.model)
    else:
        with progress.alone(RESULT):
            measure(options.model)


if __name__ == "__main__":
    main()
