"""Measure attributions of a real language model on data/prompts.json, for notebook 01.

    python data/smollm2.py prompts   # what the model answers, and whether that is what we expect
    python data/smollm2.py figures   # -> data/smollm2_strips.json: the scores that the notebook draws
    python data/smollm2.py measure   # -> data/smollm2_deletion.parquet; an hour on a core of one's own
    python data/smollm2.py table     # means and standard errors, from that file

The model is SmolLM2-135M-Instruct, from ../shared/models or, with --model, a hub's name, a folder or another .gguf
file. A prompt counts as answered if the likeliest next token is the first visible one of the expected answer; only such
are measured. Explained is always the likeliest token. The table has a row for every prompt, method, rules and metric.
"begin" says what stands before the prompt (nothing, or the token that begins every message of a chat), "hidden" whether
the first token is among those that deletion may hide. The last token, where the prediction is made, never is. A run
that was stopped goes on where it was.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import progress
import torch
from torch import Tensor
from tqdm import tqdm

from libragrad_minimal import ATTN_LRP, CP_LRP, LIBRA, PLAIN
from libragrad_minimal.attribution import Attribution, attribute, attribute_many
from libragrad_minimal.files import whole_file
from libragrad_minimal.metrics import AUTHORS_PROTOCOL, deletion, mask_tokens, mean_and_error
from libragrad_minimal.models import LoadedModel, load_pretrained, token_texts

FOLDER = Path(__file__).parent
PROMPTS = FOLDER / "prompts.json"
STRIPS = FOLDER / "smollm2_strips.json"
TABLE = FOLDER / "smollm2_deletion.parquet"
MODEL = FOLDER.parent / ".." / "shared" / "models" / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
WITH_GRADIENTS = ["IxG", "FullGrad+", "AttCAT", "GenAtt", "LeGrad"]
RUNS = {  # rules -> which methods
    "plain": (PLAIN, [*WITH_GRADIENTS, "IG", "Attention Rollout", "Random"]),
    "Libra": (LIBRA, WITH_GRADIENTS),
    "AttnLRP": (ATTN_LRP, WITH_GRADIENTS[:2]),
    "CP-LRP": (CP_LRP, WITH_GRADIENTS[:2]),
}
SHOWN = ("facts", "earlier context", "distractors")
MESSAGE, COPIED = "What is the capital of France?", "Tom lives in Paris and Anna lives in Rome. Tom lives in"
DELETION = ("MIF accuracy", "LIF accuracy", "SRG", "SRG (logit)")


def prompts() -> list[dict]:
    groups = json.loads(PROMPTS.read_text(encoding="utf-8"))["llama"]
    return [prompt | {"group": group} for group, members in groups.items() for prompt in members]


def encoded(llama: LoadedModel, text: str, begin: bool = False) -> Tensor:
    """The ids (1, T) of a text, after the token that begins a message if that is wanted."""
    ids = llama.tokenizer(text, return_tensors="pt")["input_ids"]
    return torch.cat([torch.tensor([[llama.tokenizer.bos_token_id]]), ids], dim=1) if begin else ids


@torch.no_grad()
def likeliest(llama: LoadedModel, ids: Tensor) -> Tensor:
    """The next token (1,)."""
    return llama.model(ids, logits_to_keep=1).logits[:, -1].argmax(1)


def answers(llama: LoadedModel, prompt: dict, predicted: Tensor) -> bool:
    expected = token_texts(llama.tokenizer, llama.tokenizer(prompt["expected"], add_special_tokens=False)["input_ids"])
    return token_texts(llama.tokenizer, predicted)[0] == next(text for text in expected if text.strip())


def explained(llama: LoadedModel, ids: Tensor, predicted: Tensor, ig: bool) -> dict[tuple[str, str], Attribution]:
    """(method, rules) -> result. IG takes as long as all else together."""
    results = {}
    for rules, (preset, methods) in RUNS.items():
        chosen = [method for method in methods if ig or method != "IG"]
        for method, result in attribute_many(llama.model, ids, predicted, chosen, preset).items():
            results[method, rules] = result
    return results


def measured(llama: LoadedModel, number: int, prompt: dict, begin: bool) -> pd.DataFrame:
    """All that is known of one prompt."""
    ids = encoded(llama, prompt["prompt"], begin)
    predicted = likeliest(llama, ids)
    right = answers(llama, prompt, predicted)
    results = explained(llama, ids, predicted, ig=not begin)
    about = {"prompt": number, "group": prompt["group"], "answered": right}
    about |= {"tokens": ids.shape[1], "begin": llama.tokenizer.bos_token if begin else ""}
    rows = []
    for (method, rules), result in results.items():
        size = result.scores[0].abs()
        values = {"share of the first token": size[0] / size.sum(), "share of the last token": size[-1] / size.sum()}
        values |= {"output": result.output[0], "completeness error": result.completeness_error[0]}
        rows += [about | {"method": method, "rules": rules, "metric": name, "value": v} for name, v in values.items()]

    def answer(inputs: dict[str, Tensor]) -> Tensor:
        return llama.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]

    scores = {run: result.scores for run, result in results.items()}
    for hidden, staying in {"first stays": [0, -1], "first may go": [-1]}.items():
        removable = torch.ones_like(ids, dtype=torch.bool)
        removable[:, staying] = False
        curves = deletion(answer, ids, scores, mask_tokens, removable=removable, **AUTHORS_PROTOCOL)
        for (method, rules), curve in curves.items():
            found = curve.summary()
            names = {"method": method, "rules": rules, "hidden": hidden}
            rows += [about | names | {"metric": name, "value": found[name][0]} for name in DELETION]
    return pd.DataFrame(rows).astype({"value": float})


def order(llama: LoadedModel) -> list[tuple[int, dict, bool]]:
    """The prompts that are answered, then the same with a token before them."""
    answered = [
        (number, prompt)
        for number, prompt in enumerate(prompts())
        if answers(llama, prompt, likeliest(llama, encoded(llama, prompt["prompt"])))
    ]
    return [(*one, begin) for begin in (False, True) for one in answered]


def measure(llama: LoadedModel) -> None:
    with progress.alone(TABLE):
        done = pd.read_parquet(TABLE) if TABLE.exists() else pd.DataFrame({"prompt": [], "begin": []})
        for number, prompt, begin in tqdm(order(llama), disable=None):
            there = (done["prompt"] == number) & ((done["begin"] != "") == begin)
            if not there.any():
                torch.manual_seed(number)
                done = pd.concat([done, measured(llama, number, prompt, begin)], ignore_index=True)
                with whole_file(TABLE) as beside:
                    done.to_parquet(beside, index=False)


# ---- what the notebook draws -----------------------------------------------------------------------------------------


def scores_for(llama: LoadedModel, ids: Tensor, token: Tensor) -> dict[str, list[float]]:
    """Input x gradient at every token, for the logit of what comes next."""
    rules = {"plain": PLAIN, "Libra": LIBRA}
    found = {name: attribute(llama.model, ids, token, "IxG", preset) for name, preset in rules.items()}
    return {name: [round(score, 3) for score in result.scores[0].tolist()] for name, result in found.items()}


def strip_of(llama: LoadedModel, prompt: dict) -> dict | None:
    """None for a prompt that isn't answered as expected."""
    ids = encoded(llama, prompt["prompt"])
    predicted = likeliest(llama, ids)
    if not answers(llama, prompt, predicted):
        return None
    texts = {"tokens": token_texts(llama.tokenizer, ids[0]), "answer": token_texts(llama.tokenizer, predicted)[0]}
    return {"group": prompt["group"]} | texts | scores_for(llama, ids, predicted)


def span_of(llama: LoadedModel, ids: Tensor, length: int) -> dict:
    """Generate, likeliest token first, and explain every token by all that stands before it."""
    mask = torch.ones_like(ids)
    whole = llama.model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False)
    ends = range(ids.shape[1], whole.shape[1])
    rows = [scores_for(llama, whole[:, :end], whole[:, end]) for end in tqdm(ends, disable=None)]
    columns = {name: [row[name] for row in rows] for name in ("plain", "Libra")}
    return {"tokens": token_texts(llama.tokenizer, whole[0]), "generated": len(ends)} | columns


def chat_of(llama: LoadedModel, message: str) -> dict:
    """A user's message in the model's own template, and its answer; "roles" are the tokens that aren't the message."""
    asked = [{"role": "user", "content": message}]
    text = llama.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    tokens = llama.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = text.index(message)
    inside = [start <= a and b <= start + len(message) for a, b in tokens["offset_mapping"]]
    roles = [place for place, said in enumerate(inside) if not said]
    return {"roles": roles} | span_of(llama, torch.tensor([tokens["input_ids"]]), 7)


def draw(llama: LoadedModel) -> None:
    shown = [strip_of(llama, prompt) for prompt in tqdm(prompts(), disable=None) if prompt["group"] in SHOWN]
    stored = {"model": "SmolLM2-135M-Instruct", "strips": [strip for strip in shown if strip is not None]}
    stored |= {"chat": chat_of(llama, MESSAGE), "span": span_of(llama, encoded(llama, COPIED), 7)}
    with whole_file(STRIPS) as beside:
        beside.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")


# ---- what came out ---------------------------------------------------------------------------------------------------


def print_prompts(llama: LoadedModel) -> None:
    for number, prompt in enumerate(prompts()):
        predicted = likeliest(llama, encoded(llama, prompt["prompt"]))
        said = token_texts(llama.tokenizer, predicted)[0]
        verdict = "" if answers(llama, prompt, predicted) else f"expected {prompt['expected']!r}"
        print(f"{number:2} {prompt['group']:16}{prompt['prompt']!r} -> {said!r} {verdict}", flush=True)


def print_table() -> None:
    table = pd.read_parquet(TABLE)
    deleted = table[table["hidden"].notna()]
    for (begin, answered, hidden), part in deleted.groupby(["begin", "answered", "hidden"]):
        print(f"\nbegin {begin!r}, {'answered' if answered else 'not answered'}, {hidden}, {part['prompt'].nunique()}")
        for (method, rules), rows in part.groupby(["method", "rules"], sort=False):
            values = {
                name: mean_and_error(torch.tensor(rows.loc[rows["metric"] == name, "value"].tolist()))
                for name in DELETION
            }
            print(f"{method:18}{rules:9}" + "".join(f"{m:8.1f} +- {e:4.1f}" for m, e in values.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prompts", "figures", "measure", "table"])
    parser.add_argument("--model", default=str(MODEL), help="a hub's name, a folder or a .gguf file")
    options = parser.parse_args()
    if options.what == "table":
        return print_table()
    work = {"prompts": print_prompts, "figures": draw, "measure": measure}[options.what]
    work(load_pretrained("llama", options.model))


if __name__ == "__main__":
    main()
