"""Reader of .npz files: numpy arrays in a zip file, parsed here so that nothing can be unpickled."""

# N images, C channels, H W pixels

import re
import struct
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cdm_fast.data.names import IMAGE_NAMES, LABEL_NAMES, SPLITS, listed, split_of
from cdm_fast.data.pictures import Pixels
from cdm_fast.data.source import Part, Source, array_part, check_labels, make_source
from cdm_fast.host.reading import MAX_DATA_BYTES, bad, error_text, open_zip, read_member

# The header that numpy writes before an array of plain numbers. Anything else is refused, not evaluated.
_HEADER = re.compile(
    rb"\{'descr': '([<>|=][buif]\d{1,2})', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,200})\), \}\s*"
)
_MAGIC = b"\x93NUMPY"
_FLOAT_SLACK = 0.1  # in grey levels; k/255 in half precision has an error of up to 0.06


def read_npz(path: Path) -> Source:
    """Arrays saved by `numpy.savez` or `savez_compressed`.

    Keys: `images` and `labels`, or `x_train`, `y_train`, `x_test`, `y_test`, or `train_images` and so on,
    with the usual other names for these (`label`, `targets`, `val`; see `names`), in any case; or numpy's own
    `arr_0` and `arr_1`. Optionally `num_grey_levels` (a whole number 2..256, default 256). Images are
    (N,H,W), (N,H,W,C) or (N,C,H,W) with C 1 or 3: whole numbers 0..num_grey_levels-1, or floats k/255 in
    [0,1]. Raises UserError for other arrays, and for two arrays with the same role.
    """
    with open_zip(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        roles = _roles(path, list(members))
        levels = members.get("num_grey_levels")
        num_grey_levels = _grey_levels(path, None if levels is None else _read_array(path, archive, levels))
        parts: dict[str, Part] = {}
        for split in (split for split in SPLITS if (split, "images") in roles):
            key = roles[split, "images"]
            name = f"{path}:{key}"
            pixels = _as_uint8(name, _channels_first(name, _read_array(path, archive, members[key])))
            label_key = roles.get((split, "labels"))
            labels = None if label_key is None else _read_array(path, archive, members[label_key])
            checked = check_labels(f"{path}:{label_key}", labels, len(pixels))
            parts[split] = array_part(name, pixels, checked, num_grey_levels)
    unread = sorted(members.keys() - set(roles.values()) - {"num_grey_levels"})
    return make_source(
        path,
        parts,
        f"an .npz of arrays {listed(sorted(roles.values()))}",
        num_grey_levels=num_grey_levels,
        unread=(f"arrays {listed(unread)}",) if unread else (),
    )


Roles = dict[tuple[str, str], str]  # (split, "images" or "labels") -> key


def _roles(path: Path, keys: list[str]) -> Roles:
    """The role of each array; UserError without training images, for labels alone, and duplicate roles."""
    roles: Roles = {}
    for key in keys:
        role = _role(key)
        if role is None:
            continue
        if role in roles:
            split, kind = role
            raise bad(
                f"{path}:{key}", f"and {roles[role]} both are the {split} {kind}; keep one of the two arrays"
            )
        roles[role] = key
    if ("train", "images") not in roles:
        found = listed(sorted(keys), 8) or "none"
        name = "images" if ("test", "images") not in roles else "x_train"
        raise bad(
            f"{path}:{name}",
            f"no such array (there is {found}); save images, or x_train and x_test",
        )
    lonely = [key for (split, kind), key in roles.items() if (split, "images") not in roles]
    if lonely:
        raise bad(f"{path}:{lonely[0]}", "has no images of its split; save them too, or leave it out")
    if _split_in(roles["train", "images"]) and len({split for split, _ in roles}) == 1:
        raise bad(f"{path}:x_test", "no such array; save the test images too, or call the only ones images")
    return roles


_NUMPYS_OWN = {"arr_0": ("train", "images"), "arr_1": ("train", "labels")}


def _role(key: str) -> tuple[str, str] | None:
    """(split, "images" or "labels") by an array's name, such as x_train, test_labels, val_images, targets."""
    plain = key.strip().lower()
    if plain in _NUMPYS_OWN:
        return _NUMPYS_OWN[plain]
    word = _split_in(plain)
    split = split_of(word or "train")
    name = plain.removeprefix(word).removesuffix(word).strip("_- ")
    if split is None or not (name in IMAGE_NAMES or name in LABEL_NAMES):
        return None
    return split, "images" if name in IMAGE_NAMES else "labels"


def _split_in(key: str) -> str:
    """The word at either end of an array's name that names a split; "" if there is none."""
    words = [word for word in re.split(r"[_\- ]", key.strip().lower()) if word]
    ends = [word for word in (words[:1] + words[-1:]) if len(words) > 1 and split_of(word)]
    return ends[0] if ends else ""


def _read_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray:
    """One array of plain numbers; UserError if it is not as numpy writes it (format versions 1 and 2)."""
    name = f"{path}:{info.filename.removesuffix('.npy')}"
    content = read_member(path, archive, info, MAX_DATA_BYTES)
    start = 10 if content[6:7] == b"\x01" else 12
    if not content.startswith((_MAGIC + b"\x01", _MAGIC + b"\x02")) or len(content) < start:
        raise bad(name, "is not a numpy array; save it with numpy.savez")
    (length,) = struct.unpack("<H" if start == 10 else "<I", content[8:start])
    header = content[start : start + min(length, 10_000)]
    found = _HEADER.fullmatch(header)
    if found is None:
        kind = "pickled objects, which are never loaded" if b"|O" in header else "no plain numbers"
        raise bad(name, f"holds {kind}; save an array of type uint8")
    shape = tuple(int(axis) for axis in found[3].replace(b",", b" ").split())
    try:
        dtype = np.dtype(found[1].decode())
        array = np.frombuffer(content, dtype, offset=start + length)
        return array.reshape(shape, order="F" if found[2] == b"True" else "C")
    except (TypeError, ValueError, OverflowError) as error:
        raise bad(
            name, f"contradicts its header ({error_text(error)}); save it again with numpy.savez"
        ) from None


def _grey_levels(path: Path, value: NDArray | None) -> int:
    if value is None:
        return 256
    if value.size != 1 or value.dtype.kind not in "iu" or not 2 <= int(value.item()) <= 256:
        raise bad(
            f"{path}:num_grey_levels", "is not one whole number from 2 to 256; save one, or leave it out"
        )
    return int(value.item())


def _channels_first(name: str, images: NDArray) -> NDArray:
    """(N,H,W), (N,H,W,C) or (N,C,H,W) -> (N,C,H,W); UserError if none of them fits, or two do."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4:
        raise bad(name, f"has shape {images.shape}; save images as (N,H,W), (N,H,W,C) or (N,C,H,W)")
    first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
    if first == last:
        why = "may be channels first or last" if first else "has no axis of 1 or 3 channels"
        raise bad(name, f"shape {images.shape} {why}; save (N,H,W), or C = 1 or 3 on one side only")
    return images if first else images.transpose(0, 3, 1, 2)


def _as_uint8(name: str, images: NDArray) -> Pixels:
    """Whole numbers 0..255, or floats k/255, as uint8; UserError if that would change a value."""
    if images.dtype == np.uint8 or images.size == 0:
        return images.astype(np.uint8, copy=False)
    if images.dtype.kind == "b":
        raise bad(name, "has type bool; save uint8 and num_grey_levels = 2")
    if images.dtype.kind == "f":
        return _from_floats(name, images)
    if images.min() < 0 or images.max() > 255:
        raise bad(
            name, f"holds values from {images.min()} to {images.max()}; save grey levels 0 to 255 as uint8"
        )
    return images.astype(np.uint8)


def _from_floats(name: str, images: NDArray) -> Pixels:
    finite = np.isfinite(images)
    if not finite.all():
        worst = tuple(np.argwhere(~finite)[0])
        raise bad(name, f"image {worst[0]} holds {images[worst]}; remove NaN and infinite values")
    levels = _levels_of(images)
    if levels is None:
        span = f"{images.min():g} to {images.max():g}"
        raise bad(
            name,
            f"holds floats from {span} that are not k/255 in [0, 1]; save grey levels as uint8, such as"
            f" {_conversion(images)}",
        )
    return levels


def _conversion(images: NDArray) -> str:
    """The line of numpy that turns floats of a usual range into grey levels."""
    low, high = float(images.min()), float(images.max())
    if -1.001 <= low < 0 and high <= 1.001:
        return "((x + 1) * 127.5).round().clip(0, 255).astype('uint8')"
    if low >= 0 and high <= 1.001:
        return "(x * 255).round().clip(0, 255).astype('uint8')"
    if low >= 0 and high <= 255:
        return "x.round().astype('uint8')"
    return "((x - x.min()) / (x.max() - x.min()) * 255).round().astype('uint8')"


def _levels_of(images: NDArray) -> Pixels | None:
    """The k of finite floats k/255; None if one is not of this form."""
    if images.min() < -1 or images.max() > 2:  # 255 times as much may overflow
        return None
    scaled = images.astype(np.float64) * 255
    levels = np.rint(scaled)
    if levels.min() < 0 or levels.max() > 255 or np.abs(scaled - levels).max() > _FLOAT_SLACK:
        return None
    return levels.astype(np.uint8)
