"""
Let a trained model write.

    python sample.py out/shakespeare_cpu/aoe
    python sample.py out/shakespeare_cpu/moe --prompt="ROMEO." --temperature=0.8
    python sample.py out/shakespeare_cpu/aoe --num_samples=3 --seed=1

The argument is the folder of a run. Its best.pt brings its own configuration
and tokenizer.
"""

import os
import sys
from dataclasses import dataclass

import torch

import configurator
from configurator import UserError, build, check_type, parse
from model import GPT, GPTConfig
from prepare_data import tokenizer_from
from train import choose_device, choose_dtype, load_checkpoint


@dataclass
class SampleConfig:
    """The keys of this script."""
    # keys
    prompt: str = '\n'                  # the text to go on from
    num_samples: int = 1                # texts to write
    max_new_tokens: int = 500           # length of each, in tokens
    temperature: float = 0.8            # below 1: safer, above: wilder, 0: always the likeliest token
    vocab_top_k: int | None = None      # draw from that many likeliest tokens only; None: from all
    seed: int = 1337                    # the same seed draws the same texts
    device: str = 'auto'                # auto: cuda, else mps, else cpu
    data_dir: str = 'data'              # where the gpt2 tokenizer keeps its table, if it had to be fetched

    def __post_init__(self):
        for key in ('num_samples', 'max_new_tokens', 'vocab_top_k'):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f'{key}: expected a positive number, got {value}')
        if not 0 <= self.seed < 2**62:
            raise ValueError(f'seed: expected 0 or more and below 2^62, got {self.seed}')
        if self.temperature < 0:
            raise ValueError(f'temperature: expected 0 or more, got {self.temperature}')
        if not self.prompt:
            raise ValueError('prompt: expected at least one character, got none')


def load_model(folder, device):
    """The best model of the run in folder, and its tokenizer's meta. Raises UserError."""
    path = os.path.join(folder, 'best.pt')
    checkpoint = load_checkpoint(path, device)
    keys = GPTConfig.__dataclass_fields__
    model = GPT(build(GPTConfig, {key: check_type(GPTConfig, key, value, f'{path}: ')
                                  for key, value in checkpoint['config'].items() if key in keys}))
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError:
        raise UserError(f'{path}: expected weights of the shapes in its own configuration, got others; '
                        'train again') from None
    return model.to(device), checkpoint['meta']


def main(arguments):
    values, folders = parse(SampleConfig, arguments, __doc__)
    config = build(SampleConfig, values)
    if len(folders) != 1:
        raise UserError(f'expected the folder of one run, such as out/shakespeare_cpu/aoe, got {len(folders)}')
    device = choose_device(config.device)
    model, meta = load_model(folders[0], device)
    tokenizer = tokenizer_from(meta, config.data_dir)
    if model.config.mlp != 'dense' and model.config.select == 'expert_choice':
        print('expert_choice needs the tokens to come: experts are chosen by top_k here', file=sys.stderr)
    idx = torch.tensor([tokenizer.encode(config.prompt)], device=device)      # (1, S)

    dtype = choose_dtype('auto', device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for i in range(config.num_samples):
            tokens = model.generate(idx, config.max_new_tokens, config.temperature, config.vocab_top_k, config.seed + i)
            print(tokenizer.decode(tokens[0].tolist()))
            if i < config.num_samples - 1:
                print('-' * 80)


if __name__ == '__main__':
    configurator.run(main)
