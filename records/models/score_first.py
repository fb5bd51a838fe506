"""Score-first test-time training: a model that trains on the validation text, but only on what has been scored.

    export MODEL_FILE=records/models/score_first.py TTT_CHUNK=32768
    python train_gpt.py FILE.env                          train the script's GPT, and score it so
    MODE=eval ARTIFACT=FILE.ptz python train_gpt.py       score a finished one

The text is read once, in chunks of TTT_CHUNK targets. First the windows of a chunk are scored without gradients. Then
all weights take TTT_EPOCHS passes of SGD over the chunk. Then the next chunk is scored by the new weights. The last
chunk is not trained on. The artifact holds the weights of training, and the model gets them back after the score.

This is legal by the four rules of records/README.md: the script's evaluator calls `observe` only with tokens that it
has scored. The loss is the one that is scored: no dropout, no extra loss, and the canonical mask where it is on.

To combine it with another model, inherit from both, as frontier.py does:

    class Config(score_first.Config): ...
    class MyGPT(score_first.ScoreFirst, train_gpt.GPT): ...
"""

import copy
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import train_gpt
from train_gpt import knob, require


class Config(train_gpt.Config):
    # The score depends on all but the last, so an artifact records them. Training does not: a resume may change them.
    ttt_chunk: int = knob(0, "targets scored before they are trained on; 0: no training", 0, free=True, artifact=True)
    ttt_lr: float = knob(0.005, "SGD rate at the first chunk; a cosine takes it to 0", 0, free=True, artifact=True)
    ttt_epochs: int = knob(3, "passes over a chunk that has been scored", 1, free=True, artifact=True)
    ttt_momentum: float = knob(0.9, "of that SGD, kept from chunk to chunk", 0, 0.99999, free=True, artifact=True)
    ttt_clip: float = knob(1.0, "largest global gradient norm there; 0: off", 0, free=True, artifact=True)
    ttt_batch_tokens: int = knob(
        2**15, "tokens per step, over all ranks; at most a chunk", 1, free=True, artifact=True
    )
    eval_wallclock_seconds: float = knob(600.0, "clock of the final evaluation; 0: none", 0, free=True)
