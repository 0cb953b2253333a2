"""Draw the diagrams of ``docs/`` as SVG: python tools/make_diagrams.py.

Each has a background of its own, light or dark as the reader's system is, so that it can be read
on a page of either kind.
"""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "diagrams"
LINE, SIZE = 17, 13  # distance of two lines of text, and height of a letter, in pixels

STYLE = """
svg { color-scheme: light dark; }
text { font: 13px system-ui, sans-serif; fill: #1b1b1f; }
.small { font-size: 11.5px; fill: #55555f; }
.title { font-weight: 600; }
.paper { fill: #ffffff; }
.box { fill: #f3f4f7; stroke: #8a8d99; }
.group { fill: none; stroke: #8a8d99; stroke-dasharray: 5 4; }
.method { fill: #fde3d3; stroke: #c75a12; }
.dense { fill: #dce9f8; stroke: #2f6fb3; }
.kept { fill: #d7efe0; stroke: #2c8a57; }
.left { fill: #ffffff; stroke: #b9bbc4; }
.arrow { fill: none; stroke: #55555f; stroke-width: 1.4; }
.head { fill: #55555f; }
@media (prefers-color-scheme: dark) {
  text { fill: #ececf1; }
  .small { fill: #b5b6c0; }
  .paper { fill: #1e1f25; }
  .box { fill: #2b2d36; stroke: #7c7f8c; }
  .group { stroke: #7c7f8c; }
  .method { fill: #5a3018; stroke: #f0935a; }
  .dense { fill: #1d3a58; stroke: #74aee8; }
  .kept { fill: #1d4530; stroke: #63c491; }
  .left { fill: #1e1f25; stroke: #5b5d68; }
  .arrow { stroke: #b5b6c0; }
  .head { fill: #b5b6c0; }
}
"""


@dataclass
class Diagram:
    """A diagram, drawn part by part.

    Attributes:
        title: What it shows, for those who hear it.
        width: Width in pixels.
        height: Height in pixels.
        parts: Its elements, in the order in which they are drawn.
    """

    title: str
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, line: str, kind: str = "", anchor: str = "middle") -> None:
        """Write one line, centred at ``x`` unless it is anchored at its ``start`` or ``end``."""
        name = f' class="{kind}"' if kind else ""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place}{name}>{escape(line)}</text>")

    def box(
        self, x: float, y: float, width: float, height: float, lines: str = "", kind: str = "box"
    ) -> None:
        """Draw a rectangle with lines of text at its middle; those after the first are small."""
        shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect {shape} rx="5" class="{kind}"/>')
        split = lines.split("\n") if lines else []
        top = y + height / 2 - LINE * (len(split) - 1) / 2 + SIZE / 3
        for i, line in enumerate(split):
            self.text(x + width / 2, top + LINE * i, line, "small" if i else "")

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw an arrow through points, all of its pieces horizontal or vertical."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="arrow" marker-end="url(#head)"/>')

    def svg(self) -> str:
        """Return the file's text."""
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
            ' markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" class="head"/></marker>'
        )
        size = f'width="{self.width}" height="{self.height}"'
        view = f'viewBox="0 0 {self.width} {self.height}" {size} role="img"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {view}>',
                f"<title>{escape(self.title)}</title>",
                f"<style>{STYLE}</style>",
                f"<defs>{head}</defs>",
                f'<rect {size} rx="8" class="paper"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def sweep() -> Diagram:
    """Return the way of a sweep from the command to its report."""
    one = Diagram("A sweep, from the command to its report", 860, 700)
    one.box(40, 20, 370, 58, "python run.py method=hata,quest k=64 -m\nthe command: run.py")
    one.box(450, 20, 370, 58, "one configuration for each cell\nharness/main.py, conf/ (Hydra)")
    one.arrow((410, 49), (450, 49))
    one.box(450, 108, 370, 58, "check all settings; nothing is loaded yet\nharness/settings.py")
    one.arrow((635, 78), (635, 108))
    one.box(40, 108, 370, 58, "in this process, or hand out to workers\nharness/launchers.py")
    one.arrow((450, 137), (410, 137))
    one.arrow((225, 166), (225, 232))

    one.box(20, 196, 820, 354, "", "group")
    one.text(240, 214, "for each model: harness/runner.py", "title", "start")
    one.box(40, 232, 180, 64, "load the model\nmodels/load.py\ncheck: harness/canary.py")
    one.box(240, 232, 180, 64, "fit methods that learn\nharness/fitting.py\nkept as artifacts")
    one.box(
        440,
        232,
        180,
        64,
        "find what is measured\nresults/cells, results/parts\nby digests of all inputs",
    )
    one.box(640, 232, 180, 64, "make the prompts\ntasks/NAME.py")
    for x in (220, 420, 620):
        one.arrow((x, 262), (x + 20, 262))
    one.arrow((730, 296), (730, 352))

    one.box(40, 326, 780, 208, "", "group")
    one.text(60, 346, "for each batch of prompts: harness/sweep.py", "title", "start")
    one.box(620, 352, 180, 64, "prefill once\nmodels/prefill.py\nfull attention", "dense")
    one.box(60, 366, 520, 152, "", "group")
    one.text(76, 386, "for each cell", "title", "start")
    one.box(
        380,
        396,
        180,
        110,
        "decode\nharness/decoding.py\nmodels/attach.py puts the\nmethod into each layer",
        "method",
    )
    one.box(
        220,
        396,
        140,
        110,
        "select, attend\nmethods/NAME.py\nwith the operators\nin kernels/",
        "method",
    )
    one.box(
        76,
        396,
        124,
        110,
        "measure\nsamples.py: score\nquality.py: recall\nspeed.py: time\nreads.py: bytes",
    )
    one.arrow((620, 384), (470, 384), (470, 396))
    one.arrow((380, 440), (360, 440))
    one.arrow((360, 462), (380, 462))
    one.arrow((470, 506), (470, 513), (154, 513), (154, 506))
    one.box(620, 446, 180, 64, "write at once\nresults/parts\nanalysis/record/journal.py")
    one.arrow((116, 506), (116, 526), (710, 526), (710, 510))

    one.arrow((225, 550), (225, 580))
    one.box(40, 580, 370, 48, "rows and samples: results/cells\nanalysis/record/row.py, store.py")
    one.box(450, 580, 370, 48, "compare with full attention, pair by sample\nanalysis/comparison/")
    one.arrow((410, 604), (450, 604))
    one.box(450, 648, 370, 40, "report.html: analysis/tables, figures, report")
    one.arrow((635, 628), (635, 648))
    one.box(40, 648, 370, 40, "W&B: analysis/tracking")
    one.arrow((225, 628), (225, 648))
    return one


def budget() -> Diagram:
    """Return which tokens a step keeps, and that the budget counts all of them."""
    one = Diagram(
        "The budget k counts sinks, selected tokens, recents and the current token", 860, 190
    )
    tokens = "aa.s..ss...s..s.aaa"  # always kept, selected, left out
    kinds = {"a": "kept", "s": "method", ".": "left"}
    cell, left, top = 38, 66, 66
    one.text(left, 30, "The cached tokens of one KV head at one decode step", "title", "start")
    for i, token in enumerate(tokens):
        one.box(left + i * (cell + 1), top, cell, 40, "", kinds[token])
    for first, last, words in ((0, 1, "sinks"), (16, 17, "recents"), (18, 18, "current")):
        one.text(left + (first + last + 1) * (cell + 1) / 2, top - 10, words, "small")
    one.text(left + 9 * (cell + 1), top - 10, "the method selects among these", "small")
    kept = len(tokens) - tokens.count(".")
    note = f"k = {kept}: every filled token counts. Empty ones are not attended to."
    one.text(left, top + 66, note, "", "start")
    note = "Keys and values of filled tokens are read; what is read to select is counted besides."
    one.text(left, top + 88, note, "small", "start")
    return one


def question() -> Diagram:
    """Return which tokens go through the method under either setting of the question."""
    one = Diagram("With question=sparse the question is decoded with the method", 860, 200)
    parts = (("context", 420), ("question", 120), ("answer", 120))
    for y, name, dense in ((50, "question=sparse", 1), (112, "question=dense", 2)):
        one.text(20, y + 25, name, "title", "start")
        x = 160
        for i, (words, width) in enumerate(parts):
            one.box(x, y, width, 40, words, "dense" if i < dense else "method")
            x += width + 4
    one.text(160, 34, "One prompt and its answer", "title", "start")
    one.box(160, 170, 16, 14, "", "dense")
    one.text(184, 182, "prefilled with full attention", "small", "start")
    one.box(372, 170, 16, 14, "", "method")
    one.text(
        396, 182, "decoded with the method, token by token or as known tokens", "small", "start"
    )
    return one


def timing() -> Diagram:
    """Return how steps of full attention and of a method are timed in turn."""
    one = Diagram("Full attention and the method are timed in turn", 860, 190)
    one.text(20, 30, "One process, one device: steps in turn", "title", "start")
    x, pairs = 20, 5
    for i in range(pairs):
        for words, width, kind in (("full", 92, "dense"), ("method", 58, "method")):
            one.box(x, 50, width, 40, words, kind)
            x += width + 4
        one.text(x - 4 - 77, 110, f"pair {i + 1}", "small")
        x += 10
    note = "speed-up = median of full attention / median of the method"
    one.text(20, 142, note, "", "start")
    note = "Its 95% interval is a bootstrap over the pairs. What disturbs the machine slows both."
    one.text(20, 164, note, "small", "start")
    return one


DIAGRAMS = (sweep, budget, question, timing)


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for make in DIAGRAMS:
        (FOLDER / f"{make.__name__}.svg").write_text(make().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
