"""`python -m fluxflow_train.evaluate run=DIR`: the report of a finished run."""

from fluxflow_train import preemption

if __name__ == "__main__":
    preemption.listen(preemption.CLUSTER)  # Ctrl-C ends it at once: what was made is kept

from omegaconf import DictConfig

from fluxflow_train.cli import command


@command("evaluate")
def main(cfg: DictConfig) -> None:
    from fluxflow_train.run import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    main()
