"""A picture of decoding against the machine's roof: no system can read more weights a second than memory gives."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# A colour and a marker for each system.
LOOKS = (("tab:red", "o"), ("tab:blue", "s"), ("tab:green", "^"), ("tab:purple", "D"), ("tab:brown", "v"))
# Where a label may stand, in points from its own point: the nearest place that is free is taken.
PLACES = [
    (x, y, align)
    for distance in (8, 20, 32, 46, 60, 76)
    for x, y, align in (
        (10, -distance, "left"),
        (-10, -distance, "right"),
        (10, distance, "left"),
        (-10, distance, "right"),
    )
]


class Point(NamedTuple):
    """A system with a form of weights; the model is named where there are several."""

    system: str
    model: str
    weights: str
    megabytes: float  # of weights read for a token
    tok_s: float


def check_can_draw(path: Path) -> None:
    """Raise ValueError now, and not after minutes of measuring, where `draw_roofline` could not write."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install '.[bench]'") from None
    if path.suffix != ".png" or not path.parent.is_dir():
        raise ValueError(f"the picture {path} must be a .png in a folder that exists")


def points(results: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return one point for each system of each result."""
    several = len({result["ckpt_dir"] for result in results}) > 1
    return [
        Point(
            each["system"],
            Path(result["ckpt_dir"]).stem if several else "",
            each["weights"],
            each["bytes_per_token"] / 1e6,
            each["decode_tok_s"],
        )
        for result in results
        for each in (result, *result["peers"])
    ]


def draw_roofline(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of what was measured on one machine, whose roof is the best bandwidth that was."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    roof = max(result["read_gb_s"] for result in results) * 1000  # MB/s
    measured = points(results)
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    left, right = min(p.megabytes for p in measured) / 1.5, max(p.megabytes for p in measured) * 1.8
    axes.set_xlim(left, right)
    axes.set_ylim(min(p.tok_s for p in measured) / 2, roof / left * 1.1)
    axes.plot([left, right], [roof / left, roof / right], color="black", label=f"memory: {roof / 1000:.1f} GB/s")
    looks = dict(zip(dict.fromkeys(p.system for p in measured), itertools.cycle(LOOKS), strict=False))
    for system, (colour, marker) in looks.items():
        own = [p for p in measured if p.system == system]
        axes.plot([p.megabytes for p in own], [p.tok_s for p in own], marker, color=colour, label=system)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.set_xlabel("weights read for a token, MB")
    axes.set_ylabel("decoded tokens a second")
    axes.set_title(_title(results[0]), fontsize=10)
    axes.legend(loc="lower left")
    _label(axes, measured, roof, {system: colour for system, (colour, _) in looks.items()})
    figure.savefig(path)


def _title(result: Mapping[str, Any]) -> str:
    return (
        "{machine}\n{date}, batch {batch_size}, {prompts} prompts of {prompt_len} tokens, {gen_len} decoded"
    ).format_map(result)


def _between(left: float, right: float, n: int = 200) -> list[float]:
    return [left * (right / left) ** (i / n) for i in range(n + 1)]


def _label(axes: Any, measured: list[Point], roof: float, colours: dict[str, str]) -> None:
    """Say what each point is and its part of the roof, where no other label, no point and not the roof is."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    taken = [axes.get_legend().get_window_extent()]
    for spot in [(p.megabytes, p.tok_s) for p in measured] + [(x, roof / x) for x in _between(*axes.get_xlim())]:
        x, y = axes.transData.transform(spot)
        taken.append(Bbox.from_extents(x - 7, y - 7, x + 7, y + 7))
    for p in sorted(measured, key=lambda p: -p.tok_s):
        percent = 100 * p.tok_s * p.megabytes / roof
        for x, y, align in PLACES:
            text = axes.annotate(
                f"{p.model} {p.weights}: {p.tok_s:.3g} tok/s, {percent:.0f} %".lstrip(),
                (p.megabytes, p.tok_s),
                (x, y),
                textcoords="offset points",
                ha=align,
                va="center",
                fontsize=9,
                color=colours[p.system],
                arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.6, "relpos": (align == "right", 0.5)},
            )
            text.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(text)  # without the arrow
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and axes.bbox.containsy(box.y0)
            if inside and not any(box.overlaps(other) for other in taken):
                break
            if (x, y, align) != PLACES[-1]:
                text.remove()
        taken.append(box)
