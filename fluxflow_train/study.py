"""`python -m fluxflow_train.study plan=vae_size`: train what a plan compares, and report on it."""

from fluxflow_train import preemption

if __name__ == "__main__":
    preemption.listen()

from omegaconf import DictConfig

from fluxflow_train.cli import command


@command("study")
def main(cfg: DictConfig) -> None:
    from fluxflow_train.studying import study

    study(cfg)


if __name__ == "__main__":
    main()
