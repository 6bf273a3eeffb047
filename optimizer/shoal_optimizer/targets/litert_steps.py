"""The two steps of LiteRT's own tools, run as a script by whichever Python has them.

    python litert_steps.py convert FOLDER    program.pt2 -> float.tflite
    python litert_steps.py quantize FOLDER   float.tflite -> int8.tflite

`FOLDER/job.json` says the rest. The script imports nothing of Shoal: its Python may be another one,
because the tools pin old versions of packages that the controller needs newer.
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PROGRAM, FLOAT, INT8, JOB, FACTS = "program.pt2", "float.tflite", "int8.tflite", "job.json", "facts.json"
CALIBRATION = "calibration.npy"
SIGNATURE = "serving_default"  # the key that LiteRT's own exporters use
# Tensors are named after what they belong to: quantization asks for those of the model.
MODEL, OTHER = "model", "float"
_SCOPE = re.compile(r"Pipeline/[^/;]*?_(preprocess|model|postprocess)(?=[/;])")
_TOOLS = ("litert-torch", "ai-edge-quantizer", "litert-converter", "ai-edge-litert", "torch")


def main(arguments: list[str]) -> None:
    step, folder = arguments[0], Path(arguments[1])
    job = json.loads((folder / JOB).read_text())
    {"convert": convert, "quantize": quantize}[step](folder, job)
    installed = {item.metadata["Name"].lower().replace("_", "-"): item for item in metadata.distributions()}
    versions = {name: installed[name].version for name in _TOOLS if name in installed}
    (folder / FACTS).write_text(json.dumps(versions))


def convert(folder: Path, job: dict[str, Any]) -> None:
    """The exported program of a batch of one as float `.tflite` with the job's tensor names."""
    import litert_torch
    import numpy as np
    import torch

    program = torch.export.load(str(folder / PROGRAM))
    example = torch.from_numpy(np.load(folder / CALIBRATION, allow_pickle=False)[:1])
    made = litert_torch.convert(program.module(), (example,))
    made.export(str(folder / FLOAT))
    _rename(folder / FLOAT, job["input"], job["output"])


def _rename(path: Path, input_name: str, output_name: str) -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    model: Any = flatbuffer_utils.read_model(str(path))
    graph = model.subgraphs[0]
    owners = _owners(graph)
    for index, tensor in enumerate(graph.tensors):
        tensor.name = f"{owners.get(index, OTHER)}_{index}"
    signature = model.signatureDefs[0]
    signature.signatureKey = SIGNATURE
    signature.inputs[0].name, signature.outputs[0].name = input_name, output_name
    graph.tensors[graph.inputs[0]].name = input_name
    model.description = ""
    path.write_bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _owners(graph: Any) -> dict[int, str]:
    """Output tensor -> whether its operation is the model's. What bears no name of a part (the last
    operation, layout changes) belongs to what its input belongs to."""
    owners: dict[int, str] = {}
    made = {int(index) for operation in graph.operators for index in operation.outputs}
    for operation in graph.operators:
        inputs = [int(index) for index in operation.inputs if index >= 0]
        constants = [index for index in inputs if index not in made and index not in graph.inputs]
        parts = set()
        for index in (*operation.outputs, *constants):
            parts |= set(_SCOPE.findall(_text(graph.tensors[index].name)))
        if parts:
            owner = MODEL if "model" in parts else OTHER
        else:
            owner = next((owners[index] for index in inputs if index in owners), OTHER)
        for index in operation.outputs:
            owners[int(index)] = owner
    return owners


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name or "")


def quantize(folder: Path, job: dict[str, Any]) -> None:
    """The model's operations in int8; its preparation, its answer and both ends stay as they are."""
    import numpy as np
    from ai_edge_quantizer import calibrator, quantizer, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    ours, every, path = f"^{MODEL}_", "*", str(folder / FLOAT)
    recipe, ranges = recipe_manager.RecipeManager(), None
    if job["dynamic"]:
        recipe.add_dynamic_config(ours, every, num_bits=8)
    else:
        recipe.add_static_config(ours, every, activation_num_bits=8, weight_num_bits=8)
        for end in ("INPUT", "OUTPUT"):  # the endpoint's own types
            recipe.add_quantization_config(".*", end, algorithm_key="no_quantize")
        items = np.load(folder / CALIBRATION, allow_pickle=False)
        # Its default is a moving average of ranges, which cuts off what few items reach.
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        meter = calibrator.Calibrator(path, num_threads=threads, qsv_update_func=qsv_utils.min_max_update)
        data = [{job["input"]: items[place : place + 1]} for place in range(len(items))]
        meter.calibrate({SIGNATURE: data}, recipe)
        ranges = meter.get_model_qsvs()
    tool = quantizer.Quantizer(path)
    tool.load_quantization_recipe(recipe.get_quantization_recipe())
    made = tool.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    (folder / INT8).write_bytes(bytes(made.quantized_model))


if __name__ == "__main__":
    main(sys.argv[1:])
