"""
Speed and memory of the three MLPs, in one run, the sides taking turns.

    python tests/bench.py                          # everything, some minutes
    python tests/bench.py --only=layer,memory
    python tests/bench.py --threads=1 --json=bench.json

Times are medians; a ratio is the median of the ratios of each round, so that
what slows the machine for a while slows both sides of it. Parts: layer (an MLP
alone, forward and backward), step (a training step of the model), memory
(bytes kept for backward), cost (speed and memory of aoe over d_low), generate
(text, one token at a time). Only when asked for: tokenize (prepare_data.py's gpt2
beside tiktoken's own encode_ordinary_batch).
"""

import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator
from configurator import UserError, build, parse
from model import GPT, MLPS, GPTConfig
from prepare_data import CHUNK, GPT2Tokenizer, PrepareConfig, in_parallel, prepare
from train import Training, choose_device, keep_freed_memory, plan_runs, print_rows

PARTS = ('layer', 'step', 'memory', 'cost', 'generate', 'tokenize')
LAYERS = {          # the MLP alone: its configuration, and the tokens that pass it at once
    'small': (dict(n_embd=128, d_ffn=256), 1024),
    'medium': (dict(n_embd=384, d_ffn=1024, d_low=128), 8192),
    'paper': (dict(n_embd=768, n_head=12, d_ffn=3072, d_low=256), 4096),
}
MODELS = {          # a whole training step
    'small': dict(n_layer=4, n_head=4, n_embd=128, d_ffn=256, block_size=64, batch_size=16),
    '6 x 384': dict(n_layer=6, n_head=6, n_embd=384, d_ffn=512, block_size=256, batch_size=8),
}


@dataclass
class BenchConfig:
    """The keys of this script."""
    # keys
    only: str = 'layer,step,memory,cost,generate' # the parts to measure, comma-separated
    shapes: str = 'small,medium,paper'      # of the layers, comma-separated
    rounds: int = 15                              # measurements of each side; the median counts
    warmup: int = 15                              # rounds before them, not counted
    seed: int = 0                                 # of weights and inputs
    threads: int | None = None                    # of the CPU; None: PyTorch's choice
    device: str = 'auto'                          # auto: cuda, else mps, else cpu
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'   # of weights and inputs; of autocast in a training step
    aux_weight: float = 0.0                       # weight of the load-balancing loss
    keep_freed_memory: bool = True                # as train.py does; False: the C library's own way
    compile: bool = False                         # torch.compile, in the training step
    json: str | None = None                       # write the figures to this file as well

    def __post_init__(self):
        for key, known in (('only', PARTS), ('shapes', LAYERS)):
            for part in getattr(self, key).split(','):
                if part not in known:
                    raise ValueError(f'{key}: expected some of {",".join(known)}, got {part!r}')
        for key in ('rounds', 'warmup', 'threads'):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f'{key}: expected a positive number, got {getattr(self, key)}')


def multiply_adds(config):
    """Of one MLP layer per token, forward and backward, as model.py executes them.

    A product costs three times its forward, since its gradient is two products of the same size. What aoe spends on
    self-evaluation is less: only the chosen of E have a gradient, unless L_aux asks for all (and evaluates all twice).
    What it spends on the gate is more: C_i Wup_i is computed again in backward.
    """
    D, E, K, d = config.n_embd, config.n_expert, config.top_k, config.d_ffn
    if config.mlp == 'dense':
        return 3 * K * 3 * D * d
    if config.mlp == 'moe':
        return 3 * (D * E + K * 3 * D * d)
    d_low, d_wide = config.d_low, config.d_wide
    evaluation = (4 * E if config.aux_weight else E) * D * d_low + 2 * K * D * d_low
    return evaluation + K * (4 * d_low * d_wide + 3 * 2 * D * d_wide)


def alternate(sides, bench):
    """Time each side's function once per round. Returns side -> list of seconds. sides: name -> function(round)."""
    seconds = {name: [] for name in sides}
    for turn in range(bench.warmup + bench.rounds):
        for name, function in sides.items():
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function(turn)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= bench.warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(faster, slower):
    """Median over rounds of how many times the speed of `slower` `faster` has. Both: lists of seconds."""
    return statistics.median(s / f for f, s in zip(faster, slower))


def layer_config(mlp, shape, bench):
    return GPTConfig(mlp=mlp, aux_weight=bench.aux_weight, **shape)


def make_layer(config, bench, device):
    torch.manual_seed(bench.seed)
    layer = MLPS[config.mlp](config)
    for name, p in layer.named_parameters():
        torch.nn.init.normal_(p, std=config.d_low ** -0.5 if name == 'w_up' else 0.02)
    return layer.to(device, getattr(torch, bench.dtype))


def make_input(shape, tokens, bench, device, turn):
    generator = torch.Generator().manual_seed(bench.seed + turn)          # other tokens each round, as in training
    x = torch.randn(1, tokens, shape['n_embd'], generator=generator)
    return x.to(device, getattr(torch, bench.dtype)).requires_grad_()


def transformers_layers(config, tokens, moe, bench, device):
    """Hugging Face's Mixtral block with the weights of moe: setting -> function(x). Empty without transformers."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        print('  (transformers is not installed: its Mixtral block is not measured)')
        return {}
    layers = {}
    for setting in ('eager', 'batched_mm', 'grouped_mm'):
        if setting == 'batched_mm' and tokens * moe.w_p[0].numel() > 2**28:
            continue                                                           # it copies the matrices for every pair
        theirs = MixtralConfig(hidden_size=config.n_embd, intermediate_size=config.d_ffn, num_local_experts=config.n_expert,
                               num_experts_per_tok=config.top_k, experts_implementation=setting)
        block = MixtralSparseMoeBlock(theirs).to(device, getattr(torch, bench.dtype))
        with torch.no_grad():
            block.gate.weight.copy_(moe.router.T)
            block.experts.gate_up_proj.copy_(torch.cat([moe.w_g, moe.w_p], 2).transpose(1, 2))
            block.experts.down_proj.copy_(moe.w_o.transpose(1, 2))
        layers[f'mixtral {setting}'] = block
    return layers


def time_layers(layers, shape, tokens, bench, device):
    """Seconds of each layer, forward and backward: name -> list."""
    def run(layer):
        def function(turn):
            x = inputs[turn]
            h = layer(x)
            (h[0] if isinstance(h, tuple) else h).backward(cotangent)
            layer.zero_grad(set_to_none=True)
            x.grad = None
        return function
    inputs = [make_input(shape, tokens, bench, device, turn) for turn in range(bench.warmup + bench.rounds)]
    cotangent = torch.randn_like(inputs[0])
    return alternate({name: run(layer) for name, layer in layers.items()}, bench)


def bench_layer(bench, device):
    """An MLP alone, forward and backward."""
    results = []
    for label in bench.shapes.split(','):
        shape, tokens = LAYERS[label]
        configs = {mlp: layer_config(mlp, shape, bench) for mlp in ('dense', 'moe', 'aoe')}
        layers = {mlp: make_layer(config, bench, device) for mlp, config in configs.items()}
        layers |= transformers_layers(configs['moe'], tokens, layers['moe'], bench, device)
        seconds = time_layers(layers, shape, tokens, bench, device)

        c = configs['aoe']
        print(f'\nlayer, {label}: D {c.n_embd}, d_ffn {c.d_ffn}, d_low {c.d_low}, E {c.n_expert}, K {c.top_k}, '
              f'{tokens:,} tokens')
        rows = [('', 'ms', 'of dense', 'predicted', 'of moe', 'predicted')]
        for name in layers:
            row = {'part': 'layer', 'shape': label, 'side': name, 'ms': 1e3 * statistics.median(seconds[name])}
            for base in ('dense', 'moe'):
                row[f'of_{base}'] = ratio(seconds[name], seconds[base])
                config = configs.get(name, configs['moe'])
                row[f'predicted_of_{base}'] = multiply_adds(configs[base]) / multiply_adds(config)
            results.append(row)
            rows.append((name, f'{row["ms"]:.2f}', *(f'{row[key]:.2f}' for key in (
                'of_dense', 'predicted_of_dense', 'of_moe', 'predicted_of_moe'))))
        print_rows(rows, indent='  ')
    return results


def bench_step(bench, device):
    """A training step of the whole model, as train.py does it."""
    results = []
    for label, shape in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(None):
                prepare([os.path.join(ROOT, 'model.py')], PrepareConfig(name='code', data_dir=folder))
            runs = plan_runs({'dataset': 'code', 'data_dir': folder, 'device': str(device), 'dtype': bench.dtype, 'seed': bench.seed,
                              'aux_weight': bench.aux_weight, 'compile': bench.compile, **shape}, {'mlp': 'dense,moe,aoe'})
            trainings = {run.name: Training(run) for run in runs}
        sides = {name: lambda turn, training=training: [training.step() for _ in range(3)]
                 for name, training in trainings.items()}
        seconds = alternate(sides, bench)
        print(f'\ntraining step, {label}: {shape["n_layer"]} layers, D {shape["n_embd"]}, d_ffn {shape["d_ffn"]}, '
              f'{shape["batch_size"]} x {shape["block_size"]} tokens')
        rows = [('', 'tokens/s', 'of dense', 'of moe')]
        for name, training in trainings.items():
            row = {'part': 'step', 'shape': label, 'side': name,
                   'tokens_per_second': 3 * training.tokens_per_iter / statistics.median(seconds[name]),
                   'of_dense': ratio(seconds[name], seconds['dense']), 'of_moe': ratio(seconds[name], seconds['moe'])}
            results.append(row)
            rows.append((name, f'{row["tokens_per_second"]:,.0f}', f'{row["of_dense"]:.2f}', f'{row["of_moe"]:.2f}'))
        print_rows(rows, indent='  ')
    return results


def bytes_kept(layer, x, *more):
    """Bytes that layer(x, *more) keeps for backward, each storage once; parameters and x left out."""
    left_out = {p.untyped_storage().data_ptr() for p in layer.parameters()} | {x.untyped_storage().data_ptr()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage                             # held, so that no address is used twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = layer(x, *more)
    del h
    return sum(storage.nbytes() for storage in kept.values())


def bench_memory(bench, device):
    """What a layer keeps for backward: exact, and the same on any machine."""
    results = []
    rows = [('KiB per token and layer', *MLPS)]
    for label in bench.shapes.split(','):
        shape, tokens = LAYERS[label]
        cells = []
        for mlp in MLPS:
            layer = make_layer(layer_config(mlp, shape, bench), bench, device)
            kib = bytes_kept(layer, make_input(shape, tokens, bench, device, 0)) / tokens / 1024
            results.append({'part': 'memory', 'shape': label, 'side': mlp, 'kib_per_token': kib})
            cells.append(f'{kib:.1f}')
        rows.append((label, *cells))
    print(f'\nkept for backward by the MLP, {bench.dtype}')
    print_rows(rows, indent='  ')
    return results + bench_model_memory(bench, device)


def bench_model_memory(bench, device):
    """What the whole model keeps for backward per token, at the last of the shapes: for each layer, and besides layers."""
    def kib_per_token(mlp, n_layer):
        config = GPTConfig(mlp=mlp, aux_weight=bench.aux_weight, vocab_size=50_304, block_size=1024, n_layer=n_layer, **shape)
        model = GPT(config).to(device)
        tokens = torch.randint(config.vocab_size, (1, 1024), generator=torch.Generator().manual_seed(bench.seed)).to(device)
        dtype = getattr(torch, bench.dtype)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            half, whole = (bytes_kept(model, idx, idx) for idx in (tokens[:, :512], tokens))
        return (whole - half) / 512 / 1024                                    # without copies of weights, the same for both

    label = bench.shapes.split(',')[-1]
    shape, _ = LAYERS[label]
    results, rows = [], [('KiB per token', 'each layer', 'embedding, head, loss', '12 layers, of moe')]
    for mlp in ('moe', 'aoe', 'dense'):
        one, two = (kib_per_token(mlp, n_layer) for n_layer in (1, 2))
        row = {'part': 'model memory', 'side': mlp, 'kib_per_layer': two - one, 'kib_besides': 2 * one - two}
        row['of_moe'] = (one + 11 * (two - one)) / (results[0]['kib_besides'] + 12 * results[0]['kib_per_layer']) if results else 1
        results.append(row)
        rows.append((mlp, f'{row["kib_per_layer"]:.1f}', f'{row["kib_besides"]:.1f}', f'{row["of_moe"]:.2f}'))
    print(f'\nkept for backward by the model, {label}, vocabulary 50,304, {bench.dtype}')
    print_rows(rows, indent='  ')
    return results


def bench_cost(bench, device):
    """Table 4 of the paper: what aoe costs over d_low, D/12 to 2 D/3, at the last of the shapes."""
    label = bench.shapes.split(',')[-1]
    shape, tokens = LAYERS[label]
    widths = [8 * round(shape['n_embd'] / part / 8) for part in (12, 6, 3, 1.5)]
    configs = {'moe': layer_config('moe', shape, bench)} | {
        f'aoe {d_low}': layer_config('aoe', shape | {'d_low': d_low}, bench) for d_low in widths}
    layers = {name: make_layer(config, bench, device) for name, config in configs.items()}
    seconds = time_layers(layers, shape, tokens, bench, device)
    results, rows = [], [('', 'tokens/s', 'of moe', 'predicted', 'KiB/token', 'of moe')]
    for name, layer in layers.items():
        kib = bytes_kept(layer, make_input(shape, tokens, bench, device, 0)) / tokens / 1024
        row = {'part': 'cost', 'side': name, 'tokens_per_second': tokens / statistics.median(seconds[name]),
               'of_moe': ratio(seconds[name], seconds['moe']),
               'predicted_of_moe': multiply_adds(configs['moe']) / multiply_adds(configs[name]), 'kib_per_token': kib}
        results.append(row)
        rows.append((name, f'{row["tokens_per_second"]:,.0f}', f'{row["of_moe"]:.2f}', f'{row["predicted_of_moe"]:.2f}',
                     f'{kib:.1f}', f'{kib / results[0]["kib_per_token"]:.2f}'))
    print(f'\ncost of the layer over d_low, {label}, aux_weight {bench.aux_weight:g}')
    print_rows(rows, indent='  ')
    return results


def bench_generate(bench, device):
    """Text one token at a time: batch 1, 256 new tokens."""
    shape = {key: value for key, value in MODELS['6 x 384'].items() if key != 'batch_size'} | {'vocab_size': 84}
    models = {}
    for mlp in ('dense', 'moe', 'aoe'):
        torch.manual_seed(bench.seed)
        models[mlp] = GPT(GPTConfig(mlp=mlp, **shape)).to(device)
    idx = torch.zeros(1, 1, dtype=torch.int64, device=device)
    few = BenchConfig(rounds=min(3, bench.rounds), warmup=1)
    seconds = alternate({mlp: lambda turn, model=model: model.generate(idx, 256, seed=0) for mlp, model in models.items()},
                        few)
    print('\ngeneration, 6 layers, D 384, batch 1, 256 tokens, float32')
    rows, results = [('', 'tokens/s')], []
    for mlp in models:
        speed = 256 / statistics.median(seconds[mlp])
        results.append({'part': 'generate', 'side': mlp, 'tokens_per_second': speed})
        rows.append((mlp, f'{speed:.0f}'))
    print_rows(rows, indent='  ')
    return results


def bench_tokenize(bench, device):
    """Tokens per second of gpt2's byte pairs on all cores: 16 pieces of a megabyte of this repository's code."""
    text = ''.join(open(os.path.join(ROOT, name), encoding='utf-8').read() for name in ('README.md', 'model.py', 'train.py'))
    texts = [(text * (CHUNK // len(text) + 1))[:CHUNK]] * 16
    tokenizer, threads = GPT2Tokenizer(), os.cpu_count()
    tokens = 16 * len(tokenizer.encode(texts[0]))
    seconds = alternate({
        'encode_ordinary_batch': lambda turn: tokenizer.encode_batch(texts, num_threads=threads),
        'prepare_data.py': lambda turn: list(in_parallel(tokenizer.encode_piece, texts, threads))}, bench)
    print(f'\ntokenizing with gpt2, {threads} threads')
    rows, results = [('', 'tokens/s', 'of tiktoken')], []
    for name, times in seconds.items():
        row = {'part': 'tokenize', 'side': name, 'tokens_per_second': tokens / statistics.median(times),
               'of_tiktoken': ratio(times, seconds['encode_ordinary_batch'])}
        results.append(row)
        rows.append((name, f'{row["tokens_per_second"]:,.0f}', f'{row["of_tiktoken"]:.2f}'))
    print_rows(rows, indent='  ')
    return results


def main(arguments):
    values, rest = parse(BenchConfig, arguments, __doc__)
    if rest:
        raise UserError(f'expected --key=value, got {rest[0]!r}; --help lists the keys')
    bench = build(BenchConfig, values)
    if bench.threads:
        torch.set_num_threads(bench.threads)
    if bench.keep_freed_memory:
        keep_freed_memory()
    device = choose_device(bench.device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} threads'
    print(f'torch {torch.__version__}, {device} ({name}), {bench.dtype}, {bench.rounds} rounds')
    parts = {'layer': bench_layer, 'step': bench_step, 'memory': bench_memory, 'cost': bench_cost,
             'generate': bench_generate, 'tokenize': bench_tokenize}
    results = [row for part in bench.only.split(',') for row in parts[part](bench, device)]
    if bench.json:
        with open(bench.json, 'w', encoding='utf-8') as file:
            json.dump({'torch': torch.__version__, 'device': name, **asdict(bench), 'results': results}, file, indent=1)


if __name__ == '__main__':
    configurator.run(main)
