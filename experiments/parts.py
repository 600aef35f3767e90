"""The parts of experiments.tables: which runs each of them needs, trained and scored; and their pictures."""

import dataclasses
import functools
import itertools
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor

import adaptor
import domains
from baselines import gan_methods, gan_settings
from checkpoints.load import BUILT_IN, load_source
from checkpoints.run_folder import best_stage, load_run, read_options
from checkpoints.run_folder import stages as stages_of
from domains import judge
from experiments import launch, results
from experiments.results import Row
from experiments.tables_curves import draw_figure1, draw_iterations
from experiments.tables_report import ALL_METHODS, passes_of
from plumbing.files import read_metrics
from plumbing.options import short
from plumbing.pictures import save_grid, to_tensor
from plumbing.progress import bar
from settings import METHODS

STAGES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # of the usual iterations
# TAN without what was changed of the paper's, in turn and in all: flags of train_tan.py
VARIANTS = {"J = 10": dict(pgd_steps=10, omega=0.02), "Norm as printed": dict(norm="paper"),
            "constant gamma": dict(guidance_fade=0.0),
            "as printed": dict(pgd_steps=10, omega=0.02, norm="paper", guidance_fade=0.0)}
SHOWN = 10  # samples a row
PARTS = ("tables", "ablation", "passes", "forms", "hold-out", "classifier", "iterations", "figures")
HOLD_OUT = dict(hold_out=2, previews=8)


@dataclasses.dataclass
class Options:
    targets: tuple[Literal[tuple(domains.TARGETS)], ...] = tuple(domains.TARGETS)
    """Built-in targets; the first is that of Table 3, Figure 1 and the curves."""
    methods: Annotated[tuple[Literal[ALL_METHODS], ...], tyro.conf.arg(
        help="; ".join(f"{name}: {method.text} ({method.loss})" for name, method in METHODS.items())
             + "; GANs: "
             + "; ".join(f"{name}: {method.text}" for name, method in gan_methods.METHODS.items()) + ".",
    )] = ALL_METHODS
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs."""
    parts: tuple[Literal[PARTS], ...] = PARTS
    """tables: 1 and 2 and what the judge reads; ablation: TAN without each change; passes: the other methods
    with as many passes as TAN; forms: adaptors alone in each form of psi; hold-out: how well the held-out
    loss finds the best stage of a long run; classifier: Table 3; figures: 3 and 4, first seed; iterations:
    FID against iterations, and Figure 1 of finetune."""
    latent: bool = False
    """Adapt the latent source of each domain instead of the pixel one; GANs have none."""
    n: Annotated[int, short("-n")] = 100
    """Samples scored of each run; toy FID falls with their number, so tables compare at the same one."""
    steps: int = 25
    """DDIM steps."""
    output_dir: str = "runs/tables"
    """Where everything goes; what is there is used."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def source(self, target: str, method: str = "tan") -> str:
        """The source of a target: of pixels, with --latent of latents; for a GAN, a GAN."""
        if method in gan_methods.METHODS:
            return gan_settings.usual_source(target)
        return domains.TARGETS[target] + ("-latent" if self.latent else "")

    def has_source(self, target: str) -> bool:
        """Whether there is such a source of diffusion models."""
        return self.source(target) in BUILT_IN

    @property
    def diffusion_methods(self) -> list[str]:
        """Those of --methods that train_tan.py knows."""
        return [method for method in self.methods if method in METHODS]

    def sources(self, target: str) -> dict[str, str]:
        """What --methods adapt to a target, by what the tables call it."""
        return {"source GAN" if method in gan_methods.METHODS else "source model": self.source(target, method)
                for method in self.methods}

    @property
    def file(self) -> Path:
        """The file of all that was ever scored here."""
        return Path(self.output_dir) / f"results{'-latent' if self.latent else ''}.json"

    def place(self, target: str) -> Path:
        """The folder of a target's runs."""
        return Path(self.output_dir) / f"{target}{'-latent' if self.latent else ''}"

    def picture(self, kind: str, target: str) -> Path:
        """The file of one of a target's pictures."""
        place = self.place(target)
        return place.with_name(f"{kind}-{place.name}.png")


# ---- runs ------------------------------------------------------------------------------------------------

def run_of(options: Options, target: str, method: str, seed: int, label: str = "", **flags: Any) -> Path:
    """The run of this target, method and seed, trained if need be.

    label    its name where more flags of train_tan.py make it another run than the usual one
    """
    name = "-".join([method, str(seed), *label.replace("=", "").split()])
    return launch.train(options.place(target) / name, options.device, target=target,
                        source=options.source(target, method), method=method, seed=seed, **flags)


def score(options: Options, folder: Path, device: torch.device) -> Row:
    """judge.score_run, with the share of parameters that learnt and the median seconds of an iteration."""
    network, trained = load_run(folder)
    adapts = trained["method"] in METHODS and METHODS[trained["method"]].adaptors
    rate = adaptor.parameter_rate(network.model) if adapts else 1.0
    seconds = statistics.median(line["seconds"] for line in read_metrics(folder / "metrics.jsonl"))
    more = dict(rate=rate, seconds=seconds, settings=launch.relevant(trained))
    return judge.score_run(folder, options.n, options.steps, device) | more


def known(options: Options, settings: dict[str, Any] | None, **asked: Any) -> Row | None:
    """What results.json has of a run with these settings and iterations, target ..., scored as it would be
    now.

    settings   as `launch.relevant` gives them; None for an end of the scale
    """
    for row in itertools.chain.from_iterable(results.read(options.file).values()):
        if asked.items() <= row["run"].items() and results.scored_alike(row, options.n, options.steps):
            trained = row.get("settings")
            if (trained and launch.relevant(trained)) == settings:
                return row
    return None


def measured(options: Options, device: torch.device, target: str, method: str, seed: int, label: str = "",
             name: str = "", **flags: Any) -> Row:
    """The scored run of this target, method, seed and flags: as results.json has it, else trained now.

    label    what tables call it (default: the method);  name: of `run_of`
    """
    today = launch.relevant_today(target=target, source=options.source(target, method), method=method,
                                  seed=seed, **flags)
    found = known(options, today, iterations=today["iterations"])  # not a stage of a longer run
    found = found or score(options, run_of(options, target, method, seed, name, **flags), device)
    as_kept = {flag: today[flag] for flag in flags}
    return found | dict(run=dict(found["run"], label=label or method, flags=as_kept))


def fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, which gets its name when it is whole; nothing if it is there."""
    if folder.exists():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    part.rename(folder)


def main_runs(options: Options, device: torch.device) -> Iterator[Row]:
    """The runs of Tables 1 and 2, and the ends of the scale: where adapting starts, what it should reach."""
    jobs = list(itertools.product(options.seeds, options.targets, options.methods))
    for seed, target, method in bar(jobs, "runs"):
        yield measured(options, device, target, method, seed)
    for target in options.targets:
        for name, pictures in ends(options, target, device).items():
            how = judge.protocol(target, options.n, options.steps, options.sources(target).get(name))
            yield known(options, None, method=name, target=target) or dict(
                run=dict(method=name, target=target, **how), score=judge.score(*pictures(), target))


def ends(options: Options, target: str, device: torch.device) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The ends of a target's scale: what gives their pictures, and those of the source beside them."""
    def of_source(source: str) -> tuple[Tensor, ...]:
        drawn = judge.source_samples(source, options.n, options.steps, device)
        return drawn, drawn

    def fresh() -> tuple[Tensor, ...]:
        size = load_source(options.source(target)).image_size
        return tuple(to_tensor(domains.draw(domain, options.n, 77, size)[0])
                     for domain in (target, domains.TARGETS[target]))

    found = {name: functools.partial(of_source, source) for name, source in options.sources(target).items()}
    return found | {"fresh pictures": fresh}


def ablation_runs(options: Options, device: torch.device) -> Iterator[Row]:
    """TAN as it is by default, without each change of the paper's, and without adversarial noise."""
    jobs = list(itertools.product(options.seeds, options.targets, ["TAN", "no adversarial noise", *VARIANTS]))
    for seed, target, label in bar(jobs, "ablation"):
        flags = VARIANTS.get(label, {})
        method = "guided" if label == "no adversarial noise" else "tan"
        yield measured(options, device, target, method, seed, label, label if flags else "", **flags)


def passes_runs(options: Options, device: torch.device) -> Iterator[Row]:
    """TAN, and the other methods with as many passes through the network, 1 + J for each of TAN's one."""
    jobs = list(itertools.product(options.seeds, options.targets, options.diffusion_methods))
    for seed, target, method in bar(jobs, "passes"):
        usual = launch.relevant_today(target=target, source=options.source(target), method="tan")
        share = passes_of("tan", usual["pgd_steps"]) / passes_of(method, usual["pgd_steps"])
        flags = {} if method == "tan" else dict(iterations=round(usual["iterations"] * share))
        yield measured(options, device, target, method, seed, name="passes" if flags else "", **flags)


def forms_runs(options: Options, device: torch.device) -> Iterator[Row]:
    """Adaptors alone, in each form of psi."""
    jobs = list(itertools.product(options.seeds, options.targets, adaptor.FORMS))
    for seed, target, form in bar(jobs, "forms"):
        flags = {} if form == "bottleneck" else dict(adaptor=form)
        yield measured(options, device, target, "adaptor", seed, form, form if flags else "", **flags)


def hold_out_runs(options: Options, device: torch.device) -> Iterator[Row]:
    """Every stage of adaptors alone, four times as long as usual, with pictures kept from training."""
    for seed, target in bar(list(itertools.product(options.seeds, options.targets)), "hold-out"):
        usual = launch.relevant_today(target=target, source=options.source(target), method="adaptor")
        flags = dict(HOLD_OUT, iterations=4 * usual["iterations"])
        folder = run_of(options, target, "adaptor", seed, "hold-out", **flags)
        trained, records = launch.relevant(read_options(folder)), stages_of(folder)
        for record in records:
            found = judge.score_run(folder, options.n, options.steps, device, record["iteration"])
            more = dict(flags=flags, best_held_out=record["iteration"] == best_stage(records))
            yield found | dict(run=found["run"] | more, settings=trained)


def classifier_runs(options: Options, device: torch.device) -> Iterator[Row]:
    """The runs of Table 3 on the first target: its classifier from the ten pictures and from a hundred."""
    target = options.targets[0]
    hundred = options.place(target).with_name(f"{options.place(target).name}-hundred")

    def draw(folder: Path) -> None:
        pixels, _ = domains.draw(target, 100, 100, load_source(options.source(target)).image_size)
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).save(folder / f"{i:03d}.png")

    fill(hundred, draw)
    guided = [method for method in options.diffusion_methods if METHODS[method].guidance]
    for seed, method in bar(list(itertools.product(options.seeds, guided)), "classifiers"):
        more = dict(classifier_targets=str(hundred))
        for label, name, flags in (("10", "", {}), ("100", "hundred", more)):
            yield measured(options, device, target, method, seed, label, name, **flags)


def iterations_runs(options: Options, device: torch.device) -> Iterator[Row]:
    """The runs of the curves of toy FID, which are drawn, and Figure 1 from `finetune`: first target.

    Each number of iterations is a run of its own: gamma and the learning rate fall over its length.
    """
    target, found = options.targets[0], []
    usual = launch.relevant_today(target=target, source=options.source(target), method="tan")["iterations"]
    stages = [round(usual * stage) for stage in STAGES]
    for seed, method in bar(list(itertools.product(options.seeds, options.diffusion_methods)), "curves"):
        for n in stages:
            found.append(measured(options, device, target, method, seed, "", f"at-{n}", iterations=n))
            yield found[-1]
        if method == "finetune" and seed == options.seeds[0]:
            runs = [run_of(options, target, method, seed, f"at-{n}", iterations=n) for n in stages]
            models = [load_source(options.source(target)), *(load_run(folder)[0] for folder in runs)]
            drawn = [model.to(device).sample(range(2), options.steps) for model in models]
            draw_figure1(options.picture("figure1", target), target, drawn, [0, *stages])
    if found:
        draw_iterations(options.picture("iterations", target), target, found)


def sample_figures(options: Options, device: torch.device) -> list[Row]:
    """Figures 3 and 4: training pictures, the source's samples, every method's from the same noises.

    Of the first seed.  No rows: these runs are those of main_runs.
    """
    for target in bar(options.targets, "pictures"):
        n = min(options.n, judge.PAIRED)
        images, labels = [], ["training"]
        for name, source in options.sources(target).items():
            images.append(judge.source_samples(source, n, options.steps, device)[:SHOWN])
            labels.append(name)
        columns, size = len(images[0]), images[0].shape[2]
        images.insert(0, domains.target_images(target, size)[:columns])
        for method in options.methods:
            folder = run_of(options, target, method, options.seeds[0])
            model = load_run(folder)[0].to(device)
            images.append(model.sample(range(judge.FIRST_SEED, judge.FIRST_SEED + columns), options.steps))
            labels.append(f"{method} {score(options, folder, device)['score']['toy FID']:.2f}")
        save_grid(options.picture("samples", target), torch.cat(images), columns=columns, labels=labels)
    return []


# What each part trains, scores and draws, run by run.
WORK = {"tables": main_runs, "ablation": ablation_runs, "passes": passes_runs, "forms": forms_runs,
        "hold-out": hold_out_runs, "classifier": classifier_runs, "iterations": iterations_runs,
        "figures": sample_figures}
