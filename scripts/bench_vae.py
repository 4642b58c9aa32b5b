"""One VAE + GAN step of our task beside the same step of `fluxflow-training` 0.8.1, on the same published network.

FluxFlow 0.8 VAE with D = 32 and 4 downscales, 64 px, batch 8, a 32-channel patch discriminator, R1 every 16 steps, EMA,
clipping; the peer with its own defaults except LPIPS, which needs weights from the network. Ours is the whole training
loop, Lightning included. Rounds are taken in alternation; the R1 step falls in the warm-up.

    python scripts/bench_vae.py [--rounds 7] [--peer-python PYTHON] [--json FILE]

`speedup_*` and `memory_ratio` (highest resident memory of the process, our worse one) are against the peer in float32:
it has no other precision. `peak_fraction`: useful operations of our bf16 step (those of the plain transposed
convolutions, counted by torch) per second over those of a large bf16 convolution on the same cores.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from alternation import Worker, alternate, machine, reply, serve
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

WIDTH, DOWNSCALES, RESOLUTION, BATCH = 32, 4, 64, 8
DISCRIMINATOR_WIDTH, DISCRIMINATOR_DEPTH, R1_GAMMA, R1_EVERY = 32, 3, 5.0, 16
PEAK_SHAPE = (8, 256, 64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with the peers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        WORKERS[options.worker]()
        return
    print(machine({"torch": torch.__version__, "lightning": version("lightning"), "fluxflow-training": "0.8.1"}))
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                Worker(options.peer_python if name == "peer" else sys.executable, Path(__file__), "--worker", name)
            )
            for name in WORKERS
        }
        taken = alternate(workers, options.rounds, warmup=2)
    peer, fp32, bf16 = (taken[name] for name in ("peer", "ours-fp32", "ours-bf16"))
    peak = peak_operations() / taken["peak"].median
    result = {
        "speedup_fp32": peer.median / fp32.median,
        "speedup_bf16": peer.median / bf16.median,
        "memory_ratio": max(fp32.peak_mib, bf16.peak_mib) / peer.peak_mib,
        "peak_fraction": step_operations() / bf16.median / peak,
    }
    print(f"{'':10}{'s/step':>9}{'MiB':>8}{'speedup':>9}{'memory':>8}")
    for name in ("peer", "ours-fp32", "ours-bf16"):
        row = taken[name]
        print(
            f"{name:10}{row.median:9.2f}{row.peak_mib:8.0f}"
            f"{peer.median / row.median:9.2f}{row.peak_mib / peer.peak_mib:8.2f}"
        )
    print(f"bf16 convolution peak {peak / 1e9:.0f} GFLOP/s; our bf16 step reaches {result['peak_fraction']:.0%} of it")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def our_networks() -> tuple[Any, nn.Module]:
    from fluxflow_train.models.discriminator import PatchDiscriminator
    from fluxflow_train.models.fluxflow08 import FluxFlow08VAE

    torch.manual_seed(0)
    vae = FluxFlow08VAE(WIDTH, DOWNSCALES, DOWNSCALES)
    return vae, PatchDiscriminator(width=DISCRIMINATOR_WIDTH, num_downscales=DISCRIMINATOR_DEPTH)


def ours(precision: str) -> Callable[[], None]:
    """Train under Lightning; every batch waits for its line on stdin."""

    def run() -> None:
        import logging
        from functools import partial

        import lightning as L

        from fluxflow_train import losses
        from fluxflow_train.callbacks.ema import EMA
        from fluxflow_train.tasks.vae import Adversary, VAETask

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        vae, discriminator = our_networks()
        adam = partial(torch.optim.AdamW, lr=1e-4, betas=(0.5, 0.9), weight_decay=0.0, fused=True)
        adversary = Adversary(
            discriminator,
            adam,
            disc_start=0.0,
            gan_start=0.0,
            weight=0.5,
            max_adaptive=10.0,
            r1_gamma=R1_GAMMA,
            r1_every=R1_EVERY,
        )
        budget = 1_000_000
        task = VAETask(
            vae,
            adam,
            budget,
            seed=0,
            reconstruction=losses.l1_loss,
            kl_weight=1e-4,
            kl_warmup=0.1,
            free_bits=0.0,
            lr_warmup=0.0,
            lr_final=1.0,
            clip_norm=1.0,
            log_every=512,
            max_bad_steps=10,
            latent_statistics=None,
            adversary=adversary,
        )
        L.Trainer(
            accelerator="cpu",
            precision=precision,  # type: ignore[arg-type]
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[EMA(budget)],
        ).fit(task, requested_batches())

    return run


def requested_batches() -> Iterator[dict[str, Any]]:
    """The same batch for each line on stdin; the time until the next one is asked for is that of the step."""
    from time import perf_counter

    batch = {
        "image": torch.randint(0, 256, (BATCH, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8),
        "index": torch.arange(BATCH),
        "epoch": torch.zeros(BATCH, dtype=torch.int64),
        "key": [str(i) for i in range(BATCH)],
        "caption": [""] * BATCH,
    }
    for _ in sys.stdin:
        start = perf_counter()
        yield batch
        reply(perf_counter() - start)


def peer() -> None:
    """The peer's own trainer step."""
    models: Any = import_module("fluxflow.models")  # by name: they are no dependencies, and have no types
    training: Any = import_module("fluxflow_training.training")
    accelerate: Any = import_module("accelerate")
    if version("fluxflow-training") != "0.8.1":
        raise SystemExit(f"the peer is fluxflow-training 0.8.1, found {version('fluxflow-training')}")
    torch.manual_seed(0)
    compressor = models.v080.FluxCompressor(d_model=WIDTH, downscales=DOWNSCALES)
    expander = models.v080.FluxExpander(d_model=WIDTH, upscales=DOWNSCALES)
    discriminator = models.PatchDiscriminator(base_ch=DISCRIMINATOR_WIDTH, depth=DISCRIMINATOR_DEPTH, ctx_dim=WIDTH)
    optimizer = torch.optim.AdamW([*compressor.parameters(), *expander.parameters()], lr=1e-4, betas=(0.5, 0.9))
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=1e-4, betas=(0.5, 0.9))
    trainer = training.VAETrainer(
        compressor=compressor,
        expander=expander,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
        ema=training.EMA(nn.ModuleList([compressor, expander])),
        reconstruction_loss_fn=nn.L1Loss(),
        reconstruction_loss_min_fn=nn.MSELoss(),
        use_gan=True,
        discriminator=discriminator,
        discriminator_optimizer=optimizer_d,
        discriminator_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer_d),
        r1_gamma=R1_GAMMA,
        r1_interval=R1_EVERY,
        use_lpips=False,
        accelerator=accelerate.Accelerator(cpu=True),
    )
    images = torch.rand(BATCH, 3, RESOLUTION, RESOLUTION) * 2 - 1
    steps = iter(range(1_000_000))
    serve(lambda: trainer.train_step(images, next(steps)))


def peak() -> None:
    """A convolution as large as this machine's bf16 code likes them."""
    x = torch.randn(PEAK_SHAPE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(PEAK_SHAPE[1], PEAK_SHAPE[1], 3, padding=1, dtype=torch.bfloat16)
    conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        serve(lambda: conv(x))


def peak_operations() -> int:
    batch, channels, height, width = PEAK_SHAPE
    return 2 * batch * channels * channels * 9 * height * width


def step_operations() -> int:
    """Of one VAE + GAN step without R1: reconstruction, D's opinion and its gradient, D on real images."""
    with torch.device("meta"):
        vae, discriminator = our_networks()
        x = torch.empty(BATCH, 3, RESOLUTION, RESOLUTION)
        eps = torch.empty(BATCH, *vae.latent_shape(RESOLUTION, RESOLUTION))

    def total(loss: Tensor) -> None:
        loss.sum().backward()

    with FlopCounterMode(display=False) as counter:
        out = vae(x, eps)
        total(out.x_hat)
        total(discriminator(out.x_hat.detach().requires_grad_()))
        total(discriminator(x))
    return counter.get_total_flops()


WORKERS: dict[str, Callable[[], None]] = {
    "peer": peer,
    "ours-fp32": ours("32-true"),
    "ours-bf16": ours("bf16-mixed"),
    "peak": peak,
}

if __name__ == "__main__":
    main()
