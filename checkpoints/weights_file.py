"""Files of weights as they lie around: known by their first bytes, read without running anything in them."""

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from plumbing import distributed
from plumbing.options import InputError, is_out_of_memory

# What an entry of a training state is called: averaged weights, which are better, and the others.
AVERAGED = ("ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema", "ema_shadow", "params_ema",
            "g_ema", "averaged_model")
PLAIN = ("state_dict", "model_state_dict", "model", "module", "network", "net", "unet", "params", "weights",
         "g")
WRAPPERS = ("module.", "_orig_mod.", "ema_model.")  # DataParallel, torch.compile, a module that averages
# Modules whose mention in a file of weights is no bookkeeping but an attack.
HOSTILE = {"os", "posix", "nt", "sys", "subprocess", "shutil", "builtins", "importlib", "runpy", "pty",
           "socket", "ctypes", "code", "codeop", "pickle", "webbrowser", "threading", "signal"}
PLAIN_TYPES = {"list", "dict", "set", "frozenset", "tuple", "int", "float", "str", "bytes", "bytearray",
               "complex", "bool", "object", "slice", "range"}
# First bytes of what is no file of weights.
OTHERS = {b"\x1f\x8b": "a gzip archive; unpack it",
          b"7z\xbc\xaf": "a 7z archive; unpack it", b"Rar!": "a RAR archive; unpack it",
          b"\x89HDF": "an HDF5 file (Keras, TensorFlow)", b"GGUF": "a GGUF file", b"\x89PNG": "a picture",
          b"\xff\xd8\xff": "a picture", b"%PDF": "a PDF", b"{": "a text file of JSON"}
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of files of weights
LONGEST_HEADER = 100_000_000  # bytes, of safetensors


class StandIn(list):
    """Takes the place of whatever class a file names beside its weights: it does nothing.

    A list, as torch's reader lets nothing else be appended to.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        return list.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        """As later releases of torch refuse it by themselves (2.6 does not)."""
        raise pickle.UnpicklingError(f"Can only SETITEM a dict but got {type(self)}")


class DictStandIn:
    """The same for a class that is filled as a dict is."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict:
        return OrderedDict()


class ListStandIn:
    """The same for one that is filled as a list is: for torch before 2.14, which appends to no StandIn."""

    def __new__(cls, *args: Any, **kwargs: Any) -> list:
        return []


# ---- what it is --------------------------------------------------------------------------------------------

def kind_of(path: Path) -> str:
    """safetensors or torch, by the first bytes, whatever the name.

    Raises InputError that says what the file is instead, or how much of it is missing.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(512)
        header = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{" and header <= LONGEST_HEADER:
            return _whole_safetensors(path, file, header, size)
    if start[:4] == b"PK\x03\x04":
        return _kind_of_zip(path)
    if start[:1] == b"\x80" or start[257:262] == b"ustar":  # a pickle; an archive of torch before 0.1.10
        return "torch"
    if not size:
        raise unreadable(path, "it is empty; download it again")
    if not start.strip(b"\0"):
        raise unreadable(path, "it begins with zeros: a download that was broken off; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise unreadable(path, _pointer(start))
    for first, what in OTHERS.items():
        if start.startswith(first):
            raise unreadable(path, f"it is {what}")
    if start.lstrip()[:1] == b"<":
        raise unreadable(path, "it is a web page; open the link in a browser, confirm the download there")
    raise unreadable(path, "it begins as neither safetensors nor a torch file does; download it again")


def unreadable(path: Path, why: str) -> InputError:
    """The error for a file that holds no weights, or none that can be read."""
    return InputError(f"{path}: not a file of weights that can be read safely: {why}")


def _pointer(start: bytes) -> str:
    """What to do about a file that Git LFS has yet to replace."""
    size = re.search(rb"size (\d+)", start)
    of = f" of {int(size[1]) / 1e6:.0f} MB" if size else ""
    return f"it is a Git LFS pointer to a file{of}; run git lfs pull, or download the file itself"


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        raise unreadable(path, "its end is missing: a download broken off after "
                               f"{path.stat().st_size / 1e6:.1f} MB; download it again") from None
    if any(name.endswith(("constants.pkl", ".py")) or "/code/" in name for name in names):
        raise unreadable(path, "it is a TorchScript archive, a program with its weights; give the weights "
                               "alone")
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    inside = next((name for name in names if name.endswith(SUFFIXES)), None)
    raise unreadable(path, "it is a .zip archive; unpack it" + (f" and give its {inside}" if inside else ""))


def _whole_safetensors(path: Path, file: Any, header: int, size: int) -> str:
    """"safetensors"; InputError unless all bytes that the header announces are there."""
    file.seek(8)
    try:
        entries = json.loads(file.read(header))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        end = max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise unreadable(path, "the header of safetensors is damaged; download it again") from None
    if size != 8 + header + end:
        raise unreadable(path, f"it has {size} bytes where safetensors announces {8 + header + end}; "
                               "download it again")
    return "safetensors"


# ---- what is in it -----------------------------------------------------------------------------------------

def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors of a safetensors or torch file on the CPU, and our own description if there is one.

    Of a training state the averaged weights, or else the others; names without what wrappers put before them.
    Raises InputError for a file that is missing, damaged, or holds no weights, or that wants to run code.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file of weights")
    try:
        kind = kind_of(path)
        if kind == "safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, _own(file.metadata())
        content = _load(path)
    except FileNotFoundError:
        dangling = "a link to what is not there" if path.is_symlink() else "no such file"
        raise InputError(f"{path}: {dangling}") from None
    except (InputError, PermissionError):
        raise
    except Exception as error:  # on damaged bytes torch's unpickler raises nearly every type there is
        if is_out_of_memory(error):
            raise
        raise unreadable(path, _reason(error)) from None
    return unwrapped(chosen(content, path)), None


def read_parts(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """`read_tensors` of a network whose weights are in one file or in several."""
    tensors, own = read_tensors(files[0])
    for part in files[1:]:
        tensors |= read_tensors(part)[0]
    return tensors, own


def read_set(path: Path, name: str) -> dict[str, Tensor]:
    """The weights under this entry of a training state in a torch file; none if it has no such entry."""
    content = _load(Path(path)) if kind_of(Path(path)) == "torch" else {}
    found = content.get(name) if isinstance(content, Mapping) else None
    return unwrapped(without_others(found, path)) if is_weights(found) else {}


def _own(metadata: Mapping[str, str] | None) -> dict[str, Any] | None:
    """Our description in the metadata of a safetensors file; None where somebody else's is, or none."""
    try:
        found = json.loads((metadata or {})["description"])
    except (KeyError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() & {"network", "source"} else None


def _load(path: Path) -> Any:
    """The content of a torch file, read by torch's own reader of data alone.

    A class that it does not know, an argparse.Namespace say, becomes a StandIn, one that is filled as a
    dict is a DictStandIn, one filled as a list a ListStandIn; then the file is read anew.
    """
    places: dict[str, type] = {}
    while True:
        known = [(place, name) for name, place in places.items()]
        try:
            # By the file, not by its name: torch reads what is called .safetensors as that.
            with torch.serialization.safe_globals(known), open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            text = str(error)
            if found := re.search(r"Unsupported global: GLOBAL (\S+) was", text):
                name = f"builtins.{found[1]}" if found[1] in PLAIN_TYPES else found[1]
                module, _, of_class = name.rpartition(".")
                place = type(of_class, (StandIn,), dict(__module__=module))
            elif found := re.search(r"Can only SETITEMS? .* but got <class '(\S+)'>", text):
                name, place = found[1], DictStandIn
            elif found := re.search(r"Can only (?:append|extend) .* but got <class '(\S+)'>", text):
                name, place = found[1], ListStandIn
            else:
                raise
            plain = name.removeprefix("builtins.") in PLAIN_TYPES
            hostile = "." not in name or name.split(".")[0] in HOSTILE and not plain
            if hostile or places.get(name) in (DictStandIn, ListStandIn):
                raise
            places[name] = place


def _reason(error: Exception) -> str:
    """Why a torch file could not be read, in a line."""
    text = str(error)
    if wanted := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {wanted[1]}, which is code, not data"
    if isinstance(error, pickle.UnpicklingError) or not text:
        return "its content is damaged; download it again"
    return text.splitlines()[0][:160]


def chosen(content: Any, path: Path) -> dict[str, Tensor]:
    """The weights in the content of a torch file: itself, or the entry of a training state that has them.

    Says which entry, and what is left out.  Raises InputError that names the entries there are.
    """
    if isinstance(content, StandIn):
        name = f"{type(content).__module__}.{type(content).__name__}"
        raise InputError(f"{path}: a pickled object of class {name}, whose code is not run; save its "
                         "state_dict() alone")
    if isinstance(content, Mapping) and {"parameters", "optimizer", "iteration"} <= content.keys():
        raise InputError(f"{path}: the training state of a run; give its folder, {path.parent}")
    found = dict(sets_of_weights(content))
    averaged = [name for name in found if set(AVERAGED) & set(name.split("."))]
    if isinstance(content, (list, tuple)) and len(found) > 1:  # [model, optimizer, epoch, step, ema]
        averaged = list(found)[-1:]
    plain = [name for name in found if set(PLAIN) & set(name.split("."))]
    if "" in found:
        return without_others(found[""], path)
    if name := next(iter(averaged + plain + (list(found) if len(found) == 1 else [])), None):
        what = "the averaged weights" if name in averaged else "the weights"
        if len(found) > 1:
            distributed.say_once(f"{path}: a training state, of which {what} are taken, entry '{name}'")
        return without_others(found[name], path)
    if found:
        raise InputError(f"{path}: holds several sets of weights, {', '.join(found)}; save one of them alone")
    if isinstance(content, Mapping) and "param_groups" in content:
        raise InputError(f"{path}: the state of an optimiser, without weights; give the file of weights "
                         "beside it")
    raise InputError(f"{path}: holds something else than a flat dict of tensors; save the model's "
                     "state_dict() alone")


def sets_of_weights(content: Any, name: str = "", depth: int = 2) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict of tensors in nested dicts and lists, with the names that lead there, joined by dots.

    What belongs to an optimiser is left out.
    """
    if is_weights(content):
        yield name, content
    elif depth and isinstance(content, (Mapping, list, tuple)) and not isinstance(content, StandIn):
        entries = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, entry in entries:
            if not str(key).startswith(("opt", "lr_", "sched", "callbacks", "loops")):
                yield from sets_of_weights(entry, f"{name}.{key}".lstrip("."), depth - 1)


def is_weights(entry: Any) -> bool:
    """Whether this is a dict of which at least half are tensors, under names."""
    if not isinstance(entry, Mapping) or not all(isinstance(name, str) for name in entry):
        return False
    tensors = sum(isinstance(value, Tensor) for value in entry.values())
    return tensors > 0 and 2 * tensors >= len(entry)


def without_others(weights: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Of these entries the tensors; says which others are left out."""
    others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        distributed.say_once(f"{path}: leaving out {', '.join(others[:5])}, no tensors")
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names that they had before DataParallel, torch.compile or an average of modules."""
    if any(name.startswith("ema_model.") for name in tensors):  # beside it online_model and counters
        tensors = {name: value for name, value in tensors.items() if name.startswith("ema_model.")}
    tensors = {name: value for name, value in tensors.items() if name != "n_averaged"}  # of AveragedModel
    while start := next((w for w in WRAPPERS if tensors and all(key.startswith(w) for key in tensors)), ""):
        tensors = {name.removeprefix(start): value for name, value in tensors.items()}
    return tensors
