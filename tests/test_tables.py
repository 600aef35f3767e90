"""tables.py on a tiny budget, and the runs that launch.py starts for it."""

import functools
import json
import multiprocessing
import shutil
import statistics
from types import SimpleNamespace

import pytest
from conftest import ROOT, call
from PIL import Image

import domains
import settings
from adaptor import FORMS
from baselines import gan_settings
from checkpoints import run_folder
from domains import judge
from experiments import launch, parts, results, tables, tables_report
from plumbing.options import InputError, flat, parse
from settings import METHODS, Options, suited


@pytest.fixture
def trained(runs_here, few_fresh, monkeypatch):
    """tables.py with few iterations and small batches; the folders of its runs, in order."""
    monkeypatch.setattr(settings, "SMALL", settings.SMALL | dict(iterations=1, batch_size=4))
    monkeypatch.setattr(gan_settings, "SMALL", gan_settings.SMALL | dict(iterations=1, batch_size=4))
    monkeypatch.setattr(settings, "SMALL_GUIDED", settings.SMALL_GUIDED | dict(classifier_iterations=2))
    monkeypatch.setattr(settings, "SMALL_ADVERSARIAL", settings.SMALL_ADVERSARIAL | dict(pgd_steps=1))
    monkeypatch.setattr(parts, "STAGES", (1, 2))
    monkeypatch.setattr(parts, "VARIANTS", {"J = 2": dict(pgd_steps=2), "Norm as printed": dict(norm="paper")})
    monkeypatch.setattr(parts, "SHOWN", 2)
    return runs_here


def test_tables(trained, tmp_path, capsys):
    flags = ["--targets", "sunglasses", "--methods", "finetune", "tan", "--seeds", 1, "-n", 12, "--steps", 2, "--output-dir", tmp_path, "--device", "cpu"]
    call(tables.main, *flags)
    text, found = (tmp_path / "tables.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert text.strip() in capsys.readouterr().out
    assert "| finetune | 100.0% | " in text and "| paper, real pictures: TAN | 1.3% | 20.06 |" in text and "| paper, real pictures: LMD-TAN | 1.6% | 0.613 |" in text
    assert "| source model |" in text and "| fresh pictures |" in text and "12 samples of each run" in text and "Table 3" in text
    share = {row["run"]["method"]: row["score"]["target"] for row in found["tables"]}
    assert share["fresh pictures"] > 0.9 > 0.5 > share["source model"]  # of sunglasses
    stages = {method: [f["run"]["iterations"] for f in found["iterations"] if f["run"]["method"] == method] for method in ("finetune", "tan")}
    assert stages == {"finetune": [1, 2], "tan": [1, 2]}
    assert [(row["run"]["label"], row["settings"]["pgd_steps"], row["settings"]["norm"]) for row in found["ablation"]
            if row["run"]["method"] == "tan"] == [("TAN", 1, "own"), ("J = 2", 2, "own"), ("Norm as printed", 1, "paper")]
    assert [row["run"]["method"] for row in found["ablation"]].count("guided") == 1 and "| J = 2 | " in text
    assert {row["run"]["method"]: row["run"]["iterations"] for row in found["passes"]} == {"tan": 1, "finetune": 2}  # 1 + J passes
    assert {row["run"]["label"]: row["settings"]["adaptor"] for row in found["forms"]} == {form: form for form in FORMS}
    assert "| low-rank |" in text and "| scale-shift |" in text
    kept = {row["run"]["iterations"]: row for row in found["hold-out"]}
    assert [*kept] == [0, 1, 2, 3, 4] and sum(row["run"]["best_held_out"] for row in kept.values()) == 1
    losses = {record["iteration"]: record["held_out_loss"] for record in run_folder.stages(tmp_path / "sunglasses" / "adaptor-1-hold-out")}
    assert kept[min(losses, key=losses.get)]["run"]["best_held_out"] and {row["settings"]["hold_out"] for row in kept.values()} == {2}
    last = json.loads((tmp_path / "sunglasses" / "adaptor-1-hold-out" / "stages" / "000004.json").read_text())["score"]["toy FID"]
    assert kept[4]["score"]["toy FID"] == last and f"{last:.2f} after 4 |" in text.split("Where to stop")[1]
    options = json.loads((tmp_path / "sunglasses" / "tan-1-hundred" / "options.json").read_text())
    assert options["classifier_targets"].endswith("sunglasses-hundred") and len(list((tmp_path / "sunglasses-hundred").iterdir())) == 100
    assert not (tmp_path / "sunglasses" / "tan-1-at-1").exists()  # the usual run is one point of the curve
    for name in ("figure1-sunglasses.png", "iterations-sunglasses.png", "samples-sunglasses.png"):
        assert Image.open(tmp_path / name).width > 300
    once = len(trained)
    call(tables.main, *flags, "--parts", "tables")
    assert len(trained) == once  # everything was there, and the other parts are kept
    assert json.loads((tmp_path / "results.json").read_text()) == found and (tmp_path / "tables.md").read_text() == text
    call(tables.main, *flags, "--parts", "tables", "--methods", "finetune", "--seeds", 2, 2, 1)
    assert len(trained) == once + 1
    text, known = (tmp_path / "tables.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert len(known["tables"]) == len(found["tables"]) + 1 and "| tan | 8.3% | " in text and " (2) |" in text  # added to the tables
    call(tables.main, *flags, "--parts", "tables", "--methods", "finetune", "-n", 13)
    assert "13 samples of each run" in (text := (tmp_path / "tables.md").read_text()) and "| tan |" not in text  # never mixed
    assert len(json.loads((tmp_path / "results.json").read_text())["tables"]) == len(known["tables"]) + 3


def test_where_to_stop():
    rows = [dict(run=dict(target="babies", seed=seed, iterations=i, best_held_out=best), score={"toy FID": fid}, settings=dict(iterations=length))
            for seed, i, best, fid, length in ((1, 0, False, 0.9, 320), (1, 80, False, 0.4, 320), (1, 160, True, 0.5, 320), (1, 320, False, 0.6, 320),
                                               (2, 640, True, 0.1, 640), (2, 80, True, 0.7, 320), (3, 80, False, 0.8, 320))]
    table, = tables_report.hold_out_table(rows)
    assert "| babies | 1 | 0.40 after 80 | 0.50 after 160 | 0.60 after 320 |" in table
    assert "| babies | 2 | 0.70 after 80 | 0.70 after 80 | 0.70 after 80 |" in table  # an older run of another length is left out
    assert "| babies | 3 | 0.80 after 80 |  | 0.80 after 80 |" in table  # its best stage is not scored yet


def test_gans_stand_above_the_diffusion_methods(trained, tmp_path):
    flags = ["--targets", "sunglasses", "--methods", "adaptor", "cdc", "--seeds", 1, "-n", 12, "--steps", 2, "--output-dir", tmp_path, "--device", "cpu"]
    call(tables.main, *flags, "--parts", "tables", "figures", "passes")
    rows = json.loads((tmp_path / "results.json").read_text())["tables"]
    found = {row["run"]["method"]: row for row in rows}
    assert found["cdc"]["run"]["source"] == "toyfaces-stylegan2" and found["cdc"]["settings"]["cdc_weight"] > 0
    assert found["source GAN"]["score"] != found["source model"]["score"]
    text = (tmp_path / "tables.md").read_text()
    methods = [line.split(" | ")[0] for line in text.split("Table 2")[1].splitlines()[4:]]
    assert methods[:5] == ["| source GAN", "| source model", "| cdc", "| adaptor", "| fresh pictures"]
    assert "| paper, real pictures: TGAN+ADA | 100% | 53.64 |" in text and "| cdc | 3 | " in text
    assert Image.open(tmp_path / "samples-sunglasses.png").height > 5 * 32  # training, two sources, two methods
    assert {row["run"]["method"] for row in json.loads((tmp_path / "results.json").read_text())["passes"]} == {"adaptor"}
    call(tables.main, *flags, "--parts", "tables", "--latent", "--methods", "adaptor", "cdc")
    assert {row["run"]["method"] for row in json.loads((tmp_path / "results-latent.json").read_text())["tables"]} == {
        "adaptor", "source model", "fresh pictures"}


def test_what_results_json_has_is_not_trained_again(trained, tmp_path, monkeypatch):
    flags = ["--targets", "sunglasses", "--methods", "adaptor", "--seeds", 1, "-n", 12, "--steps", 2, "--device", "cpu", "--parts", "tables"]
    call(tables.main, *flags, "--output-dir", tmp_path / "a")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "results.json", tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(judge, "source_samples", None)  # nor is the source scored, nor fresh pictures
        patch.setattr(judge, "score", None)
        call(tables.main, *flags, "--output-dir", tmp_path / "b")
    assert len(trained) == 1 and not (tmp_path / "b" / "sunglasses").exists()
    assert (tmp_path / "b" / "tables.md").read_text() == (tmp_path / "a" / "tables.md").read_text()
    call(tables.main, *flags, "--output-dir", tmp_path / "b", "--seeds", 2)
    assert len(trained) == 2


def test_each_run_is_kept_as_it_is_scored(trained, tmp_path, monkeypatch):
    flags = ["--targets", "sunglasses", "--methods", "adaptor", "finetune", "--seeds", 1, "-n", 12, "--steps", 2, "--device", "cpu", "--parts", "tables"]
    whole = launch.call_train

    def call_train(program, arguments, log):
        if "finetune" in arguments:
            raise KeyboardInterrupt
        return whole(program, arguments, log)

    monkeypatch.setattr(launch, "call_train", call_train)
    with pytest.raises(KeyboardInterrupt):
        call(tables.main, *flags, "--output-dir", tmp_path)
    assert [f["run"]["method"] for f in json.loads((tmp_path / "results.json").read_text())["tables"]] == ["adaptor"]


def add_rows(file, method):
    for seed in range(40):
        results.add(file, "tables", dict(run=dict(method=method, target="babies", seed=seed)))


def test_two_commands_lose_no_row(tmp_path):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=add_rows, args=(tmp_path / "results.json", method)) for method in ("tan", "adaptor")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert len(results.read(tmp_path / "results.json")["tables"]) == 80


def test_figures_of_a_source_that_was_trained_anew_are_not_taken(monkeypatch):
    row = dict(run=dict(method="source model", target="babies") | judge.protocol("babies", 12, 2, "toyfaces"))
    assert results.current(row, 12, 2)
    monkeypatch.setattr(judge, "source_weights", lambda source: "new")
    assert not results.current(row, 12, 2)


def test_a_run_with_an_option_that_is_gone_is_like_none_of_today(tmp_path):
    flags = dict(target="babies", source="toyfaces", method="tan")
    trained, today = flat(suited(Options(**flags), launch.known_source("toyfaces"))), launch.relevant_today(**flags)
    assert launch.relevant(trained) == today != launch.relevant(trained | dict(momentum=0.9))
    launch.check_known(tmp_path, trained, today)
    with pytest.raises(InputError, match="was trained with --momentum None, wanted is no such option; remove the folder"):
        launch.check_known(tmp_path, trained | dict(momentum=None), today)


def test_runs_scored_otherwise_are_not_tabulated():
    same = dict(method="fresh pictures", target="babies") | judge.protocol("babies", 12, 2)
    assert results.current(dict(run=same), 12, 2)
    for other in (same | dict(method="source model"), same | dict(n=13), same | dict(fresh=1), {name: same[name] for name in ("method", "target", "n", "steps")}, same | dict(seed=1)):
        assert not results.current(dict(run=other), 12, 2)  # the last: a run that does not say how it was trained


@pytest.mark.parametrize("flags, message", [
    (["--latent", "--targets", "haunted-houses"], "haunted-houses: has no latent source"),
    (["--latent", "--steps", 1001], "--steps 1001: this model has 1000"),  # haunted houses are not asked for
    (["--steps", 1001], "--steps 1001: this model has 1000")])
def test_what_tables_refuses(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        call(tables.main, *flags, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pairs_are_of_the_same_target_and_seed():
    fids = {("tan", "babies", 1): 0.3, ("tan", "babies", 2): 0.2, ("tan", "sketches", 1): 0.1, ("adaptor", "babies", 1): 0.4, ("adaptor", "babies", 2): 0.4}
    names = ("toy FID", "toy KID", "toy Intra-LPIPS", "target", "kept", "covered", "memorised")
    found = [dict(run=dict(method=method, target=target, seed=seed, iterations=80), score=dict.fromkeys(names, fid), rate=1.0, seconds=1.0,
                  settings=dict(pgd_steps=2))
             for (method, target, seed), fid in fids.items()]
    fid, intra = tables_report.main_tables(found)[-4:-2]
    assert fid.splitlines()[4:] == ["| tan |  | 2 of 2 |", "| adaptor | 0 of 2 |  |"] and "lower toy FID" in fid
    assert intra.splitlines()[4:] == ["| tan |  | 0 of 2 |", "| adaptor | 2 of 2 |  |"]


def test_differences_are_paired():
    """By hand: babies -0.1, -0.2, sketches +0.6 (seed 1 alone); over both targets (0.6 - 0.15) / 2 ± (0.6 + 0.15) / 2."""
    fids = {("tan", "babies", 1): 0.3, ("tan", "babies", 2): 0.2, ("tan", "sketches", 1): 0.9, ("adaptor", "babies", 1): 0.4,
            ("adaptor", "babies", 2): 0.4, ("adaptor", "sketches", 1): 0.3, ("adaptor", "sketches", 2): 9.0}
    found = [dict(run=dict(method=method, target=target, seed=seed), score={"toy FID": fid}) for (method, target, seed), fid in fids.items()]
    title, _, head, _, row = tables_report.difference_table(found, "toy FID", "FID", "adaptor", -1).splitlines()
    columns = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | ")))
    assert columns == {"less adaptor": "tan", "babies": "-0.150 ± 0.050", "sketches": "+0.600", "all": "+0.225 ± 0.375", "better": "2 of 3"} \
        or columns == {"less adaptor": "tan", "sketches": "+0.600", "babies": "-0.150 ± 0.050", "all": "+0.225 ± 0.375", "better": "2 of 3"}


TABLE_1 = """
TGAN 0.510 0.550 0.533 0.585 0.601
TGAN+ADA 0.546 0.571 0.546 0.615 0.643
EWC 0.560 0.550 0.541 0.579 0.596
CDC 0.583 0.581 0.564 0.620 0.674
DCL 0.579 0.574 0.558 0.616 0.626
DDPM-PA 0.599 0.604 0.581 0.628 0.706
TAN 0.592 0.613 0.621 0.648 0.723
LMD-TAN 0.601 0.613 0.592 0.653 0.738"""
TABLE_2 = """
babies 104.79 102.58 87.41 74.39 52.56 48.92 46.70
sunglasses 55.61 53.64 59.73 42.13 38.01 34.75 20.06"""


def test_the_papers_numbers():
    rows = [line.split() for line in TABLE_1.strip().splitlines()]
    assert [row[0] for row in rows] == [name for name, _ in tables_report.PAPER]
    columns = zip(*(map(float, row[1:]) for row in rows))
    assert tables_report.PAPER_INTRA == dict(zip(("babies", "sunglasses", "raphael", "haunted-houses", "landscape-drawings"), columns))
    rows = [line.split() for line in TABLE_2.strip().splitlines()]
    assert tables_report.PAPER_FID == {target: (*map(float, values), None) for target, *values in rows}
    assert tables_report.PAPER_CLASSIFIER == {"10": (0.621, 20.06), "100": (0.637, 22.84)}


def test_times_and_signs():
    """Two runs of TAN with J = 2: three passes; the mean of 0.2 and 0.4 seconds, not of their inverses."""
    names = ("toy FID", "toy KID", "toy Intra-LPIPS", "target", "kept", "covered", "memorised")
    found = [dict(run=dict(method=method, target="babies", seed=seed, iterations=80), score=dict.fromkeys(names, value), seconds=seconds,
                  settings=dict(pgd_steps=2)) for method, seed, value, seconds in (("tan", 1, 0.2, 0.2), ("tan", 2, 0.3, 0.4), ("adaptor", 1, 0.5, 0.1),
                                                                                  ("adaptor", 2, 0.25, 0.1))]
    assert tables_report.time_table(found).splitlines()[4:] == ["| tan | 3 | 0.30 (80) |", "| adaptor | 1 | 0.10 (80) |"]
    table, = tables_report.iterations_table(found)
    assert [line.split(" | ")[:4] for line in table.splitlines()[4:]] == [["| babies", "tan", "80", "24"], ["| babies", "adaptor", "80", "8"]]
    better = [table.splitlines()[-1].split(" | ")[-1] for table in tables_report.difference_tables(found, "x", "adaptor")]
    assert better == ["1 of 2 |", "1 of 2 |", "1 of 2 |"]
    better = [table.splitlines()[-1].split(" | ")[-1] for table in tables_report.difference_tables(found[:1] + found[2:3], "x", "adaptor")]
    assert better == ["1 of 1 |", "0 of 1 |", "0 of 1 |"]  # lower FID, lower diversity, fewer in the target


def test_the_seconds_of_a_run_are_a_median(monkeypatch):
    monkeypatch.setattr(parts, "load_run", lambda folder: (None, dict(method="tgan")))
    monkeypatch.setattr(parts, "read_metrics", lambda file: [dict(seconds=seconds) for seconds in (1.0, 9.0, 2.0)])
    monkeypatch.setattr(launch, "relevant", lambda trained: {})
    monkeypatch.setattr(judge, "score_run", lambda *a: {})
    assert parts.score(SimpleNamespace(n=1, steps=1), ROOT, None) == dict(rate=1.0, seconds=2.0, settings={})


def test_a_folder_that_was_half_filled_is_filled_anew(tmp_path):
    (tmp_path / "hundred.part").mkdir()
    (tmp_path / "hundred.part" / "old").touch()
    parts.fill(tmp_path / "hundred", lambda folder: (folder / "new").touch())
    assert [path.name for path in tmp_path.rglob("*")] == ["hundred", "new"]


def test_mean_and_standard_deviation():
    assert tables_report.mean_std([0.5, 0.7]) == "0.600 ± 0.141 (2)" and tables_report.mean_std([0.25]) == "0.250"


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What launch.train would call train_tan.py with to fill tmp_path, which writes the settings as it would."""
    found = []

    def call_train(program, arguments, log):
        log.touch()
        found.append(arguments[arguments.index("--output-dir") + 2:])
        options, typed = parse(Options, "", arguments)
        if options.resume:
            options = run_folder.resumed(tmp_path, options, typed)
        else:
            options = suited(options, SimpleNamespace(image_size=32, small=True, first_stage=None))
        (tmp_path / "weights.safetensors").touch()
        (tmp_path / "options.json").write_text(json.dumps(flat(options)))
        return 0

    monkeypatch.setattr(launch, "call_train", call_train)
    return found


def test_train_starts_resumes_and_leaves_alone(monkeypatch, commands, tmp_path):
    train = functools.partial(launch.train, tmp_path, "cpu", target="babies", source="toyfaces", method="tan")
    train(seed=1)
    train(seed=1)
    (tmp_path / "weights.safetensors").unlink()
    train(seed=1)
    assert commands == [["--device", "cpu", "--target", "babies", "--source", "toyfaces", "--method", "tan", "--seed", "1", "--samples", "0", "--no-classifier-check"],
                        ["--device", "cpu", "--resume"]]
    (tmp_path / "weights.safetensors").unlink()
    monkeypatch.setattr(launch, "call_train", lambda program, arguments, log: log.write_text("50%\nerror: no memory\n") and 1)
    with pytest.raises(InputError, match="train.log.: error: no memory; run the same command again"):
        train(seed=1)
    monkeypatch.setattr(launch, "call_train", lambda program, arguments, log: 2)
    with pytest.raises(InputError, match=r"train.log\)$"):  # nothing new in the log, and again the same would not help
        train(seed=1)


@pytest.mark.parametrize("flags, message", [
    (dict(seed=2), "--seed 1, wanted is 2"), (dict(seed=1, iterations=40), "--iterations 160, wanted is 40"),
    (dict(seed=1, method="finetune"), "--method tan, wanted is finetune"), (dict(seed=1, gamma=1.0), "--gamma 5.0, wanted is 1.0")])
def test_a_run_with_other_settings_is_not_taken(commands, tmp_path, flags, message):
    flags = dict(method="tan") | flags
    launch.train(tmp_path, "cpu", target="babies", source="toyfaces", seed=1, method="tan")
    with pytest.raises(InputError, match=f"was trained with {message}; remove the folder"):
        launch.train(tmp_path, "cpu", target="babies", source="toyfaces", **flags)
    assert len(commands) == 1


def test_a_folder_may_be_spelt_otherwise(commands, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    flags = dict(source="toyfaces", seed=1, method="tan")
    launch.train(tmp_path, "cpu", target="photos", **flags)
    launch.train(tmp_path, "cpu", target=f"{tmp_path}/photos/", **flags)
    assert len(commands) == 1
    (tmp_path / "others").mkdir()
    with pytest.raises(InputError, match="--target photos, wanted is others"):
        launch.train(tmp_path, "cpu", target="others", **flags)


def test_settings_are_those_that_concern_the_method():
    flags = dict(target="babies", source="toyfaces")
    same = {method: launch.relevant_today(**flags, method=method) == launch.relevant_today(**flags, method=method, gamma=1.0) for method in METHODS}
    assert same == {"tan": False, "guided": False, "adaptor": True, "finetune": True, "pa": True}


@pytest.mark.parametrize("file, least", [("results.json", 80), ("results-latent.json", 10)])
def test_the_published_results_have_the_settings_of_today(file, least):
    found = json.loads((ROOT / "docs" / file).read_text())
    rows = [row for part in found.values() for row in part]
    assert all(results.current(row, 250, 25) for row in rows)
    assert len(found["tables"]) > least


ALL, LATENT = tables_report.ALL_METHODS, ("tan", "guided", "adaptor")


@pytest.mark.parametrize("page, begins, name, label, methods, file", [
    ("README.md", "Toy FID, lower is better", "toy FID", "`{}`: ", METHODS, "results.json"),
    ("docs/results.md", "## Table 2", "toy FID", "{} | ", ALL, "results.json"),
    ("docs/results.md", "## Table 1", "toy Intra-LPIPS", "{} | ", ALL, "results.json"),
    ("docs/results.md", "## Share of samples", "target", "{} | ", ALL, "results.json"),
    ("docs/results.md", "## Distance to", "memorised", "{} | ", ALL, "results.json"),
    *(("docs/latent.md", begins, name, label, LATENT, file)
      for begins, name in (("Toy FID (", "toy FID"), ("Toy Intra-LPIPS (", "toy Intra-LPIPS"), ("Share of samples", "target"))
      for label, file in (("{} | ", "results-latent.json"), ("*pixels: {}* | ", "results.json")))])
def test_the_tables_of_the_pages_have_the_numbers_of_results_json(page, begins, name, label, methods, file):
    """Means and standard deviations over seeds, computed anew."""
    found = json.loads((ROOT / "docs" / file).read_text())["tables"]
    lines = (ROOT / page).read_text().split(begins)[1].splitlines()
    head = next(line for line in lines if line.startswith("| method"))
    targets = {i: word for i, word in enumerate(head.split(" | ")) if word.rstrip(" |") in domains.TARGETS}
    for method in methods:
        row = next((line for line in lines if line.startswith("| " + label.format(method))), None)
        assert row, f"{page}: no row for {method} below {begins}"
        cells = row.split(" | ")
        for i, target in targets.items():
            values = tables_report.scores(found, name, method=method, target=target.rstrip(" |"))
            expected = f"{statistics.mean(values):.2f}" if values else ""
            if len(values) > 1:
                expected += f" ± {statistics.stdev(values):.2f}"
            assert cells[i].strip(" |") == expected, (page, method, target)


def test_the_papers_order():
    fid = dict(tgan=5.0, ada=4.0, cdc=6.0, pa=1.0, ewc=5.0)  # the paper: 55.61, 53.64, 42.13, 34.75; ewc's target has no FID there
    rows = [dict(run=dict(target="raphael" if method == "ewc" else "sunglasses", seed=1, method=method), score={"toy FID": value, "toy Intra-LPIPS": value})
            for method, value in fid.items()]
    table = tables_report.order_table(rows)
    assert "| toy FID | 1 of 3 | 0 of 0 | 3 of 3 | 4 of 6 |" in table
    assert "| toy Intra-LPIPS | 2 of 3 | 0 of 0 | 0 of 3 | 2 of 6 |" in table  # the paper: 0.550, 0.571, 0.581, 0.604
    same = [dict(run=dict(target="sunglasses", seed=1, method=method), score={"toy FID": 1.0, "toy Intra-LPIPS": 1.0}) for method in ("tgan", "ewc")]
    assert "| toy Intra-LPIPS | 0 of 0 |" in tables_report.order_table(same)  # 0.550 both


@pytest.mark.parametrize("part, make", [
    ("tables", lambda found: [tables_report.order_table(found)]), ("hold-out", tables_report.hold_out_table),
    ("ablation", tables_report.ablation_tables), ("classifier", tables_report.classifier_table)])
def test_whole_tables_of_the_page_are_those_of_results_json(part, make):
    """Word for word."""
    page, found = (ROOT / "docs" / "results.md").read_text(), json.loads((ROOT / "docs" / "results.json").read_text())
    assert all(table.split("\n\n")[1] in page for table in make(found[part]))


def test_interrupted_training_is_waited_for(monkeypatch, tmp_path):
    """On Ctrl-C or SIGTERM the other program is told to stop, too, and left the time to save."""
    waits, told = [], []

    class Process:
        def __init__(self, *command, **where): pass

        def terminate(self):
            told.append(len(waits))

        def wait(self):
            waits.append(1)
            if len(waits) == 1:
                raise KeyboardInterrupt
            return 130

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        launch.call_train(launch.TRAIN_TAN, [], tmp_path / "train.log")
    assert len(waits) == 2 and told == [1]


def test_results_of_other_settings_are_kept_but_not_tabulated(trained, tmp_path, monkeypatch):
    flags = ["--targets", "sunglasses", "--methods", "finetune", "--seeds", 1, "-n", 12, "--steps", 2, "--device", "cpu", "--parts", "tables"]
    call(tables.main, *flags, "--output-dir", tmp_path)
    shutil.rmtree(tmp_path / "sunglasses")
    monkeypatch.setitem(settings.SMALL_FINETUNE, "learning_rate", 1e-4)
    call(tables.main, *flags[:5], 2, *flags[6:], "--output-dir", tmp_path)
    runs = [f for f in json.loads((tmp_path / "results.json").read_text())["tables"] if "settings" in f]
    assert [f["settings"]["learning_rate"] for f in runs] == [3e-4, 1e-4] and " (2) |" not in (tmp_path / "tables.md").read_text()
