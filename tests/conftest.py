"""Fixtures compose the real configuration, made small."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

# Processes of `pytest -n` share the cores; what they start inherits it. Before torch looks.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fluxflow_train.cli import config_folder

SMALL = (
    "data=shapes",
    "data.num_train=48",
    "data.num_tune=12",
    "data.num_test=12",
    "scale.resolution=32",
    "scale.batch_size=4",
    "scale.log_every=8",
    "scale.validate_every=16",
    "scale.samples_every=16",
    "scale.checkpoint_every=8",
    "scale.vae.encoder_widths=[8,8,8]",
    "scale.vae.decoder_widths=[8,8,8]",
    "scale.vae.context_width=16",
    "scale.discriminator.width=8",
    "scale.flow.width=32",
    "scale.flow.depth=2",
    "scale.flow.num_heads=2",
    "scale.flow.text_width=24",
    "scale.flow.text_hidden=16",
    "scale.flow.mlp_width=32",
    "latents_device=cpu",
    "trainer=cpu",
    "trainer.precision=32-true",
    "budget.images=32",
)


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Overrides that make a run of seconds."""
    return SMALL


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards are written once for the session."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen text backbone that loads in no time: DistilBERT's files, small and random."""
    return write_distilbert(tmp_path_factory.mktemp("distilbert"), width=16)


@pytest.fixture(scope="session")
def wide_backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the default backbone's width: narrow ones leave no fine choice of matched widths."""
    return write_distilbert(tmp_path_factory.mktemp("distilbert"), width=384)


def write_distilbert(folder: Path, width: int) -> Path:
    from transformers import DistilBertConfig, DistilBertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "green", "blue", "circle", "square", "left", "right"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[assignment]
    sizes = {"dim": width, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DistilBertModel(DistilBertConfig(vocab_size=len(words), pad_token_id=0, **sizes)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run_command(module: str, *arguments: str) -> int:
    """`python -m module arguments`, in this process to save the imports; its exit code."""
    name = f"{module}.__main__" if module == "fluxflow_train" else module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [module, *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        try:
            importlib.import_module(name).main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


@pytest.fixture(scope="session")
def launch() -> Callable[..., int]:
    """`launch("fluxflow_train", "run=DIR", ...)`: a command's exit code, for fixtures; tests take `command`."""
    return run_command


@pytest.fixture(scope="session")
def vae_run(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """A finished VAE run of a few images, at 32 px."""
    run = tmp_path_factory.mktemp("runs") / "vae"
    options = ("+experiment=vae_bezier", *SMALL, f"data.root={data_root}", "evaluate.split=null", f"run={run}")
    assert run_command("fluxflow_train", *options) == 0
    return run


@pytest.fixture(scope="session")
def frozen_text(backbone_folder: Path) -> tuple[str, ...]:
    """The small frozen backbone for a run of flow training."""
    return ("model/text=distilbert", f"model.text.backbone.checkpoint.path={backbone_folder}")


@pytest.fixture(scope="session")
def flow_options(vae_run: Path, data_root: Path) -> tuple[str, ...]:
    """What makes a run of flow training small, beside `+experiment=...` and a backbone."""
    return (
        *SMALL,
        f"data.root={data_root}",
        f"vae={vae_run}",
        "scale.flow.learning_rate=0.02",  # so high that a few steps show in pictures
        "task.sampler.steps=3",
        "callbacks.samples.num_prompts=7",
        "evaluate.split=null",
    )


@pytest.fixture(scope="session")
def flow_run(
    tmp_path_factory: pytest.TempPathFactory, flow_options: tuple[str, ...], frozen_text: tuple[str, ...]
) -> Path:
    """A finished flow run of a few images on `vae_run`."""
    run = tmp_path_factory.mktemp("runs") / "flow"
    assert run_command("fluxflow_train", "+experiment=flow_bezier", *flow_options, *frozen_text, f"run={run}") == 0
    return run


class Command(NamedTuple):
    """What a command left: its exit code and what it wrote to the terminal."""

    code: int
    output: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Command]:
    """`command("fluxflow_train", "run=DIR", ...)` as typed behind `python -m`, in this process."""

    def run(module: str, *arguments: str) -> Command:
        capfd.readouterr()
        code = run_command(module, *arguments)
        captured = capfd.readouterr()
        return Command(code, captured.out + captured.err)

    return run


@pytest.fixture
def config(data_root: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """`config("+experiment=vae_bezier", ...)`: the training configuration, small, in `tmp_path`."""

    def build(*overrides: str, small: bool = True) -> DictConfig:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return compose(
                "train",
                [*(SMALL if small else ()), f"data.root={data_root}", f"run={tmp_path / 'run'}", *overrides],
                return_hydra_config=False,
            )

    return build
