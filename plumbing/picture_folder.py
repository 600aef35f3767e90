"""Folders of pictures: which files are taken and which are left out, and reading many.

Everything returned here is float32 (N, 3, size, size) in [-1, 1] unless it says uint8.
"""

import collections
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from plumbing import distributed, progress
from plumbing.options import InputError
from plumbing.pictures import SUFFIXES, load_image, read_pixels, size_of, to_tensor

MEMORY = 512 * 2**20  # bytes of decoded pictures that are kept
AHEAD = 4  # batches
JUNK = {"thumbs.db", "desktop.ini", "__macosx"}  # of file managers; hidden files are not named either


def files_below(folder: Path, links: bool) -> Iterator[Path]:
    """All files in a folder and its subfolders, with `links` in linked ones, too; hidden ones and junk left
    out.
    """
    visited = set()
    for place, folders, names in os.walk(folder, followlinks=links):
        if (real := os.path.realpath(place)) in visited:  # a link to a folder above would never end
            folders.clear()
            continue
        visited.add(real)
        kept = [name for name in folders if not _is_junk(name)]
        folders[:] = sorted(kept, key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        yield from (Path(place) / name for name in names if not _is_junk(name))


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def is_image(path: Path) -> bool:
    """Whether a file is called as a picture is."""
    return path.suffix.lower() in SUFFIXES


def refuse_pictures(out: Path) -> None:
    """InputError if the folder for a new run holds pictures: those of the run would stand among them."""
    if out.is_dir() and (found := [path.name for path in out.iterdir() if is_image(path)]):
        raise InputError(f"--output-dir {out}: holds pictures ({min(found)}), among which a run would write "
                         "its own; choose another")


def list_images(folder: str | Path, recursive: bool = False, remedy: str = "") -> list[Path]:
    """Paths of the image files in `folder`, by suffix, sorted; says what else is there and left out.

    recursive   those in subfolders, too
    remedy      what to do about pictures in subfolders
    Raises InputError for what is not a folder with at least one of them.
    """
    folder = Path(folder)
    try:
        right_here = {path for path in folder.iterdir() if not _is_junk(path.name)}
    except FileNotFoundError:
        raise InputError(f"{folder}: no such folder") from None
    except NotADirectoryError:
        raise InputError(f"{folder}: is a file; give a folder of images") from None
    except PermissionError:
        raise InputError(f"{folder}: cannot be read, permission denied; check its permissions") from None
    below = sorted(files_below(folder, links=recursive))
    runs = {path.parent for path in below if path.name == "metrics.jsonl" and path.parent != folder}
    below = [path for path in below if runs.isdisjoint(path.parents)] if runs else below
    looked_at = [path for path in below if recursive or path in right_here]
    taken = [path for path in looked_at if is_image(path)]
    deeper = [path for path in below if is_image(path) and path not in right_here] if not recursive else []
    notes = [describe_left_out([path for path in looked_at if not is_image(path)])]
    if runs and recursive:
        notes.append(f"what runs have made ({min(runs)})")
    if deeper:
        what = f"{len(deeper)} {'more ' if taken else ''}pictures in subfolders, such as {deeper[0].parent}"
        notes.append(what + (f": {remedy}" if remedy else ""))
    left_out = "; ".join(filter(None, notes))
    if not taken:
        there = f"; it holds {left_out}" if left_out else ""
        raise InputError(f"{folder}: no images in this folder (.jpg, .png, .heic, .webp, .tif and the "
                         f"like){there}")
    if left_out:
        distributed.say_once(f"note: {folder}: left out are {left_out}")
    return taken


def describe_left_out(paths: list[Path]) -> str:
    """How many files of which kinds, and an example of each: "8 .cr2 (IMG_1.CR2)"; empty if there are
    none."""
    kinds = collections.Counter(path.suffix.lower() for path in paths)
    examples = {path.suffix.lower(): path.name for path in reversed(paths)}
    return ", ".join(f"{n} {kind or 'without suffix'} ({examples[kind]})" for kind, n in kinds.most_common(5))


def load_folder(folder: str | Path, size: int, recursive: bool = False) -> Tensor:
    """All images of `folder` by name, all in memory.

    Says which lose more than a third by being cut to a square, and which are the same as others.  Raises
    InputError as list_images does, and for all that load_image refuses.
    """
    paths = list_images(folder, recursive, remedy="--recursive takes them")
    images, refused = {}, {}
    for path in paths:
        try:
            images[path] = load_image(path, size)
        except InputError as error:
            refused[path] = error
    if refused:
        (_, why), *more = refused.items()
        raise InputError(f"{why}" + (f"; nor can be taken {some(path for path, _ in more)}" if more else ""))
    if cut := [path for path in paths if 3 * min(shape := size_of(path)) < 2 * max(shape)]:
        distributed.say_once(f"note: {folder}: {len(cut)} of {len(paths)} pictures lose more than a third in "
                             f"being cut to their centre square: {some(cut)}")
    first: dict[str, Path] = {}  # of each picture
    if again := [path for path, image in images.items() if first.setdefault(hash_of(image), path) != path]:
        distributed.say_once(f"note: {folder}: {len(again)} of {len(paths)} pictures are the same as others: "
                             f"{some(again)}")
    return torch.stack([*images.values()])


def hash_of(pictures: Tensor) -> str:
    """Tells a picture, or several (K, 3, H, W), from other ones."""
    return hashlib.sha256(pictures.numpy().tobytes()).hexdigest()


def some(paths: Iterable[Path]) -> str:
    """The names of the first few."""
    names = [path.name for path in paths]
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def name_of(folder: str | Path) -> str:
    """What to call a folder of pictures: its own name, also where it is given as "."."""
    return os.fsencode(Path(folder).resolve().name).decode("utf-8", "replace")


class ImageFolder:
    """A folder of any size, read as needed: `folder[i]` is one picture, float32 (3, size, size).

    recursive   with the pictures in subfolders
    skip        leave damaged pictures out, and say which.  All that can be kept in memory are looked at now,
                of the others the first bytes; one that turns out damaged later is replaced by the next.

    Raises InputError as list_images and, without `skip`, load_image do.
    """

    def __init__(self, folder: str | Path, size: int, recursive: bool = False, skip: bool = False) -> None:
        self.paths, self.size, self.skip = list_images(folder, recursive), size, skip
        self.kept: dict[Path, Tensor] = {}
        self.keep = len(self.paths) * size * size * 3 <= MEMORY
        if skip:
            self._leave_out_damaged(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return to_tensor(self.pixels(i)[None])[0]

    def pixels(self, i: int) -> Tensor:
        """uint8 (size, size, 3)."""
        path = self.paths[i]
        if path in self.kept:
            return self.kept[path]
        pixels = read_pixels(path, self.size)
        if self.keep:
            self.kept[path] = pixels
        return pixels

    def batch(self, indices: Iterable[int]) -> Tensor:
        """indices (B,), tensor or list -> float32 (B, 3, size, size)."""
        return self._stacked((i, self._pixels_or_fault(i)) for i in map(int, indices))

    def batches(self, order: Iterable[Iterable[int]]) -> Iterator[Tensor]:
        """`batch` of these indices, one after the other: what memory cannot keep is read before it is asked
        for.
        """
        return map(self.batch, order) if self.keep else map(self._stacked, self._read(order))

    def _stacked(self, found: Iterable[tuple[int, Tensor | str]]) -> Tensor:
        """Indices, each with its pixels or what is wrong with the picture -> float32 (B, 3, size, size)."""
        return to_tensor(torch.stack([self._sound(i, pixels) for i, pixels in found]))

    def _read(self, batches: Iterable[Iterable[int]]) -> Iterator[list[tuple[int, Tensor | str]]]:
        """The indices of each batch, each with its pixels or what is wrong with the picture; the next AHEAD
        batches are being read meanwhile.

        By threads: Pillow decodes and scales without holding the interpreter.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        pool = ThreadPoolExecutor(max(1, cores // distributed.world()))
        waiting = collections.deque()
        try:
            for batch in batches:
                waiting.append([(i, pool.submit(self._pixels_or_fault, i)) for i in map(int, batch)])
                if len(waiting) > AHEAD:
                    yield [(i, future.result()) for i, future in waiting.popleft()]
            while waiting:
                yield [(i, future.result()) for i, future in waiting.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)

    def _leave_out_damaged(self, folder: str | Path) -> None:
        sound = []
        parts = torch.arange(len(self)).split(32)
        looks = self._read(parts) if self.keep else map(self._first_bytes, parts)
        for found in progress.bar(looks, f"reading {Path(folder).name}", total=len(parts)):
            for i, pixels in found:
                if isinstance(pixels, str):
                    progress.say(f"left out: {pixels}")
                    continue
                sound.append(self.paths[i])
        if not sound:
            raise InputError(f"{folder}: none of its {len(self.paths)} pictures can be read")
        self.paths = sound

    def _first_bytes(self, part: Tensor) -> list[tuple[int, str | None]]:
        """Indices, each with what is wrong with the picture, as far as it shows without decoding it; None
        where nothing is.
        """
        faults = []
        for i in part.tolist():
            try:
                small = 2 * min(size_of(self.paths[i])) < self.size
                faults.append((i, f"{self.paths[i]}: too small for size {self.size}" if small else None))
            except InputError as error:
                faults.append((i, str(error)))
        return faults

    def _pixels_or_fault(self, i: int) -> Tensor | str:
        """The pixels, or what is wrong with the picture."""
        try:
            return self.pixels(i)
        except InputError as error:
            return str(error)

    def _sound(self, i: int, pixels: Tensor | str) -> Tensor:
        """These pixels or, for a damaged picture that is to be skipped, those of the next sound one."""
        faults = 0
        while isinstance(pixels, str):
            if not self.skip or faults == len(self):
                raise InputError(pixels)
            distributed.say_once(f"left out: {pixels}")
            i, faults = (i + 1) % len(self), faults + 1
            pixels = self._pixels_or_fault(i)
        return pixels
