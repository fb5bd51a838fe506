"""MODE=eval of train_gpt.py: the score of a model with nothing but the script, the tokenizer and the validation text.

    MODE=eval ARTIFACT=logs/<run_id>/final_model.int8.ptz DATA_PATH=... TOKENIZER_PATH=... python train_gpt.py

An artifact tells its own configuration, and of a model in a file of its own that file, which is looked for beside the
artifact, then where it was. A state dict (.pt) and an artifact of the public reference tell their shape; the knobs give
the rest, and what was assumed is printed. Files are trusted in nothing: no pickled code runs, and what they claim is
checked before memory is taken for it.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import io
import math
import os
import re
import sys
import zipfile
import zlib
from pathlib import Path

import torch

import train_gpt
from train_gpt import INT8_FORMAT, RANS_FORMAT, TENSOR_CLASSES, UserError, require

UNPACKED_LIMIT = 2**30  # bytes that an artifact may unpack to: far more than any within SIZE_LIMIT needs
SHAPE_KNOBS = ("VOCAB_SIZE", "NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "TIE_EMBEDDINGS")
SWITCHES = {
    "X0_MIX": "blocks.0.resid_mix",
    "ATTN_GATE": "blocks.0.attn.gate",
    "GATED_SKIPS": "skip_gates",
    "SMEAR_GATE": "smear",
}  # whose tensors are there or not


@contextlib.contextmanager
def reading(source):
    """Whatever fails while a file is decoded, the file is to blame: its readers need no check of their own for it."""
    try:
        yield
    except Exception as error:  # zlib, zip, pickle and torch each raise their own
        if isinstance(error, UserError) and str(source) in str(error):
            raise
        raise UserError(
            f"{source} is damaged or of another format ({error!r:.120}): use another file, or make it again"
        ) from error


def load_tensors(file: Path | bytes, source) -> dict:
    """A dictionary saved by torch.save, of a file, mapped into memory, or of bytes; what follows it is ignored. No
    pickled code runs, and no compressed entry unpacks to more than there is."""
    with reading(source):
        mapped = isinstance(file, Path)
        size = file.stat().st_size if mapped else len(file)
        entries = zipfile.ZipFile(file if mapped else io.BytesIO(file)).infolist()
        require(sum(entry.file_size for entry in entries) <= size, f"{source} unpacks to more than it holds")
        value = torch.load(
            file if mapped else io.BytesIO(file), map_location="cpu", weights_only=True, mmap=True if mapped else None
        )
        require(isinstance(value, dict), f"{source} holds a {type(value).__name__}, no dictionary")
        return value


def unpack(blob: bytes, source) -> dict:
    """The object in the bytes of an artifact: a zlib stream, and after ours the sha256 of that stream."""
    with reading(source):
        inflater = zlib.decompressobj()
        packed = inflater.decompress(blob, UNPACKED_LIMIT)
        require(inflater.eof, f"{source} is cut short, or unpacks to over {UNPACKED_LIMIT} bytes: get it again")
        artifact, checksum = load_tensors(packed, source), inflater.unused_data
        require(
            artifact.get("__quant_format__") in (INT8_FORMAT, RANS_FORMAT),
            f"{source} is no artifact of format {INT8_FORMAT} or {RANS_FORMAT}",
        )
        require(
            checksum == hashlib.sha256(blob[: len(blob) - len(checksum)]).digest()
            or ("config" not in artifact and not checksum),  # a foreign file has none
            f"{source} is damaged: it does not match its checksum: get it again",
        )
        return artifact


def dequantize(artifact: dict, config) -> dict[str, torch.Tensor]:
    """The script's own, after a look at what the object claims."""
    if artifact["__quant_format__"] == RANS_FORMAT:
        shapes, tables, stream = (artifact[part] for part in ("quantized", "tables", "stream"))
        sizes = [math.prod(map(int, shape)) for shape in shapes.values()]
        require(
            tables.is_contiguous()
            and stream.is_contiguous()
            and tables.dtype == torch.int16
            and tables.shape == (len(TENSOR_CLASSES), 256)
            and (tables >= 0).all()
            and (tables.sum(1) == 2**14).all(),
            "its tables and its stream do not fit",
        )
        require(
            len(sizes) <= 2**14 and min(sizes, default=1) > 0 and 4 * sum(sizes) <= UNPACKED_LIMIT,
            "its shapes are too large",
        )
        artifact = train_gpt.tool("compress").rans_unpack(artifact, config)
    tensors = [tensor for part in ("quantized", "scales", "passthrough") for tensor in artifact[part].values()]
    require(
        all(tensor.is_contiguous() for tensor in tensors)
        and sum(tensor.nbytes for tensor in tensors) <= UNPACKED_LIMIT,
        "its tensors are larger than its data",
    )  # by stride 0, or by many of one storage
    return train_gpt.dequantize(artifact, config)


def load_config_class(source: dict, artifact: Path, config_class: type) -> type:
    """The Config of the model that an artifact names, from its file; `config_class` if it names none.

    A file that is loaded is a program that runs: it is the one beside the artifact, which a run has put there, or the
    one in the repository that this script belongs to. If it runs already, having been started, its own class is taken:
    a class of the same name may be another file's."""
    if not source:
        return config_class
    name, wanted = Path(source["file"]), source["config_class"]
    require(not name.is_absolute() and ".." not in name.parts, f"{artifact} names {name}, outside the repository")
    places = [artifact.parent / name.name, Path(train_gpt.__file__).resolve().parent / name]
    found, started = [path for path in places if path.is_file()], Path(inspect.getfile(config_class)).resolve()
    if config_class.__name__ == wanted and started.name == name.name:
        if not found or any(path.samefile(started) for path in found) or found[0].read_bytes() == started.read_bytes():
            return config_class
    require(found, f"{artifact} is a model of {name}, which is neither {places[0]} nor {places[1]}: put it there")
    module = load_model_file(found[0], f"which {artifact} is a model of")
    require(hasattr(module, wanted), f"{found[0]} has no class {wanted}, which {artifact} names: find its file")
    return getattr(module, wanted)


def config_class_of(file: str) -> type:
    """The Config of MODEL_FILE: the last one that it defines."""
    here = Path(train_gpt.__file__).resolve().parent
    places = (Path(file), here / file, here / Path(file).name)  # the last: in a run folder
    path = next((path.resolve() for path in places if path.is_file()), None)
    require(
        path, f"MODEL_FILE={file}: it is neither there nor {places[1]}: expected one such as records/models/frontier.py"
    )
    module = load_model_file(path, "of MODEL_FILE")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and issubclass(value, train_gpt.Config)
    ]
    require(found, f"MODEL_FILE={file} defines no subclass of train_gpt.Config: expected one with its model and knobs")
    return found[-1]


def load_model_file(path: Path, role: str):
    """The module of a program that holds a model. Its key tells its place: many are called model.py."""
    key = re.sub(r"\W", "_", str(path.resolve()))
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        module = sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a program may raise
            del sys.modules[key]
            raise UserError(f"{path}, {role}, cannot be loaded: {error!r:.120}") from error
    return sys.modules[key]


def shape_of(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """{KNOB: text} that the tensors of the script's own model tell."""
    (V, D), H = state["tok_emb.weight"].shape, len(state["blocks.0.attn.q_gain"])
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    kv_heads = len(state["blocks.0.attn.c_k.weight"]) * H // D
    values = (V, layers, D, H, kv_heads, len(state["blocks.0.mlp.fc.weight"]) / D, int("lm_head.weight" not in state))
    shape = dict(zip(SHAPE_KNOBS, map(str, values), strict=True))
    return shape | {name: str(int(sign in state)) for name, sign in SWITCHES.items()}


def read_model(blob: bytes, source, config_class=None) -> tuple[dict[str, torch.Tensor], dict[str, str], type]:
    """(state dict, {KNOB: text} that the file tells of itself, its Config class) of an artifact or a .pt.

    Of the script's own model the shape is that of the tensors, and must not contradict what the file tells."""
    config_class = config_class or train_gpt.Config
    is_state_dict = blob[:2] == b"PK"
    artifact = {} if is_state_dict else unpack(blob, source)
    with reading(source):
        named = artifact.get("source", {})
        named = {key: str(named[key]) for key in ("file", "config_class")} if named else {}
    config_class = load_config_class(named, Path(source), config_class)
    with reading(source):
        plain = {bool: int, int: int, float: float, str: str}  # of anything else, only the type is told
        told = {k.upper(): str(plain.get(type(v), type)(v)) for k, v in artifact.get("config", {}).items()}
        unknown = [name for name in told if name not in config_class.artifact_knobs()]
        require(not unknown, f"its tensors or this script contradict its config: {', '.join(unknown)}")
        state = load_tensors(blob, source) if is_state_dict else dequantize(artifact, config_class)
        own = config_class.model_class() is train_gpt.GPT  # in which nothing but fractions has a place
        odd = [
            name
            for name, t in state.items()
            if not (t.is_contiguous() and (t.isfinite().all() if t.is_floating_point() else not own))
        ]
        require(not odd, f"{', '.join(odd[:3])}: not finite numbers, or larger than the data")
        if own:
            shape = shape_of(state)
            hidden = round(float(shape["MLP_MULT"]) * int(shape["MODEL_DIM"]))
            if round(float(told.get("MLP_MULT", 0)) * int(shape["MODEL_DIM"])) == hidden:  # it may say 2, or a fraction
                told["MLP_MULT"] = shape["MLP_MULT"]
            odd = [name for name, text in told.items() if shape.get(name, text) != text]
            require(not odd, f"its tensors or this script contradict its config: {', '.join(odd)}")
            told |= shape
        config_class.load([], told)
        return state, told, config_class


def open_model(config, folder, argv: list[str]):
    """ARTIFACT as a model: (the configuration, which what the file tells of itself has completed; model; compiled)."""
    runtime = folder.runtime
    require(config.artifact, f"MODE={config.mode} needs ARTIFACT=logs/<run_id>/final_model.int8.ptz, or a .pt")
    blob = runtime.broadcast(Path(config.artifact).read_bytes() if runtime.is_master else None)
    state, told, config_class = read_model(blob, config.artifact, type(config))
    config = config_class.load(argv, os.environ, told)
    with torch.device("meta"):
        meta_state = config.model_class()(config).state_dict()
    expected = {name: tensor.shape for name, tensor in meta_state.items()}
    odd = sorted(dict({name: tensor.shape for name, tensor in state.items()}.items() ^ expected.items()))
    require(not odd, f"{config.artifact} and the knobs disagree on {', '.join(odd[:3])}: unset what sets the shape")
    model, compiled_model, note = train_gpt.build_model(config, runtime)
    model.load_state_dict(state)
    folder.log(
        f"{note}\nartifact:{config.artifact} bytes:{len(blob)} "
        f"sha256:{hashlib.sha256(blob).hexdigest()}\n{' '.join(f'{name}={told[name]}' for name in told)}"
    )
    for name, path in train_gpt.source_paths(config).items():
        if name != "train_gpt.py":
            folder.log(f"source:{path} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    shape_knobs = [name for name, field in config.knobs().items() if field.metadata["artifact"]]
    assumed = [f"{name}={config.as_env()[name]}" for name in shape_knobs if name not in told]
    if assumed:
        folder.log(f"assumed, since the file does not tell: {' '.join(assumed)}")
    return config, model.eval(), compiled_model


def main(config, folder, argv: list[str]):
    """Log the final lines of a run again."""
    runtime = folder.runtime
    config, model, compiled_model = open_model(config, folder, argv)
    stream, token_bytes, _ = train_gpt.open_text(config, folder)
    accum_steps = config.accumulation_steps(runtime.world_size, runtime.device.type)
    evaluator = train_gpt.Evaluator(stream, token_bytes, config, runtime, accum_steps)
    score = model.final_score(evaluator, compiled_model, folder.log)
    tag = train_gpt.artifact_names(config)[1].replace("+", "_")
    label = "final_model" if config.artifact.endswith(".pt") else f"final_{tag}_roundtrip"
    train_gpt.log_final(label, score, folder)
