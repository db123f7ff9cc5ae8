#!/usr/bin/env python3
"""Tables, pictures and a summary from the results of benchmarks (benches/results/*.json).

  bench-report.py scene [FILE]                 print the result of a scene from standard input with its
                                               budgets, and write it to FILE; fail if one is missed
  bench-report.py budgets RESULTS [SCENE...]   report missed budgets; fail if there are any, or,
                                               without names, if one was not measured
  bench-report.py docs [RESULTS]               write docs/benchmarks.md's tables, and the pictures
  bench-report.py micro CRITERION RESULTS      write micro.json from what criterion left
"""

import json
import math
import os
import re
import subprocess
import sys
from datetime import date
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/benchmarks.md"
MEBIBYTE = 1 << 20
UNITS = {"s": ("s", 1), "ms": ("s", 1e-3), "MiB": ("B", MEBIBYTE), "of": ("ratio", 1), "": ("n", 1)}


def load(results, scene):
    file = results / f"{scene}.json"
    return judge(json.loads(file.read_text())) if file.exists() else None


def rows(report):
    return [row for table in report["tables"] for row in table["rows"]]


# Budgets


def budgets(scene):
    """The budgets of a scene: quantity, pattern of what it is of, whether at least, bound, reason."""
    for line in (ROOT / "benches/perf/budgets.txt").read_text().splitlines():
        of_scene, *parts = line.split(" | ")
        if of_scene == scene:
            what, patterns, bound, *reason = parts
            sign, value, unit = (bound + " ").split(" ", 2)
            unit, times = UNITS[unit.strip()]
            for pattern in patterns.split("; "):
                yield {"what": what, "of": pattern, "at_least": sign == ">=",
                    "bound": {unit: float(value) * times}, "reason": "".join(reason)}


def judge(report):
    """Adds the budgets to the rows of a report. A value without a number stands for a comparison whose
    other side took too long: it is within any bound."""
    known = list(budgets(report["scene"]))
    for budget in known:
        budget["pattern"] = re.compile(".*".join(map(re.escape, budget["of"].split("*"))))
    for row in rows(report):
        fits = lambda it: it["what"] == row["what"] and it["pattern"].fullmatch(row["of"])
        budget = row["budget"] = next(filter(fits, known), None)
        value = number(next(iter(row["values"].values())))
        row["met"] = None
        if budget:
            bound = number(budget["bound"])
            row["met"] = value is None or (value >= bound if budget["at_least"] else value <= bound)
    measured = {(row["what"], row["of"]) for row in rows(report)}
    report["not_measured"] = [f"{it['what']}, {it['of']}" for it in known
        if "*" not in it["of"] and (it["what"], it["of"]) not in measured]
    return report


def missed(report):
    """What to print of the missed budgets."""
    for row in rows(report):
        if row["met"] is False:
            reason = row["budget"]["reason"]
            value = show(next(iter(row["values"].values())))
            yield f"{row['what']}, {row['of']}: {value}, {bound(row['budget'])}" + (f" ({reason})" if reason else "")


# Values


def number(value):
    return next(iter(value.values())) if isinstance(value, dict) else None


def show(value):
    """A value as the benchmarks print it."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    ((unit, it),) = value.items()
    if unit == "s":
        scaled, word = (it, "s") if it >= 1 else (it * 1e3, "ms") if it >= 1e-3 else (it * 1e6, "µs")
        return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {word}"
    if unit == "B":
        return f"{it / 1024:.1f} KiB" if it < MEBIBYTE else f"{it / MEBIBYTE:.1f} MiB"
    if unit == "B/s":
        return f"{it / 1024 / MEBIBYTE:.2f} GiB/s"
    if unit == "ratio":
        return f"{it:.3f}"
    return f"{it:.1f}" if it != int(it) else f"{it:,.0f}"


def bound(budget):
    return ("≥ " if budget["at_least"] else "≤ ") + show(budget["bound"]) if budget else "-"


# The summary


def summarize(results, scenes):
    all_scenes = not scenes
    scenes = scenes or sorted(file.stem for file in results.glob("*.json"))
    met, over, absent = 0, [], []
    for scene in scenes:
        report = load(results, scene)
        if not report:
            absent.append(f"{scene}: no result")
            continue
        met += sum(row["met"] is True for row in rows(report))
        over += [f"{scene}: {it}" for it in missed(report)]
        absent += [f"{scene}: {it}" for it in report["not_measured"]]
    print("".join(f"not measured: {it}\n" for it in absent), end="")
    print("".join(f"missed: {it}\n" for it in over), end="")
    print(f"{met} budgets met, {len(over)} missed, {len(absent)} not measured.")
    return bool(over or all_scenes and absent)


# The result of a scene


def facts():
    """What identifies a measurement: source, time and machine."""

    def output(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    cpuinfo = Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"model name\s*: (.*)", cpuinfo)
    # The directory may belong to another user than root, who measures.
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", ROOT]
    return {
        "commit": output(*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
        "date": date.today().isoformat(),
        "kernel": Path("/proc/sys/kernel/osrelease").read_text().strip(),
        "nft": output("nft", "--version"),
        "processor": cpu[1] if cpu else "unknown",
        "processors": str(os.cpu_count()),
    }


def write(report, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"facts": facts(), **report}, indent=2, ensure_ascii=False) + "\n")


def conclude(text, file):
    if file:
        write(json.loads(text), file)
    report = judge(json.loads(text))
    colours = {"yes": "\x1b[32m", "NO": "\x1b[1;31m"}
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for table in report["tables"]:
        head, lines = cells(table)
        widths = [max(map(len, column)) for column in zip(head, *lines)]
        print(f"\n{table['title']}\n")
        for line in [head, *lines]:
            what, *others = [it.rjust(width) for it, width in zip(line, widths)]
            words = [f"{colours[it.strip()]}{it}\x1b[0m" if coloured and it.strip() in colours else it for it in others]
            print("  ".join([line[0].ljust(widths[0]), *words]))
    print("".join(f"\n{note}" for note in report["notes"]))
    over = list(missed(report))
    print("".join(f"missed: {it}\n" for it in over), end="")
    print("".join(f"not measured: {it}\n" for it in report["not_measured"]), end="")
    print(f"{sum(bool(row['budget']) for row in rows(report))} budgets measured, {len(over)} missed.")
    return bool(over)


# Tables


def markdown(head, lines):
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, rule, *lines])


def judged(row):
    """The first value of a row with the bounds of a ratio and the budget; bold if that is missed."""
    first, *others = row["values"].values()
    text = show(first)
    text = f"**{text}**" if row["met"] is False else text
    if "from" in row["values"]:
        text += f" [{', '.join(map(show, others))}]"
    return f"{text} ({bound(row['budget'])})" if row["budget"] else text


def across(table, more, key="what", column="of"):
    """A table with a column for each cluster or lane, and lines for `more` values."""
    columns, lines = [], {}
    for row in table["rows"]:
        columns += [row[column]] if row[column] not in columns else []
        lines.setdefault(row[key], {})[row[column]] = judged(row)
        for name in more:
            if value := row["values"].get(name):
                lines.setdefault(f"{row[key]}, {name}", {})[row[column]] = show(value)
    body = [[line] + [cells.get(it, "-") for it in columns] for line, cells in lines.items()]
    return markdown([table["of"] if key == "of" else "what"] + columns, body)


def cells(table):
    """The head and the lines of a table with a line for each row."""
    found = table["rows"]
    names = list(dict.fromkeys(name for row in found for name in row["values"]))
    tail = ["budget", "met"] if any(row["budget"] for row in found) else []
    lines = []
    for row in found:
        values = [show(row["values"].get(name)) for name in names]
        met = {True: "yes", False: "NO", None: "-"}[row["met"]]
        lines.append([row["what"], row["of"], *values, *[bound(row["budget"]), met][: len(tail)]])
    return ["what", table["of"], *names, *tail], lines


def down(table):
    head, lines = cells({**table, "rows": [{**row, "budget": None} for row in table["rows"]]})
    values = [[*line[:2], judged(row), *line[3:]] for line, row in zip(lines, table["rows"])]
    return markdown(head, values)


def only(table, keep):
    return {**table, "rows": [row for row in table["rows"] if keep(row)]}


# The changes of which the page gives the time from the server, too.
WHOLE = ("one endpoint replaced", "one endpoint more or less", "a service added")

def in_series(cluster):
    """Whether a cluster is one of growing size, and not one of a shape that a user reported."""
    return cluster.endswith((" 10", " 20"))


# The values of a row that the page has beside the first one.
MORE = {
    "first": ["kube-proxy's shape"],
    "changes": ["from the server", "kube-proxy's shape"],
    "neighbours": ["longest in one"],
}


def with_budget(table):
    """The lines of a table that have a budget for one of the clusters."""
    whats = {row["what"] for row in table["rows"] if row["budget"]}
    return only(table, lambda row: row["what"] in whats)


def page_table(scene, table):
    """The Markdown of a table, or nothing if it has nothing for the page."""
    has_budgets = any(row["budget"] for row in table["rows"])
    if scene == "churn" and not has_budgets:
        return None  # The picture has it.
    if scene == "packets" and has_budgets:
        table = only(table, lambda row: row["budget"] or "again" in row["of"])
        return across(table, [], "of", "what")
    if scene == "packets":
        table = only(table, lambda row: "again" not in row["of"] and "before" not in row["of"])
    if scene in ("first", "changes", "insight"):
        table = with_budget(table)
    if scene in ("conntrack", "ranges"):
        return down(table)
    more = MORE.get(scene, [])
    if scene == "changes":
        table = only(table, lambda row: in_series(row["of"]))
        for row in table["rows"]:
            if row["what"] not in WHOLE:
                row["values"].pop("from the server", None)
    return across(table, more)


def section(report):
    """The Markdown of a scene."""
    facts, scene = report["facts"], report["scene"]
    place = f"{facts['processors']} processors ({facts['processor']}), Linux {facts['kernel']}"
    parameters = [f"{name} {value}" for name, value in report["parameters"].items()]
    lines = [f"Commit {facts['commit']}, {facts['date']}; {'; '.join([place, *parameters])}."]
    tables = [page_table(scene, table) for table in report["tables"]]
    lines += [table.rstrip() for table in tables if table]
    return "\n\n".join(lines)


def write_page(results):
    text = PAGE.read_text()
    for scene in re.findall(r"<!-- (\w+):begin -->", text):
        report = load(results, scene)
        if report:
            between = f"<!-- {scene}:begin -->\n{section(report)}\n<!-- {scene}:end -->"
            pattern = f"<!-- {scene}:begin -->.*?<!-- {scene}:end -->"
            text = re.sub(pattern, lambda _: between, text, flags=re.DOTALL)
    PAGE.write_text(text)


# Pictures: SVG with three panels side by side

PANEL, HEIGHT, LEFT, GAP, TOP, BOTTOM = 300, 220, 66, 84, 64, 50
NFTLET, LIGHT, OTHER = "#0b6bcb", "#7fb4e6", "#c2410c"


def axis(values, logarithmic, start, length):
    """The places of values on an axis, and the values of its lines."""
    if logarithmic:
        low = math.floor(math.log10(min(values)))
        high = max(math.ceil(math.log10(max(values))), low + 1)
        place = lambda it: start + (math.log10(it) - low) / (high - low) * length
        return place, [10.0**power for power in range(low, high + 1)]
    step = 10 ** math.floor(math.log10(max(max(values), 1e-9) / 2))
    step = next(step * times for times in (1, 2, 5, 10) if max(values) / (step * times) <= 6)
    most = math.ceil(max(values) / step) * step
    return lambda it: start + it / most * length, [step * n for n in range(round(most / step) + 1)]


def text(x, y, words, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>\n'


def line(points, more):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" {more}/>\n'


def panel(left, title, label, below, series, logarithmic):
    series = [it for it in series if it[2]]
    xs = [x for _, _, points in series for x, _ in points]
    ys = [y for _, _, points in series for _, y in points]
    bottom = TOP + HEIGHT
    place_x, lines_x = axis(xs, logarithmic, left, PANEL)
    place_y, lines_y = axis(ys, logarithmic, bottom, -HEIGHT)
    svg = text(left, 20, title, 'font-weight="bold" font-size="14"')
    for value in lines_y:
        y = place_y(value)
        svg += line([(left, y), (left + PANEL, y)], 'stroke="#ddd"')
        svg += text(left - 6, y + 4, label(value), 'text-anchor="end"')
    for value in lines_x:
        words = f"{value:,.0f}"
        svg += text(place_x(value), bottom + 16, words, 'text-anchor="middle"')
    svg += text(left + PANEL / 2, bottom + 34, below, 'text-anchor="middle"')
    for place, (name, colour, points) in enumerate(series):
        points = sorted((place_x(x), place_y(y)) for x, y in points)
        svg += line(points, f'stroke="{colour}" stroke-width="2"')
        if logarithmic:
            svg += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>\n' for x, y in points)
        svg += text(left, 36 + 12 * place, name, f'fill="{colour}" font-size="11"')
    return svg


def picture(file, title, panels, logarithmic):
    width, height = LEFT + len(panels) * (PANEL + GAP) - GAP + 40, TOP + HEIGHT + BOTTOM
    body = "".join(
        panel(LEFT + place * (PANEL + GAP), *it, logarithmic) for place, it in enumerate(panels)
    )
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12" fill="#333">\n'
        f"<title>{title}</title>\n"
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}</svg>\n'
    )


def scale_picture(results):
    """First rules, changes and memory by the size of the cluster."""
    found = rows(load(results, "first")) + rows(load(results, "changes"))

    def points(what, name="nftlet", per=1):
        values = [(it["of"], number(it["values"].get(name))) for it in found
            if it["what"] == what and in_series(it["of"])]
        size = lambda of: math.prod(int(part.replace(",", "")) for part in of.split(" x "))
        return [(size(of), value / per) for of, value in values if value]

    def seconds(value):
        return show({"s": value}).replace(".00", "").replace(".0", "")

    replaced, other = "one endpoint replaced", "kube-proxy's shape"
    below = "endpoints of all services"
    picture(
        results / "scale.svg",
        "nftlet by the size of the cluster",
        [
            ("First program", seconds, below, [
                ("kube-proxy's shape, nft -f", OTHER, points("first program", other)),
                ("process start to rules in place", LIGHT, points("process start to rules in place")),
                ("nftlet", NFTLET, points("first program")),
            ]),
            ("One endpoint replaced", seconds, below, [
                ("kube-proxy's shape, nft -f", OTHER, points(replaced, other)),
                ("99th percentile", LIGHT, points(replaced, "from the server, p99")),
                ("nftlet, from the server", NFTLET, points(replaced, "from the server")),
            ]),
            ("Resident memory", lambda it: f"{it:g} MiB", below, [
                ("peak", LIGHT, points("memory, peak", per=MEBIBYTE)),
                ("nftlet, after settling", NFTLET, points("memory after settling", per=MEBIBYTE)),
            ]),
        ],
        logarithmic=True,
    )


def churn_picture(results):
    """Changes, connections and memory over the time."""
    windows = load(results, "churn")["tables"][0]["rows"]

    def points(name, per):
        ends = [float(it["what"].split("-")[1].split()[0]) for it in windows]
        return [(end, number(it["values"][name]) / per) for end, it in zip(ends, windows)]

    milliseconds = lambda value: f"{value:g} ms"
    picture(
        results / "churn.svg",
        "nftlet while endpoints change all the time",
        [
            ("A change, from the bytes read", milliseconds, "seconds", [
                ("mean", NFTLET, points("a change", 1e-3)),
            ]),
            ("A connection to a ClusterIP", milliseconds, "seconds", [
                ("99th percentile", LIGHT, points("a connection, p99", 1e-3)),
                ("median", NFTLET, points("a connection", 1e-3)),
            ]),
            ("Resident memory", lambda it: f"{it:g} MiB", "seconds", [
                ("mean", NFTLET, points("memory", MEBIBYTE)),
            ]),
        ],
        logarithmic=False,
    )


# Criterion


def write_micro(criterion, results):
    table = {"title": "Parts", "of": "size", "rows": []}
    for file in sorted(criterion.glob("**/new/estimates.json")):
        *name, size = file.parent.parent.relative_to(criterion).parts
        median = json.loads(file.read_text())["median"]["point_estimate"] / 1e9
        table["rows"].append({"what": "/".join(name), "of": f"{int(size):,}",
            "values": {"median": {"s": median}}})
    write({"scene": "micro", "parameters": {}, "tables": [table], "notes": []}, results / "micro.json")


def main(arguments):
    match arguments:
        case ["scene", *file]:
            return conclude(sys.stdin.read(), Path(file[0]) if file else None)
        case ["budgets", results, *scenes]:
            return summarize(Path(results), scenes)
        case ["docs", *results]:
            results = Path(results[0]) if results else ROOT / "benches/results"
            write_page(results)
            scale_picture(results)
            churn_picture(results)
        case ["micro", criterion, results]:
            write_micro(Path(criterion), Path(results))
        case _:
            print(__doc__, end="")
            return arguments not in (["--help"], ["-h"])
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
