"""Write and read the weights of a user's own module that was cut; the class itself stays the user's code."""

import copy
from collections.abc import Sequence

from safetensors.torch import save
from torch import Tensor, nn

from rlkd.errors import UserError
from rlkd.io.files import load_tensors, tensor_shapes
from rlkd.models.real.shrink import skip_blocks, take_out

SIZED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)


def _vectors(module: nn.Module) -> dict[str, Tensor]:
    """Tensors of a layer or normalisation whose first size is its number of outputs."""
    names = ("weight", "bias", "running_mean", "running_var")
    return {name: value for name in names if isinstance(value := getattr(module, name, None), Tensor)}


def _set(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors of other sizes into a module, and tell it the sizes."""
    for name, value in tensors.items():
        now = getattr(module, name)
        fresh = value.detach().clone()
        setattr(module, name, nn.Parameter(fresh, requires_grad=False) if isinstance(now, nn.Parameter) else fresh)
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.num_features = len(weight if weight is not None else tensors["running_mean"])


def own_weights(model: nn.Module) -> bytes:
    """Return the tensors of `state_dict` as safetensors; tensors that are shared are written twice."""
    return save({name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()})


def load_own_module(
    own: nn.Module, blob: bytes, path: str, *, gone: Sequence[str] = (), skipped: Sequence[str] = ()
) -> nn.Module:
    """Return a copy of `own` in evaluation mode with weights of `own_weights`, cut to their sizes.

    Args:
        own: not changed.
        blob: of `own_weights`.
        path: begins the messages.
        gone: parts that no sample reaches and that have no weights.
        skipped: blocks that hand on what enters them and that have no weights.

    Raises:
        UserError: tensors are missing, left over, or of sizes that its layers cannot take.
    """
    model = copy.deepcopy(own).cpu()
    try:
        skip_blocks(model, skipped)
        take_out(model, gone)
    except AttributeError as error:
        raise UserError(f"{path}: {error!s:.100}; give a module of the class that the student was made of") from error
    found = tensor_shapes(blob, path)
    wanted = model.state_dict()
    if set(found) != set(wanted):
        name = sorted(set(found) ^ set(wanted))[0]
        where = "the file alone" if name in found else "the module alone"
        raise UserError(f"{path}: {name} is in {where}; give a module of the class that the student was made of")
    tensors = load_tensors(blob, {n: (wanted[n].dtype, found[n][1]) for n in wanted}, path)
    for place, module in model.named_modules():
        if not isinstance(module, SIZED):
            continue
        own_names = [f"{place}.{name}" if place else name for name in _vectors(module)]
        cut = {n.rpartition(".")[2]: tensors[n] for n in own_names if tensors[n].shape != wanted[n].shape}
        if any(t.ndim != wanted[f"{place}.{n}" if place else n].ndim for n, t in cut.items()):
            raise UserError(f"{path}: {place} has another number of axes; give a module of the student's class")
        if cut:
            _set(module, cut)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit the module ({str(error).splitlines()[-1].strip():.120})") from error
    return model.eval()
