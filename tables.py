"""All tables and figures of section 5 on the built-in domains: trains what is missing, scores it, writes Markdown, JSON and PNG.

  python tables.py                                               everything, from three seeds; many hours on a laptop
  python tables.py --targets sunglasses --seeds 1 --parts tables figures
  python tables.py ...                                           the same command again goes on where it stopped

In runs/tables/ (--output-dir): TARGET/METHOD-SEED/ are the runs of train_tan.py with their score.json; tables.md and results.json;
samples-TARGET.png (Figures 3 and 4: every method from the same noises, toy FID beside each row), iterations.png (toy FID against iterations
and against time) and figure1.png (two noises through the stages of finetune).  The figures are toy ones (judge.py): they compare with each
other, not with the paper's, which stand beside them.
"""

import dataclasses
import functools
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from tqdm import tqdm

import adaptor
import data
import distributed
import domains
import evaluate
import judge
import run_folder
from checkpoints import BUILT_IN, load_source
from metrics import squared_distances
from options import InputError, at_least, option, parse, run
from pictures import save_figure, save_grid
from train_tan import METHODS
from training import read_metrics, write_atomic

# What the paper has on photographs, for DDPM-TAN, LMD-TAN (Table 1 only) and DDPM-PA.
PAPER_INTRA = {"babies": (0.592, 0.601, 0.599), "sunglasses": (0.613, 0.613, 0.604), "raphael": (0.621, 0.592, 0.581),
               "haunted-houses": (0.648, 0.653, 0.628), "landscape-drawings": (0.723, 0.738, 0.706)}
PAPER_FID = {"babies": (46.70, None, 48.92), "sunglasses": (20.06, None, 34.75)}
PAPER_CLASSIFIER = {"10": (0.621, 20.06), "100": (0.637, 22.84)}  # Table 3
STAGES = (10, 20, 40, 80, 160, 320, 880)  # iterations; 880 take the others as many passes as 80 take TAN
SHOWN = 10  # samples a row


@dataclasses.dataclass
class Options:
    targets: tuple[str, ...] = option(tuple(domains.TARGETS), "built-in targets; the first is that of Table 3 and Figure 1", choices=list(domains.TARGETS))
    methods: tuple[str, ...] = option(tuple(METHODS), "methods", choices=list(METHODS))
    seeds: tuple[int, ...] = option((1, 2, 3), "seeds of the runs")
    parts: tuple[str, ...] = option(("tables", "classifier", "iterations", "figures"), "tables: 1 and 2 and what the judge reads; classifier: Table 3; "
                                    "iterations: FID against iterations, and Figure 1; figures: 3 and 4",
                                    choices=["tables", "classifier", "iterations", "figures"])
    latent: bool = option(False, "adapt the latent source of each domain instead of the pixel one")
    n: int = option(250, "samples scored of each run", short="-n")
    steps: int = option(25, "DDIM steps")
    output_dir: str = option("runs/tables", "where everything goes; what is there is used")
    device: str = option("auto", "auto, cpu, cuda or mps")

    def source(self, target: str) -> str:
        return domains.TARGETS[target] + ("-latent" if self.latent else "")


def train(folder: Path, device: str, **flags) -> Path:
    """A finished run of train_tan.py with these options in `folder`; what is there is resumed or left alone.  Returns the folder.

    The output goes to train.log.  Raises InputError if the run stops.
    """
    known = json.loads((folder / "options.json").read_text()) if (folder / "options.json").exists() else None
    iterations = flags.get("iterations")
    if known and (folder / "weights.safetensors").exists() and iterations in (None, known["iterations"]):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--output-dir", folder, "--device", device]
    arguments += ["--resume"] if known else [text for name, value in flags.items() if name != "iterations" for text in (f"--{name.replace('_', '-')}", value)]
    arguments += ["--iterations", iterations] if iterations else []
    if not known:
        arguments += ["--samples", 0, "--no-classifier-check"]  # pictures are drawn here, the classifier's accuracy is not asked for
    with open(folder / "train.log", "a") as log:
        done = subprocess.run([sys.executable, str(Path(__file__).with_name("train_tan.py")), *map(str, arguments)], stdout=log, stderr=log)
    if done.returncode or not (folder / "weights.safetensors").exists():
        raise InputError(f"{folder}: training stopped (see {folder}/train.log); run the same command again to continue")
    return folder


def run_of(options: Options, target: str, method: str, seed: int) -> Path:
    folder = Path(options.output_dir) / (target + ("-latent" if options.latent else "")) / f"{method}-{seed}"
    return train(folder, options.device, target=target, source=options.source(target), method=method, seed=seed)


def score(options: Options, folder: Path, device: torch.device) -> dict:
    """evaluate.score_run, with the share of parameters that were trained and the seconds that it took (the classifier's left out)."""
    network, trained = run_folder.load_run(folder)
    rate = 1.0 if trained["method"] in run_folder.ALL_WEIGHTS else adaptor.parameter_rate(network.model)
    seconds = sum(line["seconds"] for line in read_metrics(folder / "metrics.jsonl"))
    return evaluate.score_run(folder, options.n, options.steps, device) | dict(rate=rate, seconds=seconds)


def mean_std(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([title, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)])


def main_tables(options: Options, device: torch.device) -> tuple[list[str], list[dict]]:
    """Tables 1 and 2 and what the judge reads: a row a method, a column a target, mean and standard deviation over seeds."""
    jobs = [(target, method, seed) for seed in options.seeds for target in options.targets for method in options.methods]
    found = [score(options, run_of(options, *job), device) for job in tqdm(jobs, desc="runs")]
    for target in options.targets:  # where adapting starts, and what it should come to
        before = evaluate.source_samples(options.source(target), options.n, options.steps, device)
        fresh = data.to_tensor(domains.draw(target, options.n, 77, before.shape[2])[0])
        also = data.to_tensor(domains.draw(domains.TARGETS[target], options.n, 77, before.shape[2])[0])
        for method, scored in (("source model", judge.score(before, before, target)), ("fresh pictures", judge.score(fresh, also, target))):
            found.append(dict(run=dict(method=method, target=target), score=scored, rate=None))
    methods = ["source model", *options.methods, "fresh pictures"]

    def table(name: str, title: str, digits: int = 3, paper: dict | None = None) -> str:
        rows = []
        for method in methods:
            mine = [f for f in found if f["run"]["method"] == method]
            rates = sorted({f"{f['rate']:.1%}" for f in mine if f["rate"] is not None})
            rows.append([method, " / ".join(rates), *(mean_std([f["score"][name] for f in mine if f["run"]["target"] == t]) for t in options.targets)])
        for i, (method, rate) in enumerate((("TAN", "1.3%"), ("LMD-TAN", "1.6%"), ("DDPM-PA", "100%"))):
            numbers = [paper[t][i] if paper and t in paper else None for t in options.targets]
            if any(numbers):
                rows.append([f"paper, photographs: {method}", rate, *("" if x is None else f"{x:.{digits}f}" for x in numbers)])
        return markdown(title, ["method", "parameter rate", *options.targets], rows)

    seconds = [[method, *(f"{statistics.mean([f['seconds'] for f in found if (f['run']['method'], f['run']['target']) == (method, t)]):.0f}"
                          for t in options.targets)] for method in options.methods]
    return [table("toy Intra-LPIPS", "Table 1, toy Intra-LPIPS (higher is more diverse)", 3, PAPER_INTRA),
            table("toy FID", "Table 2, toy FID (lower is better)", 2, PAPER_FID),
            table("target", "Share of samples in the target domain"),
            table("kept", "Share of attributes as in the source model's sample from the same noise"),
            table("covered", "Share of attribute values that appear"),
            table("memorised", "Distance to the nearest training picture over that of fresh pictures"),
            markdown("Seconds of training, classifier left out", ["method", *options.targets], seconds)], found


def classifier_table(options: Options, device: torch.device) -> tuple[list[str], list[dict]]:
    """Table 3: the classifier from the ten pictures and from a hundred, on the first target."""
    target, found = options.targets[0], []
    hundred = Path(options.output_dir) / f"{target}-hundred"
    if not hundred.is_dir():
        part = hundred.with_name(hundred.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for i, pixels in enumerate(domains.draw(target, 100, 100, load_source(options.source(target)).image_size)[0]):
            Image.fromarray(pixels).save(part / f"{i:03d}.png")
        part.rename(hundred)
    for seed in options.seeds:
        for method in ("guided", "tan"):
            ten = run_of(options, target, method, seed)
            folder = train(ten.with_name(f"{ten.name}-hundred"), options.device, target=target, source=options.source(target), method=method, seed=seed,
                           classifier_targets=hundred)
            found += [score(options, place, device) | dict(pictures=pictures) for pictures, place in (("10", ten), ("100", folder))]
    names = ("toy Intra-LPIPS", "toy FID", "target", "kept")
    rows = [[method, pictures, *(mean_std([f["score"][name] for f in found if (f["run"]["method"], f["pictures"]) == (method, pictures)]) for name in names)]
            for method in ("guided", "tan") for pictures in ("10", "100")]
    rows += [["paper, photographs: TAN", pictures, f"{intra:.3f}", f"{fid:.2f}", "", ""] for pictures, (intra, fid) in PAPER_CLASSIFIER.items()]
    return [markdown(f"Table 3, classifier from 10 and from 100 pictures ({target})", ["method", "pictures", *names], rows)], found


def iterations_figure(options: Options, device: torch.device) -> tuple[list[str], list[dict]]:
    """Toy FID against iterations and against training time, for the first target and seed; Figure 1 from `finetune`."""
    target, seed, found, stages = options.targets[0], options.seeds[0], [], []
    out, source = Path(options.output_dir), load_source(options.source(target)).to(device)
    for method in tqdm(options.methods, desc="methods"):
        previous = None
        for stage in STAGES if method != "tan" else [s for s in STAGES if s * 11 <= STAGES[-1]]:
            folder = out / f"{target}-iterations{'-latent' if options.latent else ''}" / f"{method}-{seed}-at-{stage}"
            if previous and not folder.exists():  # each stage goes on from a copy of the one before
                part = folder.with_name(folder.name + ".part")
                shutil.rmtree(part, ignore_errors=True)
                shutil.copytree(previous, part)
                part.rename(folder)
            previous = train(folder, options.device, target=target, source=options.source(target), method=method, seed=seed, iterations=stage)
            found.append(score(options, folder, device))
            if method == "finetune":
                stages.append(run_folder.load_run(folder)[0].to(device).sample(range(2), options.steps))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for method in options.methods:
        mine = [f for f in found if f["run"]["method"] == method]
        for ax, x in zip(axes, ([f["run"]["iterations"] for f in mine], [f["seconds"] for f in mine])):
            ax.plot(x, [f["score"]["toy FID"] for f in mine], marker="o", markersize=4, label=method)
    for ax, label in zip(axes, ("iterations", "seconds of training on this machine, classifier left out")):
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"toy FID, {target}")
    axes[1].legend(frameon=False)
    save_figure(out / "iterations.png", figure)
    if stages:
        draw_figure1(out / "figure1.png", target, [source.sample(range(2), options.steps), *stages], [0, *STAGES])
    return [], found


def draw_figure1(path: Path, target: str, stages: list[torch.Tensor], iterations: list[int]) -> None:
    """Each picture of two noises (2, 3, H, W) at each stage, with its distance to the nearest training picture, as in the paper's Figure 1."""
    network = judge.load_judge(domains.TARGETS[target])
    embed = functools.partial(judge.perceptual_features, network)
    centres = list(embed(judge.reference(target, stages[0].shape[2]).shots))
    figure, axes = plt.subplots(2, len(iterations), figsize=(1.35 * len(iterations), 3.2), layout="constrained")
    for column, (pictures, i) in enumerate(zip(stages, iterations)):
        for ax, pixels, feature in zip(axes[:, column], data.to_uint8(pictures), embed(pictures)):
            ax.imshow(pixels.numpy())
            ax.set(xticks=[], yticks=[], xlabel=f"{squared_distances(feature, centres).min():.2f}")
        axes[0, column].set_title(f"{i}", fontsize=10)
    figure.suptitle("iterations of finetune; below each picture its toy LPIPS to the nearest training picture", fontsize=10)
    save_figure(path, figure)


def sample_figures(options: Options, device: torch.device) -> tuple[list[str], list[dict]]:
    """Figures 3 and 4: training pictures, the source's samples, and every method's from the same noises, for each target (first seed)."""
    found = []
    for target in options.targets:
        before = evaluate.source_samples(options.source(target), options.n, options.steps, device)[:SHOWN]
        seeds = range(evaluate.FIRST_SEED, evaluate.FIRST_SEED + len(before))
        images, labels = [data.target_images(target, before.shape[2])[:len(before)], before], ["training", "source"]
        for method in options.methods:
            folder = run_of(options, target, method, options.seeds[0])
            found.append(score(options, folder, device))
            images.append(run_folder.load_run(folder)[0].to(device).sample(seeds, options.steps))
            labels.append(f"{method} {found[-1]['score']['toy FID']:.2f}")
        name = f"samples-{target}{'-latent' if options.latent else ''}.png"
        save_grid(Path(options.output_dir) / name, torch.cat(images), columns=len(before), labels=labels)
    return [], found


PARTS = {"tables": main_tables, "classifier": classifier_table, "iterations": iterations_figure, "figures": sample_figures}


def main() -> None:
    options, _ = parse(Options, description=__doc__)
    at_least(options, n=2, steps=1)
    for target in options.targets:
        if options.source(target) not in BUILT_IN:
            raise InputError(f"--targets {target}: has no latent source; leave it or --latent out")
    device, out = distributed.setup(options.device), Path(options.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    file = out / ("results-latent.json" if options.latent else "results.json")
    results = json.loads(file.read_text()) if file.exists() else {}
    note = (f"{options.n} samples of each run, DDIM in {options.steps} steps; mean ± standard deviation over seeds "
            f"{' '.join(map(str, options.seeds))}; as many iterations for every method, of which one of tan costs about eleven of the others.")
    for part in options.parts:
        texts, runs = PARTS[part](options, device)
        results[part] = dict(text="\n\n".join([*texts, note]) if texts else "", runs=runs)
        write_atomic(file, lambda temporary: temporary.write_text(json.dumps(results, indent=1)))
        text = "\n\n".join(results[name]["text"] for name in PARTS if results.get(name, {}).get("text"))
        write_atomic(file.with_name(file.stem.replace("results", "tables") + ".md"), lambda temporary: temporary.write_text(text + "\n"))
    print(f"{text}\n\nall in {out}/")


if __name__ == "__main__":
    run(main)
