"""Malformed inputs for the programs that read files: how each is answered.

  python -m experiments.malformed              some 350, a few minutes on two cores
  python -m experiments.malformed --show       each with its answer

Files of weights, folders, pictures and JSON that are truncated, have flipped bits, wrong types, or each
other's names.  A program has to end with one line that names the file or flag (status 2), or do the job where
the damage is none: no traceback, no silent success on damaged input, and nothing that was there is changed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import random
import runpy
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints import gan
from checkpoints.network import build, save_network
from checkpoints.published import LINEAR
from plumbing.options import parse, run

# Each as it is started from the command line.
TRAIN, PRETRAIN, SAMPLE, EVALUATE = (
    functools.partial(runpy.run_path, str(Path(__file__).parents[1] / f"{name}.py"), run_name="__main__")
    for name in ("train_tan", "pretrain", "sample", "evaluate"))
CHECKPOINTS, EXPORT, TRANSFER = (
    functools.partial(runpy.run_module, name, run_name="__main__")
    for name in ("checkpoints", "checkpoints.export", "baselines.gan_transfer"))
TINY = dict(image_size=16, in_channels=3, model_channels=16, out_channels=3, num_res_blocks=1,
            channel_mult=[1, 2], attention_resolutions=[2], num_head_channels=16, use_scale_shift_norm=True,
            norm_groups=8)
CHANNELS = dict(size=16, channel_base=64, channel_max=16)
RIVALS = dict(generator=dict(CHANNELS, style_dim=8, n_mlp=1), discriminator=CHANNELS)
SHORT = ("--method", "adaptor", "--iterations", "1", "--batch-size", "2", "--adaptor-width", "4",
         "--samples", "0", "--previews", "1", "--device", "cpu")
SOURCE = ("--size", "16", "--channels", "8", "--channel-mult", "1", "--head-channels", "8",
          "--iterations", "1", "--batch-size", "2", "--device", "cpu")
JSON_VALUES = (None, True, -1, 10**30, "", "x", [], {}, [1, "a"], {"a": None}, 0.5)


@dataclasses.dataclass
class Options:
    seed: int = 0
    """Seed of the damage."""
    show: bool = False
    """Print every case with its answer."""


@dataclasses.dataclass
class Case:
    """A malformed input and the program that is given it.

    harmless   whether the program may do its job: not all damage shows
    """
    name: str
    main: Callable[[], None]
    words: list[str]
    harmless: bool = False


def sound(place: Path) -> None:
    """What the malformed inputs are made of: a source, a run, pictures."""
    torch.manual_seed(0)
    network = build(dict(network="UNet", config=TINY, schedule=LINEAR), "tiny")
    save_network(place / "source.safetensors", network)
    torch.save(network.model.state_dict(), place / "published.pt")
    rivals = gan.build(dict(network=gan.NAME, config=RIVALS), "tiny")
    save_network(place / "gan.safetensors", rivals)
    torch.save(dict(g_ema=rivals.model.state_dict(), d=rivals.discriminator.state_dict()), place / "gan.pt")
    (place / "photos").mkdir()
    for i in range(4):
        pixels = torch.randint(256, (24, 24, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(place / "photos" / f"{i}.png")
    call(TRAIN, ["--source", str(place / "source.safetensors"), "--target", str(place / "photos"),
                          "--output-dir", str(place / "run"), *SHORT])


def call(main: Callable[[], None], words: list[str]) -> tuple[int, str]:
    """Exit status of a program that is called with these words, and what it said."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["program", *words]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run(main)
    except SystemExit as stopped:
        return int(stopped.code or 0), said.getvalue()
    except BaseException:
        return 1, said.getvalue() + traceback.format_exc()
    finally:
        sys.argv = before
    return 0, said.getvalue()


def damaged(content: bytes, random_: random.Random) -> Iterator[tuple[str, bytes]]:
    """Truncated, with bits flipped, or something else altogether."""
    for share in (0.0, 0.01, 0.3, 0.9):
        yield f"first {share:.0%}", content[:int(share * len(content))]
    for i in range(4):
        flipped = bytearray(content)
        for _ in range(3):
            place = random_.randrange(min(len(content), 2000 if i < 2 else len(content)))
            flipped[place] ^= 1 << random_.randrange(8)
        yield f"bits flipped {i}", bytes(flipped)
    yield "a web page", b"<!DOCTYPE html><html>not found</html>"
    yield "zeros", bytes(len(content))


def cases(place: Path, random_: random.Random) -> Iterator[Case]:
    """Every malformed input, made in a folder of its own right before it is tried."""
    source, photos, finished = place / "source.safetensors", place / "photos", place / "run"
    train = ["--target", str(photos), *SHORT, "--output-dir"]

    for original in (source, place / "published.pt"):
        for what, content in damaged(original.read_bytes(), random_):
            bad = place / "bad" / original.name
            bad.write_bytes(content)
            shows = "flipped" not in what  # a flipped bit of a weight is another weight
            yield Case(f"{original.name}, {what}: checkpoints", CHECKPOINTS, [str(bad)], not shows)
            yield Case(f"{original.name}, {what}: train", TRAIN,
                       ["--source", str(bad), *train, str(place / "out")], not shows)

    tensors = load_file(source)
    for key, value in (("time_embed.0.weight", torch.ones(3)), ("extra", torch.ones(1)),
                       ("out.2.bias", torch.full((3,), float("nan"))),
                       ("out.2.bias", torch.full((3,), 2**40))):
        bad = place / "bad" / "tensors.safetensors"
        description = dict(network="UNet", config=TINY, schedule=LINEAR)
        save_file(tensors | {key: value}, bad, {"description": json.dumps(description)})
        yield Case(f"tensor {key} {value.dtype}", SAMPLE,
                   [str(bad), "-n", "1", "--steps", "1", "--output-dir", str(place / "out")],
                   value.dtype == torch.int64)

    for name in ("network", "config", "schedule", "first_stage", "layout"):
        for value in JSON_VALUES:
            bad = place / "bad" / "description.safetensors"
            description = dict(network="UNet", config=TINY, schedule=LINEAR) | {name: value}
            save_file(tensors, bad, {"description": json.dumps(description)})
            fine = name == "layout" or (name in ("first_stage", "schedule") and not value)
            yield Case(f"description, {name} {value!r}", SAMPLE,
                       [str(bad), "-n", "1", "--steps", "1", "--output-dir", str(place / "out")], fine)

    for name in ("source", "target", "method", "batch_size", "adaptor_width", "precision", "learning_rate",
                 "flip"):
        for value in JSON_VALUES[:7]:
            copy = place / "bad" / "run"
            shutil.copytree(finished, copy)
            options = json.loads((copy / "options.json").read_text()) | {name: value}
            (copy / "options.json").write_text(json.dumps(options))
            yield Case(f"options.json, {name} {value!r}: sample", SAMPLE,
                       [str(copy), "-n", "1", "--steps", "1", "--output-dir", str(place / "out")], True)
            yield Case(f"options.json, {name} {value!r}: resume", TRAIN,
                       ["--output-dir", str(copy), "--resume"], True)
            shutil.rmtree(copy)

    for name in ("options.json", "weights.safetensors", "checkpoint.pt", "metrics.jsonl",
                 "stages/000001.safetensors"):
        for what, content in list(damaged((finished / name).read_bytes(), random_))[::2]:
            copy = place / "bad" / "run"
            shutil.copytree(finished, copy)
            (copy / name).write_bytes(content)
            yield Case(f"{name}, {what}: resume", TRAIN,
                       ["--output-dir", str(copy), "--resume", "--iterations", "2"], True)
            yield Case(f"{name}, {what}: evaluate", EVALUATE,
                       ["--samples", str(copy), "--target", str(photos)])
            yield Case(f"{name}, {what}: export", EXPORT, [str(copy), str(place / "out")], True)
            shutil.rmtree(copy)

    picture = (photos / "0.png").read_bytes()
    for what, content in damaged(picture, random_):
        folder = place / "bad" / "photos"
        shutil.copytree(photos, folder)
        (folder / "1.png").write_bytes(content)
        words = ["--source", str(source), "--target", str(folder), *SHORT, "--output-dir", str(place / "out")]
        yield Case(f"picture, {what}: train", TRAIN, words, "flipped" in what)
        yield Case(f"picture, {what}: pretrain", PRETRAIN,
                   [str(folder), *SOURCE, "--output-dir", str(place / "out")], True)
        shutil.rmtree(folder)

    swapped = {"weights as photos": ["--source", str(source), "--target", str(source)],
               "photos as weights": ["--source", str(photos), "--target", str(photos)],
               "a picture as weights": ["--source", str(photos / "0.png"), "--target", str(photos)],
               "a run as source": ["--source", str(finished), "--target", str(photos)],
               **{f"{name} as source": ["--source", str(finished / name), "--target", str(photos)]
                  for name in ("checkpoint.pt", "weights.safetensors", "metrics.jsonl")}}
    for what, words in swapped.items():
        yield Case(what, TRAIN, [*words, *SHORT, "--output-dir", str(place / "out")])


def gan_cases(place: Path, random_: random.Random) -> Iterator[Case]:
    """The same for the GAN baselines."""
    short = ["--target", str(place / "photos"), "--iterations", "1", "--batch-size", "4", "--samples", "0",
             "--device", "cpu", "--output-dir", str(place / "out")]
    status, said = call(TRANSFER, ["--source", str(place / "gan.pt"), *short])
    shutil.rmtree(place / "out", ignore_errors=True)
    if status:  # then nothing below would show anything
        raise RuntimeError(f"the undamaged GAN was refused: {said}")
    for original in (place / "gan.safetensors", place / "gan.pt"):
        for what, content in damaged(original.read_bytes(), random_):
            bad = place / "bad" / original.name
            bad.write_bytes(content)
            yield Case(f"{original.name}, {what}: transfer", TRANSFER, ["--source", str(bad), *short],
                       "flipped" in what)
    tensors = load_file(place / "gan.safetensors")
    for part in RIVALS:
        for value in JSON_VALUES:
            bad = place / "bad" / "description.safetensors"
            description = dict(network=gan.NAME, config=RIVALS | {part: value})
            save_file(tensors, bad, {"description": json.dumps(description)})
            yield Case(f"GAN, {part} {value!r}", TRANSFER, ["--source", str(bad), *short])
    yield Case("a diffusion model as GAN", TRANSFER, ["--source", str(place / "source.safetensors"), *short])
    yield Case("a GAN as diffusion model", TRAIN,
               ["--source", str(place / "gan.pt"), "--target", str(place / "photos"), *SHORT])


def tree(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def fault_of(case: Case, place: Path) -> tuple[str | None, str]:
    """What is wrong with how a case was answered (None: nothing), and the answer."""
    kept = {name: tree(place / name) for name in ("photos", "run")}
    damaged_ = tree(place / "bad")
    status, said = call(case.main, case.words)
    lines = said.strip().splitlines() or [""]
    shutil.rmtree(place / "out", ignore_errors=True)
    answer = lines[-1]
    if "Traceback" in said:
        return "traceback", said
    if status not in (0, 2):
        return f"status {status}", answer
    if status == 0 and not case.harmless:
        return "silent success", answer
    if status == 2 and sum(line.startswith("error: ") for line in lines) != 1:
        return "not one line", said
    if kept != {name: tree(place / name) for name in kept}:
        return "overwritten", answer
    if status == 2 and tree(place / "bad") != damaged_:
        return "changed its input", answer
    return None, answer


def main() -> None:
    options, _ = parse(Options, __doc__)
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "bad").mkdir()
        os.environ["HF_HUB_OFFLINE"] = "1"  # whatever name looks like one of the Hub is not asked for
        sound(place)
        random_ = random.Random(options.seed)
        for case in itertools.chain(cases(place, random_), gan_cases(place, random_)):
            fault, answer = fault_of(case, place)
            counts[fault or "right"] = counts.get(fault or "right", 0) + 1
            if fault or options.show:
                print(f"{fault or 'right'}: {case.name}: {answer.replace(folder, '')}", flush=True)
    total = sum(counts.values())
    print(f"{total} malformed inputs: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))


if __name__ == "__main__":
    run(main)
