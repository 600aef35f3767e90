"""The commands that README and docs print: each is read by its own program, and those of train_tan.py are accepted."""

import re
import shlex
from types import SimpleNamespace

import pytest
from conftest import ROOT

import evaluate
import pretrain
import sample
import settings
import toy2d
from baselines import gan_settings
from checkpoints import __main__ as checkpoints_main
from checkpoints import export
from domains import __main__ as domains_main
from experiments import (
    ascent,
    benchmark,
    kills,
    malformed,
    photographs,
    reconstruction,
    tables,
    toy2d_measured,
)
from plumbing.options import parse, replace

PROGRAMS = {"train_tan.py": settings, "pretrain.py": pretrain, "sample.py": sample, "evaluate.py": evaluate, "toy2d.py": toy2d,
            "baselines.gan_transfer": gan_settings, "checkpoints": checkpoints_main, "checkpoints.export": export, "domains": domains_main,
            "experiments.ascent": ascent, "experiments.benchmark": benchmark, "experiments.kills": kills, "experiments.malformed": malformed,
            "experiments.photographs": photographs, "experiments.reconstruction": reconstruction, "experiments.tables": tables, "experiments.toy2d_measured": toy2d_measured}
SMALL = ("toyfaces-latent", "photofaces", "runs/pretrain-many_photos/model.safetensors")  # 64x64
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def commands(page):
    """The words after the program's name, with that, of each command in a block of sh."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            name = next((word for word in words if word in PROGRAMS), None)
            if name and "..." not in words:  # others only hint at what comes before
                rest = words[words.index(name) + 1:]
                found.append((name, rest[:rest.index("&")] if "&" in rest else rest))
    return found


def size_of(source):
    """Pixels of a source that the pages name."""
    return 32 if source in ("toyfaces", "toychurches") else 64 if source in SMALL else 256


def accepted(options, typed):
    """The options as train_tan.py fills and checks them; InputError if it refuses them."""
    options = replace(options, source=options.source or settings.usual_source(options.target))
    size = size_of(options.source)
    source = SimpleNamespace(image_size=size, small=size <= 64, first_stage=None, check_steps=lambda steps, flag: None)
    options = settings.suited(options, source)
    settings.check(options, typed, source)
    return options


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_right(page):
    for name, words in commands(page):
        options, typed = parse(PROGRAMS[name].Options, "", words)
        if name == "train_tan.py":
            accepted(options, typed)


def test_there_are_commands_on_the_pages():
    assert len(commands("README.md")) >= 7 and len(commands("docs/photographs.md")) >= 5


def test_what_is_killed_is_a_run_with_all_of_the_method():
    assert accepted(*parse(settings.Options, "", [*kills.SHORT])).method == "tan"
