"""Draws one step of a trace that `fleet launch --trace` or a job's `trace` wrote, as SVG: for each rank what it computed, and beneath it what travelled.

`picture.py OUT.svg "TITLE=FILE[,FILE...]" ...` draws a panel for each title, from one file for all ranks or one for each (FILE.rank-N). The step is
the one of median length.
"""

import html
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

WIDTH, LEFT, BAR, GAP = 1100, 110, 18, 4
COLOURS = {
    "forward": "#4c8fd6", "backward": "#e08a3c", "optimizer": "#57a773", "data": "#9a9a9a", "wait": "#c8443f", "checkpoint": "#8c6d5a",
    "reduce": "#b9a3d9", "gather": "#8fc7c0",
}
SHORT = {"embedding": "emb", "head": "head", "block": ""}


def spans(files):
    """For each rank its spans: (name, lane, begin, end), in microseconds."""
    of, open_ones, names = defaultdict(list), {}, {}
    for file in files:
        for event in json.loads(Path(file).read_text())["traceEvents"]:
            rank, kind = event["pid"], event["ph"]
            if kind == "M" and event["name"] == "process_name":
                names[rank] = event["args"]["name"]
            elif kind == "X":
                of[rank].append((event["name"], "busy", event["ts"], event["ts"] + event["dur"]))
            elif kind == "b":
                open_ones[event["id"]] = event
            elif kind == "e":
                of[rank].append((event["name"], "travels", open_ones.pop(event["id"])["ts"], event["ts"]))
    return dict(sorted(of.items())), names


def one_step(of):
    """Begin and end of the step of median length, of the ranks together."""
    begins, ends = defaultdict(list), defaultdict(list)
    for those in of.values():
        for name, _, begin, end in those:
            if name.startswith("step "):
                begins[name].append(begin)
                ends[name].append(end)
    lengths = {name: max(ends[name]) - min(begins[name]) for name in begins if len(begins[name]) == len(of)}
    middle = statistics.median_low(lengths.values())
    name = next(name for name, length in lengths.items() if length == middle)
    return min(begins[name]), max(ends[name])


def lanes(those):
    """Spans that overlap in rows of their own."""
    rows = []
    for span in sorted(those, key=lambda span: span[2]):
        row = next((row for row in rows if row[-1][3] <= span[2]), None)
        rows.append([span]) if row is None else row.append(span)
    return rows


def label(name, width):
    what, _, unit = name.partition(" ")
    text = unit.replace("block ", "") if unit else what
    text = SHORT.get(text, text)
    return text if width > 7 * len(text) + 4 else ""


def panel(out, top, title, files):
    of, names = spans(files)
    begin, end = one_step(of)
    scale = (WIDTH - LEFT - 10) / (end - begin)
    out.append(f'<text x="4" y="{top + 14}" class="title">{html.escape(title)}: one step, {(end - begin) / 1000:.0f} ms</text>')
    y = top + 24
    for rank, those in of.items():
        seen = [(n, k, max(b, begin), min(e, end)) for n, k, b, e in those if e > begin and b < end and not n.startswith("step ")]
        rows = [[span for span in seen if span[1] == "busy"]] + lanes([span for span in seen if span[1] == "travels"])
        out.append(f'<text x="4" y="{y + 13}">{html.escape(names.get(rank, f"rank {rank}"))}</text>')
        for row in rows:
            for name, kind, b, e in row:
                x, width = LEFT + (b - begin) * scale, max((e - b) * scale, 0.5)
                colour = COLOURS.get(name.split()[0], "#cccccc")
                height = BAR if kind == "busy" else BAR - 8
                out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}"><title>{html.escape(name)}, '
                           f'{(e - b) / 1000:.1f} ms</title></rect>')
                if kind == "busy" and (text := label(name, width)):
                    out.append(f'<text x="{x + width / 2:.1f}" y="{y + 13}" class="in">{html.escape(text)}</text>')
            y += (BAR if row is rows[0] else BAR - 8) + GAP - 2
        y += 8
    return y + 10


def main():
    target, panels = sys.argv[1], [argument.partition("=") for argument in sys.argv[2:]]
    out, top = [], 4
    for title, _, files in panels:
        top = panel(out, top, title, files.split(","))
    x = LEFT
    for name, colour in COLOURS.items():
        out.append(f'<rect x="{x}" y="{top}" width="12" height="12" fill="{colour}"/><text x="{x + 16}" y="{top + 11}">{name}</text>')
        x += 96
    style = "text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.in{font-size:10px;fill:#fff;text-anchor:middle}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 20}" width="{WIDTH}"><style>{style}</style>'
    Path(target).write_text("\n".join([head, f'<rect width="{WIDTH}" height="{top + 20}" fill="#fff"/>', *out, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
