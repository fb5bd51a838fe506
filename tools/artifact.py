"""MODE=eval and MODE=sample of train_gpt.py: score a trained model, or print text that it generates.

    MODE=eval ARTIFACT=logs/<run_id>/final_model.int8.ptz DATA_PATH=... TOKENIZER_PATH=... python train_gpt.py
    MODE=sample ARTIFACT=logs/<run_id>/final_model.int8.ptz SAMPLE_PROMPT="To be" python train_gpt.py

MODE=sample needs no DATA_PATH. SAMPLE_PROMPT, SAMPLE_TOKENS, TEMPERATURE and TOP_K are knobs of this file. Like all
knobs they come from a FILE.env and from the environment, which wins.

Artifacts are self-describing: they record their configuration and, for a model of a model file, the name and the sha256
of that file. It is looked for next to the artifact, then like MODEL_FILE, then in records/models/. An explicit
MODEL_FILE wins. A state dict (.pt) and an artifact of the public reference reveal their shape; knobs give the rest, and
the log states what was assumed.

Files are treated as untrusted: they are loaded with `weights_only=True`, and what they claim is checked before memory
is allocated for it.
"""

import contextlib
import dataclasses
import hashlib
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
from train_gpt import INT8_FORMAT, UserError, knob, require

UNPACKED_LIMIT = 2**30  # bytes that an artifact may unpack to: far more than any within SIZE_LIMIT needs
SHAPE_KNOBS = ("VOCAB_SIZE", "NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "TIE_EMBEDDINGS")


@contextlib.contextmanager
def reading(source):
    """Blame the file for whatever fails while it is decoded, so that its readers need no checks of their own."""
    try:
        yield
    except Exception as error:  # zlib, zip, pickle and torch each raise their own
        if isinstance(error, UserError) and str(source) in str(error):
            raise
        raise UserError(
            f"{source} is damaged or of another format ({error!r:.120}): use another file, or make it again"
        ) from error


def load_tensors(file: Path | bytes, source) -> dict:
    """The dictionary that torch.save wrote to a file, which is mapped into memory, or to bytes.

    What follows it is ignored. No pickled code runs, and no compressed entry unpacks to more than the file holds.
    """
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
    """The object in an artifact: a zlib stream, followed by its sha256 unless the file is of the public reference."""
    with reading(source):
        inflater = zlib.decompressobj()
        packed = inflater.decompress(blob, UNPACKED_LIMIT)
        require(inflater.eof, f"{source} is cut short, or unpacks to over {UNPACKED_LIMIT} bytes: get it again")
        artifact = load_tensors(packed, source)
        checksum = inflater.unused_data
        require("__quant_format__" in artifact, f"{source} is no artifact: it states no format")
        require(
            checksum == hashlib.sha256(blob[: len(blob) - len(checksum)]).digest()
            or ("config" not in artifact and not checksum),
            f"{source} is damaged: it does not match its checksum: get it again",
        )
        return artifact


def one_line(value) -> str:
    """What an untrusted file holds, for a message: a text, or the name of its type."""
    return " ".join(repr(value[:40]).split()) if isinstance(value, str) else f"a {type(value).__name__}"


def tensors_in(tree) -> list[torch.Tensor]:
    """The tensors in nested dictionaries and lists. Each container is visited once, since they may share elements."""
    found, visited, rest = [], set(), [tree]
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict | list | tuple) and id(value) not in visited:
            visited.add(id(value))
            rest += value.values() if isinstance(value, dict) else value
    return found


def dequantize(artifact: dict, config, source) -> dict[str, torch.Tensor]:
    """The state dict of an artifact by the coder of its Config, after a check of what the file claims."""
    coder = config.coder_class()(config)
    known = getattr(coder, "formats", (INT8_FORMAT,))
    found = artifact["__quant_format__"]  # of an untrusted file: anything
    require(
        isinstance(found, str) and found in known,
        f"{source} is of format {one_line(found)}, known are {', '.join(known)}: set MODEL_FILE to its model",
    )
    tensors = tensors_in(artifact)
    contiguous = all(tensor.is_contiguous() for tensor in tensors)  # a stride of 0 makes much of little
    small = sum(tensor.nbytes for tensor in tensors) <= UNPACKED_LIMIT  # many tensors may share one storage
    require(contiguous and small, "its tensors are larger than its data")
    return coder.dequantize(artifact)


def find_source(named: dict, artifact: Path) -> Path:
    """The model file that an artifact names: the first one with its sha256 among the places where it may be.

    A file that is loaded is a program that runs. Only the name counts, so an artifact cannot point out of these places.
    """
    name = Path(str(named["file"])).name
    here = Path(train_gpt.__file__).resolve().parent
    folders = (artifact.parent, Path(), here, here / "records" / "models")
    found = [folder / name for folder in folders if (folder / name).is_file()]
    places = f"neither next to it nor in {here / 'records' / 'models'}"
    require(found, f"{artifact} is a model of {name}, which is {places}: put it there, or set MODEL_FILE")
    wanted = named.get("sha256")
    if wanted is None:  # an artifact of before
        return found[0]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in found]
    other = f"{found[0]} has sha256 {digests[0]:.12}..., {artifact} needs {wanted!s:.12}..."
    require(wanted in digests, f"{other}: get that file, or set MODEL_FILE to use another")
    return found[digests.index(wanted)]


def choose_config_class(named: dict, artifact: Path, config_class: type) -> type:
    """The Config of an artifact: that of MODEL_FILE if it is set, else of the file that the artifact names, if any."""
    if config_class is not train_gpt.Config or not named:
        return config_class
    return train_gpt.load_model_file(str(find_source(named, artifact)))


def artifact_knobs(config_class) -> list[str]:
    """The knobs that an artifact records."""
    return [name for name, field in config_class.knobs().items() if field.metadata["artifact"]]


def recorded_knobs(artifact: dict, source, config_class: type) -> dict[str, str]:
    """{KNOB: text} that an artifact records, without knobs that moved to a model file and are off."""
    recorded = artifact.get("config", {})
    words = [word for pair in recorded.items() for word in pair if isinstance(word, str)]
    odd = [one_line(word) for word in words if not word.isprintable()]
    require(not odd, f"{source} records {', '.join(odd[:3])}, which no knob is called or set to: get the file again")
    plain = {bool: int, int: int, float: float, str: str}  # of any other type only its name is kept
    texts = {name.upper(): str(plain.get(type(v), type)(v)) for name, v in recorded.items()}
    check = train_gpt.tool("check", log=str)
    if check:
        texts = check.drop_moved_knobs(texts, config_class.knobs())
    unknown = [name for name in texts if name not in artifact_knobs(config_class)]
    for name in unknown:
        file = check and check.model_file_of(name)
        require(not file, f"{source} records {name}={texts[name]}, a knob of a model file: set MODEL_FILE={file}")
    require(not unknown, f"its tensors or this script contradict its config: {', '.join(unknown)}")
    return texts


def shape_of(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """{KNOB: text} of the shape of the script's own model, from its tensors."""
    V, D = state["tok_emb.weight"].shape
    heads = len(state["blocks.0.attn.q_gain"])
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    kv_heads = len(state["blocks.0.attn.c_k.weight"]) * heads // D
    mlp_mult = len(state["blocks.0.mlp.fc.weight"]) / D
    tied = int("lm_head.weight" not in state)
    return dict(zip(SHAPE_KNOBS, map(str, (V, layers, D, heads, kv_heads, mlp_mult, tied)), strict=True))


def read_model(blob: bytes, source, config_class=None) -> tuple[dict[str, torch.Tensor], dict[str, str], type]:
    """The state dict of an artifact or a .pt, the {KNOB: text} that it reveals, and its Config class.

    For the script's own model the shape is that of the tensors. It must not contradict what the file records.
    """
    is_state_dict = blob[:2] == b"PK"
    artifact = {} if is_state_dict else unpack(blob, source)
    with reading(source):
        named = dict(artifact.get("source", {}))
        require(not named or "file" in named, "it names no model file")
    config_class = choose_config_class(named, Path(source), config_class or train_gpt.Config)
    with reading(source):
        told = recorded_knobs(artifact, source, config_class)
        if is_state_dict:
            state = load_tensors(blob, source)
        else:
            state = dequantize(artifact, config_class.load([], told), source)
        own = config_class.model_class() is train_gpt.GPT  # whose tensors are all fractions
        odd = [
            name
            for name, t in state.items()
            if not (t.is_contiguous() and (t.isfinite().all() if t.is_floating_point() else not own))
        ]
        require(not odd, f"{', '.join(odd[:3])}: not finite numbers, or larger than the data")
        if own:
            shape = shape_of(state)
            hidden = round(float(shape["MLP_MULT"]) * int(shape["MODEL_DIM"]))
            # Several values of MLP_MULT give the same width: 2, 2.0 or a fraction that is rounded.
            if round(float(told.get("MLP_MULT", 0)) * int(shape["MODEL_DIM"])) == hidden:
                told["MLP_MULT"] = shape["MLP_MULT"]
            odd = [name for name, text in told.items() if shape.get(name, text) != text]
            require(not odd, f"its tensors or this script contradict its config: {', '.join(odd)}")
            told |= shape
        config_class.load([], told)
        return state, told, config_class


def open_model(config, folder, argv: list[str]):
    """ARTIFACT as a model: the configuration with what the file records, the model, and the same model compiled."""
    runtime = folder.runtime
    require(config.artifact, f"MODE={config.mode} needs ARTIFACT=logs/<run_id>/final_model.int8.ptz, or a .pt")
    blob = runtime.broadcast(Path(config.artifact).read_bytes() if runtime.is_master else None)
    state, told, config_class = read_model(blob, config.artifact, type(config))
    config = config_class.load(argv, os.environ, told)
    with torch.device("meta"):
        meta_state = config.model_class()(config).state_dict()
    expected = {name: tensor.shape for name, tensor in meta_state.items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    odd = sorted({name for name, _ in found.items() ^ expected.items()})
    require(not odd, f"{config.artifact} and the knobs disagree on {', '.join(odd[:3])}: unset what sets the shape")
    model, compiled_model, note = train_gpt.build_model(config, runtime)
    model.load_state_dict(state)
    digest = hashlib.sha256(blob).hexdigest()
    folder.log(f"{note}\nartifact:{config.artifact} bytes:{len(blob)} sha256:{digest}")
    folder.log(" ".join(f"{name}={text}" for name, text in told.items()))
    for name, path in train_gpt.source_paths(config).items():
        if name != "train_gpt.py":
            folder.log(f"source:{path} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    assumed = [f"{name}={config.as_env()[name]}" for name in artifact_knobs(config) if name not in told]
    if assumed:
        folder.log(f"assumed, since the file does not tell: {' '.join(assumed)}")
    return config, model.eval(), compiled_model


def evaluate(config, folder, argv: list[str]):
    """Log the final lines of a run again."""
    runtime = folder.runtime
    config, model, compiled_model = open_model(config, folder, argv)
    token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    stream, _ = train_gpt.open_text(config, token_bytes, folder)
    accum_steps = config.accumulation_steps(runtime.world_size, runtime.device.type)
    evaluator = train_gpt.Evaluator(stream, token_bytes, config, runtime, accum_steps)
    score = evaluator.score(model, compiled_model, folder.log, final=True)
    tag = config.coder_class()(config).tag.replace("+", "_")
    label = "final_model" if config.artifact.endswith(".pt") else f"final_{tag}_roundtrip"
    train_gpt.log_final(label, score, folder)


# ---------- MODE=sample -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SampleKnobs:
    # -- MODE=sample
    sample_prompt: str = knob("", r"text to continue; \n is a line break, \u0022 a quote", free=True)
    sample_tokens: int = knob(200, "maximum number of tokens", 1, free=True)
    temperature: float = knob(0.8, "temperature of the softmax; 0: the likeliest token", 0, free=True)
    top_k: int = knob(0, "sample from the likeliest k tokens; 0: from all", 0, free=True)

    @classmethod
    def knobs(cls) -> dict[str, dataclasses.Field]:
        return {field.name.upper(): field for field in dataclasses.fields(cls)}

    @classmethod
    def load(cls, argv: list[str], environ) -> "SampleKnobs":
        texts = train_gpt.read_env_file(Path(argv[0])) if argv else {}
        values = {}
        for name, field in cls.knobs().items():
            text = environ.get(name, texts.get(name))
            if text is not None:
                values[field.name] = unescape(text) if name == "SAMPLE_PROMPT" else train_gpt.parse(field, text)
        made = cls(**values)
        made.check()
        return made

    def check(self):
        for name, field in self.knobs().items():
            value = getattr(self, field.name)
            low, high, _ = field.metadata["allowed"]
            require(low is None or value >= low, f"{name}={value} is too small: the minimum is {low}")
            require(high is None or value <= high, f"{name}={value} is too large: the maximum is {high}")
        text = not re.search("[\ud800-\udfff]", self.sample_prompt)  # what is no UTF-8 in the environment
        require(text, f"SAMPLE_PROMPT={self.sample_prompt!r} is not UTF-8: give it in that encoding")


def unescape(text: str) -> str:
    r"""A prompt keeps its spaces. \n is a line break in it, and \u with four hexadecimal digits any character."""
    return re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), text.replace(r"\n", "\n"))


@torch.no_grad()
def generate(model, config, knobs: SampleKnobs, token_bytes):
    """Yield the prompt, then pieces of the text by which the model continues it. It ends with the document.

    Each token is a forward pass over the last TRAIN_SEQ_LEN tokens: simple, and fast enough for a few hundred.
    """
    generator = torch.Generator().manual_seed(config.seed)
    device = next(model.parameters()).device
    T = config.train_seq_len
    # Documents begin with the start token, or with another boundary if the tokenizer has none.
    start = token_bytes.start if token_bytes.start >= 0 else int(token_bytes.boundary.argmax())
    tokens = [start, *token_bytes.encode(knobs.sample_prompt)]
    text = token_bytes.decode(tokens[1:]).decode(errors="replace")
    shown = text
    yield knobs.sample_prompt
    for _ in range(knobs.sample_tokens):
        window = tokens[-T:]
        # Padding makes few lengths for the kernels. It comes after the window, so nothing in the window sees it.
        padding = [0] * min(-len(window) % 64, T - len(window))
        logits = model(torch.tensor([window + padding], device=device))[0, len(window) - 1].float().cpu()
        tokens.append(draw(logits, token_bytes.size, knobs, generator))
        if token_bytes.boundary[tokens[-1]]:
            break
        text = token_bytes.decode(tokens[1:]).decode(errors="replace")
        # Part of a character waits for its other bytes. An escape of case marks may continue after its first code.
        last = token_bytes.decode([*tokens[1:], *token_bytes.zero_bytes[2:]]).decode(errors="replace")
        if not text.endswith("\ufffd") and last.startswith(text):
            yield text[len(shown) :]
            shown = text
    if not text.endswith("\ufffd"):
        yield text[len(shown) :]


def draw(logits: torch.Tensor, size: int, knobs: SampleKnobs, generator: torch.Generator) -> int:
    """A token drawn by its logit [V]. Ids from `size` on only pad the vocabulary and are never drawn."""
    logits[size:] = -math.inf
    require(not logits.isnan().any(), "the model's logits are not numbers: use another ARTIFACT")
    if knobs.top_k:
        logits[logits < logits.topk(min(knobs.top_k, len(logits))).values[-1]] = -math.inf
    logits = logits - logits.max()  # so that no temperature makes them infinite
    weights = (logits / max(knobs.temperature, 1e-9)).softmax(-1)
    return int(weights.multinomial(1, generator=generator))


def sample(config, folder, argv: list[str]):
    """Print only the text to standard output. What is known of the model goes to standard error."""
    knobs = SampleKnobs.load(argv, os.environ)
    os.environ["COMPILE"] = "0"  # every length of the growing text would be compiled anew
    with contextlib.redirect_stdout(sys.stderr):
        config, model, _ = open_model(config, folder, argv)
    token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    if folder.runtime.is_master:
        for piece in generate(model, config, knobs, token_bytes):
            print(piece, end="", flush=True)
        print()


MODES = {"eval": evaluate, "sample": sample}
