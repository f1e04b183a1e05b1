"""Faults of data sets as they are downloaded, which `mmscale pack` meets."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.whole.damage import Place, animated, gzip_bomb, picture, png_header, saved
from tests.whole.faults_shards import GOOD, Fault

NAMES = [f"{key}.jpg" for key in sorted(GOOD)]


def good_source(folder: Path) -> None:
    """Four pictures with a caption each, as a csv."""
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / "images" / name).write_bytes(picture(number))
    rows = "".join(f"{name},A picture of {name}\n" for name in NAMES)
    (folder / "captions.csv").write_text(f"image,caption\n{rows}")


def image(
    name: str, content: bytes | Callable[[Path], object], *words: str, extra: str = ""
) -> Fault:
    """A fifth picture, `m.jpg`, that is not one."""

    def make(place: Place) -> None:
        good_source(place.folder)
        path = place.folder / "images" / "m.jpg"
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
        with (place.folder / "captions.csv").open("a") as file:
            file.write("m.jpg,A picture\n")

    return Fault(f"pack: {name}", make, (("pack", 0, words),), GOOD | frozenset(extra.split()))


def rows(name: str, added: bytes, *words: str, code: int = 0, extra: str = "") -> Fault:
    """Something behind the good rows of the csv; there is a picture `m.jpg` too."""

    def make(place: Place) -> None:
        good_source(place.folder)
        (place.folder / "images" / "m.jpg").write_bytes(picture(9))
        with (place.folder / "captions.csv").open("ab") as file:
            file.write(added)

    return Fault(f"csv: {name}", make, (("pack", code, words),), GOOD | frozenset(extra.split()))


def captions(
    name: str, file: str, content: bytes | Callable[[], bytes], *words: str, code: int = 4
) -> Fault:
    """Another caption file in place of the csv."""

    def make(place: Place) -> None:
        good_source(place.folder)
        (place.folder / "captions.csv").unlink()
        (place.folder / file).write_bytes(content() if callable(content) else content)

    return Fault(f"captions: {name}", make, (("pack", code, words),))


def beside(
    name: str, file: str, content: bytes | Callable[[Path], object], *words: str, code: int = 4
) -> Fault:
    """Something beside the good csv."""

    def make(place: Place) -> None:
        good_source(place.folder)
        path = place.folder / file
        path.write_bytes(content) if isinstance(content, bytes) else content(path)

    where = file if file.endswith(".yaml") else None
    return Fault(f"beside: {name}", make, (("pack", code, words),), where=where)


def token(*lines: str) -> bytes:
    good = [f"{name}#0\tA picture of {name}" for name in NAMES]
    return "\n".join([*good, *lines]).encode("utf-8", "surrogateescape")


def karpathy(*images: object, levels: int = 0) -> bytes:
    good = [{"filename": name, "split": "train", "sentences": [{"raw": name}]} for name in NAMES]
    return json.dumps({"images": [*good, *images], "dataset": "s"}).encode()


def coco(*annotations: object) -> bytes:
    pictures = [{"id": number, "file_name": name} for number, name in enumerate(NAMES)]
    good = [{"image_id": number, "caption": name} for number, name in enumerate(NAMES)]
    return json.dumps({"images": pictures, "annotations": [*good, *annotations]}).encode()


JPEG = picture(7, (300, 200))
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
IMAGES = [
    image("no file", lambda path: None, "m\tmissing file"),
    image("zero bytes", b"", "m\tzero bytes"),
    image("a web page", b"<html>404</html>", "m\tundecodable: not a JPEG, PNG or WebP"),
    image("a cut JPEG", JPEG[: len(JPEG) // 2], "m\tundecodable"),
    image(
        "a PNG of 60,000 x 60,000",
        png_header(60_000, 60_000),
        "m\tmore pixels than",
        "60000 x 60000",
    ),
    image("a GIF", animated("GIF"), "m\tundecodable: not a JPEG, PNG or WebP"),
    image("a TIFF", saved(Image.new("RGB", (9, 9)), "TIFF"), "m\tundecodable"),
    image("a PNG under another name", picture(8, form="PNG"), extra="m"),
    image("an animated WebP", animated("WEBP"), extra="m"),
    image("a CMYK JPEG", saved(Image.new("CMYK", (9, 9)), "JPEG"), extra="m"),
    image("a PNG of 16 bits", saved(Image.new("I;16", (9, 9)), "PNG"), extra="m"),
    image("a folder", lambda path: path.mkdir(), "m\tmissing file"),
    image("a pipe", os.mkfifo, "m\tmissing file"),
    image("a device", lambda path: path.symlink_to("/dev/zero"), "m\tmissing file"),
    image("a link to itself", lambda path: path.symlink_to(path), "m\tunreadable file"),
    image("a link to nothing", lambda path: path.symlink_to("gone"), "m\tmissing file"),
    image("a link to a text", lambda path: path.symlink_to("/etc/passwd"), "m\tundecodable"),
    image("the bytes of another", picture(0), "m\tduplicate image: has the bytes of a in train"),
]
ROWS = [
    rows("a name above the folder", b"../outside/secret.jpg,A\n", "leaves the folder of images"),
    rows("an absolute name", b"/etc/passwd.jpg,A\n", "leaves the folder of images"),
    rows("a name with NUL", b"m\0.jpg,A\n", "leaves the folder of images"),
    rows("no name", b",A\n", "no file name"),
    rows("a name of 200 letters", b"m" * 200 + b".jpg,A\n", "longer than 90 bytes"),
    rows("a key twice", b"a.png,A\n", "a\tduplicate key"),
    rows("a picture without a row", b"", "m\tno caption"),
    rows("an empty caption", b"m.jpg, \n", "m#0\tempty caption", "m\tno caption"),
    rows("a caption that is not UTF-8", b"m.jpg,caf\xe9\n", "m#0\tcaption not UTF-8"),
    rows("NUL in a caption", b"m.jpg,A\0dog\n", "m#0\tcaption not UTF-8: it holds NUL"),
    rows("a caption of 1 MB", b"m.jpg," + b"a dog " * 2**18, "m#0\tcaption too long: 1,572"),
    rows("a script in a caption", b"m.jpg,<script>alert(1)</script>\n", extra="m"),
    rows("control characters in a caption", b"m.jpg,\x1b[2Jdog\x07\n", extra="m"),
    rows("control characters in a name", b"\x1b[2Jm.jpg,A\n", "missing file"),
    rows("a cell too many", b"m.jpg,A dog, running\n", "has 3 cells for 2 columns"),
    rows("a cell too few", b"m.jpg\n", "has 1 cells for 2 columns"),
    rows("a bare carriage return", b"m.jpg,A dog\rruns\n", extra="m"),
    rows("a quote that is never closed", b'm.jpg,"A dog\na.jpg,A cat\n', "captions.csv:6", code=4),
    rows("text behind a quote", b'm.jpg,"A" dog\n', "captions.csv:6: is not csv", code=4),
    rows("a json list that is cut", b'm.jpg,"[""A"", "\n', extra="m"),
]
CAPTIONS = [
    captions("no header", "captions.csv", b"a.jpg,A dog\n", "its columns are a.jpg, a dog"),
    captions(
        "wrong columns", "captions.csv", b"photo,words\na.jpg,A\n", "its columns are photo, words"
    ),
    captions("an empty csv", "captions.csv", b"", "no header line"),
    captions(
        "UTF-16",
        "captions.csv",
        "".join(["image,caption\n", *(f"{n},A\n" for n in NAMES)]).encode("utf-16"),
        code=0,
    ),
    captions(
        "half a letter of UTF-16",
        "captions.csv",
        "image,caption\na.jpg,A\n".encode("utf-16")[:-1],
        "is not whole utf-16",
    ),
    captions("binary", "captions.csv", bytes(range(256)) * 40, "its columns are"),
    captions(
        "an image in two splits",
        "captions.csv",
        b"image,caption,split\na.jpg,A,train\na.jpg,B,test\n",
        "a.jpg is in test and in train",
    ),
    captions(
        "a split above the folder",
        "captions.csv",
        b"image,caption,split\na.jpg,A,../x\n",
        "no image has a caption",
        "is not a name",
    ),
    captions(
        "the row of results.csv that lacks a bar",
        "results.csv",
        b"image_name| comment_number| comment\n"
        + b"".join(f"{n}| 0| A {n}\n".encode() for n in NAMES)
        + b"a.jpg| 4   A dog .\n",
        code=0,
    ),
    captions(
        "lines without a tab",
        "token.txt",
        token("m.jpg A dog", "#0\tA"),
        "token.txt:5\tis not NAME#i",
        code=0,
    ),
    captions(
        "a token file that is not UTF-8",
        "token.txt",
        token("a.jpg#1\tcaf\udce9"),
        "a#1\tcaption not UTF-8",
        code=0,
    ),
    captions("a cut gzip", "token.txt.gz", gzip.compress(token() * 999)[:90], "cannot be read"),
    captions("a text for a gzip", "token.txt.gz", token(), "cannot be read"),
    captions("a gzip bomb", "token.txt.gz", gzip_bomb, "unpacks to more than"),
    captions(
        "json that is cut", "dataset_flickr30k.json", karpathy()[:-30], "cannot be read as JSON"
    ),
    captions("json 100,000 levels deep", "dataset.json", b"[" * 10**5, "cannot be read as JSON"),
    captions(
        "json with a huge number",
        "dataset.json",
        b'{"images": ' + b"9" * 10**5 + b"}",
        "cannot be read as JSON",
    ),
    captions("json that is a list", "dataset.json", b"[]", 'no list "images"'),
    captions(
        "images that are none",
        "dataset.json",
        karpathy(7, None, {}, {"filename": "m.jpg", "split": "train", "sentences": 5}),
        "image 4",
        "image 7",
        code=0,
    ),
    captions(
        "splits that are none",
        "dataset.json",
        karpathy({"filename": "m.jpg", "split": ["x"], "sentences": [{"raw": "A"}]}),
        "split '' is not a name",
        code=0,
    ),
    captions(
        "captions that are none",
        "dataset.json",
        karpathy(
            {"filename": "m.jpg", "split": "train", "sentences": [{"raw": 5}, {"raw": "\ud800"}]}
        ),
        "m#0\tcaption is not a text",
        "m#1\tcaption not UTF-8",
        code=0,
    ),
    captions(
        "annotations of no image",
        "captions.json",
        coco({"image_id": 77, "caption": "A"}),
        "COCO's caption layout",
    ),
    captions("annotations that are none", "captions.json", coco(5), "COCO's caption layout"),
    captions(
        "NaN for an id", "captions.json", coco({"image_id": float("nan"), "caption": "A"}), "COCO's"
    ),
]
BESIDE = [
    beside(
        "captions of other images",
        "results_20130124.token",
        token("z.jpg#0\tA")[30:],
        "captions.csv and",
        "results_20130124.token disagree about the images",
    ),
    beside(
        "an image in two lists",
        "trainImages.txt",
        lambda path: [
            path.with_name(f"{s}Images.txt").write_text("a.jpg\n") for s in ("train", "test")
        ],
        "a is in train and in test",
    ),
    beside("a pipe for a list", "testImages.txt", os.mkfifo, "no split is known", code=0),
    beside("a pipe for captions", "dataset.json", os.mkfifo, code=0),
    beside(
        "a recipe with code",
        "r.yaml",
        b"name: !!python/object/apply:os.system ['touch canary']",
        "r.yaml",
    ),
    beside("a recipe of endless aliases", "r.yaml", f"{LAUGHS}name: *a11\n".encode(), "r.yaml"),
    beside("a recipe whose name is endless", "r.yaml", b"name: &a [*a, *a]\n", "is not a text"),
    beside("a recipe 10,000 levels deep", "r.yaml", b"[" * 10**4, "r.yaml"),
    beside("a recipe with a key twice", "r.yaml", b"name: a\nname: b\n", "given twice"),
    beside("a recipe without its folder", "r.yaml", b"root: nowhere\n", "nowhere is no folder"),
    beside(
        "a recipe without its captions", "r.yaml", b"captions: gone.csv\n", "holds none of gone.csv"
    ),
]
FAULTS = [*IMAGES, *ROWS, *CAPTIONS, *BESIDE]
