"""settings.py: what suits which source, which options a method uses, and what is refused by the name of its flag."""

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest

import adaptor
import settings
from baselines import gan_methods, gan_settings
from checkpoints import pretrain_settings
from checkpoints.load import load_gan, load_source
from plumbing.options import InputError, flag, flat, parse, replace
from settings import METHODS, PAPER, Options, suited, used_by

SMALL = settings.SMALL | settings.SMALL_ADAPTORS["bottleneck"]
GUIDED, ADVERSARIAL = settings.SMALL_GUIDED, settings.SMALL_ADVERSARIAL
FINETUNE = settings.SMALL | settings.SMALL_FINETUNE


def source_of(size, latent=False):
    return SimpleNamespace(image_size=size, small=size <= 64, first_stage=object() if latent else None)


@pytest.mark.parametrize("target, method, size, latent, expected", [
    ("sunglasses", "tan", 32, False, SMALL | GUIDED | ADVERSARIAL), ("sunglasses", "adaptor", 64, True, SMALL | dict(iterations=320)),
    ("sunglasses", "finetune", 32, False, FINETUNE), ("photos", "guided", 32, False, SMALL | GUIDED),
    ("haunted-houses", "adaptor", 32, False, SMALL | settings.CHURCHES),
    ("haunted-houses", "pa", 32, False, FINETUNE | settings.SMALL_PA | settings.CHURCHES),
    ("photos", "tan", 256, False, {}), ("photos", "finetune", 256, True, settings.LATENT),
    ("haunted-houses", "tan", 128, False, {})])
def test_what_stands_in_for_the_papers_settings(target, method, size, latent, expected):
    source = source_of(size, latent)
    options = Options(target=target, method=method)
    assert settings.instead_of_paper(options, source) == expected
    assert flat(suited(options, source)) == flat(options) | PAPER | expected
    typed = replace(options, iterations=7, learning_rate=0.5)
    assert flat(suited(typed, source)) == flat(options) | PAPER | expected | dict(iterations=7, learning_rate=0.5)


@pytest.mark.parametrize("options, source", [
    (Options(), source_of(256)), (Options(paper=True), source_of(32)), (Options(paper=True), source_of(64, latent=True)),
    (Options(), source_of(256, latent=True))])
def test_the_papers_numbers(options, source):
    """Section 5.2: above 64 pixels without being asked, else with --paper; Norm and gamma as they are printed."""
    given = suited(options, source)
    ascent, guidance = given.adversarial_noise, given.guidance
    assert (ascent.pgd_steps, ascent.omega, ascent.norm, ascent.pgd_network) == (10, 0.02, "paper", "current")
    assert (guidance.gamma, guidance.guidance_power, guidance.guidance_fade) == (5, 2, 0)
    assert guidance.guidance_below is guidance.guidance_limit is None
    assert (given.iterations, given.batch_size, given.learning_rate_decay, given.warmup) == (300, 40, "none", 0)
    assert given.learning_rate == (1e-5 if source.first_stage else 5e-5)


def test_options_of_a_method():
    asks = {name: {method for method in METHODS if name in used_by(method)} for name in flat(Options())}
    assert asks["gamma"] == asks["classifier_check"] == {"tan", "guided"}
    assert asks["omega"] == asks["pgd_network"] == asks["norm"] == {"tan"} and asks["pairwise_weights"] == {"pa"}
    assert asks["adaptor"] == asks["adaptor_width"] == {"tan", "guided", "adaptor"}
    assert asks["target"] == asks["samples"] == asks["ema"] == set(METHODS)


@pytest.mark.parametrize("form, rate, width", [("bottleneck", 2e-3, 8), ("scale-shift", 4e-2, None), ("low-rank", 5e-3, None)])
def test_what_suits_the_forms_of_adaptors_on_small_sources(form, rate, width):
    given = suited(Options(adaptor=form), source_of(32))
    assert (given.learning_rate, given.adaptor_width) == (rate, width)
    assert settings.SMALL_ADAPTORS.keys() == adaptor.FORMS.keys()
    assert suited(Options(adaptor="low-rank", adaptor_width=2), source_of(32)).adaptor_width == 2


@pytest.mark.parametrize("target, source, method, expected", [
    ("sunglasses", None, None, "runs/sunglasses"), ("sunglasses", "toyfaces", "tan", "runs/sunglasses-tan"),
    ("sunglasses", "toyfaces-latent", "pa", "runs/sunglasses-toyfaces-latent-pa"),
    ("some/photos/", "x.pt", "guided", "runs/photos-x-guided"), ("some/photos/", "photofaces", None, "runs/photos"),
    ("some/photos/", "toyfaces", None, "runs/photos-toyfaces")])
def test_where_a_run_goes(target, source, method, expected):
    assert str(settings.folder_of(Options(target=target, source=source, method=method))) == expected
    assert str(settings.folder_of(Options(target=target, output_dir="there"))) == "there"


@pytest.mark.parametrize("flags, says", [
    ("--omega -1", "--omega -1.0: must be at least 0"), ("--omega nan", "--omega nan: must be at least 0"),
    ("--guidance-below -5", "--guidance-below -5: must be at least 0"), ("--ema 2", "--ema 2.0: must be below 1"),
    ("--guidance-fade 8", "--guidance-fade 8.0: a share of the run is at most 1"), ("--gamma nan", "--gamma nan: must be a number"),
    ("--gamma inf", "--gamma inf: must be a number"),
    ("--classifier-batch-size 3", "--classifier-batch-size 3: must be even"),
    ("--classifier-iterations 0", "--classifier-iterations 0: must be at least 1"),
    ("--seed -5", "--seed -5: must be from 0"), (f"--seed {2 ** 64}", f"--seed {2 ** 64}: must be from 0"),
    ("--learning-rate 0", "--learning-rate 0.0: must be a positive number"),
    ("--batch-size 0", "--batch-size 0: must be at least 1"), ("--previews 0", "--previews 0: must be at least 1"),
    ("--iterations -1", "--iterations -1: must be at least 0"), ("--warmup -1", "--warmup -1: must be at least 0"),
    ("--samples 1 --sample-steps 1001", "--sample-steps 1001: this model has 1000"),
    ("--method adaptor --omega 0.1", "--omega: --method adaptor does not use it; leave it out, or give --method tan"),
    ("--method adaptor --gamma 5", "--gamma: --method adaptor does not use it; leave it out, or give --method tan or guided"),
    ("--method guided --pgd-steps 3", "--pgd-steps: --method guided does not use it"),
    ("--method finetune --adaptor-width 3", "--adaptor-width: --method finetune does not use it"),
    ("--method finetune --adaptor low-rank", "--adaptor: --method finetune does not use it; leave it out, or give --method tan or guided or adaptor"),
    ("--adaptor scale-shift --adaptor-width 3", "--adaptor-width: --adaptor scale-shift has no width; leave it out"),
    ("--adaptor low-rank --adaptor-width 0", "--adaptor-width 0: must be at least 1"),
    ("--pairwise-weights 1 1 1", "--pairwise-weights: --method tan does not use it; leave it out, or give --method pa"),
    ("--method adaptor --no-classifier-check", "--classifier-check: --method adaptor does not use it"),
    ("--classifier-arch imagenet256-classifier", "--classifier-arch: says what network the file of --classifier holds"),
    ("--classifier scratch --classifier-arch x.json", "--classifier-arch: says what network"),
    ("--arch ffhq256", "--arch ffhq256: for published files; .*source.safetensors says itself"),
])
def test_what_is_refused(flags, says, train, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        train(tmp_path / "run", *flags.split())
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def kinds(hint):
    """The types that a hint is made of."""
    return {kind for part in get_args(hint) for kind in kinds(part)} or {hint}


def numbers_of(options):
    """The options that are numbers, or some numbers, by name, with their types."""
    found = {}
    for group in [options, *(getattr(options, field.name) for field in dataclasses.fields(options))]:
        hints = get_type_hints(type(group)) if dataclasses.is_dataclass(group) else {}
        found |= {name: kinds(hint) & {int, float} for name, hint in hints.items() if kinds(hint) & {int, float}}
    return {name: found[name] for name in flat(options) if name in found}


def programs():
    faces, gan = load_source("toyfaces"), load_gan("toyfaces-stylegan2")
    for method in METHODS:
        start = replace(Options(), method=method, source="toyfaces")
        yield suited(start, faces), used_by(method), lambda options, name: settings.check(options, {name}, faces)
    for method in gan_methods.METHODS:
        start = replace(gan_settings.Options(), method=method, source="toyfaces-stylegan2")
        yield (gan_settings.suited(start, gan), gan_settings.used_by(method),
               lambda options, name: gan_settings.check(options, {name}, gan))
    for network in get_args(get_type_hints(pretrain_settings.Options)["network"]):
        start = pretrain_settings.Options(source="toyfaces", network=network)
        yield start, flat(start), lambda options, name: pretrain_settings.check(options, {name})


def test_no_number_goes_unchecked():
    """Of any program, method and network; an option that is added later is among them by itself."""
    free, seen = {"gamma", "ada_target"}, set()
    for options, used, check in programs():
        for name, types in numbers_of(options).items():
            for wrong in (-1, math.nan) if float in types else (-1,):
                value = flat(options)[name]
                several = (wrong,) * len(value) if isinstance(value, tuple) else wrong
                if name not in used or name in free and wrong == -1:
                    continue
                seen.add(name)
                with pytest.raises(InputError, match=f"^{flag(name)}"):
                    check(replace(options, **{name: several}), name)
    assert {"omega", "pairwise_weights", "warmup", "ewc_weight", "channel_mult", "kl_weight"} <= seen


@pytest.mark.parametrize("target, method, expected", [
    ("sunglasses", "tan", dict(iterations=160, batch_size=16, learning_rate=2e-3, learning_rate_decay="cosine", adaptor_width=8,
                               classifier_iterations=100, guidance_fade=0.5, pgd_steps=2, omega=0.1, norm="own")),
    ("haunted-houses", "finetune", dict(iterations=640, learning_rate=3e-4)),
    *(("sunglasses", form, dict(learning_rate=numbers["learning_rate"])) for form, numbers in settings.SMALL_ADAPTORS.items()),
    ("sunglasses", "pa", dict(learning_rate=3e-4, pairwise_weights=(0.5, 0.5, 0.05)))])
def test_the_numbers_of_small_sources_are_those_of_the_help(target, method, expected, capsys):
    """As in note 13, and each named where --help says what the option's default is."""
    chosen = dict(method=method) if method in METHODS else dict(adaptor=method)
    found = flat(suited(Options(target=target, **chosen), source_of(32)))
    assert {name: found[name] for name in expected} == expected
    with pytest.raises(SystemExit):
        parse(Options, "", ["--help"])
    words = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for name, value in expected.items():
        value = " ".join(map(str, value)) if isinstance(value, tuple) else value
        texts = {str(value), f"{value:.0e}".replace("e-0", "e-")} if isinstance(value, float) else {str(value)}
        default = re.search(rf"{flag(name)} .*?[Dd]efault: (.*?)[.)] ", words)[1]
        assert any(text in default for text in texts), f"{name}: {value} is not in {default!r}"
