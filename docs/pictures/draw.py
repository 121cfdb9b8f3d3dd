"""Draw the pictures of the documentation: python docs/pictures/draw.py writes an SVG and a PNG of each beside it."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

HERE = Path(__file__).parent
INK, PAPER, GREY = "#1f2933", "#fbfbf8", "#e4e7eb"
SCALES = ("#9fd3c7", "#a8c8ec", "#f5cf9a", "#dcb8e8")  # one colour a branch, in all pictures
AMBER, ROSE = "#fdf0c4", "#fbdcdc"
KERNELS, GROUPS, SPLIT_GROUPS = (3, 5, 7, 9), (1, 4, 8, 16), (4, 8, 16, 16)
DOTS_PER_INCH = 140

mpl.rcParams |= {"font.family": "DejaVu Sans", "svg.hashsalt": "epsanet", "mathtext.fontset": "dejavusans"}


class Drawing:
    """A sheet of ``width`` × ``height`` units, two units an inch."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width / 2, height / 2), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, text: str = "", color: str = GREY, **font) -> None:
        """A box around the centre ``x, y``."""
        corner = (x - width / 2 + 0.1, y - height / 2 + 0.1)
        style = "round,pad=0.1,rounding_size=0.12"
        self.axes.add_patch(
            FancyBboxPatch(corner, width - 0.2, height - 0.2, boxstyle=style, facecolor=color, edgecolor=INK, lw=1)
        )
        self.text(x, y, text, **font)

    def text(self, x: float, y: float, text: str, size: float = 11, **font) -> None:
        self.axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "color": INK, **font})

    def line(self, *points: tuple[float, float], head: bool = True, color: str = INK) -> None:
        """A line through points, with an arrow head at the last."""
        *before, last = points
        self.axes.plot(*zip(*points, strict=True), color=color, lw=1.3, solid_joinstyle="round", zorder=1)
        if head:
            arrow = {"arrowstyle": "-|>", "color": color, "lw": 1.3, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
            self.axes.annotate("", last, before[-1], arrowprops=arrow)

    def sign(self, x: float, y: float, text: str) -> None:
        self.axes.add_patch(Circle((x, y), 0.38, facecolor="white", edgecolor=INK, lw=1.2, zorder=2))
        self.text(x, y, text, size=15)

    def save(self, name: str) -> None:
        self.figure.savefig(HERE / f"{name}.png", dpi=DOTS_PER_INCH, facecolor=PAPER)
        self.figure.savefig(HERE / f"{name}.svg", facecolor=PAPER, metadata={"Date": None})


def psa() -> None:
    """The module: SPC, one SEWeight, softmax across the scales, product, concatenation."""
    sheet = Drawing(20, 10.7)
    rows = (8.95, 7.85, 6.75, 5.65)
    middle = sum(rows) / 4
    sheet.text(1.15, 9.95, "input", weight="bold")
    sheet.box(1.15, middle, 1.5, 4.2, "$X$\n\n$C$\n×\n$H$\n×\n$W$")
    sheet.text(6.1, 9.95, "SPC: every branch convolves the whole input", weight="bold")
    for row, color, kernel, groups, index in zip(rows, SCALES, KERNELS, GROUPS, range(4), strict=True):
        sheet.line((1.9, row), (2.65, row))
        sheet.box(4.4, row, 3.5, 0.85, f"{kernel}×{kernel} conv, groups {groups}", color)
        sheet.line((6.15, row), (6.9, row))
        sheet.box(8.1, row, 2.4, 0.85, f"$F_{index}$   $C'×H×W$", color)
        sheet.box(18.35, row, 2.4, 0.85, f"$Y_{index}$   $C'×H×W$", color)
    sheet.text(18.35, 9.95, "concatenation", weight="bold")
    sheet.text(12.6, middle + 0.4, "features of the four scales, $F$")
    sheet.line((9.45, middle), (15.22, middle))
    sheet.sign(15.6, middle, "×")
    sheet.line((15.98, middle), (17.0, middle))

    low, steps = 2.45, (3.5, 2.8, 2.1, 1.4)
    sheet.line((8.1, 5.1), (8.1, 4.1))
    sheet.box(6.6, low, 5.0, 3.2, color=AMBER)
    sheet.text(6.6, 3.5, "SEWeight", weight="bold")
    sheet.text(
        6.6, 2.2, "one, with the same weights\nfor every branch:\naverage pool → 1×1 → ReLU\n→ 1×1 → sigmoid", size=10.5
    )
    sheet.line((9.1, low), (9.73, low))
    sheet.box(12.3, low, 2.5, 3.2, color=ROSE)
    sheet.text(12.3, low, "softmax\nacross the\nfour scales,\nat each\nchannel")
    sheet.line((10.45, low), (11.05, low))
    sheet.line((13.55, low), (14.55, low))
    for step, color, index in zip(steps, SCALES, range(4), strict=True):
        sheet.box(10.1, step, 0.7, 0.66, f"$Z_{index}$", color)
        sheet.box(15.6, step, 2.1, 0.66, f"$\\mathrm{{att}}_{index}$   $C'$", color)
    sheet.line((15.6, 3.85), (15.6, middle - 0.38))
    sheet.text(15.85, 4.75, "$Y_i = F_i · \\mathrm{att}_i$", ha="left")
    sheet.text(
        10,
        0.4,
        "Pyramid Squeeze Attention: $C' = C_{out} / 4$; the stride, if any, is in the four convolutions",
        size=10.5,
    )
    sheet.save("psa")


def block() -> None:
    """EPSA block and basic block, with the widths of the first stage."""
    sheet = Drawing(20, 8.6)
    chain = (
        (3.1, "1×1 conv\nBN, ReLU", GREY, 2.0),
        (6.2, "PSA\n(stride here)", SCALES[0], 2.4),
        (9.2, "BN, ReLU", GREY, 1.9),
        (12.0, "1×1 conv\nBN", GREY, 2.0),
    )
    _residual(sheet, 6.2, "EPSA block (ResNet's bottleneck)", chain, 15.0, 18.1)
    sheet.text(4.55, 5.0, "64\n(Large: 128)", size=10.5)
    sheet.text(7.8, 5.0, "64\n(Large: 128)", size=10.5)
    sheet.text(13.75, 5.5, "256", size=10.5)
    basic = (
        (3.1, "PSA\n(stride here)", SCALES[0], 2.4),
        (6.3, "BN, ReLU", GREY, 1.9),
        (9.2, "PSA", SCALES[0], 1.9),
        (12.0, "BN", GREY, 1.5),
    )
    _residual(sheet, 1.9, "EPSA basic block (not in the paper)", basic, 15.0, 18.1)
    sheet.text(4.85, 1.3, "64", size=10.5)
    sheet.text(7.75, 1.3, "64", size=10.5)
    sheet.text(13.75, 1.3, "64", size=10.5)
    sheet.text(10, 0.4, "Small numbers: channels in the first stage", size=10.5)
    sheet.save("epsa_block")


def _residual(sheet: Drawing, y: float, title: str, chain, plus: float, relu: float) -> None:
    sheet.text(0.4, y + 1.95, title, weight="bold", ha="left")
    end = 0.5
    for x, text, color, width in chain:
        sheet.line((end, y), (x - width / 2, y))
        sheet.box(x, y, width, 1.1, text, color)
        end = x + width / 2
    sheet.line((end, y), (plus - 0.38, y))
    sheet.sign(plus, y, "+")
    sheet.line((plus + 0.38, y), (relu - 0.8, y))
    sheet.box(relu, y, 1.6, 0.85, "ReLU")
    sheet.line((relu + 0.8, y), (19.6, y))
    sheet.line((1.0, y), (1.0, y + 1.25), (plus, y + 1.25), (plus, y + 0.38))
    sheet.text(8, y + 1.5, "shortcut (1×1 conv and BN where size or channels change)", size=10.5)


def modes() -> None:
    """What a branch sees: multiplex as in the Small networks, split as in the Large ones."""
    sheet = Drawing(20, 8.6)
    rows = (5.85, 4.75, 3.65, 2.55)
    middle = sum(rows) / 4
    for left, title, groups, split in (
        (0.0, 'spc="multiplex"', GROUPS, False),
        (10.2, 'spc="split"', SPLIT_GROUPS, True),
    ):
        sheet.text(left + 4.9, 8.05, title, weight="bold", size=12, family="DejaVu Sans Mono")
        says = "a branch sees its own quarter of the channels" if split else "a branch sees all channels"
        sheet.text(left + 4.9, 7.4, says)
        for row, color, kernel, count, index in zip(rows, SCALES, KERNELS, groups, range(4), strict=True):
            if split:
                sheet.box(left + 1.3, row, 1.8, 0.95, f"$X_{index}$   $C/4$", color, size=10.5)
            sheet.line((left + 2.2, row), (left + 3.1, row))
            sheet.box(left + 4.9, row, 3.6, 0.85, f"{kernel}×{kernel} conv, groups {count}", color)
            sheet.line((left + 6.7, row), (left + 7.5, row))
            sheet.box(left + 8.4, row, 1.8, 0.85, f"$F_{index}$   $C'$", color, size=10.5)
        if not split:
            sheet.box(left + 1.3, middle, 1.8, 4.25, "$X$\n\n$C$")
    sheet.text(4.9, 1.45, "Small: the networks of the released code", weight="bold")
    sheet.text(4.9, 0.8, "64-128-256-512 channels in the four stages", size=10.5)
    sheet.text(15.1, 1.45, "Large: what gives the published cost", weight="bold")
    sheet.text(15.1, 0.8, "128-256-512-1024 channels in the four stages", size=10.5)
    sheet.line((10.05, 0.5), (10.05, 8.2), head=False, color="#b6bcc4")
    sheet.save("spc_modes")


if __name__ == "__main__":
    psa()
    block()
    modes()
