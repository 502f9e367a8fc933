"""Draws rooms.svg, cache.svg and step.svg: python docs/images/draw.py."""

from pathlib import Path

INK, MUTED, FILL = "#1f2933", "#52606d", "#ffffff"
BLUE, GREEN, AMBER, GREY = "#dbeafe", "#dcfce7", "#fef3c7", "#f1f5f9"


class Drawing:
    """An SVG of a fixed size, on white, so that it can be read on dark pages too."""

    def __init__(self, width, height):
        self.size, self.parts = (width, height), []

    def box(self, x, y, width, height, text, fill=GREY, note=""):
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" '
            f'stroke="{MUTED}"/>'
        )
        middle = y + height / 2 + (5 if not note else -3)
        self.text(x + width / 2, middle, text, bold=True)
        if note:
            self.text(x + width / 2, middle + 17, note, size=11, color=MUTED)

    def text(self, x, y, text, size=14, bold=False, color=INK, anchor="middle"):
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"'
            f"{weight}>{text}</text>"
        )

    def arrow(self, x1, y1, x2, y2):
        self.parts.append(
            f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{MUTED}" stroke-width="1.5" '
            'marker-end="url(#tip)"/>'
        )

    def save(self, name):
        width, height = self.size
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="{MUTED}"/></marker>'
            "</defs>"
        )
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="system-ui, sans-serif"><rect width="100%" height="100%" fill="{FILL}"/>'
            f"{tip}{''.join(self.parts)}</svg>\n"
        )
        (Path(__file__).parent / name).write_text(svg)


def rooms():
    """Which rooms stand on which: an arrow points to what is imported."""
    page = Drawing(820, 560)
    rows = [
        ("cli", [("cli", "a module a verb")], AMBER),
        ("work", [("training", "objective, step, loop"), ("evaluation", "texts, tasks"),
                  ("serving", "OpenAI's API"), ("tools", "plan, bench")], AMBER),
        ("texts", [("text", "texts in, texts out"), ("data", "documents to batches")], GREEN),
        ("ids and files", [("decode", "engine, scheduler"), ("checkpoints", "read and write")],
         GREEN),
        ("model", [("model", "layers, cache, scan"), ("transforms", "LoRA, int8")], BLUE),
        ("mathematics", [("ops", "a form a platform"), ("sharding", "mesh, rules, fsdp")], BLUE),
        ("ground", [("config", "families"), ("devices", "chips, processes"),
                    ("files", "local and gs://"), ("errors", "axes")], GREY),
    ]  # fmt: skip
    for i, (name, boxes, fill) in enumerate(rows):
        y = 20 + i * 76
        page.text(110, y + 31, name, size=13, color=MUTED, anchor="end")
        width = (660 - 14 * (len(boxes) - 1)) / len(boxes)
        for j, (label, note) in enumerate(boxes):
            page.box(130 + j * (width + 14), y, width, 50, label, fill, note)
        if i:
            page.arrow(460, y - 26, 460, y - 3)
    page.save("rooms.svg")


def cache():
    """A local layer's ring of slots: what is written where, and what a query sees."""
    page = Drawing(820, 330)
    title = "A local layer with a window of 4, and 6 slots: position p is in slot p mod 6"
    page.text(20, 30, title, bold=True, anchor="start")
    for row, (title, last) in enumerate((("after token 3", 3), ("after token 9", 9))):
        y = 60 + row * 125
        page.text(20, y + 30, title, anchor="start", color=MUTED)
        for slot in range(6):
            held = [p for p in range(last + 1) if p % 6 == slot]
            position = held[-1] if held else -1
            seen = held and last - position < 4
            fill = GREEN if seen else GREY
            page.box(
                160 + slot * 104,
                y,
                92,
                48,
                f"token {position}" if position >= 0 else "empty",
                fill,
                f"slot {slot}",
            )
        page.text(
            160, y + 72, f"the query at {last} sees keys with 0 &lt;= key &lt;= {last} and "
            f"{last} - key &lt; 4: the green ones", size=13, color=MUTED, anchor="start",
        )  # fmt: skip
    note = (
        "An empty slot has the position -1. Drafted tokens are forgotten by giving theirs -1 again."
    )
    page.text(20, 312, note, size=13, color=MUTED, anchor="start")
    page.save("cache.svg")


def step():
    """A training step on a mesh of data=2, fsdp=2: what each device holds, and what travels."""
    page = Drawing(820, 400)
    page.text(20, 28, "A training step on the mesh data=2, fsdp=2", bold=True, anchor="start")
    stages = [
        ("holds", "its half of the weights and optimizer slots, float32", GREY),
        ("reads", "its quarter of the batch", GREY),
        ("gathers", "along fsdp: a layer's weights, cast to bfloat16 first", BLUE),
        ("computes", "forward; backward, gathering again", GREEN),
        ("sums", "the gradients along fsdp, in float32; keeps its half", BLUE),
        ("sums", "that half along data", BLUE),
        ("updates", "its half of the weights and slots; nothing travels", GREEN),
    ]
    for i, (verb, what, fill) in enumerate(stages):
        y = 48 + i * 48
        page.box(20, y, 110, 36, verb, fill)
        page.text(148, y + 23, what, anchor="start")
        if i:
            page.arrow(75, y - 12, 75, y - 2)
    for device in range(4):
        x, y = 590 + device % 2 * 110, 110 + device // 2 * 110
        page.box(x, y, 96, 84, f"device {device}", GREY, f"weights half {device % 2}")
        page.text(x + 48, y + 74, f"rows quarter {device}", size=11, color=MUTED)
    page.text(695, 100, "fsdp &#8594;", size=13, color=MUTED)
    page.text(572, 215, "data &#8595;", size=13, color=MUTED, anchor="end")
    page.save("step.svg")


if __name__ == "__main__":
    rooms()
    cache()
    step()
