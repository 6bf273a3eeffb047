"""A user's ONNX file made ready: one self-contained graph whose inputs are what applications send.

Weights come inside, inputs that never change become constants, open sizes are bound to the data's, and what
ONNX Runtime can compute beforehand is computed (constant nodes, shape arithmetic, batch norms, `If` on a
constant). Each step is kept only if the answers on real items stay the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal_optimizer import onnx_branches
from shoal_optimizer.onnx_data import Arrays
from shoal_protos.errors import InvalidInput, MissingExtra

OLDEST_OPSET = 17  # what int8 with per-channel scales and every runtime reads
NEWEST_IR = 10  # onnxruntime 1.20 reads it
BATCH = "batch"
PROBED = 4  # items that answers are compared on
LARGEST = 2 << 30  # protobuf's own limit
RTOL, ATOL = 1e-3, 1e-4
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
# Their output's shape depends on the values, so items of a batch cannot be told apart.
_DATA_DEPENDENT = ("NonZero", "NonMaxSuppression", "Unique", "Compress", "SequenceConstruct", "RoiAlign")


@dataclass(frozen=True)
class Prepared:
    """A graph that Shoal can work with.

    Attributes:
        content: the ONNX file.
        notes: what was changed, for people.
    """

    content: bytes
    notes: tuple[str, ...] = ()


def prepare(path: Path, arrays: Arrays) -> Prepared:
    """Reads `path` and makes it ready for the data.

    Raises:
        InvalidInput: no ONNX file, a missing weight file, an operator that no runtime here has, an input
            without data, an output that is not one answer an item; each names the node or tensor.
    """
    model = read(path)
    _check_operators(path.name, model)
    notes: list[str] = []
    _bind_fixed(model, arrays, notes)
    _bind_shapes(path.name, model, arrays, notes)
    _order_outputs(path.name, model, arrays)
    model, branches = onnx_branches.inlined(model)
    if branches:
        notes.append(f"{branches} If nodes are decided by constants; the branches that are taken remain.")
    model = _settled_batch(path.name, model, arrays, notes)
    wanted = _answers(model, arrays)
    _check_answers(path.name, model, arrays, wanted)
    for step in (folded, modern, folded):
        model = _kept_if_equal(step, model, arrays, wanted, notes)
    _name_nodes(model.graph)
    model.ir_version = min(max(model.ir_version, 8), NEWEST_IR)
    return Prepared(model.SerializeToString(deterministic=True), tuple(dict.fromkeys(notes)))


def read(path: Path) -> Any:
    """The model with its external weights inside. Raises InvalidInput, MissingExtra."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("optimizer", "onnx") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise InvalidInput(f"{path.name} is no ONNX model: {error}.", "Export it again.") from error
    for tensor in _external(model.graph):
        name = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if not (path.parent / name).is_file():
            raise InvalidInput(
                f"{path.name} keeps the weights '{tensor.name}' in '{name}', which is missing.",
                f"Put '{name}' beside it, or save the model as one file: "
                "onnx.save(onnx.load(path), path, save_as_external_data=False).",
            )
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise InvalidInput(
            f"The weight files of {path.name} cannot be read: {error}.", "Save the model as one file."
        ) from error
    if model.ByteSize() > LARGEST:
        raise InvalidInput(f"{path.name} has more than 2 GiB.", "Shoal is for models of edge devices.")
    return model


def nodes_of(graph: Any) -> Iterator[Any]:
    """Every node, those inside If, Loop and Scan too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from nodes_of(inner)


def inputs_of(graph: Any) -> list[Any]:
    """The graph's inputs that somebody has to give; older files list weights among them too."""
    constants = {item.name for item in graph.initializer}
    return [item for item in graph.input if item.name not in constants]


def _external(graph: Any) -> list[Any]:
    import onnx

    found = [item for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]
    for node in nodes_of(graph):
        found += [a.t for a in node.attribute if a.t.data_location == onnx.TensorProto.EXTERNAL]
    return found


def _check_operators(name: str, model: Any) -> None:
    own = {item.domain for item in model.functions}
    for node in nodes_of(model.graph):
        if node.domain not in _DOMAINS and node.domain not in own:
            raise InvalidInput(
                f"The node '{node.name or node.output[0]}' of {name} is the operator '{node.op_type}' of "
                f"'{node.domain}', which no runtime of a device has.",
                "Export the model with standard ONNX operators, or cut it before that node with "
                "onnx.utils.extract_model() and do the rest in the application.",
            )
    used = {node.domain or "" for node in nodes_of(model.graph)} | own | {""}
    kept = [item for item in model.opset_import if (item.domain or "") in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


# ---------------------------------------------------------------------------- inputs


def _bind_fixed(model: Any, arrays: Arrays, notes: list[str]) -> None:
    """Inputs that the data fix become constants of the graph."""
    from onnx import helper, numpy_helper

    for name, value in arrays.fixed.items():
        given = next((item for item in inputs_of(model.graph) if item.name == name), None)
        if given is None:
            known = ", ".join(item.name for item in inputs_of(model.graph))
            raise InvalidInput(f"The data fix '{name}', which is no input.", f"Inputs are {known}.")
        dtype = helper.tensor_dtype_to_np_dtype(given.type.tensor_type.elem_type)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        model.graph.input.remove(given)
        notes.append(f"The input '{name}' is a constant now, as the data say.")


def _bind_shapes(name: str, model: Any, arrays: Arrays, notes: list[str]) -> None:
    """Every other input gets its data's sizes; the first dimension stays the batch."""
    for value in inputs_of(model.graph):
        items = arrays.inputs.get(value.name)
        if items is None and len(inputs_of(model.graph)) == 1 == len(arrays.inputs):
            items = next(iter(arrays.inputs.values()))
        if items is None:
            raise InvalidInput(
                f"{name} has the input '{value.name}', for which there are no data.",
                f"Add an array 'inputs:{value.name}' with one row an item, or 'fixed:{value.name}' where it "
                "never changes (a sample rate, an initial state).",
            )
        if not value.type.HasField("tensor_type"):
            raise InvalidInput(
                f"The input '{value.name}' of {name} is no tensor.", "Export the model with tensors."
            )
        dims = value.type.tensor_type.shape.dim
        if len(dims) != items.ndim and value.type.tensor_type.HasField("shape"):
            raise InvalidInput(
                f"The input '{value.name}' has {len(dims)} dimensions, its data {items.ndim}.",
                "Give one row an item" + (", or fix it with 'fixed:NAME'." if not len(dims) else "."),
            )
        for place, size in enumerate(items.shape[1:], 1):
            if place < len(dims) and dims[place].dim_value not in (0, size):
                raise InvalidInput(
                    f"The input '{value.name}' is {[d.dim_value or -1 for d in dims]}, its data are "
                    f"{list(items.shape)}.",
                    "Give data of the model's own size.",
                )
            if place < len(dims) and not dims[place].dim_value:
                notes.append(f"Open sizes of '{value.name}' are those of the data, {list(items.shape[1:])}.")
        batch = dims[0].dim_value if len(dims) else 0
        _set_shape(value, [batch or BATCH, *items.shape[1:]])


def _set_shape(value: Any, sizes: Sequence[int | str]) -> None:
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for size in sizes:
        dim = shape.dim.add()
        if isinstance(size, str):
            dim.dim_param = size
        else:
            dim.dim_value = int(size)


def _order_outputs(name: str, model: Any, arrays: Arrays) -> None:
    """The output that is judged comes first; sizes are left to inference, the old ones may be wrong now."""
    outputs = list(model.graph.output)
    if arrays.judged:
        chosen = [item for item in outputs if item.name == arrays.judged]
        if not chosen:
            raise InvalidInput(
                f"The data judge '{arrays.judged}', which is no output of {name}.",
                f"Outputs are {', '.join(item.name for item in outputs)}.",
            )
        outputs = chosen + [item for item in outputs if item.name != arrays.judged]
    for value in outputs:
        if not value.type.HasField("tensor_type"):
            raise InvalidInput(
                f"The output '{value.name}' of {name} is no tensor.",
                "Cut it off with onnx.utils.extract_model(), or export the model without it.",
            )
    copies = [type(item).FromString(item.SerializeToString()) for item in outputs]
    del model.graph.output[:]
    for value in copies:
        dims = value.type.tensor_type.shape.dim
        for dim in dims:
            if not dim.dim_value:
                dim.ClearField("dim_param")
        model.graph.output.append(value)
    del model.graph.value_info[:]


# ---------------------------------------------------------------------------- batches and answers


def _settled_batch(name: str, model: Any, arrays: Arrays, notes: list[str]) -> Any:
    """The model with the batch that it has: open, or 1 where its operations insist on that."""
    sizes = {item.type.tensor_type.shape.dim[0].dim_value for item in inputs_of(model.graph)}
    if sizes == {0} and _same_in_batches(model, arrays):
        return model
    if sizes - {0, 1}:
        opened = _with_batch(model, BATCH)
        if _same_in_batches(opened, arrays):
            notes.append(f"The batch was fixed to {max(sizes)}; it is open now (answers are equal).")
            return opened
        raise InvalidInput(
            f"{name} has a fixed batch of {max(sizes)} that its operations insist on.",
            "Export it again with an open batch dimension, or with a batch of 1.",
        )
    if sizes == {0}:
        notes.append("The batch is 1: answers differ, or fail, when items come together.")
    return _with_batch(model, 1)


def _with_batch(model: Any, batch: int | str) -> Any:
    made = type(model).FromString(model.SerializeToString())
    for value in inputs_of(made.graph):
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        _set_shape(value, [batch, *sizes[1:]])
    for value in made.graph.output if batch == BATCH else ():
        dims = value.type.tensor_type.shape.dim
        if len(dims):
            dims[0].dim_param = BATCH
    return made


def session(model: Any) -> Any:
    """An ONNX Runtime session of one thread. Raises what ONNX Runtime raises."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _feed(model: Any, arrays: Arrays, start: int, stop: int) -> dict[str, np.ndarray]:
    from onnx import helper

    feed = {}
    for value in inputs_of(model.graph):
        items = arrays.inputs.get(value.name)
        if items is None:
            items = next(iter(arrays.inputs.values()))
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feed[value.name] = np.ascontiguousarray(items[start:stop]).astype(dtype)
    return feed


def _same_in_batches(model: Any, arrays: Arrays) -> bool:
    """True when two items together get the answers that they get alone."""
    if arrays.count < 2:
        return False
    try:
        loaded = session(model)
        name = [model.graph.output[0].name]
        together = loaded.run(name, _feed(model, arrays, 0, 2))[0]
        alone = [loaded.run(name, _feed(model, arrays, i, i + 1))[0] for i in range(2)]
        return bool(together.shape[0] == 2 and _equal(together, np.concatenate(alone)))
    except Exception:
        return False  # whatever it raises: the model wants its batch


def _answers(model: Any, arrays: Arrays) -> list[list[np.ndarray]]:
    """All outputs of the first items, one at a time. Raises InvalidInput."""
    try:
        loaded = session(model)
        return [loaded.run(None, _feed(model, arrays, i, i + 1)) for i in range(min(PROBED, arrays.count))]
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InvalidInput(
            f"ONNX Runtime cannot run the model on its data: {(lines or [''])[0][:400]}",
            "Look at the node that it names, and at the sizes of the data.",
        ) from error


def _check_answers(name: str, model: Any, arrays: Arrays, answers: Sequence[Sequence[np.ndarray]]) -> None:
    judged = [row[0] for row in answers]
    output = model.graph.output[0].name
    if any(not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub" for value in judged):
        raise InvalidInput(f"The output '{output}' of {name} gives no numbers.", "Judge another output.")
    shapes = {value.shape for value in judged}
    if len(shapes) > 1:
        culprit = _culprit(model.graph, output)
        raise InvalidInput(
            f"The output '{output}' of {name} has another size per item, {sorted(shapes)[:3]}{culprit}.",
            "Cut the model before that with onnx.utils.extract_model(); the application does the rest.",
        )
    if judged[0].ndim < 1 or judged[0].shape[0] != 1:
        raise InvalidInput(
            f"The output '{output}' of {name} is {list(judged[0].shape)} for one item: it has no batch.",
            "Judge an output whose first dimension is the batch ('targets:NAME'), or export it so.",
        )


def _culprit(graph: Any, output: str) -> str:
    makers = {name: node for node in graph.node for name in node.output}
    todo, seen = [output], set()
    while todo:
        node = makers.get(todo.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type in _DATA_DEPENDENT:
            return f" (because of the node '{node.name or node.output[0]}', {node.op_type})"
        todo += node.input
    return ""


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    scale = float(np.nanmax(np.abs(one), initial=0.0))
    return bool(np.allclose(one, other, rtol=RTOL, atol=ATOL + RTOL * scale, equal_nan=True))


# ---------------------------------------------------------------------------- simplifying


def folded(model: Any) -> Any:
    """What ONNX Runtime's basic optimizations leave: standard operators only, constants computed."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="shoal-fold-") as folder:
        target = Path(folder) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        made = onnx.load(str(target))
    domains = {node.domain or "" for node in nodes_of(made.graph)}
    if not domains <= {node.domain or "" for node in nodes_of(model.graph)}:
        return model  # an operator of one runtime only: OpenVINO could not read it
    kept = [item for item in made.opset_import if (item.domain or "") in domains | {""}]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    _carry(model, made)
    return made


def modern(model: Any) -> Any:
    """The model in an opset that has per-channel scales and that every runtime reads."""
    from onnx import version_converter

    versions = {item.domain: item.version for item in model.opset_import}
    if versions.get("", OLDEST_OPSET) >= OLDEST_OPSET:
        return model
    made = version_converter.convert_version(model, OLDEST_OPSET)
    _carry(model, made)
    return made


def _carry(model: Any, made: Any) -> None:
    """Metadata that the user wrote, and the sizes of inputs and outputs, stay."""
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    made.doc_string, made.producer_name = model.doc_string, model.producer_name


def _kept_if_equal(
    step: Any, model: Any, arrays: Arrays, wanted: Sequence[Sequence[np.ndarray]], notes: list[str]
) -> Any:
    try:
        made = step(model)
        got = _answers(made, arrays)
    except Exception as error:
        if step is modern:
            notes.append(f"It stays in its old opset: {str(error)[:200]}")
        return model
    same = all(
        _equal(mine, theirs)
        for a, b in zip(wanted, got, strict=True)
        for mine, theirs in zip(a, b, strict=True)
    )
    return made if same else model


def _name_nodes(graph: Any) -> None:
    """Unique names: quantizers and reports name nodes."""
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        name = node.name or f"{node.op_type}_{number}"
        while name in seen:
            name += f"_{number}"
        node.name = name
        seen.add(name)


def metadata(content: bytes) -> Mapping[str, str]:
    """Custom metadata of an ONNX file."""
    import onnx

    return {item.key: item.value for item in onnx.load_from_string(content).metadata_props}
