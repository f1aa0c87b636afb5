"""The chart of cost against depth: decode time per token and cache size, as one SVG without dependencies."""

import math

DEPTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32000)
SERIES = (("base", "base"), ("0.5", "β 0.5"), ("0.75", "β 0.75"), ("0.9", "β 0.9"))
KIND = "q8_0"
WIDTH, HEIGHT, TOP, BOTTOM = 960, 430, 78, 62
PANEL, LEFTS = 385, (70, 555)
# Chosen to differ in lightness as well as hue, on white and on dark grey.
STYLE = """
  :root { --ink: #1c1e21; --faint: #d9dce1; --paper: #ffffff; --s0: #30343b; --s1: #b8860b; --s2: #1676c9; --s3: #b3245f; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6e8eb; --faint: #3a3f47; --paper: #16181c; --s0: #c9ced6; --s1: #e0b040; --s2: #55aaf5; --s3: #f5709f; }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--ink); } .title { font-size: 15px; font-weight: 600; }
  .paper { fill: var(--paper); } .grid { stroke: var(--faint); } .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
"""


def ticks(low, high):
    """1, 2, 5 times powers of ten within a range; powers of ten and their halves only when there are many."""
    found = [m * 10**e for e in range(-2, 6) for m in (1, 2, 5) if low <= m * 10**e <= high]
    return found if len(found) <= 9 else [t for t in found if round(t / 10 ** math.floor(math.log10(t) + 1e-9)) != 2]


def place(value, low, high, start, end):
    """A value's position on a logarithmic axis."""
    return start + (end - start) * (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))


class Panel:
    """One pair of axes and its lines."""

    def __init__(self, left, title, unit, lines):
        self.left, self.title, self.unit, self.lines = left, title, unit, lines
        values = [value for line in lines for _, value in line]
        depths = [depth for line in lines for depth, _ in line]
        self.depths = sorted(set(depths))
        self.low, self.high = min(values) / 1.25, max(values) * 1.25

    def x(self, depth):
        """Pixels of a depth; a single depth stands at the left."""
        first, last = self.depths[0], max(self.depths[-1], 2 * self.depths[0])
        return place(depth, first, last, self.left, self.left + PANEL)

    def y(self, value):
        """Pixels of a value."""
        return place(value, self.low, self.high, HEIGHT - BOTTOM, TOP)

    def axes(self):
        """Grid lines, tick labels, axis names."""
        parts = [f'<text class="title" x="{self.left}" y="{TOP - 18}">{self.title}</text>']
        for value in ticks(self.low, self.high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.left + PANEL}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        for depth in self.depths:
            x = self.x(depth)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{depth}</text>')
        middle, centre = self.left + PANEL / 2, (TOP + HEIGHT - BOTTOM) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 16}" text-anchor="middle">depth, tokens in the cache</text>')
        turn = f'transform="translate({self.left - 48},{centre}) rotate(-90)"'
        return parts + [f'<text {turn} text-anchor="middle">{self.unit}</text>']

    def curves(self):
        """The lines with a dot at every measurement."""
        parts = []
        for index, line in enumerate(self.lines):
            points = [(self.x(depth), self.y(value)) for depth, value in line]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline class="line" style="stroke: var(--s{index})" points="{path}"/>')
            parts += [f'<circle style="fill: var(--s{index})" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in points]
        return parts


def legend(names):
    """A line and a name per series, above both panels."""
    parts = []
    for index, name in enumerate(names):
        x = LEFTS[0] + 120 * index
        parts.append(f'<line class="line" style="stroke: var(--s{index})" x1="{x}" x2="{x + 26}" y1="24" y2="24"/>')
        parts.append(f'<text x="{x + 34}" y="28">{name}</text>')
    return parts


def svg(models):
    """The chart of `recurformer bench` results by model; all of SERIES must be there."""
    decode = [[(r["depth"], 1000 / r["decode_tok_s"]) for r in models[key]] for key, _ in SERIES]
    cache = [[(r["depth"], r["cache_bytes"] / 2**20) for r in models[key]] for key, _ in SERIES]
    panels = (
        Panel(LEFTS[0], "Decoding: time per token", "milliseconds", decode), Panel(LEFTS[1], "Cache size (f16)", "MiB", cache),
    )
    body = legend([name for _, name in SERIES])
    for panel in panels:
        body += panel.axes() + panel.curves()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
    title = "<title>Decode time per token and cache size against depth, for the base model and three hybrids</title>"
    paper = f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>'
    return "\n".join([head, title, f"<style>{STYLE}</style>", paper, *body, "</svg>", ""])
