"""Figures as PNG: curves, bars, matrices and sheets of pictures, for the colour-blind too."""
import io
import warnings
from contextlib import contextmanager

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import MaxNLocator

# Okabe and Ito: https://jfly.uni-koeln.de/color/
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
DASHES = "-", "--", ":", "-."
# matplotlib's own font, and one for Chinese and Japanese names where there is one
WANTED = (
    "DejaVu Sans", "Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic", "Microsoft YaHei",
    "WenQuanYi Micro Hei")
FONTS = [name for name in WANTED if name in get_font_names()]


def style():
    "The settings of matplotlib for our figures; a class called $5-$10 is no formula."
    return rc_context({"font.family": FONTS, "text.parse_math": False})


@contextmanager
def figure(width=6.4, height=3.6, title=None, **axis):
    """An axis to draw on, and a list that holds the PNG at the end; `axis` are its settings, such as xlabel.

    Usage: with figure(title="lr") as (ax, png): ax.plot(...)"""
    with style():
        fig, png = Figure(figsize=(width, height), layout="constrained"), list[bytes]()
        ax = fig.add_subplot()
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        yield ax, png
        ax.set(title=title, **axis)         # last, as a limit of None is where the data end
        png.append(to_png(fig))


def to_png(fig):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # a character that no font has is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        fig.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def short(name, most=20):
    "A class name that is cut where it would cover its neighbours."
    return name if len(name) <= most else f"{name[:most - 1]}…"


def curves(lines, title, xlabel, ylabel, **axis):
    "A PNG of `lines`, {name: (x, y)}; points whose y is None are left out."
    beside = len(lines) > 8             # then the legend has no room within
    size = 10 if beside else 6.4, max(3.6, 0.8 + 0.19 * len(lines))
    with figure(*size, title=title, xlabel=xlabel, ylabel=ylabel, **axis) as (ax, png):
        for i, (name, (x, y)) in enumerate(lines.items()):
            points = [(a, b) for a, b in zip(x, y) if b is not None]
            if not points: continue
            # each colour once, then all of them again with another dash
            dash, colour = DASHES[i // len(COLOURS) % len(DASHES)], COLOURS[i % len(COLOURS)]
            ax.plot(*zip(*points), dash, color=colour, label=name, marker="." if len(points) < 30 else None)
        if xlabel == "epoch":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_xlim(left=0)
        if len(lines) > 1 and ax.lines:
            where = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {}
            ax.legend(ax.lines, [line.get_label() for line in ax.lines], fontsize="small", **where)
    return png[0]


def bars(names, shares, title, xlabel):
    """A PNG of one horizontal bar for each of `names`, the largest on top; `shares` are in 0..1.

    Of more than 200, the 100 smallest and the 100 largest."""
    order = np.argsort(shares, kind="stable")
    if len(order) > 200: order = np.concatenate((order[:100], order[-100:]))
    with figure(height=1 + 0.17 * len(order), title=title, xlabel=xlabel, xlim=(0, 100)) as (ax, png):
        ax.barh(range(len(order)), 100 * np.asarray(shares)[order], color=COLOURS[0])
        ax.set_yticks(range(len(order)), [short(names[i]) for i in order], fontsize=7)
        ax.margins(y=0.5 / max(len(order), 1))
    return png[0]


def matrix(counts, names, title):
    "A PNG of a confusion matrix as shares of its rows, in percent."
    names = [short(o) for o in names]
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.5 + 0.32 * len(names)
    with figure(side + 0.8, side, title=title, xlabel="predicted", ylabel="true") as (ax, png):
        ax.grid(False)
        ax.imshow(shares, cmap="cividis", vmin=0, vmax=100)
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.set_yticks(range(len(names)), names, fontsize=7)
        for i, j in np.argwhere(shares >= 0.5):
            colour = "black" if shares[i, j] > 60 else "white"
            ax.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", fontsize=6, color=colour)
    return png[0]


@style()
def sheet(images, labels, title=None, columns=8):
    "A PNG of pictures (sz,sz,3) uint8 in a grid, each under its label; at least one."
    rows, lines = -(-len(images) // columns), 1 + max(label.count("\n") for label in labels)
    side, gap, text = 1.35, 0.07, 0.12 * lines              # inches: of a picture with its gaps, of its label
    width, height = side * columns, (side + text) * rows
    above = 0.4 if title else 0
    fig = Figure(figsize=(width, height + above))
    fig.suptitle(title)
    # one axis for all, in inches: an axis for each takes seven times as long
    ax = fig.add_axes((0, 0, 1, height / (height + above)), xlim=(0, width), ylim=(height, 0))
    ax.set(autoscale_on=False, frame_on=False, xticks=[], yticks=[])
    for i, (image, label) in enumerate(zip(images, labels)):
        x, y = side * (i % columns), (side + text) * (i // columns) + text
        place = x + gap, x + side - gap, y + side - gap, y + gap        # left, right, bottom, top
        ax.imshow(image, interpolation="nearest", extent=place)
        ax.text(x + side / 2, y + gap / 2, label, ha="center", va="bottom", fontsize=7)
    return to_png(fig)
