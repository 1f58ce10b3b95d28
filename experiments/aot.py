"""Compiles the training step of a config for a TPU slice, on a machine without one.

    python -m experiments.aot --config=configs/vit_pretrain.py --topology=v5e:2x4

prints for each method what one device of the slice would need: memory, FLOPs and
collectives of one step, as the TPU compiler reports them. Everything is built from
shapes: no weights are made or read and no data set is loaded. Needs the ``libtpu``
wheel (``pip install "jax[tpu]"``), no TPU. Exit status 1 if a method does not fit.
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import config_flags

from experiments import learning, tasks
from experiments import sharding as sharding_lib
from experiments.config import check, methods_of
from experiments.data import NUM_CLASSES
from experiments.metrics import write_json
from experiments.runs import recipe_for
from snnk_jax.models.vit_params import read_config

# Keeps libtpu from asking a metadata server and from warning that there is none.
_LIBTPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


class OutOfMemoryError(RuntimeError):
    """The compiled step does not fit into the memory of a device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What one training step needs; bytes and FLOPs are of one device.

    ``collectives`` maps an operation to how often it stands in the program and to the
    bytes of its results.
    """

    method: str
    trainable_params: int
    frozen_params: int
    compile_seconds: float
    memory_bytes: dict[str, int]
    flops: float
    collectives: dict[str, dict[str, int]]

    def table(self) -> str:
        """The report as aligned lines."""
        rows = [
            ("trainable parameters", f"{self.trainable_params:,}"),
            ("frozen parameters", f"{self.frozen_params:,}"),
            ("compile time", f"{self.compile_seconds:.1f} s"),
            ("FLOPs", f"{self.flops:.4g}"),
        ]
        rows += [
            (f"memory, {name}", f"{size / 2**20:,.1f} MiB")
            for name, size in self.memory_bytes.items()
        ]
        rows += [
            (name, f"{found['count']:,} ({found['bytes'] / 2**20:,.2f} MiB)")
            for name, found in self.collectives.items()
        ]
        return "\n".join(f"  {name:<24}{value:>24}" for name, value in rows)


def get_topology(name: str) -> topologies.TopologyDescription:
    """Describes a TPU slice by its name, as ``v5e:2x4``.

    Raises:
      ImportError: if libtpu is not installed.
      ValueError: if libtpu does not know the name.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "libtpu must be installed to compile for a TPU: "
            f'pip install "jax[tpu]=={jax.__version__}".'
        )
    options: dict[str, Any] = {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # else two devices a chip
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            "topology must name a TPU slice, as v5e:2x4, v4:2x2x1 or v6e:2x4. "
            f"Got {name!r}: {_first_line(error)}"
        ) from error


def compile_method(config: Any, method: str, num_classes: int, mesh: Mesh) -> Report:
    """Compiles the training step of one method for the devices of a mesh.

    ``config.model.weights`` must be empty, see :func:`without_weights`.

    Raises:
      OutOfMemoryError: if the step does not fit; says what is needed and available.
    """

    def build() -> nnx.Module:
        rngs = nnx.Rngs(params=0, projection=1)
        model = tasks.build_model(config, num_classes, rngs)
        return tasks.METHODS[method].adapt(model, config, rngs)

    model = nnx.eval_shape(build)
    # Learning rate and seed do not change the program: any will do.
    recipe = recipe_for(config, learning_rate=1e-3, seed=0, eval_split="val")
    optimizer = learning.make_optimizer(recipe)
    graphdef, params, projections, frozen = learning.split_model(
        model, tasks.METHODS[method].trainable
    )
    state = jax.eval_shape(learning.make_init(optimizer, recipe), params)
    size = config.model.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((recipe.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32),
    }
    shardings = learning.step_shardings(
        state, projections, frozen, config.mesh.rules, mesh
    )
    step = learning.jit_train_step(graphdef, optimizer, recipe, shardings)
    began = time.monotonic()
    try:
        compiled = step.lower(state, projections, frozen, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(out_of_memory_message(str(error))) from error
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    return Report(
        method=method,
        trainable_params=_count(params),
        frozen_params=_count((projections, frozen)),
        compile_seconds=seconds,
        memory_bytes={
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "donated": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
            "generated code": memory.generated_code_size_in_bytes,
        },
        flops=compiled.cost_analysis()["flops"],
        collectives=count_collectives(compiled.as_text()),
    )


def without_weights(config: Any) -> Any:
    """The config of a model with the sizes of ``model.weights``, built from scratch."""
    if not config.model.weights:
        return config
    stored = read_config(config.model.weights)
    config = config.copy_and_resolve_references()
    config.model.update(weights="", preset="")
    for name in ("patch_size", "hidden_size", "depth", "num_heads", "mlp_dim", "pool"):
        config.model[name] = getattr(stored, name)
    return config


def _count(tree: Any) -> int:
    """Floating-point numbers in a tree; a projection's random key holds none."""
    return sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    )


_INSTRUCTION = re.compile(
    rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(.*?(?:channel_id=(\d+)|$)"
)
_FUSED_SCATTER = re.compile(r"^%?all-reduce-scatter\S* \(.*\) -> (.*) \{$")
_ARRAY = re.compile(r"\b[a-z]+(\d+)?[a-z0-9]*\[([\d,]*)\]")


def count_collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Counts the collective operations of a compiled program and their bytes.

    The bytes are those of the results on one device. The parts of an asynchronous
    operation, which share a channel, count once, and so does an operation in the
    body of a loop. libtpu writes a reduce-scatter as an all-reduce in a computation
    named ``all-reduce-scatter``.

    Args:
      hlo: text of the optimized HLO module.

    Returns:
      ``{operation: {"count": ..., "bytes": ...}}`` for all of :data:`COLLECTIVES`.
    """
    totals = {name: {"count": 0, "bytes": 0} for name in COLLECTIVES}
    seen = set()
    in_scatter = False

    def add(name: str, sizes: list[int]) -> None:
        totals[name]["count"] += 1
        totals[name]["bytes"] += sum(sizes)

    for line in hlo.splitlines():
        if scatter := _FUSED_SCATTER.match(line):
            in_scatter = True
            add("reduce-scatter", _array_bytes(scatter[1]))
        elif line.startswith("}"):
            in_scatter = False
        elif not in_scatter and (found := _INSTRUCTION.search(line)):
            result, name, start, channel = found.groups()
            if channel and (name, channel) in seen:
                continue
            seen.add((name, channel))
            if start and name != "all-reduce":  # operands, results, flags
                sizes = _array_bytes(result.replace("u32[]", ""))
                sizes = sizes[len(sizes) // 2 :]
            else:
                sizes = _array_bytes(result)
            add(name, sizes)
    return totals


def _array_bytes(shapes: str) -> list[int]:
    """Bytes of each array in the text of a (tuple) shape."""
    return [
        math.prod(int(length) for length in lengths.split(",") if length)
        * max(int(bits or 8), 8)  # pred has no number of bits
        // 8
        for bits, lengths in _ARRAY.findall(shapes)
    ]


def out_of_memory_message(error: str) -> str:
    """One line, needed against available memory, from the compiler's error."""
    for pattern in (
        r"\((?P<needed>\S+)\) exceeds available (?P<space>\w+) \((?P<limit>\S+)\)",
        r"Used (?P<needed>\S+) of (?P<limit>\S+) (?P<space>\w+)",
    ):
        if found := re.search(pattern, error):
            return (
                "out of memory: needs {needed}iB of {space} per device, {limit}iB "
                "available. Try a smaller optim.batch_size, model.remat or more "
                "devices."
            ).format_map(found.groupdict())
    return f"out of memory: {_first_line(error)}"


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0]


def prepare(config: Any, topology: str, num_classes: int = 0) -> tuple[Mesh, int]:
    """Checks what was asked for, before anything is compiled.

    Args:
      config: the config; its mesh is laid over the devices of the topology.
      topology: name of the TPU slice, see :func:`get_topology`.
      num_classes: outputs of the model; 0 takes those of ``config.data.name``.

    Returns:
      The mesh and the number of outputs.

    Raises:
      ImportError: if libtpu is not installed.
      ValueError: for a config, topology or mesh that cannot be compiled.
    """
    check(config)
    if config.model.family != "vit":
        raise ValueError(
            f"config.model.family must be vit here. Got {config.model.family!r}."
        )
    num_classes = num_classes or NUM_CLASSES.get(config.data.name, 0)
    if num_classes < 1:
        raise ValueError(
            f"num_classes must be given for data.name={config.data.name!r}. "
            f"Got {num_classes}."
        )
    devices = get_topology(topology).devices
    mesh = sharding_lib.make_mesh(config.mesh.axes, devices)
    if config.optim.batch_size % mesh.shape["data"]:
        raise ValueError(
            "optim.batch_size must be divisible by the mesh axis 'data', "
            f"{mesh.shape['data']}. Got {config.optim.batch_size}."
        )
    return mesh, num_classes


def compile_config(config: Any, num_classes: int, mesh: Mesh) -> list[dict[str, Any]]:
    """Compiles every method of a config and prints its table.

    Returns:
      A report for each method, or its ``error`` if it does not fit.
    """
    reports = []
    for method in methods_of(config):
        try:
            report = compile_method(config, method, num_classes, mesh)
        except OutOfMemoryError as error:
            print(f"\n{method}: {error}", flush=True)
            reports.append({"method": method, "error": str(error)})
        else:
            print(f"\n{method}\n{report.table()}", flush=True)
            reports.append(dataclasses.asdict(report))
    return reports


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}.")
    logging.set_verbosity(logging.WARNING)
    # Compile only: leave a TPU of this machine to others.
    jax.config.update("jax_platforms", "cpu")
    for name, value in _LIBTPU_ENV.items():
        os.environ.setdefault(name, value)
    options = flags.FLAGS
    try:
        config = without_weights(options.config)
        mesh, num_classes = prepare(config, options.topology, options.num_classes)
    except (ImportError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    kind = mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(
        f"{config.name} on {options.topology}: {mesh.size} x {kind}, mesh {axes}, "
        f"global batch {config.optim.batch_size}. Figures are per device.",
        flush=True,
    )
    reports = compile_config(config, num_classes, mesh)
    if options.json:
        summary = {
            "config": config.name,
            "topology": options.topology,
            "device_kind": kind,
            "num_devices": mesh.size,
            "mesh": dict(mesh.shape),
            "batch_size": config.optim.batch_size,
            "num_classes": num_classes,
            "jax": jax.__version__,
            "methods": reports,
        }
        write_json(options.json, summary)
    if any("error" in report for report in reports):
        sys.exit(1)


def define_flags() -> None:
    """Defines the flags of the command; not on import, since names are global."""
    config_flags.DEFINE_config_file(
        "config", None, "Recipe: configs/NAME.py[:ARG].", lock_config=True
    )
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("topology", "v5e:2x4", "TPU slice: v5e:2x4, v4:2x2x1, ...")
    flags.DEFINE_integer(
        "num_classes", 0, "Outputs of the model; those of the data set by default."
    )
    flags.DEFINE_string("json", "", "Also write the reports to this file.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
