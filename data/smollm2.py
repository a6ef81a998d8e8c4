"""Measure attributions of a real language model on data/prompts.json, for notebook 01.

    python data/smollm2.py prompts   # what the model answers, and whether that is what we expect
    python data/smollm2.py figures   # -> data/smollm2_strips.json: the scores that the notebook draws
    python data/smollm2.py measure   # -> data/smollm2_deletion.parquet; two hours on one slow core
    python data/smollm2.py table     # means and standard errors, from that file

The model is SmolLM2-135M-Instruct, from ../shared/models or, with --model, a hub's name, a folder or another .gguf
file. A prompt counts as answered if the likeliest next token is the first visible one of the expected answer; explained
is always the likeliest token. Its table has a row for every prompt, method, rules and metric. "begin" says what stands
before the prompt (nothing, or the token that begins every message of a chat), "hidden" whether the first token is among
those that deletion may hide. The last token, where the prediction is made, never is. A run that was stopped goes on
where it was.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from libragrad_minimal import ATTN_LRP, CP_LRP, LIBRA, PLAIN
from libragrad_minimal.attribution import Attribution, attribute_many
from libragrad_minimal.files import only_one, whole_file
from libragrad_minimal.metrics import AUTHORS_PROTOCOL, deletion, mask_tokens, mean_and_error
from libragrad_minimal.models import LoadedModel, load_pretrained, token_texts

FOLDER = Path(__file__).parent
PROMPTS = FOLDER / "prompts.json"
TABLE = FOLDER / "smollm2_deletion.parquet"
MODEL = FOLDER.parent / ".." / "shared" / "models" / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
WITH_GRADIENTS = ["IxG", "FullGrad+", "AttCAT", "GenAtt", "LeGrad"]
RUNS = {  # rules -> which methods
    "plain": (PLAIN, [*WITH_GRADIENTS, "IG", "Attention Rollout", "Random"]),
    "Libra": (LIBRA, WITH_GRADIENTS),
    "AttnLRP": (ATTN_LRP, WITH_GRADIENTS[:2]),
    "CP-LRP": (CP_LRP, WITH_GRADIENTS[:2]),
}
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
    results = explained(llama, ids, predicted, ig=right and not begin)
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
    """What is answered, the same with a token before the prompt, then the rest."""
    known = list(enumerate(prompts()))
    right = [answers(llama, prompt, likeliest(llama, encoded(llama, prompt["prompt"]))) for _, prompt in known]
    answered, rest = ([one for one in known if right[one[0]] is is_right] for is_right in (True, False))
    return [(*one, begin) for some, begin in ((answered, False), (answered, True), (rest, False)) for one in some]


def measure(llama: LoadedModel) -> None:
    with only_one(TABLE):
        done = pd.read_parquet(TABLE) if TABLE.exists() else pd.DataFrame({"prompt": [], "begin": []})
        for number, prompt, begin in tqdm(order(llama), disable=None):
            there = (done["prompt"] == number) & ((done["begin"] != "") == begin)
            if not there.any():
                torch.manual_seed(number)
                done = pd.concat([done, measured(llama, number, prompt, begin)], ignore_index=True)
                with whole_file(TABLE) as beside:
                    done.to_parquet(beside, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure"])
    parser.add_argument("--model", default=str(MODEL), help="a hub's name, a folder or a .gguf file")
    options = parser.parse_args()
    measure(load_pretrained("llama", options.model))


if __name__ == "__main__":
    main()
