"""The flow of FluxFlow 0.8, trained and sampled by us and by `fluxflow` and `fluxflow-training` 0.8.1: equal weights.

d = 256, 6 layers, D = 32, 4 downscales, an 8x8 grid (64 tokens, 128 px), text of 1024. Takes turns, round by round.

Training, batch 16: ours is the whole loop, Lightning, EMA and clipping included, from the latents and hidden states
that `prepare` leaves; the text projection is trained too. The peer's is `FlowTrainer.train_step`, called as it comes:
it encodes images and captions (padded to 128 tokens, as its own script does) in every step. Its DistilBERT has the
published size and random weights, and is frozen, as ours is: only the projection upon it is trained.

Sampling, 4 images, 20 steps of DPM-Solver++ 2M, guidance 5, decoded; on neither side is text encoded. Ours runs the
images together, as the peer does; the last row one by one, as `sample` does on a CPU for identical bytes.

    python scripts/bench_flow.py [--rounds 5] [--peer-python PYTHON] [--json FILE]

`*_speedup_*` are against the peer in float32: it has no other precision. `*_seconds_*`: of a step, or of 4 images.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from alternation import Worker, alternate, machine, reply, serve
from torch import Tensor, nn

VAE_DIM, DOWNSCALES, RESOLUTION, GRID = 32, 4, 128, 8
WIDTH, NUM_LAYERS, NUM_HEADS = 256, 6, 8
TEXT_WIDTH, BACKBONE_WIDTH, TOKENS = 1024, 768, 128
BATCH, IMAGES, STEPS, GUIDANCE, CFG_DROPOUT = 16, 4, 20, 5.0, 0.1
BETAS = 0.00085, 0.012


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with the peers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, folder = options.worker
        WORKERS[name](Path(folder))
        return
    print(machine({"torch": torch.__version__, "lightning": version("lightning"), "fluxflow-training": "0.8.1"}))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_weights(Path(folder))
        workers = {
            name: stack.enter_context(
                Worker(
                    options.peer_python if "peer" in name else sys.executable, Path(__file__), "--worker", name, folder
                )
            )
            for name in WORKERS
        }
        taken = alternate(workers, options.rounds, warmup=2)
    result: dict[str, float] = {}
    print(f"{'':24}{'seconds':>9}{'images/s':>10}{'speedup':>9}")
    for name, row in taken.items():
        work, _, who = name.partition(" ")
        speedup = taken[f"{work} peer"].median / row.median
        images = BATCH if work == "train" else IMAGES
        print(f"{name:24}{row.median:9.3f}{images / row.median:10.2f}{speedup:9.2f}")
        result[f"{work}_seconds_{who}"] = row.median
        if who != "peer":
            result[f"{work}_speedup_{who}"] = speedup
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


# ---- one set of weights ----


class Folders(NamedTuple):
    """Where the weights lie: all of them as the package reads them, the VAE also as a finished run of ours."""

    published: Path
    vae: Path


def folders(folder: Path) -> Folders:
    return Folders(folder / "published", folder / "vae")


def write_weights(folder: Path) -> None:
    from omegaconf import OmegaConf

    from fluxflow_train.interop.fluxflow08 import save_checkpoint
    from fluxflow_train.models.fluxflow08 import FluxFlow08VAE
    from fluxflow_train.models.fluxflow08_flow import FluxFlow08Flow
    from fluxflow_train.weights import save_model

    torch.manual_seed(0)
    vae = FluxFlow08VAE(VAE_DIM, DOWNSCALES, DOWNSCALES)
    flow = FluxFlow08Flow(vae.latent_channels, WIDTH, NUM_LAYERS, NUM_HEADS, TEXT_WIDTH, DOWNSCALES)
    save_checkpoint(folders(folder).published, vae, flow, None)
    folders(folder).vae.mkdir()
    save_model(folders(folder).vae, vae, OmegaConf.create(), {})


def latent_like(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---- ours ----


def our_networks(folder: Path) -> tuple[Any, Any]:
    """(VAE, flow) of the published weights, in the memory layout of our runs."""
    from fluxflow_train.interop.fluxflow08 import load_checkpoint

    vae, flow, _ = load_checkpoint(folders(folder).published)
    assert flow is not None
    return vae.to(memory_format=torch.channels_last), flow.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def our_objective() -> Any:
    from fluxflow_train.objectives import VPrediction

    return VPrediction(1000, *BETAS)


def our_text() -> nn.Module:
    """The published projection upon a backbone that is only asked for the empty caption: all else is cached."""
    from fluxflow_train.models.fluxflow08_text import FluxFlow08Text
    from fluxflow_train.models.text import Backbone

    class Cached(Backbone):
        @property
        def fingerprint(self) -> str:
            return "none"

        def token_ids(self, caption: str) -> list[int]:
            return [0, 0]

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, self.width)

    return FluxFlow08Text(Cached(BACKBONE_WIDTH, TOKENS), TEXT_WIDTH, TOKENS)


def our_training(precision: str) -> Callable[[Path], None]:
    """Train under Lightning; every batch waits for its line on stdin."""

    def run(folder: Path) -> None:
        import logging
        from functools import partial

        import lightning as L

        from fluxflow_train.callbacks.ema import EMA
        from fluxflow_train.models.text_to_image import TextToImage
        from fluxflow_train.tasks.flow import FlowTask

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        vae, flow = our_networks(folder)
        budget = 1_000_000
        task = FlowTask(
            TextToImage(vae, our_text(), flow),
            str(folders(folder).vae),
            json.loads((folders(folder).vae / "model.json").read_text())["sha256"],
            our_objective(),
            CFG_DROPOUT,
            sampler={},
            latents=None,
            optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True),
            budget_images=budget,
            seed=0,
            lr_warmup=0.0,
            lr_final=1.0,
            clip_norm=1.0,
            log_every=512,
            max_bad_steps=10,
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
        ).fit(task, requested_batches(vae.latent_channels))

    return run


def requested_batches(latent_channels: int) -> Iterator[dict[str, Any]]:
    """A batch as LatentData yields it for each line on stdin; the time until the next one is that of the step."""
    from time import perf_counter

    mean = latent_like(BATCH, latent_channels, GRID, GRID)
    batch = {
        "latent_mean": mean,
        "latent_logvar": torch.full_like(mean, -30.0),
        "text_hidden": latent_like(BATCH, 1, BACKBONE_WIDTH),
        "text_mask": torch.ones(BATCH, 1, dtype=torch.bool),
        "index": torch.arange(BATCH),
        "epoch": torch.zeros(BATCH, dtype=torch.int64),
        "key": [str(i) for i in range(BATCH)],
        "caption": [""] * BATCH,
    }
    for _ in sys.stdin:
        start = perf_counter()
        yield batch
        reply(perf_counter() - start)


def our_sampling(dtype: torch.dtype, together: int) -> Callable[[Path], None]:
    """`IMAGES` images, `together` at a time; the solver's arithmetic is float32 in any case."""

    def run(folder: Path) -> None:
        from fluxflow_train.models.fluxflow08_text import one_token
        from fluxflow_train.models.text import TextFeatures
        from fluxflow_train.pixels import quantize
        from fluxflow_train.sampling import Guidance, sample

        vae, flow = (net.eval().requires_grad_(False) for net in our_networks(folder))
        prompts, empty = latent_like(2, IMAGES, TEXT_WIDTH)
        noise = latent_like(IMAGES, *vae.latent_shape(RESOLUTION, RESOLUTION))

        def autocast() -> Any:
            return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

        def predict(z: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
            with autocast():
                return flow(z, t, text).float()

        @torch.inference_mode()
        def images() -> None:
            for some in torch.arange(IMAGES).split(together):
                z = sample(
                    predict,
                    our_objective(),
                    one_token(prompts[some]),
                    one_token(empty[some]),
                    noise[some],
                    solver="dpmpp_2m",
                    steps=STEPS,
                    guidance=Guidance(GUIDANCE, (0.0, 1.0), 0.0),
                )
                with autocast():
                    quantize(vae.decode(z).float())

        serve(images)

    return run


# ---- the peer's ----


def peer_networks(folder: Path) -> Any:
    """The package's model of the published folder: `compressor`, `flow_processor`, `expander`."""
    if version("fluxflow-training") != "0.8.1":
        raise SystemExit(f"the peer is fluxflow-training 0.8.1, found {version('fluxflow-training')}")
    versioning: Any = import_module("fluxflow.models.versioning")  # by name: no dependencies, and without types
    return versioning.load_versioned_checkpoint(folders(folder).published, device="cpu")


def peer_training(folder: Path) -> None:
    models: Any = import_module("fluxflow.models")
    training: Any = import_module("fluxflow_training.training")
    accelerate: Any = import_module("accelerate")
    model = peer_networks(folder)
    text = models.BertTextEncoder(TEXT_WIDTH)
    text.language_model.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.flow_processor.parameters(), lr=1e-4)
    text_optimizer = torch.optim.AdamW([p for p in text.parameters() if p.requires_grad], lr=1e-4)
    trainer = training.FlowTrainer(
        flow_processor=model.flow_processor,
        text_encoder=text,
        compressor=model.compressor,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
        text_encoder_optimizer=text_optimizer,
        text_encoder_scheduler=torch.optim.lr_scheduler.ConstantLR(text_optimizer),
        cfg_dropout_prob=CFG_DROPOUT,
        accelerator=accelerate.Accelerator(cpu=True),
    )
    images = torch.rand(BATCH, 3, RESOLUTION, RESOLUTION) * 2 - 1
    ids = torch.randint(1000, 30000, (BATCH, TOKENS))
    mask = torch.ones_like(ids)
    steps = iter(range(1_000_000))
    serve(lambda: trainer.train_step(images, ids, mask, next(steps)))


def peer_sampling(folder: Path) -> None:
    """Its pipeline from components; MODEL.md part B names what it needs to run at all."""
    models: Any = import_module("fluxflow.models")
    diffusers: Any = import_module("diffusers")

    class Pipeline(models.FluxFlowPipeline):
        _execution_device = torch.device("cpu")

        def encode_prompt(self, *args: Any, **kwargs: Any) -> Tensor:
            return latent_like(2 * IMAGES, TEXT_WIDTH)

    model = peer_networks(folder).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=BETAS[0], beta_end=BETAS[1], beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    pipeline = Pipeline(model.compressor, model.flow_processor, model.expander, None, None, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    channels = pipeline.compressor.d_model = VAE_DIM + 5
    latents = latent_like(IMAGES, GRID * GRID + 1, channels)
    latents[:, -1] = 0
    latents[:, -1, :2] = GRID / 1024  # its last token tells the size
    serve(
        lambda: pipeline(
            prompt=["a"] * IMAGES,
            height=RESOLUTION,
            width=RESOLUTION,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=latents,
            output_type="np",
        )
    )


WORKERS: dict[str, Callable[[Path], None]] = {
    "train peer": peer_training,
    "train fp32": our_training("32-true"),
    "train bf16": our_training("bf16-mixed"),
    "sample peer": peer_sampling,
    "sample fp32": our_sampling(torch.float32, IMAGES),
    "sample bf16": our_sampling(torch.bfloat16, IMAGES),
    "sample one_by_one": our_sampling(torch.float32, 1),
}

if __name__ == "__main__":
    main()
