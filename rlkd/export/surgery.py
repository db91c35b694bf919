"""Early exits in an ONNX graph: fold what follows an exit into an `If`, or cut the graph into a chain of parts.

The graph that comes in runs every block and names, for each early exit, whether any sample goes on (`go_on_K`), which
ones (`waiting_K`, [B] bool) and the answers so far (`answers_K`, [B, C]). Its last output is `last_logits`.
"""

from collections.abc import Collection, Iterable, Sequence

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from rlkd.export.flat import BATCH, LAST, LOGITS, answers, go_on, waiting


def fold_exits(model: ModelProto, num_early: int) -> ModelProto:
    """Return the graph with one output `logits`, whose later blocks run only while a sample waits.

    Args:
        model: as the module's docstring says, with `num_early` early exits; not changed.
        num_early: number of early exits, possibly 0.
    """
    ends = [[go_on(k), answers(k)] for k in range(1, num_early + 1)] + [[LAST]]
    levels: list[list[NodeProto]] = []
    taken: set[str] = set()  # outputs of nodes that already stand at a level
    for end in ends:
        nodes = [node for node in _ancestors(model, end) if not set(node.output) & taken]
        taken |= {name for node in nodes for name in node.output}
        levels.append(nodes)
    shape = _value_info(model)[LAST]
    inner, result = levels[-1], LAST
    for k in range(num_early, 0, -1):
        then = _branch(f"behind_exit_{k}", inner, result, shape)
        leave = helper.make_node("Identity", [answers(k)], [f"left_at_{k}"], name=f"leave_at_{k}")
        otherwise = _branch(f"at_exit_{k}", [leave], f"left_at_{k}", shape)
        result = f"logits_{k}"
        choice = helper.make_node("If", [go_on(k)], [result], name=f"exit_{k}", then_branch=then, else_branch=otherwise)
        inner = [*levels[k - 1], choice]
    end_node = helper.make_node("Identity", [result], [LOGITS], name="answer")
    return _model(model, [*inner, end_node], list(model.graph.input), [_renamed(shape, LOGITS)])


def split_parts(model: ModelProto, num_early: int) -> list[ModelProto]:
    """Return one graph for each exit; every part reads what an earlier one gives, for the samples that still wait.

    An early part k gives `answers_k`, `waiting_k` and what later parts read; the last one gives `last_logits`.
    Every tensor that goes from part to part has the batch as its first dimension, so a runner can take rows out of it.
    What does not, such as a length that is read from an input, is computed again.

    Args:
        model: as in `fold_exits`.
        num_early: number of early exits, at least 1.
    """
    values = _value_info(model)
    goals = [[answers(k), waiting(k)] for k in range(1, num_early + 1)] + [[LAST]]
    done: set[str] = set()  # what later parts may read
    parts: list[tuple[list[NodeProto], list[str], list[str]]] = []
    for goal in goals:
        nodes, read = _until(model, goal, done)
        for node in nodes:  # a node is run again if not all that it gives can be handed on
            if all(_is_by_sample(values.get(name)) for name in node.output if name):
                done |= set(node.output)
        parts.append((nodes, read, goal))
    built = []
    for index, (nodes, read, goal) in enumerate(parts):
        later = {name for _, names, _ in parts[index + 1 :] for name in names}
        made = {name for node in nodes for name in node.output}
        given = [*goal, *sorted((later & made) - set(goal))]
        built.append(_model(model, nodes, [values[name] for name in read], [values[name] for name in given]))
    return built


def operators_of(model: ModelProto) -> list[str]:
    """Return the names of all operators of a graph and its branches, sorted."""
    return sorted({node.op_type for node in _all_nodes(model.graph.node)})


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterable[NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g.node)


def _ancestors(model: ModelProto, names: Sequence[str]) -> list[NodeProto]:
    """Return the nodes that the tensors `names` need, in the graph's order."""
    return _until(model, names, set())[0]


def _until(model: ModelProto, names: Sequence[str], stop: Collection[str]) -> tuple[list[NodeProto], list[str]]:
    """Return the nodes that `names` need, and the inputs and tensors of `stop` at which the way back ends."""
    maker = {name: index for index, node in enumerate(model.graph.node) for name in node.output}
    graph_inputs = [value.name for value in model.graph.input]
    found: set[int] = set()
    ends: set[str] = set()
    open_names = list(names)
    while open_names:
        name = open_names.pop()
        if name in stop or name in graph_inputs:
            ends.add(name)
        elif name in maker and maker[name] not in found:
            found.add(maker[name])
            open_names += _reads(model.graph.node[maker[name]])
    order = [*(name for name in graph_inputs if name in ends), *sorted(ends - set(graph_inputs))]
    return [model.graph.node[index] for index in sorted(found)], order


def _reads(node: NodeProto) -> list[str]:
    """Return what a node reads; its branches may read tensors from outside, too."""
    inside = [
        name for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in a.g.node for name in _reads(n)
    ]
    return [name for name in [*node.input, *inside] if name]


def _is_by_sample(value: ValueInfoProto | None) -> bool:
    if value is None:
        return False
    dims = value.type.tensor_type.shape.dim
    return len(dims) > 0 and dims[0].dim_param == BATCH


def _value_info(model: ModelProto) -> dict[str, ValueInfoProto]:
    graph = model.graph
    return {value.name: value for value in [*graph.value_info, *graph.input, *graph.output]}


def _branch(name: str, nodes: Sequence[NodeProto], output: str, shape: ValueInfoProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [_renamed(shape, output)])


def _renamed(value: ValueInfoProto, name: str) -> ValueInfoProto:
    """Return a copy of `value` under another name."""
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def _model(
    source: ModelProto,
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
) -> ModelProto:
    """Build a graph of `nodes` with the weights of `source` that they read, and check it."""
    used = {name for node in _all_nodes(nodes) for name in node.input}
    weights: list[TensorProto] = [tensor for tensor in source.graph.initializer if tensor.name in used]
    graph = helper.make_graph(list(nodes), "student", list(inputs), list(outputs), weights)
    built = helper.make_model(graph, opset_imports=list(source.opset_import), ir_version=source.ir_version)
    built.functions.extend(source.functions)
    onnx.checker.check_model(built)
    return built
