"""`python -m fluxflow_train +experiment=vae_bezier`: train, validate, evaluate at the end."""

from fluxflow_train import preemption

if __name__ == "__main__":
    preemption.listen()  # first of all: a signal may come while the imports below take their seconds

from omegaconf import DictConfig

from fluxflow_train.cli import command


@command("train")
def main(cfg: DictConfig) -> None:
    from fluxflow_train.run import train

    train(cfg)


if __name__ == "__main__":
    main()
