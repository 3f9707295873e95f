"""Script: a folder of runs -> report.html, one self-contained page: result tables, curves, episodes to read.

    python plot.py --run out/demo

Reads <run>/results/*.json and, where they exist, <run>/episodes/*.jsonl (of eval.py) and the metrics.csv and
config.json of training runs one or two folders down. Frame, style and script of the page are in plot.html.
What this file does not do: compute a score (scores.py), or say what has collapsed (diagnostics.py).
"""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from diagnostics import QUANTILES, alarms, result_alarms
from run import fail
from viewer import viewer


@dataclass(frozen=True)
class Config:
    run: Path = Path("out/demo")  # folder that holds results/, episodes/ and the training runs
    out: Path | None = None  # page to write; by default report.html in that folder
    episodes: int = 12  # episodes per agent in the viewer


FIELDS = """benchmark panel split agent stage checkpoint seeds episodes max_steps macro_mean ci95 success_rate
    per_type tokens_per_decision tokens_per_step parse_failure_rate command commit hardware minutes""".split()
STAGES = ("random", "zero-shot", "sft", "orl", "o2o", "hiper", "gold")  # order of the rows
CHARTS = {  # quantity -> what to look for; also the order of the charts. docs/train_*.md say more
    "loss": "mean negative log-likelihood per answer token: falls, then flattens",
    "v_loss": "expectile loss of V: small and flat once the critics are warm",
    "q_loss": "squared TD error of Q: falls, never drifts up",
    "cql_loss": "alpha times Q of the policy's own answers above that of the data: falls, then flattens",
    "value_mean": "mean V: within the range of returns",
    "q_mean": "mean Q of the data's answers: close to V",
    "mc_bias": "Q minus the return that followed: near 0, above it when the expectile is above 0.5",
    "mc_rank_corr": "rank correlation of Q with the return that followed: above 0",
    "advantage": "Q - V: median, middle half and middle 90%; a thin line: the critics see no difference",
    "advantage_mean": "mean of Q - V: around zero, below it when the expectile is above 0.5",
    "weight": "weight of a decision in the actor loss: median, middle half and middle 90%",
    "weight_mean": "mean weight, exp(A / temperature) with awr: near 1",
    "weight_max": "largest weight of a batch: seldom at its ceiling",
    "ess_share": "share of the decisions that carries the step: above a half; 1 is behaviour cloning",
    "ess": "effective number of decisions behind a step: close to the level's count",
    "actor_loss": "weighted negative log-likelihood of whole answers",
    "pg_loss": "policy gradient of TD3+BC: its level says little, its trend is Q's",
    "logp_mean": "log-probability per answer token of the data",
    "logp_expert": "the same, of the experts' answers: rises or stays",
    "logp_rollout": "the same, of the rollouts' answers: may fall, slowly",
    "kl_sft": "nats per answer from the policy that played the rollouts: 0 at first, then small",
    "grad_norm": "gradient norm before clipping: finite, no lasting spikes",
    "lr": "learning rate",
}
COLOURS = {
    "planner": "#b4540a",
    "executor": "#1d5fbf",
    "progress": "#2a7d4f",
    "actor": "#7a3fa0",
    "critic": "#5c6670",
}
MANY = 4  # more training runs than that fold their curves away
CHART_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "nanohrl", "font.family": "sans-serif", "font.size": 8,
    "axes.grid": True, "grid.color": "#eceef1", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#8a929c", "axes.formatter.limits": (-3, 4), "text.parse_math": False,
}  # fmt: skip


# --- inputs -----------------------------------------------------------------------------------------------
def read_results(folder: Path) -> list[dict]:
    """The results of <folder>/results, untrained agents first."""
    paths = sorted((folder / "results").glob("*.json"))
    if not paths:
        raise ValueError(
            f"no results in {folder}/results: run `make demo`, or `python eval.py --out {folder} ...`"
        )
    results = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
            missing = [name for name in FIELDS if name not in record]
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}: damaged JSON ({error}): run its eval.py command again") from None
        if missing:
            raise ValueError(f"{path}: fields {missing} are missing: run its eval.py command again")
        results.append(record | {"file": path.stem})
    rank = {stage: index for index, stage in enumerate(STAGES)}
    return sorted(
        results, key=lambda r: (r["benchmark"], r["panel"], r["split"], rank.get(r["stage"], len(rank)))
    )


def read_metrics(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """metrics.csv -> {quantity: {level: [(step, value)]}}."""
    series = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(csv.reader(path.read_text().splitlines()), start=1):
        if row == ["step", "metric", "value"]:
            continue
        try:
            step, metric, value = row
            level, _, quantity = metric.rpartition("/")
            series[quantity][level].append((int(step), float(value)))
        except ValueError:
            found = f"{path}:{number}: {','.join(row)!r} is not 'step,metric,value'"
            raise ValueError(f"{found}: delete the line, or train again") from None
    return series


# --- tables -----------------------------------------------------------------------------------------------
HEADER = ["agent", "score", "95% interval", "success", "episodes", "tokens/step"]


def cells(r: dict) -> list[str]:
    """One row of the result table, in the order of HEADER."""
    interval, score = "[{:.1f}, {:.1f}]".format(*r["ci95"]), f"{r['macro_mean']:.1f}"
    success, tokens = f"{r['success_rate']:.1%}", f"{r['tokens_per_step']:.0f}"
    return [r["agent"], score, interval, success, f"{r['episodes']}", tokens]


def by_panel(results: list[dict]) -> dict[str, list[dict]]:
    """Results by what they were measured on: rows of different panels or step limits are not compared."""
    groups = defaultdict(list)
    for r in results:
        groups["{benchmark}, panel {panel}, split {split}, {max_steps} steps".format(**r)].append(r)
    return groups


def result_table(results: list[dict]) -> str:
    """The result table as aligned plain text, one block per panel and split."""
    blocks = []
    for name, group in by_panel(results).items():
        rows = [HEADER, *map(cells, group)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows]
        blocks.append("\n".join([name, lines[0], "-" * len(lines[0]), *lines[1:]]))
    return "\n\n".join(blocks)


def html_table(header: list[str], rows: list[list[str]]) -> str:
    """Rows hold ready HTML. On a narrow screen the table scrolls sideways and its first column stays."""
    head = "".join(f"<th>{escape(name)}" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}<tbody>{body}</table></div>'


def type_table(group: list[dict]) -> str:
    rows = []
    for task in sorted({task for r in group for task in r["per_type"]}):
        found = [r["per_type"].get(task) for r in group]
        row = [escape(task), str(max(f["episodes"] for f in found if f))]
        for f in found:
            shade = f"background: rgba(29, 95, 191, {f['mean'] / 400:.2f})" if f else ""
            text = f"{f['mean']:.1f} <small>{f['success']:.0%}</small>" if f else "–"
            row.append(f'<span class="heat" style="{shade}">{text}</span>')
        rows.append(row)
    return html_table(["task type", "episodes", *(r["agent"] for r in group)], rows)


def subtask_table(group: list[dict]) -> str:
    """How subtasks end, and how far claims and judge agree (completion.summary), where results say it."""
    ends, words, rows = ("claim", "judge", "cap", "limit", "world"), ("agreement", "precision", "recall"), []
    for r in group:
        if (s := r.get("subtasks")) and s["count"]:
            shares = [s["ended_by"][how] / s["count"] for how in ends] + [s[word] for word in words]
            shares = ["–" if share is None else f"{share:.0%}" for share in shares]
            rows.append([escape(r["agent"]), f"{s['count']}", f"{s['mean_length']:.1f}", *shares])
    note = "what ended them; agreement of claims and judge, action by action; precision, recall of claims"
    table = html_table(["agent", "subtasks", "mean length", *ends, *words], rows)
    return f"<h3>How subtasks end <small>{note}</small></h3>{table}" if rows else ""


def token_table(group: list[dict]) -> str:
    """Prompt and answer tokens per decision by role, and the share of answers that could not be parsed."""
    roles, rows = ("planner", "executor", "progress"), []
    for r in group:
        counts = [r["tokens_per_decision"].get(role) for role in roles]
        cost = [f"{c['prompt']:.0f} + {c['completion']:.0f}" if c else "–" for c in counts]
        rows.append([escape(r["agent"]), *cost, f"{r['parse_failure_rate']:.1%}"])
    title = "<h3>Tokens per decision <small>prompt + answer; answers of the executor not parsed</small></h3>"
    return title + html_table(["agent", *roles, "not parsed"], rows)


def alarm_list(found: Iterable[str]) -> str:
    return "".join(f'<p class="alarm">{escape(text)}</p>' for text in found)


# --- figures ----------------------------------------------------------------------------------------------
def score_figure(group: list[dict]) -> str:
    """Scores as bars with intervals; lengths are in percent, so that the text keeps its size on a phone."""
    top = min(100, 10 * np.ceil(max(10, *(r["ci95"][1] for r in group)) / 10))
    bottom, parts = 52 * len(group) + 6, []

    def line(x1: float, x2: float, y1: float, y2: float, stroke: str) -> str:
        return f'<line x1="{1 + x1:.2f}%" x2="{1 + x2:.2f}%" y1="{y1}" y2="{y2}" {stroke}/>'

    for tick in np.linspace(0, top, 6):
        x = 96 * tick / top
        parts.append(line(x, x, 0, bottom, 'stroke="#e3e6ea"'))
        parts.append(
            f'<text x="{1 + x:.2f}%" y="{bottom + 16}" text-anchor="middle" class="tick">{tick:.0f}</text>'
        )
    for i, r in enumerate(group):
        y, (name, score, interval, *_) = 52 * i + 26, map(escape, cells(r))
        mean, low, high = (96 * value / top for value in (r["macro_mean"], *r["ci95"]))
        label = f'{name} <tspan class="tick">{score} {interval}</tspan>'
        parts.append(f'<text x="1%" dx="6" y="{y - 6}" class="label">{label}</text>')
        parts.append(f'<rect x="1%" y="{y}" width="{mean:.2f}%" height="18" fill="#9dbde6"/>')
        for ends in ((low, high, y + 9, y + 9), (low, low, y + 4, y + 14), (high, high, y + 4, y + 14)):
            parts.append(line(*ends, 'stroke="#16365f" stroke-width="2"'))
    return f'<svg class="scores" width="100%" height="{bottom + 22}" role="img">{"".join(parts)}</svg>'


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean: (S,) -> (S - window + 1,)."""
    return np.convolve(values, np.ones(window) / window, "valid")


def chart(levels: dict[str, np.ndarray]) -> str:
    """A small chart as inline SVG. levels: name -> (S, 1 + K), columns step and K values.

    K = 1: a line per level, thin as logged and bold as a running mean. K = 5, the QUANTILES: running means of
    the median as a line, of the middle half as a dark band, and of the middle 90% as a light one.
    """
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(3.7, 2.2), layout="constrained")
        axes = figure.add_subplot()
        for level, points in levels.items():
            (steps, *columns), colour = points.T, COLOURS.get(level, "#1d5fbf")
            window = max(1, len(steps) // 20)
            means = [smooth(values, window) for values in columns]
            at = steps[window // 2 :][: len(means[0])]
            if len(means) == 1:
                axes.plot(steps, columns[0], color=colour, lw=0.6, alpha=0.35)
            else:
                axes.fill_between(at, means[0], means[4], color=colour, alpha=0.12, lw=0)
                axes.fill_between(at, means[1], means[3], color=colour, alpha=0.25, lw=0)
            axes.plot(at, means[len(means) // 2], color=colour, lw=1.6, label=level)
        if len(levels) > 1:
            figure.legend(loc="outside upper center", ncols=len(levels), frameon=False, handlelength=1.2)
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    svg = text.getvalue()
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # names that look like links; HTML does without them


def drawn(series: dict) -> dict[str, dict[str, np.ndarray]]:
    """read_metrics's series -> {name of the chart: levels}; five quantiles of a level are one chart."""
    charts = defaultdict(dict)
    for name, levels in series.items():
        stem, _, tail = name.rpartition("_p")
        parts = [series.get(f"{stem}_p{p:02d}", {}) for p in QUANTILES]
        for level, points in levels.items():
            if tail.isdigit() and all(level in part for part in parts):
                columns = [dict(part[level]) for part in parts]
                steps = sorted(set.intersection(*map(set, columns)))  # the last step may be torn
                charts[stem][level] = np.array([[t, *(c[t] for c in columns)] for t in steps], dtype=float)
            else:
                charts[name][level] = np.array(points, dtype=float)
    return charts


def curves(path: Path, folder: Path, fold: bool) -> str:
    """The alarms and charts of one training run; fold: the charts open on a click."""
    series, order = read_metrics(path), list(CHARTS)
    logged = {f"{level}/{q}": [v for _, v in points] for q in series for level, points in series[q].items()}
    charts, figures = drawn(series), []
    for name in sorted(charts, key=lambda n: (order.index(n) if n in order else len(order), n)):
        caption = f"<b>{escape(name)}</b> {escape(CHARTS.get(name, ''))}"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{chart(charts[name])}</figure>")
    body = f'<div class="charts">{"".join(figures)}</div>'
    if fold:
        body = f"<details><summary>{len(figures)} curves</summary>{body}</details>"
    found = alarm_list(alarms(logged).values()) or '<p class="soft">no alarms</p>'
    return f"<h3>{escape(path.parent.relative_to(folder).as_posix())}</h3>{found}{body}"


# --- the page ---------------------------------------------------------------------------------------------
def provenance(folder: Path, results: list[dict]) -> str:
    entries = []
    for r in results:
        facts = f"checkpoint {r['checkpoint'] or 'none'}, seeds {r['seeds']}, {r['minutes']} minutes"
        entries.append((r["agent"], r, facts))
    for path in sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]):
        record, name = json.loads(path.read_text()), path.parent.relative_to(folder).as_posix()
        facts = f"seed {record.get('seed')}"
        entries.append((f"{name} (training)", record.get("provenance", {}), facts))
    return "".join(
        f"<p><b>{escape(name)}</b> <code>{escape(r.get('command', ''))}</code><br>"
        f"commit {escape(r.get('commit', ''))}; {escape(r.get('hardware', ''))}; {escape(facts)}</p>"
        for name, r, facts in entries
    )


def page(config: Config) -> str:
    """The whole report; every text that comes from a file is escaped."""
    if not config.run.is_dir():
        raise ValueError(
            f"no folder {config.run}: run `make demo`, or give --run the --out folder of eval.py"
        )
    results, tables = read_results(config.run), []
    for name, group in by_panel(results).items():
        rows = [[escape(cell) for cell in cells(r)] for r in group]
        tables.append(f"<h2>Results: {escape(name)}</h2>{html_table(HEADER, rows)}{score_figure(group)}")
        tables.append(alarm_list(f"{r['agent']}: {text}" for r in group for text in result_alarms(r)))
        tables.append(f"<h3>By task type <small>mean score, share solved</small></h3>{type_table(group)}")
        tables.append(subtask_table(group) + token_table(group))
    runs = [*config.run.glob("*/metrics.csv"), *config.run.glob("*/*/metrics.csv")]
    runs.sort(key=lambda path: (path.stat().st_mtime, path))
    training = "".join(curves(path, config.run, fold=len(runs) > MANY) for path in runs)
    options, articles = viewer(config.run / "episodes", results, config.episodes)
    return Template((Path(__file__).parent / "plot.html").read_text()).substitute(
        title=escape(f"nanoHRL: {config.run.resolve().name}"),
        results="".join(tables),
        training=training or "<p>No metrics.csv below this folder.</p>",
        options=options,
        articles=articles,
        provenance=provenance(config.run, results),
    )


def main(config: Config) -> None:
    text, out = page(config), config.out or config.run / "report.html"
    out.write_text(text)
    print(result_table(read_results(config.run)))
    print(f"\nwrote {out} ({len(text) / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        fail(error)
