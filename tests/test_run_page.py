"""What people expect to watch: report.html on one page that needs nothing else, and TensorBoard."""

import builtins
import html.parser
import json
import re
import shlex

import pytest
from conftest import call

import train_tan
from plumbing.files import read_metrics
from plumbing.options import InputError
from settings import Options, command_of

tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


class Page(html.parser.HTMLParser):
    """Addresses and texts of a page; unbalanced elements are kept in `open`."""

    ALONE = {"meta", "img", "input", "br", "link", "td", "tr"}

    def __init__(self, text):
        super().__init__()
        self.addresses, self.open, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.ALONE:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def shown(train, tmp_path_factory):
    """A run with pictures, watched by TensorBoard, whose folder has an awkward name."""
    return train(tmp_path_factory.mktemp("runs") / "a <b> & 'c'", "--samples", 4, "--previews", 2, "--tensorboard")


def test_the_page_needs_no_other_file(shown):
    text = (shown / "report.html").read_text()
    page = Page(text)
    assert page.open == [] or page.open == ["html"]
    assert len(page.addresses) == 3 and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "http://" not in text and "https://" not in text
    rows = json.loads(re.search(r"const rows = (\[.*?\]\]), picture", text)[1])
    assert [label.split(",")[0] for label, _ in rows] == ["after 0 iterations", "after 3 iterations", "after 6 iterations"]
    said = " ".join(page.texts)
    assert "6 of 6 iterations" in said and f"python sample.py {shlex.quote(str(shown))} -n 64" in said
    assert text.count("<svg") == 4 and "loss" in said


def test_an_unfinished_run_has_a_page(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tan.Report, "finish", lambda *a: None)
    folder = train(tmp_path / "run", "--method", "adaptor")
    text = (folder / "report.html").read_text()  # without pictures: no stages to slide over, no pairs
    assert "<script>" not in text and "Pairs" not in text and Page(text).open in ([], ["html"])


def test_the_command_makes_the_run_again(train, shown, tmp_path):
    said = "".join(Page((shown / "report.html").read_text()).texts)
    words = shlex.split(re.search(r"python train_tan.py .*", said)[0])[2:]
    words[words.index("--output-dir") + 1] = str(tmp_path / "again")
    call(train_tan.main, *words)
    same = [(folder / "weights.safetensors").read_bytes() for folder in (shown, tmp_path / "again")]
    assert same[0] == same[1]
    assert command_of(Options(target="it's", flip=False, method="adaptor")) == (
        """python train_tan.py --target 'it'"'"'s' --method adaptor --no-flip""")
    assert "--paper" in command_of(Options(paper=True, method="adaptor")).split()  # else psi would be wider


def test_tensorboard_has_the_names_of_the_metrics(shown):
    events = tensorboard.EventAccumulator(str(shown / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    lines = read_metrics(shown / "metrics.jsonl")
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert [event.step for event in events.Scalars("gradient_norm")] == [*range(1, 7)]
    assert {"guidance_rms/1", "loss_by_quarter/4", "pgd_gain", "learning_rate"} <= set(events.Tags()["scalars"])
    tags = {tag.split("/")[0] for tag in events.Tags()["images"]}
    assert tags == {"targets", "progress", "samples"}


def test_tensorboard_of_a_resumed_run_has_each_iteration_once(train, tmp_path):
    folder = train(tmp_path / "run", "--method", "adaptor", "--samples", 2, "--tensorboard", "--iterations", 4)
    call(train_tan.main, "--output-dir", folder, "--resume", "--iterations", 6)
    events = tensorboard.EventAccumulator(str(folder / "tensorboard"), {"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [*range(1, 7)]
    assert [[event.step for event in events.Images(tag)] for tag in ("progress", "samples")] == [[0, 4, 6], [4, 6]]


def test_without_the_package(train, tmp_path, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name))
                        if "tensorboard" in name else real(name, *a, **k))
    with pytest.raises(InputError, match="--tensorboard: needs another package; pip install tensorboard"):
        train(tmp_path / "run", "--method", "adaptor", "--tensorboard")
    assert not (tmp_path / "run").exists()
