"""Students that are cut from a teacher: some of its blocks, narrower if asked for.

transformers' configurations call a depth by many names. A name is found by trying: each number (or list of numbers)
that counts layers is changed on the meta device, and kept if the model then has fewer blocks and no other difference.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.models.real.blocks import block_paths
from rlkd.models.real.influence import influential_blocks
from rlkd.models.real.pretrained import HIDDEN_UNITS, Kind, as_user_error, new_model, on_meta, state_of

logger = logging.getLogger(__name__)
DEPTH_WORDS = ("layer", "block", "depth", "repeat")  # a configuration's number of layers has one of them in its name
DEFAULT_SHARE = 0.5  # of the blocks


@dataclass(frozen=True)
class StudentCut:
    """How a student is cut from its teacher."""

    layers: int | None = None
    """Blocks that are kept; by default half of them, at least one."""
    keep: Literal["influence", "spread", "first"] = "influence"
    """Which blocks: those that are left when the one of least influence on a few training samples is taken away
    repeatedly (`influence`, cf. Men et al. 2024); evenly spread with the first and the last among them (`spread`, cf.
    Sun et al. 2019); or the first ones. Where blocks differ in size, `influence` means `spread`."""
    blocks: tuple[int, ...] | None = None
    """Blocks that are kept, by their rising numbers from 1, in place of `layers` and `keep`."""
    width: float = 1.0
    """Share of the hidden size, heads and hidden units that is kept; leading rows and columns stay."""

    @property
    def is_given(self) -> bool:
        """Whether blocks are named or counted."""
        return self.layers is not None or self.blocks is not None

    def check(self) -> None:
        """Raise UserError for a student without a layer or wider than its teacher."""
        if self.layers is not None and self.layers < 1:
            raise UserError(f"cut.layers: got {self.layers}; allowed: at least 1")
        if self.blocks is not None and (self.layers is not None or not _rises(self.blocks)):
            raise UserError(
                f"cut.blocks: got {list(self.blocks)!s:.60}{' beside cut.layers' if self.layers else ''}; allowed: "
                "rising numbers from 1, without cut.layers"
            )
        if not 0 < self.width <= 1:
            raise UserError(f"cut.width: got {self.width:g}; allowed: above 0, at most 1")


def _rises(numbers: Sequence[int]) -> bool:
    return bool(numbers) and numbers[0] >= 1 and list(numbers) == sorted(set(numbers))


def kept_layers(num_layers: int, cut: StudentCut) -> list[int]:
    """Teacher blocks (from 0) that the student begins with: for 2 of 6 `spread` gives 0 and 5, `first` 0 and 1.

    `influence` needs the teacher; here it is `spread`.
    """
    if cut.blocks is not None:
        if cut.blocks[-1] > num_layers:
            raise UserError(f"cut.blocks: got {list(cut.blocks)!s:.60}; allowed: 1 to {num_layers}, the teacher's")
        return [number - 1 for number in cut.blocks]
    count = cut.layers or max(1, int(num_layers * DEFAULT_SHARE))
    if count > num_layers:
        raise UserError(f"cut.layers: got {count}; allowed: 1 to {num_layers}, the teacher's")
    return _chosen(num_layers, count, cut.keep)


def _chosen(num_layers: int, count: int, keep: str) -> list[int]:
    if keep == "first":
        return list(range(count))
    return [round(i * (num_layers - 1) / (count - 1)) for i in range(count)] if count > 1 else [0]


def drop_blocks(model: nn.Module, kind: Kind, keep: Sequence[int]) -> nn.Module:
    """Make a plain model of transformers with some of the blocks alone; it answers as if the others were identities.

    Args:
        model: with its blocks in one list, all of one size.
        kind: what it is for.
        keep: rising numbers, from 1, of the blocks that stay.

    Raises:
        UserError: numbers that are no blocks, or a model whose configuration has no number of blocks.
    """
    return student_from_teacher(model, kind, StudentCut(blocks=tuple(keep)))[0]


def student_from_teacher(
    teacher: nn.Module, kind: Kind, cut: StudentCut, inputs: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, list[int]]:
    """Make a smaller copy: some of the teacher's blocks, narrower if asked for, embeddings and head copied.

    A model in stages loses half of the blocks of every stage. Where the width is cut, every tensor is the leading part
    of the teacher's: a start better than random weights, not a working model.

    Args:
        teacher: unchanged.
        kind: what it is for.
        cut: checked here.
        inputs: a batch of training samples, which the influence of blocks is measured on; without one, and where a
            model of the most influential blocks cannot be built, they are spread.

    Returns:
        The student in evaluation mode, and the teacher block (from 0) that each of its blocks was copied from.

    Raises:
        UserError: an impossible cut, or a student that would be as large as the teacher.
    """
    cut.check()
    num_blocks = len(block_paths(teacher))
    if not num_blocks:
        raise UserError(
            f"cut: {type(teacher).__name__} has no list of blocks; give the student's config with --student"
        )
    chosen = kept_layers(num_blocks, cut)
    if cut.keep == "influence" and cut.blocks is None and inputs is not None and len(chosen) < num_blocks:
        influential = influential_blocks(teacher, inputs, len(chosen))
        if influential is None:
            logger.info("cut: the influence of these blocks cannot be measured, so the student's are spread")
        else:
            numbers = [number + 1 for number in influential]
            try:
                student = _student_of(teacher, kind, cut, chosen=influential, num_blocks=num_blocks)
            except UserError as error:
                logger.info("cut: blocks %s have most influence, but make no student (%s)", numbers, error)
            else:
                logger.info("cut: the student begins with blocks %s of the teacher, which have most influence", numbers)
                return student, influential
    return _student_of(teacher, kind, cut, chosen=chosen, num_blocks=num_blocks), chosen


def _student_of(
    teacher: nn.Module, kind: Kind, cut: StudentCut, *, chosen: Sequence[int], num_blocks: int
) -> nn.Module:
    config = _smaller_config(teacher, kind, cut, chosen=chosen, num_blocks=num_blocks)
    with as_user_error(f"cut: no smaller {_type(teacher)} can be built; give the student's config with --student"):
        student = new_model(config, kind, seed=0)
    source = state_of(teacher)
    names = _teacher_names(student, teacher, _picker(cut, num_blocks, chosen), _is_part)
    if names is None:
        raise UserError(
            f"cut: the tensors of a student of type {_type(teacher)} are no parts of the teacher's; give the student's "
            "config with --student"
        )
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            tensor.copy_(source[names[name]][tuple(slice(size) for size in tensor.shape)])
    return student


Pick = Callable[[int, int], Sequence[int]]  # which entries of a list of n the k of a shorter one stand for


def _picker(cut: StudentCut, num_blocks: int, chosen: Sequence[int]) -> Pick:
    def pick(full: int, size: int) -> Sequence[int]:
        is_blocks = (full, size) == (num_blocks, len(chosen))
        return chosen if is_blocks else _chosen(full, size, cut.keep)

    return pick


def _teacher_names(
    student: nn.Module, teacher: nn.Module, pick: Pick, fits: Callable[[Tensor, Tensor], bool]
) -> dict[str, str] | None:
    """Return the teacher's tensor for each of the student's, or None where one has no counterpart that fits."""
    theirs, lists = teacher.state_dict(), (_lists(student), _lists(teacher))
    names = {}
    for name, tensor in student.state_dict().items():
        names[name] = other = _teacher_name(name, lists, pick)
        if other not in theirs or not fits(tensor, theirs[other]):
            return None
    return names


def _is_whole(tensor: Tensor, theirs: Tensor) -> bool:
    return tensor.shape == theirs.shape


def _is_part(tensor: Tensor, theirs: Tensor) -> bool:
    pairs = zip(tensor.shape, theirs.shape, strict=False)
    return tensor.ndim == theirs.ndim and all(a <= b for a, b in pairs)


def _type(model: nn.Module) -> str:
    described: Any = model.config
    return str(described.model_type)


def _lists(model: nn.Module) -> dict[str, int]:
    """Return the number of entries of every list of modules, by its path."""
    return {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}


def _teacher_name(name: str, lists: tuple[Mapping[str, int], Mapping[str, int]], pick: Pick) -> str:
    """Return the teacher's name of a student's tensor; entries of a shorter list correspond to some of the longer."""
    mine, theirs = lists
    own: list[str] = []
    other: list[str] = []
    for part in name.split("."):
        size, full = mine.get(".".join(own)), theirs.get(".".join(other))
        own.append(part)
        if part.isdigit() and size is not None and full is not None and size < full:
            part = str(pick(full, size)[int(part)])
        other.append(part)
    return ".".join(other)


def _smaller_config(teacher: nn.Module, kind: Kind, cut: StudentCut, *, chosen: Sequence[int], num_blocks: int) -> Any:
    """Return the teacher's configuration with fewer blocks and, for width below 1, narrower ones."""
    config: Any = copy.deepcopy(teacher.config)
    config.architectures = [type(teacher).__name__]
    if len(chosen) == num_blocks and cut.is_given:
        smaller = copy.deepcopy(config)
    else:
        found = _fewer_blocks(teacher, config, kind, chosen=chosen, cut=cut)
        if found is None and cut.width == 1.0:
            raise UserError(
                f"cut: a model of type {config.model_type} with {num_blocks} blocks cannot be cut into "
                f"{f'{len(chosen)} layers' if cut.is_given else 'layers'}; give --cut.width below 1, or the "
                "student's config with --student"
            )
        smaller = copy.deepcopy(config) if found is None else found
    if cut.width < 1.0:
        try:
            _narrow(smaller, config, cut.width)
        except (AttributeError, TypeError, ZeroDivisionError) as error:
            raise UserError(
                f"cut.width: a model of type {config.model_type} cannot be narrowed ({error!s:.80}); give the "
                "student's config with --student"
            ) from error
    return smaller


def _fewer_blocks(teacher: nn.Module, config: Any, kind: Kind, *, chosen: Sequence[int], cut: StudentCut) -> Any | None:
    """Return a configuration with the chosen blocks or half of every stage's; None if no name gives their number."""
    blocks = block_paths(teacher)
    pick = _picker(cut, len(blocks), chosen)
    path, full, is_shared = blocks[0].rpartition(".")[0], _lists(teacher), len(blocks) == 1
    for fits in (_is_whole, _is_part):  # a tensor outside of the blocks may have one entry a block
        for smaller in _candidates(config, len(blocks), chosen) if len(chosen) < len(blocks) else ():
            model = on_meta(smaller, kind)
            if model is None or _lists(model).get(path) != len(chosen):
                continue
            if _teacher_names(model, teacher, pick, fits):
                return smaller
        for smaller in _halved(config, is_shared) if not cut.is_given else ():
            model = on_meta(smaller, kind)
            if model is None or not _teacher_names(model, teacher, pick, fits):
                continue
            lists = _lists(model)
            if is_shared or (lists != full and all(lists.get(name, 0) <= size for name, size in full.items())):
                return smaller
    return None


def _parts(config: Any) -> Iterator[tuple[str, ...]]:
    """Paths of a configuration and of those inside it."""
    yield ()
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            yield (name,)


def _part(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _depth_names(part: Any) -> list[str]:
    names = {*part.to_dict(), *getattr(part, "attribute_map", {})}
    return sorted(
        (n for n in names if any(word in n for word in DEPTH_WORDS)), key=lambda n: (n != "num_hidden_layers", n)
    )


def _candidates(config: Any, num_blocks: int, chosen: Sequence[int]) -> Iterator[Any]:
    """Yield configurations with one number that equals the number of blocks replaced by that of the chosen ones."""
    for path in _parts(config):
        values = {name: getattr(_part(config, path), name, None) for name in _depth_names(_part(config, path))}
        if any(_is_depths(value) for value in values.values()):  # a model in stages: its blocks differ in size
            continue
        for name in (name for name, value in values.items() if type(value) is int and value == num_blocks):
            smaller = copy.deepcopy(config)
            if _set(_part(smaller, path), name, len(chosen), chosen=chosen, num_blocks=num_blocks):
                yield _without_stage_names(smaller)


def _is_depths(value: Any) -> bool:
    """Whether a list may have the depth of every stage; one with a zero has a mark for every block, say."""
    return isinstance(value, list | tuple) and bool(value) and all(type(v) is int and v > 0 for v in value)


def _halved(config: Any, is_shared: bool) -> Iterator[Any]:
    """Yield configurations with half of a depth: all entries of a list, or a number where one block runs repeatedly."""
    for path in _parts(config):
        for name in _depth_names(_part(config, path)):
            value: Any = getattr(_part(config, path), name, None)
            is_list = isinstance(value, list | tuple)
            entries = list(value) if is_list else [value]
            if is_list is is_shared or not entries or any(type(v) is not int or v < 1 for v in entries):
                continue
            fewer = [max(1, int(v * DEFAULT_SHARE)) for v in entries]
            smaller = copy.deepcopy(config)
            if fewer != entries and _set(
                _part(smaller, path), name, fewer if is_list else fewer[0], chosen=(), num_blocks=-1
            ):
                yield _without_stage_names(smaller)


def _without_stage_names(config: Any) -> Any:
    """Return the configuration without the names of a backbone's stages, whose number follows the depth."""
    if not hasattr(config, "out_features"):
        return config
    entries = {k: v for k, v in config.to_dict().items() if k not in ("stage_names", "out_features", "out_indices")}
    return type(config).from_dict(entries)


def _set(part: Any, name: str, value: Any, *, chosen: Sequence[int], num_blocks: int) -> bool:
    """Set a depth, and let lists with one entry a block follow it; whether the configuration takes it."""
    try:
        for other, entries in part.to_dict().items():
            if isinstance(entries, list) and len(entries) == num_blocks and other != "depths":
                setattr(part, other, [entries[i] for i in chosen])
        setattr(part, name, value)
    except Exception:  # whatever its own checks raise, this name is not the one
        return False
    return True


def _narrow(smaller: Any, config: Any, width: float) -> None:
    """Heads keep their dimension, so that a head of the student is a head of the teacher."""
    head = config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    num_heads = max(shared, round(config.num_attention_heads * width / shared) * shared)
    smaller.num_attention_heads, smaller.hidden_size = num_heads, num_heads * head
    if hasattr(config, "num_key_value_heads"):
        smaller.num_key_value_heads = num_heads // shared
    for name in HIDDEN_UNITS:
        if isinstance(getattr(config, name, None), int):
            setattr(smaller, name, max(1, round(getattr(config, name) * width)))
