"""`python -m fluxflow_train.export run=DIR format=fluxflow out=FOLDER`: a run for other programs, or back."""

from omegaconf import DictConfig

from fluxflow_train.cli import command


@command("export")
def main(cfg: DictConfig) -> None:
    from fluxflow_train.exporting import export

    export(cfg)


if __name__ == "__main__":
    main()
