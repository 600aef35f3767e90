"""Every method on folders of ten pictures each, from one source; scored by what folders alone can tell.

  python -m experiments.photographs few_shot/babies few_shot/sunglasses --reference eval/sunglasses \\
      --source runs/pretrain-faces/model.safetensors --lpips-backbone squeezenet1_1-features.pth

Each folder is a target and is called by its name.  --reference: more pictures of a target, which no run sees,
in a folder of the same name.

Intra-LPIPS is the mean over training pictures (section 5.2), nearest the median LPIPS of the samples to the
nearest training picture or its mirror image, both at the size of the source.  KID (times 1000) is to the
pictures of --reference, of the last features of LPIPS's backbone, averaged over pixels and with a mean square
of 1 over the reference: it compares with itself only, not with KID on Inception.  "source model": what
adapting starts from; "other pictures": those of --reference, the best there can be.

In runs/photographs/ (--output-dir): TARGET/METHOD-SEED/ are the runs with their photographs.json,
TARGET/source.json the figures of the source, photographs.md the tables, TARGET.png samples of every method
from the same noises.  The same command goes on where it stopped.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

import domains
from checkpoints.load import load_diffusion_model, pinned
from checkpoints.network import Network, digest, fingerprint
from checkpoints.perceptual import load_lpips, lpips_last_features, scorer
from checkpoints.run_folder import load_run
from domains import judge
from experiments import launch
from experiments.results import Row
from experiments.tables_report import difference_table, score_table
from plumbing import distributed
from plumbing.files import read_json, write_text
from plumbing.options import (
    InputError,
    Positional,
    Unset,
    at_least,
    check_seed,
    each_once,
    parse,
    replace,
    run,
    short,
)
from plumbing.picture_folder import ImageFolder, name_of
from plumbing.pictures import save_grid
from plumbing.progress import bar
from settings import METHODS

SHOWN = 10  # samples a row


@dataclasses.dataclass
class Options:
    targets: Positional[tuple[str, ...]]
    """Folders of training pictures."""
    source: str = "photofaces"
    """The diffusion model to adapt."""
    methods: tuple[Literal[tuple(METHODS)], ...] = tuple(METHODS)
    """As in train_tan.py."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs."""
    reference: tuple[str, ...] = ()
    """Folders of more pictures of targets, of the same names."""
    n: Annotated[int, short("-n")] = 250
    """Samples scored of each run."""
    steps: int = 25
    """DDIM steps."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "squeeze"
    """Backbone of LPIPS."""
    lpips_backbone: Unset[str] = None
    """Torchvision's weights for it: a file."""
    download: bool = False
    """Fetch missing weights from their publishers."""
    output_dir: str = "runs/photographs"
    """Where everything goes; what is there is used."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


def digest_of(pictures: ImageFolder) -> str:
    """A short hash of the pictures as they are seen."""
    return digest({"pictures": pictures.batch(range(len(pictures)))})


def features_of_size_1(lpips: torch.nn.Module, reference: ImageFolder) -> Callable[[ImageFolder], Tensor]:
    """Pictures -> what KID compares, (N, D), with a mean square of 1 over the reference.

    KID's kernel (ab / D + 1)^3 is made for features of about this size, as those of Inception are; those of
    LPIPS's backbones are far larger, and the cube would be all that is seen of them.
    """
    rms = lpips_last_features(lpips, reference).square().mean().sqrt()
    return lambda pictures: lpips_last_features(lpips, pictures) / rms


class Target:
    """A folder of training pictures, and of others if there are some; scores samples around them."""

    def __init__(self, folder: str, size: int, options: Options, lpips: torch.nn.Module):
        self.folder, self.name = folder, name_of(folder)
        self.pictures = ImageFolder(folder, size)
        others = [other for other in options.reference if name_of(other) == self.name]
        self.others = ImageFolder(others[0], size, recursive=True) if others else None
        if others and len(self.others) < 2:
            raise InputError(f"--reference {others[0]}: has one picture; KID needs at least two")
        self.digest_of_others = self.others and digest_of(self.others)
        self.keep_to_pictures(Path(options.output_dir) / self.name / "pictures.txt")
        features = features_of_size_1(lpips, self.others) if others else None
        self.scorer = scorer(lpips, self.pictures, size, features, self.others)

    def keep_to_pictures(self, file: Path) -> None:
        """InputError if the training pictures are not those of the runs beside this file."""
        found = digest_of(self.pictures)
        if file.exists() and file.read_text() != found:
            raise InputError(f"{self.folder}: the pictures have changed since the runs in {file.parent} "
                             "began; choose another --output-dir")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, found)

    def score(self, samples: Tensor | ImageFolder) -> dict[str, float]:
        """Intra-LPIPS and nearest, and KID (times 1000) if there are other pictures."""
        try:
            figures = self.scorer(samples)[1]
        except ValueError as error:
            raise InputError(f"{self.folder}: {len(samples)} samples cannot be scored ({error})") from None
        return figures | ({"KID": 1000 * figures["KID"]} if self.others else {})


def run_of(options: Options, target: Target, method: str, seed: int) -> Path:
    """The run of this method and seed, trained if need be."""
    return launch.train(Path(options.output_dir) / target.name / f"{method}-{seed}", options.device,
                        target=target.folder, source=options.source, method=method, seed=seed)


def scored(options: Options, target: Target, network: Network, file: Path,
           draw: Callable[[], Tensor]) -> dict[str, float]:
    """The figures of what `draw` gives, which are kept in this file: nothing is drawn if it has them."""
    how = dict(n=options.n, steps=options.steps, lpips=options.lpips_net, weights=fingerprint(network),
               others=target.digest_of_others)
    known = read_json(file)
    if known.get("how") != how:
        known = dict(how=how, score=target.score(draw()))
        write_text(file, json.dumps(known, indent=1))
    return known["score"]


def draw_pictures(options: Options, target: Target, source: Network, device: torch.device) -> None:
    """TARGET.png: training pictures, the source's samples and every method's of the first seed."""
    seeds = range(judge.FIRST_SEED, judge.FIRST_SEED + SHOWN)
    pictures = target.pictures.batch(torch.arange(min(SHOWN, len(target.pictures))))
    blank = torch.ones(SHOWN - len(pictures), *pictures.shape[1:])
    rows = [torch.cat([pictures, blank]), source.sample(seeds, options.steps)]
    for method in options.methods:
        network = load_run(run_of(options, target, method, options.seeds[0]))[0]
        rows.append(network.to(device).sample(seeds, options.steps))
    save_grid(Path(options.output_dir) / f"{target.name}.png", torch.cat(rows), columns=SHOWN,
              labels=["training", "source", *options.methods])


def tables(found: list[Row]) -> list[str]:
    """Two for each figure: what it is, and what it is less that of adaptors alone."""
    texts, paired = [], ("less that of adaptors alone with the same target and seed, mean ± standard error "
                         "over seeds; all: over the targets' means")
    for name, meaning, sign in (("Intra-LPIPS", "higher is more diverse", 1), ("KID", "lower is better", -1),
                                ("nearest", "near 0 are copies", 1)):
        if rows := [row for row in found if name in row["score"]]:
            texts += [score_table(rows, name, f"{name} ({meaning})"),
                      difference_table(rows, name, f"{name}, {paired}", "adaptor", sign)]
    return [text for text in texts if text]


def main() -> None:
    options, _ = parse(Options, __doc__)
    options = each_once(options, "methods", "seeds")
    at_least(options, n=2, steps=1)
    check_seed(options)
    if not (options.targets and options.methods and options.seeds):
        raise InputError("give at least one folder, one of --methods and one of --seeds")
    for name in sorted({*options.targets} & {*domains.TARGETS}):
        raise InputError(f"{name}: is a built-in target, too; give ./{name}")
    names = [name_of(folder) for folder in options.targets]
    if len({*names}) < len(names):
        raise InputError(f"{', '.join(options.targets)}: two targets of the same name; rename a folder")
    for folder in options.reference:
        if name_of(folder) not in names or [*map(name_of, options.reference)].count(name_of(folder)) > 1:
            raise InputError(f"--reference {folder}: give one folder of a target's name, {', '.join(names)}")
    launch.heed_signals()
    device = distributed.setup_alone(options.device, "experiments.photographs")
    options = replace(options, source=pinned(options.source))
    source = load_diffusion_model(options.source).to(device)
    source.check_steps(options.steps)
    lpips = load_lpips(options.lpips_net, options.lpips_backbone, options.download).to(device)
    targets = [Target(folder, source.image_size, options, lpips) for folder in options.targets]
    found = []
    for target in targets:
        score = scored(options, target, source, Path(options.output_dir) / target.name / "source.json",
                       functools.partial(judge.source_samples, options.source, options.n, options.steps,
                                         device))
        found.append(dict(run=dict(method="source model", target=target.name), score=score))
        if target.others:
            score = target.score(target.others)
            del score["KID"]  # it is to these very pictures
            found.append(dict(run=dict(method="other pictures", target=target.name), score=score))
    jobs = list(itertools.product(options.seeds, targets, options.methods))
    for seed, target, method in bar(jobs, "runs"):
        folder = run_of(options, target, method, seed)
        network = load_run(folder)[0].to(device)
        score = scored(options, target, network, folder / "photographs.json",
                       functools.partial(judge.draw, network, options.n, options.steps, str(folder)))
        found.append(dict(run=dict(method=method, target=target.name, seed=seed), score=score))
    for target in bar(targets, "pictures"):
        draw_pictures(options, target, source, device)
    size = f"{source.image_size}x{source.image_size}"
    how = (f"LPIPS-{options.lpips_net} at {size}; {options.n} samples of each "
           f"run, DDIM in {options.steps} steps; mean ± standard deviation over seeds (their number).")
    text = "\n\n".join([*tables(found), how])
    write_text(Path(options.output_dir) / "photographs.md", text + "\n")
    print(f"{text}\n\nall in {options.output_dir}/")


if __name__ == "__main__":
    run(main)
