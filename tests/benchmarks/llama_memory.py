"""Peak memory of a Libra attribution as the prompt grows: it must grow with its length, not with the square.

    python tests/benchmarks/llama_memory.py                 # 1k, 4k and 16k tokens, about two minutes on one core
    python tests/benchmarks/llama_memory.py --tokens 1000 2000

A 2-layer Llama with Llama 3's vocabulary of 128,256, so that logits of all positions (8 GB at 16k tokens) would show,
as would one 16k x 16k attention map (1 GB a head). Every length runs in its own process; what that process held before
the prompt is taken off. Linux only: it reads /proc/self.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch


def megabytes(entry: str) -> float:
    """VmRSS, the memory this process holds, or VmHWM, the most it held since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(entry))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def explain_prompt(tokens: int, layers: int = 2) -> tuple[float, float]:
    """Megabytes on top of the loaded model, and seconds, for one prompt of this many tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from libragrad_minimal import libra_grad

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)

    def attribute(length: int) -> None:
        ids = torch.randint(config.vocab_size, (1, length))
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embeddings, logits_to_keep=1, use_cache=False).logits[0, -1]
        (gradient,) = libra_grad(logits.max(), embeddings)
        scores = (embeddings * gradient).sum(-1)
        torch.testing.assert_close(scores.sum(), logits.max(), rtol=1e-3, atol=1e-3)

    attribute(16)  # loads every kernel
    reset_peak()
    before, started = megabytes("VmRSS"), time.perf_counter()
    attribute(tokens)
    return megabytes("VmHWM") - before, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="lengths of the prompts")
    parser.add_argument(
        "--alone", action="store_true", help="measure the one length in this process and print two numbers"
    )
    options = parser.parse_args()
    if options.alone:
        print(*explain_prompt(options.tokens[0]))
        return
    print(f"{'tokens':>8} {'MB':>8} {'KB/token':>9} {'seconds':>8}")
    for tokens in options.tokens:
        command = [sys.executable, __file__, "--alone", "--tokens", str(tokens)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, seconds = map(float, output.split())
        print(f"{tokens:8d} {peak:8.0f} {1024 * peak / tokens:9.1f} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
