"""Vocabularies of tiktoken for train_gpt.py, also without a network."""

import os

from train_gpt import UserError


def load_tiktoken(name: str, folder: str | None = None):
    """An encoding of tiktoken; gpt2 from a folder with vocab.bpe and encoder.json: `folder`, or GPT2_BPE_DIR if set."""
    folder = folder or os.environ.get("GPT2_BPE_DIR")
    try:
        import tiktoken.load
        from tiktoken_ext.openai_public import r50k_pat_str

        if name != "gpt2" or not folder:
            return tiktoken.get_encoding(name)
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(f"{folder}/vocab.bpe", f"{folder}/encoder.json")
        return tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 50256})
    except Exception as error:  # of names, files and the network
        raise UserError(f"TOKENIZER_PATH={name} is nothing tiktoken can load ({error!r:.120}): give a .model, gpt2 or "
                        "bytes; without a network set TIKTOKEN_CACHE_DIR, or for gpt2 GPT2_BPE_DIR") from error
