"""Find the tables of a folder and the splits that their names tell."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from rlkd.data.readers import COMPRESSIONS, METADATA, is_hidden, table_format, walk
from rlkd.data.samples import Split
from rlkd.data.tally import Tally
from rlkd.errors import UserError

SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trainset", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "valset", "devset"), "validation"),
    **dict.fromkeys(("test", "testing", "testset", "tst"), "test"),
}
UNCLEAR_WORDS = ("eval", "evaluation", "holdout")  # some call their validation split so, others their test split
SHARD = re.compile(r"(?P<head>.*?)[-_.]?(?P<index>\d+)[-_]of[-_](?P<count>\d+)([-_.][0-9a-f]+)?", re.DOTALL)


def split_named(word: str) -> Split | None:
    """Return the split that a word means, in any case: "Train", "val", "dev"; None for other words."""
    return SPLIT_WORDS.get(word.strip().casefold())


def split_in_name(path: PurePath) -> Split | None:
    """Return the split in a file's name: train-00000-of-00002.parquet, reviews_dev.csv; None for other names.

    Raises:
        UserError: it tells two, or a word that some use for validation and others for test.
    """
    words = re.split(r"[^a-z]+", _stem(path).casefold())
    found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    unclear = [word for word in words if word in UNCLEAR_WORDS]
    if len(found) > 1 or (unclear and not found):
        told = " and ".join(sorted(found)) or unclear[0]
        raise UserError(f"{path}: its name tells {told}; name it after one split: train, validation or test")
    return found.pop() if found else None


def _stem(path: PurePath) -> str:
    """Return the name without the endings of its format and compression."""
    name = path.name
    while PurePath(name).suffix.lower() in COMPRESSIONS or table_format(name) or name.lower().endswith(".txt"):
        name = name[: -len(PurePath(name).suffix)]
    return name


def find_files(
    folder: Path, is_wanted: Callable[[str], bool], what: str, tally: Tally
) -> list[tuple[Split | None, Path]]:
    """Return data files with their splits, in the order of their names.

    The files stand in the folder itself, else in one folder below it, or in folders that are called after splits. A
    split stands in a file's name or its folder's. Files that are no data are left out and counted.

    Args:
        folder: is searched; hidden files do not count.
        is_wanted: tells by its name whether a file holds data.
        what: names such files, for messages.
        tally: of the files seen.

    Raises:
        UserError: files in several folders, a split in some names only, a shard that is missing, one table in two
            formats, or an unclear name.
    """
    everything = walk(folder)
    visible = [path for path in everything if not is_hidden(path.relative_to(folder))]
    for path in everything:
        if is_hidden(path.relative_to(folder)):
            tally.leave_out("are hidden", str(path.relative_to(folder)))
    wanted = [path for path in visible if is_wanted(path.name) and path.name.lower() not in METADATA]
    chosen = _in_one_place(folder, wanted, what)
    splits = {path: _split_of_file(folder, path) for path in chosen}
    for path in visible:
        if path in splits:
            tally.use()
        else:
            tally.leave_out(f"are no {what} or stand elsewhere", str(path.relative_to(folder)))
    told = [path for path in chosen if splits[path] is not None]
    if told and len(told) < len(chosen):
        other = next(path for path in chosen if splits[path] is None)
        raise UserError(
            f"{folder}: {other.name} tells no split in its name while {told[0].name} tells {splits[told[0]]}; name it "
            "after a split, too, or move it away"
        )
    _check_shards(chosen)
    _check_doubles(chosen)
    return [(splits[path], path) for path in chosen]


def _split_of_file(folder: Path, path: Path) -> Split | None:
    above = split_named(path.parent.name) if path.parent != folder else None
    named = split_in_name(path)
    if above is not None and named is not None and above != named:
        raise UserError(f"{path}: its name tells {named} and its folder {above}; rename one of them")
    return above or named


def _in_one_place(folder: Path, wanted: Sequence[Path], what: str) -> list[Path]:
    here = [path for path in wanted if path.parent == folder]
    if here:
        return here
    below: dict[Path, list[Path]] = defaultdict(list)
    for path in wanted:
        below[path.parent].append(path)
    homes = {home.parent if split_named(home.name) else home for home in below}
    if len(homes) > 1:
        shown = ", ".join(str(home.relative_to(folder)) for home in sorted(homes)[:3])
        raise UserError(
            f"{folder}: has {what} in several folders ({shown}{', ...' * (len(homes) > 3)}); give one of them"
        )
    return list(wanted)


def _check_shards(paths: Sequence[Path]) -> None:
    """Raise UserError for a table with a missing part."""
    parts: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for path in paths:
        match = SHARD.fullmatch(_stem(path))
        if match:
            parts[path.parent, match["head"], int(match["count"])].add(int(match["index"]))
    for (parent, head, count), found in parts.items():
        first = 0 if 0 in found else 1
        missing = sorted(set(range(first, first + count)) - found)
        if missing:
            raise UserError(
                f"{parent}: of the {count} parts of {head or 'a table'} number {missing[0]} is missing; fetch it"
            )


def _check_doubles(paths: Sequence[Path]) -> None:
    """Raise UserError for files that differ in their endings only, because they may have the same rows."""
    seen: dict[tuple[Path, str], Path] = {}
    for path in paths:
        other = seen.setdefault((path.parent, _stem(path)), path)
        if other != path:
            raise UserError(f"{path.parent}: {other.name} and {path.name} may hold the same rows; keep one of them")
