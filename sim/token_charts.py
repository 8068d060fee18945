"""Charts that show tokens: a text coloured by who gave each token, and one draft tree."""

from __future__ import annotations

import altair as alt
import numpy as np
import polars as pl

from sim.charts import PALETTE, where
from sim.vocabulary import VISIBLE, Vocabulary

SOURCES = {"prefill": "#c9c9c9", "drafted": "#8fc1e6", "target": "#f5bf6b"}
"""Tints light enough for dark text in both themes; blue and orange are told apart by everyone."""
SOURCE_NAMES = {
    "prefill": "first token (prefill)",
    "drafted": "accepted from the draft",
    "target": "the target's own, ends a cycle",
}
DARK = "#1b1b1b"
CHARACTER, LINE = 7.3, 20
"""Pixels of one monospaced character at 12 px, and of one line."""

STATES = {
    "root": ("#7a7a7a", "diamond"),
    "accepted": (PALETTE[0], "circle"),
    "target's own": (PALETTE[1], "square"),
    "verified in vain": ("#9b9b9b", "circle"),
    "true, but not verified": (PALETTE[5], "triangle-up"),
    "not verified": ("#c4c4c4", "cross"),
}
"""What became of a drafted node: its colour and its shape."""
INK = "#808080"
"""Of words on the page's own ground: as readable in the dark theme as in the light one."""
LEAF, LEVEL_LABEL = 16, 8
"""Pixels from leaf to leaf; characters of a token that fit between two levels."""


def text_lines(tokens: pl.DataFrame, vocabulary: Vocabulary, columns: int = 52) -> pl.DataFrame:
    """Put the tokens of `sim.walkthrough.token_table` into lines of ``columns`` characters.

    Adds label (blanks kept, line breaks as signs), line, left and right (in characters).
    """
    line, column = 0, 0
    line_of, left, right, labels = [], [], [], []
    for token in tokens["token"]:
        piece = vocabulary.piece(token)
        label = piece.translate({sign: mark for sign, mark in VISIBLE.items() if chr(sign) != " "})[:columns] or "·"
        if column + len(label) > columns:
            line, column = line + 1, 0
        line_of.append(line)
        left.append(column)
        column += len(label)
        right.append(column)
        labels.append(label)
        if "\n" in piece:
            line, column = line + 1, 0
    places = {"line": line_of, "left": left, "right": right}
    made = [pl.Series(name, values, dtype=pl.Int64) for name, values in places.items()]
    return tokens.with_columns(*made, pl.Series("label", labels, dtype=pl.String))


def text_chart(lines: pl.DataFrame, at: int, columns: int = 52) -> alt.LayerChart:
    """A text coloured by who gave each token; the selection "token" takes the position of one."""
    lines = lines.with_columns(
        bottom=pl.col("line") + 0.92,
        by=pl.col("source").replace_strict(SOURCE_NAMES),
    )
    pick = alt.selection_point(name="token", fields=["position"], empty=False)
    names = [SOURCE_NAMES[name] for name in SOURCES]
    colour = alt.Color(
        "by:N",
        scale=alt.Scale(domain=names, range=list(SOURCES.values())),
        legend=None,
    )
    count = int(lines["line"].max() or 0) + 1
    down = {"axis": None, "scale": alt.Scale(domain=[0, count], reverse=True, nice=False)}
    across = {"axis": None, "scale": alt.Scale(domain=[0, columns], nice=False)}
    x, y = alt.X("left:Q", **across), alt.Y("line:Q", **down)
    word = pl.col("label").str.strip_chars_start(" ")  # a browser would swallow leading blanks: begin behind them
    blanks = pl.col("label").str.len_chars() - word.str.len_chars()
    tooltip = [
        alt.Tooltip("label:N", title="token"),
        alt.Tooltip("position:Q"),
        alt.Tooltip("cycle:Q"),
        alt.Tooltip("by:N", title="given by"),
        alt.Tooltip("probability:Q", title="target's probability", format=".3f"),
        alt.Tooltip("entropy:Q", title="target's entropy (nats)", format=".2f"),
    ]
    boxes = alt.Chart(lines).mark_rect(cursor="pointer", cornerRadius=2, stroke="white", strokeWidth=0.6)
    boxes = boxes.encode(x, y, alt.X2("right:Q"), alt.Y2("bottom:Q"), color=colour, tooltip=tooltip).add_params(pick)
    here = alt.Chart(lines.filter(pl.col("position") == at)).mark_rect(fillOpacity=0, stroke=PALETTE[5], strokeWidth=2.5)
    here = here.encode(x, y, alt.X2("right:Q"), alt.Y2("bottom:Q"))
    words = alt.Chart(lines.with_columns(middle=pl.col("line") + 0.48, word=word, start=pl.col("left") + blanks)).mark_text(
        align="left", baseline="middle", font="DejaVu Sans Mono, Menlo, Consolas, monospace", fontSize=12, color=DARK, fill=DARK
    )
    words = words.encode(alt.X("start:Q", **across), alt.Y("middle:Q", **down), alt.Text("word:N"), tooltip=alt.TooltipValue(None))
    size = {"width": round(columns * CHARACTER) + 5, "height": count * LINE + 5}  # and the room that every chart has around it
    return alt.layer(boxes, here, words, **size).configure_view(stroke=None)


def tree_layout(tree: pl.DataFrame, whole: bool = False) -> pl.DataFrame:
    """Where to draw the nodes of `sim.walkthrough.tree_table`: those verified or on the true path, or the ``whole`` tree.

    Adds state (one of :data:`STATES`), y (leaves one apart, in order of rank) and from_x, from_y (the parent's place).
    """
    tree = tree.with_columns(state=_state())
    shown = tree if whole else tree.filter(pl.col("kept") | pl.col("true"))
    children: dict[int, list[int]] = {}
    for node, parent in shown.sort("rank").select("node", "parent").rows():
        children.setdefault(parent, []).append(node)
    place: dict[int, float] = {}
    _place(0, children, place, [0])
    parents = shown["parent"].to_list()
    depth = dict(shown.select("node", "depth").rows())
    return shown.with_columns(
        y=pl.Series([place[node] for node in shown["node"]], dtype=pl.Float64),
        from_y=pl.Series([place.get(parent) for parent in parents], dtype=pl.Float64),
        from_x=pl.Series([depth.get(parent) for parent in parents], dtype=pl.Int64),
    )


def _state() -> pl.Expr:
    return (
        pl.when(pl.col("depth") == 0)
        .then(pl.lit("root"))
        .when(pl.col("target_own"))
        .then(pl.lit("target's own"))
        .when(pl.col("kept") & pl.col("accepted"))
        .then(pl.lit("accepted"))
        .when(pl.col("true"))
        .then(pl.lit("true, but not verified"))
        .when(pl.col("kept"))
        .then(pl.lit("verified in vain"))
        .otherwise(pl.lit("not verified"))
    )


def _place(node: int, children: dict[int, list[int]], place: dict[int, float], leaves: list[int]) -> float:
    """Leaves get the next free place, a parent the middle of its first and last child."""
    below = [_place(child, children, place, leaves) for child in children.get(node, ())]
    if below:
        place[node] = (below[0] + below[-1]) / 2
    else:
        place[node] = float(leaves[0])
        leaves[0] += 1
    return place[node]


def with_bonus(tree: pl.DataFrame, token: int) -> pl.DataFrame:
    """`sim.walkthrough.tree_table` and one more node: the target's own ``token`` behind the last accepted one.

    None is added where the tree holds that token there (drafted, but not verified), or where the text has ended (-1).
    """
    tree = tree.with_columns(target_own=pl.lit(False))
    last = tree.filter(pl.col("accepted")).sort("depth").row(-1, named=True)
    drafted = tree.filter((pl.col("parent") == last["node"]) & pl.col("true"))
    if token < 0 or len(drafted):
        return tree
    node = {name: None for name in tree.columns} | {"node": len(tree), "parent": last["node"], "depth": last["depth"] + 1}
    node |= {"rank": 10**6, "token": token, "kept": False, "accepted": False, "tested": False, "true": True, "target_own": True}
    return pl.concat([tree, pl.DataFrame([node], schema=tree.schema)])


def tree_chart(layout: pl.DataFrame, vocabulary: Vocabulary, depth: int | None = None) -> alt.LayerChart:
    """One draft tree, the root at the left, a column per depth.

    :param layout: of :func:`tree_layout`. :param depth: of the deepest level drawn, to give two trees one scale.
    """
    labels = [vocabulary.label(token) or "∅" for token in layout["token"]]
    short = [label if len(label) <= LEVEL_LABEL else label[: LEVEL_LABEL - 1] + "…" for label in labels]
    layout = layout.with_columns(label=pl.Series(labels, dtype=pl.String), short=pl.Series(short, dtype=pl.String))
    deepest = max(int(layout["depth"].max()), depth or 0)
    title = "depth (draft level)"
    levels = alt.Axis(values=list(range(deepest + 1)), format="d", orient="top")
    across = {"title": title, "axis": levels, "scale": alt.Scale(domain=[-0.3, deepest + 0.9], nice=False)}
    x = alt.X("depth:Q", **across)
    last = float(layout["y"].max())
    down = {"axis": None, "scale": alt.Scale(domain=[-0.7, last + 0.7], reverse=True, nice=False)}
    y = alt.Y("y:Q", **down)
    present = [name for name in STATES if name in set(layout["state"])]
    scale = alt.Scale(domain=present, range=[STATES[name][0] for name in present])
    legend = alt.Legend(orient="bottom", title=None, columns=2, symbolOpacity=1, labelLimit=200)
    colour = alt.Color("state:N", scale=scale, legend=legend)
    shape = alt.Shape("state:N", scale=alt.Scale(domain=present, range=[STATES[name][1] for name in present]), legend=legend)
    tooltip = [
        alt.Tooltip("label:N", title="token"),
        alt.Tooltip("state:N"),
        alt.Tooltip("probability:Q", title="draft's probability", format=".3f"),
        alt.Tooltip("path_probability:Q", title="of the whole path", format=".4f"),
        alt.Tooltip("entropy:Q", title="draft's entropy behind it (nats)", format=".2f"),
        alt.Tooltip("depth:Q"),
        alt.Tooltip("rank:Q", title="rank among siblings"),
    ]
    edges = layout.filter(pl.col("from_y").is_not_null())
    lines = alt.Chart(edges).mark_rule().encode(
        alt.X("from_x:Q", **across), alt.X2("depth:Q", title=title), alt.Y("from_y:Q", **down), alt.Y2("y:Q"),
        color=alt.Color("state:N", scale=scale, legend=legend),
        strokeWidth=where("datum.true", alt.StrokeWidthValue, 3, 1),
        opacity=where("datum.true", alt.OpacityValue, 1, 0.6),
    )  # fmt: skip
    base = alt.Chart(layout)
    points = base.mark_point(filled=True, opacity=1, size=60).encode(x, y, color=colour, shape=shape, tooltip=tooltip)
    words = base.mark_text(align="left", dx=5, dy=-6, fontSize=11, color=INK, fill=INK).encode(
        x, y, alt.Text("short:N"), tooltip=tooltip, opacity=where("datum.kept || datum.true", alt.OpacityValue, 1, 0.6),
    )  # fmt: skip
    height = int(np.ceil((last + 1) * LEAF)) + 130  # the axis and the legend take their part
    return alt.layer(lines, points, words, height=height)
