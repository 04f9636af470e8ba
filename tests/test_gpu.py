"""What only a GPU can show; elsewhere all of it is skipped."""

import math

import pytest
import torch

from conftest import SMALL, run_script, table_of
from model import GPT, GPTConfig
from sample import read_log
from test_model import VARIANTS, layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def step_of(variant, compile=False, **changes):
    """A function for a training step, in bfloat16, of a small model on the GPU; gives the loss."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{'vocab_size': 84, 'n_layer': 2, 'n_embd': 64, 'd_ffn': 128}
                        | variant | changes)).cuda()
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(gpt) if compile else gpt
    idx = torch.randint(84, (16, gpt.config.block_size), device='cuda')

    def step():
        with torch.autocast('cuda', torch.bfloat16):
            _, loss, routing = forward(idx, idx)
        (loss + routing.aux_loss.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()
    return step


@pytest.mark.parametrize('recompute', (False, True))
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_a_gpu_gives_the_gradients_of_a_cpu_in_float32(variant, dtype, recompute):
    results, distance = [], 1e-4 if dtype == torch.float32 else 0.08
    for device in ('cpu', 'cuda'):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(vocab_size=84, n_layer=2, n_embd=64, d_ffn=128, aux_weight=0.1,
                            recompute=recompute, **variant)).to(device)
        idx = torch.randint(84, (16, 64), generator=torch.Generator().manual_seed(0)).to(device)
        enabled = device == 'cuda' and dtype != torch.float32
        with torch.autocast(device, dtype, enabled=enabled):
            _, loss, routing = gpt(idx, idx)
        (loss + routing.aux_loss.sum()).backward()
        results.append(torch.cat([p.grad.flatten().cpu() for p in gpt.parameters()]))
    assert (results[0] - results[1]).norm() <= distance * results[0].norm()


@pytest.mark.parametrize('dtype', DTYPES)
def test_experts_without_tokens_get_zero_gradients(dtype):
    m = layer('moe', dtype=dtype).cuda()
    m(torch.randn(1, 16, device='cuda', dtype=dtype))[0].sum().backward()   # 2 of 5 experts
    for p in (m.w_g, m.w_p, m.w_o):
        assert p.grad.isfinite().all() and sum(not g.any() for g in p.grad) == 3


@pytest.mark.parametrize('recompute', (False, True))
@pytest.mark.parametrize('variant', ({'mlp': 'dense'}, *VARIANTS), ids=str)
def test_a_step_in_bfloat16_never_waits_for_the_gpu(variant, recompute):
    if torch.cuda.get_device_capability() not in ((9, 0), (10, 0), (10, 3)):
        pytest.skip('the grouped matmul of this GPU reads its ends on the CPU')
    step = step_of(variant, aux_weight=0.01, recompute=recompute)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_a_compiled_step_gives_the_same_losses(variant):
    losses = []
    for compiled in (False, True):
        torch.compiler.reset()
        step = step_of(variant, compiled)
        losses.append([step().item() for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.parametrize('mlp', ('moe', 'aoe'))
def test_computing_blocks_again_needs_less_memory(mlp):
    peak = []
    for recompute in (True, False):
        step = step_of({'mlp': mlp}, n_embd=384, n_head=6, d_ffn=1536, n_layer=4, block_size=1024,
                       recompute=recompute)
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak.append(torch.cuda.max_memory_allocated() - before)
        del step
    assert peak[0] < 0.6 * peak[1]


@pytest.mark.parametrize('dtype', ('auto', 'float16', 'float32'))
def test_training_resuming_and_sampling_on_a_gpu(workspace, dtype):
    command = [*SMALL, f'--dtype={dtype}', '--mlp=aoe,moe', f'--out_dir=out/gpu-{dtype}',
               '--lr_decay_iters=20']
    run_script('train.py', *command, '--max_iters=10', cwd=workspace)
    printed = run_script('train.py', *command, '--init_from=resume', cwd=workspace).stdout
    assert {'aoe', 'moe'} < set(table_of(printed))
    for mlp in ('aoe', 'moe'):
        folder = f'out/gpu-{dtype}/{mlp}'
        log = read_log(workspace / folder)
        assert [entry['iter'] for entry in log] == [0, 10, 20]
        assert log[-1]['val_loss'] < log[0]['val_loss'] < math.log(200)
        sample = run_script('sample.py', folder, '--show_experts=True', '--max_new_tokens=30',
                            cwd=workspace)
        assert 'experts.html' in sample.stdout


def test_torchrun_with_one_process_on_a_gpu(workspace):
    arguments = [*SMALL, '--mlp=aoe', '--out_dir=out/torchrun-gpu']
    run_script('train.py', *arguments, cwd=workspace, torchrun=True)
    assert len(read_log(workspace / 'out/torchrun-gpu/aoe')) == 3
