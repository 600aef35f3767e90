"""report.html: a run on one page that opens from disk, with all its pictures in the file."""

import base64
import html
import json
import statistics
import string
from pathlib import Path
from typing import Any

from checkpoints.load import title_of
from checkpoints.run_folder import best_stage, stages
from domains import judge
from plumbing.files import read_metrics, write_atomic
from plumbing.options import flag
from plumbing.picture_folder import name_of
from plumbing.shell import quoted

TEMPLATE = Path(__file__).with_name("run_page.html")
# What metrics.jsonl has that is worth a curve, and what it is.
CURVES = {"loss": "loss", "discriminator_loss": "loss of the discriminator",
          "gradient_norm": "norm of the gradient", "pgd_gain": "gain of the adversarial noise",
          "learning_rate": "learning rate"}
SLIDER = """
const rows = $rows, picture = document.getElementById("stage"), said = document.getElementById("said");
function show(i) { picture.src = rows[i][1]; said.textContent = rows[i][0]; }
document.getElementById("slider").addEventListener("input", event => show(event.target.value));
show(rows.length - 1);
"""


def write_page(out: Path, options: dict[str, Any], command: str) -> None:
    """report.html of the run in `out`, as far as it has come.

    options   of the run, flat
    command   that makes it again
    """
    metrics, kept = read_metrics(out / "metrics.jsonl"), stages(out)
    target, source = name_of(options["target"]), title_of(options["source"])
    seconds = sum(line["seconds"] for line in metrics)
    page = string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{source} to {target}, {options['method']}"),
        summary=html.escape(f"{len(metrics)} of {options['iterations']} iterations in {seconds / 60:.1f} "
                            f"minutes, seed {options['seed']}"),
        stages=_slider(out, kept), targets=_picture(out / "targets.png", "training pictures"),
        pairs=_pairs(out), curves="\n".join(_curve(metrics, name) for name in CURVES),
        next=_next(out, kept, options),
        command=html.escape(command),
        settings="\n".join(f"<tr><td>{flag(name)}<td>{html.escape(json.dumps(value))}"
                           for name, value in options.items()))
    # Names may be no UTF-8.
    content = page.encode("utf-8", "backslashreplace")
    write_atomic(out / "report.html", lambda temporary: temporary.write_bytes(content))


def _data(path: Path) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _picture(path: Path, what: str) -> str:
    return f'<div class=wide><img src="{_data(path)}" alt="{what}"></div>' if path.exists() else ""


def _pairs(out: Path) -> str:
    if not (out / "samples.png").exists():
        return ""
    return ("<h2>Pairs</h2><p class=faint>The same noise through the source model (upper row of each pair) "
            "and through this one.</p>" + _picture(out / "samples.png", "pairs of rows"))


def _slider(out: Path, kept: list[dict[str, Any]]) -> str:
    """The source's pictures and, below, those of the stage that a slider chooses; nothing without
    pictures."""
    rows = []
    for record in kept:
        file = out / "progress" / f"{record['iteration']:06d}.png"
        if file.exists():
            said = f"after {record['iteration']} iterations"
            if record["nearest"] is not None:
                said += f", {record['nearest']:.2f} from the nearest training picture"
            rows.append([said, _data(file)])
    if not rows:
        return ""
    script = string.Template(SLIDER).substitute(rows=json.dumps(rows))
    return ("<h2>Stages</h2><div class=wide><span>the source model</span>"
            f'<img src="{rows[0][1]}" alt="source">'
            f'<span id=said></span><img id=stage alt="stage"></div>'
            f'<input id=slider type=range min=0 max={len(rows) - 1} value={len(rows) - 1} aria-label="stage">'
            "<p class=faint>The same eight noises at each stage; python sample.py --at draws "
            f"more.</p><script>{script}</script>")


def _curve(metrics: list[dict[str, Any]], name: str) -> str:
    """A figure of one measurement against iterations, averaged over a twentieth of the run; "" if it was not
    made."""
    values = [line[name] for line in metrics if line.get(name) is not None]
    if len(values) < 2:
        return ""
    width = max(1, len(values) // 20)
    smooth = [statistics.fmean(values[max(0, i - width + 1):i + 1]) for i in range(len(values))]
    low, high = min(smooth), max(smooth)
    across, up = 280 / (len(smooth) - 1), 80 / ((high - low) or 1)
    points = " ".join(f"{10 + across * i:.1f},{105 - up * (y - low):.1f}" for i, y in enumerate(smooth))
    return (f'<figure><svg viewBox="0 0 300 130"><polyline points="{points}"/>'
            f'<text x="10" y="17">{high:.3g}</text>'
            f'<text x="10" y="120">{low:.3g}</text>'
            f'<text x="290" y="120" text-anchor="end">{len(values)} iterations</text></svg>'
            f"<figcaption>{CURVES[name]}</figcaption></figure>")


def _next(out: Path, kept: list[dict[str, Any]], options: dict[str, Any]) -> str:
    place, fetch = quoted(out), "" if judge.knows(options) else " --download"
    lines = [f"python sample.py {place} -n 64", f"python evaluate.py {place} --at all -n 100{fetch}"]
    if "arch" in options:  # a GAN is not exported
        lines.append(f"python -m checkpoints.export {place} DIR")
    if (best := best_stage(kept)) is not None:
        lines.insert(1, f"python sample.py {place} --at {best}    # where the held-out loss is lowest")
    return "<pre>" + html.escape("\n".join(lines)) + "</pre>"
