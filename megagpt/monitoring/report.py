"""One HTML page about a run, made from `metrics.jsonl` and `config.json` alone.

It needs no server and no network.
"""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from megagpt.common.text import without_control_characters
from megagpt.monitoring.metrics import History, Line, read_metrics
from megagpt.monitoring.plots import (
    NAMED_LOSSES,
    loss_picture,
    named_losses_picture,
    small_pictures,
)
from megagpt.utils import UserError, human_count, human_duration, write_atomically

REPORT_FILE = "report.html"
CONFIG_FILE = "config.json"
NEWEST_EVENTS = 100
NEWEST_SAMPLES = 20

SUMMARY_KEYS = {
    "megagpt.model.preset": "preset",
    "megagpt.model.num_layers": "layers",
    "megagpt.model.hidden_size": "hidden size",
    "megagpt.model.num_heads": "heads",
    "megagpt.model.vocab_size": "vocabulary",
    "megagpt.model.sequence_length": "sequence length",
    "megagpt.data.path": "data",
    "megagpt.parallel.pipeline": "pipeline axis",
    "megagpt.parallel.tensor": "tensor axis",
    "train_batch_size": "batch size",
    "train_micro_batch_size_per_gpu": "micro-batch size",
    "gradient_accumulation_steps": "accumulation",
    "zero_optimization.stage": "ZeRO stage",
    "zero_optimization.offload_optimizer.device": "optimizer offload",
    "zero_optimization.offload_param.device": "parameter offload",
    "optimizer.type": "optimizer",
    "optimizer.params.lr": "peak learning rate",
    "scheduler.type": "scheduler",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "megagpt.training.seed": "seed",
}

STYLE = """
:root { color-scheme: light; --ink: #1d2329; --faint: #6b7480; --line: #e3e6ea; --accent: #1f5fa8; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1080px;
       margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
.faint { color: var(--faint); margin: .2rem 0 1.5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem;
         margin: 0; }
.tiles div { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem; }
.tiles dt { color: var(--faint); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.plots img { width: 100%; } .plots img.wide { grid-column: 1 / -1; }
@media (max-width: 700px) { .plots { grid-template-columns: 1fr; } }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th { text-align: left; color: var(--faint); font-weight: 500; }
th, td { padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
         white-space: nowrap; }
td:last-child { width: 100%; white-space: normal; overflow-wrap: anywhere; }
pre { background: #f6f7f9; border-radius: 8px; padding: .8rem 1rem; white-space: pre-wrap;
      overflow-wrap: anywhere; font-size: .85rem; margin: .4rem 0 1rem; }
pre b { color: var(--accent); }
summary { cursor: pointer; color: var(--faint); }
"""


def write_report(run_directory: Path) -> Path:
    """Write `report.html` into a run directory and return its path; works during training.

    Raise UserError if the directory holds no logged step.
    """
    history = read_metrics(run_directory)
    if not history.steps:
        raise UserError(
            f"{run_directory}: no step is logged yet, so there is nothing to plot; run training "
            f"first"
        )
    path = run_directory / REPORT_FILE
    write_atomically(
        path, report_page(run_directory.resolve().name, history, _read_config(run_directory))
    )
    return path


def report_page(name: str, history: History, config: Line) -> str:
    """Return the page as text; `config` is the object in `config.json`, empty if there is none."""
    sections = [
        f"<h1>{_text(name)}</h1>",
        f'<p class="faint">{_text(_subtitle(history))}</p>',
        _tiles(history),
        _plots(history),
        _interruptions(history),
        _samples(history),
        _config_section(config),
        _events(history),
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{_text(name)}</title>'
    )
    body = "\n".join(sections)
    return (
        f"<!doctype html>\n<html "
        f'lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _read_config(run_directory: Path) -> Line:
    path = run_directory / CONFIG_FILE
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore it or move it away") from error
    return config if isinstance(config, dict) else {}


def _subtitle(history: History) -> str:
    text = (
        f"steps {history.steps[0].step} to {history.steps[-1].step}, {len(history.steps)} of "
        f"them logged"
    )
    if history.unreadable_lines:
        text += f"; {history.unreadable_lines} unreadable lines of metrics.jsonl left out"
    return text


def _tiles(history: History) -> str:
    """Return the run in a few numbers."""
    last = history.steps[-1]
    evaluations = [
        event["val_loss"]
        for event in history.events_named("eval")
        if event.get("val_loss") is not None
    ]
    supervised = history.events_named("supervise")
    reserved = [event["reserved_gib"] for event in history.events_named("memory")]
    utilisation = [record.mfu for record in history.steps if record.mfu is not None]
    numbers = {
        "step": f"{last.step:,}",
        "tokens": human_count(last.tokens),
        "last loss": f"{last.loss:.4f}",
        "best val loss": f"{min(evaluations):.4f}" if evaluations else None,
        "tokens/s, median": human_count(
            statistics.median(record.tokens_per_s for record in history.steps)
        ),
        "MFU, median": f"{100 * statistics.median(utilisation):.1f} %" if utilisation else None,
        "peak memory": f"{max(record.memory_gib for record in history.steps):.2f} GiB",
        "reserved memory": f"{max(reserved):.2f} GiB" if reserved else None,
        "time in steps": human_duration(history.time_in_steps_s()),
        "effective training time": f"{supervised[-1]['effective_training_time_ratio']:.1%}"
        if supervised
        else None,
        "skipped steps": str(last.skipped_steps) if last.skipped_steps else None,
    }
    tiles = (
        f"<div><dt>{label}</dt><dd>{value}</dd></div>"
        for label, value in numbers.items()
        if value is not None
    )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _plots(history: History) -> str:
    pictures = [_picture("loss", loss_picture(history), "wide")]
    if (named := named_losses_picture(history)) is not None:
        pictures.append(_picture(NAMED_LOSSES, named, "wide"))
    pictures += [_picture(title, svg, "") for title, svg in small_pictures(history)]
    return f'<h2>Curves</h2>\n<div class="plots">{"".join(pictures)}</div>'


def _picture(title: str, svg: bytes, style_class: str) -> str:
    # As an image, not inline: the identifiers inside one SVG would clash with those of the next.
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return f'<img class="{style_class}" alt="{_text(title)} over the steps" src="{source}">'


def _interruptions(history: History) -> str:
    """Return what `launch/supervise.py` recorded: restarts, and the share of time in training."""
    supervised = history.events_named("supervise")
    restarts = history.events_named("restart")
    if not supervised and not restarts:
        return ""
    rows = [
        (str(event["step"]), str(event["crashed_after_step"]), event["reason"])
        for event in restarts
    ]
    table = _rows(("resumed after step", "crashed after step", "reason"), rows) if rows else ""
    summary = "".join(f"<p>{_text(_effectiveness(event))}</p>" for event in supervised)
    return f"<h2>Interruptions</h2>\n{summary}{table}"


def _effectiveness(event: Line) -> str:
    return (
        f"Effective training time {event['effective_training_time_ratio']:.1%}: "
        f"{human_duration(event['productive_s'])} in steps that count of "
        f"{human_duration(event['wall_s'])}, {event['restarts']} restarts; {event['outcome']}"
    )


def _samples(history: History) -> str:
    samples = history.events_named("sample")[-NEWEST_SAMPLES:][::-1]
    if not samples:
        return ""
    entries = (
        "<div>step "
        f"{sample['step']}<pre><b>{_text(sample['prompt'])}</b>{_text(sample['text'])}</pre></div>"
        for sample in samples
    )
    return f"<h2>Samples, newest first</h2>\n{''.join(entries)}"


def _config_section(config: Line) -> str:
    if not config:
        return ""
    values = ((label, _lookup(config, key)) for key, label in SUMMARY_KEYS.items())
    rows = _rows(
        ("setting", "value"),
        ((label, _short(value)) for label, value in values if value is not None),
    )
    whole = _text(json.dumps(config, indent=2, ensure_ascii=False))
    return (
        f"<h2>Configuration</h2>\n{rows}\n<details><summary>the whole "
        f"config.json</summary><pre>{whole}</pre></details>"
    )


def _lookup(config: Line, dotted_key: str) -> Any:
    value: Any = config
    for key in dotted_key.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _events(history: History) -> str:
    events = [event for event in history.events if event["event"] != "sample"]
    if not events:
        return ""
    newest = events[-NEWEST_EVENTS:][::-1]
    title = "Events, newest first" + (
        f" ({len(newest)} of {len(events)})" if len(newest) < len(events) else ""
    )
    rows = ((str(event["step"]), event["event"], _details(event)) for event in newest)
    return f"<h2>{title}</h2>\n{_rows(('step', 'event', ''), rows)}"


def _details(event: Line) -> str:
    return ", ".join(
        f"{key} {_short(value)}" for key, value in event.items() if key not in ("event", "step")
    )


def _rows(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(text: object) -> str:
    """Return text for HTML: markup and control characters, which HTML forbids, are escaped."""
    return escape(without_control_characters(str(text)))
