"""Choose a class or a prompt, a method, rules and a layer, and see the map at once.

    explore_vit(load_demo("vit"), picture)                # in a notebook: widgets
    explore_vit(load_demo("vit"), picture).show("cat", "GenAtt", "plain")   # anywhere: the same by plain arguments

Where ipywidgets isn't installed, or nothing answers a widget (a page on the web), the first map stands there by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .attribution import Attribution, attribute
from .explanations import written
from .hovering import PatchMap
from .methods import METHODS, NAMED_RULES
from .models import LoadedModel, seen_picture, token_texts
from .plots import Strip, TokenStrips
from .prompts import encode_prompts
from .sentences import check_text, in_html

ONE_GRADIENT = [
    name for name in METHODS if not name.startswith(("IG", "SmoothGrad", "Occluded"))
]  # the others take their time
ALL = "all"


class Explorer:
    """A picture or a text, and what can be asked of it.

    `show` draws for plain arguments; in a notebook the explorer displays itself as widgets that call it.
    """

    def __init__(self, draw: Callable[..., Any], **choices: Sequence[str] | str):
        """
        Args:
            draw: takes one keyword argument for each of `choices` and returns something with `_repr_html_`.
            **choices: a list to choose from, whose first is the default; or the default of what can be typed.
        """
        self.draw, self.choices = draw, choices
        self.first = {name: several if isinstance(several, str) else several[0] for name, several in choices.items()}

    def show(self, *chosen: str, **by_name: str) -> Any:
        """What is drawn for these choices, in the order of `choices` or by name; the first of each where none is named.

        Raises:
            ValueError: a choice that isn't there, and whatever the attribution refuses.
        """
        if len(chosen) > len(self.choices):
            raise ValueError(f"there are {len(self.choices)} choices, got {len(chosen)}: {', '.join(self.choices)}")
        asked = {**self.first, **dict(zip(self.choices, chosen, strict=False)), **by_name}
        for name, value in asked.items():
            known = self.choices.get(name)
            if known is None:
                raise ValueError(f"there is no choice {name!r}; there are {', '.join(self.choices)}")
            if not isinstance(known, str) and value not in known:
                raise ValueError(f"{name} can't be {value!r}; it can be {', '.join(known)}")
        return self.draw(**asked)

    def html(self, **asked: str) -> str:
        """What `show` draws, or the sentence with which it refuses."""
        try:
            return self.show(**asked)._repr_html_()
        except (ValueError, NotImplementedError) as refused:
            return f'<div role="alert">{in_html(refused)}</div>'

    def widget(self) -> Any:
        """Menus and fields above the map, which follows them. Needs ipywidgets."""
        import ipywidgets

        menus = {
            name: ipywidgets.Text(several, description=name, continuous_update=False)
            if isinstance(several, str)
            else ipywidgets.Dropdown(options=several, description=name)
            for name, several in self.choices.items()
        }
        picture = ipywidgets.HTML(self.html())

        def follow(change: Any) -> None:
            picture.value = self.html(**{name: menu.value for name, menu in menus.items()})

        for menu in menus.values():
            menu.observe(follow, "value")
        row = ipywidgets.HBox(list(menus.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
        return ipywidgets.VBox([row, picture])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        still = {"text/plain": f"Explorer of {', '.join(self.choices)}: .show(...)", "text/html": self.html()}
        if not find_spec("ipywidgets"):
            return still
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget().model_id}
        return {"application/vnd.jupyter.widget-view+json": view, **still}  # Colab's ipywidgets 7 can't be asked for it


def explore_vit(loaded: LoadedModel, picture: Any, classes: Sequence[str] | None = None) -> Explorer:
    """A picture and a classifier of pictures.

    Args:
        loaded: from load_demo("vit") or load_pretrained("vit", name).
        picture: a PIL image.
        classes: to choose from; default: the ten that the model finds likeliest.
    Returns:
        An Explorer with the choices class_name, method, rules and layer ("all", or the block to start from, or to
        look at).
    """
    pixels = loaded.transform(picture)[None].to(device_of(loaded))
    names = loaded.class_names or [str(number) for number in range(loaded.model.num_classes)]
    with torch.no_grad():
        likeliest = [names[i] for i in loaded.model(pixels)[0].topk(min(10, len(names))).indices]

    def draw(class_name: str, method: str, rules: str, layer: str) -> PatchMap:
        return on_picture(loaded, pixels, names.index(class_name), class_name, method, rules, layer)

    return Explorer(draw, class_name=list(classes or likeliest), **kinds_of_maps(loaded))


def explore_clip(loaded: LoadedModel, picture: Any, prompt: str) -> Explorer:
    """A picture and any sentence about it.

    Args:
        loaded: from load_demo("clip") or load_pretrained("clip", name).
        picture: a PIL image.
        prompt: the first sentence; another can be typed.
    """
    pixels = loaded.transform(picture)[None].to(device_of(loaded))

    def draw(prompt: str, method: str, rules: str, layer: str) -> PatchMap:
        direction = encode_prompts(loaded, [prompt])[0].to(pixels.device)
        return on_picture(loaded, pixels, direction, prompt, method, rules, layer)

    return Explorer(draw, prompt=prompt, **kinds_of_maps(loaded))


def explore_llama(loaded: LoadedModel, prompt: str, answer: str) -> Explorer:
    """A prompt and any word that could follow it.

    Args:
        loaded: from load_demo("llama") or load_pretrained("llama", name).
        prompt: the first text; another can be typed.
        answer: the first word to explain; the first of its tokens is.
    """

    def draw(prompt: str, answer: str, method: str, rules: str, layer: str) -> TokenStrips:
        check_text(prompt, "the prompt")
        check_text(answer, "the answer")
        ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids.to(device_of(loaded))
        tokens = loaded.tokenizer(answer, add_special_tokens=False).input_ids
        if not tokens:
            raise ValueError("answer is empty: type a word that could follow the prompt")
        found = attribute(
            loaded.model, ids, tokens[0], method, NAMED_RULES[rules], **blocks_asked(loaded, method, layer)
        )
        title = described(written(loaded, tokens[0], answer), method, rules, layer, found)
        return TokenStrips(Strip(token_texts(loaded.tokenizer, ids[0]), found.scores[0].tolist(), title))

    return Explorer(draw, prompt=prompt, answer=answer, **kinds_of_maps(loaded))


def device_of(loaded: LoadedModel) -> torch.device:
    return next(loaded.model.parameters()).device


def kinds_of_maps(loaded: LoadedModel) -> dict[str, list[str]]:
    first = sorted(ONE_GRADIENT, key=lambda name: name != "FullGrad+")
    layers = [ALL, *(str(layer) for layer in range(len(loaded.blocks)))]
    return {"method": first, "rules": sorted(NAMED_RULES, key=lambda name: name != "libra"), "layer": layers}


def on_picture(
    loaded: LoadedModel, pixels: Tensor, target: Any, name: str, method: str, rules: str, layer: str
) -> PatchMap:
    found = attribute(loaded.model, pixels, target, method, NAMED_RULES[rules], **blocks_asked(loaded, method, layer))
    title = described(name, method, rules, layer, found)
    return PatchMap(seen_picture(loaded, pixels[0].cpu()), found.maps[0].cpu(), title)


def described(name: str, method: str, rules: str, layer: str, found: Attribution) -> str:
    where = "" if layer == ALL else f", layer {layer}"
    return f"{name} ({found.output.item():.2f}): {method}, {rules}{where}"


@cache
def layer_option(method: str) -> str | None:
    """The option of a method that takes blocks: "layers" several, "layer" one."""
    return next((name for name in ("layers", "layer") if name in inspect.signature(METHODS[method]).parameters), None)


def blocks_asked(loaded: LoadedModel, method: str, layer: str) -> dict[str, Any]:
    """The method's option for a layer: of a sum the blocks from that one on, of a map of one block that one."""
    if layer == ALL:
        return {}
    option = layer_option(method)
    if option is None:
        raise ValueError(f"{method} reads all blocks at once: choose layer {ALL!r}")
    return {option: range(int(layer), len(loaded.blocks)) if option == "layers" else int(layer)}
