"""How the tokens that enter the first block lie on the picture or in the text: known from shapes, or asked.

Tokens that enter the first block have hardly mixed yet. So the rows of a grid are given numbers, and for each digit of
them, in base four, four pictures are made: one in which the rows with a 0 there are changed, one with a 1, and so on.
Each token spells the number of its row by which change it feels most; then columns, and frames of a video, likewise.
What feels no change is a class token or a register. A wrong grid is found out, as every token is asked; an order of
patches that isn't row by row is read off.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .families import Inputs, call, name_of, picture_token_ids, plain, said_grids
from .streams import in_this_thread, removed, stream_argument

BASE = 4  # neighbours of a row, which overlapping patches look at too, have other last digits
SURE = 0.8  # share of tokens that must spell a digit right; in a wrong grid it is a quarter
SURE_OF_SPACE = 0.4  # where the tensor itself has rows and columns, so that only their order is in question
SHIFTS = (0.0, 0.5, 0.25)  # by how much of a cell; the last where those at the border look at half a cell only
DRAWS, MORE_DRAWS = 4, 16  # changes of each sort, where every single token has to be right
NEARLY = 0.9  # share of cells that a token names, so that more draws may find the others
DEVIATIONS = 3.5  # of a share, for one in some dozens of wrong grids
SMALL_CHANGE = 0.05  # of the pixels, beside one that is as large as they are
SURE_IF_MIXED = 0.5  # behind a whole tower, whose attention has mixed the patches


@dataclass(frozen=True)
class Axes:
    """Which dimensions of a tensor are samples and tokens; the others are channels."""

    batch: int = 0
    tokens: tuple[int, ...] = (1,)

    def arrange(self, tensor: Tensor) -> Tensor:
        """(B, N, C), whatever the order of the dimensions."""
        moved = tensor.movedim((self.batch, *self.tokens), tuple(range(1 + len(self.tokens))))
        return moved.flatten(1, len(self.tokens)).flatten(2) if moved.dim() > 1 + len(self.tokens) else moved

    def sizes(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(tensor.shape[dim] for dim in self.tokens)


@dataclass(frozen=True)
class Layout:
    """Where the explained parts of the input are among the tokens."""

    axes: Axes
    place: Tensor | None = None  # (parts,) or (B, parts): the token that shows each; None: every token, in its order
    grid: tuple[int, ...] | None = None  # rows and columns of those parts, or frames, rows and columns
    picture: Tensor | None = None  # (B, cells): where among the parts the picture's lie, if they aren't all
    why_no_grid: str = "scores of text have no grid: use .scores"

    @property
    def prefix(self) -> int | None:
        """How many class tokens and registers come before cells that lie row by row, and end the tokens."""
        if self.place is None or self.place.dim() > 1:
            return None
        first, cells = int(self.place[0]), len(self.place)
        in_order = torch.equal(self.place, torch.arange(first, first + cells, device=self.place.device))
        return first if in_order else None

    def pick(self, scores: Tensor) -> Tensor:
        """Scores of tokens (B, N) -> of parts (B, parts)."""
        if self.place is None:
            return scores
        place = self.place.to(scores.device)
        return scores[:, place] if place.dim() == 1 else scores.gather(1, place)


class Reached(BaseException):
    """The first block was reached: nothing behind it needs to run. No error, which a model might catch."""


def first_tokens(model: nn.Module, inputs: Inputs, blocks: tuple[nn.Module, ...]) -> Tensor:
    """What enters the first of the blocks that runs."""
    found: list[Tensor] = []

    def enter(block, args, kwargs):
        place = stream_argument(args, kwargs)
        if place is not None:
            found.append((args[place] if isinstance(place, int) else kwargs[place]).detach())
            raise Reached

    hooks = (block.register_forward_pre_hook(in_this_thread(enter), with_kwargs=True) for block in set(blocks))
    with removed(hooks), torch.no_grad(), without_nested_tensors():
        try:
            call(model, inputs)
        except Reached:
            return found[0]
    raise ValueError(f"{name_of(model)} ran none of its blocks on this input; name those that run, blocks=[...]")


@contextlib.contextmanager
def without_nested_tensors() -> Iterator[None]:
    """Inside, nn.TransformerEncoder doesn't leave padding out of its tensors, as it does where there is no graph."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_known: WeakKeyDictionary[nn.Module, dict[tuple, Layout]] = WeakKeyDictionary()


def layout_of(model: nn.Module, inputs: Inputs, blocks: tuple[nn.Module, ...], tokens: Tensor) -> Layout:
    """The layout of `tokens`, which entered the first of the blocks. Raises ValueError where it can't be told."""
    key = (inputs.shapes(), tuple(tokens.shape), id(blocks[0]), picture_positions(model, inputs), inputs.settings())
    known = _known.setdefault(plain(model), {})

    def ask(changed: Inputs) -> Tensor:
        return first_tokens(model, changed, blocks)

    if key in known:
        return known[key]
    if inputs.text is not None:
        layout = text_layout(inputs, inputs.text, tokens, ask)
        if inputs.picture is not None or "image_grid_thw" in inputs.tensors:
            layout = with_picture(model, inputs, layout, tokens, ask)
    elif inputs.picture is not None:
        layout = picture_layout(model, inputs, tokens, ask, SURE)
    else:
        layout = sequence_layout(inputs, tokens, ask)
    if layout.place is None or layout.place.dim() == 1:  # an order of each sample's own may be another next time
        known[key] = layout
    return layout


def check_samples(model: nn.Module, inputs: Inputs, axes: Axes, blocks: tuple[nn.Module, ...], tokens: Tensor) -> None:
    """Raises ValueError where a sample alone makes the tokens that are another's in the batch, sorted perhaps."""
    count = inputs.samples
    if count == 1 or not all(len(tensor) == count for tensor in inputs.tensors.values() if tensor.dim()):
        return
    rows = axes.arrange(tokens.detach()).flatten(1).double()
    for i in range(count):
        one = Inputs(
            inputs.given[i : i + 1]
            if isinstance(inputs.given, Tensor)
            else {k: v[i : i + 1] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.given.items()},
            inputs.about_picture,
        )
        try:
            alone = first_tokens(model, one, blocks)
        except ValueError:  # a model for batches of one size
            return
        if alone.numel() != rows[i].numel():
            return
        apart = (rows - axes.arrange(alone).flatten(1).double()).norm(dim=1)
        if apart[i] > 0.01 * rows[i].norm() and apart.min() < 1e-4 * rows[i].norm():
            raise ValueError(
                f"{name_of(model)} puts the samples of a batch into another order before its first block (sorts them "
                "by length?), so scores would be of other samples: explain one at a time"
            )


def picture_positions(model: nn.Module, inputs: Inputs) -> bytes | None:
    """Where in the texts a picture's tokens are, and how many patches it has: what their layout depends on."""
    text, patches = inputs.text, inputs.tensors.get("image_grid_thw")
    if text is None:
        return None
    if text.is_floating_point():  # their values tell
        return None if inputs.picture is None else text.detach().float().cpu().numpy().tobytes()
    ids = picture_token_ids(model)
    if inputs.picture is not None and not ids:
        return text.cpu().numpy().tobytes()
    where = torch.isin(text, torch.tensor(ids, device=text.device, dtype=text.dtype))
    return where.cpu().numpy().tobytes() + (b"" if patches is None else patches.cpu().numpy().tobytes())


def layer_axes(first: Axes, tokens: Tensor, later: Tensor, grid: tuple[int, ...] | None) -> Axes:
    """The dimensions of later tokens, of a pyramid's stage perhaps: those of the first where they fit, else those that
    make a coarser grid of the first's, else what every library has."""
    samples = tokens.shape[first.batch]
    if later.dim() == tokens.dim() and later.shape[first.batch] == samples:
        if later.dim() == 3 or first.sizes(later) == first.sizes(tokens):
            return first
    options = [Axes(0, (1,))] if later.dim() == 3 else [Axes(0, (1, 2)), Axes(0, (2, 3))]
    if later.dim() == tokens.dim():
        options = [first, *options]
    if grid is not None:
        options.sort(key=lambda axes: coarsening(grid, axes.sizes(later)) is None)
    fitting = [axes for axes in options if max(axes.tokens) < later.dim() and later.shape[axes.batch] == samples]
    if not fitting:
        raise ValueError(
            f"a later block works on {tuple(later.shape)}, in which {samples} samples don't lie side by side"
        )
    return fitting[0]


def coarsening(fine: tuple[int, ...], coarse: tuple[int, ...]) -> int | None:
    """The k by which a grid became coarser, k x k cells to one; also if the coarse one is flat."""
    for k in range(1, max(fine) + 1):
        cells = tuple(-(-n // k) for n in fine)
        if coarse in (cells, (math.prod(cells),)):
            return k
    return None


# ---- sequences -------------------------------------------------------------------------------------------------------


def sequence_layout(inputs: Inputs, tokens: Tensor, ask: Callable[[Inputs], Tensor]) -> Layout:
    """Frames of a sound, or tokens that the model is given as they are."""
    why = "scores of a sequence have no grid: use .scores"
    given = inputs.main
    if given.dim() > 1 and sorted(given.shape[:2]) == sorted(tokens.shape[:2]):
        with contextlib.suppress(ValueError):
            return replace(text_layout(inputs, given, tokens, ask), why_no_grid=why)
    if tokens.shape[0] == inputs.samples:
        return Layout(Axes(0, tuple(range(1, tokens.dim() - 1))), why_no_grid=why)
    if tokens.shape[1] == inputs.samples and tokens.dim() == 3:
        return Layout(Axes(1, (0,)), why_no_grid=why)
    raise ValueError(
        f"the first block works on {tuple(tokens.shape)}, which has no dimension of {inputs.samples} samples"
    )


def text_layout(inputs: Inputs, text: Tensor, tokens: Tensor, ask: Callable[[Inputs], Tensor]) -> Layout:
    samples, length = text.shape[:2]
    pairs = itertools.permutations(range(tokens.dim() - 1), 2)
    fitting = [
        Axes(batch, (dim,)) for batch, dim in pairs if (tokens.shape[batch], tokens.shape[dim]) == (samples, length)
    ]
    if samples == 1 and length == 1:
        return Layout(Axes())
    for axes in fitting:
        share = share_in_order(inputs, text, axes, ask)
        if share == 1:
            return Layout(axes)
        if share >= SURE and spelled_positions(inputs, text, axes, ask) is None:  # neighbours have mixed, perhaps
            return Layout(axes)
    for axes in fitting or [axes for axes in (Axes(0, (1,)), Axes(1, (0,))) if tokens.shape[axes.batch] == samples]:
        place = spelled_positions(inputs, text, axes, ask)
        if place is not None:
            same = fitting and torch.equal(place, torch.arange(length, device=place.device))
            return Layout(axes) if same else Layout(axes, place)
    raise ValueError(
        f"the first block works on {tuple(tokens.shape)} for a text of {samples} x {length} tokens, and changing "
        "single tokens of the text doesn't tell which is which; name the blocks that work on the text, blocks=[...]"
    )


def share_in_order(inputs: Inputs, text: Tensor, axes: Axes, ask: Callable[[Inputs], Tensor]) -> float:
    """How many tokens feel a change of their own position more than one of other positions? Changed are a half of them
    chosen at random, another one in each sample, then the others; tokens that feel neither can't be asked."""
    samples, length = text.shape[:2]
    chosen = torch.rand(samples, length, generator=torch.Generator().manual_seed(0)).argsort(1) < length / 2
    felt = feeling(inputs, text, axes, ask)
    try:
        own, others = felt(chosen.to(text.device)), felt(~chosen.to(text.device))
    except ValueError:  # a text that holds marks, of pictures perhaps, that can't be changed
        return 1.0
    asked = own != others
    return ((own > others) == chosen.to(own.device))[asked].double().mean().item() if asked.any() else 1.0


def feeling(inputs: Inputs, text: Tensor, axes: Axes, ask: Callable[[Inputs], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of positions (samples or 1, length): how much each token, (B, N), feels that they are changed."""
    name = next(name for name, tensor in inputs.tensors.items() if tensor is text)
    other = changed_text(text)
    base = axes.arrange(ask(inputs))

    def felt(mask: Tensor) -> Tensor:
        where = mask.view(*mask.shape, *[1] * (text.dim() - 2))
        return size(axes.arrange(ask(inputs.replaced(name, text.where(~where, other)))) - base)

    return felt


def spelled_positions(inputs: Inputs, text: Tensor, axes: Axes, ask: Callable[[Inputs], Tensor]) -> Tensor | None:
    """Which token shows each position of the text, if there is one for each and the same one in every sample."""
    length = text.shape[1]
    positions = torch.arange(length, device=text.device)[None]
    felt = feeling(inputs, text, axes, ask)
    everything = felt(torch.ones_like(positions, dtype=torch.bool))
    moved = (everything > 0).all(0).nonzero().flatten()
    if len(moved) != length:
        return None
    codes = torch.zeros_like(moved)
    for bit in range(math.ceil(math.log2(max(length, 2)))):
        has = (positions >> bit & 1).bool()
        codes |= (felt(has) > felt(~has)).all(0)[moved].long() << bit
    if sorted(codes.tolist()) != list(range(length)):
        return None
    return moved[codes.argsort()]


def changed_text(text: Tensor) -> Tensor:
    """Another token at every position, out of those that the text has."""
    if text.is_floating_point():
        return text + torch.randn_like(text)
    one, *more = text.unique().tolist()
    other = more[-1] if more else max(one - 1, 0) if one else 1
    return torch.where(text == one, other, one).to(text.dtype)


def size(change: Tensor) -> Tensor:
    """(B, N, C) -> (B, N)"""
    return change.double().norm(dim=-1)


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A guess that the check has to confirm: so many cells along each spatial dimension, each of so many pixels."""

    cells: tuple[int, ...]
    pixels: tuple[float, ...]
    shift: float = 0.0  # convolutions with padding look at the corners of cells

    def digits(self, extent: tuple[int, ...]) -> Iterator[tuple[int, int, list[Tensor]]]:
        """For every digit of every dimension's numbers: (dimension, the digit's worth, the pixels that have a 0 there,
        a 1, ...)."""
        for dim, (cells, pixels, length) in enumerate(zip(self.cells, self.pixels, extent, strict=True)):
            number = ((torch.arange(length) + 0.5) / pixels + self.shift).floor().long()
            number[number >= cells] = -1
            shape = [-1 if i == dim else 1 for i in range(len(extent))]
            worth = BASE ** max(math.ceil(math.log(cells, BASE) - 1e-9) - 1, 0)
            while worth and cells > 1:
                digit = (number // worth % BASE).where(number >= 0, -1)
                yield dim, worth, [(digit == value).view(shape) for value in range(min(BASE, -(-cells // worth)))]
                worth //= BASE

    def is_exact(self, extent: tuple[int, ...]) -> bool:
        return all(n * pixels == length for n, pixels, length in zip(self.cells, self.pixels, extent, strict=True))

    def numbers(self) -> Tensor:
        """(cells, dimensions): each cell's number along each dimension, row by row."""
        return torch.cartesian_prod(*map(torch.arange, self.cells)).reshape(-1, len(self.cells))


def picture_layout(model: nn.Module, inputs: Inputs, tokens: Tensor, ask: Callable, sure: float) -> Layout:
    name = inputs.picture
    assert name is not None
    pixels = inputs.tensors[name]
    spatial = spatial_dimensions(pixels)
    extent = tuple(pixels.shape[dim] for dim in spatial)
    generator = torch.Generator().manual_seed(0)
    noises: list[Tensor] = []

    def felt(axes: Axes, mask: Tensor, draws: int = 1) -> Tensor:
        shape = [pixels.shape[dim] if dim in spatial else 1 for dim in range(pixels.dim())]
        while len(noises) < draws:
            noises.append((pixels.std() + 0.1) * torch.randn(pixels.shape, generator=generator).to(pixels))
        full = mask.expand(extent).reshape(shape).to(pixels.device)
        changed = (axes.arrange(ask(inputs.replaced(name, pixels + noise * full))) for noise in noises[:draws])
        return torch.stack([size(tokens - base[axes]) ** 2 for tokens in changed]).sum(0)

    base: dict[Axes, Tensor] = {}
    again = ask(inputs)
    if not torch.equal(again, ask(inputs)):
        raise ValueError(
            f"{name_of(model)} gives its first block other tokens each time for the same picture (it drops or shuffles "
            "patches at random), so scores have no place on it; fix its random numbers inside forward"
        )
    guesses = []
    for axes in possible_axes(tokens, len(pixels)):
        base[axes] = axes.arrange(again)
        everything = felt(axes, torch.ones(1, dtype=torch.bool))
        moved = everything > 1e-10 * everything.amax()
        counts = moved.sum(1)
        if counts.amin() != counts.amax() or counts[0] == 0:
            continue
        where = moved.nonzero()[:, 1].view(len(moved), -1)
        guesses += [(axes, where, grid) for grid in possible_grids(model, axes.sizes(tokens), where.shape[1], extent)]
    for draws in (1, DRAWS):  # cells row by row
        for axes, where, grid in guesses:
            enough = max(sure if draws == 1 else sure - 0.15, beyond_chance(where.shape[1]))
            enough = min(sure, SURE_OF_SPACE) if grid.cells == axes.sizes(tokens) else enough
            right = spells(grid, extent, where, partial(felt, axes, draws=draws), enough)
            if right == 1 or right and grid.cells == axes.sizes(tokens):
                return in_rows(axes, where, grid)
            if right:  # some tokens say otherwise: do they stand in each other's place, or is it that patches overlap?
                codes = spelled_numbers(grid, extent, where, partial(felt, axes, draws=DRAWS))
                permuted = all(len(set(row)) == codes.shape[1] for row in codes.tolist())
                return in_rows(axes, where.gather(1, codes.argsort(1)) if permuted else where, grid)
    exact = [guess for guess in guesses if guess[2].is_exact(extent) and guess[2].cells != guess[0].sizes(tokens)]
    for axes, where, grid in exact[:9]:  # any other order
        for draws in (DRAWS, MORE_DRAWS):
            codes = spelled_numbers(grid, extent, where, partial(felt, axes, draws=draws))
            named = min(len(set(row)) for row in codes.tolist()) / codes.shape[1]
            if named == 1:
                return Layout(axes, where.gather(1, codes.argsort(1)), grid.cells)
            if named < NEARLY:
                break
    raise ValueError(
        f"the tokens that enter the first block of {name_of(model)}, {tuple(tokens.shape)}, don't lie on the picture "
        f"of {' x '.join(map(str, extent))} in rows and columns, as changing parts of it shows; explain "
        "libra_grad(output, pixels) instead, or name other blocks, blocks=[...]"
    )


def in_rows(axes: Axes, where: Tensor, grid: Grid) -> Layout:
    return Layout(axes, where[0] if (where == where[0]).all() else where, grid.cells)


def spatial_dimensions(pixels: Tensor) -> tuple[int, ...]:
    """Height and width; of a video frames too: (B, frames, channels, height, width) or channels before frames."""
    if pixels.dim() == 4:
        return (2, 3)
    return (2, 3, 4) if pixels.shape[1] in (1, 3) and pixels.shape[2] not in (1, 3) else (1, 3, 4)


def possible_axes(tokens: Tensor, samples: int) -> Iterator[Axes]:
    last = tokens.dim() - 1
    if tokens.shape[0] == samples:
        yield Axes(0, tuple(range(1, last)))
        if last > 2:
            yield Axes(0, tuple(range(2, last + 1)))
    if last == 2 and tokens.shape[1] == samples:
        yield Axes(1, (0,))


def possible_grids(model: nn.Module, sizes: tuple[int, ...], cells: int, extent: tuple[int, ...]) -> Iterator[Grid]:
    """Grids of so many cells: that of the tensor, those the model speaks of, then by how square their cells are."""
    shapes = [sizes] if len(sizes) == len(extent) else []
    if len(extent) == 2:
        shapes += said_grids(model, extent)
    frames = [1] if len(extent) == 2 else [n for n in range(extent[0], 0, -1) if extent[0] % n == 0 and cells % n == 0]
    for n in frames:
        flat = cells // n
        pairs = [(rows, flat // rows) for rows in range(1, flat + 1) if flat % rows == 0]
        pairs.sort(key=lambda pair: abs(math.log(extent[-2] / pair[0] * pair[1] / extent[-1])))
        shapes += [(*(() if len(extent) == 2 else (n,)), *pair) for pair in pairs[:4]]
    for shape in dict.fromkeys(shapes):
        if math.prod(shape) == cells and all(n <= length for n, length in zip(shape, extent, strict=True)):
            exact = [length / n for n, length in zip(shape, extent, strict=True)]
            # resized; cut at the border; padded at the border; padded in every one of several halvings
            halved = [2.0 ** round(math.log2(side)) for side in exact]
            cut, padded = ([float(f(side)) for side in exact] for f in (math.floor, math.ceil))
            for pixels in dict.fromkeys(map(tuple, (exact, cut, padded, halved))):
                for shift in SHIFTS:
                    yield Grid(shape, pixels, shift)


def beyond_chance(tokens: int) -> float:
    """A share of so few tokens that a wrong grid, in which each is right with 1 / BASE, doesn't come to by chance."""
    deviation = math.sqrt((BASE - 1) / BASE**2 / tokens)
    return min(1.0, 1 / BASE + DEVIATIONS * deviation)


def spells(grid: Grid, extent: tuple[int, ...], where: Tensor, felt: Callable[[Tensor], Tensor], sure: float) -> float:
    """The share of tokens that spell the cells of the grid row by row, at the digit that most get wrong; 0 if those are
    too many."""
    numbers, share = grid.numbers().to(where.device), 1.0
    for dim, worth, masks in grid.digits(extent):
        right = spelled_digit(masks, felt, where) == numbers[:, dim] // worth % BASE
        share = min(share, right.double().mean().item())
        if share < sure:
            return 0.0
    return share


def spelled_digit(masks: list[Tensor], felt: Callable[[Tensor], Tensor], where: Tensor) -> Tensor:
    return torch.stack([felt(mask).gather(1, where) for mask in masks]).argmax(0)


def spelled_numbers(grid: Grid, extent: tuple[int, ...], where: Tensor, felt: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, cells): the number of the cell that each token shows."""
    along = [torch.zeros_like(where) for _ in grid.cells]
    for dim, worth, masks in grid.digits(extent):
        along[dim] += spelled_digit(masks, felt, where) * worth
    codes = torch.zeros_like(where)
    for cells, number in zip(grid.cells, along, strict=True):
        codes = codes * cells + number.clamp(max=cells - 1)
    return codes


# ---- pictures within a text ------------------------------------------------------------------------------------------


def with_picture(model: nn.Module, inputs: Inputs, layout: Layout, tokens: Tensor, ask: Callable) -> Layout:
    """A text's layout, and where in it the picture's tokens lie, as far as that can be told."""
    try:
        place, grid = (
            merged_patches(model, inputs)
            if inputs.picture is None
            else asked_picture(model, inputs, layout, tokens, ask)
        )
    except ValueError as error:
        return Layout(
            layout.axes, layout.place, why_no_grid=f"no map of the picture, only .scores of its tokens: {error}"
        )
    return Layout(layout.axes, layout.place, grid, place)


def asked_picture(
    model: nn.Module, inputs: Inputs, layout: Layout, tokens: Tensor, ask: Callable
) -> tuple[Tensor, tuple]:
    assert inputs.picture is not None
    pixels = inputs.tensors[inputs.picture]
    if len(pixels) != inputs.samples or pixels.dim() == 5 and pixels.shape[1] > 1:
        raise ValueError(f"it comes in several parts, {tuple(pixels.shape)}")
    if jumps(inputs.picture, pixels, inputs, ask):
        raise ValueError("its tokens are words of a codebook: they jump, and don't follow the pixels")
    found = picture_layout(
        model, inputs, layout.axes.arrange(tokens), lambda i: layout.axes.arrange(ask(i)), SURE_IF_MIXED
    )
    place, grid = found.place, found.grid
    assert place is not None and grid is not None
    place = place.expand(inputs.samples, -1) if place.dim() == 1 else place
    if layout.place is not None:
        place = torch.searchsorted(layout.place, place)
    return place, grid[-2:]


def jumps(name: str, pixels: Tensor, inputs: Inputs, ask: Callable[[Inputs], Tensor]) -> bool:
    """Does a small change of all pixels move other tokens than a large one? So it is where a token is one of a codebook
    (Chameleon, Emu3): which of them change codes is chance."""
    noise = (pixels.std() + 0.1) * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels)
    base = ask(inputs)
    moved = [(ask(inputs.replaced(name, pixels + share * noise)) != base).any(-1) for share in (1, SMALL_CHANGE)]
    return not torch.equal(*moved)


def merged_patches(model: nn.Module, inputs: Inputs) -> tuple[Tensor, tuple[int, ...]]:
    """Qwen's way: the processor says how many patches a picture has, and a square of them becomes one token."""
    frames, rows, columns = inputs.tensors["image_grid_thw"][0].tolist()
    side = getattr(getattr(plain(model).config, "vision_config", None), "spatial_merge_size", 1)
    grid = (rows // side, columns // side) if frames == 1 else (frames, rows // side, columns // side)
    ids = inputs.text
    if ids is None or ids.is_floating_point() or len(inputs.tensors["image_grid_thw"]) != inputs.samples:
        raise ValueError("there isn't one picture a text, given by token ids")
    where = torch.isin(ids, torch.tensor(picture_token_ids(model), device=ids.device))
    if not (where.sum(1) == math.prod(grid)).all():
        raise ValueError(f"{where.sum(1).tolist()} tokens stand for a picture of {' x '.join(map(str, grid))}")
    return where.nonzero()[:, 1].view(len(ids), -1), grid
