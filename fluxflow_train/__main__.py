"""`python -m fluxflow_train +experiment=vae_bezier`: train, validate, evaluate at the end."""

from omegaconf import DictConfig

from fluxflow_train.cli import command


@command("train")
def main(cfg: DictConfig) -> None:
    from fluxflow_train.run import train

    train(cfg)


if __name__ == "__main__":
    main()
