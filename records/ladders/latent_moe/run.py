"""Run the rungs of the latent_moe ladder, then write the tables in README.md and the picture losses.png.

    python records/ladders/latent_moe/run.py              the small rungs
    python records/ladders/latent_moe/run.py bias loss    these rungs
    python records/ladders/latent_moe/run.py full         1,075,060,736 parameters: 3 steps, then 1 more; 20 GiB free
    python records/ladders/latent_moe/run.py --table      only tables and picture, from logs/*.json

A finished run is not run again and a stopped one resumes. Knobs in the environment (LOG_DIR, DATA_PATH, ...) apply to
every run. logs/RUNG.json keeps the results, the load of the experts, and how the model continues five prompts.
"""

import os
import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools" / "experiments"))

import guard
import ladder
import launcher
import torch

import train_gpt
from train_gpt import require

HERE = Path(__file__).resolve().parent
SMALL = ("bias", "loss", "none", "unshifted", "text")
EVERY = 10  # steps per mean of training loss and gradient norm
LOAD_TOKENS = 65_536  # for measuring the load of the experts
FULL_STEPS = 3
PROMPTS = (
    "Once upon a time, in a land far away",
    "The future of AI will be shaped by",
    "In the middle of the night, I heard a strange noise",
    "The scientist looked at the data and realized",
    "A journey across the ocean began when",
)


def environment(rung: str) -> dict[str, str]:
    return {"LOG_DIR": "logs"} | os.environ | {"RUN_ID": f"latent_{rung}"}


def look(folder: Path) -> dict:
    """How a trained model spreads training text over its experts, and how it continues the prompts."""
    os.chdir(ladder.ROOT)
    config = train_gpt.Config.load([str(folder / "config.env")], {})
    model = config.model_class()(config)
    model.load_state_dict(torch.load(folder / "final_model.pt", weights_only=True))
    stream = train_gpt.TokenStream(config.data_path, "train", config.vocab_size)
    T = config.train_seq_len
    starts = range(0, len(stream) - T, max(1, (len(stream) - T) * T // LOAD_TOKENS))  # spread over the text
    tokens = torch.stack([torch.from_numpy(stream.read(start, T).astype("int64")) for start in starts])
    with torch.no_grad():
        for rows in tokens.split(32):  # in training mode, in which the loads are counted
            model.features(rows)
    loads = torch.stack([block.experts.load for block in model.blocks])
    shares = loads / loads.mean(1, keepdim=True)  # 1 is even
    token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    model.eval()
    sample = train_gpt.tool("artifact", required=True)
    texts = []
    for prompt in PROMPTS:
        knobs = sample.SampleKnobs(sample_prompt=prompt, sample_tokens=60)
        texts.append("".join(sample.generate(model, config, knobs, token_bytes)))
    return {"load": [[round(share, 3) for share in row] for row in shares.tolist()], "texts": texts}


def run(rung: str):
    """Finish one run and keep its results."""
    folder = ladder.run_folder(environment(rung))
    log = HERE / "logs" / f"{rung}.json"
    if (folder / "result.json").exists() and log.exists():
        return
    reason = ladder.finish(HERE / f"{rung}.env", environment(rung))
    require(not reason, f"{rung} failed; the same command resumes it: {reason}")
    result, metrics = ladder.read_run(folder)
    kept = {key: result.get(key) for key in ladder.KEPT}
    for name in ("train_loss", "grad_norm"):
        kept[f"{name}_means_of_{EVERY}"] = ladder.means(metrics, name, EVERY)
    ladder.write_log(log, kept | look(folder))


def take_steps(steps: int) -> dict:
    """Start or resume the full shape and send SIGTERM once it has logged so many steps. Returns its log and its memory.

    VmHWM is the peak of the process so far, including pages of a mapped file; RssAnon excludes those.
    """
    environ = environment("full") | {"TRAIN_LOG_EVERY": "1"}
    output = Path(f"{ladder.run_folder(environ)}.out")
    process = ladder.start(HERE / "full.env", environ, output)
    memory, lines, taken = {}, [], 0
    for line in launcher.follow(process, output):
        print(line, end="", flush=True)
        for pid in guard.children(process.pid):
            status = Path(f"/proc/{pid}/status")  # gone with the process
            found = re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", status.read_text() if status.exists() else "")
            memory |= {name: round(int(kib) / 2**20, 2) for name, kib in found}
        if re.match("device|model_params|resumed|step:|checkpoint|warning", line):
            lines.append(" ".join([line.strip(), *(f"{name}:{gib}GiB" for name, gib in memory.items())]))
        taken += "train_loss:" in line
        if taken == steps:
            process.stdin.close()  # its guard sends SIGTERM
    stopped = 128 + signal.SIGTERM
    saved = process.returncode == stopped and any(line.startswith("checkpoint: saved") for line in lines)
    ended = f"full ended with exit code {process.returncode}; {stopped} and a checkpoint were expected"
    require(saved, f"{ended}: see above, or {ladder.run_folder(environ) / 'train.log'}")
    return {"log": lines, "peak_gib": memory.get("VmHWM")}


def run_full():
    """Take FULL_STEPS steps and save a checkpoint; then resume from it with the same command for one step."""
    launcher.PATIENCE = 3600.0  # seconds: a step and a checkpoint of this size take long
    first = take_steps(FULL_STEPS)
    second = take_steps(1)
    resumed = any(line.startswith("resumed: ") for line in second["log"])
    require(resumed, "the second start of full did not resume from the checkpoint of the first: see above")
    ladder.write_log(HERE / "logs" / "full.json", {"first": first, "resumed": second})


def table(found: dict[str, dict]) -> str:
    """The small rungs, then samples of a right and a wrong one."""
    rows = []
    for rung in SMALL:
        if rung not in found:
            rows.append([rung, f"not run: `run.py {rung}`", "", "", "", "", ""])
            continue
        kept = found[rung]
        losses = (kept[f"train_loss_means_of_{EVERY}"][-1], kept["pre_quant_val_loss"], kept["val_bpb"])
        load = f"{min(map(min, kept['load'])):.2f} to {max(map(max, kept['load'])):.2f}"
        rows.append([rung, kept["steps"], f"{kept['train_tokens']:,}", *(f"{loss:.3f}" for loss in losses), load])
    columns = ["rung", "steps", "tokens", f"training loss, last {EVERY} steps"]
    columns += ["validation loss", "BPB", "load, 1 is even"]
    text = ladder.markdown(columns, rows)
    for rung in ("text", "unshifted"):
        lines = "".join(f"{repr(written)[1:111]}\n" for written in found.get(rung, {}).get("texts", []))
        text += f"\nTo five prompts {rung} writes:\n\n```\n{lines}```\n"
    return text


def draw(found: dict[str, dict]):
    with ladder.picture(HERE, "Latent attention with experts, small, on the demo's text") as (axis, spread, colors):
        for rung, color, line in zip(SMALL, colors, ("-", "--", "-.", "-", ":"), strict=False):
            if rung in found:
                means = found[rung][f"train_loss_means_of_{EVERY}"]
                steps = range(EVERY, EVERY * len(means) + 1, EVERY)
                label = f"{rung} (validation {found[rung]['pre_quant_val_loss']:.2f})"
                axis.plot(steps, means, color=color, linestyle=line, label=label)
                spread.plot(sorted(sum(found[rung]["load"], [])), color=color, linestyle=line, label=rung)
        axis.set(xlabel="step of 2,048 tokens", ylabel=f"training loss, nats, means of {EVERY} steps", xscale="log")
        spread.set(xlabel="routed experts of all layers, sorted", ylabel="load over an even share")


def main(argv: list[str]):
    for rung in ladder.choose(argv, SMALL, "full", "--table"):
        run(rung)
    if "full" in argv:
        run_full()
    found = ladder.read_logs(HERE / "logs")
    ladder.fill_readme(HERE, table(found))
    draw(found)


if __name__ == "__main__":
    ladder.main(lambda: main(sys.argv[1:]))
