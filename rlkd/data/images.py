"""Read a folder of images: CLASS/IMAGE, or SPLIT/CLASS/IMAGE with splits called train, validation and test.

The names of images mean nothing. Every file is an image that is used, or is left out and counted.
"""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.data.layout import split_named
from rlkd.data.readers import is_hidden, walk
from rlkd.data.samples import Split
from rlkd.data.tally import Tally
from rlkd.errors import UserError

IMAGE_ENDINGS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
)
ALLOWED = "CLASS/IMAGE, or train/CLASS/IMAGE, validation/CLASS/IMAGE and test/CLASS/IMAGE"
WIDE_GREY = ("I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes of 16-bit grey


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, S in all."""

    images: list[Any]  # PIL images in mode RGB
    labels: list[str]  # names of their folders
    sources: list[str]  # copies of one image have one source
    splits: list[str] | None
    paths: list[Path]
    tally: Tally
    notes: list[str]


def is_image(path: Path) -> bool:
    """Whether a file's name tells an image."""
    return path.suffix.lower() in IMAGE_ENDINGS


def has_images(folder: Path) -> bool:
    """Whether an image stands anywhere in a folder."""
    return any(is_image(path) and not is_hidden(path.relative_to(folder)) for path in walk(folder))


def read_images(folder: Path, is_skipping: bool) -> ImageFolder:
    """All images, in the order of their paths.

    Args:
        folder: is searched; hidden files and files of other kinds are left out and counted.
        is_skipping: leave out images that cannot be read, too, instead of refusing the folder.

    Raises:
        UserError: no such layout, a class folder without a readable image, or an image that cannot be read.
    """
    tally = Tally("files")
    chosen: list[Path] = []
    files = walk(folder)
    for path in files:
        name = path.relative_to(folder)
        if is_hidden(name):
            tally.leave_out("are hidden", str(name))
        elif is_image(path):
            chosen.append(path)
        else:
            tally.leave_out("are no images", str(name))
    root = _below_single_folder(folder, chosen)
    chosen = _without_strays(root, chosen, tally)
    has_splits = _has_splits(root, chosen)
    _check_depth(root, chosen, 3 if has_splits else 2)
    _check_classes(root, [path for path in files if not is_hidden(path.relative_to(folder))], chosen)
    return _decoded(root, chosen, has_splits, is_skipping=is_skipping, tally=tally)


def _below_single_folder(folder: Path, images: list[Path]) -> Path:
    """Return the folder, or the single folder in it that has everything, as after unpacking an archive."""
    while images:
        first = {path.relative_to(folder).parts[0] for path in images}
        depths = {len(path.relative_to(folder).parts) for path in images}
        if len(first) > 1 or min(depths) < 3 or split_named(next(iter(first))):
            break
        folder = folder / first.pop()
    if not images:
        raise UserError(f"{folder}: no image was found; allowed: {ALLOWED}, with {', '.join(IMAGE_ENDINGS)}")
    return folder


def _without_strays(root: Path, images: list[Path], tally: Tally) -> list[Path]:
    """Return the images that are in a folder below the root."""
    kept = []
    for path in images:
        if path.parent == root:
            tally.leave_out("stand in no class folder", path.name)
        else:
            kept.append(path)
    if not kept:
        raise UserError(f"{root}: its {len(images)} images stand in no class folder; allowed: {ALLOWED}")
    return kept


def _has_splits(root: Path, images: list[Path]) -> bool:
    """Whether the folders below the root are splits; a class may be called train where others are no splits."""
    tops: dict[str, set[int]] = defaultdict(set)
    for path in images:
        parts = path.relative_to(root).parts
        tops[parts[0]].add(len(parts))
    named = [top for top in tops if split_named(top)]
    are_direct = [top for top in named if 2 in tops[top]]
    others = [top for top in tops if not split_named(top)]
    if not named or (others and len(are_direct) == len(named)):
        return False
    if others:
        raise UserError(f"{root}: {others[0]} stands beside the split {named[0]}; allowed: {ALLOWED}")
    if are_direct:
        raise UserError(f"{root}: images stand in {are_direct[0]} without a class folder; allowed: {ALLOWED}")
    return True


def _check_depth(root: Path, images: Iterable[Path], depth: int) -> None:
    for path in images:
        name = path.relative_to(root)
        if len(name.parts) != depth:
            raise UserError(f"{root}: {name} lies deeper than its class folder or not deep enough; allowed: {ALLOWED}")


def _check_classes(root: Path, files: Iterable[Path], images: Iterable[Path]) -> None:
    """Raise UserError for a class without a readable image, because the class would vanish."""
    used = {path.parent for path in images}
    depth = len(next(iter(used)).relative_to(root).parts)
    for path in files:
        if not path.is_relative_to(root) or len(path.parent.relative_to(root).parts) != depth:
            continue
        if path.parent not in used:
            raise UserError(
                f"{path.parent}: holds no image that can be read ({path.name}, ...); convert its files to one of "
                f"{', '.join(IMAGE_ENDINGS)}, or remove the folder"
            )


def _decoded(root: Path, paths: list[Path], has_splits: bool, *, is_skipping: bool, tally: Tally) -> ImageFolder:
    images, labels, sources, used = [], [], [], []
    splits: list[Split] = []
    seen: dict[str, int] = defaultdict(int)
    for path in paths:
        try:
            image, remarks = open_image(path)
        except UserError:
            if not is_skipping:
                raise
            tally.leave_out("cannot be read as images", str(path.relative_to(root)))
            continue
        for remark in remarks:
            seen[remark] += 1
        parts = path.relative_to(root).parts
        images.append(image)
        labels.append(parts[-2])
        sources.append(hashlib.sha256(image.tobytes()).hexdigest())
        used.append(path)
        split = split_named(parts[0]) if has_splits else None
        splits += [split] if split else []
    tally.use(len(images))
    if not images:
        raise UserError(f"{root}: none of its {len(paths)} images can be read; fetch them again")
    notes = [f"{number} images {remark}" for remark, number in seen.items()]
    return ImageFolder(images, labels, sources, list(splits) if has_splits else None, used, tally, notes)


def open_image(path: Path) -> tuple[Any, list[str]]:
    """One image in mode RGB, turned as its EXIF data say, and what it loses by that.

    16-bit grey keeps its upper 8 bits, as an 8-bit copy of it does.

    Raises:
        UserError: Pillow is missing, or the file is empty, truncated, too large, or of a mode without a fixed range.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the package pillow; run `pip install 'rlkd[hf]'`") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata, which the pixels do not need
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                remarks = _losses(opened)
                image: Any = ImageOps.exif_transpose(opened)
        return _as_rgb(image, opened.format or ""), remarks
    except Exception as error:  # whatever Pillow's decoders raise, the file is at fault
        cause = (
            "it is empty" if path.stat().st_size == 0 else " ".join(str(error).split())[:100] or type(error).__name__
        )
        raise UserError(
            f"{path}: cannot be read as an image ({cause}); remove it, or leave out such images with --columns.broken "
            "skip"
        ) from error


def _losses(image: Any) -> list[str]:
    losses = []
    if image.mode.startswith("I"):
        losses.append("have 16 bits a pixel: their upper 8 bits are used")
    if getattr(image, "n_frames", 1) > 1:
        losses.append("have several frames: the first one is used")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        losses.append("have transparent pixels: their colours are used as if they were opaque")
    return losses


def _as_rgb(image: Any, file_format: str) -> Any:
    """Mode RGB; Pillow itself cuts 16-bit values off at 255, so that such an image would be white."""
    from PIL import Image

    if image.mode in WIDE_GREY or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if image.mode == "I" and file_format not in ("PNG", "PPM"):
            raise ValueError("32-bit whole numbers have no fixed range; convert it to 8 or 16 bits")
        image = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range; convert it to 8 or 16 bits")
    return image.convert("RGB")
