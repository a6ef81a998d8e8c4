"""What attribute() costs beside libra_grad, which it is made of: time and memory, the forward pass included.

    python tests/benchmarks/attribute_cost.py                  # everything; about ten minutes on one core
    python tests/benchmarks/attribute_cost.py --only Llama --pairs 9
    python tests/benchmarks/attribute_cost.py --quick          # tiny models, seconds: does it still run?

FullGrad+ and IxG stand beside libra_grad of the same output by the same input; LeGrad, which needs attention maps and a
backward pass a block, beside torch.autograd.grad, which is given the kernel that shows them as well. The second table
tells whether memory grows with the prompt's length or with its square. measuring.py says how times are paired and bytes
counted.

Measured on two quiet cores, torch 2.14, medians of 9 (ViT: 5) alternating pairs, frozen parameters:

- Llama, 2 layers of width 256, 4,096 tokens, beside libra_grad: FullGrad+ 1.05 (quartiles 1.04 to 1.08), IxG 1.07 (1.02
  to 1.11) in time; both 1.08 in memory (160.6 MB for 148.6).
- ViT-B/16, batch 8: FullGrad+ 1.04 (1.03 to 1.07), IxG 1.00 (0.99 to 1.00) in time, both 1.02 in memory (635 MB for
  626), beside libra_grad; LeGrad 1.00 (0.99 to 1.01) beside a plain gradient, 1.32 in memory.
- Memory of FullGrad+: 40.2 MB for 1,024 tokens, 160.6 MB for 4,096, 642.5 MB for 16,384: 39.2 kB a token in all three.
"""

import argparse
from functools import partial

import torch
from cases import Case, llama, vit
from measuring import Effort, compare, memory, print_header, print_rows
from torch.nn.attention import SDPBackend, sdpa_kernel

from libragrad_minimal import attribute, libra_grad

SMALL = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(max_position_embeddings=131_072)
TINY = SMALL | dict(vocab_size=100, hidden_size=64)
CASES = {
    "ViT-B/16, batch 8": lambda device: vit(device, 8),
    "Llama, 2 layers of width 256, 4,096 tokens": lambda device: llama(device, 4096, **SMALL),
}
QUICK_CASES = {
    "ViT, tiny": lambda device: vit(device, 2, "vit_tiny_patch16_224", depth=2, img_size=96),
    "Llama, tiny": lambda device: llama(device, 64, **TINY),
}
LENGTHS = (1024, 4096, 16384)


def explained(case: Case, method: str):
    """attribute() of what the case explains: class 0 of every picture, token 0 after a text."""
    is_text = hasattr(case.model, "get_input_embeddings")
    inputs = {"inputs_embeds": case.inputs.detach()} if is_text else case.inputs.detach()
    return lambda: attribute(case.model, inputs, 0, method)


def compare_attribute(case: Case, effort: Effort, maps: bool) -> None:
    gradients = ("FullGrad+", "IxG")
    print_rows(
        compare({"libra_grad": lambda: case.explain(libra_grad)} | {m: explained(case, m) for m in gradients}, effort)
    )
    if maps:

        def plain():
            with sdpa_kernel(SDPBackend.MATH):
                return case.explain(torch.autograd.grad)

        print_rows(compare({"plain": plain, "LeGrad": explained(case, "LeGrad")}, effort))


def print_growth(device: str, lengths: tuple[int, ...]) -> None:
    print(f"{'tokens':>8}{'libra_grad':>14}{'FullGrad+':>14}{'a token':>14}")
    for tokens in lengths:
        case = llama(device, tokens, **SMALL)
        case.freeze(True)
        beside = memory(partial(case.explain, libra_grad), device).peak
        used = memory(explained(case, "FullGrad+"), device).peak
        print(f"{tokens:8}{beside / 1e6:11.1f} MB{used / 1e6:11.1f} MB{used / tokens / 1e3:11.1f} kB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that the benchmark runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose label contains this")
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs of a repetition, at least 2 (default: 9)")
    parser.add_argument("--repeat", type=int, default=1, help="repetitions (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    effort = Effort(options.pairs, options.repeat, options.device)
    print(f"{options.device}, {torch.get_num_threads()} threads; PyTorch {torch.__version__}; float32")
    print_header(effort.repeat)
    torch.manual_seed(0)
    for label, build in (QUICK_CASES if options.quick else CASES).items():
        if options.only in label:
            case = build(options.device)
            case.freeze(True)
            print(f"{label}, frozen parameters", flush=True)
            compare_attribute(case, effort, maps="4,096" not in label)
    if options.only in "growth":
        print_growth(options.device, (64, 128) if options.quick else LENGTHS)


if __name__ == "__main__":
    main()
