"""`python -m fluxflow_train.sample run=DIR 'prompts=["a red heart"]'`: prompts to pictures."""

from omegaconf import DictConfig

from fluxflow_train.cli import command


@command("sample")
def main(cfg: DictConfig) -> None:
    from fluxflow_train.pipeline import sample

    sample(cfg)


if __name__ == "__main__":
    main()
