"""Train the demo Llama: a small LlamaForCausalLM with Llama 3's features that answers the questions of questions.py.

python data/train_llama.py                # train (or go on where it stopped), write data/demo_llama.safetensors
python data/train_llama.py --evaluate     # only measure the model that lies there
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import progress
import torch
import torch.nn.functional as F
from questions import (
    ANIMALS,
    COLOURS,
    NAMES,
    THINGS,
    WORDS,
    Question,
    held_out,
    held_out_questions,
    make_questions,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from libragrad_minimal.files import whole_file
from libragrad_minimal.models import load_demo

HERE = Path(__file__).resolve().parent
MODEL_FILE = HERE / "demo_llama.safetensors"
PROGRESS = progress.FOLDER / "train_llama.pt"
QUESTIONS_FILE = HERE / "evidence_questions.json"

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
ROLE_START, ROLE_END, TURN_END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TIED = "lm_head.weight"  # the same tensor as the embedding
ROW_LENGTH = 128  # no text is longer
OTHER = 0.05  # weight of a token that isn't an answer: most can't be foreseen
CHAT_KINDS = ("colour",)
# kind -> share of the texts: some need more practice
PRACTICE = {"colour": 4, "counting": 4, "ordering": 2, "copying": 1, "opposite": 1, "capital": 1}
Segment = tuple[str, bool]  # a piece of a training text, and whether it is an answer


def training_text(rng: random.Random, progress: float = 1.0) -> list[Segment]:
    """A story with up to four questions and their answers, now and then as a chat; never a held-out question.

    `progress` of the training runs from 0 to 1: mere repetition comes first, sentences that distract come last.
    """
    if rng.random() < max(0.1, 1 - 10 * progress):  # nothing else at the very beginning
        return repetition(rng)
    kind = rng.choices(list(PRACTICE), PRACTICE.values())[0]
    unrelated = rng.choice((0, 0, 1)) if progress > 0.2 else 0
    questions = make_questions(rng, kind, size=rng.randint(1, 3), unrelated=unrelated, count=4)
    questions = [question for question in questions if not any(map(held_out, given_away(question)))]
    if not questions:
        return training_text(rng, progress)
    if kind in CHAT_KINDS and rng.random() < 0.1:
        return chat_text(questions[0])
    text: list[Segment] = [(BOS + questions[0].story.rstrip(" "), False)]
    for question in questions:
        text += [(" " + question.ask, kind == "copying"), (question.answer, True), (".", False)]
    return [*text, (EOS, False)]


def given_away(question: Question) -> list[Question]:
    """The questions a training text answers: this one, and for copying those that stop a word or more earlier."""
    words = question.ask.split(" ")
    if question.kind != "copying":
        return [question]
    return [replace(question, ask=" ".join(words[:length])) for length in range(1, len(words) + 1)]


def repetition(rng: random.Random) -> list[Segment]:
    """Random words, then the same again: teaches to look up what followed a word before, which all questions need."""
    words = rng.sample(NAMES + COLOURS + THINGS + ANIMALS + WORDS, rng.randint(3, 12))
    text = "".join(f" {word}" for word in words)
    return [(BOS + text, False), (text, True), (EOS, False)]


def chat_text(question: Question) -> list[Segment]:
    """The question as a user's turn and the answer as the assistant's, in Llama 3's chat format."""
    opening = f"{BOS}{ROLE_START}user{ROLE_END}\n\n{question.prompt}{TURN_END}{ROLE_START}assistant{ROLE_END}\n\n"
    return [(opening, False), (question.answer.strip(), True), (TURN_END, False)]


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE like Llama 3's (any text can be written, spaces belong to the next word); our words are whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, ROLE_START, ROLE_END, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=5000,  # more than are needed: merging ends when every word is a token
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    texts = ["".join(piece for piece, _ in training_text(rng)) for _ in range(30_000)]
    for token in special:
        texts = [text.replace(token, "\n\n") for text in texts]
    tokenizer.train_from_iterator([*texts, "system"], trainer)
    return tokenizer


def finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With what transformers needs: special tokens, and a chat's form."""
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[ROLE_START, ROLE_END, TURN_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Grouped-query attention, RoPE with Llama 3's scaling, SwiGLU, RMSNorm, tied embeddings: Llama 3.2 in small."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int, done: int, steps: int):
    """Endless batches of `rows` rows, each packed with as many whole texts as fit; every text sees only itself.

    Yields the model's keyword arguments and the weight of each token as a target, (rows, ROW_LENGTH).
    """
    known: dict[str, list[int]] = {}

    def encode(piece: str) -> list[int]:
        if piece not in known:
            known[piece] = tokenizer(piece, add_special_tokens=False)["input_ids"]
        return known[piece]

    for step in count(done):
        if len(known) > 100_000:
            known.clear()
        ids = torch.full((rows, ROW_LENGTH), tokenizer.pad_token_id)
        positions, text_number = torch.zeros_like(ids), torch.zeros_like(ids)
        weights = torch.zeros(ids.shape)
        for row in range(rows):
            start = 0
            while True:
                text = [
                    (token, answer) for piece, answer in training_text(rng, step / steps) for token in encode(piece)
                ]
                end = start + len(text)
                if end > ROW_LENGTH:
                    break
                ids[row, start:end] = torch.tensor([token for token, _ in text])
                weights[row, start + 1 : end] = torch.tensor([1.0 if answer else OTHER for _, answer in text[1:]])
                positions[row, start:end] = torch.arange(len(text))
                text_number[row, start:end] = start + 1
                start = end
        visible = (text_number[:, :, None] == text_number[:, None]).tril()[:, None]
        hidden = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        yield {"input_ids": ids, "position_ids": positions, "attention_mask": hidden}, weights


def train(steps: int, rows: int, learning_rate: float, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    settings = {"steps": steps, "rows": rows, "learning_rate": learning_rate, "seed": seed}
    saved = progress.saved(PROGRESS, settings)
    words = Tokenizer.from_str(saved["tokenizer"]) if saved else train_tokenizer(seed)
    tokenizer, words_as_text = finished(words), words.to_str()
    torch.manual_seed(seed)
    model = make_model(tokenizer)
    model.set_attn_implementation("eager")  # for texts this short faster than the fused kernel
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    rng, done, seconds = random.Random(seed + 1000), 0, 0.0
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        rng.setstate(saved["texts"])
        done, seconds = saved["done"], saved["seconds"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens, starting at step {done}")

    data = batches(tokenizer, rng, rows, done, steps)
    bar = tqdm(range(done, steps), initial=done, total=steps, desc="training", mininterval=5)
    started = time.time()
    for step in bar:
        inputs, weights = next(data)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets, weights = inputs["input_ids"][:, 1:].flatten(), weights[:, 1:].flatten()
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        right = (logits.argmax(-1) == targets)[weights == 1]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(right=f"{right.float().mean():.2f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"done": step + 1, "seconds": seconds + time.time() - started}
            progress.save(PROGRESS, settings, state | {"tokenizer": words_as_text, "texts": rng.getstate()})
            tqdm.write(f"step {step + 1}: {format_accuracy(accuracy(model, tokenizer, held_out_questions(300)))}")
            model.train()
    print(f"trained for {(seconds + time.time() - started) / 60:.0f} minutes")
    return model, tokenizer


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[Question]
) -> dict[str, float]:
    """Share of questions whose most likely next token is the answer, by kind and over all."""
    model.eval()
    right = defaultdict(list)
    for start in range(0, len(questions), 50):
        group = questions[start : start + 50]
        prompts = [question.prompt for question in group]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        best = model(**batch, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        for question, token in zip(group, tokenizer.convert_ids_to_tokens(best), strict=True):
            right[question.kind].append(tokenizer.convert_tokens_to_string([token]) == question.answer)
    shares = {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}
    return {"all": sum(map(sum, right.values())) / len(questions), **shares}


def format_accuracy(shares: dict[str, float]) -> str:
    return ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shares.items())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model in half precision, with config and tokenizer in the header, and held-out questions as JSON."""
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != TIED}
    tokenizer.backend_tokenizer.no_padding()  # which the last batch of questions has set, or hasn't
    header = {
        "config": model.config.to_json_string(use_diff=False),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "tokenizer_settings": json.dumps({**tokenizer.special_tokens_map, "chat_template": tokenizer.chat_template}),
    }
    with whole_file(MODEL_FILE) as unfinished:
        save_file(tensors, unfinished, header)
    questions = [{"prompt": question.prompt, **asdict(question)} for question in held_out_questions(500)]
    with whole_file(QUESTIONS_FILE) as unfinished:
        unfinished.write_text("[\n" + ",\n".join(map(json.dumps, questions)) + "\n]\n")


def evaluate(count: int) -> None:
    demo = load_demo("llama")
    shares = accuracy(demo.model, demo.tokenizer, held_out_questions(count, seed=1))
    error = math.sqrt(shares["all"] * (1 - shares["all"]) / count)
    print(f"{count} held-out questions, standard error {100 * error:.1f} %: {format_accuracy(shares)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=16, help=f"rows of {ROW_LENGTH} tokens in a step (default: %(default)s)"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=2e-3, help="peak of the one-cycle schedule (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the texts (default: %(default)s)")
    parser.add_argument(
        "--evaluate", action="store_true", help="measure the model in data/demo_llama.safetensors and stop"
    )
    parser.add_argument(
        "--questions", type=int, default=2000, help="held-out questions to measure on (default: %(default)s)"
    )
    options = parser.parse_args()
    if not options.evaluate:
        with progress.alone(MODEL_FILE):
            save(*train(options.steps, options.rows, options.learning_rate, options.seed))
    evaluate(options.questions)


if __name__ == "__main__":
    main()
