"""Collect the text the bundled model is trained on, from Debian packages and Python's standard library.

    python training/corpus.py [--work training/.work]

Packages are fetched with `apt-get download` and unpacked into the work folder; nothing is installed. Manual
pages are rendered by groff. Every document goes whole to the training or to the held-out part, by a hash of its
name. Writes train/SOURCE.bin (documents, separated by a zero byte), held_out/SOURCE/NAME, and corpus.json
(licence, documents and bytes of each source).
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sysconfig
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "python3.11-doc",
    "manpages",
    "manpages-dev",
    "bible-kjv",
    "bible-kjv-text",
    "dict-devil",
    "jargon-text",
    "r-cran-janeaustenr",
)
HELD_OUT = 0.02
SAMPLE = (  # held-out documents that are bundled, whole, as src/tilewise/data/sample.txt
    "austen/Emma_part_3",
    "python-stdlib/wave.py",
    "jargon-file/Jargon_File_part_88",
    "bible-kjv/1_Samuel_14",
    "devils-dictionary/Devil_s_Dictionary_from_RIDICULE",
    "python-docs/library_subprocess.rst",
)
LONGEST = 400_000  # bytes of one document; longer ones (change logs, tables) would crowd out the rest


@dataclass(frozen=True)
class Document:
    name: str
    text: bytes


@dataclass(frozen=True)
class Source:
    title: str
    licence: str
    may_be_bundled: bool  # whole documents of it, as a text sample


SOURCES = {
    "python-docs": Source("Python 3.11 documentation, sources (python3.11-doc)", "PSF-2.0", True),
    "python-stdlib": Source("Python standard library, sources", "PSF-2.0", True),
    "manual-pages": Source(
        "Linux man-pages, rendered (manpages, manpages-dev)",
        "Linux-man-pages-copyleft, GPL-2.0-or-later, BSD and others, page by page",
        False,
    ),
    "bible-kjv": Source("King James Version (bible-kjv-text)", "public domain", True),
    "austen": Source("Jane Austen's six novels (r-cran-janeaustenr)", "public domain", True),
    "devils-dictionary": Source("Ambrose Bierce, The Devil's Dictionary (dict-devil)", "public domain", True),
    "jargon-file": Source("The Jargon File 4.4.7 (jargon-text)", "public domain", True),
}


def is_held_out(name: str) -> bool:
    """Whether the document of this name is kept from training, the same on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def clean(text: bytes) -> bytes:
    """ASCII and valid UTF-8 only, Unix line ends, no zero bytes, no runs of blank lines."""
    text = text.decode("utf-8", "ignore").replace("\r\n", "\n").replace("\0", "").encode()
    text = re.sub(rb"[ \t]+\n", b"\n", text)
    return re.sub(rb"\n{4,}", b"\n\n\n", text).strip(b"\n") + b"\n"


def fetch(work: Path) -> Path:
    """Download and unpack the packages, once; return the folder they are unpacked in."""
    debs, unpacked = work / "debs", work / "x"
    debs.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not (found := sorted(debs.glob(f"{package}_*.deb"))):
            subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
            found = sorted(debs.glob(f"{package}_*.deb"))
        if not (unpacked / package).is_dir():
            subprocess.run(["dpkg-deb", "-x", found[-1], unpacked / package], check=True)
    return unpacked


def python_docs(unpacked: Path) -> Iterator[Document]:
    root = next((unpacked / "python3.11-doc").rglob("_sources"))
    for path in sorted(root.rglob("*.rst.txt")):
        name = path.relative_to(root).as_posix().removesuffix(".txt")
        if "changelog" not in name:
            yield Document(name, path.read_bytes())


def python_stdlib(_: Path) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = re.compile(r"(^|/)(test|tests|idle_test|site-packages|encodings|pydoc_data|__pycache__)(/|$)")
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not skip.search(name):
            yield Document(name, path.read_bytes())


def manual_pages(unpacked: Path) -> Iterator[Document]:
    paths = sorted(path for name in ("manpages", "manpages-dev") for path in (unpacked / name).rglob("*.gz"))
    pages = [path for path in paths if "/man/man" in path.as_posix() and not path.is_symlink()]

    def render(path: Path) -> Document:
        source = gzip.decompress(path.read_bytes())
        if len(source) < 400:  # ".so other-page"
            return Document(path.stem, b"")
        command = ["groff", "-t", "-man", "-Tascii", "-P-cbou", "-rLL=78n"]
        return Document(path.stem, subprocess.run(command, input=source, capture_output=True).stdout)

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(render, pages)


def bible(unpacked: Path) -> Iterator[Document]:
    """A document is a chapter."""
    command = [
        "bible-kjv/usr/bin/bible",
        "-d",
        "bible-kjv-text/usr/lib/bible.data",
        "-l78",
        "gen1:1-rev22:21",
    ]
    text = subprocess.run(command, cwd=unpacked, capture_output=True, check=True).stdout.decode("latin-1")
    for chapter in re.split(r"\n(?=[^ \n][^\n]* \d+\n\n)", text):
        yield Document(chapter.strip().split("\n")[0], chapter.encode())


def austen(unpacked: Path) -> Iterator[Document]:
    """The novels by chapter, out of R's lazy-load database: compressed objects, strings tagged 0x00040009."""
    root = unpacked / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data"
    packed = (root / "Rdata.rdb").read_bytes()
    at = novel = 0
    while at + 4 < len(packed):
        stream = zlib.decompressobj()
        raw = stream.decompress(packed[at + 4 :])
        at = len(packed) - len(stream.unused_data)
        lines = _r_strings(raw)
        if len(lines) > 1_000:
            novel += 1
            title = next(line for line in lines if line.strip()).strip().title()
            text = "\n".join(lines)
            parts = re.split(r"\n(?=(?:CHAPTER|Chapter) [IVXLC\d]+\.?\s*\n)", text)
            for number, part in enumerate(parts):
                yield Document(f"{title}, part {number}", part.encode())


def _r_strings(raw: bytes) -> list[str]:
    """The character vector in a serialised R object, in order."""
    tags = {b"\x00\x04\x00\x09", b"\x00\x00\x80\x09", b"\x00\x00\x40\x09", b"\x00\x00\x00\x09"}
    tags |= {b"\x00\x04\x80\x09", b"\x00\x04\x00\x89"}
    strings, at = [], raw.find(b"\x00\x04\x00\x09")
    while 0 <= at and at + 8 <= len(raw):
        if raw[at : at + 4] not in tags:
            break
        size = int.from_bytes(raw[at + 4 : at + 8], "big")
        strings.append(raw[at + 8 : at + 8 + size].decode("utf-8", "ignore"))
        at += 8 + size
    return strings


def devils_dictionary(unpacked: Path) -> Iterator[Document]:
    raw = (unpacked / "dict-devil/usr/share/dictd/devil.dict.dz").read_bytes()
    text = gzip.decompress(raw).decode("latin-1")
    entries = re.split(r"\n(?=[A-Z][A-Z' -]+, [a-z.]+)", text)[1:]
    for start in range(0, len(entries), 20):
        head = entries[start].split(",")[0]
        yield Document(f"Devil's Dictionary, from {head}", "\n".join(entries[start : start + 20]).encode())


def jargon_file(unpacked: Path) -> Iterator[Document]:
    """Pieces of about 16 KB, without the table of contents; rules drawn in box characters are left out."""
    path = next((unpacked / "jargon-text").rglob("jargon.txt.gz"))
    text = re.sub(r"[\u2500-\u257f]+", "", gzip.decompress(path.read_bytes()).decode("utf-8", "ignore"))
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    first = next(at for at, part in enumerate(paragraphs) if len(part) > 400)  # contents have short lines
    piece: list[str] = []
    number = size = 0
    for paragraph in paragraphs[first:]:
        piece.append(paragraph)
        size += len(paragraph)
        if size > 16_000:
            yield Document(f"Jargon File, part {number}", "\n\n".join(piece).encode())
            piece, size, number = [], 0, number + 1
    yield Document(f"Jargon File, part {number}", "\n\n".join(piece).encode())


COLLECTORS = {
    "python-docs": python_docs,
    "python-stdlib": python_stdlib,
    "manual-pages": manual_pages,
    "bible-kjv": bible,
    "austen": austen,
    "devils-dictionary": devils_dictionary,
    "jargon-file": jargon_file,
}


def collect(work: Path) -> dict[str, dict]:
    unpacked = fetch(work)
    (work / "train").mkdir(parents=True, exist_ok=True)
    report = {}
    for source, collector in COLLECTORS.items():
        counts = {"train_documents": 0, "train_bytes": 0, "held_out_documents": 0, "held_out_bytes": 0}
        kept = work / "held_out" / source
        kept.mkdir(parents=True, exist_ok=True)
        with (work / "train" / f"{source}.bin").open("wb") as train:
            for document in collector(unpacked):
                text = clean(document.text)
                if not 200 <= len(text) <= LONGEST:
                    continue
                part = "held_out" if is_held_out(f"{source}/{document.name}") else "train"
                counts[f"{part}_documents"] += 1
                counts[f"{part}_bytes"] += len(text)
                if part == "train":
                    train.write(text + b"\0")
                else:
                    (kept / re.sub(r"[^A-Za-z0-9.-]+", "_", document.name)).write_bytes(text)
        about = SOURCES[source]
        report[source] = {"title": about.title, "licence": about.licence, **counts}
        print(source, counts, flush=True)
    (work / "corpus.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def write_sample(work: Path, path: Path) -> None:
    """The bundled sample: whole held-out documents whose licence allows it, one after another."""
    for name in SAMPLE:
        if not SOURCES[name.split("/")[0]].may_be_bundled:
            raise ValueError(f"{name} must not be bundled: {SOURCES[name.split('/')[0]].licence}")
    path.write_bytes(b"\n\n".join((work / "held_out" / name).read_bytes() for name in SAMPLE))


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=here / ".work")
    parser.add_argument("--sample", action="store_true", help="also write src/tilewise/data/sample.txt")
    options = parser.parse_args()
    collect(options.work)
    if options.sample:
        write_sample(options.work, here.parent / "src/tilewise/data/sample.txt")


if __name__ == "__main__":
    main()
