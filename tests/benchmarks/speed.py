"""What libra_grad costs beside torch.autograd.grad: time and peak memory, the forward pass included.

Models have random weights, which doesn't change what they cost. Pairs alternate (plain then Libra, then Libra then
plain) in one process, so that a machine that slows down slows both; the ratio is the median of the pairs' own ratios.

Peak memory is what a pass allocates on top of the model and its input. On CUDA the caching allocator counts it. On a
CPU torch.profiler records every allocation of PyTorch's allocator, and the peak of their running sum is exact and
repeatable; the resident size of a process also holds libraries, the model and whatever malloc hasn't given back.

    python tests/benchmarks/speed.py            # minutes on two cores
    python tests/benchmarks/speed.py --quick    # tiny models, seconds: does it still run?
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["KINETO_LOG_LEVEL"] = "99"  # torch.profiler is talkative on stderr; read when torch is imported

import timm
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from libragrad_minimal import libra_grad

Pass = Callable[[Callable], None]  # given libra_grad or torch.autograd.grad: one forward and one backward pass


def vision_pass(device: str, batch: int, name: str = "vit_base_patch16_224", **overrides) -> Pass:
    model = timm.create_model(name, pretrained=False, **overrides).eval().to(device)
    images = torch.randn(batch, *model.pretrained_cfg["input_size"], device=device, requires_grad=True)
    return lambda gradient: gradient(model(images)[:, 0].sum(), images)


def text_pass(device: str, tokens: int, **overrides) -> Pass:
    """Four layers of Llama 3.2 1B's width, from the embeddings to one logit of the last token."""
    config = dict(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, head_dim=64)
    config |= dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, use_cache=False)
    config = transformers.LlamaConfig(**(config | overrides))
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
        embeddings = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
    return lambda gradient: gradient(model(inputs_embeds=embeddings, logits_to_keep=1).logits[0, -1, 0], embeddings)


CASES = {
    "ViT-B/16, batch 1": lambda device: vision_pass(device, 1),
    "ViT-B/16, batch 8": lambda device: vision_pass(device, 8),
    "Llama 1B width, 4 layers, 256 tokens": lambda device: text_pass(device, 256),
    "Llama 1B width, 4 layers, 1,024 tokens": lambda device: text_pass(device, 1024),
}
TINY_LLAMA = dict(vocab_size=100, hidden_size=64, intermediate_size=256, num_attention_heads=1, num_key_value_heads=1)
QUICK_CASES = {
    "ViT, tiny": lambda device: vision_pass(device, 2, "vit_tiny_patch16_224", depth=2),
    "Llama, tiny": lambda device: text_pass(device, 64, **TINY_LLAMA),
}


def seconds(run: Pass, gradient: Callable, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run(gradient)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    run(gradient)
    return time.perf_counter() - start


def peak_bytes(run: Pass, gradient: Callable, device: str) -> int:
    """Peak of the memory a pass allocates, on top of what was allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(gradient)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(gradient)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    current = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return peak


def compare(run: Pass, pairs: int, device: str, label: str) -> dict[str, float]:
    """Times and peaks of plain and Libra gradients of one case, and their ratios."""
    plain, libra = [], []
    variants = [(torch.autograd.grad, plain), (libra_grad, libra)]
    for gradient, _ in variants:
        run(gradient)  # the first pass of each also pays for set-up
    for pair in tqdm(range(pairs), desc=label, leave=False):
        for gradient, times in variants if pair % 2 == 0 else reversed(variants):
            times.append(seconds(run, gradient, device))
    ratios = [slow / fast for slow, fast in zip(libra, plain, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    plain_peak, libra_peak = (peak_bytes(run, gradient, device) for gradient, _ in variants)
    return {
        "plain_ms": 1000 * statistics.median(plain),
        "libra_ms": 1000 * statistics.median(libra),
        "time_ratio": statistics.median(ratios),
        "lower_quartile": quartiles[0],
        "upper_quartile": quartiles[2],
        "plain_mb": plain_peak / 1e6,
        "libra_mb": libra_peak / 1e6,
        "memory_ratio": libra_peak / plain_peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that the benchmark runs")
    parser.add_argument("--pairs", type=int, default=12, help="timed pairs per case, at least 2 (default: 12)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error("--pairs must be at least 2")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{where}; PyTorch {torch.__version__}; float32; median of {options.pairs} alternating pairs, forward included"
    )
    print(
        f"{'':40}{'plain':>10}{'Libra':>10}{'time ratio (quartiles)':>26}{'plain':>11}{'Libra':>11}{'memory ratio':>14}"
    )
    torch.manual_seed(0)
    for label, build in (QUICK_CASES if options.quick else CASES).items():
        row = compare(build(device), options.pairs, device, label)
        print(
            f"{label:40}{row['plain_ms']:7.1f} ms{row['libra_ms']:7.1f} ms"
            f"{row['time_ratio']:10.3f} ({row['lower_quartile']:.3f} to {row['upper_quartile']:.3f})"
            f"{row['plain_mb']:8.1f} MB{row['libra_mb']:8.1f} MB{row['memory_ratio']:14.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
