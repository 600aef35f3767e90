"""Pictures in, tensors out: image files of nearly any kind; and a grid of pictures as one PNG.

Everything returned here is float32 (N, 3, size, size) in [-1, 1] unless it says uint8.
"""

import warnings
from pathlib import Path

import numpy as np
import pillow_heif
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from plumbing.files import write_atomic
from plumbing.options import InputError, is_out_of_memory

pillow_heif.register_heif_opener()  # the photos of phones
# Colour profiles and texts beside a picture may be large; Pillow's limits take that for an attack.
warnings.filterwarnings("ignore", module=r"PIL\.")  # of faulty EXIF, and of many pixels, which we refuse
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20
# Pillow "opens" these without decoding them, except for EPS and WMF, which it hands to another program.
NOT_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF"}
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in set(Image.OPEN) - NOT_PICTURES}
FORMATS = sorted(set(Image.OPEN) - NOT_PICTURES)
ORIENTATION = 0x0112  # the tag of EXIF; its values and what turns the picture upright:
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
           7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def to_tensor(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, H, W, 3), array or tensor -> float32 (N, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float (N, 3, H, W), [-1, 1] (beyond it is clamped) -> uint8 tensor (N, H, W, 3) on the CPU."""
    pixels = ((images.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


def read_array(path: str | Path) -> Tensor:
    """A PNG written by this program, as it is -> uint8 tensor (H, W, 3)."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def save_picture(path: Path, pixels: Tensor) -> None:
    """uint8 (H, W, 3) -> PNG, atomically."""
    write_atomic(path, lambda temporary: Image.fromarray(pixels.numpy()).save(temporary, "PNG"))


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height, without decoding; InputError for what is no picture."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception:  # as in read_pixels, which says what is wrong
        read_pixels(path, 1)
        raise


def load_image(path: str | Path, size: int) -> Tensor:
    """One image file -> float32 (3, size, size) in [-1, 1].

    Turned upright, cut to its centre square, scaled with antialiasing, transparent parts on white.  Raises
    InputError for what is not an intact image, and for a picture whose shorter side is under size / 2.
    """
    return to_tensor(read_pixels(path, size)[None])[0]


def read_pixels(path: str | Path, size: int) -> Tensor:
    """As load_image, but as a uint8 tensor (size, size, 3)."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            # Before decoding: turning it upright does not change the shorter side.
            if min(image.size) < size / 2:
                raise InputError(f"{path}: too small ({image.width}x{image.height}) for size {size}; "
                                 f"its shorter side must be at least {(size + 1) // 2} pixels")
            image.load()
            upright = _to_rgb(_upright(image), path)
            square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    except InputError:
        raise
    except FileNotFoundError:
        what = "a link to what is not there" if Path(path).is_symlink() else "no such file"
        raise InputError(f"{path}: {what}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give an image file") from None
    except PermissionError:
        raise InputError(f"{path}: cannot be read, permission denied; check its permissions") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: is not an image, or of a kind that cannot be read; "
                         "remove or convert it") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller") from None
    except Exception as error:  # Pillow's decoders raise nearly every type there is on a damaged file
        if is_out_of_memory(error):
            raise
        cause = " ".join(str(error).split())
        raise InputError(f"{path}: broken or truncated image ({cause}); remove or replace it") from error
    return torch.from_numpy(np.array(square))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its orientation says; whatever else is in its EXIF, however faulty, does not matter."""
    try:
        turn = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow raises nearly every type there is on damaged EXIF
        return image
    return image.transpose(UPRIGHT[turn]) if isinstance(turn, int) and turn in UPRIGHT else image


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Pillow image of any mode -> mode RGB."""
    if image.mode[0] in "IF":
        return _wide_grey(image, path).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _wide_grey(image: Image.Image, path: Path) -> Image.Image:
    """Grey of more than 8 bits -> mode L.

    Pillow's own conversion would clip at 255 what ranges to 65535 or only to 1.
    """
    values = np.asarray(image).astype(np.float64)
    white = 65535 if image.mode[0] == "I" else 1 if values.max() <= 1 else 255
    if not (values.min() >= 0 and values.max() <= white):  # also true for NaN
        raise InputError(f"{path}: grey values from {values.min():g} to {values.max():g} have no known "
                         "white; save it with 8 or 16 bits a pixel, or as floats in 0..1")
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def save_grid(path: Path, images: Tensor, columns: int, gap_after: int | None = None,
              labels: list[str] | None = None) -> None:
    """images (N, 3, H, W) in [-1, 1], row by row -> one PNG.

    Small ones are enlarged, with hard edges, to about 128 pixels.

    gap_after   a wider gap below every so many rows, to show pairs of rows; the last row must be full
    labels      a text to the left of each row
    """
    pixels = to_uint8(images)                                                  # (N, H, W, 3)
    enlarge = max(1, 128 // pixels.shape[1])
    pixels = pixels.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    n, height, width, _ = pixels.shape
    rows, gap = -(-n // columns), 4
    tops = [r * (height + gap) + (r // gap_after * 3 * gap if gap_after else 0) for r in range(rows)]
    font = ImageFont.load_default(20)
    margin = round(max(map(font.getlength, labels))) + 16 if labels else 0
    page = tops[-1] + height, margin + columns * (width + gap) - gap
    canvas = torch.full((*page, 3), 255, dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        top, left = tops[i // columns], margin + i % columns * (width + gap)
        canvas[top:top + height, left:left + width] = picture
    image = Image.fromarray(canvas.numpy())
    pen = ImageDraw.Draw(image)
    for top, label in zip(tops, labels or []):
        pen.text((margin - 8, top + height / 2), label, fill="black", anchor="rm", font=font)
    write_atomic(path, lambda temporary: image.save(temporary, "PNG"))
