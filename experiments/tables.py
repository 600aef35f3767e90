"""The tables and figures of sections 5.2 to 5.4 on the built-in domains: trained, scored and drawn.

  python -m experiments.tables              everything, from three seeds; many hours on a laptop
  python -m experiments.tables --targets sunglasses --seeds 1 --parts tables figures
  python -m experiments.tables ...          the same command again goes on where it stopped; two at once may
                                            share --output-dir, but not runs

In runs/tables/ (--output-dir): TARGET/METHOD-SEED/ are the runs with their score.json;
results.json has every run that was ever scored here, and what it has is not trained again, except for
pictures, hold-out and Figure 1, which need the runs themselves; tables.md has the tables, to which a command
with other targets, methods or seeds adds; samples-TARGET.png (Figures 3 and 4: every method from the same
noises, toy FID beside each row), iterations-TARGET.png (toy FID against iterations and against time) and
figure1-TARGET.png (two noises after more and more iterations of finetune).

The figures are toy ones (domains/judge.py): they compare with each other, at the same -n, and not with the
paper's, which stand beside them.  The tables have the runs with the present -n, --steps and settings, of all
commands so far; the pictures have the methods of the last command.
"""

from pathlib import Path

from domains import judge
from experiments import launch, results
from experiments.parts import WORK, Options
from experiments.tables_report import (
    ablation_tables,
    classifier_table,
    forms_tables,
    hold_out_table,
    iterations_table,
    main_tables,
    passes_tables,
)
from plumbing import distributed
from plumbing.files import write_text
from plumbing.options import InputError, at_least, check_seed, each_once, parse, replace, run

# The tables that come of each part.
TABLES = {"tables": main_tables, "ablation": ablation_tables, "passes": passes_tables, "forms": forms_tables,
          "hold-out": hold_out_table, "classifier": classifier_table, "iterations": iterations_table}


def check(options: Options) -> None:
    """InputError for numbers that make no sense and for targets that have no such source."""
    at_least(options, n=2, steps=1)
    check_seed(options)
    for name in ("targets", "methods", "seeds", "parts"):
        if not getattr(options, name):
            raise InputError(f"--{name}: give at least one"
                             + " (GANs have no latent source)" * (name == "methods" and options.latent))
    for target in options.targets:
        if not options.has_source(target):
            raise InputError(f"--targets {target}: has no latent source; leave it or --latent out")
        judge.need_seen(target)
    for source in map(options.source, options.targets):
        launch.known_source(source).check_steps(options.steps)


def main() -> None:
    options, typed = parse(Options, __doc__)
    options = each_once(options, "targets", "methods", "seeds", "parts")
    if options.latent:
        options = replace(options, methods=tuple(options.diffusion_methods))
    if "targets" not in typed:
        options = replace(options, targets=tuple(filter(options.has_source, options.targets)))
    check(options)
    launch.heed_signals()
    device = distributed.setup_alone(options.device, "experiments.tables")
    out = Path(options.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        for found in WORK[part](options, device):
            results.add(options.file, part, found)
    texts = []
    for part, make in TABLES.items():
        found = results.read(options.file).get(part, [])
        if alike := [row for row in found if results.current(row, options.n, options.steps)]:
            texts += make(alike)
    texts.append(f"{options.n} samples of each run, of diffusion models DDIM in {options.steps} steps; mean "
                 "± standard deviation over seeds (their number; one where none is given).")
    text = "\n\n".join(texts)
    tables = out / options.file.with_suffix(".md").name.replace("results", "tables")
    write_text(tables, text + "\n")
    print(f"{text}\n\nall in {out}/")


if __name__ == "__main__":
    run(main)
