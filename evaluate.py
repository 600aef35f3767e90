"""Score adapted models on the built-in domains, where a judge knows what is in each picture.

  python evaluate.py runs/sunglasses               score finished runs, one row each
  python evaluate.py --ablation --target sunglasses --seeds 1 2 3
                                                   train and score the four methods with each seed (resumes what is there)

Samples are drawn from the same noises through the source and the adapted model, and the judge (a network trained on
freshly drawn pictures, never used in training runs: pretrain.py --network judge) says of each pair
  target     the share of adapted samples that belong to the target domain
  hair, skin the share whose hair colour / skin agrees with the source sample from the same noise
Writes a table to the terminal and, with --ablation, to runs/ablation-TARGET/table.md and table.json.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import distributed
import domains
import run_folder
from checkpoints import ASSETS, Network, load_network, load_source
from options import InputError, at_least, option, parse, run
from train_tan import METHODS
from training import write_atomic

COLUMNS = ("target", "hair", "skin")


@dataclasses.dataclass
class Options:
    runs: tuple[str, ...] = option((), "folders of finished runs of a built-in source", positional=True)
    ablation: bool = option(False, "train the four methods first, then score them")
    target: str = option("sunglasses", "built-in target of the ablation", choices=list(domains.TARGETS))
    seeds: tuple[int, ...] = option((1, 2, 3), "seeds of the ablation")
    n: int = option(256, "samples to score from each run", short="-n")
    steps: int = option(50, "DDIM steps")
    device: str = option("auto", "auto, cpu, cuda or mps")


@torch.no_grad()
def judge_attributes(judge: Network, images: Tensor) -> dict[str, Tensor]:
    """What the judge sees: images (N, 3, H, W) -> {attribute: index of its most likely value (N,)}, "domain" among them."""
    attributes = judge.description["attributes"]
    t = torch.zeros(len(images), dtype=torch.long)
    logits = torch.cat([judge.model(x, s) for x, s in zip(images.split(128), t.split(128))])
    return {name: group.argmax(1) for name, group in zip(attributes, logits.split([len(v) for v in attributes.values()], dim=1))}


def score_run(folder: Path, options: Options, sources: dict[str, dict], device: torch.device) -> dict:
    """One run's shares.  `sources` keeps what the judge saw in each source's samples, the same for all its runs."""
    network, trained = run_folder.load_run(folder)
    if trained["source"] not in domains.SOURCES or trained["target"] not in domains.TARGETS:
        raise InputError(f"{folder}: from {trained['source']} to {trained['target']}; the judge knows built-in domains only")
    judge = load_network(ASSETS / f"{trained['source']}-judge.safetensors")
    # Noises that no picture of a run has shown, so that nobody has looked at them while choosing settings.
    seeds = range(20_000, 20_000 + options.n)

    def look(network: Network) -> dict[str, Tensor]:
        return judge_attributes(judge, network.to(device).sample(seeds, options.steps))

    if trained["source"] not in sources:
        sources[trained["source"]] = look(load_source(trained["source"]))
    before, after = sources[trained["source"]], look(network)
    share = lambda hits: hits.float().mean().item()
    return dict(method=trained["method"], target_domain=trained["target"], seed=trained["seed"],
                target=share(after["domain"] == judge.description["attributes"]["domain"].index(trained["target"])),
                hair=share(after["hair_colour"] == before["hair_colour"]), skin=share(after["skin"] == before["skin"]))


def train_ablation(options: Options) -> list[Path]:
    """The runs of every method and seed; those that are finished are left as they are, interrupted ones are resumed."""
    folders = []
    for seed in options.seeds:
        for method in METHODS:
            folder = Path(f"runs/ablation-{options.target}/{method}-{seed}")
            folders.append(folder)
            if (folder / "weights.safetensors").exists():
                continue
            command = [sys.executable, str(Path(__file__).with_name("train_tan.py")), "--output-dir", str(folder), "--device", options.device]
            command += ["--resume"] if (folder / "options.json").exists() else [
                "--target", options.target, "--method", method, "--seed", str(seed)]
            if subprocess.run(command).returncode or not (folder / "weights.safetensors").exists():
                raise InputError(f"{folder}: training stopped; run the same command again to continue")
    return folders


def table(rows: list[dict]) -> str:
    """Markdown: a line a method, mean and standard deviation over its runs."""
    lines = ["| method | runs | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in mine]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {method} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options, _ = parse(Options, description=__doc__)
    if bool(options.runs) == options.ablation:
        raise InputError("what to score: give either folders of runs, or --ablation")
    at_least(options, n=1)
    device = distributed.setup(options.device)
    folders = [Path(name) for name in options.runs] or train_ablation(options)
    sources, rows = {}, []
    for folder in folders:
        row = score_run(folder, options, sources, device)
        rows.append(row)
        print(f"{folder}: " + ", ".join(f"{column} {row[column]:.2f}" for column in COLUMNS), flush=True)
    text = table(rows)
    print(f"\n{options.n} samples from each run, DDIM in {options.steps} steps; mean and standard deviation over runs\n\n{text}")
    if options.ablation:
        out = Path(f"runs/ablation-{options.target}")
        write_atomic(out / "table.md", lambda temporary: temporary.write_text(text + "\n"))
        write_atomic(out / "table.json", lambda temporary: temporary.write_text(json.dumps(rows, indent=1)))


if __name__ == "__main__":
    run(main)
