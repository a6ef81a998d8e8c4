"""What libra_grad costs beside torch.autograd.grad, and what others cost: time and memory, the forward pass included.

    python tests/benchmarks/speed.py                                # everything; most of an hour on two cores
    python tests/benchmarks/speed.py --only ViT --parameters frozen # part of it
    python tests/benchmarks/speed.py --quick                        # tiny models, seconds: does it still run?

For every case of cases.py, with trainable parameters and with frozen ones, a row for

- libra_grad beside torch.autograd.grad;
- `with observed():` around the forward pass, beside the forward pass alone. Its memory is what the output keeps alive;
- other libraries beside torch.autograd.grad (peers.py): Captum and pytorch-grad-cam on a ViT, lxt on the Llamas,
  whose venv is made once by `python tests/benchmarks/peers.py --setup .venv-lxt`. What isn't there is skipped, visibly.

measuring.py says how times are paired and bytes counted. A time ratio is printed for each repetition; if these differ
by more than the differences that matter, the machine was too busy.

What came out
-------------
Two cores of a shared machine (AMD EPYC), torch 2.14, November 2026; the median of each repetition of 15 pairs; memory
1.000 everywhere. A repetition disturbed by others (!) was measured once more. Trainable parameters / frozen ones:

- ViT-B/16, batch 1: 0.942, 0.935, 0.933 / 0.932, 0.934, 0.937 (a week before 0.919, 0.926, 0.942 / 0.928, 0.928,
  0.929); batch 8: 0.907, 0.897, 0.892 / 0.898, 0.889, 0.899
- CLIP ViT-L/14: 0.910, 0.914, 0.911 / 0.895, 0.952 (!), 0.902, 0.920
- Llama, 256 tokens: 0.870, 0.909, 0.857 / 0.861, 0.845, 0.863
- Llama, 1,024 tokens: 1.084 (!), 0.854, 0.811, 0.843 / 0.790, 0.834, 0.842
- in lxt's venv, one repetition each: 256 tokens, under load, libra_grad 0.879 / 0.871, with lxt's rules 0.916 / 0.931,
  lxt itself 0.919 / 0.960; 1,024 tokens, libra_grad 0.821 / 0.838, with lxt's rules 0.911 / 0.905, lxt 1.006 / 1.032
  in time and, since lxt stores less, 0.940 / 0.917 in memory.
- observed(), ViT-B/16 batch 1, the forward pass alone: 1.020, 1.024, 1.033 / 1.040, 1.040, 1.037 (a week before
  1.006, 1.014, 1.025 / 0.997, 1.020, 1.045): 2 to 10 ms of 265, of which PyTorch takes about 1 to call any function
  mode for each of 243 functions; it keeps nothing of its own.

What was tried, and what it gave
--------------------------------
Two cores of a shared machine, torch 2.14, forward included; each line is what one idea changed on its own.

- Hooks that replace what a node sends on, after PyTorch's own derivative ran: ViT-B 1.02 (batch 1) and 1.03 (batch
  8), Llama of 256 tokens 0.95. Where a branch is cut, its backward pass is saved; the repaired layers are computed
  twice.
- A stand-in for the gradient, which answers in the place of PyTorch's derivative of norms, GELU, SiLU and attention
  (engine/applied.py): nothing is computed twice any more, and no memory of PyTorch's is written over.
- Attention for the values alone, two matrix products of five: 28 ms for 50 on batch 8 of a ViT-B's layer. Blocks of
  64 keys cost no more than 128; one block of all keys would be 8 % faster, and of the size of the attention map.
- The values' third of a fused projection: 29 ms for 85 on the same layer. With the two above, ViT-B 0.94 (batch 1).
- Rows that are zero (engine/reach.py): after the last attention only the class token, or the last token of a text,
  carries gradient. ViT-B 0.93; the Llama, of four layers here, 0.85.

Not worth it: GELU's slope by erf or erfc instead of gelu(x)/x (13.5 and 14.6 ms against 12.8; PyTorch's derivative
takes 10.7), torch.special.ndtr (95), the norm's mean as a matrix product (1.2 ms against 0.8). Left for another day:
GELU's value, which the next layer saved (5.5 ms, but only where that layer's weights are trainable), and plans kept
for equal graphs (a ViT-B's takes 8 ms).
"""

import argparse
from pathlib import Path

import torch
from cases import CASES, QUICK_CASES, Case
from measuring import Effort, compare, print_header, print_rows, print_skipped
from peers import LXT_VENV, compare_vision_peers, plain, run_lxt

import libragrad_minimal
from libragrad_minimal import libra_grad

CASES_OF_VISION_PEERS = ("ViT-B/16, batch 1", "ViT, tiny")


def compare_libra_grad(case: Case, effort: Effort) -> None:
    print_rows(compare({"plain": plain(case), "libra_grad": lambda: case.explain(libra_grad)}, effort))


def compare_observed(case: Case, effort: Effort) -> None:
    name = "observed(), forward pass only"
    observed = getattr(libragrad_minimal, "observed", None)
    if observed is None:
        return print_skipped(name, "libragrad_minimal exports no observed")

    def observed_forward():
        with observed():
            return case.forward()

    print_rows(compare({"plain": case.forward, name: observed_forward}, effort, count="kept"))


def compare_peers(label: str, case: Case, frozen: bool, lxt_venv: Path, effort: Effort) -> None:
    if label in CASES_OF_VISION_PEERS:
        compare_vision_peers(case, effort)
    if label.startswith("Llama"):
        run_lxt(lxt_venv, label, frozen, torch.get_num_threads(), effort)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that the benchmark runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose label contains this")
    parser.add_argument("--parameters", choices=["trainable", "frozen", "both"], default="both")
    parser.add_argument("--no-peers", action="store_true", help="no other libraries")
    parser.add_argument("--lxt-venv", type=Path, default=LXT_VENV, metavar="FOLDER", help=f"default: {LXT_VENV.name}")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs of a repetition, at least 2 (default: 15)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    options = parser.parse_args()
    if options.pairs < 2 or options.repeat < 1:
        parser.error("--pairs must be at least 2, --repeat at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return options


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    effort = Effort(options.pairs, options.repeat, device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; PyTorch {torch.__version__}; float32; {effort.repeat} x {effort.pairs} alternating pairs")
    print_header(effort.repeat)
    torch.manual_seed(0)
    for label, build in (QUICK_CASES if options.quick else CASES).items():
        if options.only not in label:
            continue
        case = build(device)
        for parameters in ("trainable", "frozen"):
            if options.parameters not in (parameters, "both"):
                continue
            print(f"{label}, {parameters} parameters", flush=True)
            case.freeze(parameters == "frozen")
            compare_libra_grad(case, effort)
            compare_observed(case, effort)
            if not options.no_peers:
                compare_peers(label, case, parameters == "frozen", options.lxt_venv, effort)


if __name__ == "__main__":
    main()
