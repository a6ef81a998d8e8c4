"""The command line: `python -m libragrad_minimal --help`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attribution import Attribution, attribute
from .engine import Audit, Rules, audit
from .methods import METHODS, NAMED_RULES


def refuse(error: ModuleNotFoundError) -> int:
    """Say in one sentence how to get what the command line needs beyond the library; returns the exit status."""
    print(
        f"libragrad_minimal: error: the command line needs {error.name}, which is not installed: "
        "pip install 'libragrad_minimal[notebooks]'",
        file=sys.stderr,
    )
    return 2


try:
    from matplotlib.figure import Figure
    from PIL import Image

    from .files import whole_file
    from .models import DEMOS, VITS, LoadedModel, load_demo, load_pretrained, token_texts
    from .pages import embedded, page
    from .pictures import open_picture
    from .plots import Strip, TokenStrips, heatmaps
    from .prompts import attribute_prompts
    from .scenes import draw_scene
    from .sweep import RAW, WRONG, Bounds, read, summary, sweep
    from .untrusted import transformers_config
    from .zoo import LIBRARIES, registered
except ModuleNotFoundError as error:
    sys.exit(refuse(error))

REAL = {
    "vit": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "clip": "ViT-B-16/laion2b_s34b_b88k",
    "llama": "unsloth/Llama-3.2-1B",
}
PHOTO = "a file, or an address that begins with https://"
EXAMPLES = """examples:
  libragrad="python -m libragrad_minimal"
  $libragrad demo
  $libragrad image photo.jpg --model {vit} --class tabby --class espresso -o classes.png
  $libragrad image photo.jpg --method attention-rollout --head-fusion max --discard-ratio 0.9 -o rollout.png
  $libragrad clip photo.jpg "a cat" "a cup" -o prompts.png
  $libragrad text "The capital of France is" --model {llama} --target Paris --against London -o strip.html
  $libragrad audit vit_base_patch16_siglip_224
  $libragrad sweep timm --pattern "vit_tiny*"
  $libragrad benchmark --model vit --data scenes:40 -o measured
""".format(**REAL)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 if an audit found unsupported operations, 2 for bad input."""
    args = parser().parse_args(arguments)
    try:
        return args.command(args)
    except ModuleNotFoundError as error:  # what only some models need is imported where it is used
        return refuse(error)
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:  # UnsupportedOperation is a RuntimeError
        print(f"libragrad_minimal: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"libragrad_minimal: error: {message} (see --help)\n")


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    result = OneLineParser(
        prog="python -m libragrad_minimal",
        description="Balanced attributions (LibraGrad) for pictures, picture-text pairs and text.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    commands = result.add_subparsers(required=True, metavar="COMMAND")

    def command(function, name, help):
        sub = commands.add_parser(name, help=help, description=help, epilog=EXAMPLES, formatter_class=formatter)
        sub.set_defaults(command=function)
        return sub

    image = command(image_command, "image", "which parts of a photograph speak for a class")
    image.add_argument("photo", help=PHOTO)
    image.add_argument(
        "--class", dest="classes", action="append", metavar="NAME|NUMBER", help="default: the predicted one"
    )
    image.add_argument("--head-fusion", choices=["mean", "max", "min"], help="of Attention Rollout")
    image.add_argument("--discard-ratio", type=float, help="of the rollouts, in [0, 1)")

    clip = command(clip_command, "clip", "which parts of a photograph a prompt speaks of")
    clip.add_argument("photo", help=PHOTO)
    clip.add_argument("prompts", nargs="+", metavar="PROMPT")

    text = command(text_command, "text", "which words a language model's next word comes from")
    text.add_argument("prompt")
    text.add_argument("--target", help="the next word to explain; default: the model's own")
    text.add_argument("--against", help="explain why the target and not this word")

    for sub, kind, suffix in ((image, "vit", "png"), (clip, "clip", "png"), (text, "llama", "html")):
        sub.add_argument("--method", default="FullGrad+", type=method_name, help=f"one of {', '.join(METHODS)}")
        sub.add_argument("--rules", choices=NAMED_RULES, help="how gradients flow back (default: libra, for IG plain)")
        sub.add_argument(
            "--model", help=f"such as {REAL[kind]}; default: the small demo model shipped with this project"
        )
        sub.add_argument(
            "-o", "--output", type=Path, default=Path(f"attribution.{suffix}"), help="default: %(default)s"
        )
        sub.add_argument("--save-scores", type=Path, metavar="FILE.npz", help="the numbers behind the picture")

    check = command(
        audit_command, "audit", "which operations a model has and how each is treated; status 1 if one is unsupported"
    )
    check.add_argument(
        "model", help=f"a demo ({', '.join(DEMOS)}), a timm or open_clip name, or a transformers name or folder"
    )

    swept = command(
        sweep_command, "sweep", "does it work on every model of a library? One row a model; goes on where it was"
    )
    swept.add_argument("library", choices=LIBRARIES)
    swept.add_argument("--pattern", default="*", help="of names, such as 'vit_*', 'decoder *' or '* text'")
    swept.add_argument(
        "--few", type=int, metavar="N", help="only N models of every file of timm, small by their names; default: all"
    )
    swept.add_argument("--processes", type=int, default=1, help="models at a time (default: %(default)s)")
    swept.add_argument("--seconds", type=float, default=300, help="that a model may take (default: %(default)s)")
    swept.add_argument("--gigabytes", type=float, default=6, help="that a model may use (default: %(default)s)")
    swept.add_argument(
        "-o", "--output", type=Path, help="the table, or a folder for it; default: sweep_LIBRARY.csv, here"
    )

    measured = command(
        benchmark_command,
        "benchmark",
        "does it tell the truth? Every method on a data set, in one table; goes on where it was",
    )
    measured.add_argument(
        "--model", help=f"a demo ({', '.join(DEMOS)}); a name of timm, open_clip (NAME/TAG) or the hub"
    )
    measured.add_argument(
        "--data", metavar="KIND:WHERE", help="imagenet, imagenet-s, objects, pets, coco, mura, hub, scenes; texts, hub"
    )
    measured.add_argument("--methods", nargs="+", type=method_name, help=f"of {', '.join(METHODS)}")
    measured.add_argument("--rules", nargs="+", choices=NAMED_RULES, help="default: plain libra")
    measured.add_argument("--metrics", nargs="+", choices=["completeness", "deletion", "segmentation"])
    measured.add_argument(
        "--protocol", dest="protocols", nargs="+", choices=["drop", "paint"], help="of deletion; default: both"
    )
    measured.add_argument("--target", choices=["predicted", "true", "second"], help="default: predicted")
    measured.add_argument("--probability", action="store_true", default=None, help="explain p(class), not its logit")
    measured.add_argument("--count", type=int, help="only so many examples, spread evenly; default: all")
    measured.add_argument("--batch", type=int, help="examples at a time (default: 8)")
    measured.add_argument("--threads", type=int, help="CPU threads of a process (default: 1, so start more processes)")
    measured.add_argument("--seed", type=int, help="default: 0")
    measured.add_argument("--device-map", choices=["auto"], help="spread a language model over several devices")
    measured.add_argument("--csv", action="store_true", help="the table as CSV too")
    measured.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="measure nothing; two runs ('FullGrad+ libra') or two folders"
    )
    measured.add_argument(
        "-o", "--output", type=Path, default=Path("benchmark"), help="a folder (default: %(default)s, here)"
    )

    demo = command(demo_command, "demo", "everything above on the shipped models, offline, on one page")
    demo.add_argument("-o", "--output", type=Path, default=Path("libragrad_demo.html"), help="default: %(default)s")
    return result


def method_name(typed: str) -> str:
    """A method's name however it is capitalised or joined: attention-rollout, ATTCAT, fullgrad+."""

    def squeeze(name: str) -> str:
        return "".join(c for c in name.lower() if c.isalnum() or c == "+")

    for name in METHODS:
        if squeeze(name) == squeeze(typed):
            return name
    raise argparse.ArgumentTypeError(f"unknown method {typed!r}; there are {', '.join(METHODS)}")


# ---- the commands ----------------------------------------------------------------------------------------------------


def image_command(args: argparse.Namespace) -> int:
    check_output(args)
    photo = open_picture(args.photo)
    loaded = load("vit", args.model)
    options = {"head_fusion": args.head_fusion, "discard_ratio": args.discard_ratio}
    options = {name: value for name, value in options.items() if value is not None}
    pixels = loaded.transform(photo)
    if args.classes:
        targets = [find_class(loaded, name) for name in args.classes]
    else:
        with torch.no_grad():
            targets = [loaded.model(pixels[None]).argmax().item()]
    result = attribute_classes(loaded, pixels, targets, args.method, args.rules, **options)
    names = [class_name(loaded, target) for target in targets]
    picture_figure(loaded, pixels, result, names).savefig(args.output, dpi=150)
    report(args, result, names)
    return 0


def clip_command(args: argparse.Namespace) -> int:
    check_output(args)
    photo = open_picture(args.photo)
    loaded = load("clip", args.model)
    pixels = loaded.transform(photo)
    result = attribute_phrases(loaded, pixels, args.prompts, args.method, args.rules)
    picture_figure(loaded, pixels, result, args.prompts).savefig(args.output, dpi=150)
    report(args, result, args.prompts)
    return 0


def text_command(args: argparse.Namespace) -> int:
    check_output(args, [".html", ".png", ".pdf", ".svg"])
    if not args.prompt.strip():
        raise ValueError("the prompt is empty")
    if any("\ud800" <= character <= "\udfff" for character in args.prompt):
        raise ValueError("the prompt isn't UTF-8: it holds bytes that are no text")
    loaded = load("llama", args.model)
    strip, result = attribute_text(loaded, args.prompt, args.target, args.against, args.method, args.rules)
    if args.output.suffix == ".html":
        args.output.write_text(page(strip.title, TokenStrips(strip)._repr_html_()), encoding="utf-8")
    else:
        TokenStrips(strip).figure().savefig(args.output, dpi=150)
    report(args, result, [strip.title])
    return 0


def audit_command(args: argparse.Namespace) -> int:
    table = audit_model(args.model)
    print(table)
    return int(any(treatment == "unsupported" for _, treatment, _ in table.rows))


def sweep_command(args: argparse.Namespace) -> int:
    """Status 1 if anything is wrong or raises what isn't a refusal."""
    path = args.output or Path()
    path = path / f"sweep_{args.library}.csv" if path.is_dir() else path
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} doesn't exist: make it first")
    names = registered(args.library, args.pattern, args.few)
    if not names:
        raise ValueError(f"{args.library} has no model that matches {args.pattern!r}")
    sweep(args.library, names, path, args.processes, Bounds(args.seconds, args.gigabytes))
    rows = [row for row in read(path) if row["model"] in set(names)]
    print(summary(rows))
    print(f"wrote {path}")
    return int(any(row["attribute"].startswith((RAW, WRONG)) or row["engine"] in (RAW, WRONG) for row in rows))


def benchmark_command(args: argparse.Namespace) -> int:
    from . import benchmark, report

    if args.compare:
        first, second = args.compare
        table = benchmark.compare(first, second, args.output)
        print(table.to_string(index=False, float_format="{:.3f}".format))
        return 0
    if not (args.model and args.data):
        raise ValueError("a benchmark needs --model and --data, or --compare")
    named = {name: getattr(args, name) for name in benchmark.Settings.__dataclass_fields__}
    chosen: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in named.items() if v is not None}
    settings = benchmark.Settings(**chosen)
    path = benchmark.run(settings, args.output, args.device_map)
    if path is None:
        print(f"this process's share is done; the table in {args.output} comes when the others are")
        return 0
    table = benchmark.read_table(args.output)
    if args.csv:
        table.to_csv(path.with_suffix(".csv"), index=False)
    report.figure(table).savefig(path.with_name("figure.png"), dpi=120)
    told = [(name, str(value)) for name, value in vars(settings).items()]
    with whole_file(path.with_name("report.html")) as page_file:
        page_file.write_text(report.page(table, told), encoding="utf-8")
    print(f"{len(benchmark.skipped(table))} examples skipped; wrote {path}, figure.png and report.html beside it")
    return 0


def demo_command(args: argparse.Namespace) -> int:
    if not args.output.parent.is_dir():
        raise ValueError(f"the folder {args.output.parent} doesn't exist: make it first")
    parts = [
        "<p>Orange speaks for the output, blue against it. Every map is scaled by its own largest score.</p>",
        *demo_pictures(),
        *demo_prompts(),
        *demo_text(),
    ]
    args.output.write_text(page("LibraGrad demo", "\n".join(parts)), encoding="utf-8")
    print(f"wrote {args.output}")
    return 0


# ---- attributions ----------------------------------------------------------------------------------------------------


def attribute_classes(
    loaded: LoadedModel, pixels: Tensor, targets: list[int], method: str, rules: str | None, **options
) -> Attribution:
    images = pixels.expand(len(targets), -1, -1, -1)
    return attribute(loaded.model, images, torch.tensor(targets), method, named_rules(rules), **options)


def attribute_phrases(
    loaded: LoadedModel, pixels: Tensor, prompts: list[str], method: str, rules: str | None
) -> Attribution:
    result = attribute_prompts(loaded, pixels[None], prompts, method, named_rules(rules), progress=sys.stderr.isatty())
    scores, output, error = (part[0] for part in (result.scores, result.output, result.completeness_error))
    return replace(result, scores=scores, output=output, completeness_error=error)


def named_rules(rules: str | None) -> Rules | None:
    return None if rules is None else NAMED_RULES[rules]


def attribute_text(
    loaded: LoadedModel, prompt: str, target: str | None, against: str | None, method: str, rules: str | None
) -> tuple[Strip, Attribution]:
    tokens = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    if target is None:
        with torch.no_grad():
            chosen = loaded.model(**inputs).logits[0, -1].argmax().item()
    else:
        chosen = find_token(loaded, target)
    title = f"why {loaded.tokenizer.decode([chosen])!r}"
    explained = chosen
    if against is not None:
        other = find_token(loaded, against)
        title += f" and not {loaded.tokenizer.decode([other])!r}"

        def explained(logits):
            return logits[:, chosen] - logits[:, other]

    result = attribute(loaded.model, inputs, explained, method, named_rules(rules), readout="last")
    name = next(name for name, known in NAMED_RULES.items() if known == result.rules)
    title += f" ({method}, {name}; logit {'difference ' if against else ''}{result.output[0]:.2f})"
    return Strip(token_texts(loaded.tokenizer, inputs["input_ids"][0]), result.scores[0].tolist(), title), result


def audit_model(name: str) -> Audit:
    """The audit of a model without its weights, where a library knows its shape."""
    if name in DEMOS:
        loaded = load("vit" if name in VITS else name, name)
        return audit_text(loaded.model) if name == "llama" else audit_pictures(loaded.model, pixel_size(loaded))
    import open_clip
    import timm

    if timm.is_model(name.split(".")[0]):
        model = timm.create_model(name.split(".")[0]).eval()
        return audit_pictures(model, model.default_cfg["input_size"][1:])
    if name in open_clip.list_models():
        model = open_clip.create_model(name).eval()
        return audit_pictures(model, model.visual.image_size)
    from transformers import AutoModelForCausalLM

    config = transformers_config(name)
    return audit_text(AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval())


def audit_pictures(model: Any, size: tuple[int, int]) -> Audit:
    pixels = torch.randn(1, 3, *size, requires_grad=True)
    answer = model.encode_image(pixels, normalize=True) if hasattr(model, "encode_image") else model(pixels)
    return audit(answer.flatten(1)[:, 0], pixels)


def audit_text(model: Any) -> Audit:
    tokens = model.get_input_embeddings()(torch.arange(4, 10)[None]).detach().requires_grad_()
    return audit(model(inputs_embeds=tokens, use_cache=False).logits[:, -1, 0], tokens)


# ---- the demo's page -------------------------------------------------------------------------------------------------


def demo_pictures() -> list[str]:
    loaded = load("vit", None)
    scene = draw_scene(2, classes=["cat", "umbrella"])
    pixels = loaded.transform(Image.fromarray(scene.image))
    targets = scene.classes.tolist()
    parts = ["<h2>image: two classes in one picture</h2>"]
    for method, rules in (("FullGrad+", "plain"), ("FullGrad+", "libra"), ("Attention Rollout", "plain")):
        result = attribute_classes(loaded, pixels, targets, method, rules)
        names = [class_name(loaded, target) for target in targets]
        parts += [
            f"<h3>{method}, {rules}</h3>",
            embedded(picture_figure(loaded, pixels, result, names), f"attribution for {' and '.join(names)}"),
        ]
    return [*parts, *demo_audit("vit")]


def demo_prompts() -> list[str]:
    loaded = load("clip", None)
    scene = draw_scene(3, objects=2, classes=["heart", "cat"], colours=["red", "blue"])
    pixels = loaded.transform(Image.fromarray(scene.image))
    prompts = ["a red heart", "a blue cat"]
    parts = ["<h2>clip: the region a prompt speaks of</h2>"]
    for rules in ("plain", "libra"):
        result = attribute_phrases(loaded, pixels, prompts, "FullGrad+", rules)
        parts += [
            f"<h3>FullGrad+, {rules}</h3>",
            embedded(picture_figure(loaded, pixels, result, prompts), f"attribution for {' and '.join(prompts)}"),
        ]
    return [*parts, *demo_audit("clip")]


def demo_text() -> list[str]:
    loaded = load("llama", None)
    strips = [attribute_text(loaded, DEMO_PROMPT, None, None, "FullGrad+", rules)[0] for rules in ("plain", "libra")]
    return ["<h2>text: where the next word comes from</h2>", TokenStrips(*strips)._repr_html_(), *demo_audit("llama")]


DEMO_PROMPT = "Mary has a yellow ball. Dora has a red ring. Hugo has a brown cup. What colour is Dora's ring?"


def demo_audit(kind: str) -> list[str]:
    return [f"<details><summary>audit {kind}</summary><pre>{escape(str(audit_model(kind)))}</pre></details>"]


# ---- input and output ------------------------------------------------------------------------------------------------


def load(kind: str, name: str | None) -> LoadedModel:
    if kind == "llama" and not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    demo = name or kind
    if demo != kind and not (kind == "vit" and demo in VITS):
        return load_pretrained(kind, demo)
    try:
        return load_demo(demo)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error} Or name a real model: --model {REAL[kind]}") from error


def check_output(args: argparse.Namespace, suffixes: list[str] | None = None) -> None:
    """Fail before the work, not after it."""
    suffixes = suffixes or [".png", ".jpg", ".pdf", ".svg"]
    if args.output.suffix not in suffixes:
        raise ValueError(f"can't write {args.output}: choose a name that ends in {', '.join(suffixes)}")
    for path in filter(None, (args.output, args.save_scores)):
        if not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} doesn't exist: make it first")


def find_class(loaded: LoadedModel, wanted: str) -> int:
    """The number of a class by number, by its name, or by a word of its name."""
    names = loaded.class_names
    if wanted.isdigit():
        count = len(names) if names else loaded.model.num_classes
        if int(wanted) >= count:
            raise ValueError(f"{loaded.name} has classes 0..{count - 1}, not {wanted}")
        return int(wanted)
    if not names:
        raise ValueError(f"{loaded.name} comes without class names: give the class as a number")
    word = wanted.lower()
    synonyms = [[part.strip().lower() for part in name.split(",")] for name in names]
    exact = [i for i, parts in enumerate(synonyms) if word in parts]
    partial = [i for i, parts in enumerate(synonyms) if any(word in part.split() for part in parts)]
    found = exact or partial
    if len(found) == 1 or exact:
        return found[0]
    if found:
        some = "; ".join(f"{i} {names[i]}" for i in found[:6])
        raise ValueError(f"{wanted!r} could be any of {len(found)} classes of {loaded.name}: {some}. Give the number.")
    known = ", ".join(names) if len(names) < 20 else f"{len(names)} classes, such as {names[0]}"
    advice = f"; for photographs name a real model: --model {REAL['vit']}" if loaded.name.startswith("demo") else ""
    raise ValueError(f"{loaded.name} knows no class {wanted!r}: it knows {known}{advice}")


def find_token(loaded: LoadedModel, word: str) -> int:
    """The token that begins `word` within a text."""
    for text in (" " + word.lstrip(), word):
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids and ids[0] != loaded.tokenizer.unk_token_id and loaded.tokenizer.decode([ids[0]]).strip():
            return ids[0]
    raise ValueError(f"{loaded.name} has no token for {word!r}")


def class_name(loaded: LoadedModel, target: int) -> str:
    return loaded.class_names[target].split(",")[0] if loaded.class_names else f"class {target}"


def pixel_size(loaded: LoadedModel) -> tuple[int, int]:
    return tuple(loaded.transform(Image.new("RGB", (64, 64))).shape[1:])


def picture_figure(loaded: LoadedModel, pixels: Tensor, result: Attribution, titles: list[str]) -> Figure:
    """The picture as the model sees it, and one panel a target."""
    maps = {
        f"{title} ({i + 1})" if titles.count(title) > 1 else title: result.maps[i : i + 1].numpy()
        for i, title in enumerate(titles)
    }
    return heatmaps([seen_picture(loaded, pixels)], maps, size=2.4)


def seen_picture(loaded: LoadedModel, pixels: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 from the model's input, its normalisation undone."""
    normalise = [
        step for step in getattr(loaded.transform, "transforms", []) if hasattr(step, "mean") and hasattr(step, "std")
    ]
    mean, std = (normalise[-1].mean, normalise[-1].std) if normalise else (0.5, 0.5)
    mean, std = (torch.as_tensor(value, dtype=pixels.dtype).reshape(-1, 1, 1) for value in (mean, std))
    return ((pixels * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()


def report(args: argparse.Namespace, result: Attribution, titles: list[str]) -> None:
    for title, output, error in zip(titles, result.output, result.completeness_error, strict=True):
        known = "" if error.isnan() else f", completeness error {error:.1e}"
        print(f"{title}: output {output:.3f}{known}")
    if args.save_scores:
        tensors = {"scores": result.scores, "output": result.output, "completeness_error": result.completeness_error}
        arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        np.savez(args.save_scores, targets=titles, grid=result.grid or (), **arrays)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(main())
