"""Networks by their name on the Hugging Face Hub: the real client against a small server that speaks its protocol."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import ROOT
from test_diffusers_folder import VAES, diffusers_model

from checkpoints import diffusers_folder, hub
from checkpoints.load import load_source, pinned
from plumbing.options import InputError

REVISIONS = {"main": "a" * 40, "older": "b" * 40}
GATED, TOKEN = "someone/gated", "hf_abc"


class Hub(http.server.BaseHTTPRequestHandler):
    """GET api/models/OWNER/NAME[/revision/R][/tree/R] and OWNER/NAME/resolve/R/FILE, of folders in self.root."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status, code):
        self.answer(status, b"{}", x_error_code=code, x_error_message=code)

    def do_GET(self):
        parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        folder = self.server.root / repo
        self.server.asked.append("/".join(parts))
        if repo == GATED and self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.refuse(403, "GatedRepo")
        if not folder.is_dir():
            return self.refuse(404, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        sha = REVISIONS.get(revision, revision)
        if sha not in REVISIONS.values():
            return self.refuse(404, "RevisionNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if not rest or rest[0] == "revision":
            siblings = [dict(rfilename=name) for name in names]
            return self.answer(200, json.dumps(dict(id=repo, sha=sha, siblings=siblings)).encode())
        if rest[0] == "tree":
            tree = [dict(type="file", path=name, size=path.stat().st_size, oid=self.etag(path))
                    for name, path in zip(names, files)]
            return self.answer(200, json.dumps(tree).encode())
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        self.answer(200, file.read_bytes(), etag=f'"{self.etag(file)}"', x_repo_commit=sha)

    do_HEAD = do_GET

    def etag(self, path):
        return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a hub with a pixel and a latent pipeline; what was asked of it is in server.asked."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    scheduler = diffusers.DDPMScheduler()
    for repo in ("google/ddpm-tiny", GATED):
        pipeline = diffusers.DDPMPipeline(diffusers_model(), scheduler)
        pipeline.save_pretrained(root / repo)
        pipeline.save_pretrained(root / repo, safe_serialization=False)  # also .bin, which is not needed
        (root / repo / "README.md").write_text("# a model")
    stage = VAES["vqvae"]().eval()
    stage.save_pretrained(root / "CompVis/ldm-tiny" / "vqvae")
    diffusers_model().save_pretrained(root / "CompVis/ldm-tiny" / "unet")
    scheduler.save_pretrained(root / "CompVis/ldm-tiny" / "scheduler")
    (root / "someone/empty").mkdir(parents=True)
    (root / "someone/empty/README.md").write_text("nothing")
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    httpd.root, httpd.asked = root, []
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.address = f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.shutdown()


@pytest.fixture
def program(server, tmp_path):
    """program(*words, **environment): one of the programs as a user runs it, its cache and folder being tmp_path."""
    def program(*words, **environment):
        environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "cache"),
                       "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        server.asked.clear()
        return subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, env=environment, capture_output=True,
                              text=True)
    return program


NOWHERE = dict(HF_ENDPOINT="http://127.0.0.1:9")  # where nobody listens


SEVERAL = f"""
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    module = command[0] == "-m"
    sys.argv = command[module:]
    if module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path("{ROOT}/" + command[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["google/ddpm-tiny", "CompVis/ldm-tiny"])
def test_a_name_as_source_from_end_to_end(program, server, tiny, tmp_path, name):
    words = ["--target", tiny.targets, "--method", "adaptor", "--iterations", 1, "--batch-size", 2, "--adaptor-width", 4,
             "--samples", 2, "--sample-steps", 2, "--previews", 1, "--device", "cpu", "--output-dir", "run"]
    if "ldm" in name:
        (tmp_path / "wide").mkdir()
        from PIL import Image
        for file in tiny.targets.iterdir():
            Image.open(file).resize((32, 32)).save(tmp_path / "wide" / file.name)
        words[1] = tmp_path / "wide"
    trained = program(ROOT / "train_tan.py", "--source", name, *words)
    assert trained.returncode == 0, trained.stderr
    source = json.loads((tmp_path / "run/options.json").read_text())["source"]
    assert source == f"{name}@{REVISIONS['main']}"
    fetched = sorted(asked.partition("resolve/")[2][41:] for asked in server.asked if "/resolve/" in asked)
    assert not [file for file in fetched if file.endswith((".bin", ".md"))]
    assert {"unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"} <= set(fetched)

    # What is there needs no network, and its commit is not asked for again.
    commands = (["sample.py", name, "-n", 2, "--steps", 2], ["train_tan.py", "--output-dir", "run", "--resume",
                "--iterations", 2], ["sample.py", "run", "-n", 2, "--steps", 2], ["-m", "checkpoints", name],
                ["-m", "checkpoints.export", name, "plain"])
    commands = [list(map(str, command)) for command in commands[:1 if "ldm" in name else 5]]
    offline = program("-c", SEVERAL, json.dumps(commands), **NOWHERE, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    if "ldm" in name:
        return
    unreachable = program(ROOT / "sample.py", name, "-n", 1, "--steps", 1, "--output-dir", "other", **NOWHERE)
    assert unreachable.returncode == 0, unreachable.stderr
    again = program(ROOT / "sample.py", "run", "-n", 1, "--steps", 1, "--output-dir", "more")
    assert again.returncode == 0 and not server.asked


SAYS = {
    "google/nosuch": "google/nosuch: no such file or folder here, and no such repository on the Hugging Face Hub",
    "google/ddpm-tiny@nosuch": "google/ddpm-tiny@nosuch: the repository has no revision nosuch",
    GATED: f"{GATED}: is gated; accept its terms at https://huggingface.co/{GATED}",
    "someone/empty": "someone/empty: holds no weights that are known here",
    "google/ddpm-tiny/unet/nosuch.bin": "google/ddpm-tiny/unet/nosuch.bin: has no such file",
    "toyface": "toyface: no such file or folder (did you mean toyfaces?); built-in are toyfaces, toyfaces-latent",
    "models/a.safetensors": "models/a.safetensors: no such file or folder; built-in are"}
UNREACHABLE = {"google/ddpm-tiny": "not whole in the cache of huggingface_hub, and the Hugging Face Hub cannot be asked"}
LOCATE = """
import sys
from checkpoints.load import locate
from plumbing.options import InputError
for name in sys.argv[1:]:
    try:
        print("found", locate(name))
    except InputError as error:
        print(error)
"""


@pytest.mark.parametrize("environment, says", [({}, SAYS), (NOWHERE, UNREACHABLE), (dict(HF_HUB_OFFLINE="1"), UNREACHABLE)])
def test_what_cannot_be_had_in_one_line(program, environment, says):
    done = program("-c", LOCATE, *says, **environment)
    assert done.stderr == "" and len(done.stdout.splitlines()) == len(says)
    for said, expected in zip(done.stdout.splitlines(), says.values()):
        assert expected in said


def test_revisions_files_and_tokens(program, server, tmp_path):
    shutil.copy(server.root / "google/ddpm-tiny/unet/diffusion_pytorch_model.bin", server.root / "someone/empty/a.bin")
    names = ["google/ddpm-tiny@older", GATED, "someone/empty/a.bin"]
    done = program("-c", SEVERAL, json.dumps([["-m", "checkpoints", name] for name in names]), HF_TOKEN=TOKEN)
    assert REVISIONS["older"] in done.stdout and done.stdout.count("UNet") == 2
    assert done.returncode == 2 and "config.json: diffusers' description of the network cannot be read" in done.stderr
    (server.root / "someone/empty/a.bin").unlink()


def test_one_file_of_diffusers_comes_with_what_describes_it(program, server, tmp_path):
    name = f"google/ddpm-tiny/unet/diffusion_pytorch_model.bin@{REVISIONS['main']}"
    latent = f"CompVis/ldm-tiny/unet/diffusion_pytorch_model.safetensors@{REVISIONS['main']}"
    done = program("-c", SEVERAL, json.dumps([["-m", "checkpoints", name], ["-m", "checkpoints", latent]]))
    assert done.returncode == 0 and "first stage" in done.stdout, done.stderr
    fetched = [asked.partition("resolve/")[2][41:] for asked in server.asked if "ddpm-tiny/resolve/" in asked]
    assert set(fetched) == {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"}
    config, = (tmp_path / "cache").glob("hub/models--google--ddpm-tiny/snapshots/*/unet/config.json")
    config.unlink()
    again = program(ROOT / "sample.py", name, "-n", 1, "--steps", 1)  # a snapshot that is not whole is fetched anew
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("file, wanted", [
    ("unet/diffusion_pytorch_model.bin", {"unet/diffusion_pytorch_model.bin", "unet/config.json", "scheduler/scheduler_config.json"}),
    ("step-5/unet/diffusion_pytorch_model.bin", {"step-5/unet/diffusion_pytorch_model.bin", "step-5/unet/config.json", "scheduler/scheduler_config.json"}),
    ("a.ckpt", {"a.ckpt"}), ("b.ckpt", set())])
def test_what_is_read_with_one_file(file, wanted):
    names = ["README.md", "a.ckpt", "scheduler/scheduler_config.json", *(f"{place}unet/{name}" for place in ("", "step-5/") for name in (
        "config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"))]
    found = diffusers_folder.needed(names, file)
    assert set(found) == wanted and len(found) == len(wanted) and not diffusers_folder.undescribed(found)


def test_folders_of_the_cache(tmp_path):
    folder = tmp_path / "models--google--ddpm"
    for sha in ("1", "2"):
        (folder / "snapshots" / sha).mkdir(parents=True)
    with pytest.raises(InputError, match="has 2 revisions; give one of its folders snapshots/"):
        hub.snapshot_in(folder)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("2\n")
    assert hub.snapshot_in(folder) == folder / "snapshots" / "2"
    shutil.rmtree(folder / "snapshots" / "2")
    assert hub.snapshot_in(folder) == folder / "snapshots" / "1"
    assert hub.snapshot_in(tmp_path) == tmp_path


@pytest.mark.parametrize("name, expected", [
    ("google/ddpm-church-256", True), ("a/b@main", True), ("a/b/c.pt", True), ("a/b.pt", False), ("toyfaces", False),
    ("./a/b", False), ("/a/b", False), ("a/b c", False), ("../a", False), ("runs/photos", False), ("a/b/c/d.ckpt@v1.0", True)])
def test_names(name, expected):
    assert hub.is_name(name) == expected


def test_a_link_to_what_is_not_there_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/models").mkdir(parents=True)
    Path("data/models/ffhq.pt").symlink_to("/not/mounted.pt")
    assert hub.is_name("data/models/ffhq.pt") and pinned("data/models/ffhq.pt") == "data/models/ffhq.pt"
    with pytest.raises(InputError, match="ffhq.pt: .*a link to what is not there"):
        load_source("data/models/ffhq.pt")
