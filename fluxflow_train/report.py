"""`python -m fluxflow_train.report runs=[A,B]`: finished runs side by side, where their reports compare."""

from omegaconf import DictConfig

from fluxflow_train.cli import command


@command("report")
def main(cfg: DictConfig) -> None:
    from fluxflow_train.comparing import compare

    compare(cfg)


if __name__ == "__main__":
    main()
