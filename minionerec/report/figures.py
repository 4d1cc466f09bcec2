"""Figures as inline SVG, drawn by matplotlib.

Colours become CSS variables, so that one figure serves light and dark pages. Series differ in line style, marker and
hatch too, so that they can be told apart in greyscale. Text stays text.
"""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import count

from markupsafe import Markup

from minionerec.report.blocks import Figure, Table, number

INK, LINE = "#0000f0", "#0000f1"  # replaced by CSS colours, as those of the series are
SERIES = tuple(f"#0000e{i}" for i in range(8))
MARKERS, STYLES, HATCHES = "osD^vPX*", ("-", "--", "-.", ":"), ("", "///", "...", "xx", "\\\\\\", "++", "oo", "--")
SIZE = (4.7, 3.0)  # inches: 338 x 216 units, which a narrow screen shows at full size
_numbers = count(1)  # of the figures of this process; ids must differ within a page


def new_axes(xlabel: str, ylabel: str, size: tuple[float, float] = SIZE):
    """(figure, axes) in the style of the page."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": LINE,
        "hatch.linewidth": 0.6, "legend.frameon": False,
    }  # fmt: skip
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    matplotlib.rcParams.update(style)
    figure = Canvas(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, axisbelow=True)
    return figure, axes


def to_svg(figure, alt: str) -> Markup:
    """The figure as an `<svg>` element with `alt` as its accessible name."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The style of matplotlib would apply to the whole page; page.css has it for plots only.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    for name, color in [(INK, "currentColor"), (LINE, "var(--line)"), *zip(SERIES, _variables(), strict=True)]:
        text = text.replace(name, color)
    prefix = f"f{next(_numbers)}-"
    text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\1{prefix}", text)
    view = re.search(r'viewBox="[^"]+"', text)[0]
    head = Markup('<svg class="plot" role="img" aria-label="{}" {} xmlns:xlink="http://www.w3.org/1999/xlink">')
    return head.format(alt, Markup(view)) + Markup(text[text.index(">") + 1 :])


def _variables() -> list[str]:
    return [f"var(--s{i})" for i in range(len(SERIES))]


def lines(title: str, xlabel: str, ylabel: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Lines of (x, y) points. The axis of a share goes from 0 to 1."""
    figure, axes = new_axes(xlabel, ylabel)
    for i, (name, points) in enumerate(series.items()):
        xs, ys = zip(*points, strict=True)
        style = {"color": SERIES[i % 8], "linestyle": STYLES[i % 4], "marker": MARKERS[i % 8]}
        axes.plot(xs, ys, **style, markersize=3, markevery=max(1, len(xs) // 12), linewidth=1.4, label=name)
    if ylabel.startswith("share"):
        axes.set_ylim(-0.03, 1.03)
    if len(series) > 1:
        legend(figure, len(series))
    ends = [
        f"{name} from {number(points[0][1])} to {number(points[-1][1])}, "
        f"least {number(min(y for _, y in points))}, most {number(max(y for _, y in points))}"
        for name, points in series.items()
    ]
    xs = sorted({x for points in series.values() for x, _ in points})
    values = [dict(points) for points in series.values()]
    rows = [[number(x, 0), *(number(v[x], 4) if x in v else "" for v in values)] for x in xs]
    return _figure(figure, title, f"{title}, by {xlabel}. {'; '.join(ends)}.", [xlabel, *series], rows)


def bars(
    title: str, xlabel: str, ylabel: str, labels: Sequence[str], series: Mapping[str, Sequence[float]], digits: int = 3
) -> Figure:
    """Groups of bars: series[name][i] is the bar of labels[i]."""
    figure, axes = new_axes(xlabel, ylabel)
    width = 0.84 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(labels))]
        look = {"color": SERIES[i % 8], "hatch": HATCHES[i % 8], "edgecolor": INK, "linewidth": 0.3}
        axes.bar(places, values, width, label=name, **look)
    axes.set_xticks(range(len(labels)), labels)
    axes.grid(axis="x", visible=False)
    if len(series) > 1:
        legend(figure, len(series))
    parts = [
        f"{name}: " + ", ".join(f"{label} {number(v, digits)}" for label, v in zip(labels, values, strict=True))
        for name, values in series.items()
    ]
    rows = [[label, *(number(v[i], digits) for v in series.values())] for i, label in enumerate(labels)]
    return _figure(figure, title, f"{title}. {'; '.join(parts)}.", [xlabel, *series], rows)


def intervals(title: str, xlabel: str, values: Mapping[str, tuple[float, float, float]], zero: bool = False) -> Figure:
    """A row for each name: (value, low, high). zero: mark 0."""
    figure, axes = new_axes(xlabel, "", (SIZE[0], 0.9 + 0.27 * len(values)))
    for place, (value, low, high) in enumerate(values.values()):
        axes.plot([low, high], [place, place], color=SERIES[0], linewidth=2)
        axes.plot([value], [place], color=INK, marker="o", markersize=5)
    axes.set_yticks(range(len(values)), values)
    axes.invert_yaxis()
    if zero:
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    said = "; ".join(f"{n} {number(v)}, {number(low)} to {number(high)}" for n, (v, low, high) in values.items())
    rows = [[name, *(number(v, 4) for v in each)] for name, each in values.items()]
    return _figure(figure, title, f"{title}. {said}.", ["model", xlabel, "low", "high"], rows)


def legend(figure, entries: int) -> None:
    figure.legend(loc="outside upper center", ncols=min(entries, 3), fontsize=9, handlelength=2.6)


def _figure(figure, title: str, alt: str, header: Sequence[str], rows: Sequence[Sequence]) -> Figure:
    return Figure(title, to_svg(figure, alt), alt, Table(title, header, rows))
