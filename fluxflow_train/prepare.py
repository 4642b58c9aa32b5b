"""`python -m fluxflow_train.prepare data=...`: write the shards and their index before the first run needs them."""

from fluxflow_train import preemption

if __name__ == "__main__":
    preemption.listen(preemption.CLUSTER)  # Ctrl-C ends it at once: what was made is kept

from omegaconf import DictConfig

from fluxflow_train.cli import command


@command("prepare")
def main(cfg: DictConfig) -> None:
    from fluxflow_train.run import prepare

    prepare(cfg)


if __name__ == "__main__":
    main()
