"""Gradients of a compiled model under DDP equal those of one process, even if the graph is larger than a reduction
bucket, a layer runs several times, and gradients are accumulated over micro-steps."""

import shutil
from pathlib import Path

import pytest
import torch

import train_gpt

# Run by each rank: two steps without an optimizer, whose gradients rank 0 saves; from the second step on DDP has its
# final buckets. The model has not been compiled before, as without the checkpoint tool. A bucket holds less than a
# layer, as in a full-size model (torch allows no buckets under 1 MiB).
WORKER = """
import functools
import os
import sys

sys.path.insert(0, os.environ["SCRIPT_FOLDER"])
import torch

import train_gpt

ddp = train_gpt.DistributedDataParallel
train_gpt.DistributedDataParallel = functools.partial(ddp, bucket_cap_mb=1)
config = train_gpt.Config.load([], os.environ)
runtime = train_gpt.Runtime(config, os.environ)
stream = train_gpt.TokenStream(config.data_path, "train", config.vocab_size)
loader = train_gpt.TrainLoader(stream, config, runtime, config.grad_accum_steps)
stopwatch = train_gpt.Stopwatch(runtime.synchronize)
trainer = train_gpt.Trainer(config, train_gpt.RunFolder(runtime), stopwatch, loader)
generator = torch.Generator().manual_seed(1)
with torch.no_grad():  # at the initial values half of the gradients are zero
    for p in trainer.model.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
trainer.optimizers = []
found = []
for _ in range(2):
    trainer.model.zero_grad(set_to_none=True)  # as the optimizers do it
    trainer.step(1.0, 0.9)
    found.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
if runtime.is_master:
    places = {p.grad.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    torch.save([found, len(places)], os.environ["GRADIENTS"])
sys.stdout.flush()
os._exit(0)  # gloo may abort a tidy end
"""

# A model whose first layer runs twice, written as a user would write it.
TWICE = """
import train_gpt


class Config(train_gpt.Config):
    @classmethod
    def model_class(cls):
        return Twice


class Twice(train_gpt.GPT):
    def features(self, tokens_BT):
        rotate = self.positions.rotation(tokens_BT.size(1), self.dtype)
        x_BTD = x0_BTD = self.embed(tokens_BT)
        for layer in (0, 0, 1):
            x_BTD = self.blocks[layer](x_BTD, x0_BTD, rotate)
        return self.norm(x_BTD + self.skip_weights[0].to(x_BTD.dtype) * x0_BTD)
"""


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_gradients_of_two_compiled_ranks_with_recurrence_equal_those_of_one_process(launch, tmp_path):
    """torch's own splitting of the graph at DDP's buckets corrupts them on torch 2.8: the parts release buffers that
    other parts still need."""
    worker, found = tmp_path / "worker.py", {}
    worker.write_text(WORKER, encoding="utf-8")
    (tmp_path / "twice.py").write_text(TWICE, encoding="utf-8")
    model = {"MODEL_FILE": tmp_path / "twice.py", "NUM_LAYERS": 2, "MODEL_DIM": 256}
    for ranks, knobs in ((1, {"COMPILE": 0, "GRAD_ACCUM_STEPS": 1}), (2, {"COMPILE": 1, "GRAD_ACCUM_STEPS": 2})):
        path = tmp_path / f"gradients{ranks}.pt"
        done = launch(
            ranks=ranks, script=worker, **model, **knobs, GRADIENTS=path, SCRIPT_FOLDER=Path(train_gpt.__file__).parent
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found[ranks], places = torch.load(path, weights_only=True)
    assert places < len(found[1][0]), "gradients lie in buckets, and are not copied from there"
    for step, gradients in enumerate(found[1]):
        for name, expected in gradients.items():
            error = (found[2][step][name] - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, f"in step {step} {name} is off by {error:.1e} of its largest value"
