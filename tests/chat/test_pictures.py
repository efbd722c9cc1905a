"""Pictures made ready for the tower: as transformers' processor does it, and safe whatever comes in."""

import io
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageOps, features

from dgemma.chat.pictures import BUDGETS, MOST_PIXELS, fitted, open_picture, prepare
from dgemma.config import VisionConfig
from dgemma.errors import DgemmaError
from dgemma.nn.vision import Layout
from support.pictures import as_file, random_picture, reference_processor

SIZES = [
    (1, 1), (1, 2), (2, 1), (3, 3), (1, 47), (16, 16), (48, 48), (47, 49), (49, 47), (5, 300), (300, 5), (1, 900),
    (900, 1), (100, 100), (64, 480), (480, 64), (97, 101), (128, 96), (96, 128), (200, 150), (150, 200), (211, 307),
    (256, 256), (320, 240), (240, 320), (333, 77), (336, 480), (384, 384), (400, 401), (432, 336), (500, 250),
    (512, 512), (640, 360), (360, 640), (640, 480), (624, 432), (720, 405), (768, 768), (801, 599), (1000, 30),
    (30, 1000), (1056, 576), (1280, 720), (1, 20_000), (20_000, 1),
]
LARGE = {(1, 1), (300, 5), (211, 307), (640, 480), (1280, 720), (1, 20_000)}  # these at the largest budget, too


def pixels(source):
    return np.asarray(open_picture(source))


# As transformers does it


@pytest.mark.parametrize("budget", BUDGETS)
def test_pictures_become_what_transformers_makes_of_them(budget):
    """Patches, their positions and how many soft tokens: bit for bit."""
    processor = reference_processor()
    for size in SIZES if budget <= 560 else sorted(LARGE):
        image = random_picture(*size)
        theirs = processor(image, max_soft_tokens=budget, return_tensors="pt")
        ours = prepare(image, budget)
        patches = ours.patches()
        flat = patches.flatten(0, 1)
        assert ours.tokens == theirs["num_soft_tokens_per_image"][0] == len(flat) // 9, size
        assert torch.equal(flat, theirs["pixel_values"][0, : len(flat)]), size
        positions = theirs["image_position_ids"][0]
        assert torch.equal(Layout((patches.shape[:2],)).positions(torch.device("cpu")), positions[: len(flat)]), size
        assert (positions[len(flat) :] == -1).all()


def test_sizes_are_those_of_transformers():
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    draw = random.Random(0)
    sizes = [(int(10 ** draw.uniform(0, 4.5)), int(10 ** draw.uniform(0, 4.5))) for _ in range(2000)]
    for width, height in [*SIZES, *sizes, *((side, side) for side in range(1, 2000, 7))]:
        for budget in BUDGETS:
            ours = fitted(width, height, budget)
            theirs = get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
            assert (ours.height, ours.width) == theirs
            assert ours.tokens * 48 * 48 == ours.width * ours.height
            assert 0 < ours.tokens <= budget


@pytest.mark.parametrize(("size", "budget", "becomes"), [
    ((1024, 1024), 280, (768, 768, 256)), ((1920, 1080), 280, (1056, 576, 264)), ((1024, 768), 280, (912, 672, 266)),
    ((1024, 1024), 70, (384, 384, 64)), ((1024, 1024), 140, (528, 528, 121)), ((1024, 1024), 1120, (1584, 1584, 1089)),
    ((50, 2000), 70, (48, 2496, 52)), ((1, 1), 280, (768, 768, 256)), ((20_000, 1), 70, (3360, 48, 70)),
])
def test_what_sizes_become(size, budget, becomes):
    found = fitted(*size, budget)
    assert (found.width, found.height, found.tokens) == becomes


def test_a_tower_of_other_patches_has_its_own_sizes():
    config = VisionConfig(patch_size=4, pooling_kernel_size=2)
    assert fitted(100, 50, 70, config).width % 8 == 0
    patches = prepare(random_picture(100, 50), 70, config).patches()
    assert patches.shape[2] == 48 and patches.shape[0] % 2 == patches.shape[1] % 2 == 0


@pytest.mark.parametrize("budget", [0, 1, 100, 281, -70, "70", None])
def test_another_budget_is_refused(budget):
    with pytest.raises(DgemmaError, match="at most 70, 140, 280, 560 or 1120 soft tokens, got"):
        fitted(10, 10, budget)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_colours_become_rgb_as_in_pillow(mode):
    image = random_picture(40, 30).convert(mode) if mode != "LAB" else Image.new("LAB", (40, 30), (150, 90, 140))
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


# What a viewer would show


def seethrough(width=20, height=10):
    image = random_picture(width, height).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((width, height)))
    return image


def test_what_is_transparent_is_shown_on_white():
    image = seethrough()
    alpha = np.asarray(image)[..., 3:] / 255
    expected = np.asarray(image)[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(image) - expected).max() <= 1
    assert (pixels(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == 255).all()


@pytest.mark.parametrize("image", [
    seethrough(), seethrough().convert("LA"), seethrough().convert("PA"), seethrough().convert("RGBa")],
    ids=lambda image: image.mode)
def test_transparency_is_seen_in_every_mode(image):
    alike = image.convert("RGBA")
    assert np.array_equal(pixels(image), pixels(alike))
    assert (pixels(image) != np.asarray(alike.convert("RGB"))).any()


def test_palettes_with_transparency_are_shown_on_white():
    image = Image.new("P", (6, 2), 0)
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.putdata([0, 1, 2, 0, 1, 2] * 2)
    for transparent in (1, bytes([255, 0, 255])):  # one colour, or every colour's own
        shown = pixels(as_file(image, "PNG", transparency=transparent))
        assert shown[0, :3].tolist() == [[200, 0, 0], [255, 255, 255], [0, 0, 200]]


def test_transparency_is_flattened_as_in_transformers():
    from transformers import image_transforms

    convert = image_transforms.convert_to_rgb
    try:
        theirs = convert(seethrough(), return_numpy=True)
    except TypeError:
        pytest.skip("this transformers drops transparency")
    assert np.array_equal(pixels(seethrough()), theirs)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_are_turned_upright(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = as_file(random_picture(40, 24), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file)).convert("RGB"))
    if format != "TIFF":  # Pillow turns these itself
        assert expected.size == ((24, 40) if orientation > 4 else (40, 24))
    assert np.array_equal(pixels(file), np.asarray(expected))
    assert np.array_equal(pixels(Image.open(io.BytesIO(file))), np.asarray(expected))


def test_exif_that_cannot_be_read_turns_nothing():
    image = random_picture(20, 10)
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x05", b"Exif\0\0" + b"\xff" * 40):
        file = as_file(image, "JPEG", exif=exif, quality=95)
        assert pixels(file).shape == (10, 20, 3)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_become_eight(mode):
    values = (np.arange(256, dtype=np.uint16) << 8 | 0x80).reshape(16, 16)
    image = Image.frombytes(mode, (16, 16), values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]).tobytes())
    assert pixels(image)[..., 0].tolist() == np.arange(256).reshape(16, 16).tolist()


def test_a_sixteen_bit_file_is_not_burnt_out():
    values = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    shown = pixels(as_file(Image.fromarray(values), "PNG"))
    assert np.array_equal(shown[..., 0], values >> 8)


def test_small_whole_numbers_are_eight_bits():
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert pixels(Image.fromarray(values))[..., 1].tolist() == values.tolist()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_seen(format):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    file = as_file(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(file) == [255, 0, 0]).all()


# Where pictures come from


def test_files_bytes_and_images_are_one_picture(tmp_path):
    image = random_picture(50, 40)
    path = tmp_path / "a picture.png"
    path.write_bytes(data := as_file(image, "PNG"))
    sources = [image, path, str(path), data, bytearray(data), memoryview(data), Image.open(path)]
    assert len({prepare(source, 70).digest for source in sources}) == 1


def test_the_picture_that_is_handed_in_stays_as_it_is():
    image = seethrough()
    before = image.copy()
    open_picture(image)
    assert image.mode == "RGBA" and image.tobytes() == before.tobytes() and image.info == before.info


def test_digests_tell_pictures_and_budgets_apart():
    image = random_picture(100, 100)
    other = image.copy()
    other.putpixel((50, 50), (1, 2, 3))
    found = [prepare(image, 70), prepare(other, 70), prepare(image, 140), prepare(random_picture(100, 99), 70)]
    assert len({picture.digest for picture in found}) == len(found)
    assert prepare(image.copy(), 70).digest == found[0].digest


# What is no picture, or too much of one


def png_of_size(width, height):
    """A PNG file that claims to be of this size; its data is for another one."""
    data = bytearray(as_file(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("size", [(20_000, 20_000), (9460, 9460), (1 << 30, 1 << 30), (90_000_000, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(size):
    with pytest.raises(DgemmaError, match="^scan.png: .* pixels than are decoded: at most 89 million; make it smaller"):
        open_picture(png_of_size(*size), "scan.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_in_an_open_image_is_refused_before_it_is_decoded():
    side = int(MOST_PIXELS**0.5) + 1
    with pytest.raises(DgemmaError, match=f"the picture: {side:,} × {side:,} pixels than are decoded"):
        open_picture(Image.open(io.BytesIO(png_of_size(side, side))))


SVG = b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.mark.parametrize(("data", "message"), [
    (b"", "there is nothing in it"), (SVG, "an SVG drawing: convert it to PNG"),
    (b"%PDF-1.7\n", "a PDF: give its pages"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript, which is not run"),
    (b"<!DOCTYPE html><p>404", "a web page"), (b"\0\0\0\x20ftypheic\0\0\0\0mif1heic", "HEIC, which Pillow cannot read"),
    (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "a video: give it as one"),
    (b"\x1aE\xdf\xa3\x01\0\0\0", "a video"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"just words", "not a picture of a kind that can be read here"),
    (bytes(100), "not a picture of a kind that can be read here"),
    (as_file(random_picture(40, 40), "PNG")[:60], "damaged or cut off"),
    (as_file(random_picture(40, 40), "JPEG")[:-200], "damaged or cut off"),
    (as_file(random_picture(40, 40), "WEBP")[:-200], "damaged or cut off"),
], ids=lambda value: value[:12].strip() if isinstance(value, str) else "")
def test_what_is_no_picture_is_named(tmp_path, data, message):
    with pytest.raises(DgemmaError, match="^the picture: ") as caught:
        open_picture(data)
    assert message in str(caught.value)
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(DgemmaError, match=f"^{tmp_path / 'file'}: "):
        open_picture(tmp_path / "file")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DgemmaError, match="x.png: cannot be read .no such file."):
        open_picture(tmp_path / "x.png")
    with pytest.raises(DgemmaError, match="this is a folder"):
        open_picture(tmp_path)


@pytest.mark.parametrize("source", [None, 5, ["a.png"], object()])
def test_what_cannot_be_a_picture_is_refused(source):
    with pytest.raises(DgemmaError, match="a picture is a path, the bytes of a file or a PIL.Image, not"):
        open_picture(source)


def test_pictures_of_floating_point_numbers_are_refused():
    with pytest.raises(DgemmaError, match="^the picture: pictures of floating-point numbers"):
        open_picture(Image.fromarray(np.zeros((4, 4), np.float32)))


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(DgemmaError, match="0 × 5 pixels has nothing in it"):
        open_picture(Image.new("RGB", (0, 5)))


def mutated(data, draw):
    """A file with some bytes changed, taken out, doubled, or its end cut off."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(data)), draw.randint(1, 8)
        match draw.randrange(5):
            case 0 | 1:
                data[place] ^= 1 << draw.randrange(8)
            case 2:
                data[place : place + length] = draw.randbytes(length)
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length]
        if len(data) < 2:
            break
    return bytes(data[: draw.randrange(1, len(data) + 1)] if draw.random() < 0.1 else data)


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_pictures_or_refused_and_leave_nothing_behind():
    draw = random.Random(5)
    image = random_picture(24, 18)
    kinds = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "QOI"]
    kinds += [kind for kind, part in (("JPEG2000", "jpg_2000"), ("AVIF", "avif")) if features.check(part)]
    files = [as_file(image, kind) for kind in kinds]
    files += [as_file(image, "TIFF", compression="tiff_lzw"), as_file(seethrough(), "PNG"),
              as_file(image.convert("P"), "GIF"), as_file(image.convert("CMYK"), "JPEG")]
    outcomes, memory = [0, 0], []
    for turn in range(10_000):
        try:
            found = open_picture(mutated(files[turn % len(files)], draw))
            assert found.mode == "RGB" and found.width * found.height <= MOST_PIXELS
            outcomes[0] += 1
        except DgemmaError:
            outcomes[1] += 1
        if turn % 5000 == 4999:
            memory.append(psutil.Process().memory_info().rss)
    assert min(outcomes) > 500  # not all alike
    assert memory[1] - memory[0] < 100 << 20


# Pillow


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_pillow_is_loaded_when_there_is_a_picture():
    assert run("import sys, dgemma.chat.pictures as p; p.fitted(3, 4, 70); print('PIL' in sys.modules)") == "False"


def test_without_pillow_the_extra_is_named():
    code = ("import sys; sys.modules['PIL'] = None\nimport dgemma.chat.pictures as p, dgemma.errors as e\n"
            "try: p.prepare(b'x')\nexcept e.DgemmaError as error: print(error)")
    assert "pip install 'dgemma[vision]'" in run(code)
