"""Networks by their name on the Hugging Face Hub: owner/name, owner/name@revision, owner/name/file.ckpt.

Cache, offline mode, endpoint and tokens are huggingface_hub's: HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT,
HF_TOKEN.
"""

import re
from pathlib import Path

from checkpoints.diffusers_folder import missing_first_stage, needed, undescribed
from checkpoints.weights_file import SUFFIXES
from plumbing import distributed
from plumbing.options import InputError

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<file>/[\w./-]+)?(@(?P<revision>[\w./-]+))?")
TIMEOUT = 20  # seconds
COMMIT = re.compile(r"[0-9a-f]{40}")
# Names worth trying.
KNOWN = ("google/ddpm-{celebahq,church,bedroom,cat}-256 and "
         "google/ddpm-ema-{celebahq,church,bedroom,cat}-256",
         "google/ddpm-cifar10-32", "CompVis/ldm-celebahq-256 (latents)")


def is_name(name: str) -> bool:
    """Whether this can be the name of a network on the Hub, not of a file or run that is not there."""
    found = NAME.fullmatch(name)
    if not found or name.startswith((".", "runs/")):
        return False
    return bool(found["file"]) or not name.endswith(SUFFIXES)


def snapshot_in(folder: Path) -> Path:
    """The files in a folder of huggingface_hub's cache, models--OWNER--NAME: of its main branch, or of the
    only revision there is.  Any other folder as it is.
    """
    if not (folder / "snapshots").is_dir():
        return folder
    kept = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file() and (there := folder / "snapshots" / main.read_text().strip()) in kept:
        return there
    if len(kept) != 1:
        raise InputError(f"{folder}: has {len(kept)} revisions; give one of its folders snapshots/*")
    return kept[0]


def fetch(name: str) -> Path:
    """The folder or file of a network on the Hub, in the cache; only what is read is downloaded.

    Raises InputError, in one line: there is no such repository, it is gated, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars
    if distributed.rank() != 0:
        disable_progress_bars()
    asked = NAME.fullmatch(name)
    repo, file, revision = asked["repo"], asked["file"], asked["revision"]
    if revision and COMMIT.fullmatch(revision) and (there := _cached(repo, file, revision)):
        return there  # a commit does not change: nothing has to be asked
    try:
        listed = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
        files = [entry.rfilename for entry in listed.siblings]
        wanted = needed(files, file and file[1:])
        if not wanted:
            raise InputError(f"{name}: has no such file" if file else f"{name}: holds no weights that are "
                                                                      "known here")
        return _inside(Path(snapshot_download(repo, revision=revision, allow_patterns=wanted)), file)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    except errors.GatedRepoError:
        raise InputError(f"{name}: is gated; accept its terms at https://huggingface.co/{repo}, then hf "
                         "auth login (or HF_TOKEN)") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{name}: no such file or folder here, and no such repository on the Hugging Face "
                         "Hub (or a private one: hf auth login)") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name}: the repository has no revision {revision}") from None
    except Exception as error:  # without a network, of the types of whichever library it speaks HTTP with
        if there := _cached(repo, file, revision):
            return there
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise InputError(f"{name}: no such file or folder here, not whole in the cache of huggingface_hub, "
                         f"and the Hugging Face Hub cannot be asked ({reason})") from None


def _cached(repo: str, file: str | None, revision: str | None) -> Path | None:
    """The folder or file in the cache, for a client that is offline; None unless all that is read is
    there."""
    from huggingface_hub import constants
    kept = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    ref = kept / "refs" / (revision or "main")
    folder = kept / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision or "main")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        there = needed(names, file and file[1:])
    except InputError:  # parts are missing
        return None
    alone = file and len(there) == 1
    whole = there and not undescribed(there) and (alone or not missing_first_stage(folder))
    return _inside(folder, file) if whole else None


def _inside(folder: Path, file: str | None) -> Path:
    return folder / file[1:] if file else folder


def pinned(name: str, path: Path) -> str:
    """The name with the commit that its files in the cache are of."""
    repo = NAME.fullmatch(name)["repo"]  # folders above and in the repository may be called snapshots, too
    commit = path.parts[path.parts.index(f"models--{repo.replace('/', '--')}") + 2]
    return f"{name.partition('@')[0]}@{commit}"
