"""Every kind of picture a user may bring, with values checked, and every way it can be wrong."""

import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from plumbing import picture_folder
from plumbing.options import InputError
from plumbing.picture_folder import ImageFolder, list_images, load_folder
from plumbing.pictures import load_image, read_pixels, to_tensor, to_uint8


def grey_value(image):
    """Mean of a loaded picture, which has to be grey and even."""
    assert image.dtype == torch.float32 and image.shape[0] == 3
    assert image.max() - image.min() < 0.02
    return image.mean().item()


def colour(image):
    """The uint8 colour of an even picture (3, H, W)."""
    return to_uint8(image[None])[0].float().mean((0, 1)).round().int().tolist()


def fails(call, *names):
    """The one-line message of the InputError that `call` raises; it has to contain all of `names`."""
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for name in names:
        assert str(name) in message
    return message


@pytest.fixture
def png(tmp_path):
    """Function that writes an 8x8 picture of one colour and returns its path."""
    def write(name="a.png", colour=(255, 0, 0), size=(8, 8), mode="RGB"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path)
        return path
    return write


# Kinds of picture

def test_rgb_and_range(png):
    image = load_image(png(), 8)
    assert image.dtype == torch.float32 and image.shape == (3, 8, 8)
    assert (image[0] == 1).all() and (image[1:] == -1).all()


@pytest.mark.parametrize("name, mode, value, expected", [
    ("l.png", "L", 255, (255, 255, 255)),
    ("one.png", "1", 1, (255, 255, 255)),
    ("la.png", "LA", (0, 128), (127, 127, 127)),  # half-transparent black on white
    ("rgba.png", "RGBA", (255, 0, 0, 0), (255, 255, 255)),  # transparent red is white
    ("half.webp", "RGBA", (0, 0, 255, 128), (127, 127, 255)),
    ("cmyk.jpg", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("cmyk.tif", "CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("ycc.jpg", "YCbCr", (76, 85, 255), (254, 0, 0)),
    ("rgb.webp", "RGB", (0, 0, 255), (0, 0, 255)),
    ("rgb.bmp", "RGB", (1, 2, 3), (1, 2, 3)),
])
def test_modes(png, name, mode, value, expected):
    got = colour(load_image(png(name, value, mode=mode), 8))
    assert np.abs(np.subtract(got, expected)).max() <= (3 if name.endswith(("jpg", "webp")) else 1)


@pytest.mark.parametrize("name", ["p.png", "p.gif"])
def test_palette_with_and_without_transparency(tmp_path, name):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 0, 200, 0])
    image.save(tmp_path / name)
    assert colour(load_image(tmp_path / name, 8)) == [0, 200, 0]
    image.save(tmp_path / name, transparency=1)
    assert colour(load_image(tmp_path / name, 8)) == [255, 255, 255]


def test_rgb_png_with_a_transparent_colour(tmp_path):
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "t.png", transparency=(9, 9, 9))
    assert colour(load_image(tmp_path / "t.png", 8)) == [255, 255, 255]


@pytest.mark.parametrize("name, dtype, white", [
    ("16.png", np.uint16, 65535), ("16.tif", np.uint16, 65535), ("32.tif", np.int32, 65535),
    ("unit.tif", np.float32, 1), ("bytes.tif", np.float32, 255)])
def test_wide_grey_is_scaled_not_clipped(tmp_path, name, dtype, white):
    for share in (0, 0.5, 1):
        values = np.full((8, 8), share * white, dtype)
        values[0, 0] = white  # F tells 0..1 from 0..255 by its brightest pixel
        Image.fromarray(values).save(tmp_path / name)
        image = load_image(tmp_path / name, 8)
        assert image[:, 0, 0].tolist() == [1, 1, 1]
        assert abs(grey_value(image[:, 1:]) - (2 * share - 1)) < 0.01


@pytest.mark.parametrize("value", [-1, 256, float("nan")])
def test_float_without_a_known_white(tmp_path, value):
    values = np.full((8, 8), 0.5, np.float32)
    values[3, 3] = value
    Image.fromarray(values).save(tmp_path / "f.tif")
    fails(lambda: load_image(tmp_path / "f.tif", 8), tmp_path / "f.tif", "grey values")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_as_pillow_turns_it(orientation, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)  # no symmetry
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    torch.testing.assert_close(load_image(tmp_path / "turned.png", 16), to_tensor(np.array(expected)[None])[0], atol=1e-2, rtol=0)


def test_exif_orientation_6_turns_clockwise(tmp_path):
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 16, 8))  # top half as stored
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "plain.jpg", quality=100)
    image.save(tmp_path / "turned.jpg", quality=100, exif=exif)
    plain, turned = (load_image(tmp_path / name, 16) for name in ("plain.jpg", "turned.jpg"))
    assert plain[:, :8].min() > 0.9 and plain[:, 8:].max() < -0.9
    assert turned[:, :, 8:].min() > 0.9 and turned[:, :, :8].max() < -0.9  # shown: right half
    assert torch.equal(turned, plain.rot90(-1, (1, 2)))


# Geometry

@pytest.mark.parametrize("wide", [True, False])
def test_centre_crop(tmp_path, wide):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels if wide else pixels.transpose(1, 0, 2)).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", 8) == 1).all()


def test_reducing_is_antialiased(tmp_path):
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "a.png")
    assert abs(grey_value(load_image(tmp_path / "a.png", 16)[:, 1:-1, 1:-1])) < 0.02


def test_same_size_is_exact(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(to_uint8(load_image(tmp_path / "a.png", 8)[None])[0].numpy(), pixels)


def test_small_pictures(png):
    assert load_image(png(size=(4, 9)), 8).shape == (3, 8, 8)  # half the size: enlarged
    fails(lambda: load_image(png(size=(3, 9)), 8), "a.png", "too small", "3x9")


# Wrong files

@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_truncated_file(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    load_image(path, 8)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    fails(lambda: load_image(path, 8), path)


def test_damaged_file(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[200:2000] = bytes(1800)
    (tmp_path / "a.png").write_bytes(content)
    fails(lambda: load_image(tmp_path / "a.png", 8), tmp_path / "a.png", "broken")


GHOSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"  # Pillow would run it


@pytest.mark.parametrize("content", [b"", b"just text\n", GHOSTSCRIPT])
def test_not_an_image(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    fails(lambda: load_image(tmp_path / "a.png", 8), tmp_path / "a.png", "not an image")
    fails(lambda: load_folder(tmp_path, 8), tmp_path / "a.png", "not an image")


@pytest.mark.parametrize("limit", [40, 20])  # of 64 pixels: Pillow warns above it, refuses above twice of it
def test_decompression_bomb(png, monkeypatch, limit):
    path = png()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    fails(lambda: load_image(path, 8), path, f"more than {limit} pixels")


def test_missing_and_folder_and_permissions(tmp_path, png, monkeypatch):
    fails(lambda: load_image(tmp_path / "none.png", 8), tmp_path / "none.png", "no such file")
    fails(lambda: load_image(tmp_path, 8), tmp_path, "is a folder")
    path = png()
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything
        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")
        monkeypatch.setattr(Image, "open", refuse)
        monkeypatch.setattr(picture_folder.Path, "iterdir", refuse)
    tmp_path.chmod(0o300)
    fails(lambda: load_image(path, 8), path, "permission denied")
    fails(lambda: list_images(tmp_path), tmp_path, "permission denied")
    tmp_path.chmod(0o700)


# Folders

def test_list_images(tmp_path, png):
    for name in ("b.PNG", "a.jpg", "c.webp", ".hidden.png", "sub/d.png"):
        png(name)
    (tmp_path / "folder.png").mkdir()
    for name in ("notes.txt", "weights.h5", "figure.eps", "README"):
        (tmp_path / name).write_text("x")
    assert list_images(tmp_path) == [tmp_path / "a.jpg", tmp_path / "b.PNG", tmp_path / "c.webp"]
    assert list_images(str(tmp_path)) == list_images(tmp_path)


def test_wrong_folders(tmp_path, png):
    fails(lambda: list_images(tmp_path / "none"), tmp_path / "none", "no such folder")
    (tmp_path / "empty").mkdir()
    fails(lambda: list_images(tmp_path / "empty"), tmp_path / "empty", "no images")
    fails(lambda: list_images(png()), tmp_path / "a.png", "is a file")
    png("sub/d.png")
    (tmp_path / "a.png").unlink()
    fails(lambda: list_images(tmp_path), tmp_path, "subfolders", tmp_path / "sub")


def test_load_folder(tmp_path, png):
    for i, value in enumerate((0, 128, 255)):
        png(f"{i}.png", (value,) * 3)
    images = load_folder(tmp_path, 8)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
    assert [round(image.mean().item(), 1) for image in images] == [-1, 0, 1]


@pytest.mark.parametrize("kept", [True, False])
def test_image_folder(tmp_path, png, monkeypatch, kept):
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(picture_folder, "MEMORY", 4 * 8 * 8 * 3 - (not kept))
    reads, read = [], read_pixels
    monkeypatch.setattr(picture_folder, "read_pixels", lambda path, size: reads.append(path) or read(path, size))
    folder = ImageFolder(tmp_path, 8)
    assert len(folder) == 4 and not reads
    every = torch.stack([folder[i] for i in range(4)])
    assert torch.equal(folder.batch(torch.tensor([2, 0, 2])), every[[2, 0, 2]])
    assert torch.equal(folder.batch([-1]), every[3:])
    assert len(reads) == (4 if kept else 8)
    assert torch.equal(every, load_folder(tmp_path, 8))
    with pytest.raises(IndexError):
        folder[4]


def many(folder, n=100):
    """A folder of so many pictures, of which three are damaged or too small."""
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    (folder / "010.png").write_bytes((folder / "010.png").read_bytes()[:-300])
    (folder / "020.png").write_text("<html>")
    Image.new("RGB", (3, 9)).save(folder / "030.png")
    return folder


@pytest.mark.parametrize("kept", [True, False])
def test_damaged_pictures_are_left_out_and_named(tmp_path, monkeypatch, capfd, kept):
    sound = ImageFolder(many(tmp_path / "a"), 8).batch([9, 11, 19, 31])
    monkeypatch.setattr(picture_folder, "MEMORY", 10**9 if kept else 0)
    folder = ImageFolder(tmp_path / "a", 8, skip=True)
    assert len(folder) == (97 if kept else 98)  # that the end of 010.png is missing shows only when it is read
    places = [folder.paths.index(tmp_path / "a" / f"{i:03d}.png") for i in (9, 11, 19, 31)]
    assert folder.batch(places).equal(sound)
    order = [[3, 1], [9, 10], places]
    expected = [folder.batch(indices) for indices in order]
    state = torch.random.get_rng_state()
    assert all(found.equal(batch) for found, batch in zip(folder.batches(map(torch.tensor, order)), expected, strict=True))
    assert torch.random.get_rng_state().equal(state)
    said = "".join(capfd.readouterr())
    assert all(f"left out: {tmp_path}/a/{name}.png: " in said for name in ("010", "020", "030"))
    with pytest.raises(InputError, match="010.png: broken or truncated image"):
        ImageFolder(tmp_path / "a", 8).batch([10])


def test_a_folder_of_nothing_but_damaged_pictures(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_text("x")
    with pytest.raises(InputError, match="none of its 3 pictures can be read"):
        ImageFolder(tmp_path, 8, skip=True)


def test_what_is_left_out_is_named(tmp_path, png, capsys):
    png("a.jpg")
    for name in ("b.CR2", "c.cr2", "photo", "d.jpeg?width=640", ".hidden", "Thumbs.db"):
        (tmp_path / name).touch()
    png("sub/e.png"), png("sub/deep/f.png")
    assert list_images(tmp_path, remedy="do this") == [tmp_path / "a.jpg"]
    assert capsys.readouterr().out == (f"note: {tmp_path}: left out are 2 .cr2 (b.CR2), 1 .jpeg?width=640 (d.jpeg?width=640),"
                                       f" 1 without suffix (photo); 2 more pictures in subfolders, such as {tmp_path}/sub/deep:"
                                       " do this\n")
    assert [path.name for path in list_images(tmp_path, recursive=True)] == ["a.jpg", "f.png", "e.png"]
    other = tmp_path.with_name(tmp_path.name + "-linked")
    other.mkdir()
    (other / "photos").symlink_to(tmp_path)
    (tmp_path / "z-back").symlink_to(tmp_path)  # never ends, if followed
    assert [path.name for path in list_images(other, recursive=True)] == ["a.jpg", "f.png", "e.png"]
    (tmp_path / "a.jpg").unlink()
    fails(lambda: list_images(tmp_path), "no images in this folder", "it holds 2 .cr2", "2 pictures in subfolders")


def test_a_wide_picture_loses_more_than_a_third(tmp_path, png, capsys):
    png("a.png", size=(8, 12)), png("b.png", size=(24, 16)), png("c.png", size=(8, 13))
    load_folder(tmp_path, 8)
    assert "1 of 3 pictures lose more than a third in being cut to their centre square: c.png" in capsys.readouterr().out


def test_all_pictures_that_cannot_be_taken_are_named(tmp_path, png):
    png("a.png"), png("b.png", size=(2, 2)), (tmp_path / "c.png").write_text("x"), png("d.png", size=(2, 2))
    fails(lambda: load_folder(tmp_path, 8), "b.png: too small (2x2) for size 8", "; nor can be taken c.png, d.png")


def test_what_runs_have_made_is_not_learnt_from(tmp_path, png, capsys):
    png("a.png"), png("sub/b.png"), png("runs/x/samples.png"), png("runs/x/progress/000001.png")
    (tmp_path / "runs" / "x" / "metrics.jsonl").touch()
    assert [path.name for path in list_images(tmp_path, recursive=True)] == ["a.png", "b.png"]
    assert f"left out are what runs have made ({tmp_path}/runs/x)" in capsys.readouterr().out
    assert len(list_images(tmp_path / "runs" / "x", recursive=True)) == 2  # asked for


@pytest.mark.parametrize("suffix, kind", [("heic", "HEIF"), ("HIF", "HEIF"), ("avif", "AVIF")])
def test_photos_of_phones(tmp_path, suffix, kind):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 200, 30, 30
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", kind, quality=95)
    red, black = load_folder(tmp_path, 32)[0].split(16, dim=2)
    assert red[0, :, :12].mean() > 0.4 and black[0, :, 4:].mean() < -0.9


# Faulty EXIF: an orientation among tags that no program could have meant

def exif(*entries, more=b""):
    """The bytes of an EXIF block; entries: (tag, type, count, value of four bytes)."""
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", 0) + more


TURNED = (0x0112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize("block", [
    exif(TURNED), exif(TURNED, (0x010F, 2, 9999, b"\xff\xff\0\0")), exif(TURNED, (0x011A, 5, 1, b"\xff\xff\xff\0")),
    exif((0x011A, 5, 1, b"\x26\0\0\0"), TURNED, more=struct.pack("<ii", -1, 0)), exif(TURNED, (0x8769, 4, 1, b"\xff" * 4)),
    exif(TURNED, (0x0100, 12, 3, b"\0" * 4)), exif(TURNED, (0xA000, 13, 1, b"\1\2\3\4")),
    exif((0x010E, 4, 1, b"\1\0\0\0"), TURNED), exif(TURNED, (0x0131, 3, 1, b"\1\0\0\0"))])
def test_orientation_beside_faulty_tags(tmp_path, block):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=block, quality=95)
    image = load_image(tmp_path / "a.jpg", 32)
    assert image[:, :, 20:].mean() > 0.9 and image[:, :, :12].mean() < -0.9  # white, which was on top, is to the right


@pytest.mark.parametrize("block", [b"", b"Exif\0\0", b"Exif\0\0II*", exif((0x0112, 2, 4, b"six\0")), exif((0x0112, 3, 1, b"\x63\0\0\0")),
                                   exif((0x0112, 5, 1, b"\xff" * 4)), b"nonsense" * 9])
def test_exif_without_a_sound_orientation(tmp_path, block):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=block, quality=95)
    assert load_image(tmp_path / "a.jpg", 32)[:, :12].mean() > 0.9


def test_a_large_profile_and_a_large_text(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "x" * 5_000_000, zip=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", pnginfo=info, icc_profile=bytes(3_000_000))
    assert colour(load_image(tmp_path / "a.png", 8)) == [255, 0, 0]


# Tensors

def test_uint8_round_trip_is_exact():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    pixels[..., 1] = pixels[..., 0].transpose(1, 2)  # so that swapped axes show
    images = to_tensor(pixels.numpy())
    assert images.shape == (1, 3, 16, 16) and images.min() == -1 and images.max() == 1
    assert torch.equal(to_uint8(images), pixels)
    assert torch.equal(to_uint8(images + 0.003), pixels)  # rounds: less than half a step away
    assert to_uint8(torch.full((1, 3, 1, 1), 1.5)).unique().tolist() == [255]
    assert to_uint8(torch.full((1, 3, 1, 1), -1.5)).unique().tolist() == [0]
