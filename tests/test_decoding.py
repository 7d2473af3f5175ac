"""Files that never end, are too large, damaged or deeper than 8 bits; real files and libraries."""

import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from images import FLOWER, SMALL, encode, hwc
from PIL import ExifTags, Image, TiffImagePlugin
from sklearn.datasets import load_sample_images

from sktransfer import (
    PretrainedFeatureExtractor,
    config_context,
    get_config,
    get_model,
    load_image_folder,
    set_config,
)
from sktransfer._cli import main
from sktransfer.io import (
    DamagedImageWarning,
    _decoding,
    _files,
    _messages,
    check_images,
    load_image,
)

RAMP = np.tile(np.arange(256, dtype=np.uint16), (4, 1))  # all levels of 8 bits


@pytest.fixture(scope="module")
def damaged_jpeg():
    data = bytearray(encode(FLOWER, "JPEG", quality=90))
    data[20000:20100] = bytes(100)
    return bytes(data)


# What is no regular file ------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
    kinds = {"pipe.png": "a pipe", "link.png": "a device", "socket.png": "a socket", "": "a folder"}
    for name, kind in kinds.items():
        images = check_images([tmp_path / name])
        for read in (images.load, images.digest):
            with pytest.raises(ValueError, match=rf"row 0 .*{name}'\).*this is {kind}"):
                read(0)
    with pytest.raises(ValueError, match="zero'.* this is a device"):
        get_model("resnet18", "/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    Image.fromarray(SMALL).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    stat = os.stat

    def stat_then_replace(path, *args, **options):
        found = stat(path, *args, **options)
        if str(path).endswith("a.png"):
            os.replace(tmp_path / "pipe", path)
        return found

    monkeypatch.setattr(os, "stat", stat_then_replace)
    with pytest.raises(OSError, match="this is a pipe"):
        _files.open_regular(tmp_path / "a.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_folders_with_pipes(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(SMALL).save(tmp_path / "a/1.png")
    os.mkfifo(tmp_path / "a/2.png")
    with pytest.warns(UserWarning, match=r"2\.png': this is a pipe"):
        assert len(load_image_folder(tmp_path).data) == 1


# Settings ---------------------------------------------------------------------------------------


def test_settings_are_those_of_the_process_and_of_its_children():
    at_start = {"damaged": "warn", "max_pixels": "pillow", "background": (255, 255, 255)}
    assert get_config() == at_start
    with config_context(damaged="error", max_pixels=1200, background="#0102fe"):
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(get_config).result() == get_config()
        changed = {"damaged": "error", "max_pixels": 1200, "background": (1, 2, 254)}
        assert get_config() == changed
        code = "import sktransfer; print(sktransfer.get_config())"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert child.stdout.strip() == str(get_config())
        set_config(damaged="warn", background=np.array([1, 2, 3]))
        assert get_config() == {**changed, "damaged": "warn", "background": (1, 2, 3)}
        with pytest.raises(ValueError, match="background"):
            set_config(damaged="error", max_pixels=7, background=(1, 2, 300))
        assert get_config() == {**changed, "damaged": "warn", "background": (1, 2, 3)}
        set_config(**at_start)
        assert get_config() == at_start
    assert get_config() == at_start


@pytest.mark.parametrize(
    "setting",
    [
        *[{"damaged": "ignore"}, {"max_pixels": 0}, {"max_pixels": 1.5}, {"max_pixels": "a"}],
        *[{"background": colour} for colour in ("whit", "#ffffff80", (1, 2), 7, (0.5, 0, 0))],
    ],
)
def test_bad_settings(setting, monkeypatch):
    (name, value), *_ = setting.items()
    message = re.escape(f"got {value!r}")
    with pytest.raises(ValueError, match=f"{name} must be .*, {message}"):
        set_config(**setting)
    monkeypatch.setenv(f"SKTRANSFER_{name.upper()}", str(value))
    with pytest.raises(ValueError, match=f"SKTRANSFER_{name.upper()} must be"):
        get_config()


def test_max_pixels(monkeypatch):
    data = encode(SMALL, "PNG")
    with config_context(max_pixels=1199):
        with pytest.raises(ValueError, match=r"row 0: too many pixels \(40 × 30 = 1200.*1199"):
            check_images([data]).load(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for format in ("PNG", "JPEG"):
        data = encode(SMALL, format)
        with pytest.raises(ValueError, match="too many pixels.*set_config.*MAX_IMAGE_PIXELS"):
            load_image(data)
        with config_context(max_pixels=1200):  # counts in place of Pillow's
            assert load_image(data).shape == (3, 30, 40)
    with config_context(max_pixels=1200), pytest.raises(ValueError, match="no image that starts"):
        load_image(b"hello")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(data).shape == (3, 30, 40)


def test_command_line_takes_the_settings(tmp_path, damaged_jpeg, capfd):
    (tmp_path / "bad.jpg").write_bytes(damaged_jpeg)
    before = get_config()
    command = ["classify", str(tmp_path / "bad.jpg"), "--image-size", "64"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(command) == 0
    assert "bad.jpg'): the image is damaged (Corrupt JPEG data" in capfd.readouterr().err
    assert main([*command, "--damaged", "error"]) == 2
    assert "error: row 0" in capfd.readouterr().err
    assert main([*command, "--max-pixels", "1000"]) == 2
    said = capfd.readouterr().err
    assert "--max-pixels is 1000" in said and said.endswith("raise the limit: --max-pixels.\n")
    assert main([*command, "--background", "greenish"]) == 2
    assert "background must be a colour" in capfd.readouterr().err
    assert get_config() == before


# Large images -----------------------------------------------------------------------------------


def test_large_images_are_decoded_and_used_one_at_a_time(monkeypatch):
    monkeypatch.setattr(_files, "_FREE_PIXELS", 1000)
    monkeypatch.setattr(_files, "_PIXELS_IN_FLIGHT", 2 * SMALL.shape[0] * SMALL.shape[1])
    monkeypatch.setattr(_files, "_LONGEST_WAIT", 600)

    def most_at_once(images, expected):
        at_once, most, changed = 0, 0, threading.Condition()

        def use(pixels):
            nonlocal at_once, most
            with changed:
                at_once += 1
                most = max(most, at_once)
                changed.notify_all()
                changed.wait_for(lambda: most >= expected, 300)
            time.sleep(0.01)  # in which one too many may come
            with changed:
                at_once -= 1
            return pixels

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda i: images.load(i, None, use), range(len(images))))
        return most

    assert most_at_once(check_images([encode(SMALL, "PNG")] * 12), 2) == 2
    larger = Image.fromarray(SMALL).resize((60, 60))
    assert most_at_once(check_images([encode(larger, "PNG")] * 12), 1) == 1
    small = Image.fromarray(SMALL).resize((8, 8))
    assert most_at_once(check_images([encode(small, "PNG")] * 16), 3) > 2
    broken = check_images([encode(SMALL, "PNG")[:300]] * 3)
    for i in range(3):  # what failed has given its room back
        with pytest.raises(ValueError, match="decoded"):
            broken.load(i)


def test_room_that_nobody_gives_back_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(_files, "_FREE_PIXELS", 1000)
    monkeypatch.setattr(_files, "_LONGEST_WAIT", 0.05)
    room = _files._Room()
    room.in_flight = 2**40  # Ctrl-C cut off its return
    monkeypatch.setattr(_files, "_room", room)
    assert load_image(encode(SMALL, "PNG")).shape == (3, 30, 40)


def test_large_pil_images_wait_for_room_and_for_each_other(monkeypatch):
    monkeypatch.setattr(_files, "_LONGEST_WAIT", 600)
    monkeypatch.setattr(_files, "_FREE_PIXELS", 1000)
    monkeypatch.setattr(_files, "_PIXELS_IN_FLIGHT", 2 * SMALL.shape[0] * SMALL.shape[1])
    data = encode(SMALL, "PNG")
    lazy = Image.open(io.BytesIO(data))
    small = Image.open(io.BytesIO(encode(SMALL[:8, :8], "PNG")))
    with ThreadPoolExecutor(4) as threads:
        with _files.room_for(2 * SMALL.shape[0] * SMALL.shape[1]):
            waiting = [threads.submit(check_images([lazy]).load, 0) for _ in range(3)]
            assert threads.submit(check_images([small]).load, 0).result(300).shape == (3, 8, 8)
            time.sleep(0.05)
            assert not any(future.done() for future in waiting)
        for future in waiting:
            np.testing.assert_array_equal(hwc(future.result(300)), SMALL)
    same = Image.open(io.BytesIO(data))
    images = check_images([same] * 8 + [Image.open(io.BytesIO(data)) for _ in range(8)])
    encoded = check_images([data] * 8)
    loads = [load for i in range(8) for load in ((images, i), (encoded, i), (images, i + 8))]
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda load: load[0].load(load[1]), loads, timeout=300)
        assert all(np.array_equal(hwc(pixels), SMALL) for pixels in found)


def test_a_pil_image_that_is_being_read_holds_up_no_other():
    data = encode(SMALL, "PNG")
    opened = [Image.open(io.BytesIO(data)) for _ in range(300)]
    images = check_images(opened)
    with ThreadPoolExecutor(2) as threads:
        with _decoding._lock_of(opened[0]):  # as if its file came slowly
            waiting = threads.submit(images.load, 0)
            for i in range(1, 300):
                assert threads.submit(images.load, i).result(300).shape == (3, 30, 40)
            assert not waiting.done()
        assert waiting.result(300).shape == (3, 30, 40)
    assert len(_decoding._pillow_locks) < len(opened)  # they are gone with their threads


def test_large_files_are_read_one_at_a_time(monkeypatch, tmp_path):
    Image.fromarray(SMALL).save(tmp_path / "a.png")
    monkeypatch.setattr(_files, "_LARGE_FILE", 100)
    images = check_images([tmp_path / "a.png"] * 4)
    with ThreadPoolExecutor(4) as threads, _files.reading_turn(tmp_path / "a.png"):
        waiting = [threads.submit(images.load, 0), threads.submit(images.digest, 1)]
        time.sleep(0.05)
        assert not any(future.done() for future in waiting)
        images.load(2)  # the thread whose turn it is does not wait for itself
    assert all(future.done() for future in waiting)


# Damage -----------------------------------------------------------------------------------------


def test_what_pillow_warns_of_has_a_row(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera" * 20
    data = encode(SMALL, "JPEG", exif=exif)
    start = data.index(b"Exif\0\0") + 6
    cut = data[: start + 8] + b"\xff\x00" + data[start + 10 :]  # more tags than there are
    Path(tmp_path / "cut.jpg").write_bytes(cut)
    with pytest.warns(UserWarning, match=r"^row 1 \('.*cut.jpg'\): Pillow says of the file: "):
        images = check_images([str(tmp_path / "cut.jpg")] * 2)
        with ThreadPoolExecutor(1) as threads:
            pixels = threads.submit(images.load, 1).result()
    assert pixels.shape == (3, 30, 40)
    with config_context(damaged="error"), pytest.warns(UserWarning, match="^row 0 .*Pillow says"):
        images.load(0)  # its pixels are whole
    with pytest.warns(UserWarning, match="^(?!row)"), Image.open(io.BytesIO(cut)) as image:
        image.getexif()  # of the user's own


def test_what_was_let_pass_is_not_taken_from_the_memory(tmp_path, damaged_jpeg):
    extractor = PretrainedFeatureExtractor(image_size=32, memory=tmp_path)
    with pytest.warns(DamagedImageWarning):
        extractor.transform([damaged_jpeg])
    extractor.transform([damaged_jpeg])  # not decoded again
    with config_context(damaged="error"), pytest.raises(ValueError, match="row 0: .* is damaged"):
        extractor.transform([damaged_jpeg])


def test_a_damaged_jpeg_is_told_once_with_row_and_file(tmp_path, damaged_jpeg, capfd):
    Image.fromarray(FLOWER).save(tmp_path / "good.jpg")
    paths = [str(tmp_path / "good.jpg")]
    for k in range(6):
        paths.append(str(tmp_path / f"bad{k}.jpg"))
        Path(paths[-1]).write_bytes(damaged_jpeg + bytes(k))
    extractor = PretrainedFeatureExtractor(image_size=32, n_jobs=4)
    with pytest.warns(DamagedImageWarning) as record:
        rows = extractor.transform(paths)
    told = sorted(str(warning.message) for warning in record)
    assert [text.split(":")[0] for text in told] == [
        f"row {k + 1} ({path!r})" for k, path in enumerate(paths[1:])
    ]
    assert all("(Corrupt JPEG data: " in text and "damaged='error'" in text for text in told)
    assert np.isfinite(rows).all() and not np.allclose(rows[0], rows[1])
    with config_context(damaged="error"):
        with pytest.raises(ValueError, match=r"^row [1-6] \('.*bad.\.jpg'\): the image is damaged"):
            extractor.transform(paths)
    assert capfd.readouterr().err == ""
    with pytest.warns(DamagedImageWarning):
        pixels = load_image(damaged_jpeg)
    np.testing.assert_array_equal(hwc(pixels), Image.open(io.BytesIO(damaged_jpeg)))


def test_an_open_image_of_a_damaged_jpeg_is_told_as_the_file_is(damaged_jpeg):
    whole = encode(SMALL, "JPEG")
    images = check_images([Image.open(io.BytesIO(data)) for data in (whole, damaged_jpeg)])
    images.load(0)
    with pytest.warns(DamagedImageWarning, match="row 1: .*damaged .Corrupt JPEG data"):
        images.load(1)
    with config_context(damaged="error"), pytest.raises(ValueError, match="row 1: .* drop the row"):
        images.load(1)  # Pillow has loaded it by now
    loaded = Image.open(io.BytesIO(damaged_jpeg))
    loaded.load()
    check_images([loaded]).load(0)  # whose file is gone


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_an_empty_jpeg_of_many_pixels(mode):
    data = bytearray(encode(Image.new(mode, (16, 16)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 2000, 2000)
    with pytest.warns(DamagedImageWarning, match="premature end of data segment"):
        assert load_image(bytes(data)).shape == (3, 2000, 2000)


def test_odd_but_whole_jpeg_files_are_silent():
    good = encode(FLOWER, "JPEG", quality=90)
    pages = [Image.fromarray(np.roll(FLOWER, k, axis=1)) for k in (0, 90)]
    pages[0].save(mpo := io.BytesIO(), "MPO", save_all=True, append_images=pages[1:])
    newer = good.replace(b"JFIF\0\1", b"JFIF\0\3", 1)  # a revision that libjpeg warns of
    comment = good[:2] + b"\xff\xfe\0\6abcd" + good[2:]
    for data in (good + bytes(1000), good + good, mpo.getvalue(), newer, comment):
        np.testing.assert_array_equal(hwc(load_image(data)), Image.open(io.BytesIO(data)))


def test_a_lost_end_marker_is_harmless_but_lost_pixels_are_not():
    good = encode(FLOWER, "JPEG", quality=90)
    for data in (good[:-1], good[:-2]):
        np.testing.assert_array_equal(hwc(load_image(data)), hwc(load_image(good)))
    for data in (good[:-20], encode(FLOWER, "JPEG", progressive=True)[:-2]):
        with pytest.raises(ValueError, match="cut short"):
            load_image(data)


def test_real_jpeg_files_are_silent():
    for name in load_sample_images().filenames:
        assert load_image(name).shape == (3, 427, 640)


def test_bytes_in_front_of_a_jpeg_are_counted():
    data = encode(SMALL, "JPEG")
    with pytest.raises(ValueError, match=r"2 bytes stand in front of a JPEG \(b'\\r\\n'\).*\[2:\]"):
        load_image(b"\r\n" + data)
    twelve_bits = data.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c")
    with pytest.raises(ValueError, match="starts as a JPEG, but Pillow cannot read its header"):
        load_image(twelve_bits)


def png(height, raw, bits=8, colour=2, width=50, interlaced=0):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def test_png_files_that_lack_rows():
    row = b"\0" + b"\x80" * 150
    assert load_image(png(20, row * 20)).float().mean() == 128
    assert load_image(png(20, b"\0" * 151 * 20)).max() == 0  # black, but whole
    assert load_image(png(20, bytes(3100), interlaced=1)).max() == 0
    for data in (png(13000, row), png(20, row * 19)):
        with pytest.warns(DamagedImageWarning, match="end before its last row"):
            load_image(data)
    black = Image.new("L", (13, 11))
    for size in ((1, 1), (2, 1), (3, 2), (5, 9)):  # passes of interlaced files can be empty
        for mode in ("1", "L", "RGBA", "I;16"):
            assert load_image(encode(black.resize(size).convert(mode), "PNG")).max() == 0


def test_checksums_of_png_files():
    data = bytearray(encode(FLOWER, "PNG"))
    data[-50] ^= 1  # so late that Pillow does not see it
    with pytest.warns(DamagedImageWarning, match="a checksum of its pixels is wrong"):
        load_image(bytes(data))


def test_what_libtiff_says_is_in_the_message(capfd):
    if _messages._set_libtiff_handler() is None:
        pytest.skip("Pillow has libtiff built in")
    data = bytearray(encode(FLOWER, "TIFF", compression="tiff_adobe_deflate"))
    data[50000:50400] = bytes(400)
    with pytest.raises(ValueError, match="row 0: .*decoder error.*incorrect data check"):
        check_images([bytes(data)]).load(0)
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError, match="decoder error"):  # whoever uses Pillow gets it as before
        Image.open(io.BytesIO(data)).load()
    assert "ZIPDecode" in capfd.readouterr().err


def test_lazily_opened_images_are_looked_at_as_files_are(capfd, tmp_path):
    """What is seen only while an image is loaded is told whenever it is used."""
    lzw = bytearray(encode(FLOWER, "TIFF", compression="tiff_lzw"))
    lzw[2000:2200] = np.random.default_rng(0).bytes(200)
    cut = bytearray(encode(FLOWER, "PNG"))
    cut[-50] ^= 1
    deep = np.repeat(RAMP[..., None] * 16, 3, axis=2).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in deep)
    dark = png(4, raw, bits=16, width=256)
    for data in (bytes(lzw), bytes(cut), dark):
        (tmp_path / "image").write_bytes(data)
        messages, expected = told(data), Image.open(io.BytesIO(data))
        assert len(messages) == 1
        with Image.open(tmp_path / "image") as of_path:
            for image in (expected, of_path):
                assert told(image) == told(image) == messages
    assert capfd.readouterr().err == "" or _messages._set_libtiff_handler() is None
    with pytest.raises(ValueError, match="which Pillow misreads"):
        load_image(Image.open(io.BytesIO(refused["16-bit unsigned integers in 3 channels"]())))


def told(image):
    """Return what is said of an image, as a warning or an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            load_image(image)
        except ValueError as error:
            return [str(error)]
    return [str(warning.message) for warning in caught]


# More than 8 bits -------------------------------------------------------------------------------


def tiff(pixels, bits, photometric=1, sample=1, order="<", **tags):
    """Write an uncompressed TIFF file; `tags` are given as t258=(12,)."""
    body = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder(order))).tobytes()
    height, width = pixels.shape[:2]
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8}
    entries |= {277: 1, 278: height, 279: len(body), 339: sample}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    directory = struct.pack(order + "H", len(entries))
    for tag, value in sorted(entries.items()):
        directory += struct.pack(order + "HHII", tag, 4, 1, value)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(order + "I", 8 + len(body)) + body + directory + bytes(4)


def packed_12_bits(pixels):
    pairs = pixels.reshape(len(pixels), -1, 2).astype(np.uint16)
    first, second = pairs[..., 0], pairs[..., 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
    return packed.astype(np.uint8)


right = {
    "16 bits": lambda: tiff(RAMP * 257, 16),
    "16 bits, big-endian": lambda: tiff(RAMP * 257, 16, order=">"),
    "white is zero": lambda: tiff(65535 - RAMP * 257, 16, photometric=0),
    "8 bits, white is zero": lambda: tiff((255 - RAMP).astype(np.uint8), 8, photometric=0),
    "12 bits": lambda: tiff(packed_12_bits(RAMP * 16 + 15), 12, t256=256),
    "MaxSampleValue": lambda: tiff(RAMP * 16 + 15, 16, t281=4095),
    "MaxSampleValue, white is zero": lambda: tiff(4095 - (RAMP * 16 + 15), 16, 0, t281=4095),
    "maxval": lambda: b"P5 256 4 4095\n" + (RAMP * 16 + 15).astype(">u2").tobytes(),
    "text maxval": lambda: b"P2 256 4 4095\n" + b" ".join(b"%d" % v for v in (RAMP * 16 + 15).flat),
    "maxval 65535": lambda: b"P5 256 4 65535\n" + (RAMP * 257).astype(">u2").tobytes(),
    "PNG": lambda: encode(RAMP * 257, "PNG"),
    "int16": lambda: tiff(RAMP.astype(np.int16), 16, sample=2),
    "uint32": lambda: tiff(RAMP.astype(np.uint32), 32),
    "int32": lambda: tiff(RAMP.astype(np.int32), 32, sample=2, order=">"),
    "float32": lambda: tiff((RAMP / 255).astype(np.float32), 32, sample=3),
    "float32, white is zero": lambda: tiff((1 - RAMP / 255).astype(np.float32), 32, 0, sample=3),
}


@pytest.mark.parametrize("data", right.values(), ids=right)
def test_deep_pixels_are_what_the_format_says(data):
    np.testing.assert_array_equal(load_image(data())[0], RAMP)


refused = {
    "64-bit floats": lambda: tiff(RAMP / 255, 64, sample=3),
    "16-bit floats": lambda: tiff((RAMP / 255).astype(np.float16), 16, sample=3),
    "64-bit unsigned integers": lambda: tiff(RAMP.astype(np.uint64), 64),
    "10-bit unsigned integers": lambda: tiff(RAMP, 10),
    "8-bit signed integers": lambda: tiff(RAMP.astype(np.int8), 8, sample=2),
    "16-bit signed integers whose white is zero": lambda: tiff(RAMP, 16, 0, sample=2),
    "16-bit unsigned integers in 3 channels": lambda: tiff(
        np.tile(RAMP, (3, 1)), 16, 2, t257=4, t277=3, t284=2, t278=4
    ),
    "32-bit unsigned integers, but": lambda: tiff(RAMP.astype(np.uint32) << 24, 32),
    "16-bit signed integers, but": lambda: tiff(RAMP.astype(np.int16) - 9, 16, sample=2),
    "32-bit floats, but": lambda: tiff(RAMP.astype(np.float32), 32, sample=3),
}


@pytest.mark.parametrize("kind", refused)
def test_deep_pixels_that_are_refused_are_named(kind):
    with pytest.raises(ValueError, match=f"^row 0: .*a TIFF of {kind}.*tifffile") as error:
        check_images([refused[kind]()]).load(0)
    assert "standardisation" not in str(error.value)


def test_big_endian_floats_that_pillow_misreads_are_refused():
    TiffImagePlugin.WRITE_LIBTIFF, before = True, TiffImagePlugin.WRITE_LIBTIFF
    try:
        data = encode(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF", compression="raw")
    finally:
        TiffImagePlugin.WRITE_LIBTIFF = before
    assert load_image(data)[0, 0, 255] == 255
    packed = zlib.compress((RAMP / 255).astype(">f4").tobytes())
    pixels = np.frombuffer(packed + bytes(-len(packed) % 4), ">f4")[None]
    data = tiff(pixels, 32, sample=3, order=">", t256=256, t257=4, t259=8, t278=4)
    with pytest.raises(ValueError, match="32-bit floats, which Pillow misreads"):
        load_image(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiff(RAMP * 16, 16),
        lambda: encode(RAMP * 16, "PNG"),
        lambda: Image.fromarray(RAMP * 16),
        lambda: tiff(RAMP * 16, 16, t281=4080),  # the largest value of this image, not white
    ],
    ids=["TIFF", "PNG", "PIL", "largest value"],
)
def test_12_bits_in_a_16_bit_file_are_told(make):
    images = check_images([make(), make()])
    with pytest.warns(UserWarning, match="^row 1: .*reach 4080 of 65535.* 4095, ") as record:
        images.digest(1)
        pixels = images.load(1)
    assert len(record) == 1 and pixels.max() == 15  # as Pillow and the format say
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(Image.fromarray(RAMP * 64 + 200))
        load_image(Image.fromarray(RAMP * 0))


def test_12_bits_in_16_bit_colours_are_told():
    rows = np.repeat(RAMP[..., None] * 16, 3, axis=2).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    with pytest.warns(UserWarning, match="reach 4095 of 65535"):
        load_image(png(4, raw, bits=16, width=256))
    assert load_image(png(4, bytes(len(raw)), bits=16, width=256)).max() == 0  # black is no doubt
    raw = b"".join(b"\0" + (row * 16).astype(">u2").tobytes() for row in rows)
    np.testing.assert_array_equal(load_image(png(4, raw, bits=16, width=256))[2], RAMP)
