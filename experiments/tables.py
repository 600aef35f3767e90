"""All tables and figures of section 5 on the built-in domains: trains what is missing, scores it, writes Markdown, JSON and PNG.

  python -m experiments.tables                                               everything, from three seeds; many hours on a laptop
  python -m experiments.tables --targets sunglasses --seeds 1 --parts tables figures
  python -m experiments.tables ...                                           the same command again goes on where it stopped; two at once
                                                                 may share --output-dir, but not runs

In runs/tables/ (--output-dir): TARGET/METHOD-SEED/ are the runs of train_tan.py with their score.json; results.json has every run that was ever
scored here, tables.md the tables, to which a command with other targets, methods or seeds adds;
samples-TARGET.png (Figures 3 and 4: every method from the same noises, toy FID beside each row), iterations-TARGET.png (toy FID against
iterations and against time) and figure1-TARGET.png (two noises through the stages of finetune).  The figures are toy ones (judge.py): they
compare with each other, at the same -n, and not with the paper's, which stand beside them.  The tables have the runs with the present -n, --steps
and settings, of all commands so far; the pictures have the methods of the last command.
"""

import dataclasses
import itertools
import json
import shutil
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import adaptor
import domains
import evaluate
import settings
from checkpoints import run_folder
from checkpoints.load import BUILT_IN, load_source
from domains import judge
from experiments import launch
from experiments.tables_report import (
    classifier_table,
    draw_figure1,
    draw_iterations,
    iterations_table,
    main_tables,
)
from plumbing import distributed
from plumbing.files import read_metrics, write_atomic
from plumbing.options import InputError, at_least, option, parse, run
from plumbing.pictures import save_grid, to_tensor
from settings import METHODS, suited

STAGES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 11)  # of the usual iterations; a TAN iteration takes eleven times the others' passes
SHOWN = 10  # samples a row


@dataclasses.dataclass
class Options:
    targets: tuple[str, ...] = option(tuple(domains.TARGETS), "built-in targets; the first is that of Table 3, Figure 1 and the curves", choices=list(domains.TARGETS))
    methods: tuple[str, ...] = option(tuple(METHODS), "; ".join(f"{name}: {text}" for name, text in METHODS.items()), choices=list(METHODS))
    seeds: tuple[int, ...] = option((1, 2, 3), "seeds of the runs")
    parts: tuple[str, ...] = option(("tables", "classifier", "iterations", "figures"), "tables: 1 and 2 and what the judge reads; classifier: Table 3, of guided "
                                    "and tan; iterations: FID against iterations, and Figure 1 of finetune; figures: 3 and 4, first seed",
                                    choices=["tables", "classifier", "iterations", "figures"])
    latent: bool = option(False, "adapt the latent source of each domain instead of the pixel one")
    n: int = option(100, "samples scored of each run; toy FID falls with their number, so tables compare at the same one", short="-n")
    steps: int = option(25, "DDIM steps")
    output_dir: str = option("runs/tables", "where everything goes; what is there is used")
    device: str = option("auto", "auto, cpu, cuda or mps")

    def source(self, target: str) -> str:
        return domains.TARGETS[target] + ("-latent" if self.latent else "")


def folder_of(options: Options, target: str) -> Path:
    return Path(options.output_dir) / (target + ("-latent" if options.latent else ""))


def run_of(options: Options, target: str, method: str, seed: int) -> Path:
    return launch.train(folder_of(options, target) / f"{method}-{seed}", options.device, target=target, source=options.source(target), method=method, seed=seed)


def score(options: Options, folder: Path, device: torch.device) -> dict:
    """evaluate.score_run, with the share of parameters that were trained and the seconds an iteration took (median)."""
    network, trained = run_folder.load_run(folder)
    rate = 1.0 if trained["method"] in run_folder.ALL_WEIGHTS else adaptor.parameter_rate(network.model)
    seconds = statistics.median(line["seconds"] for line in read_metrics(folder / "metrics.jsonl"))
    return evaluate.score_run(folder, options.n, options.steps, device) | dict(rate=rate, seconds=seconds, settings=launch.settings(trained))


def main_runs(options: Options, device: torch.device) -> Iterator[dict]:
    """The runs of Tables 1 and 2; with the two ends of the scale for each target: where adapting starts, and what it should come to."""
    jobs = [(target, method, seed) for seed in options.seeds for target in options.targets for method in options.methods]
    for job in tqdm(jobs, desc="runs"):
        yield score(options, run_of(options, *job), device)
    for target in options.targets:
        before = evaluate.source_samples(options.source(target), options.n, options.steps, device)
        fresh = to_tensor(domains.draw(target, options.n, 77, before.shape[2])[0])
        also = to_tensor(domains.draw(domains.TARGETS[target], options.n, 77, before.shape[2])[0])
        for method, scored in (("source model", judge.score(before, before, target)), ("fresh pictures", judge.score(fresh, also, target))):
            yield dict(run=dict(method=method, target=target) | evaluate.protocol(target, options.n, options.steps), score=scored)


def classifier_runs(options: Options, device: torch.device) -> Iterator[dict]:
    """The runs of Table 3: guided and tan with the classifier from the ten pictures and from a hundred, on the first target."""
    target = options.targets[0]
    place = folder_of(options, target)
    hundred = place.with_name(f"{place.name}-hundred")
    if not hundred.is_dir():
        part = hundred.with_name(hundred.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for i, pixels in enumerate(domains.draw(target, 100, 100, load_source(options.source(target)).image_size)[0]):
            Image.fromarray(pixels).save(part / f"{i:03d}.png")
        part.rename(hundred)
    jobs = [(method, seed) for seed in options.seeds for method in options.methods if method in ("guided", "tan")]
    for method, seed in tqdm(jobs, desc="classifiers"):
        ten = run_of(options, target, method, seed)
        more = launch.train(ten.with_name(f"{ten.name}-hundred"), options.device, target=target, source=options.source(target), method=method, seed=seed,
                     classifier_targets=str(hundred))
        for pictures, folder in (("10", ten), ("100", more)):
            scored = score(options, folder, device)
            yield scored | dict(run=scored["run"] | dict(pictures=pictures))


def iterations_runs(options: Options, device: torch.device) -> Iterator[dict]:
    """The runs of the curves of toy FID on the first target, which are drawn; Figure 1 from `finetune` with the first seed."""
    target, found = options.targets[0], []
    place, source = folder_of(options, target), load_source(options.source(target)).to(device)
    for seed, method in tqdm(list(itertools.product(options.seeds, options.methods)), desc="curves"):
        folders, flags = [], dict(target=target, source=options.source(target), method=method, seed=seed)
        usual = suited(settings.Options(**flags), source)["iterations"]
        stages = [round(usual * stage) for stage in STAGES if method != "tan" or stage <= 1]
        for stage in stages:
            folder = place.with_name(f"{target}-iterations{'-latent' if options.latent else ''}") / f"{method}-{seed}-at-{stage}"
            if folders and not folder.exists():  # each stage goes on from a copy of the one before
                part = folder.with_name(folder.name + ".part")
                shutil.rmtree(part, ignore_errors=True)
                shutil.copytree(folders[-1], part)
                part.rename(folder)
            folders.append(launch.train(folder, options.device, **flags, iterations=stage))
            scored = score(options, folder, device)
            found.append(scored | dict(run=scored["run"] | dict(stage=True)))
            yield found[-1]
        if method == "finetune" and seed == options.seeds[0]:
            models = [source, *(run_folder.load_run(folder)[0].to(device) for folder in folders)]
            draw_figure1(place.with_name(f"figure1-{place.name}.png"), target, [model.sample(range(2), options.steps) for model in models], [0, *stages])
    draw_iterations(place.with_name(f"iterations-{place.name}.png"), target, found)


def sample_figures(options: Options, device: torch.device) -> list[dict]:
    """Figures 3 and 4: training pictures, the source's samples, and every method's from the same noises, for each target (first seed).

    Returns no rows: these runs are those of main_runs.
    """
    for target in tqdm(options.targets, desc="pictures"):
        before = evaluate.source_samples(options.source(target), min(options.n, evaluate.PAIRED), options.steps, device)[:SHOWN]
        seeds = range(evaluate.FIRST_SEED, evaluate.FIRST_SEED + len(before))
        images, labels = [domains.target_images(target, before.shape[2])[:len(before)], before], ["training", "source"]
        for method in options.methods:
            folder = run_of(options, target, method, options.seeds[0])
            scored = score(options, folder, device)
            images.append(run_folder.load_run(folder)[0].to(device).sample(seeds, options.steps))
            labels.append(f"{method} {scored['score']['toy FID']:.2f}")
        place = folder_of(options, target)
        save_grid(place.with_name(f"samples-{place.name}.png"), torch.cat(images), columns=len(before), labels=labels)
    return []


# What each part trains, scores and draws, run by run, and the tables that come of it.
PARTS = {"tables": (main_runs, main_tables), "classifier": (classifier_runs, classifier_table),
         "iterations": (iterations_runs, iterations_table), "figures": (sample_figures, lambda found: [])}


def identity(found: dict) -> str:
    """What tells a run in results.json from the others."""
    return json.dumps([{name: value for name, value in found["run"].items() if name not in ("weights", "judge")}, found.get("settings")], sort_keys=True)


def current(found: dict, options: Options) -> bool:
    """Whether a run in results.json was trained and scored as it would be today."""
    run, trained = found["run"], found.get("settings")
    if not evaluate.protocol(run["target"], options.n, options.steps).items() <= run.items():
        return False
    if trained is None:
        return "seed" not in run  # the ends of the scale
    mine = ("target", "source", "method", "seed", *(("classifier_targets",) if run.get("pictures") else ()), *(("iterations",) if run.get("stage") else ()))
    return trained == launch.settings_today(**{name: trained.get(name) for name in mine})


def main() -> None:
    options, _ = parse(Options, description=__doc__)
    options = dataclasses.replace(options, **{name: tuple(dict.fromkeys(getattr(options, name))) for name in ("targets", "methods", "seeds", "parts")})
    at_least(options, n=2, steps=1)
    for target in options.targets:
        if options.source(target) not in BUILT_IN:
            raise InputError(f"--targets {target}: has no latent source; leave it or --latent out")
        if options.steps > (most := load_source(options.source(target)).schedule.timesteps):
            raise InputError(f"--steps {options.steps}: the model of {options.source(target)} has {most}")
    for name in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # a closed terminal, too, lets training save
        if signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, signal.default_int_handler)
    device, out = distributed.setup(options.device), Path(options.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    file = out / ("results-latent.json" if options.latent else "results.json")
    read = lambda: json.loads(file.read_text()) if file.exists() else {}
    note = (f"{options.n} samples of each run, DDIM in {options.steps} steps; mean ± standard deviation over seeds (their number; one where none is given); "
            "as many iterations for every method, of which one of tan costs about eleven of the others.")
    for part in options.parts:
        for found in PARTS[part][0](options, device):
            results = read()  # another command may have added to it meanwhile
            results[part] = list(({identity(f): f for f in results.get(part, [])} | {identity(found): found}).values())
            write_atomic(file, lambda temporary: temporary.write_text(json.dumps(results, indent=1)))
    results = read()
    texts = [text for part, (_, tables) in PARTS.items() if (alike := [f for f in results.get(part, []) if current(f, options)]) for text in tables(alike)]
    text = "\n\n".join([*texts, note])
    write_atomic(file.with_name(file.stem.replace("results", "tables") + ".md"), lambda temporary: temporary.write_text(text + "\n"))
    print(f"{text}\n\nall in {out}/")


if __name__ == "__main__":
    run(main)
