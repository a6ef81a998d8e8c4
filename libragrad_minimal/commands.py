"""The commands that cli.py names; each reads its arguments, checks where it writes, works, and says what it did."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .attribution import Attribution
from .audits import audit_model
from .class_names import find_class
from .engine import Rules
from .explanations import (
    attribute_classes,
    attribute_phrases,
    attribute_text,
    class_name,
    crop_box,
    picture_figure,
    rules_name,
)
from .files import whole_file
from .methods import METHODS, NAMED_RULES
from .models import DEMOS, VITS, LoadedModel, Unreachable, load_demo, load_pretrained
from .outputs import HTML, KINDS, checked, places, writable
from .pages import page
from .pictures import EXTENSIONS, open_picture
from .plots import STRONGEST, Look, Strip, TokenStrips
from .progress import complain, tell, telling
from .relevance import MS_MARCO, CrossEncoder, load_cross_encoder
from .relevance import relevance as relevance_of
from .sweep import RAW, WRONG, Bounds, read, summary, sweep
from .zoo import LIBRARIES, registered

REAL = {  # the defaults: each the smallest that is of use on photographs and texts of yours
    "vit": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "clip": "ViT-B-16/laion2b_s34b_b88k",
    "llama": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
SIZES = {"vit": "23 MB", "clip": "0.6 GB", "llama": "0.3 GB"}
DEMO_KNOWS = {
    "vit": "twelve drawn glyphs and no photograph",
    "clip": "twelve drawn glyphs in six colours and no photograph",
    "llama": "a few hundred words of made-up sentences",
}


LONGEST = 200  # characters of a title
METHOD_HELP = ", ".join(name for name in METHODS if not name.startswith(("IG ", "SmoothGrad ")))
METHOD_HELP += "; or IG or SmoothGrad and the name of one that reads gradients"
RULES_HELP = ", ".join(NAMED_RULES)

# ---- what is typed ---------------------------------------------------------------------------------------------------


class Named(click.ParamType):
    """One of some names, however it is capitalised or joined: attention-rollout, ATTCAT, fullgrad+; AttnLRP."""

    def __init__(self, name: str, known: Iterable[str], listed: str) -> None:
        self.name, self.listed = name, listed
        self.known = {self.squeezed(one): one for one in known}

    @staticmethod
    def squeezed(name: str) -> str:
        return "".join(c for c in name.lower() if c.isalnum() or c == "+")

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        typed = self.squeezed(value)
        if typed in self.known:
            return self.known[typed]
        close = [self.known[name] for name in get_close_matches(typed, self.known)]
        return self.fail(f"unknown {self.name} {value!r}; there are {', '.join(close) or self.listed}", param, ctx)


class Several(click.ParamType):
    """Names with commas between them."""

    name = "names"

    def __init__(self, one: click.ParamType) -> None:
        self.one = one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self.one.convert(name.strip(), param, ctx) for name in value.split(","))


METHOD = Named("method", METHODS, METHOD_HELP)
RULES = Named("rules", NAMED_RULES, RULES_HELP)
MORE_THAN_NONE = click.FloatRange(0, min_open=True)


commands: dict[str, click.Command] = {}


def command(*examples: str) -> Callable:
    """A command, with examples at the end of its help; they begin with its name."""
    name = examples[0].split()[0]
    epilog = "\b\nExamples:\n" + "\n".join(f"  libragrad {example}" for example in examples)

    def decorate(function: Callable) -> click.Command:
        commands[name] = click.command(name, epilog=epilog)(function)
        return commands[name]

    return decorate


def photographs(function: Callable) -> Callable:
    return click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")(function)


@dataclass(frozen=True)
class Asked:
    """The options that all explanations share."""

    kind: str
    method: str
    rules: Rules | None
    model: str | None
    output: str | None
    format: str
    save_scores: str | None
    overwrite: bool
    look: Look

    def figure_and_scores(self, sources: Sequence[str], kinds: Sequence[str]) -> list[tuple[Path, Path | None]]:
        """Where to write for each source, checked: files for one, folders for several."""
        inputs = [Path(source).expanduser() for source in sources if "://" not in source]
        default = f"attribution.{self.format}" if len(sources) == 1 else "attributions"
        figures = places(default if self.output is None else self.output, sources, kinds, f".{self.format}")
        checked(figures, kinds, self.overwrite, inputs)
        if self.save_scores is None:
            return [(figure, None) for figure in figures]
        scores = places(self.save_scores, sources, [".npz"], ".npz")
        checked(scores, [".npz"], self.overwrite, inputs)
        return list(zip(figures, scores, strict=True))


def model_help(kind: str) -> str:
    if kind == "relevance":
        return f"A cross-encoder, by its hub's name or its folder.  [default: {MS_MARCO}]"
    return (
        f"A name on its hub, or demo: the small one shipped here, which knows {DEMO_KNOWS[kind]}.  "
        f"[default: {REAL[kind]}, {SIZES[kind]} to download once]"
    )


def explaining(kind: str, default_format: str, formats: Sequence[str], method: str = "FullGrad+") -> Callable:
    """The options that all explanations share; the command gets them as one `Asked`."""
    options = (
        click.option("--method", type=METHOD, default=method, show_default=True, help=f"One of {METHOD_HELP}."),
        click.option("--rules", type=RULES, help=f"One of {RULES_HELP}.  [default: libra, for IG plain]"),
        click.option(
            "--model",
            help=model_help(kind),
        ),
        click.option("-o", "--output", metavar="PATH", help="A file, or a folder; for several pictures a folder."
                     f"  [default: attribution.{default_format}]"),
        click.option("--format", type=click.Choice(formats), default=default_format, show_default=True,
                     help="Of the files in a folder; a single file's is its extension."),
        click.option("--save-scores", metavar="FILE.npz", help="The numbers behind the picture, too."),
        click.option("--overwrite", is_flag=True, help="Replace files that are there already."),
        click.option("--colormap", metavar="NAME", help="Of matplotlib, its middle for zero, such as RdBu_r."
                     "  [default: orange for, blue against]"),
        click.option("--alpha", type=float, default=1.0 if "html" not in formats else STRONGEST, show_default=True,
                     help="Opacity of the strongest score."),
        click.option("--signs", type=click.Choice(["together", "apart"]), default="together", show_default=True,
                     help="One scale for both signs, or each its own."),
    )  # fmt: skip

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def with_asked(method, rules, model, output, format, save_scores, overwrite, colormap, alpha, signs, **others):
            look = Look(colormap, alpha, signs == "apart")
            chosen = None if rules is None else NAMED_RULES[rules]
            return function(Asked(kind, method, chosen, model, output, format, save_scores, overwrite, look), **others)

        for option in reversed(options):
            with_asked = option(with_asked)
        return with_asked

    return decorate


# ---- explanations ----------------------------------------------------------------------------------------------------

FIGURES = ["png", "jpg", "pdf", "svg"]


@command(
    "image photo.jpg --class tabby --class espresso -o classes.png",
    "image holiday/ --method attention-rollout --head-fusion max -o maps --format svg",
)
@photographs
@click.option("--class", "classes", multiple=True, metavar="NAME|NUMBER", help="Repeatable.  [default: the predicted]")
@click.option("--head-fusion", type=click.Choice(["mean", "max", "min"]), help="Of Attention Rollout.")
@click.option("--discard-ratio", type=click.FloatRange(0, 1, max_open=True), help="Of the rollouts.")
@explaining("vit", "png", FIGURES)
def image(asked: Asked, photos: tuple[str, ...], classes: tuple[str, ...], **options: Any) -> int:
    """Which parts of a photograph speak for a class.

    PHOTO is a file, a folder of pictures, or an address that begins with https://; several will do.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        able = [method for method, function in METHODS.items() if name in inspect.signature(function).parameters]
        if asked.method not in able:
            whose = " and ".join(able)
            raise ValueError(
                f"--{name.replace('_', '-')} is for {whose}, not for {asked.method}: name one with --method"
            )

    def prepare(loaded: LoadedModel) -> Callable[[Tensor], tuple[Attribution, list[str], list[int]]]:
        count = len(loaded.class_names or []) or loaded.model.num_classes
        named = [find_class(name, loaded.class_names, count, loaded.name) for name in classes]

        def explain(pixels: Tensor) -> tuple[Attribution, list[str], list[int]]:
            targets = named
            if not targets:
                with torch.no_grad():
                    targets = [loaded.model(pixels[None]).argmax().item()]
            result = attribute_classes(loaded, pixels, targets, asked.method, asked.rules, **given)
            return result, [class_name(loaded, target) for target in targets], targets

        return explain

    return explain_pictures(asked, photos, prepare, **given)


@command(
    'clip photo.jpg --prompt "a cat" --prompt "a cup" -o prompts.png',
    'clip holiday/ --prompt "the sea" -o maps',
)
@photographs
@click.option("-p", "--prompt", "prompts", multiple=True, required=True, help="A sentence; repeatable.")
@explaining("clip", "png", FIGURES)
def clip(asked: Asked, photos: tuple[str, ...], prompts: tuple[str, ...]) -> int:
    """Which parts of a photograph a sentence speaks of.

    PHOTO is a file, a folder of pictures, or an address that begins with https://; several will do.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty; say what to look for, such as 'a cat'")

    def prepare(loaded: LoadedModel) -> Callable[[Tensor], tuple[Attribution, list[str], list[str]]]:
        def explain(pixels: Tensor) -> tuple[Attribution, list[str], list[str]]:
            result = attribute_phrases(loaded, pixels, prompts, asked.method, asked.rules)
            titles = [prompt if len(prompt) <= LONGEST else f"{prompt[:LONGEST]}..." for prompt in prompts]
            return result, titles, list(prompts)

        return explain

    return explain_pictures(asked, photos, prepare)


def explain_pictures(asked: Asked, photos: Sequence[str], prepare: Callable, **options: Any) -> int:
    """Each picture with the function that `prepare` makes of the model; one that can't be read doesn't stop others.

    `options` of the method are saved with the scores.
    """
    sources = picture_sources(photos)
    places = asked.figure_and_scores(sources, KINDS)
    one = len(sources) == 1
    opened = opened_picture(sources[0]) if one else None  # before anything is downloaded for it
    loaded = load(asked.kind, asked.model)
    explain = prepare(loaded)
    failed = 0
    bar = tqdm(zip(sources, places, strict=True), total=len(sources), unit="picture", delay=2, disable=one or None)
    for source, (figure, scores) in bar:
        try:
            photo = opened or opened_picture(source)
            pixels = loaded.transform(photo)
            with telling(f"explaining {source}", has_bar=not one):
                result, titles, targets = explain(pixels)
        except (ValueError, OSError) as error:
            if one:
                raise
            complain(f"error: {error}")
            failed += 1
            continue
        save_figure(picture_figure(loaded, pixels, result, titles, asked.look), figure)
        if scores:
            about = {"photograph": source, "size": photo.size, "crop_box": crop_box(loaded.transform, photo.size)}
            save_scores(scores, result, loaded, asked.method, titles, target=targets, **about, **options)
        say(result, titles, figure, scores)
    return 2 if failed else 0


@command('text "The capital of France is" --target Paris --against London -o strip.html')
@click.argument("prompt")
@click.option("--target", help="The next word to explain.  [default: the model's own]")
@click.option("--against", help="Explain why the target and not this word.")
@explaining("llama", "html", ["html", *FIGURES])
def text(asked: Asked, prompt: str, target: str | None, against: str | None) -> int:
    """Which words of a text a language model's next word comes from.

    A character that is cut over several tokens stands at the first of them, and dots at the others.
    """
    ((place, scores),) = asked.figure_and_scores(["attribution"], [*HTML, *KINDS])
    loaded = load("llama", asked.model)
    with telling("explaining the next word"):
        strip, result, chosen = attribute_text(loaded, prompt, target, against, asked.method, asked.rules)
    save_strip(strip, asked.look, place)
    if scores:
        about = {"tokens": list(strip.tokens), "text": prompt, "against": against or ""}
        save_scores(scores, result, loaded, asked.method, [strip.title], target=[chosen], **about)
    say(result, [strip.title], place, scores)
    return 0


@command('relevance "How many people live in Berlin?" "Berlin has 3.7 million inhabitants." -o relevance.html')
@click.argument("question")
@click.argument("passage")
@explaining("relevance", "html", ["html", *FIGURES], method="FullGrad")
def relevance(asked: Asked, question: str, passage: str) -> int:
    """Which words make a passage answer a question."""
    ((place, scores),) = asked.figure_and_scores(["attribution"], [*HTML, *KINDS])
    name = asked.model or MS_MARCO
    bars_in_terminals_only()
    with telling(f"loading {name}"):
        encoder = load_cross_encoder(name)
    with telling("explaining the answer"):
        found = relevance_of(question, passage, encoder, asked.method, asked.rules)
    rules = rules_name(found.attribution.rules)
    save_strip(
        found.strip(f"why this passage answers this question, or not ({asked.method}, {rules})"), asked.look, place
    )
    if scores:
        texts = {"question": question, "passage": passage, "tokens": found.tokens}
        words = {"words": found.words, "word_scores": found.scores}
        save_scores(scores, found.attribution, encoder, asked.method, ["relevance"], target=[0], **texts, **words)
    say(found.attribution, ["relevance"], place, scores)
    return 0


@command("demo -o demo.html")
@click.option("-o", "--output", metavar="PATH", default="libragrad_demo.html", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there already.")
def demo(output: str, overwrite: bool) -> int:
    """Everything above on the small models shipped here, offline, on one page."""
    from .demo import demo_page

    (place,) = places(output, ["libragrad_demo"], HTML, ".html")
    checked([place], HTML, overwrite)
    with telling("explaining three demo models"):
        made = demo_page()
    place.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(place) as beside:
        beside.write_text(made, encoding="utf-8")
    tell(f"wrote {place}")
    return 0


# ---- measurements ----------------------------------------------------------------------------------------------------


@command("audit vit_base_patch16_siglip_224", "audit llama")
@click.argument("model")
def audit(model: str) -> int:
    """Which operations a model has, and how each is treated; status 1 if one is unsupported.

    MODEL is vit, clip or llama (the demos), a name of timm or open_clip, or a name or folder of transformers.
    """
    with telling(f"building {model}"):
        table = audit_model(model)
    click.echo(str(table))
    return int(any(treatment == "unsupported" for _, treatment, _ in table.rows))


@command('sweep timm --pattern "vit_tiny*"')
@click.argument("library", type=click.Choice(list(LIBRARIES)))
@click.option("--pattern", default="*", show_default=True, help="Of names: 'vit_*', 'decoder *', '* text'.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Models at a time.")
@click.option("--seconds", type=MORE_THAN_NONE, default=300, show_default=True, help="That a model may take.")
@click.option("--gigabytes", type=MORE_THAN_NONE, default=6, show_default=True, help="That a model may use.")
@click.option("-o", "--output", metavar="PATH", help="The table, or a folder for it.  [default: sweep_LIBRARY.csv]")
def sweep_models(library, pattern, processes, seconds, gigabytes, output) -> int:
    """Does it work on every model of a library? One row a model; goes on where it was.

    Status 1 if anything is wrong or raises what isn't a refusal.
    """
    name = f"sweep_{library}"
    (path,) = places(f"{name}.csv" if output is None else output, [name], [".csv"], ".csv")
    if path.suffix.lower() != ".csv":
        raise ValueError(f"can't write {path}: choose a name that ends in .csv")
    writable(path)
    names = registered(library, pattern)
    if not names:
        raise ValueError(f"{library} has no model that matches {pattern!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with telling(f"trying {len(names)} models of {library}", has_bar=True):
        sweep(library, names, path, processes, Bounds(seconds, gigabytes))
    rows = [row for row in read(path) if row["model"] in set(names)]
    click.echo(summary(rows))
    tell(f"wrote {path}")
    return int(any(row["attribute"].startswith((RAW, WRONG)) or row["engine"] in (RAW, WRONG) for row in rows))


@command(
    "benchmark --model vit --data scenes:40 -o measured",
    'benchmark --compare "FullGrad+ libra" "FullGrad+ plain" -o measured',
)
@click.option("--model", help=f"A demo ({', '.join(DEMOS)}); a name of timm, open_clip (NAME/TAG) or the hub.")
@click.option(
    "--data",
    metavar="KIND:WHERE",
    help="imagenet, imagenet-s, objects, pets, coco, mura, hub, scenes; for texts: texts, hub.",
)
@click.option("--methods", type=Several(METHOD), metavar="NAME,...", help="With commas: IxG,FullGrad+,LeGrad.")
@click.option("--rules", type=Several(RULES), metavar="NAME,...", help=f"Of {RULES_HELP}.  [default: plain,libra]")
@click.option(
    "--metrics",
    type=Several(click.Choice(["completeness", "deletion", "segmentation"])),
    metavar="NAME,...",
    help="Of completeness, deletion, segmentation.  [default: all, segmentation where there are masks]",
)
@click.option(
    "--protocol",
    "protocols",
    type=Several(click.Choice(["drop", "paint"])),
    metavar="NAME,...",
    help="Of deletion.  [default: drop,paint]",
)
@click.option("--target", type=click.Choice(["predicted", "true", "second"]), help="  [default: predicted]")
@click.option(
    "--explain",
    type=click.Choice(["logit", "probability", "ahead"]),
    help="Of the class: its logit, its probability, or how far its logit is ahead of all.  [default: logit]",
)
@click.option("--count", type=int, help="Only so many examples, spread evenly.  [default: all]")
@click.option("--batch", type=int, help="Examples at a time.  [default: 8]")
@click.option("--threads", type=int, help="CPU threads of a process; no digit depends on them.  [default: all]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--device-map", type=click.Choice(["auto"]), help="Spread a language model over several devices.")
@click.option("--csv", is_flag=True, help="The table as CSV, too.")
@click.option("--compare", nargs=2, metavar="A B", help="Measure nothing: two runs ('FullGrad+ libra') or folders.")
@click.option("-o", "--output", metavar="FOLDER", default="benchmark", show_default=True)
def benchmark(device_map, csv, compare, output, **given) -> int:  # fmt: skip
    """Does it tell the truth? Every method on a data set, in one table; goes on where it was."""
    from . import benchmark, report

    folder = Path(output).expanduser()
    if compare:
        table = benchmark.compare(compare[0], compare[1], folder).rename(columns={"error": "standard error"})
        click.echo(table.to_string(index=False, float_format="{:.3f}".format))
        return 0
    if not (given["model"] and given["data"]):
        raise ValueError("a benchmark needs --model and --data, or --compare")
    writable(folder / "table.parquet")
    settings = benchmark.Settings(**{name: value for name, value in given.items() if value is not None})
    with telling(f"measuring {settings.model} on {settings.data}", has_bar=True):
        path = benchmark.run(settings, folder, device_map)
    if path is None:
        tell(f"this process's share is done; the table in {folder} comes when the others are")
        return 0
    table = benchmark.read_table(folder)
    if csv:
        table.to_csv(path.with_suffix(".csv"), index=False)
    report.figure(table).savefig(path.with_name("figure.png"), dpi=120)
    told = [(name, str(value)) for name, value in vars(settings).items() if value is not None]
    with whole_file(path.with_name("report.html")) as page_file:
        page_file.write_text(report.page(table, told), encoding="utf-8")
    counted = f"{report.measured(table)} examples measured, {len(benchmark.skipped(table))} skipped"
    tell(f"{counted}; wrote {path}, figure.png and report.html beside it")
    return 0


# ---- input and output ------------------------------------------------------------------------------------------------


def load(kind: str, name: str | None) -> LoadedModel:
    """The demo model only for who asks for it."""
    if kind == "llama":
        bars_in_terminals_only()
    if name == "demo" or kind == "vit" and name in VITS:
        try:
            return load_demo(kind if name == "demo" else name)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{error} Or leave --model demo out, for {REAL[kind]}") from error
    chosen = name or REAL[kind]
    try:
        with telling(f"loading {chosen}"):
            return load_pretrained(kind, chosen)
    except Unreachable as error:
        size = "" if name else f", for {SIZES[kind]}"
        raise OSError(
            f"{chosen} is not on this machine and the hub can't be reached: connect to the internet once (and unset "
            f"HF_HUB_OFFLINE){size}, name a model that is here, --model NAME, or take the demo model, --model demo, "
            f"which knows {DEMO_KNOWS[kind]}"
        ) from error


def bars_in_terminals_only() -> None:
    """Those of transformers, which fill a log otherwise."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def picture_sources(photos: Sequence[str]) -> list[str]:
    """The pictures of folders by their names, without hidden ones, and everything else as it was typed."""
    sources = []
    for photo in photos:
        folder = Path(photo).expanduser()
        if not photo.strip():
            raise ValueError("the name of a picture is empty")
        if "://" not in photo and folder.is_dir():
            files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
            inside = sorted(str(file) for file in files if file.suffix.lower() in EXTENSIONS)
            if not inside:
                raise ValueError(f"the folder {photo} holds no picture ({', '.join(EXTENSIONS)})")
            sources += inside
        elif "://" not in photo and not folder.is_file():
            raise FileNotFoundError(f"there is no file {photo}; give a path, or an address that begins with https://")
        else:
            sources.append(photo)
    return sources


def opened_picture(source: str) -> Image.Image:
    if "://" not in source:
        return open_picture(source)
    with telling(f"fetching {source}"):
        return open_picture(source)


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=150, format=path.suffix.lower()[1:])


def save_strip(strip: Strip, look: Look, path: Path) -> None:
    strips = TokenStrips(strip, look=look)
    if path.suffix.lower() not in HTML:
        return save_figure(strips.figure(), path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as beside:
        beside.write_text(page(strip.title, strips._repr_html_()), encoding="utf-8")


def save_scores(
    path: Path, result: Attribution, loaded: LoadedModel | CrossEncoder, method: str, titles: list[str], **about: Any
) -> None:
    """All that is needed to know what the numbers are: `np.load(path)` has a name for each."""
    tensors = {"scores": result.scores, "output": result.output, "completeness_error": result.completeness_error}
    numbers: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    names: dict[str, Any] = {
        "model": loaded.name,
        "method": method,
        "rules": rules_name(result.rules),
        "targets": titles,
    }
    buffer = io.BytesIO()
    np.savez(buffer, grid=result.grid or (), **numbers, **names, **about)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as beside:
        beside.write_bytes(buffer.getvalue())


def say(result: Attribution, titles: Sequence[str], place: Path, scores: Path | None) -> None:
    for title, output, error in zip(titles, result.output, result.completeness_error, strict=True):
        known = "" if error.isnan() else f", completeness error {error:.1e}"
        tell(f"{title}: output {output:.3f}{known}")
    tell(f"wrote {place}" + (f" and {scores}" if scores else ""))
