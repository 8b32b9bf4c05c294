"""The playground: the page contains the network as ONNX, and onnxruntime-web to run it.

WebAssembly is loaded from the page itself and uses one thread, so the page makes no request.
"""

import base64
import gzip
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.data.pixels import from_brightness, levels_to_display
from cdm_fast.errors import UserError
from cdm_fast.host.reading import error_text
from cdm_fast.interop.export import Inspection, export_onnx
from cdm_fast.model import CDM

PACKAGE = "onnxruntime-web@1.30.0"
# Of the archive that npm fetches, as npm itself writes it.
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
SCRIPT, GLUE, WASM = "ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
EXAMPLES = 10
DRAWING, LARGEST_CELL = 512, 32  # pixels: of the drawing's longer side, and of an image's pixel on it


def content(
    model: CDM, name: str, config: RunConfig, data: ImageData | None, runtime: dict[str, bytes]
) -> dict[str, Any]:
    """The values that the template needs to show the playground of a model; runtime: from `runtime_files`.

    Raises UserError without the packages that write ONNX.
    """
    image = config.image
    with tempfile.TemporaryDirectory() as folder:
        network = export_onnx(Inspection(model), Path(folder) / "network.onnx").read_bytes()
    examples = [] if data is None else _examples(data, image.num_grey_levels)
    classes = model.num_classes
    names = ["all images"] if classes is None else [str(c) for c in range(classes)]
    if data is not None and data.class_names and classes == len(data.class_names):
        names = [str(each) for each in data.class_names]
    black, white = (_brightness(config, value) for value in (0.0, 1.0))
    cell = _cell(image.height, image.width)
    facts = {
        "cell": cell,
        "height": image.height,
        "width": image.width,
        "channels": image.channels,
        "names": names,
        "scale": white - black,
        "shift": black,
        "a": model.schedule.a.tolist(),
        "s": model.schedule.s.tolist(),
        "examples": examples,
    }
    script = runtime[SCRIPT].decode().replace("</script", "<\\/script")
    return {
        "name": name,
        "cell": cell,
        "height": image.height,
        "width": image.width,
        "levels": model.schedule.num_levels,
        "classes": classes is not None,
        "examples": bool(examples),
        "data": facts,
        "runtime": script,
        "parts": {
            "network": _packed(network),
            "ort-glue": _packed(runtime[GLUE]),
            "ort-wasm": _packed(runtime[WASM]),
        },
    }


def runtime_files(folder: Path | None = None) -> dict[str, bytes]:
    """The files of onnxruntime-web, {name: content}: fetched by npm and verified, or read from `folder`.

    folder: the package or its `dist` folder; its files are not verified.
    Raises UserError if a file is not in the folder, npm cannot fetch the package, or its checksum is wrong.
    """
    if folder is None:
        return _fetched()
    place = folder / "dist" if (folder / "dist").is_dir() else folder
    missing = [name for name in (SCRIPT, GLUE, WASM) if not (place / name).is_file()]
    if missing:
        raise UserError(
            f"--onnxruntime-web {folder} holds no {missing[0]}; give the dist folder of {PACKAGE}"
        )
    return {name: (place / name).read_bytes() for name in (SCRIPT, GLUE, WASM)}


def _fetched() -> dict[str, bytes]:
    npm = shutil.which("npm")
    remedy = f"or give --onnxruntime-web DIR, the dist folder of {PACKAGE}"
    if npm is None:
        raise UserError(
            f"--playground takes {PACKAGE} from npm, which is not installed; install it, {remedy}"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--silent", "--prefer-offline", "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            told = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
            raise UserError(f"npm cannot fetch {PACKAGE} ({told}); check the network, {remedy}")
        return _unpacked(archives[0].read_bytes(), remedy)


def _unpacked(archive: bytes, remedy: str) -> dict[str, bytes]:
    """The files in npm's archive, whose checksum must be the pinned one."""
    found = f"sha512-{base64.b64encode(hashlib.sha512(archive).digest()).decode()}"
    if found != INTEGRITY:
        raise UserError(
            f"npm's {PACKAGE} is not the one that is pinned ({found[:24]}...); fetch it again, {remedy}"
        )
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as members:
            for name in (SCRIPT, GLUE, WASM):
                member = members.extractfile(f"package/dist/{name}")
                assert member is not None
                files[name] = member.read()
    except (tarfile.TarError, KeyError) as error:
        raise UserError(f"npm's {PACKAGE} cannot be unpacked ({error_text(error)}); {remedy}") from None
    return files


def _packed(content: bytes) -> str:
    """gzip in base64, which the page unpacks by DecompressionStream."""
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def _cell(height: int, width: int) -> int:
    """Side in pixels of the square that stands for one pixel of the image in the drawing."""
    return min(LARGEST_CELL, max(1, DRAWING // max(height, width)))


def _examples(data: ImageData, num_grey_levels: int) -> list[list[int]]:
    """Some images as brightness 0..255, channels first; evenly spread, since data may be sorted by class."""
    index = torch.linspace(0, len(data) - 1, min(EXAMPLES, len(data))).round().long()
    pixels: Tensor = levels_to_display(data.images[index], num_grey_levels)
    return [each.flatten().tolist() for each in pixels]


def _brightness(config: RunConfig, value: float) -> float:
    """Where a brightness from 0 (black) to 1 (white) stands in [-1, 1]."""
    found = from_brightness(torch.tensor([value]), config.image.num_grey_levels, config.data.pixels)
    return float(found[0])
